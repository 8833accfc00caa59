"""Users who ask for recommendations while the demo runs, and how they were answered."""

import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass

from services.core.errors import UnavailableError
from services.core.settings import Settings
from services.local.client import Client

EVERY_S = 0.1
KEPT = 5_000


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Seen from outside: answers and failures so far, latency of the last ones in ms."""

    answers: int
    failures: int
    degraded: int
    p50_ms: float | None
    p99_ms: float | None


def p50_and_p99(times: Collection[float]) -> tuple[float | None, float | None]:
    """None where there are none. Pure."""
    ordered = sorted(times)
    if not ordered:
        return None, None
    return ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100]


class Asker(threading.Thread):
    """Asks for the user that `user()` names, ten times a second, and takes the time."""

    def __init__(self, settings: Settings, user: Callable[[], str | None]) -> None:
        super().__init__(daemon=True)
        self._client = Client(settings, timeout_s=5.0)
        self._user = user
        self._stopping = threading.Event()
        self._answers = self._failures = self._degraded = 0
        self._latencies_ms: deque[float] = deque(maxlen=KEPT)

    def run(self) -> None:
        while not self._stopping.wait(EVERY_S):
            if user := self._user():
                self._ask(user)

    def stop(self) -> None:
        self._stopping.set()

    def seen(self) -> Asked:
        p50_ms, p99_ms = p50_and_p99(self._latencies_ms)
        return Asked(
            answers=self._answers,
            failures=self._failures,
            degraded=self._degraded,
            p50_ms=p50_ms,
            p99_ms=p99_ms,
        )

    def _ask(self, user: str) -> None:
        began = time.perf_counter()
        try:
            answer = self._client.recommend(user_id=user)
        except UnavailableError:
            self._failures += 1
            return
        self._latencies_ms.append((time.perf_counter() - began) * 1000)
        self._answers += 1
        self._degraded += bool(answer["degraded"])
