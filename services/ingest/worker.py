"""Kafka -> online features and the offline log.

    python -m services.ingest.worker

Each poll is applied online at once; every `log_flush_s` the log gets what was applied, and only
then are offsets committed. The log's end, not the committed offset, is where a worker resumes, and
applying an event again changes nothing: a crash at any point loses nothing and counts nothing
twice. Workers share the partitions; a user has one partition, and therefore one writer.

A log that can't be written (a full disk) is tried again and again; features stay fresh meanwhile,
until the worker holds as many records as it may.
"""

import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import chain
from typing import Any, Final, TypeAlias, TypeVar

from kafka import ConsumerRebalanceListener, KafkaConsumer, TopicPartition
from kafka.errors import IllegalStateError, KafkaError
from kafka.structs import OffsetAndMetadata
from prometheus_client import start_http_server

from services.core import logs
from services.core.errors import DamagedFileError, RefluxError, UnavailableError
from services.core.eventlog import (
    EventLog,
    epoch_of,
    kafka_offset,
)
from services.core.events import (
    EVENTS,
    ITEMS,
    Event,
)
from services.core.features import FeatureStore
from services.core.history import event_key
from services.core.kafka import GROUP, ensure_topics, make_consumer, resume_offsets
from services.core.memory import Trimmer
from services.core.pauses import settle
from services.core.settings import Settings
from services.ingest.breathing import PartitionsMovedError, breathing
from services.ingest.flush import Flush
from services.ingest.metrics import Metrics
from services.ingest.online import Online, Poison
from services.ingest.reading import Reading, Sorted, sort_out
from services.ingest.rebuild import Lost, rebuild
from services.ingest.rollup import RollUp

POLL_MS: Final = 100
COMMIT_AGAIN_S: Final = 1.0
RETRY_S: Final = 1.0
CREATE_TOPICS_S: Final = 5.0  # between two attempts, while there is nothing to read
# Between two marks of what the online store will still have when it comes back. They tell what was
# so at the ones before: a shard of a cluster may lose seconds that the mark's own shard keeps.
MARK_EVERY_S: Final = 60.0
CLOSE_TIMEOUT_MS: Final = 5_000
ROLL_UP_SHARE: Final = 10  # a roll-up pauses for at least this many times what it took

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
Commits: TypeAlias = dict[TopicPartition, OffsetAndMetadata]


class Worker(ConsumerRebalanceListener):
    """Reads its share of `events` and `items` until stopped. `run` once, `stop` from anywhere."""

    def __init__(self, settings: Settings, features: FeatureStore) -> None:
        self.metrics = Metrics()
        self._settings = settings
        self._features = features
        self._logs = {topic: EventLog(settings.offline, topic) for topic in (EVENTS, ITEMS)}
        self._online = Online(features, self.metrics, history_events=settings.history_events)
        self._flush = Flush(settings, self._logs, self._online, self.metrics)
        self._roll_up = RollUp(settings, features)
        self._trimmer = Trimmer()
        self._stop = threading.Event()
        # Rebalances arrive on the client's own thread, while this one may be applying a poll.
        self._lock = threading.Lock()
        self._reading: dict[TopicPartition, Reading] = {}
        self._n_moves = 0  # how often the group has shared out its partitions
        self._safe: dict[TopicPartition, int] = {}  # what the next marks say: see MARK_EVERY_S
        self._checked_s = self._committed_s = self._marked_s = time.monotonic()
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
                self._flush.attempt(self._reading)
            with suppress(KafkaError):  # informational; the log has it
                consumer.commit(self._commits(), timeout_ms=CLOSE_TIMEOUT_MS)
        finally:
            self._reading.clear()  # leaving calls on_partitions_revoked
            consumer.close(timeout_ms=CLOSE_TIMEOUT_MS)
            self._flush.close()

    def on_partitions_assigned(self, assigned: Sequence[TopicPartition]) -> None:
        """Nothing: `_resume` finds them, on the thread that may wait."""

    def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        """Flush; whoever has them next goes on from the log's end. Also called when they are
        lost: a span that the next owner writes as well counts once."""
        self._n_moves += 1
        with self._lock:
            self._release(revoked)

    def _release(self, partitions: Iterable[TopicPartition]) -> None:
        self._flush.attempt(self._reading)  # what fails here is left to the partitions' next owner
        for partition in partitions:
            self._reading.pop(partition, None)
            self._safe.pop(partition, None)
            if partition.topic == EVENTS:
                self._online.let_go(partition.partition)

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
        polled: Mapping[TopicPartition, Sequence[Any]] = {}
        if self._flush.holds_enough(self._reading):
            self._stop.wait(POLL_MS / 1000)
        else:
            polled = consumer.poll(timeout_ms=POLL_MS)
        commits: Commits = {}
        with self._lock:
            self._patiently(lambda: self._apply(polled))
            grown = self._flush.is_due(self._reading) and self._flush.attempt(self._reading)
            if time.monotonic() - self._checked_s >= self._settings.log_flush_s:
                self._patiently(self._notice_lost_store)
            # Again and again: one that overtook another, or got lost, would show as lag for ever.
            if grown or time.monotonic() - self._committed_s >= COMMIT_AGAIN_S:
                self._committed_s = time.monotonic()
                commits = self._commits()
        if commits:
            consumer.commit_async(commits)
        self._look_at_ends(consumer)
        self._resume(consumer)

    def _apply(self, polled: Mapping[TopicPartition, Sequence[Any]]) -> None:
        """Bring one poll online. Repeating it after a failure changes nothing."""
        now_ms = _now_ms()
        applied: list[tuple[Reading, Sequence[Any], Sorted]] = []
        for partition, records in polled.items():
            reading = self._reading.get(partition)
            if reading is None:  # not resumed yet: these come again
                continue
            if records[0].offset < kafka_offset(reading.next):  # another incarnation of the topic
                self._release([partition])
                continue
            found = sort_out(
                partition.topic,
                records,
                base=reading.base,
                now_ms=now_ms,
                max_future_s=self._settings.max_future_s,
            )
            applied.append((reading, records, found))
        self._online.forget([wish for _, _, found in applied for wish in found.forgotten])
        poison: Poison = []
        for topic in (EVENTS, ITEMS):
            parts = [found.valid for _, _, found in applied if found.topic == topic]
            poison += self._online.apply(topic, list(chain.from_iterable(parts)))
        for reading, records, found in applied:
            found.bury(records, poison)
            reading.rows += found.valid
            reading.dead += found.dead
            reading.forgotten += found.forgotten
            reading.n_bytes += sum(len(record.value or b"") for record in records)
            reading.next = reading.base + records[-1].offset + 1
        self.metrics.poison.inc(len(poison))
        if logger.isEnabledFor(logging.DEBUG):
            for arrived in chain.from_iterable(found.valid for _, _, found in applied):
                if isinstance(arrived.record, Event):
                    logger.debug(
                        "applied",
                        extra={
                            "event_key": event_key(arrived.record.event_id),
                            "partition": arrived.partition,
                            "offset": arrived.offset,
                        },
                    )

    def _commits(self) -> Commits:
        """What the log has, and only that, may be committed."""
        return {p: _commit(reading.first) for p, reading in self._reading.items()}

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
                with self._lock:
                    self._release([partition])
            lag += max(0, end - kafka_offset(reading.next))
        self.metrics.lag.set(lag)

    def _resume(self, consumer: KafkaConsumer) -> None:
        """Seek every new partition to the log's end."""
        if not consumer.assignment() and time.monotonic() > self._create_topics_at_s:
            # A broker that lost its log has lost its topics, too.
            self._patiently(partial(ensure_topics, self._settings))
            self._create_topics_at_s = time.monotonic() + CREATE_TOPICS_S
        breathe = breathing(consumer, lambda: self._n_moves)
        new = [p for p in consumer.assignment() if p not in self._reading]
        commits: Commits = {}
        for topic in {partition.topic for partition in new}:
            numbers = [partition.partition for partition in new if partition.topic == topic]
            log = self._logs[topic]
            starts = self._patiently(partial(resume_offsets, self._settings, log, numbers))
            try:
                self._patiently(partial(self._rebuild, topic, starts, breathe))
            except PartitionsMovedError:  # the next step begins with those that are ours then
                return
            for number, start in starts.items():
                partition = TopicPartition(topic, number)
                if self._seek(consumer, partition, start):
                    commits[partition] = _commit(start)
        if commits:  # whoever had them before may have flushed without being able to commit
            consumer.commit_async(commits)

    def _rebuild(self, topic: str, starts: Mapping[int, int], breathe: Callable[[], None]) -> None:
        """Fill an online store that lacks what the log has of partitions that are now ours."""
        incarnation = self._features.incarnation()  # should it end meanwhile, the mark shows it
        for partition, since in self._features.unfilled(topic, starts).items():
            lost = Lost(
                log=self._logs[topic], partition=partition, since=since, until=starts[partition]
            )
            try:
                rows = rebuild(self._settings, self._features, lost, breathe=breathe)
            except DamagedFileError as error:  # who comes from now on need not wait for a repair
                rows = 0
                logger.error("not online again until `reflux features rebuild`: %s", error)
            self._features.mark_filled(topic, {partition: since}, incarnation)
            self._roll_up.write_all()
            if rows:
                where = (topic, partition, since)
                logger.warning("wrote %d rows of %s %d, from offset %d, online again", rows, *where)
            self.metrics.rebuilt.inc(rows)

    def _notice_lost_store(self) -> None:
        """Go back to `_rebuild` where Redis has come back empty or old, or on `reflux features
        rebuild`; else let the marks advance."""
        self._checked_s = time.monotonic()
        for topic in (EVENTS, ITEMS):
            mine = {p.partition: p for p in self._reading if p.topic == topic}
            if lost := self._features.unfilled(topic, mine):
                self._release([mine[number] for number in lost])
        if self._checked_s - self._marked_s >= MARK_EVERY_S:
            self._marked_s = self._checked_s
            for topic in (EVENTS, ITEMS):
                safe = {p.partition: at for p, at in self._safe.items() if p.topic == topic}
                self._features.mark_filled(topic, safe)
            self._safe = {p: reading.first for p, reading in self._reading.items()}

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
        for work, waits in (  # a damaged file keeps nobody from what comes after
            (self._roll_up.run, "item popularity waits"),
            (self._forget, "rows of forgotten users stay in the offline files"),
            (self._compact, "small offline files stay"),
        ):
            try:
                work()
            except (UnavailableError, DamagedFileError, OSError) as error:
                logger.error("%s: %s", waits, error)
        self._trimmer.tick()  # they have read whole files
        return time.monotonic() - started_s

    def _compact(self) -> None:
        self._roll_up.compact()
        self._flush.history.compact()

    def _forget(self) -> None:
        try:
            gone = self._logs[EVENTS].purge(self._flush.history)
        finally:
            self.metrics.wishes.set(self._logs[EVENTS].wishes())
        if gone:
            self._features.purge()
            logger.info("%d rows of forgotten users are gone from the offline files", gone)

    def _patiently(self, action: Callable[[], Result]) -> Result:
        """Repeat until Kafka, Redis and the disk answer, or until `stop`."""
        while True:
            try:
                return action()
            except (UnavailableError, OSError) as error:
                logger.error("waiting: %s", error)
                if self._stop.wait(RETRY_S):
                    raise


def _commit(next_offset: int) -> OffsetAndMetadata:
    return OffsetAndMetadata(kafka_offset(next_offset), "", -1)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def main() -> int:
    settings = Settings.load()
    logs.configure(settings)
    features = FeatureStore(settings)
    features.apply()
    worker = Worker(settings, features)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: worker.stop())
    if settings.worker_metrics_port:
        start_http_server(
            settings.worker_metrics_port, settings.host, registry=worker.metrics.registry
        )
    settle()
    worker.run()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RefluxError as error:
        sys.exit(f"{type(error).__name__}: {error}")
