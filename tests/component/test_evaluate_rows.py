"""Rows on a real local Ray: they run once, wait for what they need, and are kept."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import ray
from rich.console import Console

from ray_jobs import own_ray
from ray_jobs.evaluate.results import Outcome
from ray_jobs.evaluate.rows import Job, Say, run_jobs
from services.core.errors import RefluxError


@dataclass(frozen=True, kw_only=True)
class Given:
    """`trace`: a file that every run adds its `name` to."""

    name: str
    trace: str
    fails: bool = False


def run(given: Given, say: Say) -> dict[str, Outcome]:
    say(0.5, "half way")
    with Path(given.trace).open("a") as trace:
        trace.write(f"{given.name}\n")
    if given.fails:
        raise ValueError("as asked")
    events = np.arange(3)
    return {given.name: Outcome(event_N=events, user_N=events, rank_N=events + 1)}


def prepare(given: Given, say: Say) -> dict[str, Outcome]:
    run(given, say)
    return {}


@pytest.fixture(autouse=True)
def local_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    own_ray.start(num_cpus=2)
    yield
    ray.shutdown()


def test_rows_run_after_what_they_need_and_only_once(tmp_path: Path) -> None:
    trace = tmp_path / "trace"

    def jobs(*, fails: bool) -> list[Job]:
        def given(name: str, **more: bool) -> Given:
            return Given(name=name, trace=str(trace), **more)

        return [
            Job(name="prepared", run=prepare, given=given("prepared"), rows=(), cpus=0),
            Job(name="a", run=run, given=given("a"), rows=("a",), needs=("prepared",)),
            Job(name="b", run=run, given=given("b", fails=fails), rows=("b",)),
        ]

    quiet = Console(quiet=True)
    with pytest.raises(RefluxError, match="failed: b"):
        run_jobs(jobs(fails=True), tmp_path / "out", console=quiet)
    ran = trace.read_text().split()
    assert sorted(ran) == ["a", "b", "prepared"]
    assert ran.index("prepared") < ran.index("a")

    files = run_jobs(jobs(fails=False), tmp_path / "out", console=quiet)
    assert trace.read_text().split() == [*ran, "b"]
    assert {row: len(Outcome.load(path)) for row, path in files.items()} == {"a": 3, "b": 3}
