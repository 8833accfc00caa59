"""From histories to the integer arrays that models read: one way for training, distillation and
serving, so that there is no skew between them.

Shapes: E events of all users (each user's contiguous, oldest first), U users, B packed lines of
L events.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from services.core.events import EventType

Ints = NDArray[np.int64]

N_GAPS: Final = 32  # 0: no event before; 1: the same second; then one bucket per doubling
N_TYPES: Final = 16  # 0: padding; one code per event type; a rating's depends on its value

COMPACT: Final = (np.int32, np.int8, np.int8)

# In the order of their codes, from 1; what a model has learned of one stays where it is.
TYPES: Final = tuple(
    kind.value
    for kind in (
        EventType.VIEW,
        EventType.CLICK,
        EventType.CART,
        EventType.PURCHASE,
        EventType.LIKE,
        EventType.RATING,  # a rating without a value; with one, 7..11 for 1..5
    )
)
_CODE_OF: Final = {name: code for code, name in enumerate(TYPES, start=1)}
VIEW: Final = _CODE_OF[EventType.VIEW.value]
RATING: Final = _CODE_OF[EventType.RATING.value]
_FIRST: Final = slice(1)


class Features(NamedTuple):
    """What a model reads of one event or many; arrays of equal shape."""

    rows: NDArray[Any]
    types: NDArray[Any]
    gaps: NDArray[Any]

    def compact(self) -> "Features":
        """The same in 6 bytes an event; models read 64-bit integers."""
        return Features(*(c.astype(t) for c, t in zip(self, COMPACT, strict=True)))


@dataclass(frozen=True, eq=False)
class Sequences:
    """Many users' histories, one after the other."""

    features: Features  # of E events
    starts: Ints  # (U + 1,): user u's events are starts[u] .. starts[u + 1] - 1

    def targets(self) -> Ints:
        """For each event (E,), the row of the same user's next one; 0 where there is none."""
        targets = np.zeros_like(self.features.rows)
        targets[:-1] = self.features.rows[1:]
        targets[self.starts[1:] - 1] = 0
        return targets

    def shuffled(self, random: np.random.Generator) -> "Sequences":
        """Each user's events in a random order; for a model that reads them as a set."""
        users = np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))
        order = np.lexsort((random.random(len(users)), users))
        return Sequences(Features(*(column[order] for column in self.features)), self.starts)


@dataclass(frozen=True, eq=False)
class Packed:
    """Histories laid end to end and cut into lines of equal length; all arrays are (B, L).

    `segments` tells the users apart (0 is padding): attention stays inside a segment.
    """

    features: Features
    segments: Ints
    targets: Ints


def features_of(
    rows: Ints, types: Sequence[str], timestamps_ms: Ints, values: NDArray[np.float64] | None = None
) -> Features:
    """One user's history (oldest first) as model input; `values` holds NaN where there is none."""
    return Features(rows, type_codes(types, values), gap_codes(timestamps_ms, _FIRST))


def sequences_of(
    users: Ints,
    rows: Ints,
    types: Sequence[str],
    timestamps_ms: Ints,
    values: NDArray[np.float64] | None = None,
) -> Sequences:
    """Group a log, in time order, by user: each user's events keep their order."""
    return grouped(users, rows, type_codes(types, values), timestamps_ms)


def grouped(users: NDArray[Any], rows: Ints, codes: Ints, timestamps_ms: Ints) -> Sequences:
    """The same, of types that are codes already."""
    order = np.argsort(users, kind="stable")
    users = users[order]
    first = np.ones(len(users), bool)
    first[1:] = users[1:] != users[:-1]
    gaps = gap_codes(timestamps_ms[order], first)
    starts = np.append(np.flatnonzero(first), len(users))
    return Sequences(Features(rows[order], codes[order], gaps), starts)


def type_codes(types: Sequence[str], values: NDArray[np.float64] | None = None) -> Ints:
    """Event types as 1..N_TYPES-1; a rating's value is rounded into 1..5 and told apart."""
    codes = np.fromiter(map(_CODE_OF.get, types, repeat(0)), np.int64, len(types))
    if values is not None:
        stars = np.minimum(np.maximum(np.rint(values), 1), 5)  # NaN stays NaN
        valued = (codes == RATING) & (stars == stars)
        codes[valued] += stars[valued].astype(np.int64)
    return codes


def gap_codes(timestamps_ms: Ints, first: NDArray[np.bool_] | slice) -> Ints:
    """Time since the event before, in doubling buckets of seconds; 0 where `first`."""
    gaps_s = np.zeros(len(timestamps_ms))
    np.subtract(timestamps_ms[1:], timestamps_ms[:-1], out=gaps_s[1:])
    np.maximum(gaps_s, 0, out=gaps_s)
    gaps_s /= 1000
    codes = np.ceil(np.log2(1 + gaps_s)).astype(np.int64)
    codes += 1
    np.minimum(codes, N_GAPS - 1, out=codes)
    codes[first] = 0
    return codes


class Layout:
    """Histories laid end to end in `order` (default: as they are) and cut into `n_lines` lines,
    each of which is packed when it is asked for.

    Only the last line is padded. A user cut in two keeps every target; the second part starts
    without context, as a user whose older events have expired does.
    """

    def __init__(self, sequences: Sequences, *, length: int, order: Ints | None = None) -> None:
        starts = sequences.starts
        order = np.arange(len(starts) - 1) if order is None else order
        lengths = np.diff(starts)[order]
        self._features = sequences.features
        self._length = length
        self._ends = np.cumsum(lengths)
        # From a place among the lined-up events to the event itself.
        self._shift = starts[:-1][order] - (self._ends - lengths)
        self.n_lines = -(-len(sequences.features.rows) // length)

    def lines(self, numbers: Ints) -> Packed:
        """Those lines, in that order."""
        places = numbers[:, None] * self._length + np.arange(self._length)
        users = np.searchsorted(self._ends, places, side="right")
        real = users < len(self._ends)
        users = np.minimum(users, len(self._ends) - 1)
        at = np.where(real, places + self._shift[users], 0)
        goes_on = real & (places + 1 < self._ends[users])

        def of(column: NDArray[Any], at: Ints, there: NDArray[np.bool_]) -> Ints:
            return np.where(there, column[np.where(there, at, 0)], 0).astype(np.int64)

        return Packed(
            Features(*(of(column, at, real) for column in self._features)),
            np.where(real, users + 1, 0),
            of(self._features.rows, at + 1, goes_on),
        )
