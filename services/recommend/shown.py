"""What answers are made of: new items or known ones, the popular few or the whole catalog."""

import time
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from services.recommend.engine import Model
from services.recommend.telemetry import Telemetry

COLD_BELOW: Final = 5.0  # interactions, each halved over `TRENDING_HALF_LIFE_EVENTS`
POPULAR_SHARE: Final = 0.1  # of the catalog
COVERAGE_S: Final = 600.0
COUNT_EVERY_S: Final = 5.0
COLD, TAIL, POPULAR = range(3)
NAMES: Final = ("cold", "tail", "popular")


class ShownItems:
    """Counts the places of one replica's answers; tells of them every few seconds.

    Measured: 12 us an answer of ten on a busy machine.
    """

    def __init__(self, telemetry: Telemetry, *, now_s: Callable[[], float] = time.monotonic):
        self._places = [telemetry.places.labels(name) for name in NAMES]
        self._coverage = telemetry.item_coverage
        self._now_s = now_s
        self._version: int | None = None
        self._kinds_V: NDArray[np.int8] = np.zeros(0, np.int8)
        self._shown_s: NDArray[np.float64] = np.zeros(0)  # per row, when last
        self._counts = np.zeros(len(NAMES), np.int64)  # not told yet
        self._counted_s = -COUNT_EVERY_S

    def add(self, model: Model, rows: Sequence[int]) -> None:
        """One answer of `model`; a row means the same item in every version."""
        if model.version != self._version:
            self._version = model.version
            self._kinds_V = kinds_of(model)
            missing = len(self._kinds_V) - len(self._shown_s)
            self._shown_s = np.append(self._shown_s, np.full(max(0, missing), -np.inf))
        now_s = self._now_s()
        self._shown_s[rows] = now_s
        self._counts += np.bincount(self._kinds_V[rows], minlength=len(NAMES))
        if now_s - self._counted_s >= COUNT_EVERY_S and len(self._kinds_V) > 1:
            self._counted_s = now_s
            self._tell(now_s)

    def _tell(self, now_s: float) -> None:
        for counter, count in zip(self._places, self._counts.tolist(), strict=True):
            counter.inc(count)
        self._counts[:] = 0
        n_shown = np.count_nonzero(self._shown_s > now_s - COVERAGE_S)
        self._coverage.set(n_shown / (len(self._kinds_V) - 1))


def kinds_of(model: Model) -> NDArray[np.int8]:
    """Per row (V,): cold, in the tail, or among the most popular tenth."""
    popularity_V = model.catalog.popularity
    kinds_V = np.where(popularity_V < COLD_BELOW, COLD, TAIL).astype(np.int8)
    if n_popular := int(POPULAR_SHARE * (len(popularity_V) - 1)):
        top = np.argpartition(popularity_V, -n_popular)[-n_popular:]
        kinds_V[top[kinds_V[top] != COLD]] = POPULAR
    return kinds_V
