"""Something looked at again and again, in a thread of its own."""

import threading
from collections.abc import Callable


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
