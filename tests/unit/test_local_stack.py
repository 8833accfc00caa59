"""The processes of the one-machine stack: started once, stopped whole, known again."""

import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from services.core.errors import RefluxError, UnavailableError
from services.core.settings import Settings
from services.core.stackfile import demo_of, identify, is_alive, read_stack
from services.local import stack as stack_module
from services.local.demo import Demo
from services.local.processes import Command, Process, free_port, one_at_a_time, rotate_logs
from services.local.stack import Stack
from services.local.status import demo_beside


def test_no_port_is_given_twice() -> None:
    ports = [free_port() for _ in range(500)]
    assert len(set(ports)) == len(ports)


def test_a_log_that_has_grown_too_long_begins_anew(tmp_path: Path) -> None:
    log = tmp_path / "worker.log"
    with log.open("ab", buffering=0) as writing:
        writing.write(b"x" * 11)
        rotate_logs(tmp_path, most_bytes=10)
        writing.write(b"go on")
    rotate_logs(tmp_path, most_bytes=10)
    assert log.read_bytes() == b"go on"
    assert (tmp_path / "worker.log.1").read_bytes() == b"x" * 11


def test_a_log_is_cut_even_where_its_copy_finds_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Path, to: Path) -> None:
        to.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    (tmp_path / "worker.log").write_bytes(b"x" * 11)
    rotate_logs(tmp_path, most_bytes=10)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"worker.log": b""}


def test_a_demo_shares_nothing_with_what_is_configured(tmp_path: Path) -> None:
    elsewhere = {
        "kafka_bootstrap": "kafka:9092",
        "redis": "redis:6379",
        "ray_address": "http://ray",
    }
    uris = dict.fromkeys(("offline_uri", "registry_uri", "checkpoint_uri"), "s3://bucket/x")
    demo = demo_of(Settings(home=tmp_path).model_copy(update={**elsewhere, **uris}))
    assert not any(getattr(demo, name) for name in (*elsewhere, *uris))
    for uri in (demo.offline, demo.registry, demo.checkpoints):
        assert uri.startswith(str(tmp_path / "demo"))


def test_a_stopped_process_leaves_no_descendant(tmp_path: Path) -> None:
    # The grandchild ignores SIGTERM and leads a session of its own, as Ray's workers may.
    grandchild = "import signal,time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"
    child = (
        "import subprocess,sys,time\n"
        f"subprocess.Popen([sys.executable, '-c', {grandchild!r}], start_new_session=True)\n"
        "time.sleep(60)"
    )
    process = _start(child, tmp_path)
    family = psutil.Process(process.pid)
    while not family.children():
        assert process.running
    descendants = family.children(recursive=True)
    process.stop(grace_s=1.0)
    assert not any(one.is_running() for one in [family, *descendants])


def test_a_process_that_ends_at_start_shows_its_last_words(tmp_path: Path) -> None:
    process = _start("print('no such luck')", tmp_path)
    with pytest.raises(UnavailableError, match="no such luck"):
        process.wait_ready()


def test_a_stack_waits_until_another_that_starts_has_its_ports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    said: list[str] = []
    started: list[str] = []

    def start_second() -> None:
        with one_at_a_time(said.append):
            started.append("second")

    second = threading.Thread(target=start_second)
    with one_at_a_time(said.append):
        second.start()
        while second.is_alive() and not said:
            time.sleep(0.01)
        started.append("first")
    second.join()
    assert started == ["first", "second"]
    assert said == ["waiting for another stack that is starting here"]


def test_a_stack_stops_whole_without_a_terminal_and_when_told_twice(tmp_path: Path) -> None:
    def gone(_: str) -> None:
        signal.raise_signal(signal.SIGINT)
        raise OSError("the terminal is gone")

    stack = Stack(Settings(home=tmp_path))
    for name in ("first", "second"):
        stack._spawn(_command(name, "import time; time.sleep(60)"))
    stack._write_stack_file()
    family = [psutil.Process(stack.pid(name)) for name in ("first", "second")]
    stack.report = gone
    with pytest.raises(OSError, match="terminal"):
        stack.stop()
    assert not any(one.is_running() for one in family)
    assert read_stack(stack.settings) is None


def test_answers_that_could_not_be_deployed_on_a_new_ray_are_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes: list[Any] = [UnavailableError("not yet"), "deployed"]

    def deploy_answers(_: Settings) -> str:
        if isinstance(outcome := outcomes.pop(0), Exception):
            raise outcome
        return str(outcome)

    monkeypatch.setattr(stack_module, "deploy_answers", deploy_answers)
    stack = Stack(Settings(home=tmp_path))
    stack._spawn(replace(_command("ray", "import time; time.sleep(60)"), ready=lambda: True))
    try:
        psutil.Process(stack.pid("ray")).kill()
        psutil.wait_procs([psutil.Process(stack.pid("ray"))])
        with pytest.raises(UnavailableError):
            stack.supervise()
        for _ in range(2):
            stack.supervise()
        assert outcomes == []
    finally:
        stack.stop()


def test_a_worker_is_looked_for_where_it_listens(tmp_path: Path) -> None:
    stack = Stack(Settings(home=tmp_path, host="127.0.0.2", allow_open=True))
    worker = stack._worker("worker")
    with socket.create_server(("127.0.0.2", int(worker.env["REFLUX_WORKER_METRICS_PORT"]))):
        assert worker.ready()


def test_a_process_is_known_again_after_a_step_of_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = _start("import time; time.sleep(60)", tmp_path)
    try:
        identity = identify(process.pid)
        created_s = psutil.Process(process.pid).create_time()
        monkeypatch.setattr(psutil.Process, "create_time", lambda _: created_s + 3600)
        assert is_alive(identity)
        assert not is_alive(identity | {"started": identify(os.getpid())["started"]})
    finally:
        process.stop()
    assert not is_alive(identity)


def test_a_terminal_closed_while_the_stack_starts_leaves_no_supervisor(tmp_path: Path) -> None:
    command = subprocess.Popen(
        [sys.executable, "-m", "services.cli", "up"],
        env={**os.environ, "REFLUX_HOME": str(tmp_path)},
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    while not (started := psutil.Process(command.pid).children()):
        assert command.poll() is None
        time.sleep(0.01)
    command.send_signal(signal.SIGHUP)
    assert command.wait(timeout=60) != 0
    assert not any(one.is_running() for one in started)


@pytest.mark.parametrize("home", ["demo", ""])
def test_a_demo_starts_beside_no_other_and_beside_no_stack(tmp_path: Path, home: str) -> None:
    running = Stack(Settings(home=tmp_path / home))
    running._write_stack_file()
    demo = Demo(Settings(home=tmp_path), dataset="ml-100k", rate=1, max_events=None, limit_s=None)
    with pytest.raises(RefluxError, match="a stack runs already"):
        demo.run()
    assert read_stack(running.settings)


def test_status_points_to_a_demo_that_runs_alone(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    assert demo_beside(settings) is None
    Stack(Settings(home=tmp_path / "demo"))._write_stack_file()
    assert f"REFLUX_HOME={tmp_path}/demo" in (demo_beside(settings) or "")
    Stack(settings)._write_stack_file()
    assert demo_beside(settings) is None


def _start(code: str, logs: Path) -> Process:
    return Process(_command("child", code), logs=logs)


def _command(name: str, code: str) -> Command:
    argv = [sys.executable, "-c", code]
    return Command(name=name, argv=argv, ready=lambda: False, env={})
