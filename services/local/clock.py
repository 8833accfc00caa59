"""Producers whose clocks are wrong: one is far ahead, one far behind."""

import threading
import time
import uuid
from collections.abc import Callable
from typing import Any, Final

import orjson

from services.core.errors import RefluxError
from services.core.events import EVENTS
from services.core.kafka import Publisher
from services.core.settings import Settings
from services.ingest.dead import dead_letters
from services.local.load import Producer
from services.local.promises import Promise

AHEAD_MS: Final = 3_600_000
BEHIND_MS: Final = 30 * 86_400_000
EVERY_S: Final = 0.2
DEAD_TIMEOUT_S: Final = 60.0


def skewed_producers(
    settings: Settings, producer: Producer
) -> tuple[Callable[[], None], Callable[[], Promise]]:
    """Let both send, by HTTP and straight to Kafka; return what stops them, and the verdict.

    What is from behind is acknowledged, and then in the ledger of `producer` like any event. What
    claims to come from the future would mask its user's history until then: the gateway refuses
    it, and where it comes by Kafka, it is a dead letter.
    """
    stop = threading.Event()
    run = uuid.uuid4().hex[:8]
    counts = {"ahead": 0, "let in": 0}
    bypassing: set[bytes] = set()

    def send() -> None:
        publisher = Publisher(settings)
        try:
            while not stop.wait(EVERY_S):
                number = counts["ahead"]
                counts["ahead"] += 1
                ahead = _event(f"ahead-{run}-{number}", AHEAD_MS)
                counts["let in"] += producer.offer([ahead]) == 202
                producer.offer([_event(f"behind-{run}-{number}", -BEHIND_MS)])
                bypass = orjson.dumps(_event(f"bypass-{run}-{number}", AHEAD_MS))
                publisher.publish(EVENTS, [(ahead["user_id"].encode(), bypass)])
                bypassing.add(bypass)
        finally:
            publisher.close()

    thread = threading.Thread(target=send)
    thread.start()

    def end() -> None:
        stop.set()
        thread.join()

    def finish() -> Promise:
        buried = _buried(settings, bypassing)
        found = f"{counts['ahead']} refused, {buried} of {len(bypassing)} by Kafka dead letters"
        if counts["let in"]:
            found = f"{counts['let in']} let in; {found}"
        return Promise(
            name="events from the future stay out",
            kept=counts["ahead"] > 0 and counts["let in"] == 0 and buried == len(bypassing),
            found=found,
        )

    return end, finish


def _event(event_id: str, skew_ms: int) -> dict[str, Any]:
    return {
        "event_id": event_id,
        "user_id": f"chaos-user-{len(event_id) % 7}",
        "item_id": "chaos-item-0",
        "type": "click",
        "timestamp": time.time_ns() // 1_000_000 + skew_ms,
    }


def _buried(settings: Settings, wanted: set[bytes]) -> int:
    """How many of them are dead letters; waits a while for the last one."""
    deadline = time.monotonic() + DEAD_TIMEOUT_S
    found: set[bytes] = set()
    while found != wanted and time.monotonic() < deadline:
        try:
            found = wanted & {letter.raw for letter in dead_letters(settings)}
        except RefluxError:
            continue
    return len(found)
