"""`reflux bench console`: what the page costs the stack that it shows.

On a stack that runs (`reflux up`, `reflux demo`), phases without and with open pages take turns, so
that whatever else the machine does weighs on both alike. An open page is what a browser's is to
the server: `/api/state`, `/api/history`, then the stream.
"""

import asyncio
import contextlib
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Final

import httpx
import psutil

from services.core.errors import UnavailableError
from services.core.settings import Settings
from services.core.stackfile import read_stack
from services.local.client import Client

SETTLE_S: Final = 4.0  # after pages were opened or closed, until what is measured


@dataclass
class Phase:
    """One kind of phase, over all of its turns."""

    pages: int
    seconds: float = 0.0
    cpu_s: float = 0.0
    frames: int = 0
    latencies_ms: list[float] = field(default_factory=list)

    def latency_ms(self, q: float) -> float:
        ordered = sorted(self.latencies_ms)
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))]

    @property
    def cores(self) -> float:
        """CPU of the console's process, in cores."""
        return self.cpu_s / self.seconds


class Pages(threading.Thread):
    """Keeps `n` pages open until closed."""

    def __init__(self, settings: Settings, n: int) -> None:
        super().__init__(daemon=True)
        self._url = settings.console_url
        self._headers = settings.keys.header("operate")
        self._n = n
        self._closing = threading.Event()
        self.open = 0
        self.frames = 0

    def run(self) -> None:
        asyncio.run(self._all())

    def close(self) -> None:
        self._closing.set()
        self.join(timeout=30.0)

    async def _all(self) -> None:
        async with httpx.AsyncClient(
            base_url=self._url,
            headers=self._headers,
            timeout=60.0,
            limits=httpx.Limits(max_connections=2 * self._n),
        ) as http:
            pages = [asyncio.create_task(self._page(http)) for _ in range(self._n)]
            while not self._closing.is_set():
                await asyncio.sleep(0.1)
            for page in pages:
                page.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(*pages, return_exceptions=True)

    async def _page(self, http: httpx.AsyncClient) -> None:
        for path in ("/api/state", "/api/history?seconds=900"):
            (await http.get(path)).raise_for_status()
        async with http.stream("GET", "/api/stream") as stream:
            self.open += 1
            async for line in stream.aiter_lines():
                self.frames += line == "event: look"


def measure(
    settings: Settings, *, pages: int, seconds: float, rate: float, turns: int
) -> tuple[Phase, Phase]:
    """Without and with `pages`, `turns` times `seconds` each, while `rate` answers/s are asked
    for."""
    stack = read_stack(settings)
    if stack is None or "console" not in stack["processes"]:
        raise UnavailableError(
            "no stack with a console runs here: `reflux up`, let a student be distilled, retry"
        )
    console = psutil.Process(int(stack["processes"]["console"]["pid"]))
    without, with_pages = Phase(0), Phase(pages)
    with Client(settings) as client:
        client.recommend(user_id=None)  # UnavailableError where nothing answers yet
        for _ in range(turns):
            for phase in (without, with_pages):
                opened = Pages(settings, phase.pages) if phase.pages else None
                if opened:
                    opened.start()
                time.sleep(SETTLE_S)
                seen = opened.frames if opened else 0
                _run(phase, client, console, seconds=seconds, rate=rate)
                if opened:
                    if opened.open < phase.pages:
                        raise UnavailableError(f"only {opened.open} of {phase.pages} pages opened")
                    phase.frames += opened.frames - seen
                    opened.close()
    return without, with_pages


def _run(
    phase: Phase, client: Client, console: psutil.Process, *, seconds: float, rate: float
) -> None:
    began_s, before = time.monotonic(), _cpu_s(console)
    asked = 0
    while (elapsed_s := time.monotonic() - began_s) < seconds:
        if (ahead_s := asked / rate - elapsed_s) > 0:
            time.sleep(ahead_s)
        asked_s = time.perf_counter()
        client.recommend(user_id=f"bench {asked % 500}")
        phase.latencies_ms.append(1000 * (time.perf_counter() - asked_s))
        asked += 1
    phase.seconds += time.monotonic() - began_s
    phase.cpu_s += _cpu_s(console) - before


def _cpu_s(process: psutil.Process) -> float:
    """Of the process and what it has started."""
    total = 0.0
    for one in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            times: Any = one.cpu_times()
            total += times.user + times.system
    return total


def render(phases: tuple[Phase, Phase]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("pages open", "console, % of a core", "looks/s a page", "answers", box=None)
    for name in ("p50 ms", "p99 ms"):
        table.add_column(name)
    for phase in phases:
        looks = phase.frames / phase.seconds / phase.pages if phase.pages else 0.0
        table.add_row(
            str(phase.pages),
            f"{100 * phase.cores:.2f}",
            f"{looks:.2f}" if phase.pages else "-",
            str(len(phase.latencies_ms)),
            f"{phase.latency_ms(0.5):.2f}",
            f"{phase.latency_ms(0.99):.2f}",
        )
    Console().print(table)
