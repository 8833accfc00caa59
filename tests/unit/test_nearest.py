"""Big catalogs: nearly the exact answers, every filter kept, and cheap to renew."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from services.core.models.serving import ServingStudent
from services.core.models.sizes import StudentConfig
from services.core.models.student import Student
from services.recommend.engine import Model, rank
from services.recommend.items import Items
from services.recommend.nearest import DEPTH, RECALL, Nearest
from services.recommend.schema import RecommendRequest
from tests.students import CATEGORIES, catalog, item

N = 20_000
CONFIG = StudentConfig(dim=16, n_layers=1, n_heads=2, max_len=8, teacher_dim=16)


def student(n_items: int = N, *, seed: int = 0) -> ServingStudent:
    """Items in groups, as learned ones are: 300 centres and some noise."""
    random = np.random.default_rng(seed)
    torch.manual_seed(0)
    made = Student(CONFIG, n_rows=1 + n_items).eval()
    centres = np.random.default_rng(7).standard_normal((300, CONFIG.dim))
    group = np.random.default_rng(8).integers(0, 300, n_items)
    table_VD = centres[group] + 0.2 * random.standard_normal((n_items, CONFIG.dim))
    made.encoder.item_id.weight.data[1:] = torch.from_numpy(table_VD)
    made.bias_V.data[:] = torch.from_numpy(random.standard_normal(1 + n_items) * 0.3)
    return made.for_serving()


@pytest.fixture(scope="module")
def exact() -> Model:
    items = Items.of(catalog(n_items=N).to_table())
    return Model(version=1, teacher_version=None, arrivals_ms=(), student=student(), catalog=items)


@pytest.fixture(scope="module")
def model(exact: Model) -> Model:
    nearest = Nearest.build(exact.student, exact.catalog.popularity)
    assert nearest is not None and nearest.recall >= RECALL
    return replace(exact, nearest=nearest)


def ask(model: Model, recent: list[str], **request: object) -> list[str]:
    asked = RecommendRequest.model_validate({"recent_items": recent, **request})
    return model.catalog.ids(rank(model, asked, None, now_ms=0).rows)


def sessions(n: int) -> list[list[str]]:
    random = np.random.default_rng(1)
    return [[item(i) for i in random.integers(0, N, random.integers(1, 9))] for _ in range(n)]


def recall(model: Model, exact: Model, **request: object) -> float:
    request = {**request, "n": DEPTH}
    hits = [
        len(set(ask(model, recent, **request)) & set(ask(exact, recent, **request)))
        for recent in sessions(40)
    ]
    return sum(hits) / (DEPTH * len(hits))


def test_finds_what_exact_search_finds(model: Model, exact: Model) -> None:
    assert model.nearest is not None and model.nearest.n_candidates < N / 20
    assert recall(model, exact) >= RECALL - 0.01  # other sessions than it was measured on
    assert recall(model, exact, categories=["Drama", "horror"]) >= RECALL - 0.01
    found = rank(model, RecommendRequest(recent_items=[item(1)]), None, now_ms=0)
    wanted = rank(exact, RecommendRequest(recent_items=[item(1)]), None, now_ms=0)
    assert found.rows[0] == wanted.rows[0]
    np.testing.assert_allclose(found.scores[0], wanted.scores[0], rtol=1e-5)


def test_filters_are_kept_inside_the_search(model: Model) -> None:
    for recent in sessions(10):
        best = ask(model, recent, n=100)
        assert len(best) == 100 and not set(best) & set(recent)
        rest = ask(model, recent, n=100, exclude=best[::2])
        assert len(rest) == 100 and not set(rest) & {*best[::2], *recent}
        assert len(set(rest) & set(best[1::2])) >= 48
        drama = ask(model, recent, n=100, categories=["Drama"], exclude=best)
        assert len(drama) == 100 and not set(drama) & {*best, *recent}
        assert all(int(i.removeprefix("item-")) % len(CATEGORIES) == 1 for i in drama)
        assert set(best) <= set(ask(model, recent, n=100, include_seen=True)) | set(best[-8:])


def test_a_narrow_category_is_answered_exactly(exact: Model) -> None:
    made = catalog(n_items=N)
    rare = {item(i) for i in range(40, 70)}
    columns = {"item_id": list(rare), "title": list(rare), "categories": [["Rare"]] * len(rare)}
    made.describe(pa.table({**columns, "text": pa.nulls(len(rare), pa.string())}))
    scanned = replace(exact, catalog=Items.of(made.to_table()))
    popularity = scanned.catalog.popularity
    approximate = replace(scanned, nearest=Nearest.build(exact.student, popularity))
    for request in ({"categories": ["rare"]}, {"categories": ["Rare"], "exclude": [item(40)]}):
        answer = ask(approximate, [item(41)], n=100, **request)
        assert answer == ask(scanned, [item(41)], n=100, **request)
        assert set(answer) == rare - {item(41), *request.get("exclude", [])}


def test_the_next_version_finds_what_is_new(model: Model) -> None:
    grown = Items.of(catalog(n_items=N + 500).to_table(), model.catalog)
    learned = student(N + 500, seed=1)
    before = replace(model, student=learned, catalog=grown, nearest=None)
    (best,) = grown.rows(ask(before, [item(1)], n=1)).tolist()
    newest = len(grown) - 1  # much like the best so far, and better
    learned.table_VD = learned.table_VD.copy()
    learned.table_VD[newest] = learned.table_VD[best]
    learned.bias_V[newest] = learned.bias_V[best] + 0.1
    following = Nearest.build(learned, grown.popularity)
    assert following is not None and following.recall >= RECALL
    newer = replace(before, nearest=following)
    assert ask(newer, [item(1)], n=1) == grown.ids([newest])
    assert recall(newer, before) >= RECALL - 0.01


def test_items_that_are_like_no_others_are_found_too(exact: Model) -> None:
    apart = student()
    apart.table_VD = np.random.default_rng(0).standard_normal(apart.table_VD.shape, np.float32)
    scanned = replace(exact, student=apart)
    nearest = Nearest.build(apart, exact.catalog.popularity)
    assert recall(replace(scanned, nearest=nearest), scanned) >= RECALL - 0.01


def test_few_items_are_all_scored(exact: Model) -> None:
    assert Nearest.build(student(1_000), exact.catalog.popularity[:1_001]) is None
