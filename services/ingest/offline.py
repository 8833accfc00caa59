"""Feature rows as Parquet for Feast's offline store. Pure.

Feast reads `<offline>/<view>/*.parquet`; columns are the view's features, in the types that
feature_repo declares. A row holds from just after its newest event (`event_timestamp`).
"""

from collections.abc import Sequence
from typing import Final

import pyarrow as pa

from services.core.history import ItemStats, UserHistory

_TIME = pa.timestamp("us", tz="UTC")
_VALID = [("event_timestamp", _TIME), ("created", _TIME)]
USER_HISTORY: Final = pa.schema(
    [
        ("user_id", pa.string()),
        ("item_ids", pa.list_(pa.string())),
        ("event_types", pa.list_(pa.string())),
        ("timestamps", pa.list_(pa.int64())),
        ("values", pa.list_(pa.float64())),
        ("event_keys", pa.list_(pa.int64())),
        ("n_events", pa.int64()),
        ("last_arrival_ms", pa.int64()),
        ("updated_ms", pa.int64()),
        ("partition", pa.int64()),
        ("offset", pa.int64()),
        *_VALID,
    ]
)
ITEM_STATS: Final = pa.schema(
    [
        ("item_id", pa.string()),
        ("title", pa.string()),
        ("categories", pa.list_(pa.string())),
        ("text", pa.string()),
        ("popularity_1d", pa.int64()),
        ("popularity_7d", pa.int64()),
        ("popularity_30d", pa.int64()),
        ("n_events", pa.int64()),
        *_VALID,
    ]
)


def user_history_table(rows: Sequence[UserHistory]) -> pa.Table:
    renamed = {"timestamps": "timestamps_ms"}
    columns = {
        name: [getattr(row, renamed.get(name, name)) for row in rows]
        for name in USER_HISTORY.names
        if name not in ("event_timestamp", "created")
    }
    valid_from_ms = [row.valid_from_ms for row in rows]
    return _table(USER_HISTORY, columns, valid_from_ms, [row.updated_ms for row in rows])


def item_stats_table(rows: Sequence[ItemStats], *, valid_from_ms: int, now_ms: int) -> pa.Table:
    columns = {
        name: [getattr(row, name) for row in rows]
        for name in ITEM_STATS.names
        if name not in ("event_timestamp", "created")
    }
    return _table(ITEM_STATS, columns, [valid_from_ms] * len(rows), [now_ms] * len(rows))


def _table(
    schema: pa.Schema, columns: dict[str, list[object]], valid_ms: list[int], created_ms: list[int]
) -> pa.Table:
    arrays = [pa.array(values, schema.field(name).type) for name, values in columns.items()]
    milliseconds = pa.timestamp("ms", tz="UTC")
    arrays += [pa.array(times, milliseconds).cast(_TIME) for times in (valid_ms, created_ms)]
    return pa.table(arrays, schema=schema)
