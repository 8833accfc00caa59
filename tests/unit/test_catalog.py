import numpy as np
import pyarrow as pa
import pytest

from services.core.catalog import N_CONTENT, Catalog, content_tokens


def items(*lines: tuple[str, str | None, list[str]]) -> pa.Table:
    ids, titles, categories = zip(*lines, strict=True)
    return pa.table(
        {"item_id": ids, "title": titles, "categories": categories, "text": [None] * len(ids)}
    )


def test_a_row_once_given_stays() -> None:
    catalog = Catalog()
    assert catalog.add(["a", "b", "a"]).tolist() == [1, 2, 1]
    assert catalog.add(["c", "b"]).tolist() == [3, 2]
    assert len(catalog) == 4
    assert catalog.rows(["c", "unknown"]).tolist() == [3, 0]
    assert catalog.ids([3, 1]) == ["c", "a"]


def test_metadata_may_come_before_or_after_the_first_event() -> None:
    catalog = Catalog()
    catalog.add(["a"])
    catalog.describe(items(("b", "Brazil (1985)", ["Sci-Fi"]), ("a", "Alien (1979)", ["Horror"])))
    assert catalog.rows(["a", "b"]).tolist() == [1, 2]
    assert catalog.titles([1, 2]) == ["Alien (1979)", "Brazil (1985)"]
    assert catalog.content.shape == (3, N_CONTENT)
    assert not catalog.content[0].any()


def test_content_puts_the_telling_tokens_first_and_shares_them() -> None:
    a = content_tokens("Toy Story (1995)", ["Comedy"], "toys at play " * 50)
    b = content_tokens("Toy Story 2 (1999)", ["Comedy"], None)
    assert a[:2].tolist() == b[:2].tolist()  # category, decade
    assert a[2] != b[2]  # year
    assert a[3:5].tolist() == b[3:5].tolist()  # toy, story
    assert (a >= 0).all()


def test_popularity_forgets() -> None:
    catalog = Catalog()
    a, b = catalog.add(["a", "b"])
    catalog.observe(np.full(1000, a))
    catalog.observe(np.full(400_000, b))
    assert catalog.popularity[a] == pytest.approx(1000 * 0.5**8, rel=0.02)
    one_by_one = Catalog()
    one_by_one.add(["a", "b"])
    for row in (1, 2, 1):
        one_by_one.observe(np.asarray([row]))
    at_once = Catalog()
    at_once.add(["a", "b"])
    at_once.observe(np.asarray([1, 2, 1]))
    np.testing.assert_allclose(one_by_one.popularity, at_once.popularity)


def test_table_and_back() -> None:
    catalog = Catalog()
    catalog.describe(items(("a", "Alien (1979)", ["Horror", "Sci-Fi"]), ("b", None, [])))
    catalog.observe(np.asarray([1, 1, 2]))
    again = Catalog.from_table(catalog.to_table())
    assert again.to_table() == catalog.to_table()
    np.testing.assert_array_equal(again.content, catalog.content)
    assert again.add(["new"]).tolist() == [3]
    with pytest.raises(ValueError, match="rows must be"):
        Catalog.from_table(catalog.to_table().slice(1))
