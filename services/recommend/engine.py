"""The ranking engine. Pure: (model, request, history, now) -> ranked items; no clock, no I/O.

Shapes: L events of the history, V catalog rows (row 0 is no item).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from services.core.events import EventType
from services.core.features import UserHistory
from services.core.models.sequences import Features, features_of
from services.core.models.serving import ServingStudent, best_of
from services.recommend.items import Items
from services.recommend.nearest import NARROW, Nearest
from services.recommend.schema import RecommendRequest

Rows = NDArray[np.int64]
Floats = NDArray[np.float32]
_PADDING: Final[Rows] = np.zeros(1, np.int64)  # row 0 is no item
_NOTHING: Final[Rows] = np.zeros(0, np.int64)
_NOBODY: Final = UserHistory(user_id="")

TRENDING: Final = "trending"
TRENDING_CATEGORIES: Final = "trending_categories"


@dataclass(frozen=True, eq=False)
class Model:
    """One student version and all that answers need of it. Never changed: a swap is one
    reference, and an answer that holds one can't mix two versions."""

    version: int
    teacher_version: int | None
    arrivals_ms: tuple[int, ...]  # of events it learned last: oldest, median, newest
    student: ServingStudent
    catalog: Items
    nearest: Nearest | None = None  # how a big catalog is searched; None: every item is scored

    def __post_init__(self) -> None:
        if self.student.n_rows != len(self.catalog):
            raise ValueError(
                f"{self.student.n_rows} model rows for {len(self.catalog)} catalog rows"
            )


@dataclass(frozen=True)
class Ranking:
    """Rows, best first, with their scores (logits, or popularity where `fallback` is trending)."""

    rows: list[int]
    scores: list[float]
    fallback: str | None
    ignored: list[str]


def rank(
    model: Model, request: RecommendRequest, history: UserHistory | None, *, now_ms: int
) -> Ranking:
    """The `request.n` best items for a user with `history` and, after it, the recent items.

    Every item that the filters leave is scored, but for a model with `nearest`. Without any known
    event: what is trending.
    """
    catalog = model.catalog
    recent = catalog.rows(_not_yet_in(history, request.recent_items))
    stored = catalog.rows(history.item_ids if history else ())
    features = _features(model, history, stored, recent, now_ms)

    personal = len(features.rows) > 0
    seen = () if request.include_seen else (stored, recent)
    excluded = np.concatenate([*seen, catalog.rows(request.exclude), _PADDING])
    among = _rows_in(model, request.categories) if request.categories else None
    if not personal:
        rows, scores = _best_of(catalog.popularity.copy(), request.n, excluded, among)
    else:
        h_D = model.student.state(*features)
        rows, scores = _nearest(model, h_D, request.n, excluded, among)
    fallback = None if personal else TRENDING_CATEGORIES if request.categories else TRENDING
    return Ranking(rows, scores, fallback, _unknown(model, request))


def _features(
    model: Model, history: UserHistory | None, stored: Rows, recent: Rows, now_ms: int
) -> Features:
    """The last known events as model input: the history, then the recent items, viewed just now.

    An item that this model doesn't know leaves no gap: it is as if it had not been.
    """
    rows = np.concatenate([stored, recent])
    known = np.flatnonzero(rows)[-model.student.max_events :]
    at = known[known < len(stored)]
    just_now = len(known) - len(at)
    past = history or _NOBODY
    # Only these few of perhaps hundreds become Python's objects.
    few = slice(at[0], at[-1] + 1) if len(at) else slice(0)
    types, values = list(past.event_types[few]), list(past.values[few])
    stamps_ms = list(past.timestamps_ms[few])
    if len(types) > len(at):  # items between them that this model doesn't know
        within = (at - at[0]).tolist()
        types, values = [types[i] for i in within], [values[i] for i in within]
        stamps_ms = [stamps_ms[i] for i in within]
    return features_of(
        rows[known],
        types + [EventType.VIEW.value] * just_now,
        np.asarray(stamps_ms + [now_ms] * just_now, np.int64),
        np.asarray(values + [np.nan] * just_now, np.float64),
    )


def _not_yet_in(history: UserHistory | None, recent_items: list[str]) -> list[str]:
    """The recent items less those that the stored history ends with already.

    A client may send what the user did just now both as events and as recent items.
    """
    if history is None or not recent_items:
        return recent_items
    stored = list(history.item_ids[-len(recent_items) :])
    for overlap in range(min(len(stored), len(recent_items)), 0, -1):
        if stored[-overlap:] == recent_items[:overlap]:
            return recent_items[overlap:]
    return recent_items


def _nearest(
    model: Model, h_D: Floats, n: int, excluded: Rows, among: Rows | None
) -> tuple[list[int], list[float]]:
    """The n best for a user's state: of a big catalog, among the candidates of a coarse look."""
    student, nearest = model.student, model.nearest
    if nearest is not None:
        if narrow := among is not None and len(among) < NARROW * student.n_rows:
            rows = among
        else:
            rows = nearest.candidates(h_D, excluded=excluded, among=among)
        scores = student.table_VD[rows] @ h_D + student.bias_V[rows]
        scores[np.isin(rows, excluded)] = -np.inf
        at, best = best_of(scores, n)
        if narrow or len(at) == n:
            return rows[at].tolist(), best.tolist()
    return _best_of(student.scores(h_D), n, excluded, among)


def _best_of(
    scores_V: Floats, n: int, excluded: Rows, among: Rows | None
) -> tuple[list[int], list[float]]:
    if among is not None:
        passing = np.full_like(scores_V, -np.inf)
        passing[among] = scores_V[among]
        scores_V = passing
    scores_V[excluded] = -np.inf
    rows, best = best_of(scores_V, n)
    return rows.tolist(), best.tolist()


def _rows_in(model: Model, categories: Iterable[str]) -> Rows:
    """The rows of items with at least one of the categories, ascending."""
    found = [model.catalog.in_category(name) for name in categories]
    known = [rows for rows in found if rows is not None]
    return known[0] if len(known) == 1 else np.unique(np.concatenate([*known, _NOTHING]))


def _unknown(model: Model, request: RecommendRequest) -> list[str]:
    """What of the request this model has never heard of, in the request's order."""
    ids = [i for i in (*request.recent_items, *request.exclude) if i not in model.catalog]
    names = [n for n in request.categories if model.catalog.in_category(n) is None]
    return list(dict.fromkeys([*ids, *names]))
