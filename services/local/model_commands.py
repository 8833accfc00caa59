"""`reflux models`: published versions, and which of them serves."""

import json
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from services.core.registry import Registry


app = typer.Typer(help="Published versions.", no_args_is_help=True)

KindArgument = Annotated[Literal["teacher", "student"], typer.Argument(help="which model")]


@app.command("list")
def list_(
    kind: KindArgument = "student",
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
) -> None:
    """Versions with their metrics, lineage and the gate's word."""
    from services.core.settings import Settings
    from services.local.models import list_models, render_models

    rows = list_models(Settings.load(), kind)
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        render_models(rows)


@app.command("show")
def show(kind: KindArgument, version: int) -> None:
    """One version's whole manifest."""
    print(json.dumps(_registry().manifest(kind, version), indent=2))


@app.command("promote")
def promote(kind: KindArgument, version: int, reason: str = "by hand") -> None:
    """Let a published version serve, and hold it: newer ones wait until `release`."""
    _registry().promote(kind, version, reason, hold=True)
    print(f"{kind} {version} serves and is held; `reflux models release {kind}` ends that")


@app.command("rollback")
def rollback(kind: KindArgument = "student") -> None:
    """Let the version that served before serve again, and hold it until `release`."""
    version = _registry().roll_back(kind)
    print(f"{kind} {version} serves again and is held; `reflux models release {kind}` ends that")


@app.command("release")
def release(kind: KindArgument = "student") -> None:
    """Let the learning job promote again."""
    _registry().release(kind)
    print(f"newer {kind} versions that pass the gate will serve")


def _registry() -> "Registry":
    from services.core.registry import Registry
    from services.core.settings import Settings

    return Registry(Settings.load().registry)
