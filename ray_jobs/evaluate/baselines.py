"""What every learned row has to beat: rankers without a network, as strong as we can make them.

Each predicts an event from what came before it; some learn it at once, the others are fitted anew
as often as the teacher is refreshed. `SETTINGS` were searched on the warm-up half of MovieLens-1M
alone (`python -m ray_jobs.evaluate.tune`).

Shapes: N events of the log, M of them at a time, V catalog rows, F factors.
"""

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import scipy.sparse
from implicit.cpu.als import AlternatingLeastSquares
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from ray_jobs.evaluate.events import Events
from ray_jobs.evaluate.judging import Past, Ranker, Scores, Trending

Ints = NDArray[np.int64]
Fitted = Callable[[slice], Scores]

MAX_DENSE_ROWS: Final = 20_000  # beyond it a table of rows x rows takes more than 1.6 GB

SETTINGS: Final[dict[str, dict[str, Any]]] = {
    "popularity": {"half_life_events": 50_000.0},
    "ease": {"last": 10, "regularisation": 1000.0},
    "markov": {"reach": 10, "fading": 0.75, "norm": 0.75},
    "factorisation": {"factors": 64, "last": 10, "regularisation": 10.0, "alpha": 1.0},
}


def make(
    name: str, events: Events, past: Past, *, first: int, every: int, **settings: Any
) -> Ranker:
    """A baseline by name, with all before `first` learned; `every`: events between fits."""
    if name == "popularity":
        return Trending(events, first, **settings)
    if name == "markov":
        return Markov(events, past, first, **settings)
    fits: dict[str, Callable[..., Fitted]] = {"ease": ease, "factorisation": factorisation}
    fit = fits[name]
    return Refreshed(lambda until: fit(events, past, until, **settings), first=first, every=every)


class Markov:
    """What followed each of the user's last `reach` items, the nearest counting most.

    The one at distance d weighs d ** -fading, both when it is learned and when it predicts. What
    followed an item is divided by its sum to the power `norm`. Learns every event at once.
    """

    def __init__(
        self, events: Events, past: Past, first: int, *, reach: int, fading: float, norm: float
    ) -> None:
        self._row_N, self._past = events.row_N, past
        self._weights = np.arange(1, reach + 1, dtype=np.float32) ** -fading
        self._norm = norm
        n_rows = _dense_rows(events)
        self._count_VV = np.zeros((n_rows, n_rows), np.float32)
        self._sum_V = np.zeros(n_rows, np.float32)
        for event in range(first):
            self._learn(event, self._last(event))

    def step(self, at: slice) -> Scores:
        scores_MV = np.zeros((at.stop - at.start, len(self._sum_V)), np.float32)
        for place, event in enumerate(range(at.start, at.stop)):
            last = self._last(event)
            weights = self._weights[: len(last)] / np.maximum(self._sum_V[last], 1) ** self._norm
            np.dot(weights, self._count_VV[last], out=scores_MV[place])
            self._learn(event, last)
        return scores_MV

    def _last(self, event: int) -> Ints:
        """Newest first."""
        return self._past.of(event)[: -len(self._weights) - 1 : -1]

    def _learn(self, event: int, last: Ints) -> None:
        # An item may stand twice among the last; `add.at` counts both.
        np.add.at(self._count_VV, (last, self._row_N[event]), self._weights[: len(last)])
        np.add.at(self._sum_V, last, self._weights[: len(last)])


class Refreshed:
    """Fitted anew every `every` events; `fit(until)` learns all before `until`."""

    def __init__(self, fit: Callable[[int], Fitted], *, first: int, every: int) -> None:
        self._fit, self._every, self._due = fit, every, first
        self._scores: Fitted

    def step(self, at: slice) -> Scores:
        if at.start >= self._due:
            with threadpool_limits(1):  # one core a row, as everywhere
                self._scores = self._fit(at.start)
            self._due += self._every
        return self._scores(at)


def ease(events: Events, past: Past, until: int, *, last: int, regularisation: float) -> Fitted:
    """Item-to-item weights in closed form (Steck 2019), asked with the user's `last` items."""
    n_rows = _dense_rows(events)
    had_UV = _table(events.user_N[:until], events.row_N[:until], n_rows)
    had_UV.data[:] = 1.0
    gram_VV = (had_UV.T @ had_UV).toarray().astype(np.float64)
    gram_VV[np.diag_indices(n_rows)] += regularisation
    inverse_VV = np.linalg.inv(gram_VV)
    weight_VV = (inverse_VV / -np.diag(inverse_VV)).astype(np.float32)
    np.fill_diagonal(weight_VV, 0.0)

    def scores(at: slice) -> Scores:
        found: Scores = np.asarray(_asked(past, at, last, n_rows) @ weight_VV)
        return found

    return scores


def factorisation(
    events: Events,
    past: Past,
    until: int,
    *,
    factors: int,
    last: int,
    regularisation: float,
    alpha: float,
) -> Fitted:
    """Implicit-feedback matrix factorisation (Hu et al. 2008, the library `implicit`); a user's
    factors are those that fit the `last` items, computed at every event."""
    n_rows = len(events.item_ids)
    model = AlternatingLeastSquares(
        factors=factors,
        regularization=regularisation,
        alpha=alpha,
        num_threads=1,
        random_state=0,
    )
    had_UV = _table(events.user_N[:until], events.row_N[:until], n_rows)
    had_UV.data[:] = 1.0
    model.fit(had_UV, show_progress=False)

    def scores(at: slice) -> Scores:
        asked_MV = _asked(past, at, last, n_rows)
        user_MF = model.recalculate_user(np.arange(asked_MV.shape[0]), asked_MV)
        found: Scores = user_MF @ model.item_factors.T
        return found

    return scores


def _asked(past: Past, at: slice, last: int, n_rows: int) -> scipy.sparse.csr_matrix:
    """(M, V): 1 where an item is among the user's last before the event."""
    lasts = [past.of(event)[-last:] for event in range(at.start, at.stop)]
    places = np.repeat(np.arange(len(lasts)), [len(rows) for rows in lasts])
    asked_MV = _table(places, np.concatenate(lasts), n_rows, n_lines=len(lasts))
    asked_MV.data[:] = 1.0
    return asked_MV


def _table(
    lines: Ints, rows: Ints, n_rows: int, *, n_lines: int | None = None
) -> scipy.sparse.csr_matrix:
    n_lines = int(lines.max()) + 1 if n_lines is None else n_lines
    ones = np.ones(len(lines), np.float32)
    return scipy.sparse.csr_matrix((ones, (lines, rows)), shape=(n_lines, n_rows))


def _dense_rows(events: Events) -> int:
    n_rows = len(events.item_ids)
    if n_rows > MAX_DENSE_ROWS:
        raise ValueError(
            f"{n_rows} items: markov and ease keep a number for each pair of items, and take at "
            f"most {MAX_DENSE_ROWS}; leave them out with --rows"
        )
    return n_rows
