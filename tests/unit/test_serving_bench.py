"""The bench's load generator against servers that misbehave, and its figures."""

import asyncio
from collections.abc import Awaitable, Callable

from services.local.serving_bench.generator import Load, Measured, Plan
from services.local.serving_bench.report import figures
from services.local.serving_bench.run import CLOSED, OPEN, SWAPS, Row

Serve = Callable[[int], Awaitable[bytes]]

OK = b'HTTP/1.1 200 OK\r\ncontent-length: 17\r\n\r\n{"degraded":true}'
SHED = b"HTTP/1.1 503 Busy\r\nretry-after: 1\r\ncontent-length: 0\r\n\r\n"
BROKEN = b"HTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n"


def measure(serve: Serve, *, rate: float, connections: int, seconds: float) -> Measured:
    """A load on a server that answers its nth request with `serve(n)`, empty: hangs up."""

    async def run() -> Measured:
        count = 0

        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal count
            try:
                while await reader.readuntil(b"\r\n\r\n"):
                    await reader.readuntil(b"}")
                    count += 1
                    if not (answer := await serve(count)):
                        break
                    writer.write(answer)
            except asyncio.IncompleteReadError:
                pass
            writer.close()

        server = await asyncio.start_server(talk, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            plan = Plan(
                host="127.0.0.1",
                port=port,
                user_ids=["u"],
                seconds=seconds,
                rate=rate,
                connections=connections,
            )
            return await Load(plan).run()

    return asyncio.run(run())


def test_a_stall_shows_in_every_request_that_it_held_up() -> None:
    async def stalls_once(number: int) -> bytes:
        if number == 10:
            await asyncio.sleep(0.5)
        return OK

    measured = measure(stalls_once, rate=100, connections=1, seconds=1.0)
    assert measured.answers == measured.degraded == 100
    assert not measured.failures
    # One request was slow by the clock of its sender; half of them had been due during the stall.
    assert measured.from_due_ms["p90"] > measured.from_sent_ms["p90"]


def test_failures_are_told_apart() -> None:
    async def misbehaves(number: int) -> bytes:
        return {3: SHED, 4: BROKEN, 5: b""}.get(number, OK)

    measured = measure(misbehaves, rate=0, connections=2, seconds=0.3)
    assert measured.failures == {"503, Retry-After": 1, "500": 1, "connection lost": 1}
    assert measured.answers > 0


def test_figures_are_ratios_within_the_run() -> None:
    def row(subject: str, phase: str, *, per_s: float, p99: float, cpu_ms: float) -> Row:
        times = {"p50": 1.0, "p99": p99}
        measured = Measured(
            answers=1,
            failures={},
            degraded=0,
            per_s=per_s,
            from_due_ms=times,
            from_sent_ms=times,
            mean_ms=1.0,
            own_cpu_s=0.0,
        )
        return Row(
            subject=subject,
            items=10_000,
            phase=phase,
            rate=0,
            measured=measured,
            cpu_us={"replica": 600 * cpu_ms, "HAProxy": 400 * cpu_ms},
            memory_bytes=0,
        )

    rows = [
        row("noop", CLOSED, per_s=1000, p99=9, cpu_ms=1.0),
        row("uvicorn", CLOSED, per_s=800, p99=9, cpu_ms=1.0),
        row("endpoint", CLOSED, per_s=600, p99=9, cpu_ms=1.5),
        row("endpoint", OPEN, per_s=300, p99=4, cpu_ms=9),
        row("endpoint", SWAPS, per_s=300, p99=5, cpu_ms=9),
        row("endpoint", OPEN, per_s=300, p99=40, cpu_ms=9),  # the machine had other things to do
        row("endpoint", SWAPS, per_s=300, p99=48, cpu_ms=9),
        row("endpoint", OPEN, per_s=300, p99=4, cpu_ms=9),
        row("endpoint", SWAPS, per_s=300, p99=6, cpu_ms=9),
    ]
    assert [figure.value for figure in figures(rows)] == [1.5, 0.75, 1.25]
