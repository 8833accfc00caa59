"""Who answers in the bench. Each starts, says where it listens and which processes it is, ends."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx
import psutil

from services.core.settings import Settings
from services.local import processes
from services.local.processes import Command, Process
from services.local.stack import Stack

ENDPOINT: Final = "endpoint"
NOOP: Final = "noop"
ENGINE: Final = "engine"
NAMES: Final = (ENGINE, "uvicorn", "litserve", NOOP, ENDPOINT)
ON_RAY: Final = {
    NOOP: "services.local.serving_bench.noop:build",
    ENDPOINT: "services.recommend.replica:build",
}
MODULES: Final = {
    "uvicorn": "services.local.serving_bench.bare",
    "litserve": "services.local.serving_bench.behind_litserve",
}


@dataclass(frozen=True)
class Subject:
    """Something that answers at `url`."""

    name: str
    url: str
    family: Callable[[], list[psutil.Process]]

    def cpu_s(self) -> float:
        """CPU that its processes have used so far."""
        return sum(_cpu_s(process) for process in self.family())

    def memory_bytes(self) -> int:
        """What they hold, shared pages divided among who shares them."""
        return sum(_pss(process) for process in self.family())


@contextmanager
def on_ray(name: str, settings: Settings, stack: Stack) -> Iterator[Subject]:
    """The real endpoint, or nothing, deployed on the stack's Ray behind its proxy."""
    from services.recommend.deploy import deploy

    deployed = deploy(settings, import_path=ON_RAY[name])
    stack.report(f"behind {deployed.proxy}")
    head = stack.pid("ray")
    yield Subject(name, deployed.url, lambda: _serve_processes(head))


@contextmanager
def alone(name: str, settings: Settings, logs: Path) -> Iterator[Subject]:
    """A server of its own: uvicorn or LitServe."""
    port = processes.free_port()
    url = f"http://{processes.LOOPBACK}:{port}"
    command = Command(
        name=f"bench-{name}",
        argv=[sys.executable, "-m", MODULES[name], str(port)],
        ready=lambda: _answers(url, settings),
        env={**settings.environment(), "OMP_NUM_THREADS": "1"},
        ready_timeout_s=120.0,
    )
    process = Process(command, logs=logs)
    try:
        process.wait_ready()
        yield Subject(name, url, lambda: _family(process.pid))
    finally:
        process.stop()


def _answers(url: str, settings: Settings) -> bool:
    headers = settings.keys.header("recommend")
    try:
        found = httpx.post(f"{url}/v1/recommendations", json={"n": 1}, headers=headers, timeout=30)
    except httpx.TransportError:
        return False
    return found.status_code == 200


def _family(pid: int) -> list[psutil.Process]:
    leader = psutil.Process(pid)
    return [leader, *leader.children(recursive=True)]


def _serve_processes(head: int) -> list[psutil.Process]:
    """HAProxy and Serve's actors: replicas, proxy, controller. Not what Ray runs for everybody."""
    return [process for process in _family(head) if _is_serve(process)]


def _is_serve(process: psutil.Process) -> bool:
    try:
        command = process.cmdline()
    except psutil.NoSuchProcess:
        return False
    return bool(command) and ("haproxy" in Path(command[0]).name or command[0].startswith("ray::"))


def _cpu_s(process: psutil.Process) -> float:
    try:
        used = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(used.user + used.system)


def _pss(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0
