"""Ranking quality from ranks, and predict-then-learn accounting.

A rank is 1 for the best; `MISS` stands for a target that could not be ranked (not in the catalog
when it was predicted). Shapes: N positions, V catalog rows.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MISS: Final = np.iinfo(np.int64).max
Ranks = NDArray[np.int64]


def ranks_of(scores_NV: Tensor, targets_N: Tensor, *, seen_NV: Tensor | None = None) -> Tensor:
    """Where each target stands among all items its user hasn't had (`seen_NV`: bool).

    Ties are counted half above, so a constant score earns no rank it doesn't deserve. A target of
    row 0 is a `MISS`, and so is each where a score isn't finite: nothing compares with NaN. The
    target itself is never masked.
    """
    own_N1 = scores_NV.gather(1, targets_N[:, None])
    rivals_NV = torch.ones_like(scores_NV, dtype=torch.bool) if seen_NV is None else ~seen_NV
    rivals_NV = rivals_NV.scatter(1, targets_N[:, None], False)
    rivals_NV[:, 0] = False
    above_N = ((scores_NV > own_N1) & rivals_NV).sum(1)
    ties_N = ((scores_NV == own_N1) & rivals_NV).sum(1)
    ranks_N = 1 + above_N + (ties_N + 1) // 2
    broken_N = ~scores_NV[:, 1:].sum(1).isfinite()
    return torch.where((targets_N == 0) | broken_N, MISS, ranks_N)


def hr_at(ranks: Ranks, k: int) -> float:
    """Share of targets within the first k; with one target each this is also recall@k."""
    return float((ranks <= k).mean()) if len(ranks) else 0.0


def ndcg_at(ranks: Ranks, k: int) -> float:
    """Mean of 1 / log2(1 + rank) within the first k, else 0 (one target each)."""
    return float(gains_at(ranks, k).mean()) if len(ranks) else 0.0


def mrr(ranks: Ranks) -> float:
    """Mean of 1 / rank; a miss counts 0."""
    return float(np.where(ranks == MISS, 0.0, 1.0 / ranks).mean()) if len(ranks) else 0.0


class Prequential:
    """Running quality of several named rankers over a stream: since the last version ("window")
    and since the start ("stream").

    Each event is predicted before it is learned. A mean is over the events that its ranker was
    asked about: the student's over all, a teacher's over those that came while it could answer.

    >>> quality = Prequential(k=10)
    >>> quality.add({"student": np.array([1, 40]), "popularity": np.array([3, MISS])})
    >>> quality.metrics()["window.student.hr@10"]
    0.5
    """

    def __init__(self, k: int = 10) -> None:
        self.k = k
        self._sums: dict[str, dict[str, dict[str, float]]] = {"window": {}, "stream": {}}
        self._events: dict[str, int] = {"window": 0, "stream": 0}

    def add(self, ranks: Mapping[str, Ranks]) -> None:
        """Take in one micro-batch: each ranker's ranks of the same events."""
        sizes = {len(values) for values in ranks.values()}
        if len(sizes) != 1:
            raise ValueError(f"rankers scored different numbers of events: {sorted(sizes)}")
        for span, sums in self._sums.items():
            self._events[span] += sizes.copy().pop()
            for name, values in ranks.items():
                total = sums.setdefault(name, {"events": 0.0, "hr": 0.0, "ndcg": 0.0})
                total["events"] += len(values)
                total["hr"] += float((values <= self.k).sum())
                total["ndcg"] += float(gains_at(values, self.k).sum())

    def metrics(self) -> dict[str, float]:
        """Flat: `window.events`, `window.student.ndcg@10`, `stream.teacher.hr@10`, ..."""
        flat: dict[str, float] = {}
        for span, sums in self._sums.items():
            flat[f"{span}.events"] = self._events[span]
            for name, total in sums.items():
                events = max(total["events"], 1.0)
                flat[f"{span}.{name}.hr@{self.k}"] = total["hr"] / events
                flat[f"{span}.{name}.ndcg@{self.k}"] = total["ndcg"] / events
        return flat

    @classmethod
    def total(cls, parts: "Sequence[Prequential]") -> "Prequential":
        """The accounts of several workers, each of events of its own, as one."""
        total = cls(parts[0].k)
        for part in parts:
            for span, sums in part._sums.items():
                total._events[span] += part._events[span]
                for name, more in sums.items():
                    into = total._sums[span].setdefault(name, dict.fromkeys(more, 0.0))
                    for key, value in more.items():
                        into[key] += value
        return total

    def start_window(self) -> None:
        """Begin a new window; the stream goes on."""
        self._sums["window"] = {}
        self._events["window"] = 0

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"k": self.k, "sums": self._sums, "events": self._events}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Prequential":
        restored = cls(state["k"])
        restored._sums = {s: {n: dict(t) for n, t in v.items()} for s, v in state["sums"].items()}
        restored._events = dict(state["events"])
        return restored


def gains_at(ranks: Ranks, k: int) -> NDArray[np.float64]:
    hit = ranks <= k
    return np.where(hit, 1.0 / np.log2(1.0 + np.where(hit, ranks, 1)), 0.0)
