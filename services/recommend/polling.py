"""Something looked at again and again, in a thread of its own."""

import threading
import time
from collections.abc import Callable
from typing import Final

RETRY_S: Final = 5.0


class Polling:
    """Calls `look`, which raises nothing, at once and then every `poll_s`."""

    def __init__(self, look: Callable[[], None], *, poll_s: float, name: str) -> None:
        self._look = look
        self._poll_s = poll_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_up, name=name, daemon=True)

    def start(self) -> None:
        """Returns after the first look."""
        self._look()
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(timeout=10.0)

    def _keep_up(self) -> None:
        while not self._stop.wait(self._poll_s):
            self._look()


class Attempts:
    """Lets whatever has failed be tried again only `RETRY_S` later."""

    def __init__(self) -> None:
        self._failed: object = None
        self._failed_at_s = 0.0

    def begin(self, what: object) -> bool:
        """Whether to try it now; failed until `succeed`."""
        now_s = time.monotonic()
        if what == self._failed and now_s < self._failed_at_s + RETRY_S:
            return False
        self._failed, self._failed_at_s = what, now_s
        return True

    def succeed(self) -> None:
        self._failed = None
