"""The distillation loop: predict each micro-batch of the stream, then learn it."""

import copy
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ray_jobs import replay
from ray_jobs.checkpoint import State
from ray_jobs.learner import learn, trust_in
from ray_jobs.microbatch import MicroBatch, absorb, group
from ray_jobs.peers import Peers
from ray_jobs.publish import Publisher
from ray_jobs.ranking import predict, predict_popular
from ray_jobs.recipes import CHECKPOINTS_KEPT, DistillConfig
from ray_jobs.stream import Received, answer_lists
from ray_jobs.teachers import Asked, Teaching
from ray_jobs.telemetry import Telemetry
from ray_jobs.warm_up import warm_up
from services.core.eventlog import EventLog, records_between
from services.core.events import ITEMS
from services.core.history import event_key
from services.core.metrics import Ranks, gains_at
from services.core.settings import Settings

logger = logging.getLogger(__name__)

ITEMS_EVERY_S = 5.0  # between two looks at the items log
TOPIC_EVERY_S = 30.0  # between two looks whether Kafka's topic has changed
EMA_EVENTS = 5_000  # half-life of the quality that trust goes by


class Source(Protocol):
    """Where events come from; tests bring one that aborts."""

    positions: dict[int, int]

    def poll(self, *, max_events: int, timeout_s: float) -> Received: ...
    def lag_events(self) -> int: ...
    def check_topic(self) -> None: ...


@dataclass(kw_only=True, eq=False)
class Pending:
    """A micro-batch that has been read and is not yet learned."""

    batch: MicroBatch  # the new events, then the replayed ones
    n_new: int
    n_all: int  # new events of all workers: where there are none, nobody learns
    asked: Asked
    ranks: dict[str, Ranks]  # of the new events, by who predicted them
    arrivals_ms: NDArray[np.int64]
    positions: dict[int, int]  # after it
    skipped: Mapping[int, tuple[int, int]]  # on the way to it


class _Read(NamedTuple):
    """What one worker tells the others of what it has just read."""

    n_new: int
    refused: int
    lists_answered: int
    lists_hit: int
    users: dict[int, int]  # remembered, by partition


class Distiller:
    """Predict, then learn, for ever: one `tick` is one micro-batch.

    A tick learns the batch before, and only then predicts its own, whose labels the teachers work
    out meanwhile: every prediction knows all that came before it, and nobody waits for long.

    `keep` stores a checkpoint. `scored` hears of each micro-batch's ranks, by who predicted them,
    before it is learned; they are of the batch's first targets: the new events.
    """

    def __init__(
        self,
        state: State,
        source: Source,
        teachers: Teaching,
        *,
        settings: Settings,
        config: DistillConfig,
        peers: Peers,
        keep: Callable[[], None],
        scored: Callable[[MicroBatch, Mapping[str, Ranks]], None] = lambda batch, ranks: None,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.telemetry = Telemetry()
        self.state = state
        self._source = source
        self._teachers = teachers
        self.settings = settings
        self._config = config
        self._peers = peers
        self._keep = keep
        self._scored = scored
        self._now_s = now_s
        self._clock_s = peers.gather(now_s())[0]  # else some would find due what others do not
        self._items = EventLog(settings.offline, ITEMS)
        self._pending: Pending | None = None
        self._taught = True  # a teacher's labels were there when what is remembered was learned
        self._kept = dict(state.positions)  # as of the newest checkpoint
        self._unclean = 0  # checkpoints to come until none that is kept knows who was forgotten
        self._probe = MicroBatch.of([], context=config.context_events)
        self._due_s = dict.fromkeys(("publish", "checkpoint", "items", "topic"), self._clock_s)
        self.publisher = Publisher(
            settings.registry,
            state,
            config=config,
            keep=settings.keep_versions,
            peers=peers,
            telemetry=self.telemetry,
        )

    def begin(self) -> None:
        """Publish the first version at once; the student frozen as it is now is the yardstick."""
        taught_before = self.state.counters.teacher is not None
        self._look_after_teachers()
        self._taught = taught_before or self._taught_by_now()
        if self.state.frozen is None and len(self.state.catalog) > 1:
            self._publish()
            self.checkpoint()
        else:  # a job that goes on has news at once
            self._due_s["publish"] -= self.settings.publish_every_s

    def tick(self) -> None:
        """Read a micro-batch, learn the one before, predict this one; publish and keep when due."""
        self._clock_s = self._peers.gather(self._now_s())[0]  # worker 0's, for all
        received = self._source.poll(
            max_events=self._config.max_events, timeout_s=self._config.poll_s
        )
        known_rows = len(self.state.catalog)
        heard = self._meet_items(received)
        pending = self._read(received, known_rows=known_rows)
        self._learn()
        self._pending = pending
        self._predict(pending, known_rows=known_rows)
        self.telemetry.lag.set(sum(self._peers.gather(self._source.lag_events())))
        self.state.catalog.observe(heard)
        self._look_after_teachers()
        if not self._taught:
            self._meet_first_teacher()
        if self._is_due("topic", TOPIC_EVERY_S):
            self._source.check_topic()
        if self._is_due("publish", self.settings.publish_every_s):
            self._publish_news()
        if self._is_due("checkpoint", self.settings.checkpoint_every_s):
            self._learn()
            due = self.state.positions != self._kept or self._unclean > 0
            if any(self._peers.gather(due)):
                self.checkpoint()

    def checkpoint(self) -> None:
        """Everything up to here, learned and kept."""
        self._learn()
        self._keep()
        self.telemetry.checkpoints.inc()
        self._unclean = max(0, self._unclean - 1)
        self._kept = dict(self.state.positions)

    def _publish_news(self) -> None:
        self._learn()
        moved = self.publisher.behind()
        if any(self._peers.gather(moved)) and len(self.state.catalog) > 1:
            self._publish()

    def _meet_items(self, received: Received) -> NDArray[np.int64]:
        """Give new items their rows, the same at every worker; return all rows heard."""
        state, described = self.state, None
        if self._is_due("items", ITEMS_EVERY_S) and self._peers.rank == 0:
            since = {int(p): at for p, at in state.counters.items_until.items()}
            until = self._items.end()
            if until != since:
                described = self._items.read(since=since, until=until)
                state.counters.items_until = {str(p): at for p, at in until.items()}
        known_rows = len(state.catalog)
        described = self._peers.gather(described)[0]
        if described is not None:
            state.catalog.describe(described)
        told = self._peers.gather(received.item_ids)
        # Sorted: who has read what must not decide which row an item gets, nor what is popular.
        heard = state.catalog.add(sorted(itertools.chain(*told)))
        if len(state.catalog) > known_rows or described is not None:
            state.student.grow(state.catalog.content, optimizer=state.optimizer)
            for model in (state.frozen, state.proved):
                if model is not None:
                    model.grow(state.catalog.content)
            self._teachers.align(state.catalog)
        return heard

    def _logged_keys(self) -> Iterator[NDArray[np.int64]]:
        """The keys of all events in the offline log."""
        log = EventLog(self.settings.offline)
        for portion in log.portions(until={}):
            event_ids = log.read_portion(portion, columns=["event_id"])["event_id"].to_pylist()
            yield np.array([event_key(event_id) for event_id in event_ids], np.int64)

    def _read(self, received: Received, *, known_rows: int) -> Pending:
        """Group by user, remember, add what is replayed, and ask the teachers about all of it."""
        state, config = self.state, self._config
        arrivals = received.arrivals(state.catalog)
        for user_id in received.forgotten:
            if state.histories.forget(user_id):
                self._unclean = CHECKPOINTS_KEPT
        for partition in received.rejoined:
            if n_gone := state.histories.keep_only(self._logged_keys(), partition=partition):
                logger.warning(
                    "partition %d: %d remembered events are no longer in the log", partition, n_gone
                )
                self._unclean = CHECKPOINTS_KEPT
        answered, hits = answer_lists(
            received, arrivals.events["row"], state.histories, state.catalog
        )
        news = group(arrivals, state.histories)
        absorb(news, state.histories)
        n_new = sum(int(user.new.sum()) for user in news)
        told = self._peers.gather(
            _Read(n_new, received.refused, answered, hits, state.histories.sizes())
        )
        self.telemetry.refused.inc(sum(one.refused for one in told))
        n_all = sum(one.n_new for one in told)
        state.counters.lists_answered += sum(one.lists_answered for one in told)
        state.counters.lists_hit += sum(one.lists_hit for one in told)
        n_waiting = int(self._pending is not None and self._pending.n_all > 0)
        old = (
            replay.draw(
                state.histories,
                [state.counters.seed, state.counters.steps + n_waiting],
                sizes={p: n for one in told for p, n in one.users.items()},
                users=config.replay_users,
                window=config.context_events,
                ordered=state.student.config.ordered,
                leave_out={user.user_id for user in news},
            )
            if n_all and config.replay_weight
            else []
        )
        batch = MicroBatch.of([*news, *old], context=config.context_events)
        asked = Asked()
        if n_new:
            self._probe = MicroBatch.of(news, context=config.context_events)
        if len(batch):
            asked = self._teachers.ask(
                batch,
                stale=self._source.lag_events() < config.max_events,
                n_ranked=n_new,
                popularity=state.catalog.popularity,
                known_rows=known_rows,
            )
        return Pending(
            batch=batch,
            n_new=n_new,
            n_all=n_all,
            asked=asked,
            ranks={},
            arrivals_ms=received.arrivals_ms,
            positions=dict(self._source.positions),
            skipped=received.skipped,
        )

    def _predict(self, pending: Pending, *, known_rows: int) -> None:
        if not pending.n_new:
            return
        state, batch = self.state, self._probe
        trending = state.catalog.popularity
        models = {"student": state.student, "frozen_student": state.frozen, "": state.proved}
        ranks = {
            name: predict(model, batch, popularity=trending, known_rows=known_rows)
            for name, model in models.items()
            if model is not None
        }
        self.publisher.scored(ranks["student"], ranks.pop("", None))
        ranks["popularity"] = predict_popular(batch, popularity=trending, known_rows=known_rows)
        pending.ranks = ranks

    def _learn(self) -> None:
        """Learn the micro-batch that waits; from then on its positions are behind us."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        state, config = self.state, self._config
        if pending.n_all:
            labels, stale = self._teachers.answer(pending.asked)
            teacher = None if labels is None else labels.ranks
            if pending.n_new:
                self._account(pending, teacher, stale)
            trust = self._trust(pending, teacher)
            weights_N = torch.full((len(pending.batch),), config.replay_weight)
            weights_N[: pending.n_new] = 1.0
            with self.telemetry.step.time():
                terms = learn(
                    state.student,
                    state.optimizer,
                    pending.batch,
                    labels,
                    config=config,
                    weights_N=weights_N,
                    trust=trust,
                    peers=self._peers,
                )
            self.telemetry.stepped(terms, trust=trust)
            state.counters.steps += 1
            state.counters.events_learned += pending.n_all
            self.telemetry.learned.inc(pending.n_all)
            self.publisher.learned(pending.arrivals_ms)
        state.learned(pending.positions, skipped=pending.skipped)

    def _account(self, pending: Pending, teacher: Ranks | None, stale: Ranks | None) -> None:
        ranks = dict(pending.ranks)
        if teacher is not None:
            ranks["teacher"] = teacher
        if stale is not None:
            ranks["stale_teacher"] = stale
        self.state.quality.add(ranks)
        self._scored(pending.batch, ranks)

    def _trust(self, pending: Pending, teacher: Ranks | None) -> float:
        """What the teacher deserves, judged by what all workers have seen of it."""
        counters = self.state.counters
        age = records_between(self._teachers.offsets, self.state.positions)
        n_new, by_teacher, by_student = 0, 0.0, 0.0
        if teacher is not None and pending.n_new:
            n_new = pending.n_new
            by_teacher = float(gains_at(teacher, 10).sum())
            by_student = float(gains_at(pending.ranks["student"], 10).sum())
        seen = (age, n_new, by_teacher, by_student)
        age, n_scored, by_teacher, by_student = map(
            sum, zip(*self._peers.gather(seen), strict=True)
        )
        if n_scored:
            # A teacher's first batch: no past to average with.
            keep = 0.5 ** (pending.n_all / EMA_EVENTS) if counters.teacher_ndcg else 0.0
            for name, gain in (("teacher_ndcg", by_teacher), ("student_ndcg", by_student)):
                mean = keep * getattr(counters, name) + (1 - keep) * gain / n_scored
                setattr(counters, name, mean)
        return trust_in(
            age_events=age,
            half_life_events=self._config.teacher_half_life_events,
            teacher_ndcg=counters.teacher_ndcg,
            student_ndcg=counters.student_ndcg,
        )

    def _look_after_teachers(self) -> None:
        self._teachers.look()
        counters = self.state.counters
        if self._teachers.version not in (None, counters.teacher):  # None: it still loads
            counters.teacher, counters.first_teacher = self._teachers.version, self._teachers.first
            counters.teacher_ndcg = counters.student_ndcg = 0.0
            self.telemetry.teacher.set(counters.teacher or 0)

    def _meet_first_teacher(self) -> None:
        """What was learned while there was no teacher is learned again, with its labels."""
        self._taught = self._taught_by_now()
        if self._taught and any(self._peers.gather(len(self.state.histories) > 0)):
            self._learn()
            warm_up(self.state, self._teachers, self._config, self._peers)
            self.publisher.forget_gains()
            self.state.frozen = copy.deepcopy(self.state.student)
            self._publish()
            self.checkpoint()

    def _taught_by_now(self) -> bool:
        return all(self._peers.gather(self._teachers.version is not None))

    def _publish(self) -> None:
        self.publisher.publish(self._probe)

    def _is_due(self, what: str, every_s: float) -> bool:
        """Whether it is time again, by the clock as this tick began."""
        if self._clock_s - self._due_s[what] < every_s:
            return False
        self._due_s[what] = self._clock_s
        return True
