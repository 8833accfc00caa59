"""Kafka -> online features and the offline log.

    python -m services.ingest.worker

Each poll is applied online at once; every `log_flush_s` the log gets what was applied, and only
then are offsets committed. The log's end, not the committed offset, is where a worker resumes, and
applying an event again changes nothing: a crash at any point loses nothing and counts nothing
twice. Workers share the partitions; a user has one partition, and therefore one writer.
"""

import logging
import signal
import sys
import threading
import time
from collections import Counter as Counts
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import chain
from typing import Any, Final, TypeAlias, TypeVar

from kafka import ConsumerRebalanceListener, KafkaConsumer, TopicPartition
from kafka.errors import IllegalStateError, KafkaError
from kafka.structs import OffsetAndMetadata
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from services.core.errors import RefluxError, UnavailableError
from services.core.eventlog import (
    Arrived,
    EventLog,
    epoch_of,
    events_table,
    items_table,
    kafka_offset,
)
from services.core.events import (
    EVENTS,
    ITEMS,
    Event,
    Item,
    dead_topic,
)
from services.core.features import FeatureStore
from services.core.history import UserHistory, merge
from services.core.kafka import GROUP, Publisher, ensure_topics, make_consumer, resume_offsets
from services.core.settings import Settings
from services.core.spans import Span, SpanFiles
from services.ingest.offline import USER_HISTORY, user_history_table
from services.ingest.reading import DeadLetters, Reading, sort_out
from services.ingest.rollup import RollUp

POLL_MS: Final = 100
RETRY_S: Final = 1.0
CREATE_TOPICS_S: Final = 5.0  # between two attempts, while there is nothing to read
CLOSE_TIMEOUT_MS: Final = 5_000
ROLL_UP_SHARE: Final = 10  # a roll-up pauses for at least this many times what it took

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
Commits: TypeAlias = dict[TopicPartition, OffsetAndMetadata]


class Metrics:
    """What a worker counts; one registry per worker, so that tests can make several."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.events = Counter(
            "reflux_worker_events", "Applied events by type", ["type"], registry=self.registry
        )
        self.items = Counter("reflux_worker_items", "Applied items", registry=self.registry)
        self.duplicates = Counter(
            "reflux_worker_duplicates", "Events whose id counted already", registry=self.registry
        )
        self.dead = Counter(
            "reflux_worker_dead_letters", "Records against the contract", registry=self.registry
        )
        self.lag = Gauge(
            "reflux_worker_lag_events",
            "Records in the worker's partitions not yet applied",
            registry=self.registry,
        )
        self.freshness = Histogram(
            "reflux_feature_freshness_seconds",
            "From an event's arrival to its user's features online",
            buckets=(0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.5, 1, 2.5, 5, 15, 60),
            registry=self.registry,
        )
        self.flush = Histogram(
            "reflux_worker_flush_seconds", "Writing to the offline log", registry=self.registry
        )


class Worker(ConsumerRebalanceListener):
    """Reads its share of `events` and `items` until stopped. `run` once, `stop` from anywhere."""

    def __init__(self, settings: Settings, features: FeatureStore) -> None:
        self.metrics = Metrics()
        self._settings = settings
        self._features = features
        self._logs = {topic: EventLog(settings.offline, topic) for topic in (EVENTS, ITEMS)}
        self._publisher = Publisher(settings)
        self._history = SpanFiles(
            settings.offline, "user_history", prefix=EVENTS, schema=USER_HISTORY
        )
        self._roll_up = RollUp(settings, features)
        self._stop = threading.Event()
        # Rebalances arrive on the client's own thread, while this one may be applying a poll.
        self._lock = threading.Lock()
        self._reading: dict[TopicPartition, Reading] = {}
        self._touched: dict[str, UserHistory] = {}
        self._flushed_s = time.monotonic()
        self._create_topics_at_s = 0.0

    def stop(self) -> None:
        """Ask `run` to flush and return."""
        self._stop.set()

    def run(self) -> None:
        """Work until `stop`; then flush, commit and leave the group.

        Waits for a Kafka or Redis that doesn't answer. Anything else unexpected ends it, and the
        next start resumes from the log.
        """
        consumer = self._patiently(lambda: make_consumer(self._settings, group=GROUP))
        consumer.subscribe([EVENTS, ITEMS], listener=self)
        try:
            with ThreadPoolExecutor(1) as beside:
                self._loop(consumer, beside)
            with self._lock:
                commits = self._flush()
            with suppress(KafkaError):  # informational; the log has it
                consumer.commit(commits, timeout_ms=CLOSE_TIMEOUT_MS)
        finally:
            self._reading.clear()  # leaving calls on_partitions_revoked
            consumer.close(timeout_ms=CLOSE_TIMEOUT_MS)
            self._publisher.close()

    def on_partitions_assigned(self, assigned: Sequence[TopicPartition]) -> None:
        """Nothing: `_resume` finds them, on the thread that may wait."""

    def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        """Flush; whoever has them next goes on from the log's end. Also called when they are
        lost: a span that the next owner writes as well counts once."""
        with self._lock:
            self._release(revoked)

    def _release(self, partitions: Iterable[TopicPartition]) -> None:
        try:
            self._flush()
        except UnavailableError as error:
            logger.error("left to the partitions' next owner: %s", error)
        for partition in partitions:
            self._reading.pop(partition, None)

    def _loop(self, consumer: KafkaConsumer, beside: ThreadPoolExecutor) -> None:
        roll_up: Future[float] | None = None
        due_s = time.monotonic() + self._settings.popularity_every_s
        while not self._stop.is_set():
            self._step(consumer)
            if roll_up is not None and roll_up.done():
                took_s = roll_up.result()
                pause_s = max(self._settings.popularity_every_s, ROLL_UP_SHARE * took_s)
                due_s, roll_up = time.monotonic() + pause_s, None
            mine = TopicPartition(EVENTS, 0) in self._reading
            if roll_up is None and mine and time.monotonic() > due_s:
                roll_up = beside.submit(self._run_roll_up)

    def _step(self, consumer: KafkaConsumer) -> None:
        polled = consumer.poll(timeout_ms=POLL_MS)
        commits: Commits = {}
        with self._lock:
            self._patiently(lambda: self._apply(polled))
            if self._flush_is_due():
                commits = self._patiently(self._flush)
        if commits:
            consumer.commit_async(commits)
        self._look_at_ends(consumer)
        self._resume(consumer)

    def _apply(self, polled: Mapping[TopicPartition, Sequence[Any]]) -> None:
        """Bring one poll online. Repeating it after a failure changes nothing."""
        now_ms = _now_ms()
        applied: list[tuple[Reading, Sequence[Any], list[Arrived[Any]], DeadLetters]] = []
        rows: dict[str, list[Arrived[Any]]] = {EVENTS: [], ITEMS: []}
        for partition, records in polled.items():
            reading = self._reading.get(partition)
            if reading is None:  # not resumed yet: these come again
                continue
            if records[0].offset < kafka_offset(reading.next):  # another incarnation of the topic
                self._release([partition])
                continue
            valid, dead = sort_out(
                partition.topic,
                records,
                base=reading.base,
                now_ms=now_ms,
                max_future_s=self._settings.max_future_s,
            )
            rows[partition.topic] += valid
            applied.append((reading, records, valid, dead))
        self._write_users(rows[EVENTS], now_ms=now_ms)
        self._write_items(rows[ITEMS])
        for reading, records, valid, dead in applied:
            reading.rows += valid
            reading.dead += dead
            reading.next = reading.base + records[-1].offset + 1

    def _write_users(self, events: list[Arrived[Event]], *, now_ms: int) -> None:
        by_user: dict[str, list[Arrived[Event]]] = defaultdict(list)
        for arrived in events:
            if arrived.record.is_interaction:
                by_user[arrived.record.user_id].append(arrived)
        if by_user:
            limit = self._settings.history_events
            merged: list[UserHistory] = []
            for history in self._features.read_users(list(by_user)):
                row, duplicates = merge(
                    history, by_user[history.user_id], limit=limit, now_ms=now_ms
                )
                self.metrics.duplicates.inc(duplicates)
                merged.append(row)
            self._features.write_users(merged)
            self._touched.update((row.user_id, row) for row in merged)
            written_ms = _now_ms()
            for arrived in chain.from_iterable(by_user.values()):
                self.metrics.freshness.observe((written_ms - arrived.arrival_ms) / 1000)
        for kind, count in Counts(arrived.record.type.value for arrived in events).items():
            self.metrics.events.labels(kind).inc(count)

    def _write_items(self, items: list[Arrived[Item]]) -> None:
        if items:
            latest = {arrived.record.item_id: arrived.record for arrived in items}
            self._features.write_items(latest.values())
            self.metrics.items.inc(len(items))

    def _flush_is_due(self) -> bool:
        pending = [reading for reading in self._reading.values() if reading.next > reading.first]
        many = sum(len(r.rows) for r in pending) >= self._settings.log_flush_events
        long = time.monotonic() - self._flushed_s >= self._settings.log_flush_s
        return bool(pending) and (many or long)

    def _flush(self) -> Commits:
        """Dead letters, then the log, then the offline features; return what may be committed."""
        pending = {p: r for p, r in self._reading.items() if r.next > r.first}
        if not pending:
            return {}
        started_s = time.monotonic()
        for partition, reading in pending.items():
            self._publisher.publish(dead_topic(partition.topic), reading.dead)
            self.metrics.dead.inc(len(reading.dead))
            reading.dead = []
        for partition, reading in pending.items():
            span = Span(partition=reading.partition, first=reading.first, last=reading.next - 1)
            table = events_table if partition.topic == EVENTS else items_table
            self._logs[partition.topic].append(table(reading.rows), span)
            if partition.topic == EVENTS:
                users = [r for r in self._touched.values() if r.partition == reading.partition]
                if users:
                    self._history.write(user_history_table(users), span)
            reading.first, reading.rows = reading.next, []
        self._touched.clear()
        self._flushed_s = time.monotonic()
        self.metrics.flush.observe(self._flushed_s - started_s)
        return {partition: _commit(reading.next) for partition, reading in pending.items()}

    def _look_at_ends(self, consumer: KafkaConsumer) -> None:
        """Report the lag; let go of partitions whose log is shorter than what was read of it."""
        lag = 0
        for partition, reading in list(self._reading.items()):
            try:
                end = consumer.highwater(partition)
            except IllegalStateError:  # just revoked
                continue
            if end is None:
                continue
            if end < kafka_offset(reading.next):
                self.on_partitions_revoked([partition])
            lag += max(0, end - kafka_offset(reading.next))
        self.metrics.lag.set(lag)

    def _resume(self, consumer: KafkaConsumer) -> None:
        """Seek every new partition to the log's end."""
        if not consumer.assignment() and time.monotonic() > self._create_topics_at_s:
            # A broker that lost its log has lost its topics, too.
            self._patiently(partial(ensure_topics, self._settings))
            self._create_topics_at_s = time.monotonic() + CREATE_TOPICS_S
        new = [p for p in consumer.assignment() if p not in self._reading]
        commits: Commits = {}
        for topic in {partition.topic for partition in new}:
            numbers = [partition.partition for partition in new if partition.topic == topic]
            log = self._logs[topic]
            starts = self._patiently(partial(resume_offsets, self._settings, log, numbers))
            for number, start in starts.items():
                partition = TopicPartition(topic, number)
                if self._seek(consumer, partition, start):
                    commits[partition] = _commit(start)
        if commits:  # whoever had them before may have flushed without being able to commit
            consumer.commit_async(commits)

    def _seek(self, consumer: KafkaConsumer, partition: TopicPartition, start: int) -> bool:
        """Go on from log offset `start`; False where the partition has just been revoked."""
        earliest = consumer.beginning_offsets([partition])[partition]
        missing = earliest - kafka_offset(start)
        if missing > 0:
            logger.error(
                "%s: Kafka no longer has %d records after the log's end; they are lost. "
                "Raise the topic's retention, or run more workers",
                *(partition, missing),
            )
            start += missing
        elif epoch_of(start) > 0 and kafka_offset(start) == 0:
            logger.warning(
                "%s was created anew (a broker that lost its log?): epoch %d begins",
                *(partition, epoch_of(start)),
            )
        try:
            consumer.seek(partition, kafka_offset(start))
        except ValueError:
            return False
        with self._lock:
            self._reading[partition] = Reading(
                partition=partition.partition, first=start, next=start
            )
        logger.info("%s: from log offset %d", partition, start)
        return True

    def _run_roll_up(self) -> float:
        started_s = time.monotonic()
        try:
            self._roll_up.run()
        except UnavailableError as error:
            logger.error("item popularity waits: %s", error)
        self._history.compact()
        return time.monotonic() - started_s

    def _patiently(self, action: Callable[[], Result]) -> Result:
        """Repeat until Kafka and Redis answer, or until `stop`."""
        while True:
            try:
                return action()
            except UnavailableError as error:
                logger.error("waiting: %s", error)
                if self._stop.wait(RETRY_S):
                    raise


def _commit(next_offset: int) -> OffsetAndMetadata:
    return OffsetAndMetadata(kafka_offset(next_offset), "", -1)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def main() -> int:
    settings = Settings.load()
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("kafka").setLevel(logging.WARNING)
    # On a busy machine it warns of every loop that took .1 s.
    logging.getLogger("kafka.net.selector").setLevel(logging.ERROR)
    features = FeatureStore(settings)
    features.apply()
    worker = Worker(settings, features)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: worker.stop())
    if settings.worker_metrics_port:
        start_http_server(
            settings.worker_metrics_port, settings.host, registry=worker.metrics.registry
        )
    worker.run()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RefluxError as error:
        sys.exit(f"{type(error).__name__}: {error}")
