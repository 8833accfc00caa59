"""Imports that somebody waits for."""

import gc
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def importing() -> Iterator[None]:
    """Around them: no garbage collection, which finds nothing there and takes a sixth of the time
    that torch's take."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def loop_of(module: str) -> Callable[[dict[str, Any]], None]:
    """The module's `work`, for Ray Train; what it needs, torch above all, is imported in the worker
    and by nobody before: a job that is started again then learns sooner."""

    def loop(given: dict[str, Any]) -> None:
        with importing():
            work = importlib.import_module(module).work
        work(given)

    return loop
