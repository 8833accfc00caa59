"""How a teacher learns: Ray Train on any number of workers.

Users are split into shards, shards among the workers, gradients averaged: with the same shards a
run is the same for any number of workers, up to the order in which floats are added (and to
dropout, whose noise each worker draws for itself). The newest events are kept apart until `REVEAL`
of the run, so that the model can be judged on them; then they are learned, too. A killed worker
costs what came after the last checkpoint.
"""

import copy
import dataclasses
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs
import ray
import ray.train
import torch
from numpy.typing import NDArray
from ray.train.torch import get_device
from torch import Tensor

from ray_jobs import own_ray
from ray_jobs.parallel import Optimizers, prepared, restore, states, whole, world
from ray_jobs.recipes import Recipe, TrainConfig
from ray_jobs.shards import History, Shard
from ray_jobs.spectral import start_items
from ray_jobs.teacher_data import Lines
from ray_jobs.teacher_quality import Quality, judge
from ray_jobs.teacher_steps import NextItemLoss, learn, optimizers_of, schedule
from ray_jobs.trainer import Trainer
from services.core.models.sequences import Sequences
from services.core.models.teacher import Teacher
from services.core.spans import filesystem

REVEAL = 0.85  # of the run; what follows learns the newest events
RUNS = "teacher-"  # names of their folders begin with it
TRAINING = "training.pt"
PROGRESS_EVERY_S = 5.0


@dataclass(frozen=True, eq=False, kw_only=True)
class Trained:
    """A teacher and what its training reported last (`Progress` and the loss, plain values)."""

    model: Teacher
    metrics: dict[str, Any]


def train(
    recipe: Recipe, history: History, *, parent: Teacher | None, seed: int, checkpoints: str
) -> Trained:
    """Train from scratch, or refresh `parent` (left as it is), on the Ray at hand.

    `history` has the recipe's number of shards. `checkpoints` is any URI that pyarrow
    reaches; what the run writes there is removed at its end.
    """
    torch.manual_seed(seed)
    model = (
        copy.deepcopy(parent) if parent else Teacher(recipe.teacher, n_rows=len(history.catalog))
    )
    model.grow(history.catalog.content)
    if recipe.train.spectral_start:  # cheap enough to be done anew at each refresh
        # The one thing that needs all users in one place, for catalogs of a size that allows it.
        start_items(model, [_here(shard).sequences for shard in history.shards])
    print(f"{model.n_parameters:,} parameters, {history.n_events:,} interactions", flush=True)
    name = f"{RUNS}{time.time_ns()}"
    try:
        trainer = _trainer(recipe, history, model, parent is not None, seed, name, checkpoints)
        result = trainer.fit()
        assert result.metrics is not None
        assert result.checkpoint is not None
        with result.checkpoint.as_directory() as directory:
            return Trained(model=Teacher.load(Path(directory)), metrics=result.metrics)
    finally:
        _remove(f"{checkpoints}/{name}")


@dataclass(frozen=True, eq=False, kw_only=True)
class Run:
    """All that workers need to know; lives in Ray's object store."""

    train: TrainConfig
    start: Teacher
    shards: list["ray.ObjectRef[Shard]"]
    popularity: NDArray[np.float64]
    total_steps: int
    max_s: float
    learning_rate: float
    seed: int
    has_parent: bool


@dataclass(kw_only=True)
class Progress:
    """Where training stands; part of every checkpoint."""

    step: int = 0
    elapsed_s: float = 0.0
    parent: Quality | None = None
    quality: Quality | None = None  # known from REVEAL on
    resumed: int = 0  # times that a worker was lost


def _trainer(
    recipe: Recipe,
    history: History,
    model: Teacher,
    warm: bool,
    seed: int,
    name: str,
    checkpoints: str,
) -> Trainer:
    train = recipe.train
    epochs = train.refresh_epochs if warm else train.max_epochs
    events_per_step = len(history.shards) * train.batch_lines * train.line_events
    run = Run(
        train=train,
        start=model,
        shards=[ray.put(one) if isinstance(one, Shard) else one for one in history.shards],
        popularity=history.popularity,
        total_steps=max(1, round(epochs * history.n_events / events_per_step)),
        max_s=train.refresh_train_s if warm else train.max_train_s,
        learning_rate=train.refresh_learning_rate if warm else train.learning_rate,
        seed=seed,
        has_parent=warm,
    )
    return Trainer(
        train_worker,
        {"run": ray.put(run)},
        scaling=ray.train.ScalingConfig(
            num_workers=train.num_workers,
            placement_strategy=train.placement,
            use_gpu=train.use_gpu,
            resources_per_worker={
                "CPU": train.cpus_per_worker,
                "GPU": train.gpu_share if train.use_gpu else 0.0,
            },
        ),
        run=ray.train.RunConfig(
            name=name,
            storage_path=checkpoints,
            failure_config=ray.train.FailureConfig(max_failures=train.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),  # INFO: every report
        ),
    )


def train_worker(config: dict[str, Any]) -> None:
    """What every worker runs; all of them take the same decisions at the same steps."""
    run: Run = ray.get(config["run"])
    train = run.train
    context = ray.train.get_context()
    rank = context.get_world_rank()
    shards: dict[int, Shard] = {
        number: ray.get(run.shards[number]) for number in range(rank, len(run.shards), world())
    }
    own_ray.step_back(train.niceness)
    torch.set_num_threads(train.threads_per_worker)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(run.seed + rank)

    model, device = run.start, get_device()
    wrapped = prepared(
        NextItemLoss(
            model,
            popularity=run.popularity,
            negatives=train.sampled_negatives,
            mask_seen=train.mask_seen,
            bf16=train.bf16,
        ),
        model,
        device=device,
        sharded=train.fsdp,
        rows_apart=train.sampled_negatives > 0,
    )
    optimizers = optimizers_of(model, learning_rate=run.learning_rate, train=train)
    progress = resume(model, optimizers)

    def lines_of(number: int, sequences: Sequences) -> Lines:
        return Lines(
            sequences,
            line_events=train.line_events,
            batch_lines=train.batch_lines,
            seed=[run.seed, number],
            ordered=model.config.ordered,
        )

    def judged() -> Quality:
        judging = whole(model)
        return summed(judge(judging, shard, popularity=run.popularity) for shard in shards.values())

    past = [lines_of(number, shard.past()) for number, shard in shards.items()]
    everything = [lines_of(number, shard.sequences) for number, shard in shards.items()]
    if run.has_parent and progress.parent is None:
        progress.parent = judged()

    begin = time.monotonic() - progress.elapsed_s
    loss = torch.tensor(float("nan"))
    said_s = saved_s = progress.elapsed_s
    model.train()
    while True:
        progress.elapsed_s = of_rank_0(time.monotonic() - begin)
        done = max(progress.step / run.total_steps, progress.elapsed_s / run.max_s)
        if progress.quality is None and done >= REVEAL:
            progress.quality = judged()
        if done >= 1:
            break
        if rank == 0 and progress.elapsed_s >= said_s + PROGRESS_EVERY_S:
            said_s = progress.elapsed_s
            left_s = said_s * (1 - done) / done
            print(
                f"{done:.0%}  step {progress.step}  loss {loss:.3f}  {left_s:.0f} s left",
                flush=True,
            )
        if progress.elapsed_s >= saved_s + train.checkpoint_every_s:
            saved_s = progress.elapsed_s
            report(model, optimizers, progress, loss)

        lines = past if progress.quality is None else everything
        parts = [one.batch(progress.step) for one in lines]
        batch = [torch.cat(columns).to(device) for columns in zip(*parts, strict=True)]
        loss = learn(wrapped, model, optimizers, batch, rate=schedule(done, warm_up=train.warm_up))
        progress.step += 1
    report(model, optimizers, progress, loss)


def report(model: Teacher, optimizers: Optimizers, progress: Progress, loss: Tensor) -> None:
    """Checkpoint (rank 0) and metrics (all: Ray Train waits for every worker)."""
    metrics = {"loss": float(loss), **dataclasses.asdict(progress)}
    weights, moments = states(model, optimizers)
    if ray.train.get_context().get_world_rank() != 0:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as temporary:
        model.save(Path(temporary), weights)
        state = {"optimizers": moments, "progress": dataclasses.asdict(progress)}
        torch.save(state, Path(temporary) / TRAINING)
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(temporary))


def resume(model: Teacher, optimizers: Optimizers) -> Progress:
    """Go on from the last checkpoint of this run, if there is one."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return Progress()
    with checkpoint.as_directory() as directory:
        weights = Teacher.load(Path(directory)).state_dict()
        state = torch.load(Path(directory) / TRAINING, weights_only=True)
    restore(model, optimizers, weights, state["optimizers"])
    stored = state["progress"]
    for name in ("parent", "quality"):
        stored[name] = Quality(**stored[name]) if stored[name] else None
    stored["resumed"] += 1
    progress = Progress(**stored)
    print(f"resuming at step {progress.step}", flush=True)
    return progress


def of_rank_0(value: float) -> float:
    """What rank 0 measured, on every worker."""
    if world() == 1:
        return value
    shared = torch.tensor(value, dtype=torch.float64, device=get_device())
    torch.distributed.broadcast(shared, src=0)
    return float(shared)


def summed(qualities: Iterable[Quality]) -> Quality:
    """Over all shards of all workers."""
    own = [dataclasses.astuple(quality) for quality in qualities]
    sums = torch.tensor(own, dtype=torch.float64, device=get_device()).sum(0)
    if world() > 1:
        torch.distributed.all_reduce(sums)
    events, teacher, popularity = sums.tolist()
    return Quality(events=events, teacher=teacher, popularity=popularity)


def _here(shard: "Shard | ray.ObjectRef[Shard]") -> Shard:
    return shard if isinstance(shard, Shard) else ray.get(shard)


def remove_leftovers(checkpoints: str) -> None:
    """Delete what runs left whose driver was killed: a registry's teachers come one at a time."""
    fs, root = filesystem(checkpoints)
    for info in fs.get_file_info(pyarrow.fs.FileSelector(root, allow_not_found=True)):
        if info.base_name.startswith(RUNS):
            _remove(f"{checkpoints}/{info.base_name}")


def _remove(uri: str) -> None:
    """Delete a run's checkpoints: what counts of a finished one is in the registry now."""
    fs, path = filesystem(uri)
    with suppress(OSError):
        fs.delete_dir(path)
