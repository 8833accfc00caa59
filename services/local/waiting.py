"""Look again and again until something is so; let something run meanwhile."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from services.core.errors import RefluxError

POLL_S: Final = 0.1


def wait(
    what: str,
    done: Callable[[], bool],
    *,
    give_up_s: float,
    every_s: float = POLL_S,
    logs: Path | None = None,
) -> None:
    """Until it is done; `RefluxError` says what was not, and where one can read why."""
    deadline = time.monotonic() + give_up_s
    while not done():
        if time.monotonic() > deadline:
            hint = "" if logs is None else f"; see {logs}"
            raise RefluxError(f"{what}: not within {give_up_s:g} s{hint}")
        time.sleep(every_s)


@contextmanager
def alongside(run: Callable[[threading.Event], None]) -> Iterator[None]:
    """`run` in a thread of its own, which is told to stop at the end, and waited for."""
    stop = threading.Event()
    thread = threading.Thread(target=run, args=(stop,))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
