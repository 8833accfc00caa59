"""Packed strings and the index over them: what a list and a dictionary would say."""

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.core.strings import StringIndex, Strings

texts = st.lists(st.text(max_size=20), max_size=60)


@given(texts, st.slices(70))
def test_packed_strings_read_as_a_list(strings: list[str], some: slice) -> None:
    packed = Strings.of(strings)
    assert list(packed) == strings and [packed[i] for i in range(len(packed))] == strings
    assert list(packed[some]) == strings[some]


@given(st.lists(texts, max_size=4), texts)
def test_an_index_finds_what_a_dictionary_would(parts: list[list[str]], others: list[str]) -> None:
    known: dict[str, int] = {}
    index = StringIndex.of(pa.array([], pa.string()))
    for part in parts:
        before, at_first = index, dict(known)
        for string in part:
            known.setdefault(string, len(known) + 1)
        index = StringIndex.of(pa.array(known, pa.string()), before)
        asked = [*known, *others]
        assert index.places(asked).tolist() == [known.get(one, 0) for one in asked]
        assert before.places(asked).tolist() == [at_first.get(one, 0) for one in asked]


def test_an_index_reads_a_slice_of_arrows_column() -> None:
    whole = pa.array([f"item-{i}" for i in range(50)])
    assert StringIndex.of(whole[10:20]).places(["item-9", "item-10", "item-19"]).tolist() == [
        *(0, 1, 10)
    ]


def test_of_another_beginning_nothing_is_taken_over() -> None:
    before = StringIndex.of(pa.array(["a", "b"]))
    assert StringIndex.of(pa.array(["b", "a", "c"]), before).places(["a"]).tolist() == [2]
    assert StringIndex.of(pa.array(["a"]), before).places(["a", "b"]).tolist() == [1, 0]
    with pytest.raises(ValueError, match="'a' stands there twice"):
        StringIndex.of(pa.array(["a", "b", "a"]), before)
