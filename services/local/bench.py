"""`reflux bench`: what takes minutes and shows what is promised."""

import importlib.util
import os
import signal
import sys
import tempfile
from typing import Annotated

import typer

app = typer.Typer(help="Runs that show what is promised.", no_args_is_help=True)


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


@app.command()
def serve(
    subject: Annotated[
        list[str] | None,
        typer.Option(help="engine, uvicorn, litserve, noop or endpoint; may be repeated"),
    ] = None,
    items: Annotated[
        list[int] | None, typer.Option(help="catalog size, default 10000; may be repeated")
    ] = None,
    dataset: Annotated[str, typer.Option(help="whose users ask: ml-1m or ml-100k")] = "ml-1m",
    seconds: Annotated[float, typer.Option(help="of each measurement", min=1.0)] = 8.0,
    swap_every: Annotated[
        float, typer.Option(help="also measure while a version is published as often, in s; 0: no")
    ] = 2.0,
    ingest: Annotated[
        float, typer.Option(help="also measure while this many events a second come in; 0: no")
    ] = 0.0,
) -> None:
    """How fast the answers are, beside a no-op, bare uvicorn, LitServe and the engine alone.

    Starts what it needs in a home of its own and stops it again. Each subject answers as many as
    it can (closed loop), then half of that at a fixed rate (open loop), then the same with swaps.
    """
    from ray_jobs import datasets
    from services.core.errors import RefluxError
    from services.core.settings import Settings
    from services.local.serving_bench.report import render
    from services.local.serving_bench.run import Bench, Wanted
    from services.local.serving_bench.subjects import NAMES

    names = list(dict.fromkeys(subject or NAMES))
    if unknown := set(names) - set(NAMES):
        raise RefluxError(f"--subject: no {', '.join(unknown)}; there are {', '.join(NAMES)}")
    if "litserve" in names and importlib.util.find_spec("litserve") is None:
        if subject:
            raise RefluxError("--subject litserve: `pip install litserve` first")
        names.remove("litserve")
    given = Settings.load()
    log = datasets.load(dataset, home=given.home, data=given.data)
    sizes = sorted(set(items or [10_000]))
    if sizes[0] < log.items.num_rows:
        raise RefluxError(f"--items {sizes[0]}: {dataset} alone has {log.items.num_rows}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is stopped
    with tempfile.TemporaryDirectory(prefix="reflux-bench-") as home:
        os.environ["REFLUX_HOME"] = home
        settings = Settings.load()
        wanted = Wanted(
            names=names,
            items=sizes,
            seconds=seconds,
            swap_every_s=swap_every,
            ingest_per_s=ingest,
        )
        bench = Bench(settings, wanted, log, report=lambda message: print(message, file=sys.stderr))
        rows = []
        try:
            ceiling = bench.ceiling()
            for row in bench.run():
                rows.append(row)
        finally:  # a run of minutes that breaks off shows what it has
            if rows:
                render(rows, ceiling)
    if any(row.failed for row in rows):
        sys.exit(1)
