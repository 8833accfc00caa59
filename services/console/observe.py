"""What the running system says of itself: Prometheus endpoints and manifests, in one snapshot.

`reflux status`, the demo and the console all look through this.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from services.console import scrape
from services.console.scrape import Samples, Scraper, buckets, quantile, total
from services.core.errors import RegistryError
from services.core.eventlog import EventLog, records_between
from services.core.registry import Kind, Registry, Serving
from services.core.settings import Settings
from services.core.stackfile import is_alive, read_stack

Manifest = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """One look at everything. None: that part didn't answer, or nothing has happened yet.

    Counters, latencies and freshness are since the processes began, or since `Observer.mark`.
    """

    at_ms: int
    events_accepted: int | None = None
    events_dead: int | None = None
    feature_lag_events: int | None = None
    learning_lag_events: int | None = None
    feature_freshness_p50_ms: float | None = None
    feature_freshness_p99_ms: float | None = None
    weight_freshness_p50_s: float | None = None
    weight_freshness_p99_s: float | None = None
    answers: int | None = None
    answers_degraded: int | None = None
    answer_p50_ms: float | None = None
    answer_p99_ms: float | None = None
    teacher_version: int | None = None
    teacher_created_ms: int | None = None
    teacher_age_events: int | None = None  # that the student has learned and the teacher hasn't
    teacher_trust: float | None = None  # 0..1, what its labels count for
    teacher_held: bool = False
    student_version: int | None = None
    student_created_ms: int | None = None
    student_published: int | None = None
    student_held: bool = False
    last_gate: str | None = None
    learning_rate: float | None = None
    items: int | None = None  # that the newest student can answer with
    item_coverage: float | None = None  # share of the catalog shown in the last ten minutes
    retention: float | None = None  # student / teacher, NDCG@10 of the stream
    loss: dict[str, float] = field(default_factory=dict)  # by term, of the newest micro-batches
    metrics: dict[str, float] = field(default_factory=dict)
    processes: dict[str, bool] = field(default_factory=dict)
    restarts: dict[str, int] = field(default_factory=dict)
    endpoints: dict[str, bool] = field(default_factory=dict)  # that were asked for metrics

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Observer:
    """Looks at the gateway, the feature workers, the answers and the registry of `settings`.

    `read_log`: where no distillation job says how far behind it is, see how far the log is, which
    lists its files and imports pandas (40 MB).
    """

    def __init__(self, settings: Settings, *, read_log: bool = True) -> None:
        self._settings = settings
        self._read_log = read_log
        self._registry = Registry(settings.registry)
        self._scraper = Scraper(settings)
        self._manifests: dict[tuple[Kind, int], Manifest] = {}
        self._marked: Samples = {}
        self.samples: Samples = {}  # what the newest look saw

    def mark(self) -> None:
        """Let latencies and freshness count from now on, not from the start of the processes."""
        self._marked = self._scraper.scrape()

    def look(self, *, newest: int | None = None) -> Snapshot:
        """Ask everything that can be reached. Raises OSError where the registry can't be.

        `newest`: the newest student, where the caller has listed the registry already.
        """
        samples = self.samples = self._scraper.scrape()
        stack = read_stack(self._settings)

        def seconds(name: str, q: float) -> float | None:
            return quantile(buckets(samples, name, since=self._marked), q)

        def milliseconds(name: str, q: float) -> float | None:
            found = seconds(name, q)
            return None if found is None else found * 1000

        return Snapshot(
            at_ms=int(time.time() * 1000),
            **self._learning(samples, newest),
            events_accepted=total(samples, "reflux_gateway_accepted_total"),
            events_dead=total(samples, "reflux_worker_dead_letters_total"),
            feature_lag_events=total(samples, "reflux_worker_lag_events"),
            feature_freshness_p50_ms=milliseconds("reflux_feature_freshness_seconds", 0.5),
            feature_freshness_p99_ms=milliseconds("reflux_feature_freshness_seconds", 0.99),
            answers=total(samples, "reflux_answers_total"),
            answers_degraded=total(samples, "reflux_answer_features_failed_total"),
            answer_p50_ms=milliseconds("reflux_answer_seconds", 0.5),
            answer_p99_ms=milliseconds("reflux_answer_seconds", 0.99),
            weight_freshness_p50_s=seconds("reflux_weight_freshness_seconds", 0.5),
            weight_freshness_p99_s=seconds("reflux_weight_freshness_seconds", 0.99),
            item_coverage=scrape.highest(samples, "reflux_answer_item_coverage"),
            loss=scrape.by_label(samples, "reflux_student_loss", "term"),
            teacher_trust=scrape.highest(samples, "reflux_teacher_trust"),
            processes={
                name: is_alive(identity)
                for name, identity in (stack["processes"] if stack else {}).items()
            },
            restarts=stack.get("restarts", {}) if stack else {},
            endpoints=dict(self._scraper.reached),
        )

    def _learning(self, samples: Samples, newest: int | None) -> dict[str, Any]:
        newest = newest or self._registry.latest("student")
        kinds: tuple[Kind, ...] = ("teacher", "student")
        serving = {kind: self._serving(kind) for kind in kinds}
        found: dict[str, Any] = {"student_published": newest}
        for kind, one in serving.items():
            if one is not None:
                found[f"{kind}_version"] = one.version
                found[f"{kind}_held"] = one.held
                if manifest := self._manifest(kind, one.version):
                    found[f"{kind}_created_ms"] = manifest["created_ms"]
        manifest = None if newest is None else self._manifest("student", newest)
        if manifest is None:
            return found
        learned = {int(partition): end for partition, end in manifest.get("offsets", {}).items()}
        found["metrics"] = metrics = manifest.get("metrics", {})
        found["last_gate"] = (manifest.get("gate") or {}).get("reason")
        found["learning_rate"] = manifest.get("learning_rate")
        found["items"] = manifest.get("items")
        found["learning_lag_events"] = self._lag(samples, learned)
        found["retention"] = retention(metrics)
        if serving["teacher"] is not None:
            teacher = self._manifest("teacher", serving["teacher"].version)
            found["teacher_age_events"] = teacher and age_events(learned, teacher)
        return found

    def _lag(self, samples: Samples, learned: dict[int, int]) -> int | None:
        said = total(samples, "reflux_student_lag_events")
        if said is not None or not self._read_log:
            return said
        return EventLog(self._settings.offline).count(since=learned)

    def _serving(self, kind: Kind) -> Serving | None:
        try:
            return self._registry.serving(kind)
        except RegistryError:  # nothing yet, or an unreadable pointer: the answers complain of it
            return None

    def _manifest(self, kind: Kind, version: int) -> Manifest | None:
        """They never change, so each is read once; None for one pruned meanwhile, or damaged."""
        known = self._manifests.get((kind, version))
        if known is None:
            try:
                known = self._registry.manifest(kind, version)
            except RegistryError:
                return None
            while len(self._manifests) >= 8:
                self._manifests.pop(next(iter(self._manifests)))
            self._manifests[kind, version] = known
        return known


def retention(metrics: Mapping[str, float]) -> float | None:
    """Student / teacher over the whole stream, by NDCG@10, each over the events that it was asked
    about (see `Prequential`)."""
    student, teacher = (metrics.get(f"stream.{model}.ndcg@10") for model in ("student", "teacher"))
    return student / teacher if student is not None and teacher else None


def age_events(learned: Mapping[int, int], teacher: Manifest) -> int:
    """Events that the student has learned since those that the teacher knows."""
    known = {int(partition): int(end) for partition, end in teacher.get("offsets", {}).items()}
    return records_between(known, learned)
