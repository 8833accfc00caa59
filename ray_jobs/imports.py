"""Imports that somebody waits for."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Around them: no garbage collection, which finds nothing there and takes a sixth of the time
    that torch's take."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
