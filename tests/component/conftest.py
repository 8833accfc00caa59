"""What tests of the answers share: settings, a registry, and a way to promote one more student."""

from collections.abc import Callable
from pathlib import Path

import pytest

from services.core.registry import Registry
from services.core.settings import Settings
from tests import students


@pytest.fixture
def live(settings: Settings) -> Settings:
    # Long enough that a busy machine's answers aren't taken for degraded ones.
    return settings.model_copy(update={"serving_poll_s": 0.05, "feature_timeout_s": 20.0})


@pytest.fixture
def registry(live: Settings) -> Registry:
    return Registry(live.registry)


@pytest.fixture
def promote(registry: Registry, tmp_path: Path) -> Callable[[], int]:
    def promote() -> int:
        version = students.publish(registry, tmp_path, seed=1)
        registry.promote("student", version, "newer")
        return version

    return promote
