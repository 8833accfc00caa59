"""What answers need to know of the items, as Arrow columns: read in place, nothing copied.

A catalog of a million as Python lists takes seconds to make with the interpreter's lock held, and
every full garbage collection walks through it. A new version mostly brings what the one before
had, so `Items.of` takes over what is the same.

Shapes: V rows (row 0 is no item).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Rows = NDArray[np.int64]

COLUMNS: Final = ["row", "item_id", "title", "categories", "popularity"]
_NOTHING: Final[Rows] = np.zeros(0, np.int64)


@dataclass(eq=False)
class _Index:
    """Rows by item id, of the longest catalog so far; catalogs that it begins with share it."""

    ids: pa.Array
    row_of: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, ids: pa.Array, previous: "_Index | None") -> "_Index":
        if previous is not None:
            n_old = len(previous.ids)
            if previous.ids[: len(ids)].equals(ids[:n_old]):
                previous._take_in(ids[n_old:], first_row=1 + n_old)
                if len(ids) > n_old:
                    previous.ids = ids
                return previous
        index = cls(ids)
        index._take_in(ids, first_row=1)
        return index

    def _take_in(self, ids: pa.Array, *, first_row: int) -> None:
        rows = dict(zip(ids.to_pylist(), range(first_row, first_row + len(ids)), strict=True))
        if len(rows) != len(ids) or not self.row_of.keys().isdisjoint(rows):
            raise ValueError("catalog table: an item stands there twice")
        self.row_of.update(rows)


@dataclass(frozen=True, eq=False)
class Items:
    """The catalog of one model version; `len(items)` is V."""

    popularity: NDArray[np.float32]  # (V,): interactions, decayed; row 0 has -inf
    _index: _Index
    _titles: pa.Array  # from row 1 on, like all columns
    _categories: pa.Array
    _rows_of_category: dict[str, Rows]  # by case-folded name

    @classmethod
    def of(cls, table: pa.Table, previous: "Self | None" = None) -> Self:
        """From `Catalog.to_table`; ValueError where rows are not 1..n, each item once."""
        ids, titles, categories = (
            table[name].combine_chunks() for name in ("item_id", "title", "categories")
        )
        if not np.array_equal(table["row"].to_numpy(), np.arange(1, 1 + len(ids))):
            raise ValueError("catalog table: rows must be 1..n in order")
        popularity = np.full(1 + len(ids), -np.inf, np.float32)
        popularity[1:] = table["popularity"].to_numpy()
        return cls(
            popularity=popularity,
            _index=_Index.of(ids, previous._index if previous else None),
            _titles=titles,
            _categories=categories,
            _rows_of_category=_rows_of_category(categories, previous),
        )

    def __len__(self) -> int:
        return len(self.popularity)

    def __contains__(self, item_id: object) -> bool:
        return 0 < self._index.row_of.get(item_id, 0) < len(self)  # type: ignore[call-overload]

    def rows(self, item_ids: Iterable[str]) -> Rows:
        """The items' rows, in order; 0 for those that have none."""
        row_of, n_rows = self._index.row_of, len(self)
        rows = np.asarray([row_of.get(item_id, 0) for item_id in item_ids], np.int64)
        rows[rows >= n_rows] = 0  # of a longer catalog that shares the index
        return rows

    def ids(self, rows: Sequence[int] | Rows) -> list[str]:
        return _taken(self._index.ids, rows)

    def titles(self, rows: Sequence[int] | Rows) -> list[str | None]:
        return _taken(self._titles, rows)

    def categories(self, rows: Sequence[int] | Rows) -> list[list[str] | None]:
        return _taken(self._categories, rows)

    def in_category(self, name: str) -> Rows | None:
        """The rows of a category, whatever its case; None: no item has it."""
        return self._rows_of_category.get(name.casefold())


def _taken(column: pa.Array, rows: Sequence[int] | Rows) -> list[Any]:
    """What stands in these rows; None for row 0."""
    at = np.asarray(rows, np.int64)
    return column.take(pa.array(at - 1, mask=at == 0)).to_pylist()


def _rows_of_category(categories: pa.Array, previous: Items | None) -> dict[str, Rows]:
    """Rows by case-folded name; what earlier rows have is taken over where it is the same."""
    known: dict[str, Rows] = {}
    n_known = 0
    if previous is not None:
        n_old = len(previous._categories)
        if n_old <= len(categories) and previous._categories.equals(categories[:n_old]):
            known, n_known = previous._rows_of_category, n_old
            if n_old == len(categories):
                return known
    new = categories[n_known:]
    names = new.flatten().dictionary_encode()
    row_of_name = np.asarray(pc.list_parent_indices(new), np.int64) + 1 + n_known
    code_of_name = np.asarray(names.indices, np.int64)
    order = np.argsort(code_of_name, kind="stable")
    ends = np.cumsum(np.bincount(code_of_name, minlength=len(names.dictionary)))
    found = dict(known)
    groups = np.split(row_of_name[order], ends[:-1]) if len(ends) else []
    for name, rows in zip(names.dictionary.to_pylist(), groups, strict=True):
        folded = name.casefold()
        # A row counts once, even if an item names a category twice or in both cases.
        found[folded] = np.union1d(found.get(folded, _NOTHING), rows)
    return found
