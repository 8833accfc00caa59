"""What is compiled, where there is no place to keep it."""

import pytest

from services.core.compiled import compiled


def test_without_a_folder_to_write_to_it_is_compiled_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("numba.core.caching.CacheImpl._locator_classes", [])
    assert compiled(lambda number: number + 1)(2) == 3
