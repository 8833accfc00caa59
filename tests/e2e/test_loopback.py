"""What the whole running stack, jobs included, can be reached by."""

import ipaddress
import json
import socket

import psutil

from services.core.stackfile import stack_path
from tests.e2e.conftest import Running


def test_nothing_listens_beyond_loopback(running: Running) -> None:
    stack = json.loads(stack_path(running.settings).read_text())
    running.wait_until(
        lambda: "RUNNING" in running.reflux("student", "status"), "the distillation job"
    )
    listeners: dict[str, set[str]] = {}

    def look() -> bool:
        for identity in [stack["supervisor"], *stack["processes"].values()]:
            leader = psutil.Process(int(identity["pid"]))
            for process in [leader, *leader.children(recursive=True)]:
                try:
                    name = " ".join(process.cmdline())
                    for connection in process.net_connections():
                        udp = connection.type == socket.SOCK_DGRAM and not connection.raddr
                        if connection.status == psutil.CONN_LISTEN or udp:
                            address = ipaddress.ip_address(connection.laddr.ip)
                            mapped = getattr(address, "ipv4_mapped", None) or address
                            if not mapped.is_loopback:
                                listeners.setdefault(name, set()).add(str(connection.laddr))
                            seen.add(name)
                except psutil.NoSuchProcess:
                    continue
        return any("RayTrainWorker" in name for name in seen)

    seen: set[str] = set()
    running.wait_until(look, "a training worker that listens")
    assert listeners == {}
    parts = ("redis", "tansu", "gateway", "console", "gcs_server", "raylet", "haproxy")
    for part in (*parts, "ServeReplica"):
        assert any(part in name for name in seen), f"{part} was not among {sorted(seen)}"
