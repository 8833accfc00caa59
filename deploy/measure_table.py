"""What a large catalog costs a teacher's workers: memory of each, and time of a step.

    python -m deploy.measure_table [ITEMS]

The teacher's own training step with a table of ITEMS x 64 (default 500,000), by one worker and by
two that hold all of it each (DDP), a part of it (FSDP), or its own rows of the table and never
more (FSDP with sampled negatives).
"""

import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from ray_jobs import parallel, recipes
from ray_jobs.teacher_steps import NextItemLoss, learn, optimizers_of
from services.core.models.teacher import Teacher

ITEMS: Final = 500_000
LINES, EVENTS, NEGATIVES, STEPS = 4, 256, 1_024, 6
WAYS: Final[dict[str, tuple[int, dict[str, bool]]]] = {
    "one worker": (1, {"sharded": False}),
    "two, each all of it": (2, {"sharded": False}),
    "two, FSDP, table gathered": (2, {"sharded": True}),
    "two, FSDP, table dealt out": (2, {"sharded": True, "rows_apart": True}),
}


def main(n_items: int) -> None:
    say("| workers | MB of each while it trains | at most | ms a step |\n|---|---|---|---|")
    for name, (world, how) in WAYS.items():
        with tempfile.TemporaryDirectory() as scratch:
            given = (world, how, n_items, Path(scratch))
            spawn(worker, given, nprocs=world)
            told = [np.loadtxt(Path(scratch) / str(rank)) for rank in range(world)]
        held_mb, most_mb, step_ms = np.max(told, axis=0)
        say(f"| {name} | {held_mb:.0f} | {most_mb:.0f} | {step_ms:.0f} |")


def worker(rank: int, world: int, how: dict[str, Any], n_items: int, scratch: Path) -> None:
    """One of `world` processes, which train on lines of their own and tell what it took."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if world > 1:
        meet = f"file://{scratch / 'meet'}"
        dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world)
    held_at_first, peak_at_first = memory_mb(), peak_mb()
    recipe = recipes.tiny_cpu()
    model = Teacher(replace(recipe.teacher, dim=64), n_rows=1 + n_items)
    popularity = np.random.default_rng(0).pareto(1.0, 1 + n_items)
    loss = NextItemLoss(model, popularity=popularity, negatives=NEGATIVES, mask_seen=False)
    wrapped = parallel.prepared(loss, model, device=torch.device("cpu"), **how)
    optimizers = optimizers_of(model, learning_rate=1e-3, train=recipe.train)
    batch = lines(np.random.default_rng(rank), popularity)
    held = []
    for step in range(STEPS):
        if step == 1:  # the first makes the optimizers' moments
            begin_s = time.perf_counter()
        learn(wrapped, model, optimizers, batch, rate=1.0)
        held.append(memory_mb() - held_at_first)
    step_ms = 1e3 * (time.perf_counter() - begin_s) / (STEPS - 1)
    np.savetxt(scratch / str(rank), [max(held[1:]), peak_mb() - peak_at_first, step_ms])
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def lines(random: np.random.Generator, popularity: np.ndarray) -> list[torch.Tensor]:
    """Rows, types, gaps, segments, targets: of users who have taken popular items."""
    odds = popularity[1:] / popularity[1:].sum()
    rows_BL = torch.from_numpy(1 + random.choice(len(odds), (LINES, EVENTS), p=odds))
    ones_BL = torch.ones_like(rows_BL)
    return [rows_BL, ones_BL, ones_BL, ones_BL, rows_BL.roll(-1, 1)]


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def memory_mb() -> float:
    return float(psutil.Process(os.getpid()).memory_full_info().uss) / 2**20


def peak_mb() -> float:
    """Of this process alone: what `getrusage` says begins with the parent's at the fork."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else ITEMS)
