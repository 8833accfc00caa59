"""`reflux bench`: what takes minutes and shows what is promised."""

import importlib.util
import os
import sys
import tempfile
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.core.settings import Settings
    from services.local.promises import Promise

app = typer.Typer(no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Runs that show what is promised."""


@app.command()
def chaos(
    seed: Annotated[int, typer.Option(help="of the load and of the faults")] = 0,
    rate: Annotated[float, typer.Option(help="events per second", min=10.0)] = 100.0,
    fault: Annotated[
        list[str] | None, typer.Option(help="only those that begin so; may be repeated")
    ] = None,
) -> None:
    """Break one thing after another under load; exit 1 if a promise was broken.

    Kills and freezes gateway, worker, Redis, broker, learners and Serve's processes (not Ray's
    head), fills disks, slows Redis, turns clocks. Starts a stack in a home of its own, stops it
    again, and leaves its logs there.
    """
    from services.core.errors import RefluxError
    from services.local.chaos import Chaos, show
    from services.local.disks import may_mount
    from services.local.faults import FAULTS

    chosen = [one for one in FAULTS if one.name.startswith(tuple(fault or [""]))]
    for name in fault or []:
        if not any(one.name.startswith(name) for one in chosen):
            raise RefluxError(
                f"--fault {name!r}: no such fault; there are {', '.join(f.name for f in FAULTS)}"
            )
    if any("disk" in one.name for one in chosen):
        may_mount()
    settings = _of_its_own(
        "chaos",
        seed=seed,
        REPLICAS="2",
        RECIPE="smoke_cluster",  # its refreshes are long enough to be disturbed
        STUDENT_WORKERS="1",
        TEACHER_WORKERS="1",
    )
    outcomes, promises = Chaos(settings, seed=seed, rate=rate, faults=chosen, report=_report).run()
    show(outcomes)
    _judge(promises)


@app.command()
def fuzz(
    seed: Annotated[int, typer.Option(help="of what is sent")] = 0,
    records: Annotated[int, typer.Option(help="to Kafka", min=0)] = 20_000,
    requests: Annotated[int, typer.Option(help="by HTTP", min=0)] = 5_000,
) -> None:
    """Send what nobody would send on purpose; exit 1 if anything is unaccounted for, or a 5xx."""
    from services.local.fuzzing import Fuzz

    # What is shown would be events that nobody has counted.
    settings = _of_its_own("fuzz", seed=seed, IMPRESSIONS="false")
    promises = Fuzz(
        settings, seed=seed, n_records=records, n_requests=requests, report=_report
    ).run()
    _judge(promises)


@app.command()
def soak(
    seed: Annotated[int, typer.Option(help="of the load")] = 0,
    rate: Annotated[float, typer.Option(help="events per second", min=10.0)] = 30.0,
    minutes: Annotated[float, typer.Option(help="once histories are full", min=1.0)] = 30.0,
) -> None:
    """Load a stack lightly for long and show what grows: memory, folders, topics; exit 1 on a leak.

    Starts a stack in a home of its own, stops it again, and leaves its logs there.
    """
    from services.local.soak import Soak, show

    settings = _of_its_own("soak", seed=seed)
    soaked = Soak(settings, seed=seed, rate=rate, minutes=minutes, report=_report).run()
    show(soaked)
    _judge(soaked.promises())


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
    open_seconds: Annotated[
        float | None, typer.Option(help="of those at a fixed rate, if not as long", min=1.0)
    ] = None,
    swap_every: Annotated[
        float, typer.Option(help="also measure while a version is published as often, in s; 0: no")
    ] = 2.0,
    turns: Annotated[
        int, typer.Option(help="of the phases without and with such versions", min=1)
    ] = 3,
    ingest: Annotated[
        float, typer.Option(help="also measure while this many events a second come in; 0: no")
    ] = 0.0,
) -> None:
    """How fast the answers are, beside a no-op, bare uvicorn, LitServe and the engine alone.

    Starts what it needs in a home of its own and stops it again. Each subject answers as many as
    it can (closed loop), then half of that at a fixed rate (open loop), in turns with swaps.
    """
    from ray_jobs import datasets
    from ray_jobs.evaluate.events import LogChoice
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
    choice = LogChoice(
        dataset=dataset, home=given.home, data=given.data, ties="file", noise="", seed=given.seed
    )
    log = datasets.load(dataset, home=choice.home, data=choice.data)
    sizes = sorted(set(items or [10_000]))
    if sizes[0] < log.items.num_rows:
        raise RefluxError(f"--items {sizes[0]}: {dataset} alone has {log.items.num_rows}")
    with tempfile.TemporaryDirectory(prefix="reflux-bench-") as home:
        os.environ["REFLUX_HOME"] = home
        settings = Settings.load()
        wanted = Wanted(
            names=names,
            items=sizes,
            seconds=seconds,
            open_s=open_seconds or seconds,
            swap_every_s=swap_every,
            turns=turns,
            ingest_per_s=ingest,
        )
        bench = Bench(settings, wanted, choice, log, report=_report)
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


@app.command()
def freshness(
    dataset: Annotated[str, typer.Option(help="ml-1m, ml-100k or a file")] = "ml-1m",
    rate: Annotated[float, typer.Option(help="live events per second", min=1.0)] = 100.0,
    seconds: Annotated[float, typer.Option(help="of live events", min=10.0)] = 180.0,
    probe_every: Annotated[float, typer.Option(help="seconds between probes", min=0.05)] = 0.25,
) -> None:
    """How soon an event shows in the next answer, and in the weights of the student that answers.

    The whole loop, as `reflux demo` runs it; a probe posts an event and asks until an answer knows.
    """
    from services.local.demo import Demo

    given = {"RECIPE": "tiny_cpu", "CHECKPOINT_EVERY_S": "30", "PUBLISH_EVERY_S": "5"}
    settings = _of_its_own("freshness", seed=0, **given)
    Demo(
        settings,
        dataset=dataset,
        rate=rate,
        max_events=None,
        limit_s=seconds,
        probe_every_s=probe_every,
    ).run()


@app.command()
def cluster(
    nodes: Annotated[int, typer.Option(help="beside the head", min=2, max=8)] = 3,
    namespaces: Annotated[
        bool, typer.Option(help="each node in a network namespace of its own; needs root")
    ] = False,
    scaling: Annotated[
        bool, typer.Option(help="measure one worker against two instead of hurting nodes")
    ] = False,
) -> None:
    """Both jobs over several Ray nodes: kill one, cut one off, audit; exit 1 on a broken promise.

    Runs in a home of its own, which it leaves for you to look at.
    """
    from services.local import rehearsal
    from services.local.nodes import secured

    secured()
    settings = _of_its_own("cluster", seed=0, RECIPE="smoke_cluster", PUBLISH_EVERY_S="1")
    run = rehearsal.Rehearsal(settings, nodes=nodes, namespaces=namespaces, report=_report)
    if scaling:
        drained, promises = run.scaling([1, 2])
        rehearsal.render_scaling(drained)
    else:
        blows, promises = run.faults()
        rehearsal.render_faults(blows)
    _judge(promises)


def _judge(promises: "Sequence[Promise]") -> None:
    """Show them; exit 1 where one was broken."""
    from services.local.promises import show

    show(promises)
    if not all(promise.kept for promise in promises):
        sys.exit(1)


def _of_its_own(what: str, *, seed: int, **more: str) -> "Settings":
    """Settings of a small stack in a new home, where the environment doesn't say otherwise."""
    from services.core.settings import Settings

    os.environ["REFLUX_HOME"] = tempfile.mkdtemp(prefix=f"reflux-{what}-")
    for name, value in {
        "RECIPE": "smoke_cpu",
        "TEACHER_FIRST_EVENTS": "2000",
        "TEACHER_EVERY_EVENTS": "0",
        "TEACHER_EVERY_MINUTES": "0",
        "CHECKPOINT_EVERY_S": "3",
        "PUBLISH_EVERY_S": "3",
        **more,
    }.items():
        os.environ.setdefault(f"REFLUX_{name}", value)
    settings = Settings.load()
    _report(f"home {settings.home}, seed {seed}")
    return settings


def _report(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
