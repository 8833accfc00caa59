"""The teacher job on a real Ray: a worker is killed, training resumes, the next run refreshes."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
import ray
import torch

from ray_jobs import own_ray, recipes, train_teacher
from ray_jobs import teachers as teachers_module
from ray_jobs.recipes import Recipe
from ray_jobs.teachers import Asked, Teachers
from services.core.eventlog import SCHEMAS, EventLog
from services.core.events import EVENTS
from services.core.models.teacher import Teacher
from services.core.registry import Registry
from services.core.settings import Settings

N_USERS, N_EVENTS, N_ITEMS = 100, 8_000, 300
MARK = "REFLUX_TEST_RAY"  # in the environment of our Ray's processes, and of nobody else's


@pytest.fixture
def local_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv(MARK, str(os.getpid()))
    own_ray.start(num_cpus=3)
    try:
        yield
    finally:
        ray.shutdown()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    settings = Settings(home=tmp_path)
    append(settings.offline, first=0, last=N_EVENTS)
    return settings


@pytest.fixture
def recipe() -> Recipe:
    tiny = recipes.tiny_cpu()
    return replace(
        tiny,
        teacher=replace(tiny.teacher, dim=16, n_layers=1, n_heads=2, max_len=32),
        train=replace(
            tiny.train,
            max_epochs=20,
            max_train_s=100,
            refresh_epochs=2,
            refresh_train_s=20,
            line_events=64,
            learning_rate=2e-2,
            checkpoint_every_s=0.5,
        ),
    )


def append(root: str, *, first: int, last: int) -> None:
    """Everyone walks through the items in the same circle, each from a place of their own."""
    users = np.arange(N_EVENTS * 2) % N_USERS
    starts = np.random.default_rng(0).integers(0, N_ITEMS, N_USERS)
    items = (starts[users] + np.arange(N_EVENTS * 2) // N_USERS) % N_ITEMS
    at = np.arange(first, last)
    time_us = pa.array(at * 10**6, pa.timestamp("us", tz="UTC"))
    columns = {
        "event_id": [str(e) for e in at],
        "user_id": [f"u{users[e]}" for e in at],
        "item_id": [f"i{items[e]}" for e in at],
        "type": ["click"] * len(at),
        "timestamp": time_us,
        "value": pa.nulls(len(at), pa.float64()),
        "context": pa.nulls(len(at), pa.string()),
        "arrival": time_us,
        "partition": np.zeros(len(at), np.int32),
        "offset": at,
    }
    EventLog(root, EVENTS).append(pa.table(columns, schema=SCHEMAS[EVENTS]))


def kill_a_worker_after_a_checkpoint(checkpoints: Path, killed: list[int]) -> None:
    """Killed right after its first one, it would start over: the second commits the first."""
    seen: set[Path] = set()
    deadline = time.monotonic() + 300
    while not killed and time.monotonic() < deadline:
        time.sleep(0.1)
        seen.update(checkpoints.glob("teacher-*/checkpoint_*"))
        if len(seen) >= 2:
            for process in psutil.process_iter(["cmdline", "environ"]):
                ours = (process.info["environ"] or {}).get(MARK) == str(os.getpid())
                if ours and "RayTrainWorker" in "".join(process.info["cmdline"] or []):
                    process.kill()
                    killed.append(process.pid)
                    break


@pytest.mark.usefixtures("local_ray")
def test_a_killed_worker_a_refresh_and_what_is_published(
    settings: Settings, recipe: Recipe, tmp_path: Path
) -> None:
    killed: list[int] = []
    # Of a run whose driver was killed, and of a publication that was.
    (Path(settings.checkpoints) / "teacher-1").mkdir(parents=True)
    (Path(settings.registry) / "teacher" / "000000").mkdir(parents=True)
    killer = threading.Thread(
        target=kill_a_worker_after_a_checkpoint, args=(Path(settings.checkpoints), killed)
    )
    killer.start()
    assert train_teacher.refresh(settings, recipe) == 1
    killer.join()
    registry = Registry(settings.registry)
    first = registry.manifest("teacher", 1)
    assert killed
    assert first["resumed"] >= 1
    assert first["offsets"] == {"0": N_EVENTS}
    assert first["parent"] is None
    assert first["gate"]["promoted"], first["gate"]["reason"]
    assert first["metrics"]["slice.teacher.ndcg@10"] > 0.5
    assert not list(Path(settings.checkpoints).glob("teacher-*"))
    assert registry.versions("teacher") == [1]
    assert not (Path(settings.registry) / "teacher" / "000000").exists()
    model = Teacher.load(registry.fetch("teacher", 1, tmp_path / "fetched"))
    assert model.n_rows == 1 + N_ITEMS

    append(settings.offline, first=N_EVENTS, last=N_EVENTS + 1_000)
    assert train_teacher.refresh(settings, recipe) == 2
    second = registry.manifest("teacher", 2)
    assert second["parent"] == 1
    assert second["offsets"] == {"0": N_EVENTS + 1_000}
    assert "slice.parent.ndcg@10" in second["metrics"]


@pytest.mark.usefixtures("local_ray")
def test_labels_that_fail_are_no_labels(recipe: Recipe, tmp_path: Path) -> None:
    @ray.remote
    def label() -> None:
        raise torch.OutOfMemoryError

    teachers = Teachers(str(tmp_path), config=recipe.distill, width=recipe.student.teacher_dim)
    assert teachers.answer(Asked(teacher=[label.remote()], version=1)) == (None, None)


@pytest.mark.usefixtures("local_ray")
def test_a_teacher_that_finds_no_room_is_told_of_and_overtaken(
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(teachers_module, "LOOK_EVERY_S", -1.0)  # at every look
    monkeypatch.setattr(teachers_module, "READY_TIMEOUT_S", 0.0)
    registry = Registry(str(tmp_path / "registry"))
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "weights").touch()
    config = replace(recipe.distill, label_cpus=1_000)
    teachers = Teachers(registry.uri, config=config, width=recipe.student.teacher_dim)
    for version in (1, 2):
        assert registry.publish("teacher", tmp_path / "files", {"offsets": {}}) == version
        registry.promote("teacher", version, "it will do")
        teachers.look()
        assert f"teacher {version} has been loading" in caplog.text
    assert teachers.version is None


@pytest.mark.usefixtures("local_ray")
def test_errors_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFLUX_HOME", str(tmp_path))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(own_ray, "step_back_as_driver", lambda _: None)
    for arguments, message in (
        (["--recipe", "huge"], "no such recipe; choose one of tiny_cpu, "),
        ([], "holds 0 interactions"),
    ):
        monkeypatch.setattr(sys, "argv", ["train_teacher", *arguments])
        with pytest.raises(SystemExit, match=message) as ended:
            train_teacher.main()
        assert "\n" not in str(ended.value)
