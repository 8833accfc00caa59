"""The way to `heavy.py`: a process that starts with the first request and ends after idling."""

import asyncio
import json
import os
import sys
import time
from collections.abc import Mapping
from typing import Any, Final

from services.core.errors import UnavailableError

IDLE_S: Final = 300.0
TIMEOUT_S: Final = 90.0  # torch is imported in it, beside everything else on a busy machine
LINE_BYTES: Final = 2**22


class Aside:
    """One request at a time. `UnavailableError` says what went wrong, and the next one starts a
    new process."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._env = env
        self._lock = asyncio.Lock()
        self._asking_sometimes = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._ending: asyncio.TimerHandle | None = None
        self._remembered: dict[str, tuple[float, dict[str, Any]]] = {}

    async def ask(self, what: str, **request: Any) -> dict[str, Any]:
        """What `Heavy.<what>` returns."""
        async with self._lock:
            line = json.dumps({"what": what, **request}).encode() + b"\n"
            try:
                answer = await asyncio.wait_for(self._exchange(line), TIMEOUT_S)
            except (TimeoutError, OSError, ValueError) as error:
                await self._end()
                raise UnavailableError(
                    f"the process beside the console failed ({error or 'too slow'}); try again, "
                    "its log is the console's"
                ) from None
            self._end_when_idle()
        if "error" in answer:
            raise UnavailableError(answer["error"])
        return dict(answer["result"])

    async def ask_sometimes(self, what: str, *, every_s: float, **request: Any) -> dict[str, Any]:
        """The same, but at most so often, however many pages ask."""
        async with self._asking_sometimes:
            known = self._remembered.get(what)
            if known is None or time.monotonic() - known[0] > every_s:
                found = await self.ask(what, **request)
                known = self._remembered[what] = (time.monotonic(), found)
            return known[1]

    async def close(self) -> None:
        async with self._lock:
            await self._end()

    async def _exchange(self, line: bytes) -> dict[str, Any]:
        if self._process is None or self._process.returncode is not None:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "services.console.heavy"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env={**os.environ, **self._env},
                limit=LINE_BYTES,
            )
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(line)
        await self._process.stdin.drain()
        return dict(json.loads(await self._process.stdout.readline()))

    def _end_when_idle(self) -> None:
        if self._ending:
            self._ending.cancel()
        loop = asyncio.get_running_loop()
        self._ending = loop.call_later(IDLE_S, lambda: loop.create_task(self.close()))

    async def _end(self) -> None:
        if self._ending:
            self._ending.cancel()
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()  # it holds nothing
            await process.wait()
