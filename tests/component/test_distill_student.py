"""The distillation job as a user submits it: a real Ray, a real broker, MovieLens-100K."""

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from ray.job_submission import JobSubmissionClient
from typer.testing import CliRunner

from ray_jobs import datasets
from ray_jobs.recipes import smoke_cpu
from services import cli
from services.core.catalog import Catalog
from services.core.eventlog import Arrived, EventLog, events_table
from services.core.events import EVENTS, Event, EventType, encode
from services.core.kafka import end_offsets, ensure_topics, make_producer
from services.core.models.teacher import Teacher
from services.core.registry import Registry
from services.core.settings import Settings
from services.local import processes
from services.local.audit import learned_once, newest_ledger

HISTORY, LIVE, MORE = 2_000, 600, 100


@pytest.fixture
def ray_url(tmp_path: Path) -> Iterator[str]:
    port = processes.free_port()
    # A cluster's `python` is the one that has Ray.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {"RAY_JOB_STOP_WAIT_TIME_S": "30", "PATH": path, "OMP_NUM_THREADS": "1"}
    head = processes.ray_head(dashboard_port=port, cpus=8, env=env)
    process = processes.Process(head, logs=tmp_path)
    try:
        process.wait_ready()
        yield f"http://{processes.LOOPBACK}:{port}"
    finally:
        process.stop()


def test_versions_are_promoted_and_a_killed_job_goes_on_exactly_where_it_was(
    fresh_kafka: str, ray_url: str, tmp_path: Path
) -> None:
    settings = Settings(
        home=tmp_path / "home",
        kafka_bootstrap=fresh_kafka,
        ray_address=ray_url,
        recipe="smoke_cpu",
        offline_uri=str(tmp_path / "offline"),
        registry_uri=str(tmp_path / "registry"),
        checkpoint_uri=str(tmp_path / "checkpoints"),
        publish_every_s=1,
        checkpoint_every_s=2,
        student_workers=2,
    )
    events = _events(settings)
    _send(settings, events[:HISTORY], into_log=True)
    registry = Registry(settings.registry)
    _teach(registry, settings, events, tmp_path)

    client = JobSubmissionClient(ray_url)
    job = _start(settings)
    _until(lambda: bool(registry.versions("student")), client, job)
    _send(settings, events[HISTORY : HISTORY + LIVE // 2])
    _until(lambda: _newest(registry)["events_learned"] > 0, client, job)
    time.sleep(3)  # past a checkpoint
    _kill_worker()
    _send(settings, events[HISTORY + LIVE // 2 : HISTORY + LIVE])
    _until(lambda: _newest(registry)["events_learned"] == LIVE, client, job)

    newest = _newest(registry)
    serving = registry.manifest("student", registry.serving("student").version)
    assert sum(newest["offsets"].values()) == HISTORY + LIVE
    assert newest["teacher_version"] == 1
    assert serving["gate"]["promoted"]
    for ranker in ("student", "frozen_student", "teacher", "stale_teacher", "popularity"):
        assert 0.0 <= newest["metrics"][f"stream.{ranker}.ndcg@10"] <= 1.0
    assert newest["metrics"]["stream.events"] == LIVE

    _teach(registry, settings, events, tmp_path)
    _until(lambda: _newest(registry)["teacher_version"] == 2, client, job)
    _send(settings, events[HISTORY + LIVE : HISTORY + LIVE + MORE])
    _until(lambda: _newest(registry)["events_learned"] == LIVE + MORE, client, job)
    assert _newest(registry)["metrics"]["window.stale_teacher.ndcg@10"] >= 0.0

    assert f"{job}  RUNNING" in _reflux(settings, "student", "status")
    assert _reflux(settings, "student", "stop").split() == [job, "STOPPED"]
    # A flipped bit in the newest checkpoint: the one before it counts.
    weights = max(Path(settings.checkpoints).glob("*/checkpoint_*/student/weights.safetensors"))
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    job = _start(settings.model_copy(update={"student_workers": 1}))  # takes over from both
    _send(settings, events[HISTORY + LIVE + MORE :])
    _until(lambda: _newest(registry)["events_learned"] == LIVE + 2 * MORE, client, job)
    logs = client.get_job_logs(job)
    assert "student/weights.safetensors is not what was written" in logs
    assert "resumed after" in logs
    assert _reflux(settings, "student", "stop").split() == [job, "STOPPED"]
    assert "no distillation job" in _reflux(settings, "student", "stop")
    learned = learned_once(newest_ledger(settings.checkpoints), end_offsets(settings, EVENTS))
    assert learned.kept, learned.found


def _events(settings: Settings) -> list[Event]:
    log = datasets.load("ml-100k", home=settings.home, data=os.environ.get("REFLUX_DATA", ""))
    return [
        Event(
            event_id=f"e{i}",
            user_id=row["user_id"],
            item_id=row["item_id"],
            type=EventType.RATING,
            timestamp=row["timestamp_ms"],
            value=row["value"],
        )
        for i, row in enumerate(log.events.slice(0, HISTORY + LIVE + 2 * MORE).to_pylist())
    ]


def _send(settings: Settings, events: list[Event], *, into_log: bool = False) -> None:
    """Produce, and, as the feature worker would, append to the offline log."""
    ensure_topics(settings)
    producer = make_producer(settings)
    sent = [
        producer.send(EVENTS, key=event.user_id.encode(), value=encode(event)) for event in events
    ]
    where = [future.get(timeout=30) for future in sent]
    producer.close()
    arrived: dict[int, list[Arrived[Event]]] = {}
    for event, at in zip(events, where, strict=True):
        record = Arrived(
            record=event, arrival_ms=at.timestamp, partition=at.partition, offset=at.offset
        )
        arrived.setdefault(at.partition, []).append(record)
    if into_log:
        for part in arrived.values():
            EventLog(settings.offline).append(events_table(part))


def _teach(registry: Registry, settings: Settings, events: list[Event], scratch: Path) -> None:
    """A teacher that has learned nothing: what matters here is that it is asked."""
    catalog = Catalog()
    catalog.add(event.item_id for event in events[: HISTORY // 2])
    directory = scratch / "teacher"
    teacher = Teacher(smoke_cpu().teacher, n_rows=len(catalog))
    teacher.save(directory)
    pq.write_table(catalog.to_table(), directory / "catalog.parquet")
    offsets = {str(partition): at for partition, at in EventLog(settings.offline).end().items()}
    version = registry.publish("teacher", directory, {"offsets": offsets})
    registry.promote("teacher", version, "it will do")


def _start(settings: Settings) -> str:
    """Submit the job as a user of the cluster does; its id."""
    return re.findall(r"reflux-student-[\d-]+", _reflux(settings, "student", "start"))[0]


def _reflux(settings: Settings, *arguments: str) -> str:
    """Run the command with these settings but the address, which it is given; what it prints."""
    env = settings.environment() | {"REFLUX_RAY_ADDRESS": ""}
    command = [*arguments, "--address", settings.ray_address]
    done = CliRunner().invoke(cli.app, command, env=env)
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def _newest(registry: Registry) -> dict[str, Any]:
    return registry.manifest("student", registry.latest("student") or 0)


def _kill_worker() -> None:
    """kill -9 the training worker of this test's own Ray."""
    ours = {child.pid for child in psutil.Process().children(recursive=True)}
    titles: dict[str, psutil.Process] = {}
    for process in psutil.process_iter(["cmdline"]):
        if process.pid in ours:
            titles[" ".join(process.info["cmdline"] or [])] = process
    # Beside the worker runs what Ray Train can't do without, and no more: each takes 200 MB.
    helpers = ("DatasetManager", "PlacementGroupCleaner", "PreemptionWatcher")
    assert not [title for title in titles if any(helper in title for helper in helpers)]
    worker = next(title for title in titles if title.startswith("ray::RayTrainWorker"))
    titles[worker].send_signal(signal.SIGKILL)


def _until(
    done: Callable[[], bool],
    client: JobSubmissionClient,
    job: str,
    *,
    timeout_s: float = 150,
) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        ended = client.get_job_status(job).is_terminal()
        assert not ended and time.monotonic() < deadline, client.get_job_logs(job)[-4000:]
        time.sleep(0.2)
