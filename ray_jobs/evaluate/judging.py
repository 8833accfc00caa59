"""Walk a stream with a ranker: full ranking, seen items masked, a first event by what trends.

The same rules as `ray_jobs.ranking`, by which the distillation job scores itself.

Shapes: N events of the log, M of them at a time, S (event, seen row) pairs, V catalog rows.
"""

import copy
import time
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ray_jobs.evaluate.events import Events
from ray_jobs.evaluate.results import Outcome
from ray_jobs.evaluate.rows import Say
from services.core.catalog import TRENDING_HALF_LIFE_EVENTS
from services.core.metrics import Ranks, ranks_of
from services.core.models.recommender import Recommender

Ints = NDArray[np.int64]
Scores = NDArray[np.float32]

STEP_EVENTS = 500
LISTS_EVERY = 10  # steps: one top-10 list in so many counts for coverage
K = 10
FORWARDS = 20  # timed


class Ranker(Protocol):
    """Walks the stream with us."""

    def step(self, at: slice) -> Scores:
        """scores_MV of the next events, each from what came before it; they are learned then."""
        ...


class Past:
    """What each user had before each event; place_N tells how many."""

    def __init__(self, user_N: Ints, row_N: Ints) -> None:
        order_N = np.argsort(user_N, kind="stable")
        users = user_N[order_N]
        first_N = np.searchsorted(users, users)
        self._sorted_N = row_N[order_N]
        self._begin_N = np.empty_like(order_N)
        self._begin_N[order_N] = first_N
        self.place_N = np.empty_like(order_N)
        self.place_N[order_N] = np.arange(len(users)) - first_N

    def of(self, event: int) -> Ints:
        """Rows, oldest first."""
        begin = self._begin_N[event]
        return self._sorted_N[begin : begin + self.place_N[event]]


class Trending:
    """Interactions per item, halved over every `half_life_events`: what a user's first event is
    ranked by, and a ranker of its own."""

    def __init__(self, events: Events, first: int, *, half_life_events: float) -> None:
        self._row_N = events.row_N
        self._keep = 0.5 ** (1 / half_life_events)
        age_N = np.arange(first - 1, -1, -1)
        weight_N = self._keep**age_N
        self._count_V = np.bincount(events.row_N[:first], weight_N, minlength=len(events.item_ids))

    def step(self, at: slice) -> Scores:
        scores_MV = np.zeros((at.stop - at.start, len(self._count_V)), np.float32)
        for place, row in enumerate(self._row_N[at]):
            scores_MV[place] = self._count_V
            self._count_V *= self._keep
            self._count_V[row] += 1
        return scores_MV


def walk(ranker: Ranker, events: Events, past: Past, *, first: int, last: int, say: Say) -> Outcome:
    """Predict the real events of `first`..`last`; an item nobody has met before is a miss."""
    n_rows = len(events.item_ids)
    described = len(events.catalog(0))
    known_N = 1 + np.maximum.accumulate(np.append(described - 1, events.row_N))[:-1]
    trending = Trending(events, first, half_life_events=TRENDING_HALF_LIFE_EVENTS)
    shown_V = np.zeros(n_rows, bool)
    ranks: list[Ranks] = []
    for step, begin in enumerate(range(first, last, STEP_EVENTS)):
        at = slice(begin, min(begin + STEP_EVENTS, last))
        say((begin - first) / (last - first), f"event {begin - first:,}")
        scores_MV = torch.from_numpy(ranker.step(at))
        cold_M = torch.from_numpy(past.place_N[at] == 0)
        scores_MV[cold_M] = torch.from_numpy(trending.step(at))[cold_M]
        out_MV = torch.arange(n_rows) >= torch.from_numpy(known_N[at])[:, None]
        for place, event in enumerate(range(at.start, at.stop)):
            out_MV[place, past.of(event)] = True
        target_M = torch.from_numpy(np.where(events.row_N[at] < known_N[at], events.row_N[at], 0))
        ranks.append(ranks_of(scores_MV, target_M, seen_NV=out_MV).numpy())
        if step % LISTS_EVERY == 0:
            shown_V[top_rows(scores_MV, out_MV)] = True
    real_N = events.real_N[first:last]
    return Outcome(
        event_N=np.arange(first, last)[real_N],
        user_N=events.user_N[first:last][real_N],
        rank_N=np.concatenate(ranks)[real_N],
        shown=int(shown_V.sum()),
        catalog_rows=n_rows - 1,
    )


def top_rows(scores_MV: Tensor, out_MV: Tensor) -> Ints:
    """The distinct rows of the top-10 lists, without what is `out` and the padding."""
    scores_MV = scores_MV.masked_fill(out_MV, -torch.inf)
    scores_MV[:, 0] = -torch.inf
    rows: Ints = scores_MV.topk(min(K, scores_MV.shape[1] - 1), dim=1)[1].unique().numpy()
    return rows


@torch.no_grad()
def forward_ms(model: Recommender, *, context: int) -> float:
    """Median time of one user's scores over the catalog: `context` events, one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = copy.deepcopy(model).cpu().eval()
    features = [torch.ones(1, context, dtype=torch.long) for _ in range(3)]
    table_VD = model.encoder.item_table()
    took_s = []
    for _ in range(FORWARDS):
        begin_s = time.perf_counter()
        hidden_1LD = model(*features, table_VD=table_VD)
        model.scores(hidden_1LD[:, -1], table_VD=table_VD)
        took_s.append(time.perf_counter() - begin_s)
    torch.set_num_threads(threads)
    return 1000 * float(np.median(took_s))
