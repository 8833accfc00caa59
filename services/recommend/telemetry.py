"""What the answers tell Prometheus.

Several replicas on one node answer as one: started with `PROMETHEUS_MULTIPROC_DIR` (deploy.py sees
to it), prometheus_client keeps the values in files there, and `/metrics` of any replica adds them
up. Behind a proxy before several nodes that is some node's; `NodeMetrics` gives each its own port.
"""

import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import psutil
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    generate_latest,
    start_http_server,
    values,
)
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

MULTIPROCESS: Final = "PROMETHEUS_MULTIPROC_DIR"
_ANSWER_S: Final = (
    *(0.0005, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075),
    *(0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5),
)
_AGE_S: Final = (
    *(0.1, 0.25, 0.5, 1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 12, 15, 20, 30, 45, 60),
    *(120, 300, 3_600, 86_400),
)


RETRY_S: Final = 2.0


class _Living(MultiProcessCollector):
    """Without the live gauges of replicas that have ended, whoever asks."""

    def __init__(self, directory: str) -> None:
        super().__init__(None, directory)
        self._directory = directory

    def collect(self) -> Iterable[Metric]:
        for live in Path(self._directory).glob("gauge_live*.db"):
            if not psutil.pid_exists(pid := int(live.stem.rpartition("_")[2])):
                mark_process_dead(pid, self._directory)
        found: Iterable[Metric] = super().collect()
        return found


class Telemetry:
    """Counters and histograms in a registry of their own: several apps fit in one process."""

    def __init__(self) -> None:
        own = self._exposed = CollectorRegistry()
        # What counts is whether the variable stood when prometheus_client was imported: Feast
        # sets one of its own later.
        if values.ValueClass is not values.MutexValue:
            directory = os.environ[MULTIPROCESS]
            Path(directory).mkdir(parents=True, exist_ok=True)
            self._exposed = CollectorRegistry()
            self._exposed.register(_Living(directory))
        self.answers = Counter(
            "reflux_answers", "Answers given", ["status", "fallback"], registry=own
        )
        self.answer_seconds = Histogram(
            "reflux_answer_seconds", "From request to answer", buckets=_ANSWER_S, registry=own
        )
        self.stage_seconds = Histogram(
            "reflux_answer_stage_seconds",
            "One stage of an answer",
            ["stage"],
            buckets=_ANSWER_S,
            registry=own,
        )
        self.features_seconds = self.stage_seconds.labels("features")
        self.rank_seconds = self.stage_seconds.labels("rank")
        self.features_age_seconds = Histogram(
            "reflux_answer_features_age_seconds",
            "Age of the features in an answer",
            buckets=_AGE_S,
            registry=own,
        )
        self.features_failed = Counter(
            "reflux_answer_features_failed", "Histories not read in time", registry=own
        )
        self.model_version = Gauge(
            "reflux_model_version",
            "The student version that answers",
            multiprocess_mode="mostrecent",
            registry=own,
        )
        self.swaps = Counter("reflux_model_swaps", "Versions taken into service", registry=own)
        self.swaps_failed = Counter(
            "reflux_model_swaps_failed",
            "Looks at the registry that ended without the version that should serve",
            ["error"],
            registry=own,
        )
        self.weight_freshness_seconds = Histogram(
            "reflux_weight_freshness_seconds",
            "From an event's arrival until a student that learned it answers; observed at each "
            "swap for the oldest, the median and the newest event that the version learned",
            buckets=_AGE_S,
            registry=own,
        )
        self.places = Counter(
            "reflux_answer_places",
            "Places in answers by their item: cold (fewer than 5 recent interactions), popular "
            "(the most popular tenth of the catalog), tail",
            ["item"],
            registry=own,
        )
        self.item_coverage = Gauge(
            "reflux_answer_item_coverage",
            "Share of the catalog that a replica showed in the last ten minutes",
            multiprocess_mode="livemax",
            registry=own,
        )
        self.impressions = Counter(
            "reflux_impressions", "Impression events", ["outcome"], registry=own
        )

    def exposition(self) -> bytes:
        """The text that `GET /metrics` answers with."""
        return generate_latest(self._exposed)


class NodeMetrics:
    """Serves a node's `/metrics` on a port of the node: one replica does, another takes over."""

    def __init__(self, telemetry: Telemetry, *, host: str, port: int) -> None:
        self._telemetry = telemetry
        self._address = (host, port)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="node-metrics", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _serve(self) -> None:
        host, port = self._address
        while not self._stop.is_set():
            try:
                server, _ = start_http_server(port, host, registry=self._telemetry._exposed)
            except OSError:  # another replica of this node has it
                self._stop.wait(RETRY_S)
                continue
            self._stop.wait()
            server.shutdown()
            server.server_close()
