"""What can be done to a running stack, and to whom."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import psutil

from services.core.errors import RefluxError
from services.core.settings import Settings
from services.core.stackfile import read_stack

FIND_TIMEOUT_S: Final = 60.0  # a training worker may be between two lives


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Kill one process. `target` finds it by its command line, in the stack's process tree."""

    name: str
    target: Callable[[str], bool]
    single_proxy: bool = False  # requests can't be answered until it is back: excused
    forgets: bool = False  # the embedded broker, whose log is in memory


def _has(*parts: str) -> Callable[[str], bool]:
    return lambda command: all(part in command for part in parts)


KILLS: Final = (
    Fault(name="gateway", target=_has("services.ingest.gateway")),
    Fault(name="feature worker", target=_has("services.ingest.worker")),
    Fault(name="redis", target=_has("redis-server")),
    Fault(name="distillation driver", target=_has("ray_jobs.distill_student", "python")),
    Fault(name="distillation worker", target=_has("ray::RayTrainWorker")),
    Fault(name="serve replica", target=_has("ray::ServeReplica")),
    Fault(name="serve proxy", target=_has("haproxy", "-db"), single_proxy=True),
    Fault(name="serve controller", target=_has("ray::ServeController")),
    Fault(name="broker", target=_has("tansu"), forgets=True),
)


def victim(settings: Settings, fault: Fault) -> psutil.Process:
    """The process that the fault is for; waits until there is one."""
    deadline = time.monotonic() + FIND_TIMEOUT_S
    while time.monotonic() < deadline:
        for process in family(settings):
            try:
                command = " ".join(process.cmdline())
            except psutil.NoSuchProcess:
                continue
            # `sh -c` around a job's driver has its words, too.
            if fault.target(command) and not command.startswith(("/bin/sh", "sh ", "/bin/bash")):
                return process
        time.sleep(0.2)
    raise RefluxError(f"no {fault.name} runs; `reflux status` tells what does")


def family(settings: Settings) -> list[psutil.Process]:
    """Every process of the running stack."""
    stack = read_stack(settings)
    found: dict[int, psutil.Process] = {}
    for identity in [stack["supervisor"], *stack["processes"].values()] if stack else []:
        try:
            leader = psutil.Process(int(identity["pid"]))
            found |= {one.pid: one for one in [leader, *leader.children(recursive=True)]}
        except psutil.NoSuchProcess:
            continue
    return list(found.values())


def kill(process: psutil.Process) -> None:
    os.kill(process.pid, signal.SIGKILL)
