"""Log, models and the stop file on an S3 with an endpoint of its own, as a cluster has them."""

from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from ray_jobs.stop_file import StopFile
from services.core.eventlog import EventLog, events_table
from services.core.registry import Registry
from services.core.settings import Settings
from tests.unit.test_eventlog import arrived


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "reflux")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    boto3.client("s3").create_bucket(Bucket="reflux")
    try:
        yield "s3://reflux"
    finally:
        server.stop()


def test_everything_that_is_shared_may_be_on_s3(bucket: str, tmp_path: Path) -> None:
    settings = Settings(
        offline_uri=f"{bucket}/offline",
        registry_uri=f"{bucket}/registry",
        checkpoint_uri=f"{bucket}/checkpoints",
    )
    log = EventLog(settings.offline)
    assert log.epoch("topic-id") == 0
    for first in range(0, 40, 10):
        log.append(events_table([arrived(offset) for offset in range(first, first + 10)]))
    log.compact()
    assert log.compact() > 0
    assert log.end() == {0: 40}
    assert sorted(log.read()["offset"].to_pylist()) == list(range(40))

    registry = Registry(settings.registry)
    (tmp_path / "weights.safetensors").write_bytes(b"weights" * 500_000)
    versions = [registry.publish("student", tmp_path, {"n": n}) for n in range(3)]
    registry.promote("student", versions[-1], "the newest")
    assert registry.serving("student").version == 3
    fetched = registry.fetch("student", 3, tmp_path / "fetched") / "weights.safetensors"
    assert fetched.read_bytes() == (tmp_path / "weights.safetensors").read_bytes()
    assert registry.prune("student", keep=1) == [1, 2]

    stop = StopFile(settings)
    stop.set()
    assert StopFile(settings).is_set()
    stop.clear()
    assert not stop.is_set()
