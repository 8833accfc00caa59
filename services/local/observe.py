"""What the running system says of itself: Prometheus endpoints and manifests, in one snapshot."""

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

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


Samples = dict[str, list[Sample]]  # what all endpoints expose, by the sample's name


class Observer:
    """Looks at the gateway, the feature workers, the answers and the registry of `settings`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._registry = Registry(settings.registry)
        self._http = httpx.Client(timeout=TIMEOUT_S)
        self._marked: Samples = {}

    def mark(self) -> None:
        """Let latencies and freshness count from now on, not from the start of the processes."""
        self._marked = self._scrape(read_stack(self._settings))

    def look(self) -> Snapshot:
        stack = read_stack(self._settings)
        samples = self._scrape(stack)

        def seconds(name: str, q: float) -> float | None:
            return quantile(_buckets(samples, name, since=self._marked), q)

        def milliseconds(name: str, q: float) -> float | None:
            found = seconds(name, q)
            return None if found is None else found * 1000

        return Snapshot(
            at_ms=int(time.time() * 1000),
            **self._learning(),
            events_accepted=_total(samples, "reflux_gateway_accepted_total"),
            events_dead=_total(samples, "reflux_worker_dead_letters_total"),
            feature_lag_events=_total(samples, "reflux_worker_lag_events"),
            feature_freshness_p50_ms=milliseconds("reflux_feature_freshness_seconds", 0.5),
            feature_freshness_p99_ms=milliseconds("reflux_feature_freshness_seconds", 0.99),
            answers=_total(samples, "reflux_answers_total"),
            answer_p50_ms=milliseconds("reflux_answer_seconds", 0.5),
            answer_p99_ms=milliseconds("reflux_answer_seconds", 0.99),
            weight_freshness_p50_s=seconds("reflux_weight_freshness_seconds", 0.5),
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
            learned = {int(partition): end for partition, end in manifest["offsets"].items()}
            log = EventLog(self._settings.offline)
            found["learning_lag_events"] = log.count(since=learned)
        return found

    def _serving(self, kind: Kind) -> int | None:
        try:
            return int(self._registry.serving(kind).version)
        except NothingServingError:
            return None

    def _scrape(self, stack: dict[str, Any] | None) -> Samples:
        """Every sample of every endpoint that answers."""
        ports = stack["worker_metrics_ports"] if stack else []
        urls = [self._settings.gateway_url, self._settings.recommend_url]
        urls += [f"http://127.0.0.1:{port}" for port in ports]
        samples: Samples = {}
        for url in filter(None, urls):
            try:
                text = self._http.get(f"{url}/metrics").text
            except httpx.TransportError:
                continue
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    samples.setdefault(sample.name, []).append(sample)
        return samples


def _total(samples: Samples, name: str) -> int | None:
    """A counter's or gauge's value, summed over labels and processes."""
    if name not in samples:
        return None
    return int(sum(sample.value for sample in samples[name]))


def _buckets(samples: Samples, name: str, *, since: Samples) -> list[tuple[float, float]]:
    """(upper bound, cumulative count) of a histogram, over all processes, less what was before."""
    counts: dict[float, float] = {}
    for sign, source in ((1.0, samples), (-1.0, since)):
        for sample in source.get(f"{name}_bucket", []):
            bound = float(sample.labels["le"])
            counts[bound] = counts.get(bound, 0.0) + sign * sample.value
    return sorted(counts.items())


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
