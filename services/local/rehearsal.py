"""A rehearsal of what many machines do: both jobs over several Ray nodes, one killed, one cut off,
then an audit of what was learned.

Real: Ray's raylets, scheduling and failure detection, the broker, Redis, a feature worker, both
jobs. Not: all nodes share one machine's cores and one file system, which stands for the object
store.
"""

import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final

from ray_jobs.datasets import load
from services.core.errors import RefluxError
from services.core.eventlog import EventLog
from services.core.events import EVENTS
from services.core.kafka import ensure_topics, make_producer
from services.core.registry import Registry
from services.core.settings import Settings
from services.local import processes
from services.local.audit import learned_once, logged_once, newest_ledger
from services.local.jobs import Jobs
from services.local.nodes import Cluster, Node, Wires
from services.local.promises import Promise
from services.local.replay import keyed_lines
from services.local.waiting import alongside, wait

DATASET: Final = "ml-100k"
HISTORY: Final = 6_000  # events in the log before the first teacher
RATE: Final = 50.0  # events/s meanwhile
BACKLOG: Final = 20_000  # events for each worker, where scaling is measured
APART_S: Final = 30.0
NODE_CPUS: Final = 4  # logical ones
GIVE_UP_S: Final = 300.0
POLL_S: Final = 0.2
TICK_S: Final = 0.1
ACK_TIMEOUT_S: Final = 120.0

Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Blow:
    """What was done to a node, and what came of it. None: it did not within `GIVE_UP_S`."""

    name: str
    node: str
    held: int  # training workers on it
    learning_s: float | None  # from the blow until a version had learned later events
    teacher_s: float | None  # from the blow until the refresh under way was done
    teacher_resumed: int  # times that the refresh lost a worker
    nodes_alive: int  # of those there were, before anything was started anew


@dataclass(frozen=True, kw_only=True)
class Drained:
    """How fast a backlog was learned."""

    workers: int
    events: int
    wall_s: float
    cpu_s: float  # of training workers and labellers

    @property
    def events_per_s(self) -> float:
        return self.events / self.wall_s


class Feed:
    """A real log's events straight to Kafka; `acknowledged` is the ledger: event id -> when."""

    def __init__(self, settings: Settings) -> None:
        log = load(DATASET, home=settings.home, data=settings.data)
        self._lines = enumerate(keyed_lines(log, first=0, last=None))
        self._producer = make_producer(settings)
        self.acknowledged: dict[str, float] = {}

    def send(self, n: int) -> None:
        sent = [
            (number, self._producer.send(EVENTS, key=user.encode(), value=line))
            for number, (user, line) in itertools.islice(self._lines, n)
        ]
        for number, future in sent:
            future.get(timeout=ACK_TIMEOUT_S)
            self.acknowledged[f"{DATASET}-{number}"] = time.monotonic()

    @contextmanager
    def flowing(self, rate: float) -> Iterator[None]:
        """At `rate` events/s from another thread, whose error is raised at the end."""
        errors = list[Exception]()

        def run(stop: threading.Event) -> None:
            begin = time.monotonic()
            n_sent = 0
            while not stop.wait(TICK_S):
                n_due = int((time.monotonic() - begin) * rate) - n_sent
                try:
                    self.send(n_due)
                except Exception as error:
                    errors.append(error)
                    return
                n_sent += n_due

        with alongside(run):
            yield
        if errors:
            raise errors[0]

    def close(self) -> None:
        self._producer.close()


class Rehearsal:
    """One run, on a cluster that it starts and stops."""

    def __init__(self, settings: Settings, *, nodes: int, namespaces: bool, report: Report) -> None:
        self._given, self._nodes, self._namespaces = settings, nodes, namespaces
        self._report = report

    def faults(self) -> tuple[list[Blow], list[Promise]]:
        """Kill one node, cut off another, audit."""
        with self._running():
            self._learn_first()
            with self._feed.flowing(RATE):
                blows = [self._killed(), self._apart()]
            return blows, [*self._audit(), *promised(blows)]

    def scaling(self, workers: Sequence[int]) -> tuple[list[Drained], list[Promise]]:
        """The same work for each worker, by one worker and by several."""
        with self._running():
            self._learn_first()
            self._jobs.stop("student")
            drained = [self._drain(n) for n in workers]
            return drained, self._audit()

    @contextmanager
    def _running(self) -> Iterator[None]:
        with ExitStack() as stack:
            wires = stack.enter_context(Wires()) if self._namespaces else None
            self._cluster = stack.enter_context(
                Cluster(
                    self._given.home,
                    nodes=self._nodes,
                    cpus=NODE_CPUS,
                    wires=wires,
                    report=self._report,
                )
            )
            self._settings = self._given.model_copy(
                update={
                    "kafka_bootstrap": self._cluster.kafka,
                    "redis": self._cluster.redis,
                    "ray_address": self._cluster.ray,
                }
            )
            ensure_topics(self._settings)
            self._registry = Registry(self._settings.registry)
            self._jobs = Jobs(self._settings, embedded=True)
            self._feed = Feed(self._settings)
            stack.callback(self._feed.close)
            worker = feature_worker(self._settings)
            stack.callback(worker.stop)
            worker.wait_ready()
            yield

    def _learn_first(self) -> None:
        """A log, a teacher on it, a student of that."""
        self._report(f"{HISTORY:,} events into the log")
        self._feed.send(HISTORY)
        log = EventLog(self._settings.offline)
        self._until("the log has the history", lambda: log.count() >= HISTORY)
        self._report("training the first teacher")
        self._finish_teacher(self._jobs.submit("teacher"))
        self._report("starting the student")
        self._jobs.submit("student")
        self._until("a first student", lambda: self._registry.latest("student") is not None)

    def _killed(self) -> Blow:
        job, node, before = self._amid_a_refresh()
        self._report(f"killing {node.name}")
        at_s, held = time.monotonic(), node.workers()
        self._cluster.kill(node)
        blow = self._outcome("killed", node, held, at_s, before, job)
        self._cluster.start(node.name)
        return blow

    def _apart(self) -> Blow:
        job, node, before = self._amid_a_refresh()
        how = f"{self._cluster.apart_means} for {APART_S:g} s"
        self._report(f"{node.name} is {how}")
        at_s, held = time.monotonic(), node.workers()
        with self._cluster.apart(node):
            time.sleep(APART_S)
        return self._outcome(how, node, held, at_s, before, job)

    def _amid_a_refresh(self) -> tuple[str, Node, int]:
        """A teacher job in the midst of it, the node with most workers, events learned so far."""
        learned = self._learned()
        job = self._jobs.submit("teacher")
        self._report(f"{job}: a refresh")
        runs, seen = self._given.home / "checkpoints", set[str]()

        def two_checkpoints() -> bool:
            """After the first alone a run that loses a worker may start over."""
            seen.update(str(path) for path in runs.glob("teacher-*/checkpoint_*"))
            if not self._jobs.get(job).active:
                raise RefluxError(f"{job} ended too early:\n{self._jobs.logs(job)[-2000:]}")
            return len(seen) >= 2 and self._learned() > learned

        self._until("the refresh is under way", two_checkpoints)
        return job, self._cluster.busiest(), self._learned()

    def _outcome(
        self, name: str, node: Node, held: int, at_s: float, before: int, job: str
    ) -> Blow:
        # What waited in Kafka or was learned just before may be published afterwards.
        later = before + int(RATE * (time.monotonic() - at_s)) + 1
        done: dict[str, float] = {}

        def both() -> bool:
            if self._learned() > later:
                done.setdefault("student", time.monotonic() - at_s)
            if not self._jobs.get(job).active:
                done.setdefault("teacher", time.monotonic() - at_s)
            return len(done) == 2

        try:
            self._until(f"{name} {node.name}: both jobs went on", both)
        except RefluxError as error:
            self._report(str(error))
        resumed = 0
        if "teacher" in done:
            self._finish_teacher(job)
            newest = self._registry.latest("teacher")
            resumed = self._registry.manifest("teacher", newest or 0)["resumed"]
        n_alive = len((self._cluster.alive() or set()) - {self._cluster.host("head")})
        if not node.process.running and name != "killed":
            self._cluster.start(node.name)  # it was given up, and ended itself
        return Blow(
            name=name,
            node=node.name,
            held=held,
            learning_s=done.get("student"),
            teacher_s=done.get("teacher"),
            teacher_resumed=resumed,
            nodes_alive=n_alive,
        )

    def _drain(self, workers: int) -> Drained:
        """Fill Kafka while nobody learns, then let `workers` learn it."""
        n_events = workers * BACKLOG
        self._report(f"{n_events:,} events for {workers} worker(s)")
        self._feed.send(n_events)
        log, n_sent = EventLog(self._settings.offline), len(self._feed.acknowledged)
        self._until("the log has them", lambda: log.count() >= n_sent)
        settings = self._settings.model_copy(update={"student_workers": workers})
        before = self._learned()
        jobs = Jobs(settings, embedded=True)
        jobs.submit("student")
        self._until("the backlog is begun", lambda: self._learned() > before)
        first, begin_s, begin_cpu_s = self._learned(), self._published_s(), self._cluster.cpu_s()
        self._until("the backlog is learned", lambda: self._learned() >= before + n_events)
        drained = Drained(
            workers=workers,
            events=self._learned() - first,
            wall_s=self._published_s() - begin_s,
            cpu_s=self._cluster.cpu_s() - begin_cpu_s,
        )
        jobs.stop("student")
        return drained

    def _audit(self) -> list[Promise]:
        self._report("auditing")
        settings, n_sent = self._settings, len(self._feed.acknowledged)
        log = EventLog(settings.offline)

        def settled() -> bool:
            ledger = newest_ledger(settings.checkpoints)
            ends = {p: ranges[-1][1] for p, ranges in ledger.items() if ranges}
            return log.count() >= n_sent and ends == log.end()

        self._until("everything is logged, learned and kept", settled)
        self._jobs.stop("student")
        ids = log.read(columns=["event_id"])["event_id"].to_pylist()
        return [
            logged_once(self._feed.acknowledged, ids),
            learned_once(newest_ledger(settings.checkpoints), log.end()),
        ]

    def _finish_teacher(self, job: str) -> None:
        ended = self._jobs.wait(job, timeout_s=GIVE_UP_S)
        if ended.status != "SUCCEEDED":
            raise RefluxError(f"{job} {ended.status}:\n{self._jobs.logs(job)[-2000:]}")

    def _learned(self) -> int:
        return int(self._newest().get("events_learned", 0))

    def _published_s(self) -> float:
        return float(self._newest()["created_ms"]) / 1000

    def _newest(self) -> dict[str, Any]:
        version = self._registry.latest("student")
        return {} if version is None else dict(self._registry.manifest("student", version))

    def _until(self, what: str, done: Callable[[], bool]) -> None:
        wait(what, done, give_up_s=GIVE_UP_S, every_s=POLL_S, logs=self._given.logs)


def feature_worker(settings: Settings) -> processes.Process:
    port = processes.free_port()
    command = processes.Command(
        name="worker",
        argv=[sys.executable, "-m", "services.ingest.worker"],
        ready=lambda: processes.listens(port),
        env={**settings.environment(), "REFLUX_WORKER_METRICS_PORT": str(port)},
        ready_timeout_s=120.0,
    )
    return processes.Process(command, logs=settings.logs)


def promised(blows: Sequence[Blow]) -> list[Promise]:
    """Both jobs go on after each blow. Pure."""
    promises = []
    for blow in blows:
        for job, took_s in (("distillation", blow.learning_s), ("teacher", blow.teacher_s)):
            promises.append(
                Promise(
                    name=f"{job} goes on, a node {blow.name}",
                    kept=took_s is not None,
                    found="never" if took_s is None else f"after {took_s:.0f} s",
                )
            )
    return promises


def render_faults(blows: Sequence[Blow]) -> None:
    from rich.console import Console
    from rich.table import Table

    heads = ("node", "workers on it", "learns on", "teacher done", "resumed", "nodes left")
    table = Table(*heads, box=None)
    for one in blows:
        times = ["never" if s is None else f"{s:.0f} s" for s in (one.learning_s, one.teacher_s)]
        table.add_row(
            f"{one.node} {one.name}",
            *(str(one.held), *times, str(one.teacher_resumed), str(one.nodes_alive)),
        )
    Console().print(table)


def render_scaling(drained: Sequence[Drained]) -> None:
    from rich.console import Console
    from rich.table import Table

    heads = ("workers", "events", "s", "events/s", "efficiency", "CPU ms/event")
    table = Table(*heads, box=None)
    for one in drained:
        ideal = drained[0].events_per_s / drained[0].workers * one.workers
        table.add_row(
            str(one.workers),
            f"{one.events:,}",
            f"{one.wall_s:.1f}",
            f"{one.events_per_s:,.0f}",
            f"{one.events_per_s / ideal:.2f}",
            f"{1000 * one.cpu_s / one.events:.2f}",
        )
    Console().print(table)
