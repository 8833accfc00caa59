"""Two workers, each with all of a teacher or a part of it, teach it what one would."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ray_jobs import parallel, recipes
from ray_jobs.shards import Shard
from ray_jobs.teacher_data import Interactions, Lines, history_of
from ray_jobs.teacher_steps import NextItemLoss, learn, optimizers_of
from services.core.catalog import Catalog
from services.core.models.teacher import Teacher

SHARDS, STEPS, N_ITEMS = 2, 6, 50
TEACHER = replace(recipes.smoke_cpu().teacher, dropout=0.0)  # its noise is each worker's own
SETS = replace(TEACHER, ordered=False, n_layers=0, n_recent=0)
TRAIN = replace(recipes.smoke_cpu().train, line_events=16)
CPU = torch.device("cpu")


def shards() -> tuple[list[Shard], np.ndarray]:
    rng = np.random.default_rng(0)
    n = 600
    catalog = Catalog()
    log = Interactions(
        users=rng.integers(0, 20, n),
        rows=catalog.add(f"i{item}" for item in rng.integers(0, N_ITEMS, n)),
        types=np.full(n, "click"),
        times_ms=np.arange(n) * 1000,
        values=np.full(n, np.nan),
    )
    history = history_of(log, catalog=catalog, n_shards=SHARDS, last_slice=0.0)
    return [one for one in history.shards if isinstance(one, Shard)], history.popularity


# How two workers hold a teacher, and what of the catalog they learn against.
WAYS: Final[dict[str, dict[str, Any]]] = {
    "each all of it": {"sharded": False, "negatives": 0},
    "each all of one of sets": {"sharded": False, "negatives": 0, "ordered": False},
    "each a part": {"sharded": True, "negatives": 0},
    "each a part, sampled": {"sharded": True, "negatives": 20},
}


def trained(
    rank: int, world: int, *, sharded: bool, negatives: int, kept: Path, ordered: bool = True
) -> list[float]:
    """Two halves with a checkpoint between them; the curve of the loss over all targets."""
    data, popularity = shards()
    curve: list[float] = []
    for half in range(2):
        torch.manual_seed(0)
        model = Teacher(TEACHER if ordered else SETS, n_rows=len(popularity))
        loss = NextItemLoss(model, popularity=popularity, negatives=negatives, mask_seen=True)
        wrapped = parallel.prepared(
            loss, model, device=CPU, sharded=sharded, rows_apart=negatives > 0
        )
        optimizers = optimizers_of(model, learning_rate=1e-2, train=TRAIN)
        if half:
            weights, moments = torch.load(kept, weights_only=True)
            parallel.restore(model, optimizers, weights, moments)
        mine = [
            Lines(data[n].sequences, line_events=16, batch_lines=2, seed=[0, n])
            for n in range(rank, SHARDS, world)
        ]
        for step in range(half * STEPS, (half + 1) * STEPS):
            parts = [lines.batch(step) for lines in mine]
            batch = [torch.cat(columns) for columns in zip(*parts, strict=True)]
            torch.manual_seed(step)  # the same rows drawn by all
            curve.append(mean(learn(wrapped, model, optimizers, batch, rate=1.0)))
        state = parallel.states(model, optimizers)
        parallel.whole(model)
        if rank == 0:
            torch.save(state, kept)
        if world > 1:
            dist.barrier()
    return curve


def mean(loss: Tensor) -> float:
    total = loss.clone()
    if parallel.world() > 1:
        dist.all_reduce(total)
    return float(total) / parallel.world()


def teach_together(rank: int, home: Path) -> None:
    """What each of two processes in a group does."""
    for name, way in WAYS.items():
        curve = trained(rank, 2, **way, kept=home / f"{name}.pt")
        if rank == 0:
            (home / name).write_text(" ".join(map(str, curve)))


def read(path: Path) -> Sequence[float]:
    return [float(value) for value in path.read_text().split()]


@pytest.mark.parametrize("name", WAYS)
def test_two_workers_learn_what_one_does(together: Path, tmp_path: Path, name: str) -> None:
    way = {**WAYS[name], "sharded": False}
    alone = trained(0, 1, **way, kept=tmp_path / "alone.pt")
    assert alone[-1] < alone[0] * 0.95
    weights, _ = torch.load(tmp_path / "alone.pt", weights_only=True)
    assert read(together / name) == pytest.approx(alone, rel=1e-5)
    theirs, _ = torch.load(together / f"{name}.pt", weights_only=True)
    assert theirs.keys() == weights.keys()
    for key, value in weights.items():
        torch.testing.assert_close(theirs[key], value, atol=1e-5, rtol=0)
