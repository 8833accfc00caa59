"""What the distillation job tells Prometheus, from its worker 0."""

import logging
from collections.abc import Mapping
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from ray_jobs.gate import Verdict

logger = logging.getLogger(__name__)

_STEP_S: Final = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class Telemetry:
    """One registry per job, so that tests can make several. Counts are of all workers."""

    def __init__(self) -> None:
        own = self.registry = CollectorRegistry()
        self.learned = Counter(
            "reflux_student_events", "Events learned since this process began", registry=own
        )
        self.refused = Counter(
            "reflux_student_refused", "Records in Kafka that are no valid events", registry=own
        )
        self.lag = Gauge(
            "reflux_student_lag_events", "Records in Kafka not yet read to learn", registry=own
        )
        self.step = Histogram(
            "reflux_student_step_seconds",
            "Learning one micro-batch",
            buckets=_STEP_S,
            registry=own,
        )
        self.checkpoints = Counter("reflux_student_checkpoints", "Checkpoints kept", registry=own)
        self.gate = Counter(
            "reflux_gate_decisions", "Student versions judged", ["promoted"], registry=own
        )
        self.published = Gauge(
            "reflux_student_published_version", "The newest student version", registry=own
        )
        self.teacher = Gauge(
            "reflux_teacher_version", "The teacher that teaches; 0: none yet", registry=own
        )
        self.loss = Gauge(
            "reflux_student_loss", "Terms of the newest micro-batch's loss", ["term"], registry=own
        )
        self.trust = Gauge(
            "reflux_teacher_trust", "What the teacher's labels count for, 0..1", registry=own
        )
        self.ndcg = Gauge(
            "reflux_prequential_ndcg",
            "NDCG@10 over all workers, each event predicted before it was learned: since the last "
            "version (window) and since the start (stream)",
            ["span", "model"],
            registry=own,
        )

    def serve(self, *, host: str, port: int) -> None:
        """Answer `GET /metrics` from now on; a port that is taken stops no learning."""
        try:
            start_http_server(port, host, registry=self.registry)
        except OSError as error:
            logger.error("no metrics: REFLUX_STUDENT_METRICS_PORT=%d: %s", port, error)

    def stepped(self, terms: Mapping[str, float], *, trust: float) -> None:
        """A micro-batch was learned; a term that is switched off is not there."""
        for term, value in terms.items():
            self.loss.labels(term).set(value)
        self.trust.set(trust)

    def judged(self, verdict: Verdict, *, version: int, metrics: Mapping[str, float]) -> None:
        """A version was published, with these metrics in its manifest."""
        self.gate.labels(str(verdict.promoted).lower()).inc()
        self.published.set(version)
        for name, value in metrics.items():
            span, _, rest = name.partition(".")
            model, _, measure = rest.rpartition(".")
            if measure == "ndcg@10":
                self.ndcg.labels(span, model).set(value)
