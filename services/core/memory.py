"""Memory of processes that run for weeks."""

import ctypes
import time
from typing import Final

import pyarrow as pa

TRIM_EVERY_S: Final = 10.0


class Trimmer:
    """Gives what was freed back to the system, now and then.

    glibc keeps it for the next allocation, but tensors of ever other sizes cut it into pieces that
    no later one fits in: a distillation worker that holds 520 MB with this had 780 without. Arrow's
    own pool keeps what tables took: 10 to 50 MB that came and went with checkpoints and versions.
    With another C library only that one is emptied.
    """

    def __init__(self) -> None:
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        self._due_s = time.monotonic() + TRIM_EVERY_S

    def tick(self) -> None:
        """Call often; every `TRIM_EVERY_S` it takes some ms."""
        if time.monotonic() < self._due_s:
            return
        pa.default_memory_pool().release_unused()
        if self._trim is not None:
            self._trim(0)
        self._due_s = time.monotonic() + TRIM_EVERY_S
