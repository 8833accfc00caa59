"""A load generator over bare connections, in a process of its own.

    python -m services.local.serving_bench.generator < plan.json > measured.json

Closed loop (`rate` 0): each connection asks again once it has its answer; that finds saturation.
Open loop: a request is due every 1 / `rate` seconds whatever has been answered. Its latency counts
from when it was due, so that a stall shows in every request that it held up; beside it stands the
latency from when it was really sent, which is all that a closed loop would ever see.
"""

import asyncio
import json
import random
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, cast

import httptools
import uvloop

QUANTILES: Final = (0.5, 0.9, 0.99, 0.999)
DRAIN_S: Final = 5.0  # for what is under way at the end
RECONNECT_S: Final = 0.05
PREPARED: Final = 32_768  # distinct requests
RETRY_LATER: Final = ", Retry-After"
SHED: Final = f"503{RETRY_LATER}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to ask, of whom, for how long."""

    host: str
    port: int
    user_ids: list[str]
    seconds: float
    rate: float = 0.0  # requests per second; 0: closed loop
    connections: int = 16
    authorization: str = ""
    n: int = 10


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What came back. Latencies in ms by the names of `QUANTILES`, empty without an answer."""

    answers: int
    failures: dict[str, int]  # by reason
    degraded: int
    per_s: float
    from_due_ms: dict[str, float]
    from_sent_ms: dict[str, float]
    mean_ms: float  # from sent
    own_cpu_s: float


def quantiles_ms(latencies_s: Sequence[float]) -> dict[str, float]:
    """The nearest-rank quantiles.

    >>> quantiles_ms([0.001, 0.002])["p50"]
    1.0
    """
    ordered = sorted(latencies_s)
    last = len(ordered) - 1
    return {
        f"p{q * 100:g}": round(
            1000 * ordered[min(last, max(0, -int(-q * len(ordered) // 1) - 1))], 3
        )
        for q in QUANTILES
        if ordered
    }


@dataclass(eq=False)
class Load:
    """One run of a plan."""

    plan: Plan
    idle: deque["Connection"] = field(default_factory=deque)
    due: deque[float] = field(default_factory=deque)  # waits for a connection; when it was due
    under_way: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    degraded: int = 0
    from_due_s: list[float] = field(default_factory=list)
    from_sent_s: list[float] = field(default_factory=list)
    ends_s: float = 0.0

    async def run(self) -> Measured:
        plan = self.plan
        chosen = random.Random(0).choices(plan.user_ids, k=PREPARED)
        self._requests = [_request(plan, user_id) for user_id in chosen]
        self._next = 0
        connections = [Connection(self) for _ in range(plan.connections)]
        await asyncio.gather(*(one.open() for one in connections))
        began_s, cpu_s = time.perf_counter(), time.process_time()
        self.ends_s = began_s + plan.seconds
        if plan.rate:
            await asyncio.to_thread(self._open_loop, began_s, asyncio.get_running_loop())
        else:
            for _ in range(len(self.idle)):
                self.ask(time.perf_counter())
            await asyncio.sleep(plan.seconds)
        took_s = time.perf_counter() - began_s
        answered = len(self.from_due_s)
        cpu_s = time.process_time() - cpu_s
        waited_until_s = time.perf_counter() + DRAIN_S
        while (self.under_way or self.due) and time.perf_counter() < waited_until_s:
            await asyncio.sleep(0.01)
        if left := self.under_way + len(self.due):
            self.failures["no answer"] += left
        return Measured(
            answers=len(self.from_due_s),
            failures=dict(self.failures),
            degraded=self.degraded,
            per_s=answered / took_s,
            from_due_ms=quantiles_ms(self.from_due_s),
            from_sent_ms=quantiles_ms(self.from_sent_s),
            mean_ms=1000 * sum(self.from_sent_s) / max(1, len(self.from_sent_s)),
            own_cpu_s=cpu_s,
        )

    def _open_loop(self, began_s: float, loop: asyncio.AbstractEventLoop) -> None:
        """In a thread: the loop's own timers are a millisecond coarse."""
        number, every_s = 0, 1 / self.plan.rate
        while (due_s := began_s + number * every_s) < self.ends_s:
            time.sleep(max(0.0, due_s - time.perf_counter()))
            loop.call_soon_threadsafe(self.ask, due_s)
            number += 1

    def ask(self, due_s: float) -> None:
        """Send the next request, or let it wait for a connection."""
        if not self.idle:
            self.due.append(due_s)
            return
        connection = self.idle.popleft()
        self.under_way += 1
        request = self._requests[self._next % PREPARED]
        self._next += 1
        connection.send(request, due_s)

    def free(self, connection: "Connection") -> None:
        self.idle.append(connection)
        if self.due:
            self.ask(self.due.popleft())
        elif not self.plan.rate and 0 < time.perf_counter() < self.ends_s:
            self.ask(time.perf_counter())

    def answered(self, connection: "Connection", status: str, degraded: bool) -> None:
        now_s = time.perf_counter()
        self.under_way -= 1
        if status == "200":
            self.from_due_s.append(now_s - connection.due_s)
            self.from_sent_s.append(now_s - connection.sent_s)
            self.degraded += degraded
        else:
            self.failures[status] += 1

    def lost(self) -> None:
        self.under_way -= 1
        self.failures["connection lost"] += 1


class Connection(asyncio.Protocol):
    """One connection, one request at a time; opened again when it is lost."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._transport: asyncio.Transport | None = None
        self._busy = False
        self.due_s = self.sent_s = 0.0

    async def open(self) -> None:
        plan, loop = self._load.plan, asyncio.get_running_loop()
        while True:
            try:
                await loop.create_connection(lambda: self, plan.host, plan.port)
            except OSError:
                self._load.failures["no connection"] += 1
                await asyncio.sleep(RECONNECT_S)
                continue
            self._load.free(self)
            return

    def send(self, request: bytes, due_s: float) -> None:
        assert self._transport is not None
        self._busy, self.due_s, self.sent_s = True, due_s, time.perf_counter()
        self._shed = False
        self._parser = httptools.HttpResponseParser(self)
        self._body = b""
        self._transport.write(request)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own is no subclass

    def data_received(self, data: bytes) -> None:
        if self._busy:
            self._parser.feed_data(data)

    def on_header(self, name: bytes, _: bytes) -> None:
        self._shed = self._shed or name.lower() == b"retry-after"

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        self._busy = False
        status = str(self._parser.get_status_code()) + (RETRY_LATER if self._shed else "")
        self._load.answered(self, status, b'"degraded":true' in self._body)
        if self._parser.should_keep_alive():
            self._load.free(self)
        elif self._transport is not None:
            self._transport.close()

    def connection_lost(self, _: Exception | None) -> None:
        if self._busy:
            self._busy = False
            self._load.lost()
        elif self in self._load.idle:
            self._load.idle.remove(self)
        self._transport = None
        if time.perf_counter() < self._load.ends_s:
            self._opening = asyncio.get_running_loop().create_task(self.open())


def _request(plan: Plan, user_id: str) -> bytes:
    body = json.dumps({"user_id": user_id, "n": plan.n}).encode()
    head = [
        "POST /v1/recommendations HTTP/1.1",
        f"host: {plan.host}:{plan.port}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        *([f"authorization: {plan.authorization}"] if plan.authorization else []),
    ]
    return "\r\n".join([*head, "", ""]).encode() + body


def main() -> None:
    given: dict[str, Any] = json.load(sys.stdin)
    measured = uvloop.run(Load(Plan(**given)).run())
    json.dump(asdict(measured), sys.stdout)


if __name__ == "__main__":
    main()
