"""The console's parts: what it makes of metrics, what it remembers, whom it lets in."""

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.samples import Sample

from services.console import trying
from services.console.aside import Aside
from services.console.guard import Guard
from services.console.observe import retention
from services.console.operating import Ray
from services.console.recent import Looks
from services.console.scrape import Samples, buckets, increase, parsed, quantile
from services.console.store import KEPT_VERSIONS, RINGS, Store
from services.console.versions import ROLLING_EVENTS, Versions
from services.console.watch import Metrics, Watcher
from services.core.errors import ForbiddenError, UnauthorizedError, UnavailableError
from services.core.events import Event
from services.core.registry import Registry
from services.core.settings import Settings

MINUTE_MS = 60_000


class Endpoint:
    """A process that counts, and may start anew."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._registry = CollectorRegistry()
        self.events = Counter("reflux_gateway_accepted", "", registry=self._registry)
        self.answers = Histogram(
            "reflux_answer_seconds", "", buckets=(0.01, 0.1, 1), registry=self._registry
        )
        Counter("python_gc", "not ours", registry=self._registry).inc()

    def metrics(self) -> dict[str, list[Sample]]:
        found = parsed(generate_latest(self._registry).decode())
        assert not any("gc" in name for name in found)
        return found


def test_the_page_imports_nothing_heavy() -> None:
    """Its process runs beside everything else: torch alone would be 400 MB."""
    heavy = ("torch", "ray", "feast", "pandas", "kafka", "duckdb")
    code = f"import services.console.__main__, sys; print(*set({heavy}) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_what_happens_now_is_told_across_a_restart() -> None:
    one, other = Endpoint(), Endpoint()

    def samples() -> Samples:
        return {"a": one.metrics(), "b": other.metrics()}

    looks = Looks()
    one.events.inc(1_000)
    other.events.inc(50)
    one.answers.observe(0.5)  # long ago: no part of what happens now
    assert looks.add(0.0, samples()).events_per_s is None
    one.restart()
    one.events.inc(20)
    other.events.inc(30)
    for _ in range(10):
        other.answers.observe(0.05)
    now = looks.add(10.0, samples())
    assert now.events_per_s == pytest.approx((20 + 30) / 10)
    assert now.answer_p50_ms == pytest.approx(55)
    assert now.dead_per_s is None  # nobody says
    assert looks.add(20.0, samples()).events_per_s == 0.0
    assert looks.add(30.0, samples()).answer_p50_ms is None  # none lately


def test_a_process_that_is_new_counts_from_its_start() -> None:
    one, other = Endpoint(), Endpoint()
    one.events.inc(5)
    before: Samples = {"a": one.metrics()}
    other.events.inc(7)
    now: Samples = {**before, "b": other.metrics()}
    assert increase(now, "reflux_gateway_accepted_total", since=before) == 7
    assert quantile(buckets(now, "reflux_answer_seconds", since=before), 0.5) is None


def test_a_process_that_missed_a_look_counts_on_from_where_it_was() -> None:
    one, other = Endpoint(), Endpoint()
    one.events.inc(1_000_000)
    looks = Looks()
    for n in range(20):  # every second; the seventh look takes too long for one of them
        one.events.inc(500)
        samples: Samples = {"b": other.metrics()} if n == 6 else {"a": one.metrics()}
        rate = looks.add(float(n), samples).events_per_s
        assert n in (0, 6) or rate == pytest.approx(500, rel=0.1)


def test_retention_needs_a_teacher_that_was_asked() -> None:
    metrics = {"stream.student.ndcg@10": 0.19}
    assert retention(metrics) is None
    assert retention({**metrics, "stream.teacher.ndcg@10": 0.0}) is None
    assert retention({**metrics, "stream.teacher.ndcg@10": 0.2}) == pytest.approx(0.95)


def test_the_past_is_kept_thinned_and_bounded(tmp_path: Path) -> None:
    path = tmp_path / "home" / "console.sqlite"
    store = Store(path)
    ring = RINGS[0]
    for step in range(ring.slots + 60):  # ten minutes more than the finest ring holds
        store.add(10_000 * step, {"rate": float(step), "gap": 1.0 if step % 2 else None})
    end_ms = 10_000 * (ring.slots + 59)
    store.close()

    store = Store(path)  # after a restart
    fine = store.history(since_ms=end_ms - 2 * 3600_000 + 1, until_ms=end_ms)
    assert (fine["step_ms"], len(fine["at"])) == (10_000, ring.slots)
    assert fine["series"]["rate"][-1] == ring.slots + 59
    assert fine["series"]["gap"][-2:] == [None, 1.0]
    coarse = store.history(since_ms=0, until_ms=end_ms)
    assert coarse["step_ms"] == MINUTE_MS
    assert coarse["series"]["rate"][:2] == [2.5, 8.5]  # means of six
    store.add_versions([{"kind": "student", "version": v} for v in range(KEPT_VERSIONS + 5)])
    kept = [row["version"] for row in store.versions()]
    assert kept == list(range(5, KEPT_VERSIONS + 5))
    store.close()


def test_a_look_is_shown_even_where_it_cannot_be_saved(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home", registry_uri=str(tmp_path / "registry"))
    publish(Registry(settings.registry), tmp_path, events=10, ndcg=0.1)  # and tells no offsets
    store = Store(tmp_path / "console.sqlite")
    store._db.execute("pragma query_only = on")  # writes fail, as on a full disk
    assert Watcher(settings, store, Metrics()).look()["student_published"] == 1
    store.close()


def test_a_broken_file_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "console.sqlite"
    path.write_bytes(b"no database" * 1_000)
    store = Store(path)
    store.add(10_000, {"rate": 1.0})
    assert store.history(since_ms=0, until_ms=20_000)["series"] == {"rate": [1.0]}
    store.close()


def test_a_file_that_cannot_be_written_stays_and_the_page_has_what_comes(tmp_path: Path) -> None:
    path = tmp_path / "console.sqlite"
    path.mkdir()  # as good as a full disk
    store = Store(path)
    store.add(10_000, {"rate": 1.0})
    assert store.history(since_ms=0, until_ms=20_000)["series"] == {"rate": [1.0]}
    store.close()
    assert path.is_dir()


def test_versions_are_read_once_and_outlive_a_prune(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(str(tmp_path / "registry"))
    publish(registry, tmp_path, events=ROLLING_EVENTS, ndcg=0.1)
    publish(registry, tmp_path, events=ROLLING_EVENTS // 2, ndcg=0.2)
    registry.promote("student", 2, "better")
    versions = Versions(registry, known=[])
    fresh, changed = versions.refresh()
    assert ([row["version"] for row in fresh], changed) == ([1, 2], True)
    assert versions.serving["student"]["version"] == 2
    assert versions.refresh() == ([], False)
    assert versions.quality()["student"] == pytest.approx((0.1 * 2 + 0.2) / 3)
    publish(registry, tmp_path, events=ROLLING_EVENTS // 2, ndcg=0.4)
    registry.prune("student", 1)
    assert [row["version"] for row in versions.refresh()[0]] == [3]
    assert versions.quality()["student"] == pytest.approx(0.3)  # the first is too long ago
    assert [row["version"] for row in versions.newest("student", 10)] == [1, 2, 3]

    restarted = Versions(registry, known=versions.newest("student", 10))
    assert restarted.refresh() == ([], True)
    assert restarted.quality() == versions.quality()
    monkeypatch.setattr("services.console.versions.KEPT_VERSIONS", 1)
    restarted.refresh()  # of pruned ones not without end
    assert [row["version"] for row in restarted.newest("student", 10)] == [2, 3]
    anew = Registry(str(tmp_path / "another"))
    publish(anew, tmp_path, events=10, ndcg=0.5)
    restarted = Versions(anew, known=versions.newest("student", 10))
    restarted.refresh()
    assert [row["version"] for row in restarted.newest("student", 10)] == [1]


def publish(registry: Registry, tmp_path: Path, *, events: int, ndcg: float) -> None:
    (tmp_path / "artifact").mkdir(exist_ok=True)
    (tmp_path / "artifact" / "weights").touch()
    metrics = {"window.events": events, "window.student.ndcg@10": ndcg}
    gate = {"promoted": True, "reason": "no worse"}
    registry.publish("student", tmp_path / "artifact", {"metrics": metrics, "gate": gate})


OURS = {"host": "127.0.0.1:8090", "content-type": "application/json"}
KEY = "k" * 16


@pytest.mark.parametrize(
    "forged",
    [
        {"host": "evil.example"},  # a name of theirs that points here
        {"origin": "http://evil.example"},
        {"host": "["},
        {"origin": "http://["},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9999"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"content-type": "text/plain"},  # what a form can send
    ],
)
def test_other_sites_pages_change_nothing(forged: dict[str, str]) -> None:
    guard = Guard(Settings())
    own = {"origin": "http://127.0.0.1:8090", "sec-fetch-site": "same-origin"}
    guard.change(OURS | own, "operate")
    guard.change(OURS)  # curl has neither
    with pytest.raises(ForbiddenError):
        guard.change(OURS | forged, "operate")


def test_with_keys_a_key_opens_what_its_roles_allow() -> None:
    guard = Guard(Settings.load(api_keys=f"recommend:{KEY},operate:{'o' * 16}"))
    named = {**OURS, "host": "console.example"}
    with pytest.raises(UnauthorizedError):
        guard.enter(named)
    viewer = {**named, "authorization": f"Bearer {KEY}"}
    assert guard.enter(viewer) == {"recommend"}
    with pytest.raises(ForbiddenError, match="operate"):
        guard.change(viewer, "operate")
    guard.change({**named, "authorization": f"Bearer {'o' * 16}"}, "operate")


class WithoutHistories(trying.Doors):
    """The online store is away."""

    async def send(self, event: Event, *, key: str | None) -> None:
        pass

    async def recommend(self, whom: trying.Whom, *, key: str | None) -> dict[str, Any]:
        return {"items": []}

    async def history(self, user_id: str, *, n: int, key: str | None) -> dict[str, Any]:
        raise UnavailableError("the online store took longer than 0.25 s")


def test_a_click_that_kafka_has_is_no_error_whatever_comes_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever gets an error clicks again, and the event counts twice."""
    monkeypatch.setattr(trying, "KNOWN_WITHIN_S", 0.05)
    settings = Settings()
    app = FastAPI()
    app.include_router(
        trying.router(Guard(settings), WithoutHistories(settings), Aside(settings.environment()))
    )
    with TestClient(app, base_url="http://127.0.0.1") as client:
        clicked = client.post("/api/try/click", json={"user_id": "a", "item_id": "b"})
        told = client.post("/api/try/answers", json={"user_id": "a"})
    assert (clicked.status_code, clicked.json()["known_ms"]) == (200, None)
    assert clicked.json()["answered_ms"] >= clicked.json()["accepted_ms"]
    assert (told.status_code, told.json()["history"]) == (200, None)


def test_why_nobody_knows_the_jobs_is_told() -> None:
    async def ask(address: str, status: int) -> list[dict[str, Any]]:
        ray = Ray(Settings(ray_address=address))
        refusing = httpx.MockTransport(lambda _: httpx.Response(status, text="a token is wanted"))
        ray._http = httpx.AsyncClient(transport=refusing)
        try:
            return await ray.jobs()
        finally:
            await ray.close()

    with pytest.raises(UnavailableError, match="401: a token is wanted"):
        asyncio.run(ask("http://ray:8265", 401))
    assert asyncio.run(ask("", 500)) == []  # none is configured
