"""`reflux up` in the background: start the supervisor, say what it does, wait until all answers."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from services.core.errors import UnavailableError
from services.core.settings import Settings
from services.core.stackfile import read_stack
from services.local import processes
from services.local.stack import SUPERVISOR_GRACE_S, Report, refuse_second_stack, tear_down

TIMEOUT_S = 300.0


def start(settings: Settings, *, report: Report) -> dict[str, Any]:
    """Start `python -m services.local` detached; return the addresses once everything answers."""
    refuse_second_stack(settings)
    settings.logs.mkdir(parents=True, exist_ok=True)
    log = settings.logs / "supervisor.log"
    told = log.stat().st_size if log.exists() else 0
    supervisor = None
    try:
        with log.open("ab") as out, processes.held_back():
            supervisor = subprocess.Popen(
                [sys.executable, "-m", "services.local"],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        return _wait_ready(settings, supervisor, log=log, told=told, report=report)
    except BaseException:  # Ctrl-C, too: before there is a stack.json, nobody else knows of it
        if supervisor is not None:
            with processes.undisturbed():
                processes.stop_tree(supervisor.pid, grace_s=SUPERVISOR_GRACE_S)
        raise


@contextmanager
def running(settings: Settings, *, report: Report) -> Iterator[Settings]:
    """A stack, stopped at the end; the settings with the addresses of what runs."""
    start(settings, report=report)
    try:
        yield Settings.load()
    finally:
        with processes.undisturbed():
            tear_down(settings, report=report)


def _wait_ready(
    settings: Settings,
    supervisor: "subprocess.Popen[bytes]",
    *,
    log: Path,
    told: int,
    report: Report,
) -> dict[str, Any]:
    """Report what the supervisor logs from byte `told` on; its addresses once all is ready."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        with log.open("rb") as lines:
            lines.seek(told)
            for line in lines.read().decode(errors="replace").splitlines():
                report(line)
            told = lines.tell()
        stack = read_stack(settings)
        if stack and stack["ready"]:
            return dict(stack["settings"])
        if supervisor.poll() is not None:
            raise UnavailableError(f"the stack did not start; see {log}")
        time.sleep(0.2)
    raise UnavailableError(f"the stack was not ready after {TIMEOUT_S:g} s; see {log}")
