"""From the offline log to a first student: remember everything, learn for a bounded time."""

import itertools
import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import torch

from ray_jobs import replay
from ray_jobs.checkpoint import Counters, State
from ray_jobs.histories import NO_EVENTS, Histories, merged
from ray_jobs.learner import adam, learn, set_learning_rate, start_from
from ray_jobs.microbatch import MicroBatch, UserNews, absorb, group
from ray_jobs.peers import ALONE, Peers
from ray_jobs.recipes import DistillConfig, Recipe
from ray_jobs.stream import COLUMNS, Received
from ray_jobs.teachers import Asked, Teaching
from services.core.catalog import TRENDING_HALF_LIFE_EVENTS, Catalog
from services.core.eventlog import EventLog
from services.core.events import ITEMS
from services.core.kafka import resume_offsets
from services.core.metrics import Prequential
from services.core.models.student import Student
from services.core.settings import Settings

logger = logging.getLogger(__name__)

TRENDING_EVENTS = 20 * TRENDING_HALF_LIFE_EVENTS  # whatever came before counts 2^-20
LABELS_AHEAD = 2  # batches that the teacher has been asked about and the student not reached
RISE_STEPS = 50  # over which the learning rate comes up
LOG_EVERY_S = 5.0


def first_state(settings: Settings, recipe: Recipe, peers: Peers) -> State:
    """Everything that the offline log holds, remembered; nothing learned yet."""
    events, items = EventLog(settings.offline), EventLog(settings.offline, ITEMS)
    # Worker 0's word: the log grows meanwhile, and all need the same catalog.
    end, items_until = peers.gather(
        (resume_offsets(settings, events), resume_offsets(settings, items))
    )[0]
    state = remembering(
        (
            Received.of_log(events.read_portion(part, columns=COLUMNS))
            for part in events.portions(until=end)
        ),
        items.read(until=items_until),
        recipe=recipe,
        seed=settings.seed,
        peers=peers,
    )
    state.counters.items_until = {str(partition): at for partition, at in items_until.items()}
    state.learned({p: at for p, at in end.items() if p % peers.world == peers.rank})
    return state


def state_of(
    received: Received, items: pa.Table, *, recipe: Recipe, seed: int, peers: Peers = ALONE
) -> State:
    """A new student that remembers what was received; `items` as `Catalog.describe` takes them."""
    return remembering([received], items, recipe=recipe, seed=seed, peers=peers)


def remembering(
    parts: Iterable[Received], items: pa.Table, *, recipe: Recipe, seed: int, peers: Peers
) -> State:
    """The same of a log that comes in parts, of which one is held at a time."""
    catalog = Catalog()
    catalog.describe(items)
    histories = Histories(keep=recipe.distill.keep_events)
    newest, n_events = NO_EVENTS, 0
    for received in parts:
        n_events += len(received)
        arrivals = received.arrivals(catalog)
        absorb(group(arrivals.owned(peers.rank, peers.world), histories), histories)
        newest, _ = merged(newest, arrivals.events)
        newest = newest[-TRENDING_EVENTS:].copy()
    catalog.observe(newest["row"].astype(np.int64))
    student = Student(recipe.student, n_rows=len(catalog))
    student.describe(catalog.content)
    logger.info(
        "the log holds %d events of %d users; the catalog %d items",
        *(n_events, len(histories), len(catalog) - 1),
    )
    return State(
        student=student,
        optimizer=adam(student, recipe.distill),
        catalog=catalog,
        histories=histories,
        positions={},
        ledger={},
        quality=Prequential(),
        counters=Counters(learning_rate=recipe.distill.learning_rate, seed=seed),
    )


def warm_up(state: State, teachers: Teaching, config: DistillConfig, peers: Peers) -> None:
    """Learn the latest of the log in random order, until its epochs or its seconds are over.

    The learning rate rises, then falls to the stream's over whichever of the two ends first.
    """
    begin_s = logged_s = time.monotonic()
    items = peers.gather(teachers.items())[0]
    if config.start_from_teacher and items is not None and len(state.catalog) > 1:
        start_from(state.student, items)
    n_windows = len(
        replay.windows(
            state.histories,
            window=config.context_events,
            latest_events=config.warm_up_events,
            peers=peers,
        )
    )
    per_epoch = -(-n_windows // config.warm_up_users)
    n_steps = round(per_epoch * config.warm_up_epochs)
    batches = _endless(state, config, peers)
    under_way: deque[tuple[MicroBatch, Asked]] = deque()
    step = 0
    for step in range(n_steps):
        # Asked so far in advance that teacher and student work at the same time.
        while len(under_way) <= LABELS_AHEAD * config.warm_up_label_every:
            batch = MicroBatch.of(next(batches), context=config.context_events)
            labelled = (step + len(under_way)) % config.warm_up_label_every == 0
            under_way.append((batch, teachers.ask_labels(batch) if labelled else Asked()))
        elapsed_s = time.monotonic() - begin_s
        # Worker 0's clock counts, so that all take the same number of steps.
        progress = peers.gather(max(step / n_steps, elapsed_s / config.warm_up_s))[0]
        if progress >= 1:
            break
        risen = min(1.0, (step + 1) / RISE_STEPS)
        peak, end = config.warm_up_learning_rate, config.learning_rate
        set_learning_rate(state.optimizer, risen * (peak + progress * (end - peak)))
        batch, asked = under_way.popleft()
        learn(
            state.student,
            state.optimizer,
            batch,
            teachers.answer(asked)[0],
            config=config,
            weights_N=torch.ones(len(batch)),
            trust=1.0,
            peers=peers,
        )
        if time.monotonic() - logged_s > LOG_EVERY_S:
            logged_s = time.monotonic()
            logger.info("warm-up: %.0f%%, %d steps in %.0f s", 100 * progress, step, elapsed_s)
    set_learning_rate(state.optimizer, state.counters.learning_rate)
    logger.info(
        "warmed up: %d steps of %d users, %.1f epochs, %.0f s",
        *(step, config.warm_up_users, step / max(per_epoch, 1), time.monotonic() - begin_s),
    )


def _endless(state: State, config: DistillConfig, peers: Peers) -> Iterator[list[UserNews]]:
    """Epoch after epoch."""
    for epoch in itertools.count():
        yield from replay.one_pass(
            state.histories,
            [state.counters.seed, state.counters.steps, epoch],
            users=config.warm_up_users,
            window=config.context_events,
            ordered=state.student.config.ordered,
            latest_events=config.warm_up_events,
            peers=peers,
        )
