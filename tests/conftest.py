"""The real broker, Redis and settings that tests share. Nothing is mocked, nothing is skipped."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings as hypothesis_settings

from services.core.settings import Settings
from services.local import processes

# A busy machine breaks no property.
hypothesis_settings.register_profile("untimed", deadline=None)
hypothesis_settings.load_profile("untimed")


@pytest.fixture(scope="session")
def kafka_bootstrap(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One embedded broker for all tests, who therefore use user ids of their own."""
    yield from _broker(tmp_path_factory.mktemp("kafka"))


@pytest.fixture
def fresh_kafka(tmp_path: Path) -> Iterator[str]:
    """A broker of one's own, with nothing in it."""
    yield from _broker(tmp_path)


@pytest.fixture
def another_kafka(tmp_path: Path) -> Iterator[str]:
    """The same once more."""
    logs = tmp_path / "another"
    logs.mkdir()
    yield from _broker(logs)


@pytest.fixture(scope="session")
def redis_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One Redis for all tests, who therefore use user and item ids of their own."""
    data = tmp_path_factory.mktemp("redis")
    port = processes.free_port()
    process = processes.Process(processes.redis(port, data=data), logs=data)
    try:
        process.wait_ready()
        yield f"{processes.LOOPBACK}:{port}"
    finally:
        process.stop()


@pytest.fixture
def settings(
    kafka_bootstrap: str,
    redis_address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Settings:
    """Settings with a home of their own and the shared broker and Redis; no file is read."""
    monkeypatch.chdir(tmp_path)  # away from a developer's reflux.toml and .reflux
    return Settings(
        home=tmp_path / "home",
        kafka_bootstrap=kafka_bootstrap,
        redis=redis_address,
        log_flush_s=0.2,
        popularity_every_s=0.5,
    )


def _broker(logs: Path) -> Iterator[str]:
    port = processes.free_port()
    process = processes.Process(processes.broker(port), logs=logs)
    try:
        process.wait_ready()
        yield f"{processes.LOOPBACK}:{port}"
    finally:
        process.stop()
