"""`reflux demo`: the whole loop on a real log, in one terminal.

The first half of the log is history, imported through Kafka; a first teacher and student learn
it; then the second half arrives as live traffic through the gateway, while the users it names
ask for recommendations. Everything lives in `<home>/demo`, made anew each time.
"""

import shutil
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import httpx
from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ray_jobs import recipes
from ray_jobs.datasets import InteractionLog, load, shuffle_ties
from services.console.observe import Observer, Snapshot
from services.core.errors import RefluxError, UnavailableError
from services.core.eventlog import EventLog
from services.core.registry import Kind
from services.core.settings import Settings
from services.core.stackfile import demo_of
from services.local import report
from services.local.__main__ import look, started
from services.local.asker import Asker
from services.local.client import Client
from services.local.jobs import Jobs
from services.local.learning import LearningJobs
from services.local.prober import Prober
from services.local.replay import event_lines, paced, produce_history, send_batch, send_items
from services.local.stack import Stack, refuse_second_stack
from services.local.waiting import wait

HISTORY_SHARE = 0.5
LOOK_EVERY_S = 1.0
SAY_EVERY_S = 10.0  # where the output is no terminal
DRAIN_S = 60.0
WAIT_S = 900.0


class Demo:
    """One run of the demo. `rate` in events/s; ends after `max_events` or `limit_s`, or Ctrl-C."""

    def __init__(
        self,
        settings: Settings,
        *,
        dataset: str,
        rate: float,
        max_events: int | None,
        limit_s: float | None,
        probe_every_s: float = 0.0,
    ) -> None:
        """`probe_every_s`: also see how soon an event shows in an answer, as often; 0: no."""
        self._given = settings
        self._probe_every_s = probe_every_s
        self._settings = demo_of(settings)
        self._dataset = dataset
        self._rate = rate
        self._max_events = max_events
        self._limit_s = limit_s
        self._console = Console(log_path=False, width=None if sys.stdout.isatty() else 110)
        self._record = report.Record()

    def run(self) -> None:
        """Run to the end; always stop what was started, then print the summary."""
        began = time.monotonic()
        refuse_second_stack(self._given)  # two would share the cores
        refuse_second_stack(self._settings)
        shutil.rmtree(self._settings.home, ignore_errors=True)
        stack = Stack(self._settings, report=self._console.log)
        try:
            log = self._load()
            with started(stack) as jobs:
                self._settings = stack.settings
                self._console.log(f"watch it on {stack.settings.console_url}")
                try:
                    self._learn_history(log, jobs)
                    self._record.first_answer_s = time.monotonic() - began
                    self._show_an_answer(log)
                    self._live(log, stack, jobs)
                except KeyboardInterrupt:
                    self._console.log("interrupted: stopping")
        except KeyboardInterrupt:
            self._console.log("interrupted")
        report.summarize(self._console, self._record, home=self._settings.home)

    def _load(self) -> InteractionLog:
        with self._console.status(f"loading {self._dataset}"):
            log = load(self._dataset, home=self._given.home, data=self._settings.data)
            log = shuffle_ties(log, self._settings.seed)
        self._console.log(
            f"{self._dataset}: {log.events.num_rows:,} events, {log.items.num_rows:,} items"
        )
        return log

    def _learn_history(self, log: InteractionLog, jobs: Jobs) -> None:
        """Import the first half, train a teacher on it, distil the first student, see it serve."""
        history = int(log.events.num_rows * HISTORY_SHARE)
        recipe = recipes.load(self._settings.recipe)
        with self._progress() as progress:
            with Client(self._settings) as client:
                send_items(client, log)
            task = progress.add_task("history -> Kafka", total=history)
            produce_history(
                self._settings,
                log,
                last=history,
                progress=lambda sent: progress.update(task, completed=sent),
            )
            task = progress.add_task("Kafka -> features", total=history)
            self._until(lambda: self._logged(progress, task) >= history, "the feature worker")
            self._run_job(progress, jobs, "teacher", expected_s=recipe.train.max_train_s)
            self._run_job(progress, jobs, "student", expected_s=recipe.distill.warm_up_s)

    def _logged(self, progress: Progress, task: TaskID) -> int:
        logged = EventLog(self._settings.offline).count()
        progress.update(task, completed=logged)
        return logged

    def _run_job(self, progress: Progress, jobs: Jobs, kind: Kind, *, expected_s: float) -> None:
        """Submit the job and wait: the teacher's for its end, the student's until it answers."""
        submission_id = jobs.submit(kind)
        self._console.log(f"Ray job {submission_id}")  # a bar's label must fit 80 columns
        task = progress.add_task(f"first {kind}, seconds", total=expected_s)
        began = time.monotonic()

        def done() -> bool:
            progress.update(task, completed=min(time.monotonic() - began, expected_s * 0.99))
            job = jobs.get(submission_id)
            if not job.active and job.status != "SUCCEEDED":
                raise RefluxError(
                    f"{submission_id} {job.status.lower()}: {job.message}\n"
                    f"{jobs.logs(submission_id)[-2000:]}"
                )
            return not job.active if kind == "teacher" else self._answers_ready()

        self._until(done, f"the {kind} job")
        progress.update(task, completed=expected_s)

    def _answers_ready(self) -> bool:
        with suppress(httpx.TransportError):
            return httpx.get(f"{self._settings.recommend_url}/readyz").status_code == 200
        return False

    def _show_an_answer(self, log: InteractionLog) -> None:
        """Print the URL, a `curl` that works, and what it answers."""
        settings = self._settings
        user = log.events["user_id"][int(log.events.num_rows * HISTORY_SHARE) - 1].as_py()
        with Client(settings) as client:
            answer = client.recommend(user_id=user, n=5)
        say = self._console.print
        say(f"\n[bold]The first answer[/], {self._record.first_answer_s:.0f} s after the start:")
        for item in answer["items"]:
            say(f"  {item['score']:7.3f}  {item['title'] or item['item_id']}")
        say("\n[bold]Ask yourself:[/]", highlight=False)
        say(
            f"curl -s {settings.recommend_url}/v1/recommendations -H 'content-type: "
            f'application/json\' -d \'{{"user_id": "{user}", "n": 5}}\'',
            soft_wrap=True,
            highlight=False,
        )
        say(f"events  {settings.gateway_url}/v1/events (API: /docs)   Ray {settings.ray_address}")
        say(f"page    {settings.console_url}   logs {settings.logs}\n")

    def _live(self, log: InteractionLog, stack: Stack, jobs: Jobs) -> None:
        """Replay the second half through the gateway, and watch."""
        first = int(log.events.num_rows * HISTORY_SHARE)
        last = log.events.num_rows
        if self._max_events:
            last = min(last, first + self._max_events)
        producer = _Producer(
            self._settings, log, first=first, last=last, rate=self._rate, limit_s=self._limit_s
        )
        learning = LearningJobs(stack.settings, jobs, report=self._console.log)
        supervising = _Repeat(lambda: look(stack, learning), every_s=0.5)
        asker = Asker(self._settings, producer.recent_user)
        observer = Observer(self._settings)
        observer.mark()  # the import of history was no live traffic
        threads: list[_Producer | _Repeat | Asker | Prober] = [producer, supervising, asker]
        prober = None
        if self._probe_every_s:
            prober = Prober(self._settings, every_s=self._probe_every_s)
            threads.append(prober)
        for thread in threads:
            thread.start()
        try:
            with self._screen() as show:
                while producer.is_alive():
                    show(self._observe(observer, producer, asker, total=last - first))
                    time.sleep(LOOK_EVERY_S)
                drained_by = time.monotonic() + DRAIN_S
                while self._behind() and time.monotonic() < drained_by:
                    show(self._observe(observer, producer, asker, total=last - first))
                    time.sleep(LOOK_EVERY_S)
        finally:
            for thread in reversed(threads):
                thread.stop()
                thread.join(timeout=10.0)
            self._observe(observer, producer, asker, total=last - first)
        if prober:
            self._record.probed = prober.seen()
        if producer.error:
            raise producer.error

    def _behind(self) -> bool:
        newest = self._record.newest
        return newest is None or newest.metrics.get("stream.events", 0) < self._record.sent

    def _observe(
        self, observer: Observer, producer: "_Producer", asker: Asker, *, total: int
    ) -> Snapshot:
        snapshot = observer.look()
        self._record.add(snapshot, sent=producer.sent, total=total, asked=asker.seen())
        return snapshot

    def _screen(self) -> "_Screen":
        return _Screen(self._console, self._record)

    def _progress(self) -> Progress:
        return Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
        )

    def _until(self, done: Callable[[], bool], what: str) -> None:
        wait(what, done, give_up_s=WAIT_S, every_s=0.5, logs=self._settings.logs)


class _Screen:
    """A live panel on a terminal; a line now and then elsewhere."""

    def __init__(self, console: Console, record: report.Record) -> None:
        self._console = console
        self._record = record
        self._live: Live | None = None
        self._said = 0.0

    def __enter__(self) -> Callable[[Snapshot], None]:
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=4)
            self._live.start()
        return self._show

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def _show(self, _: Snapshot) -> None:
        if self._live:
            self._live.update(report.panel(self._record))
        elif time.monotonic() - self._said > SAY_EVERY_S:
            self._said = time.monotonic()
            self._console.print(report.line(self._record), soft_wrap=True)


class _Repeat(threading.Thread):
    """Calls `action` again and again until stopped."""

    def __init__(self, action: Callable[[], None], *, every_s: float) -> None:
        super().__init__(daemon=True)
        self._action = action
        self._every_s = every_s
        self._stopping = threading.Event()

    def run(self) -> None:
        while not self._stopping.wait(self._every_s):
            self._action()

    def stop(self) -> None:
        self._stopping.set()


class _Producer(threading.Thread):
    """Sends the live part of the log through the gateway at its rate."""

    def __init__(
        self,
        settings: Settings,
        log: InteractionLog,
        *,
        first: int,
        last: int,
        rate: float,
        limit_s: float | None,
    ) -> None:
        super().__init__(daemon=True)
        self.sent = 0
        self.error: Exception | None = None
        self._client = Client(settings)
        self._log = log
        self._first = first
        self._last = last
        self._rate = rate
        self._limit_s = limit_s
        self._stopping = threading.Event()

    def run(self) -> None:
        ends = time.monotonic() + self._limit_s if self._limit_s else float("inf")
        lines = event_lines(self._log, first=self._first, last=self._last)
        try:
            for batch in paced(lines, rate=self._rate):
                if self._stopping.is_set() or time.monotonic() > ends:
                    return
                self.sent += self._send(batch)
        except RefluxError as error:
            self.error = error

    def recent_user(self) -> str | None:
        """The user of the newest event sent."""
        if not self.sent:
            return None
        user: str = self._log.events["user_id"][self._first + self.sent - 1].as_py()
        return user

    def stop(self) -> None:
        self._stopping.set()

    def _send(self, batch: list[bytes], tries: int = 5) -> int:
        """A producer's patience: the same ids again count once, so a retry is safe."""
        for attempt in range(tries):
            try:
                return send_batch(self._client, batch)
            except UnavailableError:
                if attempt == tries - 1:
                    raise
                time.sleep(2.0**attempt)
        raise AssertionError("unreachable")
