"""What answers are made of: new items or known ones, the popular few or the whole catalog."""

import time
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from services.recommend.items import Items
from services.recommend.telemetry import Telemetry

COVERAGE_S: Final = 600.0
COUNT_EVERY_S: Final = 5.0
NAMES: Final = ("cold", "tail", "popular")  # in the order of `Items.kinds`


class ShownItems:
    """Gathers the places of one replica's answers; counts and tells of them every few seconds."""

    def __init__(self, telemetry: Telemetry, *, now_s: Callable[[], float] = time.monotonic):
        self._places = [telemetry.places.labels(name) for name in NAMES]
        self._coverage = telemetry.item_coverage
        self._now_s = now_s
        self._items: Items | None = None
        self._rows: list[int] = []  # shown of `_items` and not counted yet
        self._shown_s: NDArray[np.float64] = np.zeros(0)  # per row, when last
        self._counts = np.zeros(len(NAMES), np.int64)  # not told yet
        self._counted_s = -COUNT_EVERY_S

    def add(self, items: Items, rows: Sequence[int]) -> None:
        """One answer from these items; a row means the same item in every version."""
        now_s = self._now_s()
        if items is not self._items:
            self._count(now_s)
            self._items = items
        self._rows.extend(rows)
        if now_s - self._counted_s >= COUNT_EVERY_S and len(items) > 1:
            self._counted_s = now_s
            self._count(now_s)
            self._tell(now_s, n_items=len(items) - 1)

    def _count(self, now_s: float) -> None:
        if self._items is None or not self._rows:
            return
        missing = len(self._items) - len(self._shown_s)
        self._shown_s = np.append(self._shown_s, np.full(max(0, missing), -np.inf))
        self._shown_s[self._rows] = now_s
        self._counts += np.bincount(self._items.kinds[self._rows], minlength=len(NAMES))
        self._rows.clear()

    def _tell(self, now_s: float, *, n_items: int) -> None:
        for counter, count in zip(self._places, self._counts.tolist(), strict=True):
            counter.inc(count)
        self._counts[:] = 0
        n_shown = np.count_nonzero(self._shown_s > now_s - COVERAGE_S)
        self._coverage.set(n_shown / n_items)
