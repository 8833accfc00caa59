"""The stream protocol in memory: what is judged, what is masked, what may be known when."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest

from ray_jobs import recipes
from ray_jobs.evaluate import baselines, stream
from ray_jobs.evaluate.events import Events, LogChoice, load
from ray_jobs.evaluate.judging import Past, Scores, walk
from ray_jobs.evaluate.options import Options
from ray_jobs.evaluate.rows import key_of
from ray_jobs.evaluate.students import ArraySource, ArrayTeachers, distil, save_teacher
from services.core.metrics import MISS
from services.core.models.sizes import EncoderConfig
from services.core.models.teacher import Teacher

N = 600
TEACHER = EncoderConfig(dim=16, n_layers=1, n_heads=2, max_len=8)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve users who walk in circles over thirty items, one item later than the next."""
    rng = np.random.default_rng(0)
    users = rng.integers(0, 12, N)
    steps = np.array([np.sum(users[:i] == user) for i, user in enumerate(users)])
    items = (users * 3 + steps + rng.integers(0, 2, N)) % 30
    table = pa.table(
        {"user_id": [f"u{u}" for u in users], "item_id": [f"i{i}" for i in items]}
    ).append_column("timestamp", pa.array(np.arange(N) // 2))
    path = tmp_path_factory.mktemp("log") / "circles.csv"
    pyarrow.csv.write_csv(table, path)
    return path


def events_of(log: Path, noise: str = "") -> Events:
    return load(
        LogChoice(dataset=str(log), home=log.parent, data="", ties="shuffled", noise=noise, seed=0)
    )


@pytest.mark.parametrize(
    ("noise", "more"), [("random:0.2", 120), ("duplicates:0.1", 60), ("bot", 12)]
)
def test_noise_is_added_and_never_judged(log: Path, noise: str, more: int) -> None:
    clean, noisy = events_of(log), events_of(log, noise)
    assert len(noisy) == N + more
    real = noisy.real_N
    assert [noisy.item_ids[row] for row in noisy.row_N[real]] == [
        clean.item_ids[row] for row in clean.row_N
    ]
    assert real[noisy.half :].sum() == N // 2
    # A catalog only ever grows, whoever brought an item up first.
    assert noisy.catalog(len(noisy)).ids(range(1, 20)) == noisy.item_ids[1:20]


def test_an_unknown_kind_of_noise_is_refused(log: Path) -> None:
    with pytest.raises(ValueError, match="random:SHARE"):
        events_of(log, "hail")


class Constant:
    """Prefers the highest row, always."""

    def __init__(self, n_rows: int) -> None:
        self._n_rows = n_rows

    def step(self, at: slice) -> Scores:
        return np.tile(np.arange(self._n_rows, dtype=np.float32), (at.stop - at.start, 1))


def test_ranks_are_among_what_is_known_and_not_had(log: Path) -> None:
    events = events_of(log)
    past = Past(events.user_N, events.row_N)
    outcome = walk(
        Constant(len(events.item_ids)), events, past, first=20, last=N, say=lambda *_: None
    )
    for event, rank in zip(outcome.event_N.tolist(), outcome.rank_N.tolist(), strict=True):
        before = slice(0, event)
        had = set(events.row_N[before][events.user_N[before] == events.user_N[event]].tolist())
        assert past.of(event).tolist() == [
            row
            for row, user in zip(events.row_N[before], events.user_N[before], strict=True)
            if user == events.user_N[event]
        ]
        known = int(events.row_N[before].max())
        target = int(events.row_N[event])
        if target > known:
            assert rank == MISS
        elif had:  # a user's first event goes by what trends
            assert rank == 1 + len(set(range(target + 1, known + 1)) - had)


def test_a_chain_that_learns_as_it_goes_finds_the_circle(log: Path) -> None:
    events = events_of(log)
    past = Past(events.user_N, events.row_N)
    scores = {}
    for name in baselines.SETTINGS:
        settings = {**baselines.SETTINGS[name]} | (
            {"factors": 4} if name == "factorisation" else {}
        )
        ranker = baselines.make(name, events, past, first=events.half, every=100, **settings)
        outcome = walk(
            ranker, events, past, first=events.half, last=N, say=lambda done, words: None
        )
        scores[name] = outcome.metrics()["ndcg@10"]
    assert scores["markov"] > scores["popularity"]


def test_the_job_predicts_every_real_event_once_and_never_from_what_follows(log: Path) -> None:
    events = events_of(log, "duplicates:0.1")
    recipe = small()
    quiet: dict[str, Any] = {"seed": 0, "say": lambda done, words: None, "kept": {}}
    whole = distil(events, recipe, **quiet)
    assert (
        whole.student.event_N.tolist()
        == np.flatnonzero(events.real_N & (np.arange(len(events)) >= events.half)).tolist()
    )
    end = events.half + 200
    other = dataclasses.replace(
        events, row_N=np.where(np.arange(len(events)) < end, events.row_N, 1)
    )
    part = distil(other, recipe, **quiet, last=end)
    n = len(part.student)
    assert part.student.rank_N.tolist() == whole.student.rank_N[:n].tolist()
    assert part.frozen.rank_N.tolist() == whole.frozen.rank_N[:n].tolist()


def test_a_teacher_takes_over_when_the_stream_gets_to_where_it_has_learned(
    log: Path, tmp_path: Path
) -> None:
    events = events_of(log)
    for until in (300, 400):
        catalog = events.catalog(until)
        save_teacher(Teacher(TEACHER, n_rows=len(catalog)), catalog, tmp_path / str(until))
    kept = {until: tmp_path / str(until) for until in (300, 400)}
    source = ArraySource(events, 300, N)
    teachers = ArrayTeachers(kept, source, small().distill)
    teachers.align(events.catalog(300))
    seen = []
    while source.at < N:
        teachers.look()
        seen.append(teachers.version)
        source.poll(max_events=60, timeout_s=0)
    assert seen == [300, 300, 400, 400, 400]
    assert teachers.items() is not None


def test_a_row_waits_for_the_teachers_that_it_needs_and_baselines_for_nobody(
    tmp_path: Path,
) -> None:
    options = Options(dataset="ml-100k", recipe="smoke_cpu", seed=0, out=tmp_path, home=tmp_path)
    jobs = {job.name: job for job in stream.jobs(options)}
    assert {row for job in jobs.values() for row in job.rows} == set(stream.USUAL)
    assert jobs["distilled"].needs == jobs["stale-teacher"].needs == ("teachers",)
    assert not jobs["hard"].needs
    assert not jobs["markov"].needs
    with pytest.raises(ValueError, match="choose of"):
        stream.jobs(dataclasses.replace(options, rows=("nobody",)))


def test_a_file_that_took_another_ones_place_has_rows_and_teachers_of_its_own(
    tmp_path: Path,
) -> None:
    log = tmp_path / "log.csv"
    options = Options(dataset=str(log), recipe="smoke_cpu", seed=0, out=tmp_path, home=tmp_path)

    def keys(content: str) -> set[str]:
        log.write_text(content)
        jobs = {job.name: job for job in stream.jobs(options)}
        return {key_of(jobs["markov"]), jobs["teachers"].given.folder.name}

    old = keys("old")
    assert not old & keys("new")
    assert keys("old") == old


def small() -> recipes.Recipe:
    recipe = recipes.load("smoke_cpu")
    return dataclasses.replace(
        recipe,
        student=dataclasses.replace(recipe.student, dim=8, teacher_dim=TEACHER.dim),
        distill=dataclasses.replace(recipe.distill, warm_up_epochs=1, context_events=8),
    )
