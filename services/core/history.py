"""What is known of users and items, how events change it, and what it was at any time. Pure."""

import hashlib
import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from services.core.eventlog import Arrived
from services.core.events import INTERACTIONS, Event


@dataclass(frozen=True, kw_only=True)
class UserHistory:
    """A user's latest interactions, oldest first, by (event time, arrival).

    The five tuples run in parallel; a value of NaN is none. `partition` and `offset` (a log
    offset) are those of the last event applied: what a replay skips.
    """

    user_id: str
    item_ids: tuple[str, ...] = ()
    event_types: tuple[str, ...] = ()
    timestamps_ms: tuple[int, ...] = ()
    values: tuple[float, ...] = ()
    event_keys: tuple[int, ...] = ()
    n_events: int = 0
    last_arrival_ms: int = 0
    updated_ms: int = 0
    partition: int = -1
    offset: int = -1

    @property
    def valid_from_ms(self) -> int:
        """Just after the newest event, so that features as of an event don't contain it."""
        return self.timestamps_ms[-1] + 1 if self.timestamps_ms else 0


@dataclass(frozen=True, kw_only=True)
class Popularity:
    """Interactions with one item, in windows of event time that end at the log's newest event.

    In whole hours: a day is the newest event's hour and the 23 before it.
    """

    item_id: str
    popularity_1d: int
    popularity_7d: int
    popularity_30d: int
    n_events: int


@dataclass(frozen=True, kw_only=True)
class ItemStats:
    """What the item view knows: metadata where some was sent, and popularity."""

    item_id: str
    title: str | None = None
    categories: tuple[str, ...] = ()
    text: str | None = None
    popularity_1d: int = 0
    popularity_7d: int = 0
    popularity_30d: int = 0
    n_events: int = 0


def event_key(event_id: str) -> int:
    """A signed 64-bit hash, by which histories know the events that they hold."""
    digest = hashlib.blake2b(event_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def merge(
    history: UserHistory, events: Iterable[Arrived[Event]], *, limit: int, now_ms: int
) -> tuple[UserHistory, int]:
    """Apply one user's events, in the order of arrival; return the history and the duplicates.

    The result depends on the events alone, not on how they were cut into batches: a replayed
    offset is skipped, an event_id that the window holds counts once, a late event takes its
    place by event time, and the `limit` latest stay.
    """
    items, kinds = list(history.item_ids), list(history.event_types)
    times, values = list(history.timestamps_ms), list(history.values)
    keys = list(history.event_keys)
    columns: tuple[list[Any], ...] = (items, kinds, times, values, keys)
    held = set(keys)
    partition, offset = history.partition, history.offset
    n_events, last_arrival_ms, duplicates = history.n_events, history.last_arrival_ms, 0
    for arrived in events:
        if arrived.partition == partition and arrived.offset <= offset:
            continue
        partition, offset = arrived.partition, arrived.offset
        event = arrived.record
        if not event.is_interaction:
            continue
        key = event_key(event.event_id)
        if key in held:
            duplicates += 1
            continue
        value = math.nan if event.value is None else event.value
        cells = (event.item_id, event.type.value, event.timestamp, value, key)
        at = bisect_right(times, event.timestamp)
        for column, cell in zip(columns, cells, strict=True):
            column.insert(at, cell)
        held.add(key)
        if len(keys) > limit:
            held.discard(keys[0])
            for column in columns:
                del column[0]
        n_events += 1
        last_arrival_ms = max(last_arrival_ms, arrived.arrival_ms)
    merged = replace(
        history,
        item_ids=tuple(items),
        event_types=tuple(kinds),
        timestamps_ms=tuple(times),
        values=tuple(values),
        event_keys=tuple(keys),
        n_events=n_events,
        last_arrival_ms=last_arrival_ms,
        updated_ms=now_ms,
        partition=partition,
        offset=offset,
    )
    return merged, duplicates


def joined(older: UserHistory, newer: UserHistory, *, limit: int) -> UserHistory:
    """One user's history from two, of events that arrived before and after some moment.

    As if made of all events at once; an event in both windows counts once.
    """

    def events(history: UserHistory) -> list[tuple[Any, ...]]:
        columns = (history.item_ids, history.event_types, history.timestamps_ms, history.values)
        return list(zip(history.event_keys, *columns, strict=True))

    held = set(older.event_keys)
    news = [event for event in events(newer) if event[0] not in held]
    rows = sorted(events(older) + news, key=lambda event: event[3])[-limit:]
    keys, items, kinds, times, values = zip(*rows, strict=True) if rows else ((),) * 5
    return replace(
        newer,
        item_ids=items,
        event_types=kinds,
        timestamps_ms=times,
        values=values,
        event_keys=keys,
        n_events=older.n_events + newer.n_events - (len(newer.event_keys) - len(news)),
        last_arrival_ms=max(older.last_arrival_ms, newer.last_arrival_ms),
    )


def histories_as_of(
    events: pa.Table, user_ids: Sequence[str], timestamps_ms: Sequence[int], *, limit: int
) -> list[UserHistory]:
    """For each (user, time) the history of the events strictly before that time.

    `events` as `EventLog.read` gives them. Exact whatever arrived late; such a history has no
    `partition`, `offset` and `updated_ms`, since it was never written.
    """
    wanted = pa.array(sorted(set(user_ids)), pa.string())
    chosen = pc.and_(
        pc.is_in(events["user_id"], value_set=wanted),
        pc.is_in(events["type"], value_set=pa.array(INTERACTIONS)),
    )
    events = events.filter(chosen)
    user_rows = pc.index_in(events["user_id"], value_set=wanted).to_numpy()
    by_user = np.argsort(user_rows, kind="stable")
    events, user_rows = events.take(pa.array(by_user)), user_rows[by_user]
    times = milliseconds(events["timestamp"])
    arrivals = milliseconds(events["arrival"])
    row_of = {user_id: row for row, user_id in enumerate(wanted.to_pylist())}

    histories = []
    for user_id, before_ms in zip(user_ids, timestamps_ms, strict=True):
        first, last = np.searchsorted(user_rows, (row_of[user_id], row_of[user_id] + 1))
        end = first + int(np.searchsorted(times[first:last], before_ms))
        begin = max(first, end - limit)
        window = events.slice(begin, end - begin)
        value = window["value"].to_numpy()  # null reads as NaN
        histories.append(
            UserHistory(
                user_id=user_id,
                item_ids=tuple(window["item_id"].to_pylist()),
                event_types=tuple(window["type"].to_pylist()),
                timestamps_ms=tuple(times[begin:end].tolist()),
                values=tuple(value.tolist()),
                event_keys=tuple(map(event_key, window["event_id"].to_pylist())),
                n_events=int(end - first),
                last_arrival_ms=int(arrivals[first:end].max(initial=0)),
            )
        )
    return histories


def milliseconds(times: pa.ChunkedArray) -> NDArray[np.int64]:
    """A column of a log's timestamps as UTC milliseconds."""
    return times.cast(pa.timestamp("ms", tz="UTC")).cast(pa.int64()).to_numpy()
