"""Keep the learning jobs going: the student's always, the teacher's when a refresh is due."""

import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from services.core.errors import RefluxError, RegistryError
from services.core.eventlog import EventLog
from services.core.registry import Kind, Registry
from services.core.settings import Settings
from services.local.jobs import Jobs

LOOK_EVERY_S = 1.0
RETRIES = 5  # of a refresh that somebody asked for; one that is due is tried again and again
SOUND_MS = 120_000  # a job that ran so long was not ill from the start
HEAD_START_S = 20.0  # of a student that comes back over a teacher that is due: few cores, one start


@dataclass(frozen=True, kw_only=True)
class TeacherState:
    """The newest teacher: when it was published, and how many events have come since it read."""

    created_ms: int
    events_since: int


def refresh_due(
    *, events: int, teacher: TeacherState | None, now_ms: int, settings: Settings
) -> str | None:
    """Why the teacher should be refreshed now; None if it should not. Pure."""
    if teacher is None:
        enough = events >= settings.teacher_first_events
        return f"first teacher, {events:,} events are there" if enough else None
    fresh = teacher.events_since
    if settings.teacher_every_events and fresh >= settings.teacher_every_events:
        return f"{fresh:,} events since the last teacher"
    age_minutes = (now_ms - teacher.created_ms) / 60_000
    due = settings.teacher_every_minutes and age_minutes >= settings.teacher_every_minutes
    if due and fresh > 0:
        return f"the last teacher is {age_minutes:.0f} minutes old"
    return None


@dataclass
class LearningJobs:
    """Submits and resubmits the two jobs. `tick()` often; it looks once a second."""

    settings: Settings
    jobs: Jobs
    report: Callable[[str], None]
    _next_look: float = 0.0
    _failures: dict[Kind, int] = field(default_factory=lambda: {"teacher": 0, "student": 0})
    _not_before: dict[Kind, float] = field(default_factory=dict)
    _watched: dict[Kind, str] = field(default_factory=dict)

    def tick(self) -> None:
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + LOOK_EVERY_S
        kinds: tuple[Kind, ...] = ("student", "teacher")
        for kind in kinds:
            if active := self.jobs.active(kind):  # whoever has started it
                self._watched[kind] = active.submission_id
                continue
            if kind in self._watched:
                self._notice_end(kind)
            waited = time.monotonic() >= self._not_before.get(kind, 0.0)
            if waited and (reason := self._reason(kind)):
                self._watched[kind] = self.jobs.submit(kind)
                self.report(f"{kind} job {self._watched[kind]}: {reason}")

    def _notice_end(self, kind: Kind) -> None:
        job = self.jobs.get(self._watched.pop(kind))
        if job.status != "FAILED":  # it has done its work, or somebody has stopped it
            self._failures[kind] = 0
            return
        self._failures[kind] += 1
        if time.time() * 1000 - job.started_ms > SOUND_MS:
            self._failures[kind] = 1
        wait_s = min(2.0 ** (self._failures[kind] - 1) - 1.0, 300.0)  # none after the first
        now = time.monotonic()
        self._not_before[kind] = now + wait_s
        if kind == "student":
            held = now + HEAD_START_S
            self._not_before["teacher"] = max(held, self._not_before.get("teacher", 0.0))
        self.report(
            f"{kind} job {job.submission_id} {job.status.lower()}, next try in {wait_s:g} s: "
            f"{job.message.strip().splitlines()[-1] if job.message.strip() else 'no message'}"
        )

    def _reason(self, kind: Kind) -> str | None:
        if kind == "student":
            return "no distillation job is running"
        if 0 < self._failures[kind] <= RETRIES:
            return "the last one failed"
        log = EventLog(self.settings.offline)
        return refresh_due(
            events=log.count(),
            teacher=newest_teacher(self.settings, log),
            now_ms=int(time.time() * 1000),
            settings=self.settings,
        )


def supervise(jobs: Jobs, *, report: Callable[[str], None]) -> None:
    """Keep both jobs going until SIGTERM or SIGINT, then let the student's checkpoint and end."""
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    learning = LearningJobs(jobs.settings, jobs, report=report)
    while not stopping.wait(LOOK_EVERY_S):
        try:
            learning.tick()
        except (RefluxError, OSError, RuntimeError) as error:  # met again at the next look
            report(f"supervision: {error}")
    if (job := jobs.stop("student")) is not None:
        report(f"{job.submission_id} {job.status}")


def newest_teacher(settings: Settings, log: EventLog) -> TeacherState | None:
    registry = Registry(settings.registry)
    for version in reversed(registry.versions("teacher")):
        with suppress(RegistryError):  # damaged, or just pruned: the one before it counts
            manifest = registry.manifest("teacher", version)
            read_until = {int(partition): end for partition, end in manifest["offsets"].items()}
            return TeacherState(
                created_ms=int(manifest["created_ms"]), events_since=log.count(since=read_until)
            )
    return None
