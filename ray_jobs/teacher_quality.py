"""Whether a new teacher may teach: judged on the newest events before it has learned them.

Shapes: N judged events, V catalog rows, L events of one user.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ray_jobs.shards import Shard
from services.core.metrics import ndcg_at, ranks_of
from services.core.models.teacher import Teacher

MIN_JUDGED = 200  # fewer events say too little: the standard error of NDCG@10 is then over .02
CHUNK_EVENTS = 256  # of one user, ranked at once ...
CHUNK_SCORES = 2**24  # ... or fewer, where the catalog is large: 64 MB of scores


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Sums over judged events, so that workers' shares add up."""

    events: float = 0.0
    teacher: float = 0.0  # of NDCG@10
    popularity: float = 0.0

    def ndcg(self, total: float) -> float:
        return total / max(self.events, 1.0)


@torch.no_grad()
def judge(model: Teacher, shard: Shard, *, popularity: NDArray[np.float64]) -> Quality:
    """Rank each judged event among the items its user hasn't had, from all before it alone."""
    was_training = model.training
    model.eval()
    device = model.bias_V.device
    table_VD = model.encoder.item_table()
    popularity_V = torch.tensor(popularity, device=device)
    quality = Quality()
    size = max(1, min(CHUNK_EVENTS, CHUNK_SCORES // model.n_rows))
    for chunk in _chunks(shard, context=2 * model.config.max_len, size=size):
        features_1L = [torch.tensor(c, device=device)[None].long() for c in chunk.read]
        hidden_LD = model(*features_1L, table_VD=table_VD)[0]
        target_N = torch.tensor(chunk.targets, device=device).long()
        seen_NV = chunk.seen(model.n_rows).to(device)
        scores_NV = model.scores(hidden_LD[-len(target_N) :], table_VD=table_VD)
        ranks = ranks_of(scores_NV, target_N, seen_NV=seen_NV).cpu().numpy()
        trending = ranks_of(popularity_V.expand_as(scores_NV), target_N, seen_NV=seen_NV)
        n = len(ranks)
        quality = Quality(
            events=quality.events + n,
            teacher=quality.teacher + n * ndcg_at(ranks, 10),
            popularity=quality.popularity + n * ndcg_at(trending.cpu().numpy(), 10),
        )
    model.train(was_training)
    return quality


def verdict(
    quality: Quality, *, parent: Quality | None, finite: bool, max_worse: float
) -> tuple[bool, str]:
    """Whether to promote, and why. `parent` was judged on the same events."""
    if not finite:
        return False, "weights are not finite"
    if quality.events < MIN_JUDGED:
        return True, f"only {quality.events:.0f} new events to judge by"
    own, trending = quality.ndcg(quality.teacher), quality.ndcg(quality.popularity)
    compared = (
        f"NDCG@10 {own:.4f} on the last {quality.events:.0f} events, popularity {trending:.4f}"
    )
    if parent is not None:
        before = parent.ndcg(parent.teacher)
        compared += f", parent {before:.4f}"
        if own < before * (1 - max_worse):
            return False, f"worse than its parent: {compared}"
    if own <= trending:
        return False, f"no better than popularity: {compared}"
    return True, compared


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Neighbouring judged events of one user."""

    shard: Shard
    context: slice  # the events that predict: the last one predicts the last target
    targets: NDArray[Any]
    before: NDArray[Any]  # rows the user had before the first target

    @property
    def read(self) -> list[NDArray[Any]]:
        """What predicts the targets."""
        return [column[self.context] for column in self.shard.sequences.features]

    def seen(self, n_rows: int) -> Tensor:
        """seen_NV: what the user had before each target."""
        n = len(self.targets)
        seen = np.zeros((n, n_rows), bool)
        seen[:, self.before] = True
        later, earlier = np.tril_indices(n, -1)
        seen[later, self.targets[earlier]] = True
        return torch.from_numpy(seen)


def _chunks(shard: Shard, *, context: int, size: int) -> Iterator[_Chunk]:
    """A user's very first event has nothing to be predicted from, and isn't judged."""
    rows, starts = shard.sequences.features.rows, shard.sequences.starts
    judged = np.concatenate([[0], np.cumsum(shard.judged_E)])
    for start, end in pairwise(starts):
        # Judged events are their user's newest, late arrivals aside.
        first = max(start + 1, end - (judged[end] - judged[start]))
        for at in range(first, end, size):
            to = min(at + size, end)
            yield _Chunk(
                shard, slice(max(start, at - context), to - 1), rows[at:to], rows[start:at]
            )
