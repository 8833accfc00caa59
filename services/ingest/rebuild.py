"""The online store from the offline log, for one that has lost what it had."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta

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
ITEM_FIELDS = ["item_id", "title", "categories", "text"]
ITEM_COLUMNS = [*ITEM_FIELDS, "arrival", "partition"]
RECENT_S = 60.0  # Redis keeps all but a second or two; what is written again does no harm


def rebuild(
    features: FeatureStore,
    log: EventLog,
    starts: Mapping[int, int],
    *,
    history_events: int,
    recent_only: bool,
) -> int:
    """Write online what the log says of these partitions before `starts`; how many rows.

    Only for partitions that nobody else writes, at the offsets where their reader goes on: what
    follows is then merged as if nothing had been lost. `recent_only`: rows whose newest record is
    among the last `RECENT_S` of its partition's.
    """
    columns = EVENT_COLUMNS if log.topic == EVENTS else ITEM_COLUMNS
    rows = log.read(until=starts, columns=columns)
    written = 0
    for partition, start in starts.items():
        mine = rows.filter(pc.equal(rows["partition"], pa.scalar(partition, pa.int32())))
        if recent_only and len(mine):
            since = pc.max(mine["arrival"]).as_py() - timedelta(seconds=RECENT_S)
            mine = mine.filter(pc.greater_equal(mine["arrival"], pa.scalar(since)))
        if log.topic == EVENTS:
            written += _write_users(
                features, rows, mine, history_events, partition=partition, start=start
            )
        else:
            latest = {row["item_id"]: row for row in mine.select(ITEM_FIELDS).to_pylist()}
            features.write_items(Item(**row) for row in latest.values())
            written += len(latest)
    return written


def _write_users(
    features: FeatureStore,
    events: pa.Table,
    mine: pa.Table,
    history_events: int,
    *,
    partition: int,
    start: int,
) -> int:
    user_ids = pc.unique(mine["user_id"]).to_pylist()
    until_ms = [MAX_TIMESTAMP_MS + 1] * len(user_ids)
    rows = histories_as_of(events, user_ids, until_ms, limit=history_events)
    rows = [replace(row, partition=partition, offset=start - 1) for row in rows if row.item_ids]
    features.write_users(rows)
    return len(rows)
