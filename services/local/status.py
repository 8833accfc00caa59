"""`reflux status`: the same numbers as the console's page, from it where one runs."""

from typing import Any

import httpx

from services.console.observe import Observer
from services.core.settings import Settings
from services.core.stackfile import demo_of, running_stack

TIMEOUT_S = 5.0
NOT_SHOWN = (
    "at_ms",
    "teacher_created_ms",
    "student_created_ms",
    "processes",
    "restarts",
    "endpoints",
    "metrics",  # of which the stream's are shown below
    "quality",
    "loss",
    "recent",
)


def status(settings: Settings) -> dict[str, Any]:
    """What the console answers to `GET /api/status`; looked up here where no console does."""
    if settings.console_url:
        try:
            response = httpx.get(
                f"{settings.console_url}/api/status",
                headers=settings.keys.header("operate") or settings.keys.header("recommend"),
                timeout=TIMEOUT_S,
            )
            if response.status_code == 200:
                return dict(response.json())
        except httpx.TransportError:
            pass
    return Observer(settings).look().to_dict()


def demo_beside(settings: Settings) -> str | None:
    """How to see the demo that runs, where nothing else does: it has a home of its own."""
    demo = demo_of(settings)
    if running_stack(settings.home) or not running_stack(demo.home):
        return None
    return f"a demo runs: `REFLUX_HOME={demo.home} reflux status` shows it"


def render_status(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for name, value in found.items():
        if name not in NOT_SHOWN:
            table.add_row(name.replace("_", " "), _text(value))
    for name, alive in found["processes"].items():
        table.add_row(f"process {name}", "[green]runs[/]" if alive else "[red]dead[/]")
    for name, value in sorted(found["metrics"].items()):
        if name.startswith("stream."):
            table.add_row(name, _text(value))
    Console().print(table)


def _text(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.4f}" if abs(value) < 1 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
