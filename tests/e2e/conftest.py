"""One real stack for all end-to-end tests, started and stopped by the `reflux` command."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from services.console.observe import Observer, Snapshot
from services.core.settings import Settings
from services.local.client import Client

HISTORY_EVENTS = 20_000
REFLUX = [sys.executable, "-m", "services.cli"]


@dataclass(frozen=True, kw_only=True)
class Running:
    """A running stack: its settings, and ways to use it as people do."""

    settings: Settings
    env: dict[str, str]
    client: Client

    def reflux(self, *arguments: str, timeout_s: float = 120.0) -> str:
        done = subprocess.run(
            [*REFLUX, *arguments], env=self.env, capture_output=True, text=True, timeout=timeout_s
        )
        assert done.returncode == 0, f"{arguments}: {done.stderr}\n{self.logs()}"
        return done.stdout

    def look(self) -> Snapshot:
        return Observer(self.settings).look()

    def wait_until(self, done: Callable[[], bool], what: str, *, timeout_s: float = 120.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not done():
            assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s\n{self.logs()}"
            time.sleep(0.2)

    def logs(self, lines: int = 15) -> str:
        """The end of every log, for a failing test."""
        tails = []
        for path in sorted(self.settings.logs.glob("*.log")):
            tail = path.read_text(errors="replace").splitlines()[-lines:]
            tails.append("\n".join([f"--- {path.name}", *tail]))
        return "\n".join(tails)


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    home = tmp_path_factory.mktemp("e2e")
    env = {
        **os.environ,
        "REFLUX_HOME": str(home),
        "REFLUX_RECIPE": "smoke_cpu",
        "REFLUX_TEACHER_FIRST_EVENTS": str(HISTORY_EVENTS),
        "REFLUX_TEACHER_EVERY_EVENTS": "0",
        "REFLUX_TEACHER_EVERY_MINUTES": "0",
        "REFLUX_PUBLISH_EVERY_S": "3",
    }
    _reflux(env, "up")
    try:
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("REFLUX_HOME", str(home))
            patched.setenv("REFLUX_RECIPE", "smoke_cpu")
            settings = Settings.load()
        with Client(settings) as client:
            yield Running(settings=settings, env=env, client=client)
    finally:
        _reflux(env, "down")
        left = processes_of(home)
        assert not left, f"still running after `reflux down`: {left}"


@pytest.fixture(scope="session")
def learned(running: Running) -> Running:
    """History imported, a first teacher trained, a student distilled from it and serving."""
    replay(running, "--events", str(HISTORY_EVENTS))
    running.wait_until(
        lambda: running.look().teacher_version is not None, "a first teacher", timeout_s=180
    )
    running.wait_until(lambda: distilled_from(running) is not None, "a distilled student serving")
    return running


def replay(running: Running, *options: str) -> None:
    running.reflux("events", "replay", "ml-100k", *options, timeout_s=240)


def distilled_from(running: Running) -> int | None:
    """The teacher of the student that answers; None while it has none."""
    version = running.client.recommend(user_id=None)["teacher_version"]
    return None if version is None else int(version)


def processes_of(home: Path) -> list[str]:
    """Every process of this user that was started with this home, wherever it sits in the tree."""
    found = []
    for process in psutil.process_iter():
        try:
            mine = process.environ().get("REFLUX_HOME") == str(home)
            if mine and process.pid != os.getpid():
                found.append(" ".join(process.cmdline())[:120])
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def _reflux(env: dict[str, str], command: str) -> None:
    done = subprocess.run([*REFLUX, command], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"reflux {command}: {done.stdout}\n{done.stderr}"
