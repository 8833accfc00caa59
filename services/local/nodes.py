"""Several Ray nodes on this machine, to rehearse what many machines do: start, hurt, mend.

Each node is a raylet of its own with its workers, at a loopback address of its own; with `Wires`
each stands in a network namespace of its own, with a cable of its own (root and iproute2 needed).
Ray's servers listen on every interface, so a token says who may talk to them (`secured`).
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Self

import httpx
import psutil

from services.core.errors import RefluxError, UnavailableError
from services.local import processes
from services.local.processes import Command, Process

BRIDGE: Final = "reflux0"
SWITCH: Final = "reflux-switch"  # the bridge's own namespace
NETWORK: Final = "10.77.7"  # /24: this machine is .254, the head .1, nodes from .2 on
LOOPBACKS: Final = "127.77.7"  # the same, without namespaces
FREEZE, CUT = "frozen", "cut off"


class Wires:
    """A bridge, and on it this machine and a network namespace with an address for each name.

    The bridge stands in a namespace too: what crosses one on the machine itself goes through the
    machine's packet filter, and Docker's drops whatever Docker hasn't sent.
    """

    def __init__(self) -> None:
        if os.geteuid() != 0 or shutil.which("ip") is None:
            raise RefluxError(
                "network namespaces need root and `ip` (apt-get install iproute2); "
                "without --namespaces nodes stand on loopback"
            )
        self._names: list[str] = []
        self._stop = ExitStack()

    def __enter__(self) -> Self:
        try:
            self._space(SWITCH)
            _ip("-n", SWITCH, "link", "add", BRIDGE, "type", "bridge")
            _ip("-n", SWITCH, "link", "set", BRIDGE, "up")
            _ip("link", "add", BRIDGE, "type", "veth", "peer", "name", "machine", "netns", SWITCH)
            self._stop.callback(_ip, "link", "del", BRIDGE)  # with its namespace it goes later
            _ip("-n", SWITCH, "link", "set", "machine", "master", BRIDGE, "up")
            _ip("addr", "add", f"{NETWORK}.254/24", "dev", BRIDGE)
            _ip("link", "set", BRIDGE, "up")
        except BaseException:
            self._stop.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.close()

    def add(self, name: str) -> str:
        """A namespace of that name, wired; its address."""
        space = f"reflux-{name}"
        self._space(space)
        self._names.append(name)
        address = f"{NETWORK}.{len(self._names)}"
        other_end = ("peer", "name", "eth0", "netns", space)
        _ip("-n", SWITCH, "link", "add", name, "type", "veth", *other_end)  # at most 15 characters
        _ip("-n", SWITCH, "link", "set", name, "master", BRIDGE, "up")
        _ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", space, "link", "set", device, "up")
        return address

    def plug(self, name: str, *, into: bool) -> None:
        _ip("-n", SWITCH, "link", "set", name, "up" if into else "down")

    def _space(self, name: str) -> None:
        _ip("netns", "add", name)
        self._stop.callback(_ip, "netns", "del", name)

    def inside(self, name: str, command: Command) -> Command:
        """The command, run in that namespace."""
        return replace(
            command,
            argv=["ip", "netns", "exec", f"reflux-{name}", *command.argv],
            # The machine's own name leads to an address that isn't there.
            env={**command.env, "GLOO_SOCKET_IFNAME": "eth0"},
        )


@dataclass(eq=False)
class Node:
    """A raylet and all that it has started."""

    name: str
    process: Process

    def family(self) -> list[psutil.Process]:
        try:
            leader = psutil.Process(self.process.pid)
            return [leader, *leader.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def workers(self) -> int:
        """Training workers of both jobs."""
        return sum("ray::RayTrainWorker" in _command_line(one) for one in self.family())

    def signal(self, number: signal.Signals) -> None:
        for one in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                one.send_signal(number)


class Cluster:
    """A head without CPUs, where drivers run, and nodes where everything else does.

    Beside the head, in its namespace: broker and Redis.
    """

    def __init__(
        self,
        home: Path,
        *,
        nodes: int,
        cpus: int,
        wires: Wires | None,
        report: Callable[[str], None],
    ) -> None:
        self._home, self._cpus, self._wires, self._report = home, cpus, wires, report
        self._names = [f"node-{n}" for n in range(1, nodes + 1)]
        self._hosts = {
            name: wires.add(name) if wires else f"{LOOPBACKS}.{n}"
            for n, name in enumerate(("head", *self._names), start=1)
        }
        self._port = processes.free_port()
        self._dashboard_port = processes.free_port()
        self._stop = ExitStack()
        self.nodes: dict[str, Node] = {}
        self.kafka = f"{self._hosts['head']}:{processes.free_port()}"
        self.redis = f"{self._hosts['head']}:{processes.free_port()}"
        self.ray = f"http://{self._hosts['head']}:{self._dashboard_port}"

    def __enter__(self) -> Self:
        host = self._hosts["head"]
        try:
            for command in (
                processes.broker(_port(self.kafka), host=host),
                processes.redis(_port(self.redis), data=self._home / "redis", host=host),
                processes.ray_head(
                    dashboard_port=self._dashboard_port,
                    cpus=0,
                    port=self._port,
                    host=host,
                    env={},
                ),
            ):
                process = self._run("head", command)
                self._stop.callback(process.stop)
                process.wait_ready()
            for name in self._names:
                self.start(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes.values():
            node.signal(signal.SIGCONT)
            node.process.stop(grace_s=2.0)
        self._stop.close()

    def start(self, name: str) -> None:
        """Start a node, or one that is gone anew, and wait until the head knows it."""
        self._report(f"starting {name}")
        command = processes.ray_node(
            name,
            head=f"{self._hosts['head']}:{self._port}",
            cpus=self._cpus,
            host=self._hosts[name],
            ready=lambda: self._hosts[name] in (self.alive() or ()),
        )
        self.nodes[name] = Node(name, self._run(name, command))
        self.nodes[name].process.wait_ready()

    def alive(self) -> set[str] | None:
        """Addresses of the nodes that the head takes for alive; None: it is too busy to say."""
        try:
            token = {"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"}
            url = f"{self.ray}/nodes?view=summary"
            answer = httpx.get(url, timeout=20, headers=token).json()
        except (httpx.TransportError, ValueError):
            return None
        nodes = [one["raylet"] for one in answer["data"]["summary"]]
        return {one["nodeManagerAddress"] for one in nodes if one.get("state") == "ALIVE"}

    def host(self, name: str) -> str:
        return self._hosts[name]

    def busiest(self) -> Node:
        """The node with the most training workers."""
        return max(self.nodes.values(), key=Node.workers)

    def kill(self, node: Node) -> None:
        """As if its power were gone. Waits until the head has noticed."""
        node.signal(signal.SIGKILL)
        node.process.stop(grace_s=0.0)
        deadline = time.monotonic() + 120
        while (alive := self.alive()) is None or self._hosts[node.name] in alive:
            if time.monotonic() > deadline:
                raise UnavailableError(f"the head has not noticed the end of {node.name}")
            time.sleep(0.5)

    @contextmanager
    def apart(self, node: Node) -> Iterator[None]:
        """Frozen whole; in a namespace: alive, but without its cable."""
        if self._wires is None:
            node.signal(signal.SIGSTOP)
        else:
            self._wires.plug(node.name, into=False)
        try:
            yield
        finally:
            if self._wires is None:
                node.signal(signal.SIGCONT)
            else:
                self._wires.plug(node.name, into=True)

    @property
    def apart_means(self) -> str:
        return FREEZE if self._wires is None else CUT

    def cpu_s(self) -> float:
        """CPU seconds of training workers and labellers that live now."""
        total = 0.0
        for node in self.nodes.values():
            for one in node.family():
                line = _command_line(one)
                if "ray::RayTrainWorker" in line or "ray::Labeller" in line:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        times = one.cpu_times()
                        total += times.user + times.system
        return total

    def _run(self, name: str, command: Command) -> Process:
        if self._wires is not None:
            command = self._wires.inside(name, command)
        return Process(command, logs=self._home / "logs")


def secured() -> None:
    """Let this process and those that it starts know a token, which only they have."""
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))


def _port(address: str) -> int:
    return int(address.rsplit(":", 1)[1])


def _command_line(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RefluxError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
