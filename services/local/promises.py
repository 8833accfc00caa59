"""What was promised, and what was found."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Promise:
    """One thing that was promised, and what was found."""

    name: str
    kept: bool
    found: str


def show(promises: Sequence[Promise]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "promise", "found", box=None)
    for promise in promises:
        mark = "[green]kept[/]" if promise.kept else "[red]BROKEN[/]"
        table.add_row(mark, promise.name, promise.found)
    Console().print(table)
