"""A steady, seeded load that keeps its own books: what was acknowledged, what was answered, when.

The events of a seed are always the same ones; only when each is acknowledged differs. A batch that
is refused is sent again until it is acknowledged, as a producer that means it would.
"""

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

import httpx

BATCH_EVENTS: Final = 10
RETRY_S: Final = 0.2
AT_ONCE: Final = 64  # requests under way: those of more seconds than any deadline has
BASE_MS: Final = 1_700_000_000_000
SKEW: Final = 0.8  # of the popularity of users and items: Zipf's exponent


@dataclass(frozen=True, kw_only=True)
class Request:
    """One HTTP request: when it began (monotonic), how long it took, what came (0: nothing)."""

    at_s: float
    took_s: float
    status: int

    def good(self, deadline_s: float) -> bool:
        return self.status == 200 and self.took_s <= deadline_s


def events(seed: int, *, users: int = 200, items: int = 500) -> Iterator[dict[str, Any]]:
    """The endless stream of a seed. Pure."""
    rng = random.Random(seed)
    user_ids = [f"chaos-user-{n}" for n in range(users)]
    item_ids = [f"chaos-item-{n}" for n in range(items)]
    weights = [[1 / (n + 1) ** SKEW for n in range(size)] for size in (users, items)]
    number = 0
    while True:
        chosen = zip(
            rng.choices(user_ids, weights[0], k=BATCH_EVENTS),
            rng.choices(item_ids, weights[1], k=BATCH_EVENTS),
            strict=True,
        )
        for user_id, item_id in chosen:
            yield {
                "event_id": f"chaos-{seed}-{number}",
                "user_id": user_id,
                "item_id": item_id,
                "type": "click",
                "timestamp": BASE_MS + number * 1000,
            }
            number += 1


@dataclass(eq=False)
class Producer:
    """Sends events to the gateway; `acknowledged` is the ledger: event id -> when."""

    http: httpx.Client
    stream: Iterator[dict[str, Any]]
    rate: float  # events per second
    acknowledged: dict[str, float] = field(default_factory=dict)  # monotonic seconds
    refused: list[Request] = field(default_factory=list)

    def run(self, stop: threading.Event) -> None:
        due_s = time.monotonic()
        while not stop.is_set():
            batch = [next(self.stream) for _ in range(BATCH_EVENTS)]
            while self.offer(batch) != 202:
                # What is under way at the end is not acknowledged, and nobody promised it.
                if stop.wait(RETRY_S):
                    return
            due_s = max(due_s + BATCH_EVENTS / self.rate, time.monotonic() - 1.0)
            stop.wait(max(0.0, due_s - time.monotonic()))

    def offer(self, batch: list[dict[str, Any]]) -> int:
        """Send it once, book what came of it; the status (0: no answer)."""
        at_s = time.monotonic()
        status = _status(lambda: self.http.post("/v1/events", json=batch))
        now_s = time.monotonic()
        if status == 202:
            self.acknowledged.update((event["event_id"], now_s) for event in batch)
        elif status != 422:  # which no outage gives
            self.refused.append(Request(at_s=at_s, took_s=now_s - at_s, status=status))
        return status


@dataclass(eq=False)
class Asker:
    """Asks for recommendations at a steady rate, however long answers take; `asked` has all."""

    http: httpx.Client
    seed: int
    rate: float  # requests per second
    asked: list[Request] = field(default_factory=list)

    def run(self, stop: threading.Event) -> None:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for event in events(self.seed):
                if stop.wait(1 / self.rate):
                    return
                pool.submit(self._ask, str(event["user_id"]), time.monotonic())

    def _ask(self, user_id: str, at_s: float) -> None:
        body = {"user_id": user_id, "n": 10}
        status = _status(lambda: self.http.post("/v1/recommendations", json=body))
        self.asked.append(Request(at_s=at_s, took_s=time.monotonic() - at_s, status=status))


def _status(request: Callable[[], httpx.Response]) -> int:
    try:
        return request().status_code
    except httpx.TransportError:
        return 0
