"""The console over HTTP: another deployment's numbers, its stream, and what an operator may do."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from prometheus_client import CollectorRegistry, Counter, start_http_server

from services.console.app import create_app
from services.core.registry import Registry
from services.core.settings import Settings
from services.local import processes
from services.local.status import status
from tests import students

VIEWER, OPERATOR = "v" * 16, "o" * 16
GIVEN: dict[str, Any] = {
    "offsets": {"0": 10},
    "metrics": {"window.events": 100, "window.student.ndcg@10": 0.2, "stream.events": 100},
    "gate": {"promoted": True, "reason": "no worse"},
    "items": students.N_ITEMS,
}


@contextmanager
def served(settings: Settings) -> Iterator[httpx.Client]:
    """The console under a real server, as an operator's browser reaches it."""
    config = uvicorn.Config(
        create_app(settings),
        port=settings.console_port,
        log_level="warning",
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 60
        while not server.started:
            assert thread.is_alive() and time.monotonic() < deadline
            time.sleep(0.02)
        with httpx.Client(
            base_url=settings.console_url,
            headers={"authorization": f"Bearer {OPERATOR}"},
            timeout=30,
        ) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def gateway() -> Iterator[tuple[Counter, int]]:
    """A process that counts accepted events, and its port."""
    own = CollectorRegistry()
    accepted = Counter("reflux_gateway_accepted", "", registry=own)
    port = processes.free_port()
    server, thread = start_http_server(port, "127.0.0.1", registry=own)
    yield accepted, port
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def settings(
    tmp_path: Path, gateway: tuple[Counter, int], monkeypatch: pytest.MonkeyPatch
) -> Settings:
    """Of a deployment elsewhere: no stack in this home, a registry with three students."""
    monkeypatch.chdir(tmp_path)
    port = processes.free_port()
    settings = Settings.load(
        home=tmp_path / "home",
        registry_uri=(tmp_path / "registry").as_uri(),
        metrics_urls=f"http://localhost:{gateway[1]}, http://127.0.0.1:{processes.free_port()}",
        console_port=port,
        console_url=f"http://127.0.0.1:{port}",
        api_keys=f"recommend:{VIEWER},produce+recommend+operate:{OPERATOR}",
    )
    registry = Registry(settings.registry)
    for seed in range(3):
        students.publish(registry, tmp_path / "aside", seed=seed, **GIVEN)
        if seed < 2:
            registry.promote("student", seed + 1, "no worse")
    return settings


def test_a_deployment_elsewhere_by_its_settings(
    settings: Settings, gateway: tuple[Counter, int]
) -> None:
    gateway[0].inc(41)
    with served(settings) as client:
        found = client.get("/api/status").json()
        assert (found["events_accepted"], found["student_version"]) == (41, 2)
        assert found["student_published"] == 3
        assert sorted(found["endpoints"].values()) == [False, True]
        # `reflux status --json` is the same look, or a later one.
        assert status(settings).keys() == found.keys()
        state = client.get("/api/state").json()
        assert [row["version"] for row in state["versions"]["rows"]["student"]] == [1, 2, 3]
        assert client.get("/api/versions/student/2").json()["gate"] == GIVEN["gate"]
        assert client.get("/api/versions/student/99").status_code == 404
        assert "reflux_console_pages 0.0" in client.get("/metrics").text
        assert client.get("/healthz").json() == {"status": "ok"}
    with served(settings) as client:  # the past outlives the process
        series = client.get("/api/history?seconds=900").json()["series"]
        assert series["student_version"][0] == 2


def test_the_stream_tells_what_an_operator_does(settings: Settings) -> None:
    registry = Registry(settings.registry)
    change = {"action": "promote", "kind": "student", "version": 1, "held": None}
    with served(settings) as client, client.stream("GET", "/api/stream") as stream:
        events = frames(stream)
        assert next(events)[1]["student_version"] == 2
        answer = client.post("/api/versions", json=change)
        assert (answer.status_code, answer.json()) == (200, {"version": 1})
        assert registry.held("student") == 1
        moved = next(data for name, data in events if name == "versions" and not data["rows"])
        assert (moved["serving"]["student"]["version"], moved["rows"]) == (1, [])
        # Whoever didn't know that an operator had decided is told to look again.
        assert client.post("/api/versions", json=change).status_code == 409
        back = {"action": "roll_back", "kind": "student", "version": 2, "held": 1}
        assert client.post("/api/versions", json=back).json() == {"version": 2}
        release = {"action": "release", "kind": "student", "held": 2}
        assert client.post("/api/versions", json=release).status_code == 200
        assert registry.held("student") is None
        assert client.post("/api/versions", json={**release, "held": None}).status_code == 409
        # What a job promotes while an operator reads the question is no reason to ask again.
        registry.promote("student", 3, "better")
        assert client.post("/api/versions", json={**back, "held": None}).json() == {"version": 2}


def test_who_is_let_in_and_what_for(settings: Settings) -> None:
    change = {"action": "promote", "kind": "student", "version": 1, "held": None}
    viewer = {"authorization": f"Bearer {VIEWER}"}
    settings.logs.mkdir(parents=True)
    (settings.logs / "gateway.log").write_text("it runs\n")
    (settings.home / "secret.log").write_text("nobody's business")
    with served(settings) as client:
        for path in ("/api/status", "/api/state", "/api/history", "/api/stream", "/api/logs"):
            assert client.get(path, headers={"authorization": ""}).status_code == 401, path
        assert client.get("/api/state", headers=viewer).json()["roles"] == ["recommend"]
        assert client.post("/api/versions", json=change, headers=viewer).status_code == 403
        forged = {"origin": "http://evil.example"}
        assert client.post("/api/versions", json=change, headers=forged).status_code == 403
        assert Registry(settings.registry).serving("student").version == 2
        for odd in (b'{"version": NaN}', b'{"\\ud800": 1}', b"[" * 300 + b"]" * 300):
            json = {"content-type": "application/json"}
            assert client.post("/api/versions", content=odd, headers=json).status_code == 422
        assert client.get("/api/logs").json() == ["gateway"]
        assert client.get("/api/logs/gateway").json()["text"] == "it runs\n"
        assert client.get("/api/logs/gateway", headers=viewer).status_code == 403
        assert client.get("/api/logs/..%2Fsecret").status_code == 404
        page = client.get("/", headers={"authorization": ""})  # nothing secret is in it
        assert "default-src 'none'" in page.headers["content-security-policy"]
        script = client.get("/static/js/main.js")
        again = {"if-none-match": script.headers["etag"]}
        assert client.get("/static/js/main.js", headers=again).status_code == 304
        chart = client.get("/static/vendor/uPlot-1.6.32.iife.min.js")
        assert "immutable" in chart.headers["cache-control"]


def frames(stream: httpx.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    name = ""
    for line in stream.iter_lines():
        field, _, value = line.partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            yield name, json.loads(value)
