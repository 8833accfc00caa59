"""How soon what a user does shows in the next answer: posted, asked, until it does. HTTP only."""

import json
import threading
import time
from dataclasses import dataclass
from itertools import count
from typing import Final

from services.core.errors import RefluxError
from services.core.settings import Settings
from services.local.asker import p50_and_p99
from services.local.client import Client, new_event

GIVE_UP_S: Final = 20.0
ASK_AGAIN_S: Final = 0.002


@dataclass(frozen=True, kw_only=True)
class Probed:
    """From the post of an event until an answer that knows it was there, in ms."""

    events: int
    lost: int  # not seen within `GIVE_UP_S`
    p50_ms: float | None
    p99_ms: float | None


class Prober(threading.Thread):
    """Now and then a new user comes, takes the first item of an answer, and asks again until the
    answer leaves it out: what a user has had is not recommended again."""

    def __init__(self, settings: Settings, *, every_s: float) -> None:
        super().__init__(daemon=True)
        self._client = Client(settings, timeout_s=5.0)
        self._every_s = every_s
        self._stopping = threading.Event()
        self._took_ms: list[float] = []
        self._lost = 0

    def run(self) -> None:
        for number in count():
            if self._stopping.wait(self._every_s):
                return
            try:
                self._probe(f"probe-{number}")
            except RefluxError:
                self._lost += 1

    def stop(self) -> None:
        self._stopping.set()

    def seen(self) -> Probed:
        p50_ms, p99_ms = p50_and_p99(self._took_ms)
        return Probed(events=len(self._took_ms), lost=self._lost, p50_ms=p50_ms, p99_ms=p99_ms)

    def _probe(self, user_id: str) -> None:
        taken = self._shown(user_id)[0]
        event = new_event(user_id=user_id, item_id=taken, type_="click")
        began_s = time.monotonic()
        self._client.send(json.dumps(event).encode())
        while taken in self._shown(user_id):
            if time.monotonic() > began_s + GIVE_UP_S:
                self._lost += 1
                return
            time.sleep(ASK_AGAIN_S)
        self._took_ms.append(1000 * (time.monotonic() - began_s))

    def _shown(self, user_id: str) -> list[str]:
        # So many that another version's ranking alone doesn't drop the first one from them.
        return [item["item_id"] for item in self._client.recommend(user_id=user_id, n=50)["items"]]
