"""Lists in Feast's values as Redis holds them, read without making Python's objects of them.

A `Value` has one field, a list; a list has one field, `val`: strings one by one, numbers packed
(https://protobuf.dev/programming-guides/encoding/). ValueError for whatever is otherwise.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from services.core.compiled import compiled
from services.core.strings import Bytes, Ints, Strings

_STRING: Final = 0x0A  # field 1, of a length that follows; numbers that are packed have the same


def strings(value: bytes) -> Strings:
    data = np.frombuffer(value, np.uint8)
    starts, ends = _strings(data)
    return Strings(data, starts, ends)


def integers(value: bytes) -> Ints:
    return _integers(np.frombuffer(value, np.uint8))


def doubles(value: bytes) -> NDArray[np.float64]:
    start, end = _packed(np.frombuffer(value, np.uint8))
    if (end - start) % 8:
        raise ValueError("a list of doubles that ends within one")
    # A copy is aligned: what is not is another type to those who compile for it.
    return np.frombuffer(value, np.dtype("<f8"), (end - start) // 8, start).copy()


@compiled
def _varint(data: Bytes, at: int) -> tuple[np.uint64, int]:
    """A number in groups of 7 bits, the last one first, and where it ends."""
    number, shift = np.uint64(0), np.uint64(0)
    while at < len(data) and shift < np.uint64(64):
        group = np.uint64(data[at])
        at += 1
        number |= (group & np.uint64(0x7F)) << shift
        if group < 0x80:
            return number, at
        shift += np.uint64(7)
    raise ValueError("a number that is cut off")


@compiled
def _field(data: Bytes, at: int) -> tuple[int, int]:
    """Where the contents of a field with a length begin and end."""
    size, at = _varint(data, at)
    if size > np.uint64(len(data) - at):
        raise ValueError("a field that is cut off")
    return at, at + int(np.int64(size))


@compiled
def _inside(data: Bytes) -> tuple[int, int]:
    """Where the list in a value begins and ends."""
    if len(data) == 0:
        return 0, 0
    _, at = _varint(data, 0)
    start, end = _field(data, at)
    if end != len(data):
        raise ValueError("more than a list")
    return start, end


@compiled
def _packed(data: Bytes) -> tuple[int, int]:
    """Where the numbers in a value begin and end."""
    start, end = _inside(data)
    if start == end:
        return start, end
    if data[start] != _STRING:
        raise ValueError("numbers that aren't packed")
    start, stop = _field(data, start + 1)
    if stop != end:
        raise ValueError("more than numbers")
    return start, end


@compiled
def _strings(data: Bytes) -> tuple[Ints, Ints]:
    at, end = _inside(data)
    most = (end - at) // 2  # a string takes two bytes at least
    starts, ends = np.empty(most, np.int64), np.empty(most, np.int64)
    found = 0
    while at < end:
        if data[at] != _STRING:
            raise ValueError("something else than strings")
        starts[found], ends[found] = _field(data, at + 1)
        at = ends[found]
        found += 1
    return starts[:found], ends[:found]


@compiled
def _integers(data: Bytes) -> Ints:
    at, end = _packed(data)
    numbers = np.empty(end - at, np.int64)
    found = 0
    while at < end:
        number, at = _varint(data, at)
        numbers[found] = np.int64(number)
        found += 1
    return numbers[:found]
