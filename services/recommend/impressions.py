"""Sends what was shown back as `impression` events; never delays an answer, never fails one."""

import logging
import queue
import threading
from dataclasses import dataclass
from typing import Any, Final

from services.core.errors import RefluxError
from services.core.events import EVENTS, Event, EventType, encode
from services.core.kafka import Publisher
from services.recommend.telemetry import Telemetry

BUFFER: Final = 10_000  # answers; at 1,000 a second, Kafka may be away for ten seconds
BATCH: Final = 1_000
IDLE_S: Final = 0.25  # between two looks at whether to stop
GATHER_S: Final = 0.1  # one by one, sending them costs a third of an answer's CPU

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Shown:
    """What one answer showed to a known user."""

    request_id: str
    user_id: str
    item_ids: list[str]
    model_version: int
    fallback: str | None
    now_ms: int
    trial: dict[str, Any]  # what `core.trials` reads of it; empty without a trial

    def event(self) -> Event:
        return Event(
            event_id=self.request_id,
            user_id=self.user_id,
            item_id=self.item_ids[0],
            type=EventType.IMPRESSION,
            timestamp=self.now_ms,
            context={
                "items": self.item_ids,
                "model_version": self.model_version,
                "fallback": self.fallback,
                **self.trial,
            },
        )


class Impressions:
    """A bounded buffer and a thread that empties it into Kafka.

    What finds the buffer full or Kafka away is dropped and counted in `reflux_impressions`.
    """

    def __init__(self, publisher: Publisher, telemetry: Telemetry) -> None:
        self._publisher = publisher
        self._outcomes = telemetry.impressions
        self._buffer: queue.Queue[Shown] = queue.Queue(BUFFER)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._send_all, name="impressions", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Send what is buffered, as far as Kafka takes it within its timeout."""
        self._stopping.set()
        self._thread.join(timeout=15.0)
        self._publisher.close()

    def offer(self, shown: Shown) -> None:
        try:
            self._buffer.put_nowait(shown)
        except queue.Full:
            self._outcomes.labels("dropped").inc()

    def _send_all(self) -> None:
        while not (self._stopping.is_set() and self._buffer.empty()):
            try:
                batch = [self._buffer.get(timeout=IDLE_S)]
            except queue.Empty:
                continue
            self._stopping.wait(GATHER_S)
            while len(batch) < BATCH and not self._buffer.empty():
                batch.append(self._buffer.get())
            self._send([shown.event() for shown in batch])

    def _send(self, events: list[Event]) -> None:
        try:
            self._publisher.publish(
                EVENTS, [(event.user_id.encode(), encode(event)) for event in events]
            )
            self._outcomes.labels("sent").inc(len(events))
        except RefluxError as error:
            self._outcomes.labels("failed").inc(len(events))
            log.warning("%d impressions lost: %s", len(events), error)
