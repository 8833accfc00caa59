"""What can be done to a running stack, and to whom."""

import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

import psutil
import redis

from services.core.errors import RefluxError
from services.core.registry import Kind, Registry
from services.core.settings import Settings
from services.core.stackfile import read_stack
from services.local.clock import skewed_producers
from services.local.disks import SmallDisk
from services.local.jobs import Jobs
from services.local.load import Producer
from services.local.promises import Promise
from services.local.waiting import wait

FIND_TIMEOUT_S: Final = 60.0  # a training worker may be between two lives
FREEZE_S: Final = 30.0
HOLD_S: Final = 15.0  # a full disk, a slow Redis, a wrong clock
SLOW_S: Final = (0.4, 0.05)  # Redis answers nobody for the first, then everybody for the second
TEACHER_S: Final = 240.0  # a refresh, its worker killed or frozen on the way

Concern = Literal["features", "answers", "student", "log"]


@dataclass(frozen=True, kw_only=True)
class World:
    """What a fault may need of the run."""

    settings: Settings
    producer: Producer
    disks: dict[str, SmallDisk]


@dataclass(frozen=True, kw_only=True)
class Struck:
    """A fault that has begun. `end` it; `back` says whether what only it knows of works again;
    `finish` waits for what takes long and is nobody's outage, and says whether that came well."""

    told: str
    gone: frozenset[int] = frozenset()  # processes that will not come back under these ids
    end: Callable[[], None] = lambda: None
    back: Callable[[], bool] = lambda: True
    finish: Callable[[], Promise] | None = None


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Begins, lasts for `hold_s`, and ends; then what it `concerns` must soon work again."""

    name: str
    begin: Callable[[World], Struck]
    concerns: frozenset[Concern] = frozenset()
    hold_s: float = 0.0
    single_proxy: bool = False  # requests can't be answered until it is back: excused
    forgets: bool = False  # the embedded broker, whose log is in memory


@dataclass(frozen=True, kw_only=True)
class Victim:
    """A kind of process, by its command line, and what stops working without it.

    `job`: whose it must be where both learning jobs have such processes. `forked`: it is the one
    of them that another has forked.
    """

    name: str
    has: tuple[str, ...]
    job: Kind | None = None
    forked: bool = False
    concerns: tuple[Concern, ...] = ()
    traits: dict[str, bool] = field(default_factory=dict)

    def faults(self) -> list[Fault]:
        concerns = frozenset(self.concerns)
        freeze = {name: value for name, value in self.traits.items() if name != "forgets"}
        return [
            Fault(name=f"kill {self.name}", begin=self._kill, concerns=concerns, **self.traits),
            Fault(
                name=f"freeze {self.name}",
                begin=self._freeze,
                concerns=concerns,
                hold_s=FREEZE_S,
                **freeze,
            ),
        ]

    def _kill(self, world: World) -> Struck:
        process = self.find(world.settings)
        before = self.running(world.settings)
        struck = kill(process)

        def back() -> bool:
            now = {one.pid for one in self.running(world.settings)}
            return len(now - struck.gone) >= len(before)

        return replace(struck, back=back)

    def _freeze(self, world: World) -> Struck:
        return freeze(self.find(world.settings))

    def find(self, settings: Settings) -> psutil.Process:
        """The process that the fault is for; waits until there is one."""
        deadline = time.monotonic() + FIND_TIMEOUT_S
        while time.monotonic() < deadline:
            if found := self.running(settings):
                return found[0]
            time.sleep(0.2)
        raise RefluxError(f"no {self.name} runs; `reflux status` tells what does")

    def running(self, settings: Settings) -> list[psutil.Process]:
        """The living processes of this kind."""
        job = Jobs(settings, embedded=True).active(self.job) if self.job else None
        if self.job and job is None:
            return []
        alive = []
        for process, command in commands(settings):
            with suppress(psutil.NoSuchProcess):
                if process.status() == psutil.STATUS_ZOMBIE or not all(
                    part in command for part in self.has
                ):
                    continue
                if job is None or process.environ().get("RAY_JOB_ID") == job.driver:
                    alive.append(process)
        if self.forked:
            parents = {process.pid for process in alive}
            alive = [process for process in alive if _parent(process) in parents]
        return alive


def _parent(process: psutil.Process) -> int:
    try:
        return process.ppid()
    except psutil.NoSuchProcess:
        return 0


def kill(process: psutil.Process) -> Struck:
    process.send_signal(signal.SIGKILL)
    return Struck(told=f"kill -9 {process.pid}", gone=frozenset({process.pid}))


def freeze(process: psutil.Process) -> Struck:
    process.suspend()

    def go_on() -> None:
        with suppress(psutil.NoSuchProcess):  # somebody has replaced it meanwhile
            process.resume()

    return Struck(told=f"SIGSTOP {process.pid} for {FREEZE_S:g} s", end=go_on)


def commands(settings: Settings) -> list[tuple[psutil.Process, str]]:
    """Every process of the running stack with its command line, shells around them left out."""
    stack = read_stack(settings)
    found: dict[int, tuple[psutil.Process, str]] = {}
    for identity in [stack["supervisor"], *stack["processes"].values()] if stack else []:
        try:
            leader = psutil.Process(int(identity["pid"]))
            family = [leader, *leader.children(recursive=True)]
        except psutil.NoSuchProcess:
            continue
        for process in family:
            try:
                command = " ".join(process.cmdline())
            except psutil.NoSuchProcess:
                continue
            # `sh -c` around a job's driver has its words, too.
            if not command.startswith(("/bin/sh", "sh ", "/bin/bash")):
                found[process.pid] = (process, command)
    return list(found.values())


def _to_teacher(strike: Callable[[psutil.Process], Struck]) -> Callable[[World], Struck]:
    """Refresh the teacher as an operator would, and strike the worker that trains it.

    Whatever is lost with it, the supervisor sees to it that a new teacher comes.
    """

    def begin(world: World) -> Struck:
        settings = world.settings
        teachers = Registry(settings.registry)
        newest = teachers.latest("teacher")
        jobs = Jobs(settings, embedded=True)
        job = active.submission_id if (active := jobs.active("teacher")) else jobs.submit("teacher")
        saved = _saved_by_teachers(settings)

        def saves() -> bool:
            return bool(_saved_by_teachers(settings) - saved)

        wait(f"{job} trains", saves, give_up_s=TEACHER_S)
        struck = strike(TEACHER_WORKER.find(settings))
        saved = _saved_by_teachers(settings)  # what came while we looked for it is no sign of life

        def back() -> bool:
            return saves() or teachers.latest("teacher") != newest

        def finish() -> Promise:
            name = "a teacher's refresh survives its worker"
            try:
                wait(name, lambda: teachers.latest("teacher") != newest, give_up_s=TEACHER_S)
            except RefluxError as error:
                return Promise(name=name, kept=False, found=str(error))
            version = teachers.latest("teacher") or 0
            resumed = teachers.manifest("teacher", version)["resumed"]
            return Promise(
                name=name, kept=True, found=f"teacher {version}, resumed {resumed} times"
            )

        return replace(struck, told=f"{struck.told} of {job}", back=back, finish=finish)

    return begin


def _saved_by_teachers(settings: Settings) -> set[Path]:
    """Checkpoints of teachers that are being trained."""
    return set(Path(settings.checkpoints).glob("teacher-*/checkpoint_*"))


def _full(disk: str) -> Callable[[World], Struck]:
    def begin(world: World) -> Struck:
        world.disks[disk].fill()
        return Struck(told=f"no byte left for the {disk}", end=world.disks[disk].free)

    return begin


def _slow_redis(world: World) -> Struck:
    """Let Redis answer in gusts only, as one on a machine that swaps does."""
    host, _, port = world.settings.redis.partition(":")
    client: Any = redis.Redis(host=host, port=int(port))
    stop = threading.Event()

    def gusts() -> None:
        pause_s, gust_s = SLOW_S
        while not stop.wait(gust_s):
            client.client_pause(int(pause_s * 1000), all=True)
            stop.wait(pause_s)

    thread = threading.Thread(target=gusts)
    thread.start()

    def end() -> None:
        stop.set()
        thread.join()
        client.close()

    return Struck(told=f"CLIENT PAUSE {SLOW_S[0]:g} s, again and again", end=end)


def _clock_jump(world: World) -> Struck:
    end, finish = skewed_producers(world.settings, world.producer)
    return Struck(told="producers an hour ahead, and a month behind", end=end, finish=finish)


TEACHER_WORKER: Final = Victim(name="teacher worker", has=("ray::RayTrainWorker",), job="teacher")
VICTIMS: Final = (
    Victim(name="gateway", has=("services.ingest.gateway",), concerns=("features",)),
    Victim(name="feature worker", has=("services.ingest.worker",), concerns=("features", "log")),
    Victim(name="redis", has=("redis-server",), concerns=("features", "answers")),
    Victim(
        name="distillation driver",
        has=("ray_jobs.distill_student",),
        forked=True,
        concerns=("student",),
    ),
    Victim(
        name="distillation controller",
        has=("ray::TrainController",),
        job="student",
        concerns=("student",),
    ),
    Victim(
        name="distillation worker",
        has=("ray::RayTrainWorker",),
        job="student",
        concerns=("student",),
    ),
    Victim(name="serve replica", has=("ray::ServeReplica",), concerns=("answers",)),
    Victim(
        name="serve proxy",
        has=("haproxy", "-db"),
        concerns=("answers",),
        traits={"single_proxy": True},
    ),
    Victim(name="serve controller", has=("ray::ServeController",), concerns=("answers",)),
    Victim(
        name="broker",
        has=("tansu",),
        concerns=("features", "log", "student"),
        traits={"forgets": True},
    ),
)
FAULTS: Final = (
    *(fault for victim in VICTIMS for fault in victim.faults()),
    Fault(name="kill teacher worker", begin=_to_teacher(kill)),
    Fault(name="freeze teacher worker", begin=_to_teacher(freeze), hold_s=FREEZE_S),
    Fault(
        name="full disk, registry",
        begin=_full("registry"),
        concerns=frozenset({"student", "answers"}),
        hold_s=HOLD_S,
    ),
    Fault(
        name="full disk, offline log",
        begin=_full("offline"),
        concerns=frozenset({"log", "features"}),
        hold_s=HOLD_S,
    ),
    Fault(
        name="slow redis",
        begin=_slow_redis,
        concerns=frozenset({"features", "answers"}),
        hold_s=HOLD_S,
    ),
    Fault(
        name="clock jump",
        begin=_clock_jump,
        concerns=frozenset({"features", "log"}),
        hold_s=HOLD_S,
    ),
)
