"""One replica of a node serves the node's metrics, and another takes over from it."""

import time

import httpx

from services.local.processes import free_port
from services.recommend.telemetry import NodeMetrics, Telemetry


def test_a_replica_takes_over_the_nodes_metrics() -> None:
    port = free_port()
    replicas = [NodeMetrics(Telemetry(), host="127.0.0.1", port=port) for _ in range(2)]
    for replica in replicas:
        replica.start()
    try:
        for replica in replicas:
            assert "reflux_answers_total" in _scrape(port)
            replica.stop()
    finally:
        for replica in replicas:
            replica.stop()


def _scrape(port: int, timeout_s: float = 20.0) -> str:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return httpx.get(f"http://127.0.0.1:{port}/metrics").raise_for_status().text
        except httpx.TransportError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
