"""`reflux bench chaos`: a stack under load, one process killed after another, and an audit.

Everything happens in a home of its own. Seeded: the load, the order of the faults and the pauses
between them are the same in every run with the same seed.
"""

import random
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import httpx

from services.core.errors import RefluxError
from services.core.eventlog import EventLog
from services.core.features import FeatureStore
from services.core.registry import Registry
from services.core.settings import Settings
from services.local import daemon
from services.local.audit import Promise, answered, audit_state, newest_ledger
from services.local.faults import KILLS, Fault, kill, victim
from services.local.load import Asker, Producer
from services.local.load import events as seeded
from services.local.stack import tear_down

DEADLINE_S: Final = 1.0  # of an answer
ANSWERED_SHARE: Final = 0.999
BACK_WITHIN_S: Final = 15.0
GIVE_UP_S: Final = 180.0  # on a fault's recovery, on the first student, on catching up
PAUSE_S: Final = (5.0, 10.0)  # between a recovery and the next fault
POLL_S: Final = 0.1


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one fault did. `back_s` None: not within `GIVE_UP_S`."""

    fault: Fault
    at_s: float  # monotonic
    back_s: float | None
    failed_requests: int = 0
    refused_batches: int = 0


class Chaos:
    """One run, on a stack that it starts and stops."""

    def __init__(
        self,
        settings: Settings,
        *,
        seed: int,
        rate: float,
        faults: Sequence[Fault] = KILLS,
        report: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._random = random.Random(seed)
        self._seed, self._rate, self._faults, self._report = seed, rate, list(faults), report

    def run(self) -> tuple[list[Outcome], list[Promise]]:
        """Start, break, audit, stop."""
        daemon.start(self._settings, report=self._report)
        try:
            return self._under_load(Settings.load())  # with the addresses of what runs now
        finally:
            tear_down(self._settings, report=self._report)

    def _under_load(self, settings: Settings) -> tuple[list[Outcome], list[Promise]]:
        keys = settings.keys
        with (
            httpx.Client(
                base_url=settings.gateway_url, timeout=30, headers=keys.header("produce")
            ) as events,
            httpx.Client(
                base_url=settings.recommend_url,
                timeout=DEADLINE_S,
                headers=keys.header("recommend"),
            ) as answers,
        ):
            producer = Producer(events, seeded(self._seed), self._rate)
            asker = Asker(answers, self._seed, self._rate / 10)
            stop = threading.Event()
            producing = threading.Thread(target=producer.run, args=(stop,))
            asking = threading.Thread(target=asker.run, args=(stop,))
            producing.start()
            try:
                self._probe = Probe(settings, events)
                self._wait("a first student", self._probe.answers)
                asking.start()
                outcomes = [self._break(settings, fault) for fault in self._order()]
            finally:
                stop.set()
                producing.join()
                if asking.ident is not None:
                    asking.join()
            self._report("auditing")
            self._wait("everything read and learned", lambda: settled(settings))
        outcomes = [_told(one, asker, producer) for one in outcomes]
        forgot = [_window(one) for one in outcomes if one.fault.forgets]
        proxyless = [_window(one) for one in outcomes if one.fault.single_proxy]
        promises = audit_state(settings, producer.acknowledged, lost_windows=forgot)
        promises.append(
            answered(asker.asked, deadline_s=DEADLINE_S, share=ANSWERED_SHARE, excused=proxyless)
        )
        return outcomes, [*promises, *map(_back_in_time, outcomes)]

    def _order(self) -> list[Fault]:
        """Shuffled, the broker last: what is lost with it must not hide another fault's loss."""
        faults = [fault for fault in self._faults if not fault.forgets]
        self._random.shuffle(faults)
        return [*faults, *(fault for fault in self._faults if fault.forgets)]

    def _break(self, settings: Settings, fault: Fault) -> Outcome:
        time.sleep(self._random.uniform(*PAUSE_S))
        process = victim(settings, fault)
        version = self._probe.published()
        self._report(f"kill -9 {fault.name} ({process.pid})")
        at_s = time.monotonic()
        kill(process)
        try:
            self._wait(f"{fault.name} back", lambda: self._probe.whole_loop(since=version))
        except RefluxError as error:
            self._report(str(error))
            return Outcome(fault=fault, at_s=at_s, back_s=None)
        back_s = time.monotonic() - at_s
        self._report(f"back after {back_s:.1f} s")
        return Outcome(fault=fault, at_s=at_s, back_s=back_s)

    def _wait(self, what: str, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + GIVE_UP_S
        while not done():
            if time.monotonic() > deadline:
                raise RefluxError(f"{what}: not within {GIVE_UP_S:g} s")
            time.sleep(POLL_S)


class Probe:
    """Asks whether the whole loop works: event -> features -> answer, and a newer student."""

    def __init__(self, settings: Settings, events: httpx.Client) -> None:
        self._url = settings.recommend_url
        self._headers = settings.keys.header("recommend")
        self._registry = Registry(settings.registry)
        self._features = FeatureStore(settings, timeout_s=1.0)
        self._events = events

    def published(self) -> int:
        return self._registry.latest("student") or 0

    def answers(self) -> bool:
        try:
            answer = httpx.post(
                f"{self._url}/v1/recommendations",
                json={"n": 1},
                headers=self._headers,
                timeout=DEADLINE_S,
            )
        except httpx.TransportError:
            return False
        return answer.status_code == 200

    def whole_loop(self, *, since: int) -> bool:
        """A new user's event is online, an answer comes, a version newer than `since` exists."""
        user_id = f"chaos-probe-{uuid.uuid4().hex}"
        event = {
            "event_id": user_id,
            "user_id": user_id,
            "item_id": "chaos-item-0",
            "type": "click",
            "timestamp": time.time_ns() // 1_000_000,
        }
        try:
            if self._events.post("/v1/events", json=event).status_code != 202:
                return False
            deadline = time.monotonic() + DEADLINE_S
            while time.monotonic() < deadline:
                if self._features.read_users([user_id])[0].n_events:
                    return self.answers() and self.published() > since
                time.sleep(0.02)
        except (httpx.TransportError, RefluxError):
            pass
        return False


def settled(settings: Settings) -> bool:
    """Whether the log has everything and the learner's newest checkpoint all of the log."""
    from services.core.kafka import lag

    try:
        if any(lag(settings).values()):
            return False
    except RefluxError:
        return False
    ledger = newest_ledger(settings.checkpoints)
    end = EventLog(settings.offline).end()
    return {p: ranges[-1][1] for p, ranges in ledger.items() if ranges} == end


def render(outcomes: Sequence[Outcome], promises: Sequence[Promise]) -> None:
    from rich.console import Console
    from rich.table import Table

    faults = Table("kill -9", "back after", "requests failed", "batches refused", box=None)
    for one in outcomes:
        back = "never" if one.back_s is None else f"{one.back_s:.1f} s"
        faults.add_row(one.fault.name, back, str(one.failed_requests), str(one.refused_batches))
    kept = Table("", "promise", "found", box=None)
    for promise in promises:
        mark = "[green]kept[/]" if promise.kept else "[red]BROKEN[/]"
        kept.add_row(mark, promise.name, promise.found)
    console = Console()
    console.print(faults)
    console.print(kept)


def _told(outcome: Outcome, asker: Asker, producer: Producer) -> Outcome:
    """With the requests that failed and the batches that were refused meanwhile."""
    begin, end = _window(outcome)
    failed = [one for one in asker.asked if not one.good(DEADLINE_S) and begin <= one.at_s <= end]
    refused = [one for one in producer.refused if begin <= one.at_s <= end]
    return Outcome(
        fault=outcome.fault,
        at_s=outcome.at_s,
        back_s=outcome.back_s,
        failed_requests=len(failed),
        refused_batches=len(refused),
    )


def _window(outcome: Outcome) -> tuple[float, float]:
    """From shortly before the fault, for what was on its way, until all was well again."""
    back_s = GIVE_UP_S if outcome.back_s is None else outcome.back_s
    return outcome.at_s - DEADLINE_S, outcome.at_s + back_s


def _back_in_time(outcome: Outcome) -> Promise:
    back_s = outcome.back_s
    return Promise(
        name=f"{outcome.fault.name} back within {BACK_WITHIN_S:g} s",
        kept=back_s is not None and back_s <= BACK_WITHIN_S,
        found="never" if back_s is None else f"{back_s:.1f} s",
    )
