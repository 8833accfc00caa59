"""Item ids <-> model rows. Append-only: a row, once given, means the same item for ever.

Shapes: V rows (row 0 is padding and no item), C content tokens a row.
"""

import re
import zlib
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

N_CONTENT: Final = 16  # categories, year, decade, then title and text words, while there is room
TRENDING_HALF_LIFE_EVENTS: Final = 50_000

_YEAR = re.compile(r"\((\d{4})\)\s*$")
_WORD = re.compile(r"[^\W_]{3,}")
_STOP_WORDS = frozenset({"the", "and", "for", "with", "from", "der", "die", "das", "les", "des"})

SCHEMA: Final = pa.schema(
    [
        ("row", pa.int32()),
        ("item_id", pa.string()),
        ("title", pa.string()),
        ("categories", pa.list_(pa.string())),
        ("popularity", pa.float64()),
        ("content", pa.list_(pa.int32())),
    ]
)


class Catalog:
    """Which item each model row stands for, what is known of it, and how much it trends.

    `len(catalog)` is V, the number of rows that a model needs, padding included.
    """

    def __init__(self) -> None:
        self._row_of: dict[str, int] = {}
        self._ids: list[str] = [""]
        self._titles: list[str | None] = [None]
        self._categories: list[list[str]] = [[]]
        self._content = np.zeros((1, N_CONTENT), np.int32)
        self._popularity = np.zeros(1)

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, item_ids: Iterable[str]) -> NDArray[np.int64]:
        """The items' rows, in order; an item not seen before gets the next free row."""
        rows = []
        for item_id in item_ids:
            row = self._row_of.get(item_id)
            if row is None:
                row = self._row_of[item_id] = len(self._ids)
                self._ids.append(item_id)
                self._titles.append(None)
                self._categories.append([])
            rows.append(row)
        self._make_room()
        return np.asarray(rows, np.int64)

    def rows(self, item_ids: Iterable[str], *, missing: int = 0) -> NDArray[np.int64]:
        """The items' rows, in order; `missing` for those that have none."""
        row_of = self._row_of
        return np.asarray([row_of.get(item_id, missing) for item_id in item_ids], np.int64)

    def ids(self, rows: Iterable[int]) -> list[str]:
        return [self._ids[row] for row in rows]

    def titles(self, rows: Iterable[int]) -> list[str | None]:
        return [self._titles[row] for row in rows]

    def categories(self, rows: Iterable[int]) -> list[list[str]]:
        return [self._categories[row] for row in rows]

    @property
    def content(self) -> NDArray[np.int32]:
        """Content tokens (V, C): 31-bit hashes, 0 where there is none. A model takes them modulo
        its own number of buckets."""
        return self._content[: len(self)]

    @property
    def popularity(self) -> NDArray[np.float64]:
        """Interactions per row (V,), each halved over every `TRENDING_HALF_LIFE_EVENTS`."""
        return self._popularity[: len(self)]

    def describe(self, items: pa.Table) -> None:
        """Take over metadata: columns item_id, title, categories, text; later rows win.

        Items without a row get one: they can be recommended before anyone has touched them.
        """
        columns = [items[name].to_pylist() for name in ("item_id", "title", "categories", "text")]
        rows = self.add(columns[0])
        for row, title, categories, text in zip(rows, *columns[1:], strict=True):
            self._titles[row] = title
            self._categories[row] = categories or []
            self._content[row] = content_tokens(title, categories or [], text)

    def observe(self, rows: NDArray[np.int64]) -> None:
        """Count interactions, in order, into the decayed popularity."""
        if not len(rows):
            return
        age_events = np.arange(len(rows) - 1, -1, -1)
        weights = 0.5 ** (age_events / TRENDING_HALF_LIFE_EVENTS)
        self._popularity *= 0.5 ** (len(rows) / TRENDING_HALF_LIFE_EVENTS)
        self._popularity += np.bincount(rows, weights, minlength=len(self._popularity))
        self._popularity[0] = 0.0

    def trend(self, popularity_V: NDArray[np.float64]) -> None:
        """Take over popularity that was counted elsewhere."""
        self._popularity[: len(self)] = popularity_V
        self._popularity[0] = 0.0

    def to_table(self) -> pa.Table:
        """One line per item, ascending by row, padding left out (`SCHEMA`)."""
        content = [[int(token) for token in tokens if token] for tokens in self.content[1:]]
        columns = {
            "row": np.arange(1, len(self), dtype=np.int32),
            "item_id": self._ids[1:],
            "title": self._titles[1:],
            "categories": self._categories[1:],
            "popularity": self.popularity[1:],
            "content": content,
        }
        return pa.table(columns, schema=SCHEMA)

    @classmethod
    def from_table(cls, table: pa.Table) -> "Catalog":
        """The inverse of `to_table`; ValueError where rows are not 1..n, each item once."""
        catalog = cls()
        rows = catalog.add(table["item_id"].to_pylist())
        if not np.array_equal(rows, table["row"].to_numpy()):
            raise ValueError("catalog table: rows must be 1..n in order, and no item twice")
        catalog._titles[1:] = table["title"].to_pylist()
        catalog._categories[1:] = table["categories"].to_pylist()
        catalog._popularity[1 : len(catalog)] = table["popularity"].to_numpy()
        for row, tokens in enumerate(table["content"].to_pylist(), start=1):
            catalog._content[row, : len(tokens)] = tokens
        return catalog

    def copy(self) -> "Catalog":
        return Catalog.from_table(self.to_table())

    def _make_room(self) -> None:
        """Arrays grow by doubling, so that adding items one by one stays cheap."""
        have, need = len(self._content), len(self._ids)
        if need > have:
            more = max(need, 2 * have) - have
            self._content = np.pad(self._content, ((0, more), (0, 0)))
            self._popularity = np.pad(self._popularity, (0, more))


def content_tokens(
    title: str | None, categories: Sequence[str], text: str | None
) -> NDArray[np.int32]:
    """What an item is, as C hashed tokens, the most telling first; 0 where there are fewer.

    >>> content_tokens("Toy Story (1995)", ["Comedy"], None).nonzero()[0].size
    5
    """
    title = title or ""
    names = [f"category={name.casefold()}" for name in categories]
    year = _YEAR.search(title)
    if year:
        names += [f"decade={year[1][:3]}", f"year={year[1]}"]
    words = _WORD.findall(_YEAR.sub("", title).casefold())
    words += _WORD.findall((text or "").casefold())
    names += [f"word={word}" for word in words if word not in _STOP_WORDS]
    tokens = np.zeros(N_CONTENT, np.int32)
    for at, name in enumerate(list(dict.fromkeys(names))[:N_CONTENT]):
        tokens[at] = zlib.crc32(name.encode()) % (2**31 - 1) + 1
    return tokens
