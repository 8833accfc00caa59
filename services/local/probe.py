"""Whether a running stack does what it is there for, seen from outside."""

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

import httpx

from services.core.errors import RefluxError
from services.core.eventlog import EventLog
from services.core.features import FeatureStore
from services.core.registry import Registry
from services.core.settings import Settings
from services.local.audit import newest_ledger
from services.local.faults import Concern
from services.local.load import Asker, Producer
from services.local.load import events as seeded
from services.local.waiting import alongside, wait

DEADLINE_S: Final = 1.0  # of an answer, and of an event on its way to the features
IN_A_ROW: Final = 10


class Probe:
    """Asks after one concern at a time. `since` marks what was there when a fault ended."""

    def __init__(self, settings: Settings, events: httpx.Client) -> None:
        self._settings = settings
        self._registry = Registry(settings.registry)
        self._log = EventLog(settings.offline)
        self._features = FeatureStore(settings, timeout_s=DEADLINE_S)
        self._events = events

    def since(self) -> dict[Concern, int]:
        """The newest student, and how much the offline log holds."""
        return {"student": self._registry.latest("student") or 0, "log": self._log.count()}

    def works(self, concern: Concern, since: dict[Concern, int]) -> bool:
        if concern == "features":
            return self._event_arrives()
        if concern == "answers":
            return self.answers()
        return self.since()[concern] > since[concern]

    def answers(self) -> bool:
        """A recommendation comes in time."""
        try:
            answer = httpx.post(
                f"{self._settings.recommend_url}/v1/recommendations",
                json={"n": 1},
                headers=self._settings.keys.header("recommend"),
                timeout=DEADLINE_S,
            )
        except httpx.TransportError:
            return False
        return answer.status_code == 200

    def always_answers(self) -> bool:
        """Many in a row, whichever replica gets them."""
        return all(self.answers() for _ in range(IN_A_ROW))

    def _event_arrives(self) -> bool:
        """A new user's event is taken, and in time it is online."""
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
                    return True
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


class Load(NamedTuple):
    """What a stack is under: both keep books of what came of it."""

    producer: Producer
    asker: Asker
    probe: Probe


@contextmanager
def under_load(settings: Settings, *, seed: int, rate: float, ready_s: float) -> Iterator[Load]:
    """Seeded events and, once there is a first student, a tenth as many requests.

    `RefluxError` where none answers within `ready_s`.
    """
    keys = settings.keys
    with (
        httpx.Client(
            base_url=settings.gateway_url, timeout=30, headers=keys.header("produce")
        ) as gateway,
        httpx.Client(
            base_url=settings.recommend_url, timeout=DEADLINE_S, headers=keys.header("recommend")
        ) as endpoint,
    ):
        load = Load(
            producer=Producer(gateway, seeded(seed), rate),
            asker=Asker(endpoint, seed, rate / 10),
            probe=Probe(settings, gateway),
        )
        with alongside(load.producer.run):
            wait("a first student", load.probe.always_answers, give_up_s=ready_s)
            with alongside(load.asker.run):
                yield load
