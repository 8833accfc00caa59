"""The bench's table, and the ratios that the figures are judged by."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from services.local.serving_bench.generator import Measured
from services.local.serving_bench.run import CLOSED, ONE, OPEN, SWAPS, Row
from services.local.serving_bench.subjects import ENDPOINT, ENGINE, NOOP, WHOLE


@dataclass(frozen=True)
class Figure:
    """A ratio (or time) of this run beside what is wanted of it."""

    name: str
    value: float
    reach: str


def figures(rows: Sequence[Row]) -> list[Figure]:
    """Those that this run has measured. Pure."""
    by = {(row.subject, row.items, row.phase): row for row in rows}
    sizes = sorted({row.items for row in rows})
    found: list[Figure] = []

    def ratio(name: str, over: float | None, under: float | None, reach: str) -> None:
        if over and under:
            found.append(Figure(name, over / under, reach))

    def p99s(subject: str, items: int, phase: str) -> list[float | None]:
        """One of each turn; None where nobody was answered."""
        wanted = (subject, items, phase)
        these = [row.measured for row in rows if (row.subject, row.items, row.phase) == wanted]
        return [one.from_due_ms.get("p99") for one in these]

    def p99(subject: str, items: int, phase: str) -> float | None:
        known = [one for one in p99s(subject, items, phase) if one]
        return median(known) if known else None

    def per_s(subject: str, items: int) -> float | None:
        row = by.get((subject, items, CLOSED))
        return row.measured.per_s if row else None

    def cpu(subject: str, items: int) -> float | None:
        row = by.get((subject, items, CLOSED))
        return row.cpu_ms if row else None

    for items in sizes:
        if engine := by.get((ENGINE, items, "loop")):
            p50 = engine.measured.from_due_ms["p50"]
            found.append(Figure(f"engine alone, {items:,} items, p50 in ms", p50, "<= 1"))
        about = f"{items:,} items: "
        ratio(
            f"{about}CPU per answer, endpoint / no-op",
            cpu(ENDPOINT, items),
            cpu(NOOP, sizes[0]),
            "<= 1.5",
        )
        ratio(
            f"{about}answers/s at saturation, endpoint / uvicorn",
            per_s(ENDPOINT, items),
            per_s("uvicorn", items),
            ">= 0.7",
        )
        for subject in (ENDPOINT, "uvicorn", "litserve"):
            turns = zip(p99s(subject, items, SWAPS), p99s(subject, items, OPEN), strict=False)
            if ratios := [one / other for one, other in turns if one and other]:
                name = f"{about}{subject}, p99 with swaps / without, median of {len(ratios)} turns"
                found.append(Figure(name, median(ratios), "<= 1.3"))
    for subject in (ENDPOINT, "uvicorn", "litserve"):
        if len(sizes) > 1:
            ratio(
                f"{subject}, p99 at {sizes[-1]:,} items / at {sizes[0]:,}",
                p99(subject, sizes[-1], OPEN),
                p99(subject, sizes[0], OPEN),
                "<= 2",
            )
    return found


def stages(row: Row) -> list[tuple[str, float]]:
    """Where the time of an answer goes, in µs: what contains the others first. Pure."""
    client_us = 1000 * row.measured.mean_ms
    told = dict(row.stages_us)
    whole_us = told.pop(WHOLE, None)
    found = [("from request to answer, as the client sees it", client_us)]
    if whole_us is not None:
        found += [("  proxy, sockets, ASGI server", client_us - whole_us), ("  the app", whole_us)]
        found += [(f"    {stage}", us) for stage, us in told.items()]
        found += [("    the rest: validation, JSON, metrics", whole_us - sum(told.values()))]
    return found


def render(rows: Sequence[Row], ceiling: Measured | None) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        *("subject", "items", "phase", "asked/s", "answers/s"),
        *("p50", "p90", "p99", "p99.9", "p99 sent", "CPU ms", "MB", "failed"),
        *("degraded", "shed", "swaps, events"),
        box=None,
    )
    for row in rows:
        got, times = row.measured, row.measured.from_due_ms
        table.add_row(
            row.subject,
            f"{row.items:,}",
            row.phase,
            f"{row.rate:,.0f}" if row.rate else "all",
            f"{got.per_s:,.0f}",
            *(f"{times[q]:.2f}" if q in times else "-" for q in ("p50", "p90", "p99", "p99.9")),
            f"{got.from_sent_ms['p99']:.2f}" if got.from_sent_ms else "-",
            f"{row.cpu_ms:.2f}",
            f"{row.memory_bytes / 2**20:,.0f}" if row.memory_bytes else "-",
            f"{row.failed:,}",
            f"{got.degraded:,}",
            f"{row.shed:,}",
            f"{row.happened:,}" if row.happened else "",
        )
    most = f"{ceiling.per_s:,.0f}" if ceiling else "(no HAProxy here to tell)"
    console = Console(width=170)
    console.print(table)
    console.print(
        "ms; latencies of an open loop count from when a request was due, 'p99 sent' from when it "
        "was sent.\nCPU of the subject's processes per answer (with the proxy and Serve's actors); "
        f"what the generator can do: {most} answers/s. Shed: 503 with Retry-After.\n"
    )
    by = {(row.subject, row.items, row.phase): row for row in rows}
    for row in rows:
        closed = (row.subject, row.items, CLOSED) in by
        if closed and row.phase == ONE and row.subject in (ENDPOINT, NOOP):
            parts = Table(f"{row.subject}, {row.items:,} items, {ONE}", "µs", box=None)
            for stage, us in stages(row):
                parts.add_row(stage, f"{us:,.0f}")
            for part, us in by[row.subject, row.items, CLOSED].cpu_us.items():
                parts.add_row(f"CPU at saturation: {part}", f"{us:,.0f}")
            console.print(parts, "")
    judged = Table("figure", "measured", "reach", box=None)
    for figure in figures(rows):
        judged.add_row(figure.name, f"{figure.value:.2f}", figure.reach)
    console.print(judged)
