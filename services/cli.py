"""The `reflux` command. Every heavy import waits inside its command: `--help` stays instant."""

import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from services.core.errors import RefluxError
from services.local import processes
from services.local.bench import app as bench_app
from services.local.model_commands import app as models_app

if TYPE_CHECKING:
    from services.core.settings import Settings
    from services.local.jobs import JobKind, Jobs

app = typer.Typer(
    help="A real-time recommender that never stops learning.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
events_app = typer.Typer(help="Send events, replay a log of them.", no_args_is_help=True)
dead_app = typer.Typer(help="Records that were refused, with the reason.", no_args_is_help=True)
features_app = typer.Typer(help="The online store.", no_args_is_help=True)
teacher_app = typer.Typer(help="The large model, refreshed periodically.", no_args_is_help=True)
student_app = typer.Typer(help="The distillation job.", no_args_is_help=True)
app.add_typer(events_app, name="events")
events_app.add_typer(dead_app, name="dead")
app.add_typer(features_app, name="features")
app.add_typer(bench_app, name="bench")
app.add_typer(teacher_app, name="teacher")
app.add_typer(student_app, name="student")
app.add_typer(models_app, name="models")

Kind = Literal["teacher", "student"]
JsonOption = Annotated[bool, typer.Option("--json", help="machine-readable")]
AddressOption = Annotated[
    str, typer.Option(help="Ray's dashboard URL, http://host:8265; default: the setting's")
]


def main() -> None:
    """Run the command; an error of ours is one clear line and exit code 1.

    SIGTERM and a closed terminal end it as Ctrl-C does: it stops what it started.
    """
    processes.on_ending(signal.default_int_handler)
    try:
        app()
    except (RefluxError, OSError) as error:  # a registry or a dashboard that can't be reached
        print(f"reflux: {error}", file=sys.stderr)
        sys.exit(1)


@app.command()
def up(
    foreground: Annotated[bool, typer.Option(help="stay, and print what happens")] = False,
) -> None:
    """Start the stack: whatever the settings don't point elsewhere, and Reflux itself."""
    from services.local import daemon

    settings = _settings()
    if foreground:
        from services.local.__main__ import main as supervise

        sys.exit(supervise())
    addresses = daemon.start(settings, report=_say)
    print(f"\nevents   POST {addresses['gateway_url']}/v1/events")
    print(f"answers  POST {addresses['recommend_url']}/v1/recommendations")
    print(f"console       {addresses['console_url']}")
    print(f"API docs      {addresses['gateway_url']}/docs  {addresses['recommend_url']}/docs")
    print(f"Ray           {addresses['ray_address']}")
    print(
        f"logs          {settings.logs}\n\n`reflux status` shows it at work, `reflux down` ends it."
    )


@app.command()
def down() -> None:
    """Stop the stack and every process it started."""
    from services.local.stack import tear_down

    settings = _settings()
    if not tear_down(settings, report=_say):
        print(f"nothing runs in home={str(settings.home)!r}")


@app.command()
def status(as_json: JsonOption = False) -> None:
    """Rates, lag, freshness, versions and prequential quality."""
    from services.local.status import demo_beside, render_status
    from services.local.status import status as look

    settings = _settings()
    found = look(settings)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    render_status(found)
    if hint := demo_beside(settings):
        print(hint)


@app.command()
def doctor() -> None:
    """Check ports, versions, memory and configured services; print the settings."""
    from services.local.doctor import examine, render

    settings = _settings()
    findings = examine(settings)
    render(settings, findings)
    if any(not finding.ok for finding in findings):
        sys.exit(1)


@app.command()
def env() -> None:
    """The settings as a Ray runtime environment, for `ray job submit --runtime-env-json`.

    Without passwords and keys: Ray's dashboard shows a job's variables. Nodes must have them.
    """
    settings = _settings()
    if left_out := ", ".join(settings.secrets):
        print(f"left out, to be set in the nodes' environment: {left_out}", file=sys.stderr)
    print(json.dumps({"env_vars": settings.environment(secrets=False)}))


@app.command()
def topics() -> None:
    """Create the Kafka topics that are missing."""
    from services.core.kafka import ensure_topics

    ensure_topics(_settings())


@app.command()
def learn(address: AddressOption = "") -> None:
    """Keep both learning jobs going on a Ray cluster, until SIGTERM; then let them checkpoint.

    What `reflux up` does beside everything else; for clusters that nothing else supervises.
    """
    from services.local.learning import supervise

    supervise(_jobs(address), report=_say)


@app.command()
def demo(
    dataset: Annotated[str, typer.Option(help="ml-1m, ml-100k, or a CSV/Parquet log")] = "ml-1m",
    rate: Annotated[float, typer.Option(help="live events per second", min=1.0)] = 500.0,
    events: Annotated[int, typer.Option(help="end after this many live events; 0: all")] = 0,
    duration: Annotated[str, typer.Option("--for", help="end after, e.g. 90s, 5m, 1h")] = "",
) -> None:
    """The whole loop on a real log: history, teacher, student, then the rest as live traffic."""
    from services.local.demo import Demo

    limit_s = parse_duration_s(duration) if duration else None
    Demo(_settings(), dataset=dataset, rate=rate, max_events=events or None, limit_s=limit_s).run()


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,  # its own says more
)
def evaluate(context: typer.Context) -> None:
    """Measure quality by a protocol: stream, successive, leave-one-out, blocks or gate."""
    from ray_jobs.evaluate.__main__ import main as measure

    measure(context.args)


@app.command()
def recommend(
    user: Annotated[str, typer.Argument(help="user id; empty for an anonymous session")] = "",
    n: Annotated[int, typer.Option("-n", help="how many", min=1, max=100)] = 10,
    recent: Annotated[list[str] | None, typer.Option(help="recent item, oldest first")] = None,
    category: Annotated[list[str] | None, typer.Option(help="only items of this category")] = None,
    as_json: JsonOption = False,
    all_users: Annotated[bool, typer.Option(help="everyone in the log, by a Ray job")] = False,
    out: Annotated[str, typer.Option(help="with it: a new directory or URI, for Parquet")] = "",
) -> None:
    """Ask the running stack for recommendations; --all-users: write everybody's to --out."""
    if all_users:
        where = out if "://" in out else str(Path(out).absolute())
        if not out:
            raise RefluxError("--all-users writes to --out DIR, a new directory or an s3:// URI")
        _submit("everyone", wait=True, address="", arguments=["--out", where, "-n", str(n)])
        return
    from services.local.client import Client

    answer = Client(_settings()).recommend(
        user_id=user or None, n=n, recent_items=recent or [], categories=category or []
    )
    if as_json:
        print(json.dumps(answer, indent=2))
        return
    for place, item in enumerate(answer["items"], start=1):
        print(f"{place:3}  {item['score']:8.3f}  {item.get('title') or item['item_id']}")
    fallback = answer.get("fallback") or "personal"
    print(f"\nstudent {answer['model_version']}, teacher {answer['teacher_version']}, {fallback}")


@events_app.command("send")
def events_send(
    source: Annotated[
        Path | None, typer.Argument(help="a file of NDJSON events, `-` for standard input")
    ] = None,
    user: Annotated[str, typer.Option(help="user id, for a single event")] = "",
    item: Annotated[str, typer.Option(help="item id, for a single event")] = "",
    type_: Annotated[str, typer.Option("--type", help="view, click, rating, ...")] = "click",
    value: Annotated[float | None, typer.Option(help="rating, price, ...")] = None,
) -> None:
    """Send one event (--user, --item), or a file of them, through the gateway."""
    from services.local.client import Client, new_event

    client = Client(_settings())
    if user and item:
        body = json.dumps(new_event(user_id=user, item_id=item, type_=type_, value=value)).encode()
    elif source is not None:
        try:
            body = sys.stdin.buffer.read() if str(source) == "-" else source.read_bytes()
        except OSError as error:
            raise RefluxError(f"{source}: {error.strerror}") from None
    else:
        raise RefluxError("nothing to send: give a file (or `-`), or --user and --item")
    answer = client.send(body)
    print(json.dumps(answer, indent=2))
    if answer["rejected"]:
        sys.exit(1)


@events_app.command("replay")
def events_replay(
    dataset: Annotated[str, typer.Argument(help="ml-1m, ml-100k, or a CSV/Parquet log")],
    rate: Annotated[float, typer.Option(help="events per second; 0: as fast as it goes")] = 0.0,
    skip: Annotated[int, typer.Option(help="leave out this many first events", min=0)] = 0,
    events: Annotated[int, typer.Option(help="end after this many; 0: all", min=0)] = 0,
) -> None:
    """Send a log in time order through the gateway, its items' metadata first."""
    from services.local.replay import replay

    settings = _settings()
    sent = replay(settings, dataset=dataset, rate=rate, skip=skip, limit=events or None)
    print(f"{sent:,} events accepted")


@dead_app.command("list")
def dead_list(
    as_json: JsonOption = False,
    payload: Annotated[bool, typer.Option(help="show the records themselves")] = False,
) -> None:
    """Dead letters that have not been replayed yet, oldest first."""
    from services.ingest.dead import dead_letters

    any_there = False
    for letter in dead_letters(_settings()):
        any_there = True
        shown = {"topic": letter.topic, "partition": letter.partition, "offset": letter.offset}
        shown |= {"at_ms": letter.at_ms, "reason": letter.reason}
        if payload:
            shown |= {"raw": letter.raw.decode(errors="backslashreplace")}
        print(json.dumps(shown) if as_json else "  ".join(map(str, shown.values())))
    if not any_there and not as_json:
        print("no dead letters")


@dead_app.command("replay")
def dead_replay() -> None:
    """Send each to the topic it came from once more; what is still wrong comes back."""
    from services.ingest.dead import replay

    print(f"{replay(_settings()):,} dead letters sent again")


@features_app.command("rebuild")
def features_rebuild() -> None:
    """Let the feature workers write everything online again, from the offline log.

    They do so by themselves where Redis has come back empty.
    """
    from services.core.features import FeatureStore

    FeatureStore(_settings()).mark_unfilled()
    print("the feature workers rebuild the online store; those that don't run, at their start")


@teacher_app.command("refresh")
def teacher_refresh(
    wait: Annotated[bool, typer.Option(help="until it has ended")] = False,
    address: AddressOption = "",
) -> None:
    """Train a new teacher from the offline log, as a Ray job."""
    _submit("teacher", wait=wait, address=address)


@teacher_app.command("status")
def teacher_status(address: AddressOption = "") -> None:
    """The teacher jobs so far."""
    _print_jobs("teacher", address)


@student_app.command("start")
def student_start(address: AddressOption = "") -> None:
    """Start the distillation job; it resumes from its checkpoint."""
    _submit("student", wait=False, address=address)


@student_app.command("stop")
def student_stop(address: AddressOption = "") -> None:
    """Let the distillation job checkpoint and end. (Under `reflux up` it is started again.)"""
    job = _jobs(address).stop("student")
    print("no distillation job is active" if job is None else f"{job.submission_id} {job.status}")


@student_app.command("status")
def student_status(address: AddressOption = "") -> None:
    """The distillation jobs so far."""
    _print_jobs("student", address)


def parse_duration_s(text: str) -> float:
    """Seconds in `90`, `90s`, `5m` or `1h`."""
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    number, unit = (text[:-1], text[-1]) if text[-1:] in units else (text, "s")
    try:
        seconds = float(number) * units[unit]
    except ValueError:
        seconds = -1.0
    if seconds <= 0:
        raise RefluxError(f"--for={text!r}: write a number and s, m or h, e.g. 90s, 5m, 1h")
    return seconds


def _settings(**overrides: Any) -> "Settings":
    from services.core.settings import Settings

    return Settings.load(**overrides)


def _jobs(address: str = "") -> "Jobs":
    from services.core.stackfile import read_stack
    from services.local.jobs import Jobs

    settings = _settings(**({"ray_address": address.rstrip("/")} if address else {}))
    stack = read_stack(settings)
    if stack and stack["settings"]["ray_address"] == settings.ray_address:
        return Jobs(settings, embedded=stack["embedded_ray"])
    return Jobs(settings, embedded=False, elsewhere=True)


def _submit(kind: "JobKind", *, wait: bool, address: str, arguments: Sequence[str] = ()) -> None:
    jobs = _jobs(address)
    submission_id = jobs.submit(kind, arguments)
    print(f"submitted {submission_id}; `ray job logs {submission_id}` shows it at work")
    if wait:
        jobs.follow(submission_id, print)


def _print_jobs(kind: Kind, address: str) -> None:
    jobs = _jobs(address).list(kind)
    for job in jobs:
        print(f"{job.submission_id}  {job.status}  {job.message}")
    if not jobs:
        print(f"no {kind} job yet")


def _say(message: str, **_: Any) -> None:
    print(message, file=sys.stderr)


if __name__ == "__main__":
    main()
