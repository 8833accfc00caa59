"""`<home>/stack.json`: what the running one-machine stack says of itself, for other processes."""

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from services.core.settings import Settings

STACK_FILE = "stack.json"


def stack_path(settings: "Settings") -> Path:
    return settings.home.absolute() / STACK_FILE


def demo_of(settings: "Settings") -> "Settings":
    """The settings that `reflux demo` runs with."""
    return settings.model_copy(update={"home": settings.home.absolute() / "demo"})


def read_stack(settings: "Settings") -> dict[str, Any] | None:
    """What the stack of this home wrote, even if it was killed since; None where there is none."""
    return _read(settings.home)


def running_stack(home: Path) -> dict[str, Any] | None:
    """What the stack of this home wrote, if any process of it is alive."""
    stack = _read(home)
    if stack is None:
        return None
    identities = [stack["supervisor"], *stack["processes"].values()]
    return stack if any(is_alive(one) for one in identities) else None


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


def _read(home: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads((home / STACK_FILE).read_text()))
    except (FileNotFoundError, json.JSONDecodeError):  # half a file: a power cut, so nothing runs
        return None
