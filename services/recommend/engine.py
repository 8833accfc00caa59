"""The ranking engine. Pure: (model, request, history, now) -> ranked items; no clock, no I/O.

Shapes: L events of the history, V catalog rows (row 0 is no item).
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from services.core.catalog import Catalog
from services.core.events import EventType
from services.core.features import UserHistory
from services.core.models.sequences import Features, features_of
from services.core.models.serving import ServingStudent
from services.recommend.schema import RecommendRequest

Rows = NDArray[np.int64]

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
    catalog: Catalog
    rows_of_category: Mapping[str, Rows]  # by case-folded name
    trending: Rows  # every item's row, the most popular first

    @classmethod
    def build(
        cls,
        *,
        version: int,
        teacher_version: int | None,
        arrivals_ms: tuple[int, ...],
        student: ServingStudent,
        catalog: Catalog,
    ) -> "Model":
        if student.n_rows != len(catalog):
            raise ValueError(f"{student.n_rows} model rows for {len(catalog)} catalog rows")
        popularity = catalog.popularity.copy()
        popularity[0] = -np.inf
        return cls(
            version=version,
            teacher_version=teacher_version,
            arrivals_ms=arrivals_ms,
            student=student,
            catalog=catalog,
            rows_of_category=_rows_of_category(catalog),
            trending=np.argsort(-popularity, kind="stable")[:-1],
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

    Exact: every item that the filters leave is scored. Without any known event: what is trending.
    """
    catalog = model.catalog
    recent = catalog.rows(_not_yet_in(history, request.recent_items))
    stored = catalog.rows(history.item_ids if history else ())
    features = _features(model, history, stored, recent, now_ms)

    personal = len(features.rows) > 0
    if personal:
        inputs = (torch.from_numpy(column)[None] for column in features)
        scores_V = model.student.score_next(*inputs).numpy()
    else:
        scores_V = catalog.popularity.astype(np.float32)
    if request.categories:
        scores_V[~_mask_of(model, request.categories)] = -np.inf
    if not request.include_seen:
        scores_V[stored] = -np.inf
        scores_V[recent] = -np.inf
    scores_V[catalog.rows(request.exclude)] = -np.inf
    scores_V[0] = -np.inf

    if personal:
        rows, scores = _best(scores_V, request.n)
    else:
        left = model.trending[np.isfinite(scores_V[model.trending])][: request.n]
        rows, scores = left.tolist(), scores_V[left].tolist()
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
    n_recent = len(recent)
    types = [*(history.event_types if history else ()), *([EventType.VIEW] * n_recent)]
    stamps_ms = np.asarray([*(history.timestamps_ms if history else ()), *([now_ms] * n_recent)])
    values = np.asarray([*(history.values if history else ()), *([np.nan] * n_recent)])
    return features_of(rows[known], [types[at] for at in known], stamps_ms[known], values[known])


def _not_yet_in(history: UserHistory | None, recent_items: list[str]) -> list[str]:
    """The recent items less those that the stored history ends with already.

    A client may send what the user did just now both as events and as recent items.
    """
    if history is None:
        return recent_items
    stored = list(history.item_ids[-len(recent_items) :])
    for overlap in range(min(len(stored), len(recent_items)), 0, -1):
        if stored[-overlap:] == recent_items[:overlap]:
            return recent_items[overlap:]
    return recent_items


def _best(scores_V: NDArray[np.float32], n: int) -> tuple[list[int], list[float]]:
    """The n highest finite scores, best first."""
    top = torch.topk(torch.from_numpy(scores_V), min(n, len(scores_V)))
    rows, scores = top.indices.tolist(), top.values.tolist()
    n_left = sum(map(math.isfinite, scores))
    return rows[:n_left], scores[:n_left]


def _mask_of(model: Model, categories: Iterable[str]) -> NDArray[np.bool_]:
    """True (V,) for items with at least one of the categories."""
    mask = np.zeros(len(model.catalog), bool)
    for name in categories:
        mask[model.rows_of_category.get(name.casefold(), [])] = True
    return mask


def _rows_of_category(catalog: Catalog) -> dict[str, Rows]:
    found: dict[str, list[int]] = {}
    for row, names in enumerate(catalog.categories(range(len(catalog)))):
        for name in names:
            found.setdefault(name.casefold(), []).append(row)
    return {name: np.asarray(rows, np.int64) for name, rows in found.items()}


def _unknown(model: Model, request: RecommendRequest) -> list[str]:
    """What of the request this model has never heard of, in the request's order."""
    ids = [i for i in (*request.recent_items, *request.exclude) if i not in model.catalog]
    names = [n for n in request.categories if n.casefold() not in model.rows_of_category]
    return list(dict.fromkeys([*ids, *names]))
