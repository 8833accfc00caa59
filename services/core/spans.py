"""Parquet files named by what they cover: `<prefix>-<partition>-<first>-<last>.parquet`.

A file appears whole or not at all, and the same span written twice is the same file, so that
whoever repeats work after a crash changes nothing. Files may overlap; readers see each offset once.
What has been written survives a power cut, and readers notice a single changed bit (see seal).
"""

import os
import re
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs
import pyarrow.parquet as pq

from services.core import seal
from services.core.errors import DamagedFileError

READ_ATTEMPTS: Final = 5  # compaction may remove a file between listing and reading
READ_THREADS: Final = 8
MERGED_OFFSETS: Final = 2_000_000  # at most in one file: what is merged is in memory at once
LEFTOVER_S: Final = 3600.0  # nobody writes one file for so long
KEYS: Final = ("user_id", "partition", "offset")  # by which rows are purged


@dataclass(frozen=True, kw_only=True, order=True)
class Span:
    """Offsets `first` to `last` (inclusive) of one partition."""

    partition: int
    first: int
    last: int

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.last:
            raise ValueError(f"a span needs 0 <= first <= last, got {self.first}..{self.last}")


class SpanFiles:
    """The files of one kind in `<root>/<folder>`; to read a file in part, its rows need columns
    `partition` and `offset`.

    `merged_offsets`: at most in one file that compaction writes.
    """

    def __init__(
        self,
        root: str,
        folder: str,
        *,
        prefix: str,
        schema: pa.Schema,
        merged_offsets: int = MERGED_OFFSETS,
    ) -> None:
        self.fs, path = filesystem(root)
        self.path = f"{path}/{folder}"
        self.schema = schema
        self._prefix = prefix
        self._merged_offsets = merged_offsets

    def write(self, table: pa.Table, span: Span) -> None:
        """Add the rows that cover `span`: readers see all of them or none."""
        write_whole(self.fs, self._file(span), table.cast(self.schema))

    def names(self) -> list[str]:
        """Every name in the folder; none where it doesn't exist yet."""
        selector = pyarrow.fs.FileSelector(self.path, allow_not_found=True)
        return [PurePosixPath(info.path).name for info in self.fs.get_file_info(selector)]

    def spans(self) -> list[Span]:
        """Every file, by partition, then first offset, longest first."""
        pattern = re.compile(rf"{self._prefix}-(\d{{5}})-(\d{{15}})-(\d{{15}})\.parquet")
        matches = (pattern.fullmatch(name) for name in self.names())
        spans = [Span(partition=int(m[1]), first=int(m[2]), last=int(m[3])) for m in matches if m]
        return sorted(spans, key=lambda span: (span.partition, span.first, -span.last))

    def read(
        self,
        columns: Sequence[str],
        *,
        since: Mapping[int, int],
        until: Mapping[int, int],
        partitions: Collection[int] | None = None,
    ) -> pa.Table:
        """Rows with `since[p] <= offset < until[p]` (missing: no bound), by partition and span, of
        these partitions (None: of all)."""
        for attempt in range(READ_ATTEMPTS):
            pieces = [
                piece
                for number, spans in groupby(self.spans(), key=lambda span: span.partition)
                if partitions is None or number in partitions
                for piece in _cover(spans, since=since.get(number, 0), until=until.get(number))
            ]
            try:
                with ThreadPoolExecutor(READ_THREADS) as pool:
                    tables = list(pool.map(lambda piece: self._read(piece, columns), pieces))
            except FileNotFoundError:  # compacted meanwhile: list again
                if attempt == READ_ATTEMPTS - 1:
                    raise
                continue
            return pa.concat_tables([self.schema.empty_table().select(columns), *tables])
        raise AssertionError("unreachable")

    def compact(self) -> int:
        """Merge neighbouring small files; return how many files are gone.

        Sizes stay roughly geometric, so each row is rewritten a logarithmic number of times. The
        parts of a merged file are removed by the next call only: whoever listed them has until
        then to read them. Leftovers of whoever died while writing go, too.
        """
        gone = self._tidy()
        for _, spans in groupby(self.spans(), key=lambda span: span.partition):
            files = list(spans)
            pieces = _cover(files)
            kept = {piece.span for piece in pieces}
            try:
                for span in files:
                    if span not in kept:
                        self.fs.delete_file(self._file(span))
                        gone += 1
                for group in _neighbours(pieces, self._merged_offsets):
                    merged = pa.concat_tables([self._read(p, self.schema.names) for p in group])
                    partition = group[0].span.partition
                    span = Span(partition=partition, first=group[0].lo, last=group[-1].hi)
                    self.write(merged, span)
                    del merged  # before the next is read; Arrow would keep the memory for itself
                    pa.default_memory_pool().release_unused()
            except FileNotFoundError:  # another process compacts: leave the rest to it
                return gone
        return gone

    def _tidy(self) -> int:
        """Remove what was written aside and never became a file."""
        selector = pyarrow.fs.FileSelector(self.path, allow_not_found=True)
        old = time.time() - LEFTOVER_S
        left = [
            info.path
            for info in self.fs.get_file_info(selector)
            if PurePosixPath(info.path).name.startswith(".") and info.mtime.timestamp() < old
        ]
        for path in left:
            with suppress(FileNotFoundError):
                self.fs.delete_file(path)
        return len(left)

    def purge(self, rows: Callable[[pa.Table], pa.ChunkedArray]) -> int:
        """Write every file that has such rows anew, without them; return how many rows are gone.

        rows: which they are (a mask), given `KEYS`. Also the files that compaction has merged and
        not yet removed. A crash leaves some files done: call again. Raises `DamagedFileError` for
        the first damaged file, after all others.
        """
        gone = 0
        damaged: DamagedFileError | None = None
        for span in self.spans():
            try:
                there = rows(self._read_file(span, KEYS, None))
                found = pc.sum(there).as_py() or 0
                if found:
                    table = self._read_file(span, self.schema.names, None)
                    self.write(table.filter(pc.invert(there)), span)
            except FileNotFoundError:  # compacted meanwhile: the merged file is a span of its own
                return gone + self.purge(rows)
            except DamagedFileError as error:
                damaged = damaged or error
                continue
            gone += found
        if damaged is not None:
            raise damaged
        return gone

    def _read(self, piece: "_Piece", columns: Sequence[str]) -> pa.Table:
        whole = piece.span.first == piece.lo and piece.span.last == piece.hi
        offset = pc.field("offset")
        rows = None if whole else (offset >= piece.lo) & (offset <= piece.hi)
        return self._read_file(piece.span, columns, rows)

    def _read_file(
        self, span: Span, columns: Sequence[str], rows: pc.Expression | None
    ) -> pa.Table:
        """These columns of these rows (None: all); `DamagedFileError` names the file."""
        path = self._file(span)
        with self.fs.open_input_stream(path) as stream:
            raw = stream.read()
        try:
            seal.check(raw)
        except seal.BrokenSealError as error:
            raise DamagedFileError(
                f"{path} is damaged ({error}); put it back from a copy, or, where there is none, "
                "move it away: what it held is then missing from the log"
            ) from None
        return pq.read_table(
            pa.BufferReader(raw),
            columns=list(columns),
            filters=rows,
            use_threads=False,  # files are read side by side
            partitioning=None,
        )

    def _file(self, span: Span) -> str:
        name = f"{self._prefix}-{span.partition:05d}-{span.first:015d}-{span.last:015d}.parquet"
        return f"{self.path}/{name}"


def filesystem(root: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The filesystem of a path or URI, and the path in it."""
    if "://" not in root:
        return pyarrow.fs.LocalFileSystem(), str(Path(root).absolute())
    fs, path = pyarrow.fs.FileSystem.from_uri(root)
    return fs, path.rstrip("/")


def write_whole(fs: pyarrow.fs.FileSystem, path: str, table: pa.Table) -> None:
    """Write a Parquet file that readers see complete or not at all; then it is on the disk."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    with whole(fs, path) as aside, fs.open_output_stream(aside) as stream:
        stream.write(seal.seal(sink.getvalue().to_pybytes()))


@contextmanager
def whole(fs: pyarrow.fs.FileSystem, path: str) -> Iterator[str]:
    """A path to write to, which becomes `path`, on the disk, when the block ends well."""
    folder = str(PurePosixPath(path).parent)
    if fs.get_file_info(folder).type == pyarrow.fs.FileType.NotFound:
        fs.create_dir(folder, recursive=True)
        settle(fs, str(PurePosixPath(folder).parent))
    aside = f"{folder}/.{uuid.uuid4().hex}"
    try:
        yield aside
        settle(fs, aside)
        fs.move(aside, path)
    except BaseException:
        with suppress(OSError):  # half a file would keep a full disk full
            fs.delete_file(aside)
        raise
    settle(fs, folder)


def settle(fs: pyarrow.fs.FileSystem, path: str) -> None:
    """Wait until a local file or folder is on the disk; object stores wait by themselves."""
    if not isinstance(fs, pyarrow.fs.LocalFileSystem):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def _neighbours(pieces: Sequence[_Piece], most: int) -> list[list[_Piece]]:
    """Groups of two or more adjacent pieces worth one file of at most so many offsets, as in a
    log-structured merge."""

    def size(group: list[_Piece]) -> int:
        return group[-1].hi - group[0].lo + 1

    groups: list[list[_Piece]] = []
    for piece in pieces:
        groups.append([piece])
        while (
            len(groups) > 1
            and groups[-2][-1].hi + 1 == groups[-1][0].lo
            and size(groups[-2]) <= 2 * size(groups[-1])
            and size(groups[-2]) + size(groups[-1]) <= most
        ):
            tail = groups.pop()
            groups[-1] += tail
    return [group for group in groups if len(group) > 1]
