"""Who answers in the bench. Each starts, says where it listens and which processes it is, ends."""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from services.core.settings import Settings
from services.local import processes
from services.local.processes import Command, Process
from services.local.stack import Stack

ENDPOINT: Final = "endpoint"
NOOP: Final = "noop"
ENGINE: Final = "engine"
WHOLE: Final = "answer"  # the stage that has all the others in it
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

    def cpu_s(self) -> dict[str, float]:
        """CPU that its processes have used so far, by what they are."""
        used: defaultdict[str, float] = defaultdict(float)
        for process in self.family():
            used[_part(process)] += _cpu_s(process)
        return dict(used)

    def stages(self, headers: dict[str, str]) -> dict[str, tuple[float, float]]:
        """Seconds and answers so far of the app's own stages; none where it doesn't tell."""
        try:
            found = httpx.get(f"{self.url}/metrics", headers=headers, timeout=10.0)
        except httpx.TransportError:
            return {}
        if found.status_code != 200:
            return {}
        sums: dict[str, dict[str, float]] = {"sum": {}, "count": {}}
        for family in text_string_to_metric_families(found.text):
            if family.name not in ("reflux_answer_seconds", "reflux_answer_stage_seconds"):
                continue
            for sample in family.samples:
                kind = sample.name.rpartition("_")[2]
                if kind in sums:
                    sums[kind][sample.labels.get("stage", WHOLE)] = sample.value
        return {stage: (total, sums["count"][stage]) for stage, total in sums["sum"].items()}

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
    return [one for one in _family(head) if _part(one) not in ("gone", "the server")]


def _part(process: psutil.Process) -> str:
    try:
        command = process.cmdline()
    except psutil.NoSuchProcess:
        return "gone"
    if not command:
        return "gone"
    if "haproxy" in Path(command[0]).name:
        return "HAProxy"
    if command[0].startswith("ray::"):
        return "replica" if "ServeReplica" in command[0] else "Serve's other actors"
    return "the server"


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
