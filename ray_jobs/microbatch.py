"""One micro-batch: what arrived, grouped by user, as sequences that a causal model reads once.

A sequence is the user's latest known events followed by the new ones. The hidden state at an
event predicts the next, so one forward scores every new event from exactly what came before it.

Shapes: E events of all sequences end to end, N targets (the new events), S (target, seen row)
pairs, B packed lines of L events, V catalog rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ray_jobs.histories import EventRows, Histories, first_seen, merged
from services.core.models.sequences import gap_codes

Ints = NDArray[np.int64]
COLD = -1  # stands for the position before a user's first event: no hidden state predicts it


@dataclass(frozen=True, kw_only=True, eq=False)
class Arrivals:
    """Interactions in the order of the stream; `events` holds the job's catalog rows."""

    user_ids: Sequence[str]
    events: EventRows
    partitions: Sequence[int]

    def __len__(self) -> int:
        return len(self.user_ids)

    def owned(self, rank: int, world: int) -> "Arrivals":
        """Those of the partitions that worker `rank` of `world` reads."""
        if world == 1:
            return self
        at = [i for i, partition in enumerate(self.partitions) if partition % world == rank]
        return Arrivals(
            user_ids=[self.user_ids[i] for i in at],
            events=self.events[at],
            partitions=[self.partitions[i] for i in at],
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class UserNews:
    """A user's known and new events together, in order of time; `new` marks the new ones."""

    user_id: str
    partition: int
    events: EventRows
    new: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, eq=False)
class Lines:
    """Sequences packed into lines without a cut; `at_N` indexes the flattened (B, L)."""

    rows_BL: Tensor
    types_BL: Tensor
    gaps_BL: Tensor
    segments_BL: Tensor
    at_N: Tensor

    def to(self, device: torch.device) -> "Lines":
        """On that device; itself where it is there already."""
        if self.at_N.device == device:
            return self
        return Lines(**{name: tensor.to(device) for name, tensor in vars(self).items()})


@dataclass(frozen=True, kw_only=True, eq=False)
class MicroBatch:
    """What models need to score and learn N targets.

    at_N: the event in E whose hidden state predicts the target; `COLD` where there is none.
    key_N: which event the target is (`EVENT`'s key).
    seen_S, seen_row_S: target `seen_S` belongs to a user who had interacted with `seen_row_S`;
        each pair once, however often that was.
    """

    rows_E: Ints
    types_E: Ints
    gaps_E: Ints
    lengths: Ints  # of the sequences
    at_N: Ints
    target_N: Ints
    key_N: Ints
    seen_S: Ints
    seen_row_S: Ints

    def __len__(self) -> int:
        return len(self.target_N)

    @classmethod
    def of(cls, news: Sequence[UserNews], *, context: int) -> Self:
        """Cut into sequences of at most `context` known events and `context` new ones.

        Each new event is the target of exactly one sequence, and finds there the `context`
        events before it, or all where there are fewer.
        """
        rows: list[Ints] = []
        types: list[Ints] = []
        gaps: list[Ints] = []
        lengths: list[int] = []
        at: list[Ints] = []
        targets: list[Ints] = []
        keys: list[Ints] = []
        seen: list[Ints] = []
        seen_rows: list[Ints] = []
        n_events = n_targets = 0
        for user in news:
            row = user.events["row"].astype(np.int64)
            gap = gap_codes(user.events["time_ms"], np.arange(len(row)) == 0)
            met_first = np.sort(np.unique(row, return_index=True)[1])  # each item's first place
            for chunk in _chunks(np.flatnonzero(user.new), context):
                first = max(int(chunk[0]) - context, 0)
                piece = slice(first, int(chunk[-1]))
                rows.append(row[piece])
                types.append(user.events["type"][piece].astype(np.int64))
                gaps.append(gap[piece])
                lengths.append(len(rows[-1]))
                at.append(np.where(chunk > 0, n_events + chunk - 1 - first, COLD))
                targets.append(row[chunk])
                keys.append(user.events["key"][chunk])
                n_seen = np.searchsorted(met_first, chunk)
                seen.append(np.repeat(np.arange(n_targets, n_targets + len(chunk)), n_seen))
                seen_rows.extend(row[met_first[:n]] for n in n_seen)
                n_events += len(rows[-1])
                n_targets += len(chunk)
        return cls(
            rows_E=_joined(rows),
            types_E=_joined(types),
            gaps_E=_joined(gaps),
            lengths=np.array(lengths, np.int64),
            at_N=_joined(at),
            target_N=_joined(targets),
            key_N=_joined(keys),
            seen_S=_joined(seen),
            seen_row_S=_joined(seen_rows),
        )

    def parts(self, n: int) -> list[Self]:
        """The same sequences and targets in order, as at most `n` batches of about one size."""
        n = min(n, len(self.lengths))
        if n <= 1:
            return [self]
        begins = np.concatenate([[0], np.cumsum(self.lengths)])  # of sequences, in E
        evenly = np.linspace(0, begins[-1], n + 1)[1:-1]
        cuts = np.unique([0, *np.searchsorted(begins, evenly), len(self.lengths)])
        # A target goes with the event that predicts it; `COLD` ones with the targets before them.
        first = np.searchsorted(np.maximum.accumulate(self.at_N), begins[cuts])
        first[0], first[-1] = 0, len(self)
        return [
            self._part(slice(*cuts[i : i + 2]), slice(*first[i : i + 2]), begins)
            for i in range(len(cuts) - 1)
        ]

    def _part(self, sequences: slice, targets: slice, begins: Ints) -> Self:
        events = slice(begins[sequences.start], begins[sequences.stop])
        pairs = slice(*np.searchsorted(self.seen_S, [targets.start, targets.stop]))
        at_N = self.at_N[targets]
        return type(self)(
            rows_E=self.rows_E[events],
            types_E=self.types_E[events],
            gaps_E=self.gaps_E[events],
            lengths=self.lengths[sequences],
            at_N=np.where(at_N == COLD, COLD, at_N - events.start),
            target_N=self.target_N[targets],
            key_N=self.key_N[targets],
            seen_S=self.seen_S[pairs] - targets.start,
            seen_row_S=self.seen_row_S[pairs],
        )

    @cached_property
    def lines(self) -> Lines:
        """Pack the sequences, longest first, each into the first line with room."""
        width = max(int(self.lengths.max(initial=1)), 1)
        line_of, begin_of, n_lines = _first_fit(self.lengths, width)
        starts = np.cumsum(self.lengths) - self.lengths
        cell_E = np.repeat(line_of * width + begin_of - starts, self.lengths)
        cell_E += np.arange(len(self.rows_E))

        def laid(values_E: Ints) -> Tensor:
            flat = np.zeros(n_lines * width, np.int64)
            flat[cell_E] = values_E
            return torch.from_numpy(flat.reshape(n_lines, width))

        return Lines(
            rows_BL=laid(self.rows_E),
            types_BL=laid(self.types_E),
            gaps_BL=laid(self.gaps_E),
            segments_BL=laid(np.repeat(np.arange(1, len(self.lengths) + 1), self.lengths)),
            at_N=torch.from_numpy(
                np.where(self.at_N == COLD, COLD, np.append(cell_E, 0)[self.at_N])
            ),
        )

    def seen_rows(self) -> Tensor:
        """seen_NL: rows that each target's user had interacted with before; 0 where there are
        fewer than of the one with most."""
        n_seen_N = np.bincount(self.seen_S, minlength=len(self))
        width = max(int(n_seen_N.max(initial=1)), 1)
        begin_N = np.cumsum(n_seen_N) - n_seen_N
        flat = np.zeros(len(self) * width, np.int64)
        flat[self.seen_S * width + np.arange(len(self.seen_S)) - begin_N[self.seen_S]] = (
            self.seen_row_S
        )
        return torch.from_numpy(flat.reshape(len(self), width))

    def seen(self, n_rows: int, targets: slice) -> Tensor:
        """seen_NV (bool) of some of the targets: what their users had interacted with before."""
        first, last, _ = targets.indices(len(self))
        pairs = slice(*np.searchsorted(self.seen_S, [first, last]).tolist())
        mask_NV = torch.zeros(last - first, n_rows, dtype=torch.bool)
        rows = self.seen_row_S[pairs]
        known = rows < n_rows
        mask_NV[self.seen_S[pairs][known] - first, rows[known]] = True
        return mask_NV


def group(arrivals: Arrivals, histories: Histories) -> list[UserNews]:
    """Join each user's new events to the known ones; an event id met before is left out.

    Users come in the order of their first event here, which makes a run repeatable.
    """
    by_user: dict[str, list[int]] = {}
    for i, user_id in enumerate(arrivals.user_ids):
        by_user.setdefault(user_id, []).append(i)
    news = []
    for user_id, indices in by_user.items():
        known = histories.of(user_id)
        arrived = arrivals.events[indices]
        arrived = arrived[first_seen(arrived["key"], known["key"])]
        if len(arrived):
            events, new = merged(known, arrived)
            partition = arrivals.partitions[indices[0]]
            news.append(UserNews(user_id=user_id, partition=partition, events=events, new=new))
    return news


def absorb(news: Sequence[UserNews], histories: Histories) -> None:
    """Make the new events known: the last step of a micro-batch."""
    for user in news:
        histories.put(user.user_id, user.events, partition=user.partition)


def _chunks(places: Ints, size: int) -> Iterator[Ints]:
    """Consecutive runs of `places`, each spanning at most `size` of them."""
    begin = 0
    for end in range(1, len(places) + 1):
        if end == len(places) or places[end] - places[begin] >= size:
            yield places[begin:end]
            begin = end


def _first_fit(lengths: Ints, width: int) -> tuple[Ints, Ints, int]:
    """For each length its line and its begin there, and the number of lines."""
    line_of, begin_of = np.zeros_like(lengths), np.zeros_like(lengths)
    used = np.zeros(max(len(lengths), 1), np.int64)
    open_from = 0  # lines before it are full
    for i in np.argsort(-lengths, kind="stable"):
        line = open_from + int(np.argmax(used[open_from:] + lengths[i] <= width))
        line_of[i], begin_of[i] = line, used[line]
        used[line] += lengths[i]
        while open_from < len(used) - 1 and used[open_from] == width:
            open_from += 1
    return line_of, begin_of, max(int((used > 0).sum()), 1)


def _joined(parts: Sequence[NDArray[np.int64]]) -> Ints:
    return np.concatenate([np.zeros(0, np.int64), *parts])
