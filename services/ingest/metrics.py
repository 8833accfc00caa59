"""What a feature worker tells Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class Metrics:
    """What a worker counts; one registry per worker, so that tests can make several."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.events = Counter(
            "reflux_worker_events", "Applied events by type", ["type"], registry=self.registry
        )
        self.items = Counter("reflux_worker_items", "Applied items", registry=self.registry)
        self.duplicates = Counter(
            "reflux_worker_duplicates", "Events whose id counted already", registry=self.registry
        )
        self.dead = Counter(
            "reflux_worker_dead_letters", "Records against the contract", registry=self.registry
        )
        self.poison = Counter(
            "reflux_worker_poison",
            "Records by the contract that could not be applied, and became dead letters",
            registry=self.registry,
        )
        self.forgotten = Counter(
            "reflux_worker_forgotten_users", "Users forgotten", registry=self.registry
        )
        self.wishes = Gauge(
            "reflux_worker_forget_wishes",
            "Wishes to be forgotten whose rows are still in the offline files",
            registry=self.registry,
        )
        self.rebuilt = Counter(
            "reflux_worker_rebuilt_users",
            "Users written online again from the offline log",
            registry=self.registry,
        )
        self.lag = Gauge(
            "reflux_worker_lag_events",
            "Records in the worker's partitions not yet applied",
            registry=self.registry,
        )
        self.freshness = Histogram(
            "reflux_feature_freshness_seconds",
            "From an event's arrival to its user's features online",
            buckets=(0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.5, 1, 2.5, 5, 15, 60),
            registry=self.registry,
        )
        self.flush_failures = Counter(
            "reflux_worker_flush_failures",
            "Attempts to write to the offline log that failed and are repeated",
            registry=self.registry,
        )
        self.flush = Histogram(
            "reflux_worker_flush_seconds", "Writing to the offline log", registry=self.registry
        )
