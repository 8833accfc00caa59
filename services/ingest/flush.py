"""From what is applied to the offline log, and when; a log that can't be written is tried again."""

import logging
import time
from collections.abc import Mapping
from typing import Final, TypeAlias

from kafka import TopicPartition

from services.core.errors import UnavailableError
from services.core.eventlog import EventLog, events_table, items_table
from services.core.events import EVENTS, dead_topic
from services.core.kafka import Publisher
from services.core.settings import Settings
from services.core.spans import Span, SpanFiles
from services.ingest.metrics import Metrics
from services.ingest.offline import USER_HISTORY, user_history_table
from services.ingest.online import Online
from services.ingest.reading import Reading

RETRY_S: Final = (0.5, 15.0)  # the first and the longest pause after a failure
HELD_FLUSHES: Final = 5  # files' worth of records that may wait for the log
FLUSH_BYTES: Final = 32 * 2**20  # of records, before they are read: enough for a file, however few
LETTERS: Final = 500  # dead letters published at a time
# Offsets in one file of histories, a whole one for each: to merge 48,000 of them took 440 MB at the
# most, by 4,000 it takes 184.
HISTORIES_MERGED: Final = 4_000

logger = logging.getLogger(__name__)
Readings: TypeAlias = Mapping[TopicPartition, Reading]


class Flush:
    """Writes dead letters, the log and the offline features of what a worker has applied."""

    def __init__(
        self, settings: Settings, logs: Mapping[str, EventLog], online: Online, metrics: Metrics
    ) -> None:
        self.history = SpanFiles(
            settings.offline,
            "user_history",
            prefix=EVENTS,
            schema=USER_HISTORY,
            merged_offsets=HISTORIES_MERGED,
        )
        self._settings = settings
        self._logs = logs
        self._online = online
        self._metrics = metrics
        self._publisher = Publisher(settings)
        self._flushed_s = time.monotonic()
        self._again_s = self._wait_s = 0.0

    def is_due(self, readings: Readings) -> bool:
        now_s = time.monotonic()
        many = self._files_worth(readings) >= 1
        long = now_s - self._flushed_s >= self._settings.log_flush_s
        pending = any(reading.next > reading.first for reading in readings.values())
        return pending and (many or long) and now_s >= self._again_s

    def holds_enough(self, readings: Readings) -> bool:
        """Whether so much waits for the log that no more should be read."""
        return self._files_worth(readings) >= HELD_FLUSHES

    def attempt(self, readings: Readings) -> bool:
        """Flush; True where the log has grown. Whatever a failure (a full disk, a Kafka that
        doesn't take dead letters) leaves undone is still there for the next attempt."""
        before = [reading.first for reading in readings.values()]
        started_s = time.monotonic()
        try:
            for partition, reading in readings.items():
                if reading.next > reading.first:
                    self._write(partition.topic, reading)
            self._wait_s = 0.0
        except (UnavailableError, OSError) as error:
            shortest_s, longest_s = RETRY_S
            self._wait_s = min(max(shortest_s, 2 * self._wait_s), longest_s)
            self._again_s = time.monotonic() + self._wait_s
            self._metrics.flush_failures.inc()
            logger.error(
                "%d records wait for the offline log, the next try is in %g s: %s",
                *(_waiting(readings), self._wait_s, error),
            )
        self._flushed_s = time.monotonic()
        self._metrics.flush.observe(self._flushed_s - started_s)
        return before != [reading.first for reading in readings.values()]

    def close(self) -> None:
        self._publisher.close()

    def _files_worth(self, readings: Readings) -> float:
        n_bytes = sum(reading.n_bytes for reading in readings.values())
        return max(_waiting(readings) / self._settings.log_flush_events, n_bytes / FLUSH_BYTES)

    def _write(self, topic: str, reading: Reading) -> None:
        while reading.dead:  # those that Kafka has taken wait no longer
            letters = reading.dead[:LETTERS]
            self._publisher.publish(dead_topic(topic), letters)
            self._metrics.dead.inc(len(letters))
            del reading.dead[:LETTERS]
        for wish in reading.forgotten:  # before the span that says it has been seen
            self._logs[EVENTS].forget(wish)
        reading.forgotten = []
        span = Span(partition=reading.partition, first=reading.first, last=reading.next - 1)
        table = events_table if topic == EVENTS else items_table
        self._logs[topic].append(table(reading.rows), span)
        if topic == EVENTS:
            if users := self._online.touched(reading.partition):
                self.history.write(user_history_table(users), span)
            self._online.let_go(reading.partition)
        reading.first, reading.rows, reading.n_bytes = reading.next, [], 0


def _waiting(readings: Readings) -> int:
    """Records of every kind: dead letters and wishes to be forgotten take memory, too."""
    return sum(reading.next - reading.first for reading in readings.values())
