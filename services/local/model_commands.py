"""`reflux models`: published versions, and which of them serves."""

import json
import time
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
def rollback(kind: KindArgument = "student", to: int | None = None) -> None:
    """Let the version that served before (or `--to` one) serve again, held until `release`."""
    version = _registry().roll_back(kind, to)
    print(f"{kind} {version} serves again and is held; `reflux models release {kind}` ends that")


@app.command("release")
def release(kind: KindArgument = "student") -> None:
    """Let the learning job promote again."""
    _registry().release(kind)
    print(f"newer {kind} versions that pass the gate will serve")


@app.command("try")
def try_(
    version: int,
    percent: Annotated[float, typer.Option(help="of the users, chosen by their id")] = 10.0,
    shadow: Annotated[
        bool, typer.Option(help="unseen: only what it would have shown is logged")
    ] = False,
) -> None:
    """Answer some users with another student, beside the one that serves; no restart.

    Once more with another --percent: the users in it stay, others come or go.
    """
    from services.core.errors import RefluxError
    from services.core.trials import Trial

    registry, mode = _registry(), "shadow" if shadow else "split"
    before = registry.trial("student")
    same = before and (before.version, before.mode) == (version, mode)
    try:
        trial = Trial(
            version=version,
            mode="shadow" if shadow else "split",
            percent=percent,
            since_ms=before.since_ms if before and same else time.time_ns() // 1_000_000,
        )
    except ValueError as error:
        raise RefluxError(f"--{error}") from None
    registry.begin_trial("student", trial)
    print(f"student {version} is tried out ({mode}, {percent:g}% of the users)")
    print("`reflux models compare` shows how it does, `reflux models end-trial` ends it")


@app.command("end-trial")
def end_trial() -> None:
    """Let what serves answer everybody again."""
    _registry().end_trial("student")
    print("what serves answers everybody")


@app.command("compare")
def compare(
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
) -> None:
    """Live hit rate of what is tried out and of what serves, from the impressions in the log."""
    from services.core.settings import Settings
    from services.local.models import compare_arms, render_arms

    found = compare_arms(Settings.load())
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        render_arms(found)


def _registry() -> "Registry":
    from services.core.registry import Registry
    from services.core.settings import Settings

    return Registry(Settings.load().registry)
