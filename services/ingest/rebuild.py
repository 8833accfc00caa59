"""The online store from the offline log, for one that has lost what it had."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
from kafka import TopicPartition
from kafka.errors import KafkaError

from services.core.errors import UnavailableError
from services.core.eventlog import (
    ITEMS_RECORDS,
    PORTION_RECORDS,
    EventLog,
    Portion,
    epoch_of,
    kafka_offset,
)
from services.core.events import EVENTS, ITEMS, MAX_TIMESTAMP_MS, Item
from services.core.features import FeatureStore
from services.core.history import histories_as_of, joined
from services.core.kafka import end_offsets, make_consumer, read_up_to
from services.core.settings import Settings
from services.ingest.reading import sort_out

EVENT_COLUMNS: Final = [
    *("event_id", "user_id", "item_id", "type", "timestamp", "value", "arrival"),
]
ITEM_FIELDS: Final = ["item_id", "title", "categories", "text"]
ROWS_AT_ONCE: Final = 1_000  # users, of up to thousands of events each; items, of long texts
EVENTS_READ: Final = PORTION_RECORDS


@dataclass(frozen=True, kw_only=True)
class Lost:
    """What the online store lacks: a partition's log offsets `since` to `until`."""

    log: EventLog
    partition: int
    since: int
    until: int

    def portions(self, *, since: int, records: int) -> list[Portion]:
        """Of the partition up to `until`, oldest first."""
        return self.log.portions(
            since={self.partition: since},
            until={self.partition: self.until},
            partition=self.partition,
            records=records,
        )


def rebuild(
    settings: Settings, features: FeatureStore, lost: Lost, *, breathe: Callable[[], None]
) -> int:
    """Write online again whom, or what, the lost offsets are about; how many rows.

    Only for a partition that nobody else writes, its `until` where its reader goes on: what
    follows is then merged as if nothing had been lost. Rows are made of the whole log, whatever is
    online: a row that was stale may have been written since. The log is read in portions, newest
    first.

    `breathe` is called again and again, each time before something is written; what it raises ends
    this.
    """
    if lost.log.topic == ITEMS:
        return _rebuild_items(features, lost, breathe)
    if lost.since:  # they were deleted online, but are there again
        features.forget_users(_forgotten(settings, lost, breathe))
    return _rebuild_users(features, lost, breathe, limit=settings.history_events)


def _forgotten(settings: Settings, lost: Lost, breathe: Callable[[], None]) -> list[str]:
    """Who wished it between these log offsets, as far as Kafka still knows: the log no longer
    does once it is done."""
    where = TopicPartition(EVENTS, lost.partition)
    begin = kafka_offset(lost.since) if epoch_of(lost.since) == epoch_of(lost.until) else 0
    end = min(kafka_offset(lost.until), end_offsets(settings, EVENTS).get(lost.partition, 0))
    consumer = make_consumer(settings)
    try:
        consumer.assign([where])
        consumer.seek(where, max(begin, consumer.beginning_offsets([where])[where]))
        records = read_up_to(consumer, {where: end}, give_up_s=settings.kafka_timeout_s)
        wishes = []
        for record in records:
            breathe()
            if record.value is None:
                wishes.append(record)
    except KafkaError as error:
        raise UnavailableError(f"Kafka doesn't tell who is to be forgotten ({error})") from None
    finally:
        consumer.close()
    found = sort_out(EVENTS, wishes, base=0, now_ms=0, max_future_s=0.0)
    return [wish.user_id for wish in found.forgotten]


def _rebuild_users(
    features: FeatureStore, lost: Lost, breathe: Callable[[], None], *, limit: int
) -> int:
    news = []
    for part in lost.portions(since=lost.since, records=EVENTS_READ):
        breathe()
        news.append(pc.unique(lost.log.read_portion(part, columns=["user_id"])["user_id"]))
    users = pc.unique(pa.chunked_array(news, pa.string()))
    written: set[str] = set()
    for part in reversed(lost.portions(since=0, records=EVENTS_READ)):
        events = lost.log.read_portion(part, columns=EVENT_COLUMNS)
        events = events.filter(pc.is_in(events["user_id"], value_set=users))
        user_ids = pc.unique(events["user_id"]).to_pylist()
        for begin in range(0, len(user_ids), ROWS_AT_ONCE):
            some = user_ids[begin : begin + ROWS_AT_ONCE]
            newer = features.read_users([user_id for user_id in some if user_id in written])
            known = {row.user_id: row for row in newer}
            ever = [MAX_TIMESTAMP_MS + 1] * len(some)
            rows = [
                joined(row, known[row.user_id], limit=limit)
                if row.user_id in known
                else replace(row, partition=lost.partition, offset=lost.until - 1)
                for row in histories_as_of(events, some, ever, limit=limit)
                if row.item_ids
            ]
            breathe()
            features.write_users(rows)
            written.update(row.user_id for row in rows)
    return len(written)


def _rebuild_items(features: FeatureStore, lost: Lost, breathe: Callable[[], None]) -> int:
    written: set[str] = set()
    for part in reversed(lost.portions(since=lost.since, records=ITEMS_RECORDS)):
        items = lost.log.read_portion(part, columns=[*ITEM_FIELDS, "offset"])
        items = items.sort_by("offset")  # the last to arrive, as online
        ids = enumerate(items["item_id"].to_pylist())
        last = {item_id: row for row, item_id in ids if item_id not in written}
        latest = items.take(pa.array(last.values(), pa.int64())).select(ITEM_FIELDS)
        for batch in latest.to_batches(max_chunksize=ROWS_AT_ONCE):
            breathe()
            features.write_items(Item(**row) for row in batch.to_pylist())
        written |= last.keys()
    return len(written)
