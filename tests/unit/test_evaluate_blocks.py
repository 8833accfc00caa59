"""Blocks: who is ranked among what, what may be known when, and what the averages are of."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from ray_jobs import recipes
from ray_jobs.evaluate import block_rankers, blocks
from ray_jobs.evaluate.block_data import Blocks, Ints, load, ranks, recalls
from ray_jobs.evaluate.block_rankers import Had, Ranked, hidden_states
from ray_jobs.evaluate.options import Options
from ray_jobs.evaluate.results import Cost
from ray_jobs.evaluate.stream_teachers import COST
from ray_jobs.evaluate.students import save_teacher
from ray_jobs.spectral import start_items
from ray_jobs.teacher_data import history_of
from services.core.metrics import MISS
from services.core.models.sizes import EncoderConfig
from services.core.models.teacher import Teacher

N_BLOCKS, N_USERS, N_ITEMS = 3, 40, 120


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each user takes some items in each block; the same one may come again, in another split."""
    rng = np.random.default_rng(0)
    lines = []
    for block in range(N_BLOCKS):
        for user in range(N_USERS):
            for split, n in (("train", 6), ("valid", 2), ("test", 3)):
                items = rng.integers(0, N_ITEMS, n)
                lines += [(block, split, user, int(item)) for item in items]
    columns = dict(
        zip(("block", "split", "user_id", "item_id"), zip(*lines, strict=True), strict=True)
    )
    place = tmp_path_factory.mktemp("blocks") / "blocks.parquet"
    pq.write_table(pa.table({name: list(values) for name, values in columns.items()}), place)
    return place


@pytest.fixture(scope="module")
def data(path: Path) -> Blocks:
    return load(str(path), seed=0)


def test_recall_is_that_of_the_papers_code(data: Blocks) -> None:
    torch.manual_seed(0)
    table_UV = torch.randn(data.n_users, data.known_rows(2))
    rank_M = ranks(data, 1, lambda users: table_UV[torch.from_numpy(users)].clone())
    recall_U = recalls(data, 1, rank_M)
    had = {
        split: {
            user: set(pairs[1].row_M[pairs[1].user_M == user].tolist()) for user in range(N_USERS)
        }
        for split, pairs in data.splits.items()
    }
    for user in range(N_USERS):
        best = (table_UV[user, 1:].argsort(descending=True) + 1).tolist()
        left = [row for row in best if row not in had["train"][user] | had["valid"][user]]
        wanted = had["test"][user]
        assert recall_U[user] == pytest.approx(len(wanted & set(left[:20])) / len(wanted))


def test_an_item_nobody_has_met_yet_is_a_miss(data: Blocks) -> None:
    few = 30
    rank_M = ranks(data, 2, lambda users: torch.zeros(len(users), few))
    np.testing.assert_array_equal(rank_M[data.splits["test"][2].row_M >= few], MISS)


def test_a_block_is_all_that_a_ranker_may_know(data: Blocks) -> None:
    for block, end in enumerate(data.ends):
        had = Had(data, block)
        assert had.table_UV.shape == (N_USERS, int(data.events.row_N[:end].max()) + 1)
        pairs = set(zip(*had.table_UV.nonzero(), strict=True))
        expected = zip(data.events.user_N[:end], data.events.row_N[:end], strict=True)
        assert pairs == set(expected)


def test_each_block_is_judged_with_all_before_it(data: Blocks) -> None:
    asked: list[int] = []

    def ranker(block: int) -> Ranked:
        def scores(users: Ints) -> Tensor:
            asked.append(block)
            return torch.zeros(len(users), data.known_rows(block))

        return Ranked(scores=scores, cost=Cost(), notes={})

    outcome = blocks.judged(
        (ranker(block) for block in range(N_BLOCKS)), data, say=lambda done, words: None
    )
    assert asked == [0, 0, 1, 1, 1, 2, 2, 2, 2]  # the validation of its own, then the tests
    assert outcome.part_N is not None
    assert np.unique(outcome.part_N).tolist() == list(range(6))
    for part, task in ((1, 0), (4, 1)):
        there = outcome.part_N == part
        np.testing.assert_array_equal(outcome.user_N[there], data.splits["test"][task].user_M)


def test_a_set_is_read_whole_and_in_any_order(data: Blocks) -> None:
    torch.manual_seed(0)
    config = EncoderConfig(dim=16, n_layers=0, n_heads=1, max_len=64, ordered=False)
    model = Teacher(config, n_rows=data.known_rows(0))
    had_UV = Had(data, 0).table_UV
    hidden_UD = hidden_states(model, had_UV)
    for user in (0, 17):
        rows = torch.from_numpy(had_UV[user].indices[::-1].astype(np.int64).copy())[None]
        with torch.no_grad():
            expected_D = model(rows, rows.clamp_max(1), rows.clamp_max(1))[0, -1]
        torch.testing.assert_close(hidden_UD[user], expected_D)


def test_a_student_sees_each_block_as_its_teacher_does(data: Blocks, tmp_path: Path) -> None:
    recipe = recipes.load("blocks_cpu")
    recipe = replace(
        recipe,
        teacher=replace(recipe.teacher, dim=24),
        student=replace(recipe.student, dim=8, teacher_dim=24),
        distill=replace(recipe.distill, warm_up_learning_rate=1e-5, learning_rate=1e-5),
    )
    for end in data.ends:
        catalog = data.events.catalog(end)
        history = history_of(
            data.events.interactions(end), catalog=catalog, n_shards=1, last_slice=0.0
        )
        model = Teacher(recipe.teacher, n_rows=len(catalog))
        start_items(model, [shard.sequences for shard in history.shards])
        save_teacher(model, catalog, tmp_path / str(end))
        (tmp_path / str(end) / COST).write_text('{"elapsed_s": 1}')
    users = np.arange(N_USERS)
    walks = zip(
        block_rankers.teacher(data, tmp_path),
        block_rankers.student(data, recipe, folder=tmp_path, seed=0),
        strict=True,
    )
    for block, (taught_by, student) in enumerate(walks):
        theirs, ours = taught_by.scores(users)[:, 1:], student.scores(users)[:, 1:]
        assert ours.shape == (N_USERS, data.known_rows(block) - 1)
        alike = torch.corrcoef(torch.stack([theirs.flatten(), ours.flatten()]))[0, 1]
        assert alike > 0.5  # it begins as this block's teacher sees the items, and learns slowly


def test_a_recipe_that_reads_an_order_is_refused(path: Path, tmp_path: Path) -> None:
    options = Options(dataset=str(path), recipe="tiny_cpu", seed=0, out=tmp_path, home=tmp_path)
    with pytest.raises(ValueError, match="order"):
        blocks.jobs(options)
