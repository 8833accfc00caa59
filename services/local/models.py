"""`reflux models`: versions with metrics, lineage and the gate's word; what is tried out."""

import datetime
import logging
from dataclasses import asdict
from typing import Any

from services.core.errors import NothingServingError, RefluxError, RegistryError
from services.core.eventlog import EventLog
from services.core.registry import Kind, Registry
from services.core.settings import Settings
from services.core.trials import COLUMNS, score

log = logging.getLogger(__name__)

SHOWN_METRICS = {
    "teacher": ("slice.teacher.ndcg@10",),
    "student": ("stream.student.ndcg@10", "stream.teacher.ndcg@10"),
}


def list_models(settings: Settings, kind: Kind) -> list[dict[str, Any]]:
    """One row per version, oldest first, `serving` true for the one that answers."""
    registry = Registry(settings.registry)
    try:
        serving: int | None = registry.serving(kind).version
    except NothingServingError:
        serving = None
    rows = []
    for version in registry.versions(kind):
        try:
            manifest = registry.manifest(kind, version)
        except RegistryError as error:  # damaged, or pruned meanwhile: others are still listed
            log.warning("%s", error)
            continue
        rows.append(
            {
                "kind": kind,
                "version": version,
                "serving": version == serving,
                "created_ms": manifest["created_ms"],
                "parent": manifest.get("parent"),
                "teacher_version": manifest.get("teacher_version"),
                "gate": manifest.get("gate"),
                "metrics": manifest.get("metrics", {}),
            }
        )
    return rows


def render_models(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    if not rows:
        Console().print("no version has been published yet")
        return
    metrics = SHOWN_METRICS[rows[0]["kind"]]
    table = Table("version", "created", "parent", "teacher", *metrics, "gate", box=None)
    for row in rows:
        created = datetime.datetime.fromtimestamp(row["created_ms"] / 1000)
        gate = row["gate"] or {}
        table.add_row(
            f"{'▶ ' if row['serving'] else '  '}{row['version']}",
            f"{created:%m-%d %H:%M:%S}",
            _text(row["parent"]),
            _text(row["teacher_version"]),
            *(_text(row["metrics"].get(name)) for name in metrics),
            f"{'promoted' if gate.get('promoted') else 'kept'}: {gate.get('reason', '')}"
            if gate
            else "",
        )
    Console().print(table)


def compare_arms(settings: Settings) -> dict[str, Any]:
    """The trial that runs and how both arms do: lists shown, answered, hit; rate and interval."""
    trial = Registry(settings.registry).trial("student")
    if trial is None:
        raise RefluxError("no student is tried out; `reflux models try VERSION` begins it")
    log = EventLog(settings.offline)
    portions = log.portions(until=log.end())
    arms = score((log.read_portion(one, columns=COLUMNS) for one in portions), trial)
    return {
        "trial": asdict(trial),
        "arms": {
            name: {**asdict(arm), "rate": arm.rate, "interval": arm.interval()}
            for name, arm in arms.items()
        },
    }


def render_arms(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    trial = found["trial"]
    table = Table("", "lists shown", "answered", "hits", "hit rate", "95% interval", box=None)
    for name, arm in found["arms"].items():
        interval = "-"
        if arm["interval"]:
            low, high = arm["interval"]
            interval = f"{low:.4f} to {high:.4f}"
        counts = (f"{arm[count]:,}" for count in ("shown", "answered", "hits"))
        table.add_row(name, *counts, _text(arm["rate"]), interval)
    console = Console()
    console.print(
        f"student {trial['version']}, {trial['mode']}, {trial['percent']:g}% of the users"
    )
    console.print(table)


def _text(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
