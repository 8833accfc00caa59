"""Feature rows as Feast's protobufs and as offline tables, and back.

Imports Feast, which takes seconds: only `features.FeatureStore` imports this module.
"""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Final, TypeAlias

from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import DoubleList, Int64List, StringList, Value

from services.core.events import Item
from services.core.history import Popularity, UserHistory

Row: TypeAlias = tuple[EntityKey, dict[str, Value], datetime, datetime | None]

_NUMBERS: Final = ("n_events", "last_arrival_ms", "updated_ms", "partition", "offset")


def key(name: str, value: str) -> EntityKey:
    return EntityKey(join_keys=[name], entity_values=[Value(string_val=value)])


def row(entity: EntityKey, features: dict[str, Value], timestamp_ms: int) -> Row:
    return entity, features, datetime.fromtimestamp(timestamp_ms / 1000, UTC), None


def strings(values: Iterable[str]) -> Value:
    return Value(string_list_val=StringList(val=values))


def string(value: str | None) -> Value:
    return Value() if value is None else Value(string_val=value)


def integer(value: int) -> Value:
    return Value(int64_val=value)


def user_features(history: UserHistory) -> dict[str, Value]:
    return {
        "item_ids": strings(history.item_ids),
        "event_types": strings(history.event_types),
        "timestamps": Value(int64_list_val=Int64List(val=history.timestamps_ms)),
        "values": Value(double_list_val=DoubleList(val=history.values)),
        "event_keys": Value(int64_list_val=Int64List(val=history.event_keys)),
        "n_events": integer(history.n_events),
        "last_arrival_ms": integer(history.last_arrival_ms),
        "updated_ms": integer(history.updated_ms),
        "partition": integer(history.partition),
        "offset": integer(history.offset),
    }


def user_history(user_id: str, features: Mapping[str, Value] | None) -> UserHistory:
    if features is None or not features["n_events"].HasField("int64_val"):
        return UserHistory(user_id=user_id)
    return UserHistory(
        user_id=user_id,
        item_ids=tuple(features["item_ids"].string_list_val.val),
        event_types=tuple(features["event_types"].string_list_val.val),
        timestamps_ms=tuple(features["timestamps"].int64_list_val.val),
        values=tuple(features["values"].double_list_val.val),
        event_keys=tuple(features["event_keys"].int64_list_val.val),
        **{name: features[name].int64_val for name in _NUMBERS},
    )


def stored_history(user_id: str, stored: Mapping[str, bytes | None]) -> UserHistory:
    """The history of a row as Redis holds it: a serialized `Value` by feature."""
    if stored["n_events"] is None:
        return UserHistory(user_id=user_id)
    features = {name: Value.FromString(value or b"") for name, value in stored.items()}
    return user_history(user_id, features)


def peeked_history(user_id: str, stored: Mapping[str, bytes | None]) -> UserHistory:
    """The same, its columns packed strings and arrays: to be read, not compared.

    ValueError for a row that is none of ours.
    """
    from services.core import wire  # a compiler, which who writes has no use for

    if stored["n_events"] is None:
        return UserHistory(user_id=user_id)
    columns: dict[str, Any] = {
        "item_ids": wire.strings(stored["item_ids"] or b""),
        "event_types": wire.strings(stored["event_types"] or b""),
        "timestamps_ms": wire.integers(stored["timestamps"] or b""),
        "values": wire.doubles(stored["values"] or b""),
        "event_keys": wire.integers(stored["event_keys"] or b""),
    }
    if len(set(map(len, columns.values()))) > 1:
        raise ValueError(f"columns of {', '.join(str(len(c)) for c in columns.values())} events")
    numbers = {name: Value.FromString(stored[name] or b"").int64_val for name in _NUMBERS}
    return UserHistory(user_id=user_id, **columns, **numbers)


def item_metadata(item: Item) -> dict[str, Value]:
    return {
        "title": string(item.title),
        "categories": strings(item.categories),
        "text": string(item.text),
    }


def item_popularity(popularity: Popularity) -> dict[str, Value]:
    counts = ("popularity_1d", "popularity_7d", "popularity_30d", "n_events")
    return {name: integer(getattr(popularity, name)) for name in counts}


def item_features(features: Mapping[str, Value] | None) -> dict[str, Any]:
    """Keyword arguments of `ItemStats`, of what is there."""
    found = features or {}
    given: dict[str, Any] = {}
    for name, value in found.items():
        kind = value.WhichOneof("val")
        if kind == "string_list_val":
            given[name] = tuple(value.string_list_val.val)
        elif kind is not None:
            given[name] = getattr(value, kind)
    return given
