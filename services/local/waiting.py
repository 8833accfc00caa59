"""Look again and again until something is so."""

import time
from collections.abc import Callable
from typing import Final

from services.core.errors import RefluxError

POLL_S: Final = 0.1


def wait(what: str, done: Callable[[], bool], *, give_up_s: float) -> None:
    """Until it is done; `RefluxError` says what was not."""
    deadline = time.monotonic() + give_up_s
    while not done():
        if time.monotonic() > deadline:
            raise RefluxError(f"{what}: not within {give_up_s:g} s")
        time.sleep(POLL_S)
