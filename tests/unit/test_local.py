"""The pure parts of the one-machine stack: when to refresh, how to pace, what to show."""

import itertools
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from services.cli import parse_duration_s
from services.console.scrape import quantile
from services.core.errors import RefluxError, UnauthorizedError
from services.core.settings import Settings
from services.local import learning
from services.local.doctor import examine
from services.local.jobs import Job, JobKind, Jobs
from services.local.learning import TeacherState, refresh_due
from services.local.replay import BATCH_EVENTS, paced
from services.local.report import smooth
from services.recommend.deploy import deploy

NOW_MS = 1_000 * 60_000
SETTINGS = Settings(teacher_every_minutes=30, teacher_every_events=1_000, teacher_first_events=100)


@pytest.mark.parametrize(
    ("events", "teacher", "reason"),
    [
        (99, None, None),
        (100, None, "first teacher"),
        (9_999, TeacherState(created_ms=NOW_MS, events_since=999), None),
        (9_999, TeacherState(created_ms=NOW_MS, events_since=1_000), "1,000 events since"),
        (9_999, TeacherState(created_ms=NOW_MS - 31 * 60_000, events_since=1), "31 minutes old"),
        (9_999, TeacherState(created_ms=NOW_MS - 31 * 60_000, events_since=0), None),
    ],
)
def test_a_refresh_is_due_by_events_or_by_age(
    events: int, teacher: TeacherState | None, reason: str | None
) -> None:
    due = refresh_due(events=events, teacher=teacher, now_ms=NOW_MS, settings=SETTINGS)
    assert (due is None) == (reason is None)
    assert reason is None or reason in (due or "")


def test_zero_switches_a_refresh_trigger_off() -> None:
    never = Settings(teacher_every_minutes=0, teacher_every_events=0)
    old = TeacherState(created_ms=0, events_since=10**9)
    assert refresh_due(events=10**9, teacher=old, now_ms=NOW_MS, settings=never) is None


def test_learning_is_supervised_until_a_signal_and_then_keeps_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning, "LOOK_EVERY_S", 0.01)
    settings = Settings(home=tmp_path, teacher_first_events=1_000)
    happened: list[str] = []

    class Recorded:
        """The Jobs API of a Ray on which nothing runs yet."""

        def __init__(self) -> None:
            self.settings = settings

        def active(self, kind: str) -> None:
            return None

        def submit(self, kind: str) -> str:
            happened.append(f"start {kind}")
            signal.raise_signal(signal.SIGTERM)
            return f"reflux-{kind}"

        def stop(self, kind: str) -> Job:
            happened.append(f"stop {kind}")
            return Job(
                kind="student",
                submission_id="reflux-student",
                status="STOPPED",
                message="",
                started_ms=0,
            )

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        learning.supervise(Recorded(), report=happened.append)  # type: ignore[arg-type]
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])
    assert happened == [
        "start student",
        "student job reflux-student: no distillation job is running",
        "stop student",
        "reflux-student STOPPED",
    ]


class FakeJobs:
    """The Jobs API of a Ray on which jobs run until `status` says otherwise; ids begin with the
    kind, and the newest are last."""

    def __init__(self, *running: str) -> None:
        self.status = dict.fromkeys(running, "RUNNING")
        self.started: list[str] = []

    def active(self, kind: str) -> Job | None:
        of_kind = (self.get(name) for name in reversed(self.status) if name.startswith(kind))
        return next((job for job in of_kind if job.active), None)

    def get(self, name: str) -> Job:
        kind: JobKind = "student" if name.startswith("student") else "teacher"
        status = self.status[name]
        return Job(kind=kind, submission_id=name, status=status, message="", started_ms=0)

    def submit(self, kind: str) -> str:
        self.started.append(kind)
        name = f"{kind}-{len(self.started)}"
        self.status[name] = "RUNNING"
        return name


def test_a_refresh_that_an_operator_asked_for_and_that_fails_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning, "LOOK_EVERY_S", 0.0)
    jobs: Any = FakeJobs("student", "teacher-asked")
    watching = learning.LearningJobs(Settings(home=tmp_path), jobs, report=lambda _: None)
    watching.tick()
    assert jobs.started == []
    jobs.status["teacher-asked"] = "FAILED"
    watching.tick()
    assert jobs.started == ["teacher"]
    jobs.status["teacher-1"] = "STOPPED"  # by the operator, who means it
    for _ in range(2):
        watching.tick()
    assert jobs.started == ["teacher"]


def test_a_student_comes_back_before_a_teacher_that_is_due_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning, "LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(learning, "refresh_due", lambda **_: "due")
    jobs: Any = FakeJobs()
    watching = learning.LearningJobs(Settings(home=tmp_path), jobs, report=lambda _: None)
    watching.tick()
    assert jobs.started == ["student", "teacher"]
    jobs.status.update({"student-1": "FAILED", "teacher-2": "SUCCEEDED"})
    watching.tick()
    assert jobs.started == ["student", "teacher", "student"]
    later = time.monotonic() + learning.HEAD_START_S
    monkeypatch.setattr(time, "monotonic", lambda: later)
    watching.tick()
    assert jobs.started == ["student", "teacher", "student", "teacher"]


def test_pacing_holds_the_rate_and_loses_nothing() -> None:
    now = itertools.count(0.0, 0.05)  # every look at the clock is 50 ms later
    lines = [b"%d" % index for index in range(500)]
    seen, looks = [], 0
    for batch in paced(iter(lines), rate=100.0, clock=lambda: next(now), sleep=lambda _: None):
        seen += batch
        looks = int(next(now) / 0.05)
        assert len(seen) <= 100.0 * looks * 0.05
    assert seen == lines
    assert looks >= 500 / (100.0 * 0.05)


def test_no_rate_means_full_batches() -> None:
    sizes = [len(batch) for batch in paced(iter([b""] * 2_500), rate=0.0)]
    assert sizes == [BATCH_EVENTS, BATCH_EVENTS, 500]


def test_quantiles_of_a_prometheus_histogram() -> None:
    buckets = [(0.1, 50.0), (0.2, 90.0), (float("inf"), 100.0)]
    assert quantile(buckets, 0.5) == pytest.approx(0.1)
    assert quantile(buckets, 0.7) == pytest.approx(0.15)
    assert quantile(buckets, 0.99) == pytest.approx(0.2)  # all that is known: beyond the last
    assert quantile([(0.1, 0.0), (float("inf"), 0.0)], 0.5) is None


def test_the_plot_weighs_windows_by_their_events() -> None:
    curve = [
        {"m": 1.0, "window.events": 100.0, "stream.events": 100.0},
        {"m": 0.0, "window.events": 300.0, "stream.events": 400.0},
        {"window.events": 50.0, "stream.events": 450.0},
    ]
    xs, ys = smooth(curve, "m")
    assert xs == [100.0, 400.0]
    assert ys[0] == 1.0
    assert 0.2 < ys[1] < 0.25


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("5m", 300), ("1h", 3600)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration_s(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "-5m", "five"])
def test_bad_durations_say_what_is_allowed(text: str) -> None:
    with pytest.raises(RefluxError, match="90s, 5m, 1h"):
        parse_duration_s(text)


def test_the_doctor_names_the_setting_of_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = Settings(home=tmp_path, ray_dashboard_port=taken.getsockname()[1])
        [ray] = [one for one in examine(settings) if one.name == "port of ray"]
    assert not ray.ok
    assert "REFLUX_RAY_DASHBOARD_PORT" in ray.fix


def test_the_doctor_knows_what_a_misspelt_variable_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFLUX_KAFKA_BOOTSTRP", "k:9092")
    monkeypatch.setenv("REFLUX_BROKER_SERVICE_PORT_TCP", "9092")  # Kubernetes makes such ones
    found = {one.name: one for one in examine(Settings(home=tmp_path))}
    assert not found["REFLUX_KAFKA_BOOTSTRP"].ok
    assert "REFLUX_KAFKA_BOOTSTRAP?" in found["REFLUX_KAFKA_BOOTSTRP"].fix
    assert found["REFLUX_BROKER_SERVICE_PORT_TCP"].ok


def test_help_answers_without_heavy_imports() -> None:
    code = (
        "import sys; from services import cli; from typer.testing import CliRunner\n"
        "assert CliRunner().invoke(cli.app, ['--help']).exit_code == 0\n"
        "heavy = {'torch', 'ray', 'feast', 'pyarrow', 'kafka'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class _AsksForAToken(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(401)


@pytest.mark.parametrize("go", [lambda given: Jobs(given, embedded=False), deploy])
def test_a_ray_that_asks_for_a_token_is_told_apart(go: Callable[[Settings], object]) -> None:
    with HTTPServer(("127.0.0.1", 0), _AsksForAToken) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            address = f"http://127.0.0.1:{server.server_port}"
            with pytest.raises(UnauthorizedError, match="set RAY_AUTH_MODE=token"):
                go(Settings(ray_address=address))
        finally:
            server.shutdown()
