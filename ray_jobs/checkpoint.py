"""Everything that the distillation job must not lose, as ONE directory: it is whole or not there.

    student/ frozen/ proved/    weights and config (safetensors, JSON)
    optimizer.safetensors       moments by parameter name
    gains.safetensors           what the gate knows of the student
    catalog.parquet
    shared.json                 counters, teacher and student versions
    rank-00000/                 of each worker: histories.parquet, own.json (positions, ledger),
                                rng.safetensors
               manifest.json    hashes of all that it wrote, and how many workers there were

Ray Train stores the directory and only then counts it as a checkpoint. Nothing is pickled.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from ray_jobs.histories import Histories
from ray_jobs.learner import adam, set_learning_rate
from ray_jobs.recipes import DistillConfig
from services.core.catalog import Catalog
from services.core.metrics import Prequential
from services.core.models.student import Student

MANIFEST: Final = "manifest.json"
GAINS: Final = "gains.safetensors"

Ledger = dict[int, list[list[int]]]  # per partition the ranges [first, next) learned, in order


@dataclass(kw_only=True)
class Counters:
    """Plain numbers that outlive a restart."""

    seed: int = 0  # of what is replayed
    steps: int = 0
    events_learned: int = 0  # since warm-up
    rejected_in_a_row: int = 0
    learning_rate: float
    lists_answered: int = 0  # impressions that the user's next interaction answered ...
    lists_hit: int = 0  # ... with one of the items shown
    teacher: int | None = None
    first_teacher: int | None = None
    published: int | None = None  # the newest student version
    serving: int | None = None  # the newest promoted one
    proved: int | None = None  # the newest of those that were long no worse; candidates' yardstick
    items_until: dict[str, int] = field(default_factory=dict)  # positions in the items log
    teacher_ndcg: float = 0.0  # running means, for trust
    student_ndcg: float = 0.0


@dataclass(kw_only=True)
class State:
    """What the job knows. `frozen` and `proved` are None until a first version is published."""

    student: Student
    optimizer: torch.optim.Optimizer
    catalog: Catalog
    histories: Histories
    positions: dict[int, int]
    ledger: Ledger
    quality: Prequential
    counters: Counters
    frozen: Student | None = None
    proved: Student | None = None
    # (2, N): what the student and the proved one gained of the same events, all workers', as of the
    # newest version: the gate's evidence.
    gains: NDArray[np.float64] = field(default_factory=lambda: np.zeros((2, 0)))

    def learned(
        self,
        positions: Mapping[int, int],
        *,
        skipped: Mapping[int, tuple[int, int]] | None = None,
    ) -> None:
        """Enter into the ledger that everything before `positions` has been learned, but for what
        was skipped: offsets [first, next) that nobody has any more, by partition."""
        for partition, until in positions.items():
            begin = self.positions.get(partition, 0)
            first, following = (skipped or {}).get(partition, (begin, begin))
            self._enter(partition, begin, first)
            self._enter(partition, following, until)
            self.positions[partition] = until

    def _enter(self, partition: int, first: int, following: int) -> None:
        ranges = self.ledger.setdefault(partition, [])
        if ranges and ranges[-1][1] == first:
            ranges[-1][1] = following
        elif following > first:
            ranges.append([first, following])


def save(state: State, directory: Path, *, rank: int, world: int = 1) -> None:
    """Write this worker's part; worker 0 writes what all have in common."""
    own = directory / f"rank-{rank:05d}"
    own.mkdir(parents=True)
    pq.write_table(state.histories.to_table(), own / "histories.parquet", compression="zstd")
    _write_json(
        own / "own.json",
        {
            "positions": state.positions,
            "ledger": state.ledger,
            "quality": state.quality.state(),
        },
    )
    save_file({"torch_rng": torch.get_rng_state()}, own / "rng.safetensors")
    if rank == 0:
        for name in ("student", "frozen", "proved"):
            model = getattr(state, name)
            if model is not None:
                model.save(directory / name)
        save_file(_moments(state.student, state.optimizer), directory / "optimizer.safetensors")
        save_file({"gains": torch.from_numpy(state.gains).contiguous()}, directory / GAINS)
        pq.write_table(state.catalog.to_table(), directory / "catalog.parquet")
        _write_json(directory / "shared.json", vars(state.counters))
    written = [p for p in directory.rglob("*") if p.is_file() and _is_of(p, directory, rank)]
    hashes = {str(path.relative_to(directory)): _sha256(path) for path in written}
    _write_json(own / MANIFEST, {"world": world, "files": hashes})


def damage(directory: Path) -> str | None:
    """What is wrong with a checkpoint; None where it is all that every worker wrote."""
    try:
        parts = [json.loads(path.read_text()) for path in directory.glob(f"rank-*/{MANIFEST}")]
        if not parts or any(part["world"] != len(parts) for part in parts):
            return f"{len(parts)} workers' manifests are there"
        for part in parts:
            for name, expected in part["files"].items():
                if _sha256(directory / name) != expected:
                    return f"{name} is not what was written"
    except (OSError, ValueError, KeyError) as error:
        return repr(error)
    return None


def load(directory: Path, *, config: DistillConfig, rank: int = 0, world: int = 1) -> State:
    """What `save` wrote, possibly by another number of workers: partitions decide who owns what."""
    ranks = sorted(directory.glob("rank-*"))
    owns = [json.loads((path / "own.json").read_text()) for path in ranks]
    qualities = [Prequential.from_state(own["quality"]) for own in owns[rank::world]]
    counters = Counters(**json.loads((directory / "shared.json").read_text()))
    student = Student.load(directory / "student")
    optimizer = adam(student, config)
    set_learning_rate(optimizer, counters.learning_rate)
    _set_moments(student, optimizer, load_file(directory / "optimizer.safetensors"))
    state = State(
        student=student,
        optimizer=optimizer,
        catalog=Catalog.from_table(pq.read_table(directory / "catalog.parquet")),
        histories=Histories.from_tables(
            (pq.read_table(path / "histories.parquet") for path in ranks),
            keep=config.keep_events,
            rank=rank,
            world=world,
        ),
        positions=_owned([own["positions"] for own in owns], rank, world),
        ledger=_owned([own["ledger"] for own in owns], rank, world),
        quality=Prequential.total(qualities) if qualities else Prequential(),
        counters=counters,
        frozen=_load_if_there(directory / "frozen"),
        proved=_load_if_there(directory / "proved"),
    )
    if (directory / GAINS).exists():
        state.gains = load_file(directory / GAINS)["gains"].numpy()
    if len(owns) == world:
        # Last of all, for making a model draws from torch's generator.
        torch.set_rng_state(load_file(ranks[rank] / "rng.safetensors")["torch_rng"])
    return state


def _owned(parts: Iterable[Mapping[str, Any]], rank: int, world: int) -> dict[int, Any]:
    """What the workers knew by partition, of those that `rank` reads."""
    return {int(p): at for part in parts for p, at in part.items() if int(p) % world == rank}


def _load_if_there(directory: Path) -> Student | None:
    return Student.load(directory) if directory.exists() else None


def _moments(student: Student, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{key}": value
        for name, parameter in student.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _set_moments(
    student: Student, optimizer: torch.optim.Optimizer, moments: Mapping[str, torch.Tensor]
) -> None:
    parameters = dict(student.named_parameters())
    for path, value in moments.items():
        name, key = path.rsplit("/", 1)
        optimizer.state[parameters[name]][key] = value


def _is_of(path: Path, directory: Path, rank: int) -> bool:
    """Whether that worker writes this file of a checkpoint."""
    first = path.relative_to(directory).parts[0]
    return first == f"rank-{rank:05d}" or (rank == 0 and not first.startswith("rank-"))


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value))
