"""`reflux bench`: what takes minutes and shows what is promised."""

import os
import sys
import tempfile
from typing import Annotated

import typer

app = typer.Typer(help="Runs that show what is promised.", no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Keeps `chaos` a command of its own while it is the only one."""


@app.command()
def chaos(
    seed: Annotated[int, typer.Option(help="of the load and of the faults")] = 0,
    rate: Annotated[float, typer.Option(help="events per second", min=10.0)] = 200.0,
    fault: Annotated[list[str] | None, typer.Option(help="only this one; may be repeated")] = None,
) -> None:
    """Kill one process after another under load; exit 1 if a promise was broken.

    Starts a stack in a home of its own, stops it again, and leaves its logs there if it failed.
    """
    from services.core.errors import RefluxError
    from services.core.settings import Settings
    from services.local.chaos import Chaos, render
    from services.local.faults import KILLS

    wanted = set(fault or [one.name for one in KILLS])
    if unknown := wanted - {one.name for one in KILLS}:
        raise RefluxError(
            f"--fault: no {', '.join(unknown)}; there are {', '.join(f.name for f in KILLS)}"
        )
    os.environ["REFLUX_HOME"] = tempfile.mkdtemp(prefix="reflux-chaos-")
    for name, value in {
        "RECIPE": "smoke_cpu",
        "TEACHER_FIRST_EVENTS": "2000",
        "TEACHER_EVERY_EVENTS": "0",
        "TEACHER_EVERY_MINUTES": "0",
        "CHECKPOINT_EVERY_S": "3",
        "PUBLISH_EVERY_S": "3",
    }.items():
        os.environ.setdefault(f"REFLUX_{name}", value)
    settings = Settings.load()
    print(f"home {settings.home}, seed {seed}", file=sys.stderr)
    outcomes, promises = Chaos(
        settings,
        seed=seed,
        rate=rate,
        faults=[one for one in KILLS if one.name in wanted],
        report=lambda message: print(message, file=sys.stderr),
    ).run()
    render(outcomes, promises)
    if not all(promise.kept for promise in promises):
        sys.exit(1)


@app.command()
def console(
    pages: Annotated[int, typer.Option(help="open at once", min=1)] = 20,
    seconds: Annotated[float, typer.Option(help="of each phase", min=1.0)] = 30.0,
    rate: Annotated[float, typer.Option(help="answers per second", min=1.0)] = 50.0,
    turns: Annotated[int, typer.Option(help="of both phases", min=1)] = 3,
) -> None:
    """What the console's page costs a running stack: its CPU, and what answers take beside it."""
    from services.core.settings import Settings
    from services.local import page_cost

    settings = Settings.load()
    page_cost.render(
        page_cost.measure(settings, pages=pages, seconds=seconds, rate=rate, turns=turns)
    )
