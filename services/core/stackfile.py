"""`<home>/stack.json`: what the running one-machine stack says of itself, for other processes."""

import contextlib
import json
from pathlib import Path
from typing import Any

import psutil

from services.core.settings import STACK_FILE, Settings


def stack_path(settings: Settings) -> Path:
    return settings.home.absolute() / STACK_FILE


def demo_of(settings: Settings) -> Settings:
    """The settings that `reflux demo` runs with."""
    return settings.model_copy(update={"home": settings.home.absolute() / "demo"})


def read_stack(settings: Settings) -> dict[str, Any] | None:
    """What the running stack of this home wrote; None where there is none."""
    try:
        return dict(json.loads(stack_path(settings).read_text()))
    except FileNotFoundError:
        return None


def identify(pid: int) -> dict[str, float]:
    """A pid and its start time: together they never name another process."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return {"pid": pid, "started": psutil.Process(pid).create_time()}
    return {"pid": pid, "started": 0.0}


def is_alive(identity: dict[str, float]) -> bool:
    try:
        process = psutil.Process(int(identity["pid"]))
        same = abs(process.create_time() - identity["started"]) < 1.0
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
