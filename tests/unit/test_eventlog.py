"""The offline log, whatever crashed, overlapped or was compacted."""

import re
import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from services.core import spans as span_files
from services.core.errors import DamagedFileError
from services.core.eventlog import (
    EPOCH_SPAN,
    Arrived,
    EventLog,
    epoch_of,
    events_table,
    kafka_offset,
    records_between,
)
from services.core.events import Event, EventType
from services.core.forgetting import Forgotten, Tombstone
from services.core.spans import KEYS, Span, SpanFiles

PARTITIONS = 2


def arrived(offset: int, *, partition: int = 0, event_id: str = "") -> Arrived[Event]:
    event = Event(
        event_id=event_id or f"{partition}/{offset}",
        user_id=f"user {partition}",
        item_id="an item",
        type=EventType.CLICK,
        timestamp=1_000 + (offset * 7_919) % 100,  # not in the order of arrival, with ties
        context={"a": [1, "b"]} if offset % 2 else None,
    )
    return Arrived(record=event, arrival_ms=10**12, partition=partition, offset=offset)


def append(log: EventLog, partition: int, first: int, last: int) -> None:
    """What a worker writes: the rows of a span, of which every fifth record was poison."""
    rows = [arrived(n, partition=partition) for n in range(first, last + 1) if n % 5]
    log.append(events_table(rows), Span(partition=partition, first=first, last=last))


def keys(table: pa.Table) -> list[tuple[int, int]]:
    return list(zip(table["partition"].to_pylist(), table["offset"].to_pylist(), strict=True))


def expected(ends: dict[int, int]) -> list[tuple[int, int]]:
    rows = [arrived(n, partition=p) for p, end in ends.items() for n in range(end) if n % 5]
    rows.sort(key=lambda row: (row.record.timestamp, row.partition, row.offset))
    return [(row.partition, row.offset) for row in rows]


@given(
    partition_spans=st.lists(
        st.lists(st.tuples(st.integers(0, 30), st.integers(1, 40)), max_size=6),
        min_size=PARTITIONS,
        max_size=PARTITIONS,
    ),
    compact_after=st.sets(st.integers(0, 6)),
)
@hypothesis_settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_replayed_and_overlapping_spans_read_as_if_written_once(
    tmp_path: Path,
    partition_spans: Sequence[Sequence[tuple[int, int]]],
    compact_after: set[int],
) -> None:
    log = EventLog(str(tmp_path / f"{time.monotonic_ns()}"))
    ends: dict[int, int] = {}
    for partition, spans in enumerate(partition_spans):
        for number, (back, length) in enumerate(spans):
            end = ends.get(partition, 0)
            first = max(0, end - back)  # a replay with other boundaries
            append(log, partition, first, first + length - 1)
            ends[partition] = max(end, first + length)
            if number in compact_after:
                log.compact()
    assert log.end() == ends
    assert keys(log.read()) == expected(ends)
    since, until = dict.fromkeys(ends, 7), dict.fromkeys(ends, 23)
    part = [key for key in expected(ends) if 7 <= key[1] < 23]
    assert keys(log.read(since=since, until=until)) == part
    assert log.count() == sum(ends.values())
    assert log.count(since=since) == sum(max(end - 7, 0) for end in ends.values())
    for _ in range(2):
        log.compact()
        assert keys(log.read()) == expected(ends)
        assert log.end() == ends


def test_a_portion_is_of_its_partitions_alone(tmp_path: Path) -> None:
    log = EventLog(str(tmp_path))
    append(log, 0, 0, 9)
    append(log, 1, 0, 9)
    [whole] = log.portions(until=log.end())
    [one] = log.portions(until={1: 5}, partition=1)
    append(log, 0, 10, 19)
    append(log, 2, 0, 9)  # it has begun since
    assert keys(log.read_portion(whole)) == expected({0: 10, 1: 10})
    assert keys(log.read_portion(one)) == [key for key in expected({1: 5}) if key[0] == 1]


def test_records_between_positions_of_two_topics_are_those_of_the_new_one() -> None:
    assert records_between({0: 5, 1: 7}, {0: 9, 1: 7, 2: 30}) == 4
    assert records_between({0: 5}, {0: EPOCH_SPAN + 3}) == 3
    assert records_between({0: EPOCH_SPAN + 3}, {0: 5}) == 0


def test_columns_and_values_come_back(tmp_path: Path) -> None:
    log = EventLog(str(tmp_path))
    log.append(events_table([arrived(1)]))
    assert log.read().to_pylist()[0]["context"] == '{"a":[1,"b"]}'
    assert log.read().schema == log.schema
    assert log.read(columns=["user_id", "offset"]).to_pylist() == [
        {"user_id": "user 0", "offset": 1}
    ]
    assert len(EventLog(str(tmp_path / "empty")).read()) == 0
    with pytest.raises(ValueError, match="span"):
        log.append(log.schema.empty_table())


def test_an_event_id_counts_once_and_the_first_wins(tmp_path: Path) -> None:
    log = EventLog(str(tmp_path))
    log.append(events_table([arrived(n, event_id=f"id {n % 3}") for n in range(8)]))
    log.append(events_table([arrived(n, event_id="id 1") for n in range(8, 9)]))
    assert sorted(log.read()["offset"].to_pylist()) == [0, 1, 2]


def test_a_crash_between_write_and_move_leaves_nothing_to_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = EventLog(str(tmp_path))
    append(log, 0, 0, 9)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as crash, pytest.raises(KeyboardInterrupt):
        crash.setattr(span_files, "settle", die)
        append(log, 0, 10, 19)
    assert len(list((tmp_path / "events").iterdir())) == 1  # half a file would fill a full disk
    (tmp_path / "events" / ".0123").touch()  # what a process leaves that had no time to tidy up
    assert log.end() == {0: 10}
    assert keys(log.read()) == expected({0: 10})
    append(log, 0, 10, 24)
    assert log.end() == {0: 25}
    assert keys(log.read()) == expected({0: 25})


def test_whatever_byte_changes_nobody_reads_it_as_data(tmp_path: Path) -> None:
    log = EventLog(str(tmp_path))
    append(log, 0, 0, 199)
    whole = log.read()
    (path,) = (tmp_path / "events").iterdir()
    assert pq.read_table(path).num_rows == len(whole)  # a Parquet file for everybody else, too
    written = path.read_bytes()
    n_bytes = len(written)
    damaged = [written[:cut] for cut in (0, 3, 11, n_bytes // 2, n_bytes - 1)]
    for at in [*range(0, n_bytes, 13), *range(n_bytes - 24, n_bytes)]:
        flipped = written[at] ^ 1 << at % 8
        damaged.append(written[:at] + bytes([flipped]) + written[at + 1 :])
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(DamagedFileError, match=re.escape(str(path))):
            log.read(since={0: 50})
    path.write_bytes(written)
    assert log.read().equals(whole)


def test_compaction_leaves_few_files_and_time_to_read_the_old_ones(tmp_path: Path) -> None:
    log = EventLog(str(tmp_path))
    for n in range(64):
        append(log, 0, n * 10, n * 10 + 9)
    files = SpanFiles(str(tmp_path), "events", prefix="events", schema=log.schema)
    assert log.compact() == 0  # merged, but the parts are still there
    assert len(files.spans()) > 64
    assert log.compact() > 60
    assert len(files.spans()) < 4
    assert keys(log.read()) == expected({0: 640})


def test_no_merged_file_is_larger_than_its_kind_may_be(tmp_path: Path) -> None:
    log = EventLog(str(tmp_path))
    for n in range(64):
        append(log, 0, n * 10, n * 10 + 9)
    files = SpanFiles(
        str(tmp_path), "events", prefix="events", schema=log.schema, merged_offsets=100
    )
    for _ in range(4):
        files.compact()
    sizes = [span.last - span.first + 1 for span in files.spans()]
    assert len(sizes) < 16
    assert max(sizes) <= 100
    assert keys(log.read()) == expected({0: 640})


def test_a_topic_created_anew_begins_an_epoch(tmp_path: Path) -> None:
    log = EventLog(str(tmp_path))
    assert log.epoch("first") == 0
    append(log, 0, 0, 9)
    again = EventLog(str(tmp_path))
    assert [again.epoch(name) for name in ("first", "second", "first", "second")] == [0, 1, 0, 1]
    assert again.end() == {0: EPOCH_SPAN}
    assert (epoch_of(EPOCH_SPAN + 3), kafka_offset(EPOCH_SPAN + 3)) == (1, 3)
    log.append(
        events_table([arrived(EPOCH_SPAN + 1)]),
        Span(partition=0, first=EPOCH_SPAN, last=EPOCH_SPAN + 1),
    )
    assert again.end() == {0: EPOCH_SPAN + 2}
    assert len(again.read()) == 9
    assert again.read(since={0: EPOCH_SPAN})["offset"].to_pylist() == [EPOCH_SPAN + 1]


def test_half_a_million_events_read_in_seconds(tmp_path: Path) -> None:
    n, per_file = 500_000, 20_000
    log = EventLog(str(tmp_path))
    names = [f"{i:08d}" for i in range(n)]
    base = pa.table(
        {
            "event_id": names,
            "user_id": [name[4:] for name in names],
            "item_id": [name[5:] for name in names],
            "type": ["rating"] * n,
            "timestamp": pa.array(range(0, n * 1_000, 1_000), pa.timestamp("us", "UTC")),
            "value": [1.0] * n,
            "context": pa.nulls(n, pa.string()),
            "arrival": pa.array([0] * n, pa.timestamp("us", "UTC")),
            "partition": pa.array([0] * n, pa.int32()),
            "offset": pa.array(range(n), pa.int64()),
        }
    )
    for first in range(0, n, per_file):
        log.append(base.slice(first, per_file))
    started = time.process_time()
    assert len(log.read()) == n
    assert time.process_time() - started < 5.0  # about a second


def test_a_damaged_file_keeps_no_forgotten_user_in_the_others(tmp_path: Path) -> None:
    log = EventLog(str(tmp_path))
    for first in (0, 10, 20):
        append(log, 0, first, first + 9)
    damaged, intact, newest = sorted((tmp_path / "events").iterdir())
    written = damaged.read_bytes()
    damaged.write_bytes(written[:-1])
    log.forget(Tombstone(user_id="user 0", partition=0, offset=20))
    with pytest.raises(DamagedFileError):
        log.purge()
    assert [pq.read_table(path).num_rows for path in (intact, newest)] == [0, 8]
    assert log.wishes() == 1
    damaged.write_bytes(written)  # put back from a copy
    assert (log.purge(), log.wishes()) == (8, 0)


def test_any_number_of_users_may_wish_to_be_forgotten_at_once() -> None:
    wishes = [Tombstone(user_id=f"user {n}", partition=0, offset=9) for n in range(30_000)]
    moved = Tombstone(user_id="user 2", partition=1, offset=9)  # their number of partitions grew
    rows = [("user 1", 0, 8), ("user 1", 0, 10), ("user 1", 1, 10), ("user 2", 1, 10), ("x", 0, 8)]
    table = pa.table(dict(zip(KEYS, zip(*rows, strict=True), strict=True)))
    gone = Forgotten([*wishes, moved]).among(table)
    assert gone.to_pylist() == [True, False, True, True, False]
