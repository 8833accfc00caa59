"""Where the distillation job's events come from: the offline log first, then Kafka.

Positions are log offsets (Kafka offset + epoch; see eventlog), per partition the next one to
read. They only ever move with the checkpoint that holds what was learned up to them; there is no
consumer group, and nothing is committed to Kafka.
"""

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from kafka import TopicPartition
from numpy.typing import NDArray

from ray_jobs.histories import EVENT, Histories
from ray_jobs.microbatch import Arrivals
from services.core.catalog import Catalog
from services.core.errors import InvalidEventError
from services.core.eventlog import EPOCH_SPAN, EventLog, epoch_of, kafka_offset
from services.core.events import (
    EVENTS,
    INTERACTIONS,
    Event,
    EventType,
    decode_event,
    decode_user_id,
)
from services.core.history import event_key, milliseconds
from services.core.kafka import Topic, describe, make_consumer
from services.core.models.sequences import type_codes
from services.core.settings import Settings

logger = logging.getLogger(__name__)

COLUMNS = [
    *("event_id", "user_id", "item_id", "type", "timestamp", "value"),
    *("arrival", "partition", "offset"),
]
LOOK_MS = 100
REFUSED_EVERY_S = 60.0  # between two lines on records that are no events
Positions = Mapping[int, int]
Row = tuple[Event, int, int]  # and its arrival (ms) and partition


@dataclass(frozen=True, kw_only=True, eq=False)
class Impression:
    """A list that was shown; it stands before interaction number `before` of its batch."""

    user_id: str
    partition: int
    item_ids: Sequence[str]
    before: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Received:
    """Interactions in the order of the stream as columns, and the lists shown between them."""

    user_ids: list[str]
    item_ids: list[str]
    types: list[str]
    values: NDArray[np.float64]  # NaN: none
    times_ms: NDArray[np.int64]
    arrivals_ms: NDArray[np.int64]
    partitions: list[int]
    keys: NDArray[np.int64]
    impressions: list[Impression]
    forgotten: frozenset[str] = frozenset()  # users who wished it; their events here came later
    refused: int = 0  # records that are no valid events
    skipped: Mapping[int, tuple[int, int]] = field(default_factory=dict)  # see `State.learned`
    # Read from the offline log up to here, where Kafka begins. Wishes to be forgotten may have
    # been among what Kafka removed; all that may still be remembered is in the log.
    rejoined: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.user_ids)

    @classmethod
    def of(cls, rows: Iterable[Row], forgotten: Iterable[str] = ()) -> Self:
        """From (event, arrival ms, partition) in the order of the stream."""
        chosen, shown = [], []
        for event, arrival_ms, partition in rows:
            if event.is_interaction:
                chosen.append((event, arrival_ms, partition))
            elif event.type == EventType.IMPRESSION:
                items = (event.context or {}).get("items") or [event.item_id]
                shown.append(_impression(event.user_id, partition, items, len(chosen)))
        return cls(
            user_ids=[e.user_id for e, _, _ in chosen],
            item_ids=[e.item_id for e, _, _ in chosen],
            types=[e.type.value for e, _, _ in chosen],
            values=np.array([np.nan if e.value is None else e.value for e, _, _ in chosen], float),
            times_ms=np.array([e.timestamp for e, _, _ in chosen], np.int64),
            arrivals_ms=np.array([arrival for _, arrival, _ in chosen], np.int64),
            partitions=[partition for _, _, partition in chosen],
            keys=np.array([event_key(e.event_id) for e, _, _ in chosen], np.int64),
            impressions=shown,
            forgotten=frozenset(forgotten),
        )

    @classmethod
    def of_log(cls, table: pa.Table) -> Self:
        """From rows of the offline log; its impressions were answered long ago and are left out."""
        table = table.filter(pc.is_in(table["type"], pa.array(INTERACTIONS)))
        return cls(
            user_ids=table["user_id"].to_pylist(),
            item_ids=table["item_id"].to_pylist(),
            types=table["type"].to_pylist(),
            values=table["value"].to_numpy(),
            times_ms=milliseconds(table["timestamp"]),
            arrivals_ms=milliseconds(table["arrival"]),
            partitions=table["partition"].to_pylist(),
            keys=np.array([event_key(key) for key in table["event_id"].to_pylist()], np.int64),
            impressions=[],
        )

    def arrivals(self, catalog: Catalog) -> Arrivals:
        """With the catalog's rows; items that it hasn't met get theirs."""
        events = np.zeros(len(self), EVENT)
        events["row"] = catalog.add(self.item_ids)
        events["type"] = type_codes(self.types, self.values)
        events["time_ms"] = self.times_ms
        events["key"] = self.keys
        return Arrivals(user_ids=self.user_ids, events=events, partitions=self.partitions)


class EventStream:
    """Worker `rank`'s share of the partitions, read from `positions` on; `poll` moves them.

    What Kafka no longer has, by its retention or because the topic was created anew (a broker that
    lost its log), comes from the offline log, as far as that has it.
    """

    def __init__(
        self, settings: Settings, positions: Positions, *, rank: int = 0, world: int = 1
    ) -> None:
        self._settings = settings
        self._log = EventLog(settings.offline)
        self._consumer = make_consumer(
            settings, max_partition_fetch_bytes=2**20, fetch_max_wait_ms=50
        )
        self._rank, self._world = rank, world
        own = self._share(describe(settings, EVENTS))
        self.positions = {partition: positions.get(partition, 0) for partition in own}
        self._refused = 0  # not told yet
        self._told_s = -REFUSED_EVERY_S
        self._open()

    def poll(self, *, max_events: int, timeout_s: float) -> Received:
        """What has arrived after `timeout_s`; at once where `max_events` records wait already.

        It looks as seldom as it can: the embedded broker goes through all of its batches for each
        fetch that finds something. Measured at 50 requests/s after 12,000: 0.34 of a core for a
        consumer that always asks, 0.05 for this one.
        """
        for partition, at in self.positions.items():
            if at < self._begins[partition]:
                received = self._from_log(partition, at, max_events=max_events)
                done = self.positions[partition] >= self._begins[partition]
                return replace(received, rejoined=frozenset({partition} if done else ()))
        rows: list[Row] = []
        forgotten: set[str] = set()
        refused: list[InvalidEventError] = []
        n_left = max_events
        if self.lag_events() < max_events:
            time.sleep(timeout_s)
        looks = 0
        # The first look gets what the client fetched when we last looked; the second is fresh.
        while n_left and (looks < 2 or self.lag_events() > 0):
            polled = self._consumer.poll(timeout_ms=LOOK_MS, max_records=n_left)
            if not polled:
                break
            looks += 1
            for where in sorted(polled, key=lambda where: int(where.partition)):
                n_left -= len(polled[where])
                if not self._take(where.partition, polled[where], rows, forgotten, refused):
                    self._open()
                    n_left = 0
                    break
        self._tell_of(refused)
        return replace(Received.of(rows, forgotten), refused=len(refused))

    def lag_events(self) -> int:
        """Records in Kafka beyond our positions, as far as the consumer has heard."""
        ends = {at.partition: self._consumer.highwater(at) for at in self._consumer.assignment()}
        return sum(
            max(0, end - kafka_offset(self.positions[partition]))
            for partition, end in ends.items()
            if end is not None
        )

    def check_topic(self) -> None:
        """Notice partitions that the topic has got meanwhile, and a topic created anew, even if it
        has already grown past our positions."""
        topic = describe(self._settings, EVENTS)
        more = [partition for partition in self._share(topic) if partition not in self.positions]
        if more or self._log.epoch(topic.id) != self._epoch:
            self.positions |= dict.fromkeys(more, 0)
            self._open()

    def close(self) -> None:
        self._consumer.close()

    def _share(self, topic: Topic) -> list[int]:
        return [number for number in topic.partitions if number % self._world == self._rank]

    def _open(self) -> None:
        self._epoch = self._log.epoch(describe(self._settings, EVENTS).id)
        self._consumer.assign([TopicPartition(EVENTS, p) for p in self.positions])
        self._begins = self._kafka_begins(self.positions)
        self._rest: tuple[pa.Table, int] | None = None  # of a file of the log, and where it ends
        for partition, at in self.positions.items():
            begin = self._begins[partition]
            if epoch_of(at) < self._epoch:
                logger.warning(
                    "topic %r was created anew: partition %d goes on with what the offline log "
                    "has after %d, then with the new topic; what was in neither is lost",
                    *(EVENTS, partition, at),
                )
            elif at < begin:
                logger.warning(
                    "Kafka no longer has partition %d from %d to %d: on from the offline log",
                    *(partition, at, begin),
                )
            self._consumer.seek(TopicPartition(EVENTS, partition), kafka_offset(max(at, begin)))

    def _kafka_begins(self, partitions: Iterable[int]) -> dict[int, int]:
        """The first log offsets that Kafka still has."""
        earliest = self._consumer.beginning_offsets([TopicPartition(EVENTS, p) for p in partitions])
        return {at.partition: self._epoch * EPOCH_SPAN + first for at, first in earliest.items()}

    def _take(
        self,
        partition: int,
        records: Any,
        rows: list[Row],
        forgotten: set[str],
        refused: list[InvalidEventError],
    ) -> bool:
        """Add valid events to `rows` and move the position; False: offsets fell, which they never
        do in one and the same topic, or Kafka has removed some that we had still to read. A wish
        to be forgotten takes the user's out again."""
        now_ms = time.time_ns() // 1_000_000
        for record in records:
            position = self._epoch * EPOCH_SPAN + record.offset
            at = self.positions[partition]
            # Where others write in transactions, offsets have gaps that hold no records.
            gap = position > at and self._kafka_begins([partition])[partition] > at
            if gap or position < at:
                return False
            self.positions[partition] = position + 1
            try:
                if record.value is None and record.key:
                    user_id = decode_user_id(record.key)
                    forgotten.add(user_id)
                    rows[:] = [row for row in rows if row[0].user_id != user_id]
                    continue
                arrival_ms = min(record.timestamp, now_ms)  # as the feature worker does
                event = decode_event(
                    record.value or b"",
                    arrival_ms=arrival_ms,
                    max_future_s=self._settings.max_future_s,
                )
            except InvalidEventError as error:
                refused.append(error)
                continue
            rows.append((event, arrival_ms, partition))
        return True

    def _tell_of(self, refused: list[InvalidEventError]) -> None:
        """They are in events.dead with the reason, where the feature worker refuses them too."""
        self._refused += len(refused)
        if refused and time.monotonic() - self._told_s > REFUSED_EVERY_S:
            logger.warning(
                "%d records can't be learned; the newest: %s", self._refused, refused[-1]
            )
            self._refused, self._told_s = 0, time.monotonic()

    def _from_log(self, partition: int, at: int, *, max_events: int) -> Received:
        """The next events of a file of the log; after the last, the position is Kafka's begin."""
        if self._rest is None:
            begin = self._begins[partition]
            files = self._log.portions(
                since={partition: at}, until={partition: begin}, partition=partition, records=1
            )
            first = files[0].since[partition] if files else begin
            if first > at:
                return self._skip(partition, at, first)
            rows = self._log.read_portion(files[0], columns=COLUMNS)
            self._rest = rows.sort_by("offset"), files[0].until[partition]
        rows, until = self._rest
        head, rest = rows.slice(0, max_events), rows.slice(max_events)
        self._rest = (rest, until) if len(rest) else None
        self.positions[partition] = int(rest["offset"][0].as_py()) if len(rest) else until
        return Received.of_log(head)

    def _skip(self, partition: int, at: int, first: int) -> Received:
        """Go on from `first`: what comes before is in neither Kafka nor the log."""
        if epoch_of(at) == epoch_of(first):
            logger.error(
                "partition %d: %d records from %d on are in neither Kafka nor the offline log; "
                "nobody learns them. Raise the topic's retention",
                *(partition, first - at, at),
            )
        self.positions[partition] = first
        return replace(Received.of([]), skipped={partition: (at, first)})


def answer_lists(
    received: Received, rows: NDArray[np.int32], histories: Histories, catalog: Catalog
) -> tuple[int, int]:
    """How many shown lists were answered by their user's next interaction, and how many of these
    by an item on the list. Lists shown meanwhile are remembered in `histories`."""
    answered = hits = 0
    shown = iter(received.impressions)
    pending = next(shown, None)
    for i, user_id in enumerate([*received.user_ids, None]):
        while pending is not None and (pending.before <= i or user_id is None):
            listed = catalog.rows(pending.item_ids).astype(np.int32)
            histories.show(pending.user_id, listed, partition=pending.partition)
            pending = next(shown, None)
        if user_id is not None and (awaiting := histories.answer(user_id)) is not None:
            answered += 1
            hits += int(rows[i] in awaiting)
    return answered, hits


def _impression(user_id: str, partition: int, items: Any, before: int) -> Impression:
    shown = [str(item) for item in items] if isinstance(items, list) else []
    return Impression(user_id=user_id, partition=partition, item_ids=shown, before=before)
