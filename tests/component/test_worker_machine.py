"""A feature worker that dies or can't write between any two steps, in any order hypothesis finds.

Redis, Feast and the log are real; a list stands for one partition of Kafka, so that thousands of
lives fit into seconds. What Kafka itself does to a worker is in test_worker.
"""

import tempfile
from collections.abc import Callable
from itertools import count
from types import SimpleNamespace
from typing import Any

from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test
from kafka import TopicPartition

from services.core.eventlog import EventLog
from services.core.events import EVENTS, encode
from services.core.features import FeatureStore
from services.core.settings import Settings
from services.ingest.reading import Reading
from services.ingest.worker import Worker
from tests.component.test_worker import START_MS, comparable, event, from_log

PARTITION = TopicPartition(EVENTS, 0)
lives = count()


class CrashError(BaseException):
    """The process is gone."""


class WorkerMachine(RuleBasedStateMachine):
    """What must hold in the end: the log has every event once, the online rows are those that the
    log gives, and of a forgotten user there is only what came after the wish."""

    def __init__(self, settings: Settings, features: FeatureStore) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.settings = settings.model_copy(update={"offline_uri": self.folder.name})
        self.features = features
        life = next(lives)
        self.users = [f"machine-{life}-{n}" for n in range(3)]
        self.topic: list[Any] = []
        self.expected: dict[str, set[str]] = {user: set() for user in self.users}
        self.begin()

    def begin(self) -> None:
        """A worker's start: it goes on from the log's end."""
        self.worker = Worker(self.settings, self.features)
        at = EventLog(self.settings.offline).end().get(0, 0)
        self.worker._reading[PARTITION] = Reading(partition=0, first=at, next=at)

    def attempt(self, action: Callable[[], object], steps: int | None, error: type) -> None:
        """Let the step after so many writes end in `error`; None: all goes well."""
        worker, left = self.worker, count(10**9 if steps is None else steps, -1)
        log, history = worker._logs[EVENTS], worker._flush.history
        watched = [
            (worker._features, "write_users"),
            (worker._features, "forget_users"),
            *((log, name) for name in ("append", "forget")),
            (history, "write"),
        ]

        def counting(write: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*args: Any) -> Any:
                if next(left) <= 0:
                    raise error("planted")
                done = write(*args)
                if next(left) <= 0:
                    raise error("planted")
                return done

            return counted

        for owner, name in watched:
            setattr(owner, name, counting(getattr(owner, name)))
        try:
            action()
        except CrashError:
            self.begin()
        finally:
            for owner, name in watched:
                delattr(owner, name)

    @rule(
        what=st.lists(
            st.tuples(st.integers(0, 2), st.integers(0, 12), st.sampled_from([0, 5, 60])),
            min_size=1,
            max_size=6,
        ),
        forgets=st.sampled_from([None, None, 0, 1]),
        apply_steps=st.sampled_from([None, None, 0, 1, 2, 3]),
        flush_steps=st.sampled_from([None, 0, 1, 2, 3, 4, 5]),
        error=st.sampled_from([CrashError, OSError]),
    )
    def live(
        self,
        what: list[tuple[int, int, int]],
        forgets: int | None,
        apply_steps: int | None,
        flush_steps: int | None,
        error: type,
    ) -> None:
        """Events and perhaps a wish arrive, are applied and flushed, as far as that goes."""
        for user, number, late_s in what:
            one = event(number, user=self.users[user], late_ms=late_s * 1000)
            self._send(one.user_id, encode(one))
            self.expected[one.user_id].add(one.event_id)
        if forgets is not None:
            self._send(self.users[forgets], None)
            self.expected[self.users[forgets]].clear()
        self.attempt(self._apply, apply_steps, CrashError)
        self.attempt(self._flush, flush_steps, error)

    @rule()
    def tidy(self) -> None:
        self.worker._forget()

    def teardown(self) -> None:
        self._apply()
        self._flush()
        for purged in (False, True):
            if purged:
                self.worker._forget()
            log = EventLog(self.settings.offline).read(columns=["user_id", "event_id"]).to_pylist()
            for user in self.users:
                ids = [row["event_id"] for row in log if row["user_id"] == user]
                assert sorted(ids) == sorted(self.expected[user])
            online = self.features.read_users(self.users)
            assert [comparable(row) for row in online] == from_log(self.settings, self.users)
        self.folder.cleanup()

    def _apply(self) -> None:
        at = self.worker._reading[PARTITION].next
        if self.topic[at:]:
            self.worker._apply({PARTITION: self.topic[at:]})

    def _flush(self) -> None:
        self.worker._flush.attempt(self.worker._reading)

    def _send(self, user: str, value: bytes | None) -> None:
        self.topic.append(
            SimpleNamespace(
                offset=len(self.topic),
                partition=0,
                key=user.encode(),
                value=value,
                timestamp=START_MS + len(self.topic),
            )
        )


def test_whatever_happens_to_a_worker_in_the_end_all_is_as_the_log_says(settings: Settings) -> None:
    features = FeatureStore(settings)
    run_state_machine_as_test(
        lambda: WorkerMachine(settings, features),  # type: ignore[arg-type]
        settings=hypothesis_settings(
            max_examples=20,
            stateful_step_count=12,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
