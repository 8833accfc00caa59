"""What answers know of the items: the same as the catalog, whatever is taken over from before."""

import pyarrow as pa
import pytest

from services.core.catalog import Catalog
from services.recommend.items import Items
from tests.students import catalog, item


def grown(*categories: list[str]) -> Catalog:
    """The test catalog, and new-0, new-1, ... of these categories."""
    made = catalog()
    new = {
        "item_id": [f"new-{i}" for i in range(len(categories))],
        "title": pa.nulls(len(categories), pa.string()),
        "categories": list(categories),
        "text": pa.nulls(len(categories), pa.string()),
    }
    made.describe(pa.table(new))
    return made


def renamed(item_id: str, title: str, categories: list[str]) -> pa.Table:
    columns = {"item_id": [item_id], "title": [title], "categories": [categories]}
    return pa.table({**columns, "text": pa.nulls(1, pa.string())})


def described(items: Items, made: Catalog) -> tuple[object, ...]:
    rows = range(1, len(made))
    assert len(items) == len(made)
    by_name = [items.in_category(name) for name in ("comedy", "HORROR", "Western", "none")]
    return (
        items.ids(rows),
        items.titles(rows),
        items.categories(rows),
        items.cards(rows),
        items.popularity[1:].tolist(),
        [None if found is None else found.tolist() for found in by_name],
        items.rows([*made.ids(rows), "unheard-of"]).tolist(),
    )


def test_takes_over_what_is_the_same_and_nothing_else() -> None:
    longer = grown(["comedy"], ["Western", "Horror"], [])
    other = grown(["Horror"])
    other.describe(renamed(item(1), "New", ["Comedy"]))
    items = None
    for made in (catalog(), longer, catalog(), other, longer, Catalog()):
        items = Items.of(made.to_table(), items)
        columns = (items.ids, items.titles, items.categories)
        cells = (column(range(1, len(made))) for column in columns)
        assert items.cards(range(1, len(made))) == list(zip(*cells, strict=True))
        assert described(items, made) == described(Items.of(made.to_table()), made)
        assert items.ids(items.rows(made.ids(range(1, len(made))))) == made.ids(range(1, len(made)))


def test_a_shorter_catalog_does_not_know_what_a_longer_one_has() -> None:
    long = Items.of(grown(["Western"]).to_table())
    short = Items.of(catalog().to_table(), long)
    assert "new-0" in long and "new-0" not in short
    assert short.rows(["new-0", item(0)]).tolist() == [0, 1]
    assert short.in_category("western") is None


def test_an_item_that_comes_back_otherwise_after_a_shorter_catalog_is_told_as_it_is() -> None:
    long = Items.of(grown(["Western"]).to_table())
    row = int(long.rows(["new-0"])[0])
    assert long.cards([row])[0].categories == ["Western"]
    short = Items.of(catalog().to_table(), long)
    again = Items.of(grown(["Noir"]).to_table(), short)
    assert again.cards([row])[0].categories == ["Noir"]


def test_a_category_named_twice_holds_the_item_once() -> None:
    items = Items.of(grown(["Noir", "noir", "Noir"], ["NOIR"]).to_table())
    found = items.in_category("noir")
    assert found is not None and items.ids(found) == ["new-0", "new-1"]


def test_an_older_version_goes_on_as_it_was_while_a_newer_one_is_made() -> None:
    old = Items.of(catalog().to_table())
    before = described(old, catalog())
    Items.of(grown(["Comedy"], ["Drama"]).to_table(), old)
    assert described(old, catalog()) == before and "new-0" not in old


def test_a_table_that_is_no_catalog_is_refused() -> None:
    table = catalog().to_table()
    with pytest.raises(ValueError, match=r"1\.\.n"):
        Items.of(table.slice(1))
    twice = table.set_column(1, "item_id", pa.array([item(0)] * len(table)))
    for previous in (None, Items.of(table.slice(0, 3))):
        with pytest.raises(ValueError, match="twice"):
            Items.of(twice, previous)
