"""The answers deployed on a real Ray, by the command that `reflux up` runs."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest

from services.core.errors import RefluxError, UnavailableError
from services.core.eventlog import Arrived, EventLog, events_table
from services.core.events import Event
from services.core.registry import Registry
from services.core.settings import Settings
from services.local import processes
from services.local.jobs import Jobs
from services.recommend.deploy import deploy, proxy_environment
from services.recommend.everyone import MANIFEST, answer_everyone
from tests import students
from tests.students import item


@pytest.fixture
def cluster(settings: Settings, tmp_path: Path) -> Iterator[Settings]:
    """A Ray head with the proxy that the settings want, which is HAProxy."""
    port = processes.free_port()
    own = settings.model_copy(
        update={
            "ray_address": f"http://127.0.0.1:{port}",
            "recommend_port": processes.free_port(),
            "serving_poll_s": 0.1,
            "replicas": 2,
        }
    )
    environment = proxy_environment(own, scratch=processes.ray_scratch(port))
    assert environment["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    head = processes.ray_head(dashboard_port=port, cpus=6, env=environment)
    ray = processes.Process(head, logs=tmp_path / "logs")
    try:
        ray.wait_ready()
        yield own
    finally:
        ray.stop()


def test_deployed_on_ray(cluster: Settings, tmp_path: Path) -> None:
    registry = Registry(cluster.registry)
    registry.promote("student", students.publish(registry, tmp_path), "first")
    done = run_command(cluster)
    assert done.returncode == 0, done.stderr
    url = f"http://127.0.0.1:{cluster.recommend_port}"
    assert url in done.stdout
    assert "behind HAProxy" in done.stdout
    assert "REFLUX_PROXY" not in done.stderr  # it would say so of another one than was asked for
    assert httpx.get(f"{url}/docs").status_code == 200

    # Versions come and go, and under that every answer is one.
    wrong: list[Any] = []
    versions: list[int] = []
    stop = threading.Event()

    def hammer() -> None:
        with httpx.Client(base_url=url, timeout=10) as client:
            while not stop.is_set():
                response = client.post("/v1/recommendations", json={"recent_items": [item(1)]})
                if response.status_code != 200:
                    wrong.append(response.text)
                    continue
                answer = response.json()
                versions.append(answer["model_version"])
                if {shown["title"] for shown in answer["items"]} != {f"v{versions[-1]}"}:
                    wrong.append(answer)

    thread = threading.Thread(target=hammer)
    thread.start()
    for _ in range(3):
        version = students.publish(registry, tmp_path)
        registry.promote("student", version, "newer")
        deadline = time.monotonic() + 30
        while set(versions[-20:]) != {version} and time.monotonic() < deadline:
            time.sleep(0.05)
    stop.set()
    thread.join()
    assert not wrong
    assert set(versions[-20:]) == {4}

    # /metrics adds up both replicas.
    metrics = httpx.get(f"{url}/metrics").text
    (count,) = [m for m in metrics.splitlines() if m.startswith("reflux_answer_seconds_count")]
    assert float(count.split()[1]) == len(versions)

    everyone_is_answered(cluster, tmp_path / "everyone", version=4)


def everyone_is_answered(cluster: Settings, out: Path, *, version: int) -> None:
    """By a job on the same Ray, from the offline log."""
    done = {"ann": ("view", item(1)), "bob": ("impression", item(2))}
    arrived = [
        Arrived(
            record=Event(event_id=user, user_id=user, item_id=at, type=kind, timestamp=1_000),
            arrival_ms=2_000,
            partition=0,
            offset=offset,
        )
        for offset, (user, (kind, at)) in enumerate(done.items())
    ]
    EventLog(cluster.offline).append(events_table(arrived))
    jobs = Jobs(cluster, embedded=True)
    log: list[str] = []
    jobs.follow(jobs.submit("everyone", ["--out", str(out), "-n", "5"]), log.append)
    assert f"2 users answered in {out}" in log
    ann, bob = pq.read_table(out).sort_by("user_id").to_pylist()
    assert (ann["user_id"], ann["fallback"], ann["model_version"]) == ("ann", None, version)
    assert len(set(ann["item_ids"]) - {item(1)}) == 5
    assert ann["scores"] == sorted(ann["scores"], reverse=True)
    assert (bob["user_id"], bob["fallback"], bob["item_ids"][0]) == ("bob", "trending", item(7))
    assert json.loads((out / MANIFEST).read_text())["users"] == 2
    with pytest.raises(RefluxError, match="name a new directory"):
        answer_everyone(cluster, str(out), n=5, actors=1)


def test_no_ray_is_an_error_with_a_fix(settings: Settings) -> None:
    done = run_command(settings)
    assert done.returncode == 1
    assert done.stderr.startswith("REFLUX_RAY_ADDRESS is empty")
    nowhere = settings.model_copy(update={"ray_address": "http://127.0.0.1:9"})
    with pytest.raises(UnavailableError, match="check that it runs"):
        deploy(nowhere, timeout_s=0)


def run_command(settings: Settings) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "services.recommend"],
        env={**os.environ, **settings.environment()},
        capture_output=True,
        text=True,
        timeout=240,
    )
