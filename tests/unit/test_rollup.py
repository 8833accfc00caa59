"""Popularity, counted as the log grows."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.core.errors import UnavailableError
from services.core.eventlog import Arrived, EventLog, events_table, items_table
from services.core.events import ITEMS, Event, EventType, Item
from services.core.history import Popularity
from services.core.settings import Settings
from services.ingest.rollup import COUNTS, HOUR_US, WINDOWS_H, RollUp, counted, popularity

MONTH_H = max(WINDOWS_H.values())
interactions = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3 * MONTH_H * 60)))


def table(events: list[tuple[str, int]]) -> pa.Table:
    """Interactions with an item at a minute."""
    times = pa.array([minute * HOUR_US // 60 for _, minute in events], pa.int64())
    return pa.table(
        {
            "item_id": pa.array([item for item, _ in events], pa.string()),
            "timestamp": times.cast(pa.timestamp("us", tz="UTC")),
        }
    )


@given(st.lists(interactions, max_size=4))
def test_however_it_grows_every_window_counts_the_same_and_little_is_kept(
    parts: list[list[tuple[str, int]]],
) -> None:
    counts = COUNTS.empty_table()
    for part in parts:
        counts = counted(counts, table(part))
    hours = [(item, minute // 60) for part in parts for item, minute in part]
    newest = max((hour for _, hour in hours), default=0)
    expected = {
        item: {
            name: [i for i, h in hours if h > newest - w].count(item)
            for name, w in WINDOWS_H.items()
        }
        | {"n_events": [i for i, _ in hours].count(item)}
        for item in {item for item, _ in hours}
    }
    found = {row.item_id: row for row in popularity(counts)}
    assert {
        item: {name: getattr(row, name) for name in expected[item]} for item, row in found.items()
    } == expected
    assert len(counts) == len({(item, max(hour, newest - MONTH_H)) for item, hour in hours})


class Online:
    """Counts online; `down`: no write succeeds."""

    def __init__(self) -> None:
        self.n_events: dict[str, int] = {}
        self.down = False

    def write_popularity(self, rows: Iterable[Popularity]) -> None:
        if self.down:
            raise UnavailableError("down")
        self.n_events |= {row.item_id: row.n_events for row in rows}


def test_a_pass_that_fails_counts_nothing_twice_and_many_passes_leave_few_files(
    settings: Settings,
) -> None:
    log, online = EventLog(settings.offline), Online()
    roll_up = RollUp(settings, cast(Any, online))
    for n in range(40):
        happened = Event(
            event_id=str(n), user_id="u", item_id="a", type=EventType.VIEW, timestamp=n
        )
        log.append(events_table([Arrived(record=happened, arrival_ms=n, partition=0, offset=n)]))
        online.down = n == 20
        if online.down:
            with pytest.raises(UnavailableError):
                roll_up.run()
        else:
            roll_up.run()
            roll_up.compact()
    assert online.n_events == {"a": 40}
    files = list(Path(settings.offline, "item_stats").glob("*.parquet"))
    assert len(files) < 20
    told = {n for file in files for n in pq.read_table(file)["n_events"].to_pylist()}
    assert told == set(range(1, 41)) - {21}


def test_an_items_metadata_is_the_latest_however_it_arrives(settings: Settings) -> None:
    log, roll_up = EventLog(settings.offline, ITEMS), RollUp(settings, cast(Any, Online()))
    versions = [("first", 10), ("newer", 20), ("late", 15), ("of the same time", 20)]
    for offset, (title, at_ms) in enumerate(versions):
        item = Item(item_id="a", title=title, timestamp=at_ms)
        log.append(items_table([Arrived(record=item, arrival_ms=0, partition=0, offset=offset)]))
        roll_up.run()
    files = sorted(Path(settings.offline, "item_stats").glob("*.parquet"))
    told = [title for file in files for title in pq.read_table(file)["title"].to_pylist()]
    assert told == ["first", "newer", "of the same time"]
