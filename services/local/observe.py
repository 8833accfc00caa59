"""What the running system says of itself: Prometheus endpoints and manifests, in one snapshot."""

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from services.core.errors import NothingServingError
from services.core.eventlog import EventLog
from services.core.registry import Kind, Registry
from services.core.settings import Settings
from services.local.stack import is_alive, read_stack

TIMEOUT_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """One look at everything. None: that part didn't answer, or nothing has happened yet."""

    at_ms: int
    events_accepted: int | None = None
    events_dead: int | None = None
    feature_lag_events: int | None = None
    learning_lag_events: int | None = None
    feature_freshness_p50_ms: float | None = None
    feature_freshness_p99_ms: float | None = None
    weight_freshness_p50_s: float | None = None
    answers: int | None = None
    answer_p50_ms: float | None = None
    answer_p99_ms: float | None = None
    teacher_version: int | None = None
    student_version: int | None = None
    student_published: int | None = None
    last_gate: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    processes: dict[str, bool] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Observer:
    """Looks at the gateway, the feature worker, the answers and the registry of `settings`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._registry = Registry(settings.registry)
        self._http = httpx.Client(timeout=TIMEOUT_S)

    def look(self) -> Snapshot:
        stack = read_stack(self._settings)
        port = stack["worker_metrics_port"] if stack else 0
        gateway = self._scrape(self._settings.gateway_url)
        worker = self._scrape(f"http://127.0.0.1:{port}" if port else "")
        answers = self._scrape(self._settings.recommend_url)
        return Snapshot(
            at_ms=int(time.time() * 1000),
            **self._learning(),
            events_accepted=_count(gateway, "reflux_gateway_accepted"),
            events_dead=_count(worker, "reflux_worker_dead_letters"),
            feature_lag_events=_count(worker, "reflux_worker_lag_events"),
            feature_freshness_p50_ms=_quantile_ms(worker, "reflux_feature_freshness_seconds", 0.5),
            feature_freshness_p99_ms=_quantile_ms(worker, "reflux_feature_freshness_seconds", 0.99),
            answers=_count(answers, "reflux_answers"),
            answer_p50_ms=_quantile_ms(answers, "reflux_answer_seconds", 0.5),
            answer_p99_ms=_quantile_ms(answers, "reflux_answer_seconds", 0.99),
            weight_freshness_p50_s=_quantile_s(answers, "reflux_weight_freshness_seconds", 0.5),
            processes={
                name: is_alive(identity)
                for name, identity in (stack["processes"] if stack else {}).items()
            },
        )

    def _learning(self) -> dict[str, Any]:
        newest = self._registry.latest("student")
        found: dict[str, Any] = {
            "teacher_version": self._serving("teacher"),
            "student_version": self._serving("student"),
            "student_published": newest,
        }
        if newest is not None:
            manifest = self._registry.manifest("student", newest)
            found["metrics"] = manifest["metrics"]
            found["last_gate"] = manifest["gate"]["reason"]
            ends = EventLog(self._settings.offline).end()
            learned = {int(part): end for part, end in manifest["offsets"].items()}
            found["learning_lag_events"] = sum(
                max(end - learned.get(part, 0), 0) for part, end in ends.items()
            )
        return found

    def _serving(self, kind: Kind) -> int | None:
        try:
            return int(self._registry.serving(kind).version)
        except NothingServingError:
            return None

    def _scrape(self, url: str) -> dict[str, Metric]:
        if not url:
            return {}
        try:
            text = self._http.get(f"{url}/metrics").text
        except httpx.TransportError:
            return {}
        return {family.name: family for family in text_string_to_metric_families(text)}


def _count(families: dict[str, Metric], name: str) -> int | None:
    """A counter's or gauge's value, summed over its labels."""
    if name not in families:
        return None
    samples = families[name].samples
    return int(sum(s.value for s in samples if s.name in (name, f"{name}_total")))


def _quantile_ms(families: dict[str, Metric], name: str, q: float) -> float | None:
    seconds = _quantile_s(families, name, q)
    return None if seconds is None else seconds * 1000


def _quantile_s(families: dict[str, Metric], name: str, q: float) -> float | None:
    """The quantile of a Prometheus histogram, interpolated inside its bucket."""
    if name not in families:
        return None
    buckets: dict[float, float] = {}
    for sample in families[name].samples:
        if sample.name == f"{name}_bucket":
            bound = float(sample.labels["le"])
            buckets[bound] = buckets.get(bound, 0.0) + sample.value
    return quantile(buckets.items(), q)


def quantile(buckets: Iterable[tuple[float, float]], q: float) -> float | None:
    """Quantile of a histogram given as (upper bound, cumulative count); None where it is empty."""
    ordered = sorted(buckets)
    if not ordered or ordered[-1][1] == 0:
        return None
    wanted = q * ordered[-1][1]
    below, low = 0.0, 0.0
    for bound, count in ordered:
        if count >= wanted:
            if bound == float("inf") or count == below:
                return low
            return low + (bound - low) * (wanted - below) / (count - below)
        below, low = count, bound
    return low


def render_status(snapshot: Snapshot) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for name, value in snapshot.to_dict().items():
        if name in ("metrics", "processes", "at_ms"):
            continue
        table.add_row(name.replace("_", " "), _text(value))
    for name, alive in snapshot.processes.items():
        table.add_row(f"process {name}", "[green]runs[/]" if alive else "[red]dead[/]")
    for name, value in sorted(snapshot.metrics.items()):
        if name.startswith("stream."):
            table.add_row(name, _text(value))
    Console().print(table)


def _text(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.4f}" if abs(value) < 1 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
