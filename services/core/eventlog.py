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
import uuid
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, Final, Generic, TypeVar

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs
import pyarrow.parquet as pq

from services.core.events import EVENTS, ITEMS, Event, Item

EPOCH_SPAN: Final = 10**12  # offsets one incarnation of a topic may use
READ_ATTEMPTS: Final = 5  # compaction may remove a file between listing and reading
READ_THREADS: Final = 8

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


@dataclass(frozen=True, kw_only=True, order=True)
class Span:
    """Offsets `first` to `last` (inclusive) of one partition."""

    partition: int
    first: int
    last: int

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.last:
            raise ValueError(f"a span needs 0 <= first <= last, got {self.first}..{self.last}")


Record = TypeVar("Record", Event, Item)


@dataclass(frozen=True, kw_only=True)
class Arrived(Generic[Record]):
    """A valid record and where and when it arrived; `offset` is a log offset."""

    record: Record
    arrival_ms: int
    partition: int
    offset: int


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
        self._fs, path = _filesystem(root)
        self._dir = f"{path}/{topic}"
        self._key = "event_id" if topic == EVENTS else None

    def epoch(self, topic_id: str) -> int:
        """The number of this incarnation of the topic, given the id that Kafka gave it.

        The first one asked for is 0. An id not seen before begins the next epoch, for every
        process that shares this log; asking again changes nothing.
        """
        known = self._epochs()
        if topic_id not in known:
            known[topic_id] = len(known)
            self._fs.create_dir(self._dir, recursive=True)
            name = f"{self._dir}/epoch-{known[topic_id]:03d}-{topic_id}"
            with self._fs.open_output_stream(name):
                pass  # the name says it all
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
        self._write(table.select(self.schema.names).cast(self.schema), span)

    def end(self) -> dict[int, int]:
        """Per partition the next offset that is not in the log; partitions never seen are absent.

        At the start of a new epoch this is that epoch's first offset.
        """
        first = max(0, len(self._epochs()) - 1) * EPOCH_SPAN
        ends: dict[int, int] = {}
        for span in self._spans():
            ends[span.partition] = max(ends.get(span.partition, first), span.last + 1)
        return ends

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
        wanted = list(self.schema.names) if columns is None else list(columns)
        order = ["timestamp", "partition", "offset"]
        needed = list(dict.fromkeys([*wanted, *order, *([self._key] if self._key else [])]))
        table = self._load(needed, since=since or {}, until=until or {})
        if self._key:
            table = _first_of_each(table, self._key)
        by = table.sort_by([(name, "ascending") for name in order])
        return by.select(wanted).combine_chunks()

    def compact(self, *, max_offsets: int = 2_000_000) -> int:
        """Merge neighbouring small files; return how many files are gone.

        Sizes stay roughly geometric, so each row is rewritten a logarithmic number of times. The
        merged file comes first and its parts go after it; whoever reads or crashes between the
        two finds each offset twice at most, which `read` drops.
        """
        gone = 0
        for _, spans in groupby(self._spans(), key=lambda span: span.partition):
            pieces = _cover(spans)
            for group in _neighbours(pieces, max_offsets=max_offsets):
                merged = Span(
                    partition=group[0].span.partition, first=group[0].lo, last=group[-1].hi
                )
                tables = [self._read_piece(piece, self.schema.names) for piece in group]
                self._write(pa.concat_tables(tables), merged)
            gone += self._remove_covered(pieces[0].span.partition)
        return gone

    def _remove_covered(self, partition: int) -> int:
        spans = [span for span in self._spans() if span.partition == partition]
        kept = {piece.span for piece in _cover(spans)}
        covered = [span for span in spans if span not in kept]
        for span in covered:
            self._fs.delete_file(self._path(span))
        return len(covered)

    def _load(
        self, columns: list[str], *, since: Mapping[int, int], until: Mapping[int, int]
    ) -> pa.Table:
        for attempt in range(READ_ATTEMPTS):
            pieces = [
                piece
                for partition, spans in groupby(self._spans(), key=lambda span: span.partition)
                for piece in _cover(
                    spans, since=since.get(partition, 0), until=until.get(partition)
                )
            ]
            try:
                with ThreadPoolExecutor(READ_THREADS) as pool:
                    tables = list(pool.map(lambda p: self._read_piece(p, columns), pieces))
            except FileNotFoundError:  # compacted meanwhile: list again
                if attempt == READ_ATTEMPTS - 1:
                    raise
                continue
            return pa.concat_tables([self.schema.empty_table().select(columns), *tables])
        raise AssertionError("unreachable")

    def _read_piece(self, piece: "_Piece", columns: list[str]) -> pa.Table:
        whole = piece.span.first == piece.lo and piece.span.last == piece.hi
        offset = pc.field("offset")
        return pq.read_table(
            self._path(piece.span),
            filesystem=self._fs,
            columns=columns,
            filters=None if whole else (offset >= piece.lo) & (offset <= piece.hi),
            use_threads=False,  # files are read side by side
            partitioning=None,
        )

    def _write(self, table: pa.Table, span: Span) -> None:
        self._fs.create_dir(self._dir, recursive=True)
        temporary = f"{self._dir}/.{uuid.uuid4().hex}"
        pq.write_table(table, temporary, filesystem=self._fs, compression="zstd")
        self._fs.move(temporary, self._path(span))

    def _path(self, span: Span) -> str:
        name = f"{self.topic}-{span.partition:05d}-{span.first:015d}-{span.last:015d}.parquet"
        return f"{self._dir}/{name}"

    def _names(self) -> Iterable[str]:
        selector = pyarrow.fs.FileSelector(self._dir, allow_not_found=True)
        return (PurePosixPath(info.path).name for info in self._fs.get_file_info(selector))

    def _spans(self) -> list[Span]:
        """Every file, by partition, then first offset, longest first."""
        pattern = re.compile(rf"{self.topic}-(\d{{5}})-(\d{{15}})-(\d{{15}})\.parquet")
        matches = (pattern.fullmatch(name) for name in self._names())
        spans = [Span(partition=int(m[1]), first=int(m[2]), last=int(m[3])) for m in matches if m]
        return sorted(spans, key=lambda span: (span.partition, span.first, -span.last))

    def _epochs(self) -> dict[str, int]:
        matches = (re.fullmatch(r"epoch-(\d{3})-(.+)", name) for name in self._names())
        return {m[2]: int(m[1]) for m in matches if m}


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """The part `lo..hi` (inclusive) that a file contributes."""

    span: Span
    lo: int
    hi: int


def _cover(spans: Iterable[Span], *, since: int = 0, until: int | None = None) -> list[_Piece]:
    """Pieces of one partition's files that hold each offset of `since..until` exactly once."""
    pieces: list[_Piece] = []
    at = since
    for span in sorted(spans, key=lambda span: (span.first, -span.last)):
        lo = max(at, span.first)
        hi = span.last if until is None else min(span.last, until - 1)
        if lo <= hi:
            pieces.append(_Piece(span=span, lo=lo, hi=hi))
            at = hi + 1
    return pieces


def _neighbours(pieces: Sequence[_Piece], *, max_offsets: int) -> list[list[_Piece]]:
    """Groups of two or more adjacent pieces worth one file, as in a log-structured merge."""

    def size(group: list[_Piece]) -> int:
        return group[-1].hi - group[0].lo + 1

    groups: list[list[_Piece]] = []
    for piece in pieces:
        groups.append([piece])
        while (
            len(groups) > 1
            and groups[-2][-1].hi + 1 == groups[-1][0].lo
            and epoch_of(groups[-2][0].lo) == epoch_of(groups[-1][0].lo)
            and size(groups[-2]) <= 2 * size(groups[-1])
            and size(groups[-2]) + size(groups[-1]) <= max_offsets
        ):
            tail = groups.pop()
            groups[-1] += tail
    return [group for group in groups if len(group) > 1]


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


def _filesystem(root: str) -> tuple[pyarrow.fs.FileSystem, str]:
    if "://" not in root:
        return pyarrow.fs.LocalFileSystem(), str(Path(root).absolute())
    fs, path = pyarrow.fs.FileSystem.from_uri(root)
    return fs, path.rstrip("/")
