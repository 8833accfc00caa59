"""The ranking engine: what it leaves out, what it falls back on, and that it is exact."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.core.events import INTERACTIONS
from services.core.features import UserHistory
from services.core.models.sequences import features_of
from services.core.models.sizes import StudentConfig
from services.core.models.student import Student
from services.recommend import engine
from services.recommend.engine import TRENDING, TRENDING_CATEGORIES, Model, Ranking, rank
from services.recommend.items import Items
from services.recommend.schema import RecommendRequest
from services.recommend.shown import COVERAGE_S, NAMES, ShownItems
from services.recommend.telemetry import Telemetry
from tests.students import N_ITEMS, catalog, item

NOW_MS = 1_700_000_000_000


@pytest.fixture(scope="module")
def model() -> Model:
    made = catalog()
    torch.manual_seed(0)
    config = StudentConfig(dim=16, n_layers=2, n_heads=2, max_len=8, teacher_dim=16)
    student = Student(config, n_rows=len(made))
    student.describe(made.content)
    return Model(
        version=1,
        teacher_version=None,
        arrivals_ms=(),
        student=student.for_serving(),
        catalog=Items.of(made.to_table()),
    )


def history(*item_ids: str) -> UserHistory:
    n = len(item_ids)
    return UserHistory(
        user_id="u",
        item_ids=item_ids,
        event_types=("view",) * n,
        timestamps_ms=tuple(NOW_MS - 1_000 * (n - i) for i in range(n)),
        values=(float("nan"),) * n,
        event_keys=tuple(range(n)),
        n_events=n,
    )


def answer(
    model: Model, history: UserHistory | None = None, **request: object
) -> tuple[list[str], Ranking]:
    ranking = rank(model, RecommendRequest.model_validate(request), history, now_ms=NOW_MS)
    return model.catalog.ids(ranking.rows), ranking


def test_personal_answers_are_exact_and_leave_out_what_was_seen(model: Model) -> None:
    seen = history(item(1), item(2), "unheard-of", item(3))
    items, ranking = answer(model, seen, n=5)
    everything, all_ranked = answer(model, seen, n=100, include_seen=True)
    assert len(everything) == N_ITEMS
    assert all_ranked.scores == sorted(all_ranked.scores, reverse=True)
    assert items == [i for i in everything if i not in seen.item_ids][:5]
    assert ranking.fallback is None
    # One event more, and the order is another one.
    after, _ = answer(model, history(*seen.item_ids, item(4)), n=100, include_seen=True)
    assert after != everything


def columns(events: list[tuple[str, str, int, float]]) -> list[tuple[Any, ...]]:
    return [tuple(one[at] for one in events) for at in range(4)]


event = st.tuples(
    st.sampled_from([item(1), item(2), item(40), "unheard-of"]),
    st.sampled_from([*INTERACTIONS, "of a later version"]),
    st.integers(0, NOW_MS) | st.integers(NOW_MS - 10_000, NOW_MS + 10_000),
    st.floats(allow_infinity=False) | st.sampled_from([0.5, 1.5, 2.5, 4.5]),
)


@given(st.lists(event, max_size=40), st.lists(st.sampled_from([item(3), "new"]), max_size=3))
def test_answers_read_events_as_training_does(
    model: Model, events: list[tuple[str, str, int, float]], recent: list[str]
) -> None:
    events.sort(key=lambda one: one[2])
    known = [one for one in events if one[0] in model.catalog]
    known += [(one, "view", NOW_MS, np.nan) for one in recent if one in model.catalog]
    rows, types, stamps_ms, values = columns(known[-model.student.max_events :])
    ids, kinds, times_ms, stars = columns(events)
    past = UserHistory(
        user_id="u", item_ids=ids, event_types=kinds, timestamps_ms=times_ms, values=stars
    )
    catalog = model.catalog
    found = engine._features(model, past, catalog.rows(ids), catalog.rows(recent), NOW_MS)
    expected = features_of(
        catalog.rows(rows), types, np.asarray(stamps_ms, np.int64), np.asarray(values, float)
    )
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_filters_leave_only_what_passes_them_all(model: Model) -> None:
    items, ranking = answer(
        model,
        history(item(0)),
        n=100,
        categories=["comedy", "Western"],
        exclude=[item(3), "never-seen"],
    )
    assert sorted(items) == sorted(item(i) for i in range(6, N_ITEMS, 3))
    assert ranking.ignored == ["never-seen", "Western"]
    assert answer(model, history(item(0)), categories=["Western"])[0] == []


def test_without_a_known_event_it_is_what_is_trending(model: Model) -> None:
    for nobody in (None, history(), history("unheard-of")):
        items, ranking = answer(model, nobody, n=3)
        assert items == [item(7), item(8), item(9)]
        assert ranking.fallback == TRENDING
    items, ranking = answer(model, n=2, categories=["Horror"], exclude=[item(2)])
    assert items == [item(8), item(5)]
    assert ranking.fallback == TRENDING_CATEGORIES
    assert len(answer(model, n=100)[0]) == N_ITEMS


def test_recent_items_follow_the_history_once(model: Model) -> None:
    together, _ = answer(model, history(item(1)), recent_items=[item(2)], n=100)
    assert item(1) not in together and item(2) not in together
    ranking = answer(model, recent_items=[item(1), item(2)], n=100)[1]
    assert ranking.fallback is None
    # What the history ends with already isn't taken twice.
    stored = history(item(5), item(1), item(2))
    once = answer(model, stored, n=100)[1]
    assert answer(model, stored, recent_items=[item(1), item(2)], n=100)[1] == once
    assert answer(model, stored, recent_items=[item(2), item(1)], n=100)[1] != once


def test_a_model_and_a_catalog_of_different_sizes_are_refused(model: Model) -> None:
    with pytest.raises(ValueError, match="model rows"):
        replace(model, catalog=Items.of(catalog(n_items=3).to_table()))


def test_a_ranking_does_not_change_its_model(model: Model) -> None:
    before = answer(model, n=5)
    answer(model, history(item(7)), n=5)
    answer(model, categories=["Drama"], exclude=[item(7)])
    assert answer(model, n=5) == before
    assert np.isfinite(model.catalog.popularity[1:]).all()


def test_what_answers_are_made_of_is_counted(model: Model) -> None:
    telemetry, clock_s = Telemetry(), 0.0
    shown = ShownItems(telemetry, now_s=lambda: clock_s)
    made = catalog()
    made.observe(made.rows([item(i) for i in [*range(30), *range(6)] * 20]))
    known = Items.of(made.to_table())
    cold, tail, popular = known.rows([item(50), item(20), item(0)]).tolist()
    shown.add(known, [cold, tail, tail, popular])
    counts = [telemetry.places.labels(name)._value.get() for name in NAMES]
    assert counts == [1, 2, 1]
    assert telemetry.item_coverage._value.get() == pytest.approx(3 / N_ITEMS)
    clock_s = COVERAGE_S + 1
    shown.add(known, [popular])
    assert telemetry.item_coverage._value.get() == pytest.approx(1 / N_ITEMS)
