"""The offline log: every event and item in Parquet, in files named by what they cover.

    <root>/events/events-00003-000000000040000-000000000059999.parquet
                         partition    first         last offset, both inclusive

A file appears whole or not at all, and the same range written twice is the same file: at-least-once
delivery from Kafka becomes exactly-once here. The log, not the consumer group, says how far ingest
has come, and what learners resume from.

An offset in the log is a Kafka offset plus `EPOCH_SPAN` for each time that the topic was created
anew (a broker that lost its log, a topic deleted by hand). Positions thus only ever grow, and on a
Kafka that keeps its topic they are plain Kafka offsets.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from services.core.errors import DamagedFileError
from services.core.events import EVENTS, ITEMS, Event, Item
from services.core.forgetting import Forgotten, Tombstone, Tombstones
from services.core.spans import MERGED_OFFSETS, Span, SpanFiles, settle

EPOCH_SPAN: Final = 10**12  # offsets one incarnation of a topic may use
PORTION_RECORDS: Final = 1_000_000  # held at a time by who reads a long log: some 300 MB
ITEMS_RECORDS: Final = 50_000  # the same of items, and in one of their files: texts may be long

_TIME = pa.timestamp("us", tz="UTC")
_WHERE = [("arrival", _TIME), ("partition", pa.int32()), ("offset", pa.int64())]
SCHEMAS: Final = {
    EVENTS: pa.schema(
        [
            *((name, pa.string()) for name in ("event_id", "user_id", "item_id", "type")),
            ("timestamp", _TIME),
            ("value", pa.float64()),
            ("context", pa.string()),  # JSON
            *_WHERE,
        ]
    ),
    ITEMS: pa.schema(
        [
            ("item_id", pa.string()),
            ("title", pa.string()),
            ("categories", pa.list_(pa.string())),
            ("text", pa.string()),
            ("vector", pa.list_(pa.float32())),
            ("timestamp", _TIME),
            *_WHERE,
        ]
    ),
}


def epoch_of(offset: int) -> int:
    """Which incarnation of the topic a log offset belongs to."""
    return offset // EPOCH_SPAN


def kafka_offset(offset: int) -> int:
    """Where a log offset stands in Kafka."""
    return offset % EPOCH_SPAN


def records_between(since: Mapping[int, int], until: Mapping[int, int]) -> int:
    """Records from one position in the log to another, of the partitions that both know.

    Where the topic was created anew between them, those of the new one: how many the old one had
    left, only the log knows (`EventLog.count`).
    """
    return sum(
        max(0, end - max(since.get(partition, end), epoch_of(end) * EPOCH_SPAN))
        for partition, end in until.items()
    )


Record = TypeVar("Record", Event, Item)


@dataclass(frozen=True, kw_only=True)
class Arrived(Generic[Record]):
    """A valid record and where and when it arrived; `offset` is a log offset."""

    record: Record
    arrival_ms: int
    partition: int
    offset: int


@dataclass(frozen=True, kw_only=True)
class Portion:
    """A part of the log: of each of its partitions, the offsets `since` to `until`."""

    since: Mapping[int, int]
    until: Mapping[int, int]


def events_table(events: Sequence[Arrived[Event]]) -> pa.Table:
    """Rows of the events log, in the given order."""
    records = [arrived.record for arrived in events]
    return _table(
        EVENTS,
        events,
        event_id=[e.event_id for e in records],
        user_id=[e.user_id for e in records],
        item_id=[e.item_id for e in records],
        type=[e.type.value for e in records],
        value=[e.value for e in records],
        context=[None if e.context is None else orjson.dumps(e.context).decode() for e in records],
    )


def items_table(items: Sequence[Arrived[Item]]) -> pa.Table:
    """Rows of the items log, in the given order."""
    records = [arrived.record for arrived in items]
    return _table(
        ITEMS,
        items,
        item_id=[i.item_id for i in records],
        title=[i.title for i in records],
        categories=[i.categories for i in records],
        text=[i.text for i in records],
        vector=[i.vector for i in records],
    )


class EventLog:
    """One topic's log under `root` (a path, or any URI that pyarrow.fs reads)."""

    def __init__(self, root: str, topic: str = EVENTS) -> None:
        if topic not in SCHEMAS:
            raise ValueError(f"topic={topic!r}: the log holds {' and '.join(SCHEMAS)}")
        self.topic = topic
        self.schema: pa.Schema = SCHEMAS[topic]
        merged = MERGED_OFFSETS if topic == EVENTS else ITEMS_RECORDS
        self._files = SpanFiles(
            root, topic, prefix=topic, schema=self.schema, merged_offsets=merged
        )
        self._key = "event_id" if topic == EVENTS else None
        self._tombstones = Tombstones(root) if topic == EVENTS else None

    def epoch(self, topic_id: str) -> int:
        """The number of this incarnation of the topic, given the id that Kafka gave it.

        The first one asked for is 0. An id not seen before begins the next epoch, for every
        process that shares this log; asking again changes nothing.
        """
        known = self._epochs()
        if topic_id not in known:
            known[topic_id] = len(known)
            fs, path = self._files.fs, self._files.path
            fs.create_dir(path, recursive=True)
            with fs.open_output_stream(f"{path}/epoch-{known[topic_id]:03d}-{topic_id}"):
                pass  # the name says it all
            settle(fs, path)
        return known[topic_id]

    def append(self, table: pa.Table, span: Span | None = None) -> None:
        """Add one partition's rows, which cover `span` (default: from their first to last offset).

        A span may be wider than its rows, down to none: poison records leave no row. Readers see
        the whole file or none; the same span again changes nothing.
        """
        if span is None:
            offsets = table["offset"].to_numpy()
            if len(offsets) == 0:
                raise ValueError("an empty table needs a span")
            partition = int(table["partition"][0].as_py())
            span = Span(partition=partition, first=int(offsets.min()), last=int(offsets.max()))
        self._files.write(table.select(self.schema.names), span)

    def end(self) -> dict[int, int]:
        """Per partition the next offset that is not in the log; partitions never seen are absent.

        At the start of a new epoch this is that epoch's first offset.
        """
        first = max(0, len(self._epochs()) - 1) * EPOCH_SPAN
        ends: dict[int, int] = {}
        for span in self._files.spans():
            ends[span.partition] = max(ends.get(span.partition, first), span.last + 1)
        return ends

    def count(self, *, since: Mapping[int, int] | None = None) -> int:
        """How many offsets the log holds from `since` on: its length in records, not bytes read."""
        total = 0
        at = dict(since or {})
        for span in self._files.spans():  # by partition and first offset, overlaps possible
            first = max(at.get(span.partition, 0), span.first)
            total += max(0, span.last + 1 - first)
            at[span.partition] = max(first, span.last + 1)
        return total

    def portions(
        self,
        *,
        since: Mapping[int, int] | None = None,
        until: Mapping[int, int],
        partition: int | None = None,
        records: int = PORTION_RECORDS,
    ) -> list[Portion]:
        """The log from `since` up to `until` (a partition missing: all of it), or one `partition`
        of it, cut between files into portions of at most `records` offsets, or of one file."""
        until = {**self.end(), **until}
        cuts: list[list[Span]] = []
        size, at = 0, dict(since or {})
        for span in self._files.spans():  # by partition and first offset, overlaps possible
            first = max(at.get(span.partition, 0), span.first)
            last = min(span.last, until.get(span.partition, 0) - 1)  # a new one is left out
            if first > last or partition not in (None, span.partition):
                continue
            size += last - first + 1
            if not cuts or size > records:
                cuts.append([])
                size = last - first + 1
            cuts[-1].append(Span(partition=span.partition, first=first, last=last))
            at[span.partition] = last + 1
        return [
            Portion(
                since={span.partition: span.first for span in reversed(cut)},
                until={span.partition: span.last + 1 for span in cut},
            )
            for cut in cuts
        ]

    def read(
        self,
        *,
        since: Mapping[int, int] | None = None,
        until: Mapping[int, int] | None = None,
        columns: Sequence[str] | None = None,
    ) -> pa.Table:
        """Rows with `since[p] <= offset < until[p]`, sorted by (timestamp, partition, offset).

        A partition missing from `since` is read from its start, one missing from `until` to its
        end. Each offset counts once, and so does each event_id within what is read (the one with
        the lowest partition and offset wins). Measured: 500k events in 1 s.
        """
        return self._read(since or {}, until or {}, columns, partitions=None)

    def read_portion(self, portion: Portion, *, columns: Sequence[str] | None = None) -> pa.Table:
        """The same of a portion: nothing of a partition that has begun since it was cut."""
        return self._read(portion.since, portion.until, columns, partitions=portion.until.keys())

    def _read(
        self,
        since: Mapping[int, int],
        until: Mapping[int, int],
        columns: Sequence[str] | None,
        *,
        partitions: Collection[int] | None,
    ) -> pa.Table:
        wanted = list(self.schema.names) if columns is None else list(columns)
        order = ["timestamp", "partition", "offset"]
        gone = Forgotten(self._tombstones.pending() if self._tombstones else [])
        extra = [*([self._key] if self._key else []), *(["user_id"] if gone else [])]
        needed = list(dict.fromkeys([*wanted, *order, *extra]))
        table = self._files.read(needed, since=since, until=until, partitions=partitions)
        if gone:
            table = table.filter(pc.invert(gone.among(table)))
        if self._key:
            table = _first_of_each(table, self._key)
        by = table.sort_by([(name, "ascending") for name in order])
        return by.select(wanted).combine_chunks()

    def forget(self, tombstone: Tombstone) -> None:
        """From now on nobody reads the user's events before this; `purge` removes them."""
        assert self._tombstones is not None
        self._tombstones.add(tombstone)

    def purge(self, *others: SpanFiles) -> int:
        """Remove what was to be forgotten from the log's files and from those `others`, then the
        wish itself; return how many rows are gone. Safe to repeat after a crash.

        Raises `DamagedFileError` where a file can't tell; the wishes then stay, for the next time.
        """
        assert self._tombstones is not None
        end = self.end()  # rows before a tombstone may still be on their way into the log
        due = [t for t in self._tombstones.pending() if t.offset < end.get(t.partition, 0)]
        rows = Forgotten(due)
        if not rows:
            return 0
        gone, damaged = 0, []
        for files in (self._files, *others):
            try:
                gone += files.purge(rows.among)
            except DamagedFileError as error:
                damaged.append(error)
        if damaged:
            raise damaged[0]
        self._tombstones.remove(due)
        return gone

    def wishes(self) -> int:
        """How many wishes to be forgotten `purge` has not fulfilled yet."""
        return len(self._tombstones.pending()) if self._tombstones else 0

    def compact(self) -> int:
        """Merge neighbouring small files; return how many files are gone. Safe beside readers,
        writers and crashes: see `SpanFiles.compact`."""
        return self._files.compact()

    def _epochs(self) -> dict[str, int]:
        matches = (re.fullmatch(r"epoch-(\d{3})-(.+)", name) for name in self._files.names())
        return {m[2]: int(m[1]) for m in matches if m}


def _first_of_each(table: pa.Table, key: str) -> pa.Table:
    indexed = table.append_column("_row", pa.array(np.arange(len(table))))
    first = indexed.select([key, "_row"]).group_by(key).aggregate([("_row", "min")])["_row_min"]
    return table if len(first) == len(table) else table.take(np.sort(first.to_numpy()))


def _table(topic: str, arrived: Sequence[Arrived[Record]], **columns: list[Any]) -> pa.Table:
    schema: pa.Schema = SCHEMAS[topic]
    columns["partition"] = [a.partition for a in arrived]
    columns["offset"] = [a.offset for a in arrived]
    arrays = {name: pa.array(values, schema.field(name).type) for name, values in columns.items()}
    arrays["timestamp"] = _time([a.record.timestamp for a in arrived])
    arrays["arrival"] = _time([a.arrival_ms for a in arrived])
    return pa.table([arrays[name] for name in schema.names], schema=schema)


def _time(milliseconds: list[int]) -> pa.Array:
    return pa.array(milliseconds, pa.timestamp("ms", tz="UTC")).cast(_TIME)
