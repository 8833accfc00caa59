"""What the gateway holds at once, and what it refuses to hold."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from fastapi import Request
from prometheus_client import Gauge

from services.core.errors import BusyError

MIN_HELD_BYTES: Final = 16 * 1024  # what a request costs beside its body


class TooLargeError(Exception):
    """A request that is over a limit; the message names the limit and its setting."""


class Held:
    """Bytes of the requests under way: past the bound nothing more is taken in."""

    def __init__(self, max_bytes: int, gauge: Gauge) -> None:
        self._max_bytes = max_bytes
        self._gauge = gauge
        self._bytes = 0

    @asynccontextmanager
    async def body(self, request: Request, *, max_bytes: int) -> AsyncIterator[bytes]:
        """The request's body, which counts until the block ends.

        `TooLargeError` past `max_bytes`, `BusyError` where it doesn't fit beside the others.
        """
        counted, body = 0, bytearray()
        try:
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise TooLargeError(
                        f"the body has more than {max_bytes} bytes (REFLUX_MAX_BODY_BYTES): "
                        "send several"
                    )
                more = max(MIN_HELD_BYTES, len(body)) - counted
                if self._bytes + more > self._max_bytes:
                    raise BusyError(
                        f"{self._bytes} bytes wait for Kafka already (REFLUX_MAX_HELD_BYTES); "
                        "retry later"
                    )
                counted += more
                self._count(more)
            yield bytes(body)
        finally:
            self._count(-counted)

    def _count(self, more: int) -> None:
        self._bytes += more
        self._gauge.set(self._bytes)
