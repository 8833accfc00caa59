"""The one look that all pages share: taken every two seconds while somebody watches, every ten
otherwise, turned into bytes once, and remembered in the store."""

import asyncio
import logging
import sqlite3
import threading
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Final

import orjson
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from services.console.observe import Observer, Snapshot
from services.console.recent import Looks, Recent
from services.console.store import SAMPLE_S, Store
from services.console.versions import KINDS, Row, Versions
from services.core.registry import Registry
from services.core.settings import Settings

log = logging.getLogger("reflux.console")

WATCHED_S: Final = 2.0
FRESH_S: Final = 1.0  # `GET /api/status` looks again at what is older
SHOWN_VERSIONS: Final = 300  # of each kind, to a page that opens
_LOOK_S: Final = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)


class Metrics:
    """What the console says of itself."""

    def __init__(self) -> None:
        own = self.registry = CollectorRegistry()
        self.pages = Gauge("reflux_console_pages", "Pages that are open", registry=own)
        self.look_seconds = Histogram(
            "reflux_console_look_seconds", "One look at the system", buckets=_LOOK_S, registry=own
        )
        self.failed = Counter("reflux_console_looks_failed", "Looks without a result", registry=own)


@dataclass
class Hub:
    """Hands each frame to every open page. A page that reads too slowly misses some: it is told,
    and asks for everything again. Lives in the event loop."""

    _frames: deque[tuple[int, bytes]] = field(default_factory=lambda: deque(maxlen=16))
    _number: int = 0
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def publish(self, frame: bytes) -> None:
        self._number += 1
        self._frames.append((self._number, frame))
        self._changed.set()
        self._changed = asyncio.Event()

    @property
    def number(self) -> int:
        """Of the newest frame."""
        return self._number

    async def follow(self, seen: int) -> AsyncIterator[bytes]:
        """Every frame after the one of that number."""
        while True:
            changed = self._changed
            if self._frames and self._frames[0][0] > seen + 1:
                yield frame_of("missed", {})
            for number, frame in [*self._frames]:
                if number > seen:
                    seen = number
                    yield frame
            await changed.wait()


class Watcher:
    """Looks in a thread of its own. `now` is the newest look, as `GET /api/status` answers it."""

    def __init__(self, settings: Settings, store: Store, metrics: Metrics) -> None:
        self._observer = Observer(settings, read_log=False)
        self._versions = Versions(Registry(settings.registry), store.versions())
        self._store = store
        self._metrics = metrics
        self._looks = Looks()
        self._hub = Hub()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()  # of a look
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._looked_s = -WATCHED_S
        self._sampled_ms = 0
        self._complaint = self._unsaved = ""
        self.pages = 0
        self._frame = b""
        self.now: dict[str, Any] = {}

    def start(self) -> None:
        """From within the event loop that pages are served by."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        self._stopping = True
        self._wake.set()
        self._thread.join(timeout=10.0)

    async def follow(self) -> AsyncIterator[bytes]:
        """What a page hears: how things stood lately, then every look and change."""
        self.pages += 1
        self._metrics.pages.set(self.pages)
        try:
            self._wake.set()  # from now on more often
            seen = self._hub.number
            if self._frame:
                yield self._frame
            async for frame in self._hub.follow(seen):
                yield frame
        finally:
            self.pages -= 1
            self._metrics.pages.set(self.pages)

    def look(self, fresh_s: float = FRESH_S) -> dict[str, Any]:
        """How things stand, seen at most `fresh_s` ago."""
        with self._lock:
            if time.monotonic() - self._looked_s >= fresh_s:
                with self._metrics.look_seconds.time():
                    self._look()
            return self.now

    def versions(self) -> dict[str, Any]:
        """What a page that opens shows of them."""
        with self._lock:
            rows = {kind: self._versions.newest(kind, SHOWN_VERSIONS) for kind in KINDS}
            return {"rows": rows, "serving": self._versions.serving}

    def changed(self) -> None:
        """Somebody has moved a pointer: look at once."""
        self.look(0.0)

    def _run(self) -> None:
        while not self._stopping:
            try:
                self.look(WATCHED_S / 2)
                self._complaint = ""
            except Exception as error:  # whatever a broken manifest or file system comes up with
                complaint = f"{type(error).__name__}: {error}"
                self._metrics.failed.inc()
                self._publish(frame_of("failed", {"why": complaint}))
                if complaint != self._complaint:  # once, not at every look
                    self._complaint = complaint
                    log.warning("no look: %s", complaint)
            self._wake.wait(WATCHED_S if self.pages else SAMPLE_S)
            self._wake.clear()

    def _look(self) -> None:
        fresh, changed = self._versions.refresh()
        snapshot = self._observer.look(newest=self._versions.latest("student"))
        self._looked_s = time.monotonic()
        recent = self._looks.add(self._looked_s, self._observer.samples)
        quality = self._versions.quality()
        values = series_of(snapshot, recent, quality)
        self.now = {**snapshot.to_dict(), "recent": recent.to_dict(), "quality": quality}
        self._frame = frame_of("look", {**self.now, "series": values})
        self._publish(self._frame)
        if fresh or changed:
            serving = self._versions.serving
            self._publish(frame_of("versions", {"rows": fresh, "serving": serving}))
        self._save(snapshot.at_ms, values, fresh)

    def _save(self, at_ms: int, values: dict[str, float | None], fresh: list[Row]) -> None:
        """A disk that is full costs the page its past, not the present."""
        try:
            if fresh:
                self._store.add_versions(fresh)
            if at_ms - self._sampled_ms >= 1000 * SAMPLE_S - 500:
                self._sampled_ms = at_ms
                self._store.add(at_ms, values)
                self._unsaved = ""
        except sqlite3.Error as error:
            if str(error) != self._unsaved:
                self._unsaved = str(error)
                log.warning("the page's past has a gap: %s", error)

    def _publish(self, frame: bytes) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._hub.publish, frame)


def frame_of(event: str, data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"event: " + event.encode() + b"\ndata: " + orjson.dumps(data) + b"\n\n"


def series_of(
    snapshot: Snapshot, recent: Recent, quality: dict[str, float]
) -> dict[str, float | None]:
    """Everything of a look that has a history."""
    age_s = snapshot.teacher_created_ms and (snapshot.at_ms - snapshot.teacher_created_ms) / 1000
    return {
        **recent.to_dict(),
        "feature_lag_events": snapshot.feature_lag_events,
        "learning_lag_events": snapshot.learning_lag_events,
        "events_dead": snapshot.events_dead,
        "answers_degraded": snapshot.answers_degraded,
        "stream_events": snapshot.metrics.get("stream.events"),
        "teacher_age_s": age_s,
        "teacher_age_events": snapshot.teacher_age_events,
        "teacher_trust": snapshot.teacher_trust,
        "teacher_version": snapshot.teacher_version,
        "student_version": snapshot.student_version,
        "items": snapshot.items,
        "item_coverage": snapshot.item_coverage,
        "retention": snapshot.retention,
        **{f"quality.{model}": value for model, value in quality.items()},
        **{f"loss.{term}": value for term, value in snapshot.loss.items()},
    }
