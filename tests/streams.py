"""A stream in memory, and the small models that learn of it."""

import numpy as np

from ray_jobs.recipes import DistillConfig
from ray_jobs.stream import Received
from services.core.history import event_key
from services.core.models.sizes import EncoderConfig, StudentConfig

BATCH = 20
CONFIG = DistillConfig(context_events=8, replay_users=2, max_events=BATCH, learning_rate=3e-3)
STUDENT = StudentConfig(dim=8, n_layers=1, n_heads=1, max_len=8, dropout=0.1, teacher_dim=16)
TEACHER = EncoderConfig(dim=16, n_layers=1, n_heads=2, max_len=8)


class AbortError(Exception):
    """The source broke down, as a killed process would."""


class Log:
    """A stream in memory, in micro-batches of `BATCH`; breaks down before `abort_at`."""

    def __init__(self, n: int, *, at: int = 0, abort_at: int | None = None) -> None:
        rng = np.random.default_rng(0)
        self.users = rng.integers(0, 12, n)
        self.items = rng.integers(0, 30, n)
        self.positions = {0: at}
        self.abort_at = abort_at

    def received(self, first: int, last: int) -> Received:
        at = np.arange(first, last)
        return Received(
            user_ids=[f"u{user}" for user in self.users[at]],
            item_ids=[f"i{item}" for item in self.items[at]],
            types=["view"] * len(at),
            values=np.full(len(at), np.nan),
            times_ms=at * 1000,
            arrivals_ms=at * 1000,
            partitions=[0] * len(at),
            keys=np.array([event_key(str(n)) for n in at], np.int64),
            impressions=[],
        )

    def poll(self, *, max_events: int, timeout_s: float) -> Received:
        first = self.positions[0]
        last = min(first + max_events, len(self.users))
        if self.abort_at is not None and last > self.abort_at:
            raise AbortError
        self.positions = {0: last}
        return self.received(first, last)

    def lag_events(self) -> int:
        return 0

    def check_topic(self) -> None:
        return
