"""The `gate` protocol: bad candidates on purpose, and what the job does about them.

The job runs on the first half of a log and some events of the second (`students.learner`); each
trial goes on from there with the same student, does one thing to it, and runs on. Nothing helps the
job: what is rejected, what answers meanwhile and how it recovers is its own doing.

    reflux evaluate --protocol gate --dataset ml-100k --recipe tiny_cpu
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from ray_jobs import recipes
from ray_jobs.evaluate import table
from ray_jobs.evaluate.events import Events, LogChoice, load
from ray_jobs.evaluate.options import Options
from ray_jobs.evaluate.results import Outcome
from ray_jobs.evaluate.rows import Job, Say
from ray_jobs.evaluate.students import ArrayTeachers, Learner, learner, save_teacher
from ray_jobs.microbatch import MicroBatch, group
from ray_jobs.peers import ALONE
from ray_jobs.ranking import predict
from ray_jobs.recipes import Recipe
from ray_jobs.warm_up import warm_up
from services.core.metrics import ndcg_at
from services.core.models.teacher import Teacher
from services.core.registry import Registry

SETTLED_EVENTS: Final = 12_000  # of the second half; a version is proved by then
TRIAL_EVENTS: Final = 15_000
PUBLISH_EVERY_S: Final = 0.3  # by the job's clock (`students.EVENTS_PER_S`): at every step
LAST_EVENTS: Final = 5_000  # of a trial: where it has come to
SLIGHTLY: Final = 0.05
JUDGED_EVENTS: Final = 2_000  # by which what is slightly worse is measured out
HALVINGS: Final = 8  # of the interval in which its noise lies
GARBAGE_EPOCHS: Final = 0.5


@dataclass(frozen=True, kw_only=True)
class Given:
    """What all trials depend on."""

    log: LogChoice
    recipe: Recipe
    settled_events: int = SETTLED_EVENTS
    trial_events: int = TRIAL_EVENTS


def _healthy(twin: Learner, events: Events, given: Given) -> None:
    """Nothing is done to it."""


@torch.no_grad()
def _nan(twin: Learner, events: Events, given: Given) -> None:
    """One broken number."""
    twin.state.student.bias_V[1] = torch.nan


@torch.no_grad()
def _collapsed(twin: Learner, events: Events, given: Given) -> None:
    """All it knows is what is popular, and it doesn't learn: it stays so."""
    student = twin.state.student
    student.encoder.item_id.weight.zero_()
    student.encoder.content.weight.zero_()
    student.bias_V.copy_(torch.from_numpy(np.log1p(twin.state.catalog.popularity)))
    _stop_learning(twin)


@torch.no_grad()
def _slightly_worse(twin: Learner, events: Events, given: Given) -> None:
    """Noise on its items costs `SLIGHTLY` of its NDCG@10, and it doesn't learn: it stays so."""
    state, at = twin.state, twin.source.at
    received = events.received(at, at + JUDGED_EVENTS)
    news = group(received.arrivals(state.catalog.copy()), state.histories)
    batch = MicroBatch.of(news, context=given.recipe.distill.context_events)
    weight = state.student.encoder.item_id.weight
    good, noise = weight.clone(), torch.randn_like(weight) * weight.std()

    def quality(share: float) -> float:
        weight.copy_(good + share * noise)
        popularity = state.catalog.popularity
        ranks = predict(state.student, batch, popularity=popularity, known_rows=len(popularity))
        return ndcg_at(ranks, 10)

    low, high, wanted = 0.0, 2.0, (1 - SLIGHTLY) * quality(0.0)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if quality(middle) < wanted else (middle, high)
    _stop_learning(twin)


def _stop_learning(twin: Learner) -> None:
    """Until the job goes back: what it learns by then is made anew."""
    for settings in twin.state.optimizer.param_groups:
        settings["lr"] = 0.0


def _garbage_teacher(twin: Learner, events: Events, given: Given) -> None:
    """It has begun from, and learned by, a teacher that knows nothing."""
    with tempfile.TemporaryDirectory() as directory:
        catalog = twin.state.catalog
        teacher = Teacher(given.recipe.teacher, n_rows=len(catalog))
        teacher.describe(catalog.content)
        save_teacher(teacher, catalog, Path(directory))
        config = replace(given.recipe.distill, warm_up_epochs=GARBAGE_EPOCHS)
        teachers = ArrayTeachers({0: Path(directory)}, twin.source, config)
        teachers.align(catalog)
        teachers.look()
        warm_up(twin.state, teachers, config, ALONE)


TRIALS: Final[dict[str, Callable[[Learner, Events, Given], None]]] = {
    "healthy": _healthy,
    "nan": _nan,
    "collapsed": _collapsed,
    "slightly-worse": _slightly_worse,
    "garbage-teacher": _garbage_teacher,
}


def jobs(options: Options) -> list[Job]:
    """One job: the trials share what comes before them."""
    log = options.log(options.noise)
    given = Given(log=log, recipe=recipes.load(options.recipe))
    return [Job(name="gate", run=run, given=given, rows=tuple(TRIALS))]


def run(given: Given, say: Say) -> dict[str, Outcome]:
    """Every trial's ranks, and in the notes what the job did."""
    events = load(given.log)
    first = events.half
    outcomes: dict[str, Outcome] = {}
    with learner(
        events,
        given.recipe,
        kept={},
        seed=given.log.seed,
        first=first,
        last=first + given.settled_events,
    ) as learning:
        while learning.source.lag_events():
            learning.distiller.tick()
        for place, row in enumerate(TRIALS):
            say((place + 1) / (len(TRIALS) + 1), row)
            with learning.twin(publish_every_s=PUBLISH_EVERY_S) as twin:
                outcomes[row] = _trial(row, twin, events, given)
    return outcomes


def _trial(row: str, twin: Learner, events: Events, given: Given) -> Outcome:
    begin, counters = twin.source.at, twin.state.counters
    registry = Registry(twin.distiller.settings.registry)
    TRIALS[row](twin, events, given)
    twin.source.last = min(begin + given.trial_events, len(events))
    version, served = counters.published, counters.serving
    rejected: dict[str, Any] = {}
    while twin.source.lag_events():
        twin.distiller.tick()
        if counters.published == version:
            continue
        version = counters.published
        gate = registry.manifest("student", version or 0)["gate"]
        after = twin.source.at - begin
        if not gate["promoted"] and not rejected:
            stays = registry.serving("student").version == served
            rejected = {"after_events": after, "stays": stays, "reason": gate["reason"]}
        if gate["promoted"] and rejected:
            rejected.setdefault("recovered_events", after)
        served = counters.serving
    twin.distiller.checkpoint()
    return twin.heard.outcome("student", notes=rejected)


def report(options: Options, outcomes: Mapping[str, Outcome], command: str) -> str:
    """What was rejected when and why, whether what served stayed, and where each has come to."""
    lines = [
        {
            "candidate": row,
            "rejected after events": outcome.notes.get("after_events"),
            "what serves stays": str(outcome.notes.get("stays", "")),
            "promoted again after": outcome.notes.get("recovered_events"),
            f"ndcg@10 of the last {LAST_EVENTS:,}": ndcg_at(outcome.rank_N[-LAST_EVENTS:], 10),
            "reason": outcome.notes.get("reason", ""),
        }
        for row, outcome in outcomes.items()
    ]
    title = f"gate, {options.dataset_name}, {options.recipe}"
    return table.write(lines, options.out / "table", title=title, command=command)
