"""What answers need to know of the items, as Arrow columns: read in place, nothing copied.

A catalog of a million as Python lists takes seconds to make with the interpreter's lock held, and
every full garbage collection walks through it. A new version mostly brings what the one before
had, so `Items.of` takes over what is the same.

Shapes: V rows (row 0 is no item).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from services.core.strings import StringIndex

Rows = NDArray[np.int64]

COLUMNS: Final = ["row", "item_id", "title", "categories", "popularity"]
COLD_BELOW: Final = 5.0  # interactions, each halved over `TRENDING_HALF_LIFE_EVENTS`
POPULAR_SHARE: Final = 0.1  # of the catalog
COLD, TAIL, POPULAR = range(3)
_MOST_CARDS: Final = 50_000
_NOTHING: Final[Rows] = np.zeros(0, np.int64)


class Card(NamedTuple):
    """What an answer tells of an item."""

    item_id: str
    title: str | None
    categories: list[str] | None


@dataclass(frozen=True, eq=False)
class Items:
    """The catalog of one model version; `len(items)` is V."""

    popularity: NDArray[np.float32]  # (V,): interactions, decayed; row 0 has -inf
    _index: StringIndex
    _titles: pa.Array  # from row 1 on, like all columns
    _categories: pa.Array
    _rows_of_category: dict[str, Rows]  # by case-folded name
    _cards: dict[int, Card]  # by row, of items that were in an answer

    @classmethod
    def of(cls, table: pa.Table, previous: "Self | None" = None) -> Self:
        """From `Catalog.to_table`; ValueError where rows are not 1..n, each item once."""
        ids, titles, categories = (
            table[name].combine_chunks() for name in ("item_id", "title", "categories")
        )
        if not np.array_equal(table["row"].to_numpy(), np.arange(1, 1 + len(ids))):
            raise ValueError("catalog table: rows must be 1..n in order")
        try:
            index = StringIndex.of(ids, previous._index if previous else None)
        except ValueError as error:
            raise ValueError(f"catalog table: {error}") from None
        # Cards are by row: they stay where the rows mean the same items, and those are the same.
        same = (
            previous is not None
            and ids[: len(previous) - 1].equals(previous._index.strings)
            and _alike(titles, previous._titles)
            and _alike(categories, previous._categories)
        )
        popularity = np.full(1 + len(ids), -np.inf, np.float32)
        popularity[1:] = table["popularity"].to_numpy()
        return cls(
            popularity=popularity,
            _index=index,
            _titles=titles,
            _categories=categories,
            _rows_of_category=_rows_of_category(categories, previous),
            _cards=previous._cards if previous and same else {},
        )

    def __len__(self) -> int:
        return len(self.popularity)

    def __contains__(self, item_id: object) -> bool:
        return isinstance(item_id, str) and bool(self.rows([item_id])[0])

    def rows(self, item_ids: Sequence[str]) -> Rows:
        """The items' rows, in order; 0 for those that have none."""
        return self._index.places(item_ids) if len(item_ids) else _NOTHING

    def ids(self, rows: Sequence[int] | Rows) -> list[str]:
        return _taken(self._index.strings, rows)

    def titles(self, rows: Sequence[int] | Rows) -> list[str | None]:
        return _taken(self._titles, rows)

    def categories(self, rows: Sequence[int] | Rows) -> list[list[str] | None]:
        return _taken(self._categories, rows)

    def cards(self, rows: Sequence[int]) -> list[Card]:
        """What answers tell of these items, row 0 not among them.

        Kept, since few items are in most answers: ten cost 2 us, and 60 from Arrow's columns.
        """
        found = [self._cards.get(row) for row in rows]
        if missing := [row for row, card in zip(rows, found, strict=True) if card is None]:
            columns = (self.ids(missing), self.titles(missing), self.categories(missing))
            made = dict(zip(missing, map(Card, *columns), strict=True))
            if len(self._cards) + len(made) > _MOST_CARDS:
                self._cards.clear()
            self._cards.update(made)
            return [card or made[row] for row, card in zip(rows, found, strict=True)]
        return [card for card in found if card]

    @cached_property
    def kinds(self) -> NDArray[np.int8]:
        """Per row (V,): cold, in the tail, or among the most popular tenth."""
        kinds_V = np.where(self.popularity < COLD_BELOW, COLD, TAIL).astype(np.int8)
        if n_popular := int(POPULAR_SHARE * (len(self) - 1)):
            top = np.argpartition(self.popularity, -n_popular)[-n_popular:]
            kinds_V[top[kinds_V[top] != COLD]] = POPULAR
        return kinds_V

    def in_category(self, name: str) -> Rows | None:
        """The rows of a category, whatever its case; None: no item has it."""
        return self._rows_of_category.get(name.casefold())


def _alike(one: pa.Array, other: pa.Array) -> bool:
    """Whether the longer one begins with the shorter."""
    n_both = min(len(one), len(other))
    return bool(one[:n_both].equals(other[:n_both]))


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
