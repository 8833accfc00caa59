"""Events, metadata and restarts around one catalog, in any order that hypothesis finds."""

import numpy as np
import pyarrow as pa
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from services.core.catalog import TRENDING_HALF_LIFE_EVENTS, Catalog, content_tokens

ids = st.text(st.characters(codec="utf-8"), min_size=1, max_size=3)
texts = st.none() | st.text(st.characters(codec="utf-8"), max_size=12)


class CatalogMachine(RuleBasedStateMachine):
    """A row, once given, means the same item for ever; what is known of it is the latest word."""

    def __init__(self) -> None:
        super().__init__()
        self.catalog = Catalog()
        self.order: list[str] = []
        self.known: dict[str, tuple[str | None, list[str], str | None]] = {}
        self.popularity: dict[str, float] = {}

    @rule(events=st.lists(ids, max_size=6))
    def events_arrive(self, events: list[str]) -> None:
        rows = self.catalog.add(events)
        self.catalog.observe(rows)
        self._meet(events)
        fade = 0.5 ** (1 / TRENDING_HALF_LIFE_EVENTS)
        for item_id in events:
            self.popularity = {name: value * fade for name, value in self.popularity.items()}
            self.popularity[item_id] = self.popularity.get(item_id, 0.0) + 1.0

    @rule(items=st.lists(st.tuples(ids, texts, st.lists(ids, max_size=2), texts), max_size=4))
    def metadata_arrives(self, items: list[tuple[str, str | None, list[str], str | None]]) -> None:
        columns = list(zip(*items, strict=True)) if items else [(), (), (), ()]
        types = (pa.string(), pa.string(), pa.list_(pa.string()), pa.string())
        arrays = [pa.array(list(c), t) for c, t in zip(columns, types, strict=True)]
        self.catalog.describe(pa.table(arrays, ["item_id", "title", "categories", "text"]))
        self._meet([item[0] for item in items])
        self.known |= {item_id: rest for item_id, *rest in items}  # type: ignore[misc]

    @rule()
    def restart(self) -> None:
        self.catalog = Catalog.from_table(self.catalog.to_table())

    @invariant()
    def nothing_is_mixed_up(self) -> None:
        rows = range(1, len(self.order) + 1)
        assert len(self.catalog) == len(self.order) + 1
        assert self.catalog.ids(rows) == self.order
        assert self.catalog.rows(self.order).tolist() == list(rows)
        known = [self.known.get(item_id, (None, [], None)) for item_id in self.order]
        assert self.catalog.titles(rows) == [title for title, _, _ in known]
        assert self.catalog.categories(rows) == [categories for _, categories, _ in known]
        for row, what in zip(rows, known, strict=True):
            assert self.catalog.content[row].tolist() == content_tokens(*what).tolist()
        popularity = [0.0, *(self.popularity.get(item_id, 0.0) for item_id in self.order)]
        assert np.allclose(self.catalog.popularity, popularity)

    def _meet(self, item_ids: list[str]) -> None:
        self.order += [i for i in dict.fromkeys(item_ids) if i not in self.order]


TestCatalogMachine = CatalogMachine.TestCase
TestCatalogMachine.settings = settings(max_examples=30, stateful_step_count=12, derandomize=True)
