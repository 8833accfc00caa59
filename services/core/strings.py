"""Many short strings as one piece of memory, and an index that finds them by what they say.

A million ids in a dictionary take 150 MB, seconds to make with the interpreter's lock held, and
four far-apart places in memory for each look; here it is 12 MB beside Arrow's column of them.
"""

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Self, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from services.core.compiled import compiled, compiled_aside

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]

_SEED: Final = np.uint64(secrets.randbits(64))  # so that nobody can choose ids that all collide
_PRIME: Final = np.uint64(0x100000001B3)  # of FNV-1a, 64 bits


@dataclass(frozen=True, eq=False)
class Strings(Sequence[str]):
    """`data[starts[i]:ends[i]]` is the i-th string in UTF-8."""

    data: Bytes
    starts: Ints
    ends: Ints

    @classmethod
    def of(cls, strings: Sequence[str]) -> "Strings":
        if isinstance(strings, Strings):
            return strings
        encoded = [string.encode(errors="surrogatepass") for string in strings]
        ends = np.fromiter(map(len, encoded), np.int64, len(encoded)).cumsum()
        starts = np.zeros_like(ends)
        starts[1:] = ends[:-1]
        return cls(np.frombuffer(b"".join(encoded), np.uint8), starts, ends)

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, at: int) -> str: ...

    @overload
    def __getitem__(self, at: slice) -> "Strings": ...

    def __getitem__(self, at: int | slice) -> "str | Strings":
        if isinstance(at, slice):
            return Strings(self.data, self.starts[at], self.ends[at])
        return self.data[self.starts[at] : self.ends[at]].tobytes().decode(errors="surrogatepass")

    def __iter__(self) -> Iterator[str]:
        data = self.data.tobytes()
        for start, end in zip(self.starts.tolist(), self.ends.tolist(), strict=True):
            yield data[start:end].decode(errors="surrogatepass")


class _Column(NamedTuple):
    """Arrow's memory of strings: the i-th is `data[offsets[i]:offsets[i + 1]]`."""

    data: Bytes
    offsets: NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class StringIndex:
    """Places of strings, counted from 1 in the order of `strings`; 0: not among them.

    Open addressing: `_slots` holds places at the hash of what stands there, or at the next free
    slot. Never changed: one that knows more is made beside it.
    """

    strings: pa.StringArray
    _column: _Column
    _slots: NDArray[np.int32]  # 0: free; a power of two of them, at most half in use

    @classmethod
    def of(cls, strings: pa.Array, previous: "Self | None" = None) -> Self:
        """ValueError where a string stands there twice. Of a `previous` one that the strings begin
        with, only the rest is taken in."""
        strings = strings.cast(pa.string())
        column, n_slots = _column_of(strings), 8
        while n_slots < 2 * len(strings):
            n_slots *= 2
        slots, n_known = np.zeros(n_slots, np.int32), 0
        if previous and strings[: len(previous.strings)].equals(previous.strings):
            if len(previous.strings) == len(strings):
                return previous
            if len(previous._slots) == n_slots:
                slots, n_known = previous._slots.copy(), len(previous.strings)
        if twice := _take_in(slots, column, n_known, _SEED):
            raise ValueError(f"{strings[twice - 1].as_py()!r} stands there twice")
        return cls(strings, column, slots)

    def places(self, strings: Sequence[str]) -> Ints:
        """Where each of them stands, from 1; 0 where it doesn't."""
        wanted = Strings.of(strings)
        return _find(self._slots, self._column, wanted.data, wanted.starts, wanted.ends, _SEED)


def _column_of(strings: pa.StringArray) -> _Column:
    _, offsets, data = strings.buffers()
    if offsets is None or not len(strings):
        return _Column(np.zeros(0, np.uint8), np.zeros(1, np.int32))
    whole = np.frombuffer(offsets, np.int32)
    return _Column(
        np.frombuffer(data or b"", np.uint8),
        whole[strings.offset : strings.offset + len(strings) + 1],
    )


@compiled
def _slot(seed: np.uint64, data: Bytes, start: int, end: int, n_slots: int) -> int:
    """Where to begin to look."""
    code = seed
    for at in range(start, end):
        code = (code ^ np.uint64(data[at])) * _PRIME
    code ^= code >> np.uint64(32)
    return int(np.int64(code & np.uint64(n_slots - 1)))


@compiled
def _same(one: Bytes, start: int, end: int, other: Bytes, begin: int, stop: int) -> bool:
    length, at = end - start, 0
    if length != stop - begin:
        return False
    while at < length and one[start + at] == other[begin + at]:
        at += 1
    return at == length


@compiled_aside
def _take_in(slots: NDArray[np.int32], column: _Column, n_known: int, seed: np.uint64) -> int:
    """Enter what comes after the first `n_known`; the place of one that is there already, or 0."""
    data, offsets = column
    for place in range(n_known + 1, len(offsets)):
        start, end = offsets[place - 1], offsets[place]
        slot = _slot(seed, data, start, end, len(slots))
        while slots[slot]:
            there = slots[slot]
            if _same(data, start, end, data, offsets[there - 1], offsets[there]):
                return place
            slot = (slot + 1) & (len(slots) - 1)
        slots[slot] = place
    return 0


@compiled
def _find(
    slots: NDArray[np.int32],
    column: _Column,
    data: Bytes,
    starts: Ints,
    ends: Ints,
    seed: np.uint64,
) -> Ints:
    places = np.zeros(len(starts), np.int64)
    for i in range(len(starts)):
        slot = _slot(seed, data, starts[i], ends[i], len(slots))
        while slots[slot]:
            there = slots[slot]
            begin, stop = column.offsets[there - 1], column.offsets[there]
            if _same(data, starts[i], ends[i], column.data, begin, stop):
                places[i] = there
                break
            slot = (slot + 1) & (len(slots) - 1)
    return places
