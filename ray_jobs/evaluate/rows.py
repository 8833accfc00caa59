"""Rows as Ray tasks: whoever is done is kept, whoever was done before isn't run again."""

import dataclasses
import hashlib
import json
import os
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from rich.console import Console

from ray_jobs import own_ray
from ray_jobs.evaluate.results import Outcome, saved_key
from services.core.errors import RefluxError

Say = Callable[[float, str], None]  # share of the work done, and what is being done
LOOK_EVERY_S = 1.0
TELL_EVERY_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run and the rows that come of it.

    run(given, say): a module's function; returns an outcome for each of `rows`. `given`: a frozen
    dataclass of plain values, all that the result depends on: it is the key by which a finished
    row is known again. needs: jobs by name that must be done before (a job without rows is run
    unless all who need it are done, and keeps what it makes itself).
    """

    name: str
    run: Callable[[Any, Say], Mapping[str, Outcome]]
    given: Any
    rows: tuple[str, ...]
    needs: tuple[str, ...] = ()
    cpus: float = 1.0  # 0 for one that only starts others (Ray Train takes its own)


def run_jobs(jobs: Sequence[Job], out: Path, *, console: Console | None = None) -> dict[str, Path]:
    """Run what isn't there yet, in parallel as Ray has room; the rows' files.

    Starts a local Ray where none is at hand. A job that fails ends the run, after the others;
    what is finished stays, so the same command goes on where this one ended.
    """
    console = console or Console(stderr=True)
    wanted = {job.name for job in jobs if job.rows and not _is_done(job, out)}
    by_name = {job.name: job for job in jobs}
    for job in reversed(jobs):
        if job.name in wanted:
            wanted.update(need for need in job.needs if not _is_done(by_name[need], out))
    todo = [job for job in jobs if job.name in wanted]
    kept = sum(bool(job.rows) and job.name not in wanted for job in jobs)
    console.print(f"{len(todo)} jobs to run, {kept} done before; rows in {out / 'rows'}")
    if todo:
        start_ray()
        _run(todo, out, console)
    return {row: _path(out, row) for job in jobs for row in job.rows}


def start_ray() -> None:
    """The Ray that RAY_ADDRESS names; without one a local Ray for this run alone."""
    if ray.is_initialized():
        return
    if "RAY_ADDRESS" in os.environ:
        own_ray.join(log_to_driver=False)
    else:
        own_ray.start()


def _run(jobs: Sequence[Job], out: Path, console: Console) -> None:
    board = ray.remote(num_cpus=0)(_Board).remote()
    refs: dict[str, Any] = {}
    for job in jobs:
        refs[job.name] = _task.options(num_cpus=job.cpus, name=job.name).remote(
            job, str(out), board, *(refs[need] for need in job.needs if need in refs)
        )
    waiting = {ref: name for name, ref in refs.items()}
    failed: list[str] = []
    told_s = 0.0
    while waiting:
        done, _ = ray.wait(list(waiting), num_returns=1, timeout=LOOK_EVERY_S)
        for ref in done:
            name = waiting.pop(ref)
            try:
                console.print(f"{name}: done in {ray.get(ref):.0f} s")
            except ray.exceptions.RayError as error:
                console.print(f"{name}: FAILED\n{error}", markup=False)
                failed.append(name)
        if time.monotonic() - told_s > TELL_EVERY_S:
            told_s = time.monotonic()
            for line in ray.get(board.lines.remote()):
                console.print(line, markup=False)
    if failed:
        raise RefluxError(f"failed: {', '.join(failed)}; what is done is kept")


@ray.remote(max_calls=1)  # a process of its own, so that peak memory is its own
def _task(job: Job, out: str, board: Any, *_: Any) -> float:
    begin_s = time.monotonic()
    board.begin.remote(job.name)
    outcomes = job.run(job.given, lambda done, words: board.say.remote(job.name, done, words))
    if set(outcomes) != set(job.rows):
        raise ValueError(f"{job.name} gave rows {sorted(outcomes)}, promised {sorted(job.rows)}")
    for row, outcome in outcomes.items():
        outcome.save(_path(Path(out), row), key=key_of(job))
    board.end.remote(job.name)
    return time.monotonic() - begin_s


class _Board:
    """Where running jobs say how far they are."""

    def __init__(self) -> None:
        self._began_s: dict[str, float] = {}
        self._said: dict[str, tuple[float, str]] = {}

    def begin(self, name: str) -> None:
        self._began_s[name] = time.monotonic()

    def say(self, name: str, done: float, words: str) -> None:
        self._said[name] = (done, words)

    def end(self, name: str) -> None:
        self._said.pop(name, None)

    def lines(self) -> list[str]:
        lines = []
        for name, (done, words) in self._said.items():
            spent_s = time.monotonic() - self._began_s[name]
            left = f"{spent_s * (1 - done) / done:.0f} s left" if done > 0 else "just begun"
            lines.append(f"{name}: {done:.0%}, {left}; {words}")
        return lines


def key_of(job: Job) -> str:
    """Changes with whatever the job is given."""
    return digest(f"{job.name} ", job.given)


def digest(prefix: str, given: Any) -> str:
    """Of all that a dataclass of plain values holds; an empty `content` says nothing."""

    def known(fields: list[tuple[str, Any]]) -> dict[str, Any]:
        return {name: value for name, value in fields if (name, value) != ("content", "")}

    values = json.dumps(dataclasses.asdict(given, dict_factory=known), sort_keys=True, default=str)
    return hashlib.sha256(f"{prefix}{values}".encode()).hexdigest()[:16]


def peak_mb() -> float:
    """Most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _is_done(job: Job, out: Path) -> bool:
    key = key_of(job)
    return bool(job.rows) and all(saved_key(_path(out, row)) == key for row in job.rows)


def _path(out: Path, row: str) -> Path:
    return out / "rows" / f"{row}.parquet"
