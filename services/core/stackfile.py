"""`<home>/stack.json`: what the running one-machine stack says of itself, for other processes."""

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import psutil

if TYPE_CHECKING:
    from services.core.settings import Settings

STACK_FILE = "stack.json"
STARTTIME = 19  # field 22 of proc_pid_stat(5), counted from the one after the name

# Settings that point a stack to what others may use, too.
ELSEWHERE: Final = (
    *("kafka_bootstrap", "redis", "ray_address"),
    *("offline_uri", "registry_uri", "checkpoint_uri"),
)

Identity = dict[str, int | str]


def stack_path(settings: "Settings") -> Path:
    return settings.home.absolute() / STACK_FILE


def demo_of(settings: "Settings") -> "Settings":
    """The settings that `reflux demo` runs with: whatever it starts is its own.

    Its events are a dataset's, and its models learned from them: not for anybody's own Kafka,
    Redis, Ray or registry.
    """
    return settings.model_copy(
        update={"home": settings.home.absolute() / "demo", **dict.fromkeys(ELSEWHERE, "")}
    )


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


def identify(pid: int) -> Identity:
    """A pid and its start time: together they never name another process."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return {"pid": pid, "started": _started(pid)}
    return {"pid": pid, "started": ""}


def is_alive(identity: Identity) -> bool:
    pid = int(identity["pid"])
    try:
        same = _started(pid) == identity["started"]
        return same and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _started(pid: int) -> str:
    """When it started: on Linux in ticks since this boot, which no step of the clock moves."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux, or no such process
        return str(psutil.Process(pid).create_time())
    return f"{after_name.split()[STARTTIME]} of {boot}"


def _read(home: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads((home / STACK_FILE).read_text()))
    except (FileNotFoundError, json.JSONDecodeError):  # half a file: a power cut, so nothing runs
        return None
