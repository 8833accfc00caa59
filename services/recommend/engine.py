"""The ranking engine. Pure: (model, request, history, now) -> ranked items; no clock, no I/O.

Shapes: L events of the history, V catalog rows (row 0 is no item).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from services.core.compiled import compiled
from services.core.features import UserHistory
from services.core.models.sequences import N_GAPS, RATING, TYPES, VIEW, Features
from services.core.models.serving import ServingStudent, best_of
from services.core.strings import StringIndex
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
        rows, scores = _best_left(catalog.popularity.copy(), request.n, excluded, among)
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
    past = history or _NOBODY
    return Features(
        *_latest(
            stored,
            _types().places(past.event_types),
            np.asarray(past.timestamps_ms, np.int64),
            np.asarray(past.values, np.float64),
            recent,
            now_ms,
            model.student.max_events,
        )
    )


@cache
def _types() -> StringIndex:
    """An event type's place is its code."""
    return StringIndex.of(pa.array(TYPES))


@compiled
def _latest(
    stored: Rows,
    types: Rows,
    stamps_ms: Rows,
    values: NDArray[np.float64],
    recent: Rows,
    now_ms: int,
    most: int,
) -> tuple[Rows, Rows, Rows]:
    """Rows, types and gaps as `sequences.features_of` has them, of the last `most` known events."""
    rows, kinds = np.empty(most, np.int64), np.empty(most, np.int64)
    times_ms, gaps = np.empty(most, np.int64), np.zeros(most, np.int64)
    first = most  # they are filled from their end
    for i in range(len(stored) + len(recent) - 1, -1, -1):
        if first == 0:
            break
        is_recent = i >= len(stored)
        row = recent[i - len(stored)] if is_recent else stored[i]
        if row == 0:
            continue
        first -= 1
        rows[first] = row
        times_ms[first] = now_ms if is_recent else stamps_ms[i]
        kinds[first] = VIEW if is_recent else types[i]
        if kinds[first] == RATING and not math.isnan(values[i]):
            kinds[first] += int(min(max(float(np.rint(values[i])), 1.0), 5.0))
    for i in range(first + 1, most):
        gap_s = max(0, times_ms[i] - times_ms[i - 1]) / 1000
        gaps[i] = min(N_GAPS - 1, 1 + math.ceil(math.log2(1 + gap_s)))
    return rows[first:], kinds[first:], gaps[first:]


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
    return _best_left(student.scores(h_D), n, excluded, among)


def _best_left(
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
    asked = [*request.recent_items, *request.exclude]
    ids = [i for i, row in zip(asked, model.catalog.rows(asked), strict=True) if row == 0]
    names = [n for n in request.categories if model.catalog.in_category(n) is None]
    return list(dict.fromkeys([*ids, *names]))
