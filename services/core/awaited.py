"""Rows of Redis, read on the event loop: whoever asks in the same turn shares one round trip.

At saturation 15 do, which saves 15% of an answer's CPU. Nobody waits for others.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeAlias

Row: TypeAlias = list[bytes | None]


class AwaitedRows:
    """Fields of Redis hashes by key, each within `timeout_s`.

    `connect` makes a client without deadlines of its own: each of those would be a task.
    """

    def __init__(
        self, connect: Callable[[], Awaitable[Any]], fields: Sequence[bytes], *, timeout_s: float
    ) -> None:
        self._connect, self._fields, self._timeout_s = connect, fields, timeout_s
        self._client: Any = None
        self._asked: list[tuple[bytes, asyncio.Future[Row]]] = []
        self._reading: set[asyncio.Future[None]] = set()

    async def read(self, key: bytes) -> Row:
        """The fields, None for those that aren't there; redis-py's errors, and `TimeoutError`."""
        loop = asyncio.get_running_loop()
        row: asyncio.Future[Row] = loop.create_future()
        self._asked.append((key, row))
        if len(self._asked) == 1:
            loop.call_soon(self._ask)
        return await row

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    def _ask(self) -> None:
        asked, self._asked = self._asked, []
        task = asyncio.ensure_future(self._answer(asked))
        self._reading.add(task)  # the loop itself would forget it
        task.add_done_callback(self._reading.discard)

    async def _answer(self, asked: Sequence[tuple[bytes, asyncio.Future[Row]]]) -> None:
        found: Sequence[Row | Exception]
        try:
            async with asyncio.timeout(self._timeout_s):
                found = await self._found([key for key, _ in asked])
        except TimeoutError:
            found = [TimeoutError(f"not within {self._timeout_s:g} s")] * len(asked)
        except Exception as error:  # whoever asked must hear of it, whatever it is
            found = [error] * len(asked)
        for (_, row), fields in zip(asked, found, strict=True):
            if row.done():  # whoever asked has gone
                continue
            if isinstance(fields, Exception):
                row.set_exception(fields)
            else:
                row.set_result(fields)

    async def _found(self, keys: Sequence[bytes]) -> Sequence[Row | Exception]:
        if self._client is None:
            self._client = await self._connect()
        if len(keys) == 1:  # of which a pipeline would cost 5% more
            return [await self._client.hmget(keys[0], self._fields)]
        pipe = self._client.pipeline(transaction=False)
        for key in keys:
            pipe.hmget(key, self._fields)
        found: list[Row | Exception] = await pipe.execute(raise_on_error=False)
        return found
