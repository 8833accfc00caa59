"""What tables are made of: kept whole, metrics from ranks, intervals over users."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from ray_jobs.evaluate.results import Bootstrap, Cost, Outcome, saved_key
from ray_jobs.evaluate.rows import Job, key_of
from ray_jobs.evaluate.table import quality_lines, write
from services.core.metrics import MISS


def outcome(ranks: list[int], users: list[int] | None = None) -> Outcome:
    n = len(ranks)
    return Outcome(
        event_N=np.arange(n),
        user_N=np.arange(n) if users is None else np.array(users),
        rank_N=np.array(ranks),
        shown=3,
        catalog_rows=12,
        cost=Cost(parameters=5),
        notes={"why": "test"},
    )


def test_an_outcome_comes_back_as_it_was_kept(tmp_path: Path) -> None:
    kept = outcome([1, 7, MISS])
    kept.save(tmp_path / "rows" / "a.parquet", key="k")
    back = Outcome.load(tmp_path / "rows" / "a.parquet")
    assert saved_key(tmp_path / "rows" / "a.parquet") == "k"
    assert back.rank_N.tolist() == [1, 7, MISS]
    assert (back.shown, back.cost.parameters, back.notes) == (3, 5, {"why": "test"})


def test_precision_and_f1_follow_from_one_target_an_event() -> None:
    metrics = outcome([1, 11, MISS, 4]).metrics()
    assert metrics["hr@10"] == 0.5
    assert metrics["precision@10"] == pytest.approx(0.05)
    assert metrics["f1@10"] == pytest.approx(2 * 0.5 * 0.05 / 0.55)
    assert metrics["coverage"] == 0.25


def test_a_paired_interval_is_narrower_than_the_rows_own() -> None:
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(200), 5).tolist()
    easy = np.repeat(rng.random(200) < 0.3, 5)  # some users are easy for every ranker
    worse = np.where(easy, 1, 50)
    better = np.where(rng.random(1000) < 0.1, 1, worse)
    bootstrap = Bootstrap(
        {"a": outcome(worse.tolist(), users), "b": outcome(better.tolist(), users)}
    )
    low, high = bootstrap.interval(lambda mean: mean["b"] - mean["a"])
    own_low, own_high = bootstrap.interval(lambda mean: mean["a"])
    assert 0 < low < bootstrap.mean["b"] - bootstrap.mean["a"] < high
    assert high - low < own_high - own_low


def test_a_table_has_a_line_for_each_row(tmp_path: Path) -> None:
    rows = {"a": outcome([1, 2]), "b": outcome([3, MISS])}
    text = write(quality_lines(rows, Bootstrap(rows)), tmp_path / "t", title="T", command="c")
    assert [line.split(" | ")[0] for line in text.splitlines()[-2:]] == ["| a", "| b"]
    assert (tmp_path / "t.parquet").exists()


def test_a_row_is_known_again_by_what_it_was_given() -> None:
    def job(rate: float) -> Job:
        return Job(name="a", run=lambda given, say: {}, given=Given(rate), rows=("a",))

    assert key_of(job(0.1)) == key_of(job(0.1)) != key_of(job(0.2))


@dataclass(frozen=True)
class Given:
    rate: float
