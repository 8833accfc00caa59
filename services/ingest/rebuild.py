"""The online store from the offline log, for one that has lost what it had."""

from collections.abc import Mapping
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc

from services.core.eventlog import EventLog
from services.core.events import EVENTS, MAX_TIMESTAMP_MS, Item
from services.core.features import FeatureStore
from services.core.history import histories_as_of

EVENT_COLUMNS = [
    *("event_id", "user_id", "item_id", "type", "timestamp", "value"),
    *("arrival", "partition", "offset"),
]
ITEM_COLUMNS = ["item_id", "title", "categories", "text"]


def rebuild(
    features: FeatureStore, log: EventLog, starts: Mapping[int, int], *, history_events: int
) -> int:
    """Write online what the log says of these partitions before `starts`; how many rows.

    Only for partitions that nobody else writes, at the offsets where their reader goes on: what
    follows is then merged as if nothing had been lost.
    """
    if log.topic == EVENTS:
        return _rebuild_users(features, log, starts, history_events=history_events)
    elsewhere = dict.fromkeys(log.end().keys() - starts.keys(), 0)
    rows = log.read(until={**elsewhere, **starts}, columns=ITEM_COLUMNS).to_pylist()
    latest = {row["item_id"]: Item(**row) for row in rows}
    features.write_items(latest.values())
    return len(latest)


def _rebuild_users(
    features: FeatureStore, log: EventLog, starts: Mapping[int, int], *, history_events: int
) -> int:
    events = log.read(until=starts, columns=EVENT_COLUMNS)
    written = 0
    for partition, start in starts.items():
        mine = events.filter(pc.equal(events["partition"], pa.scalar(partition, pa.int32())))
        user_ids = pc.unique(mine["user_id"]).to_pylist()
        until_ms = [MAX_TIMESTAMP_MS + 1] * len(user_ids)
        rows = histories_as_of(events, user_ids, until_ms, limit=history_events)
        features.write_users(
            [replace(row, partition=partition, offset=start - 1) for row in rows if row.item_ids]
        )
        written += len(rows)
    return written
