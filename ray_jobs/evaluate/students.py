"""The distillation job itself on a log held in memory: its warm-up, its loop, its gate.

What differs from production: events come from arrays in micro-batches of equal size, the clock
goes by events, and teachers label in this process. So a run is repeatable.

Shapes: N events of the log, M of a micro-batch.
"""

import copy
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow.parquet as pq
import torch

from ray_jobs.checkpoint import State
from ray_jobs.distiller import Distiller
from ray_jobs.evaluate.events import Events
from ray_jobs.evaluate.judging import LISTS_EVERY, forward_ms, top_rows
from ray_jobs.evaluate.results import Cost, Ints, Outcome
from ray_jobs.evaluate.rows import Say, peak_mb
from ray_jobs.labels import Items, Labels, aligned, items_of, label
from ray_jobs.microbatch import MicroBatch
from ray_jobs.peers import ALONE
from ray_jobs.ranking import encode
from ray_jobs.recipes import DistillConfig, Recipe
from ray_jobs.stream import Received
from ray_jobs.teachers import Asked
from ray_jobs.warm_up import state_of, warm_up
from services.core.catalog import Catalog
from services.core.metrics import Ranks
from services.core.models.recommender import Recommender
from services.core.models.teacher import Teacher
from services.core.settings import Settings

STEP_EVENTS: Final = 200  # a micro-batch
EVENTS_PER_S: Final = 500.0  # the rate that the job's clock goes by
CATALOG: Final = "catalog.parquet"
FOREVER_S: Final = 1e9


class ArraySource:
    """Events `first`..`last` of a log, as `distiller.Source` has them."""

    def __init__(self, events: Events, first: int, last: int) -> None:
        self._events, self.last = events, last
        self.positions = {0: first}

    @property
    def at(self) -> int:
        return self.positions[0]

    def poll(self, *, max_events: int, timeout_s: float) -> Received:
        until = min(self.at + max_events, self.last)
        received = self._events.received(self.at, until)
        self.positions = {0: until}
        return received

    def lag_events(self) -> int:
        return self.last - self.at  # behind, so that the job spares what only production shows

    def check_topic(self) -> None:
        return


class ArrayTeachers:
    """Teachers kept by the place in the log up to which they had learned; each takes over when
    the stream gets there. None at all where there are no `kept`."""

    def __init__(
        self, kept: Mapping[int, Path], source: ArraySource, config: DistillConfig
    ) -> None:
        self._kept, self._source, self._config = kept, source, config
        self._catalog = Catalog()
        self._loaded: tuple[Teacher, Catalog] | None = None
        self._aligned: Teacher | None = None
        self.version: int | None = None
        self.first: int | None = None
        self.offsets: Mapping[int, int] = {}

    def align(self, catalog: Catalog) -> None:
        self._catalog = catalog
        if self._loaded is not None:
            ids = catalog.ids(range(1, len(catalog)))
            moved = aligned(*self._loaded, item_ids=ids, content=catalog.content)
            self._aligned = moved.to("cuda" if self._config.label_gpus else "cpu")

    def look(self) -> None:
        version = max((at for at in self._kept if at <= self._source.at), default=None)
        if version is None or version == self.version:
            return
        self._loaded = load_teacher(self._kept[version])
        self.version, self.first = version, self.first or version
        self.offsets = {0: version}
        self.align(self._catalog)

    def items(self) -> Items | None:
        return None if self._aligned is None else items_of(self._aligned)

    def ask_labels(self, batch: MicroBatch) -> Asked:
        if self._aligned is None or not self._config.needs_labels:
            return Asked()
        return Asked(label(self._aligned, batch, top_k=self._config.top_k))

    def ask(self, batch: MicroBatch, *, stale: bool, **how: Any) -> Asked:
        """Ranks, too, which the job's trust goes by; the teacher's own row is judged elsewhere."""
        if self._aligned is None:
            return Asked()
        how = {**how, "top_k": self._config.top_k}
        return Asked(label(self._aligned, batch, **how))

    def answer(self, asked: Asked) -> tuple[Labels | None, Ranks | None]:
        return asked.teacher, None


def save_teacher(teacher: Teacher, catalog: Catalog, directory: Path) -> None:
    """The catalog last: a directory without one isn't finished."""
    teacher.save(directory)
    pq.write_table(catalog.to_table(), directory / "writing")
    (directory / "writing").rename(directory / CATALOG)


def load_teacher(directory: Path) -> tuple[Teacher, Catalog]:
    catalog = Catalog.from_table(pq.read_table(directory / CATALOG))
    return Teacher.load(directory), catalog


class Learner:
    """The job at a place in the log; what it meets until `source.last` is the caller's to tick."""

    def __init__(
        self,
        events: Events,
        state: State,
        *,
        config: DistillConfig,
        kept: Mapping[int, Path],
        settings: Settings,
        at: int,
        last: int,
    ) -> None:
        self.state, self.warm_s = state, 0.0
        self._events, self._config, self._kept, self._settings = events, config, kept, settings
        self.source = ArraySource(events, at, last)
        self.teachers = ArrayTeachers(kept, self.source, config)
        self.teachers.align(state.catalog)
        self.teachers.look()
        self.heard = Heard(events, state, lists_every=LISTS_EVERY)
        self.distiller = Distiller(
            state,
            self.source,
            self.teachers,
            settings=settings,
            config=config,
            peers=ALONE,
            keep=lambda: None,
            scored=self.heard,
            now_s=lambda: (self.source.at - at) / EVENTS_PER_S,
        )

    def warm_up(self) -> None:
        """On all that has been met, from where the student stands."""
        begin_s = time.monotonic()
        warm_up(self.state, self.teachers, self._config, ALONE)
        self.warm_s = time.monotonic() - begin_s

    @contextmanager
    def twin(self, *, publish_every_s: float) -> Iterator["Learner"]:
        """The same job at the same place, with a registry of its own, on to the log's end."""
        self.distiller.checkpoint()
        with tempfile.TemporaryDirectory() as home:
            shutil.copytree(self._settings.home, home, dirs_exist_ok=True)
            yield Learner(
                self._events,
                copy.deepcopy(self.state),
                config=self._config,
                kept=self._kept,
                settings=self._settings.model_copy(
                    update={"home": Path(home), "publish_every_s": publish_every_s}
                ),
                at=self.source.at,
                last=len(self._events),
            )


@contextmanager
def learner(
    events: Events, recipe: Recipe, *, kept: Mapping[int, Path], seed: int, first: int, last: int
) -> Iterator[Learner]:
    """The job, warmed up on all before `first`.

    `kept`: teachers by place; none: hard labels only. The warm-up ends by its epochs, not by its
    seconds, so that every row takes the same steps.
    """
    config = replace(
        recipe.distill, max_events=STEP_EVENTS, warm_up_s=FOREVER_S, stale_teacher=False
    )
    recipe = replace(recipe, distill=config)
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    state = state_of(events.received(0, first), events.items, recipe=recipe, seed=seed)
    state.positions = {0: first}
    with tempfile.TemporaryDirectory() as home:
        settings = Settings(home=Path(home), keep_versions=3, seed=seed)
        learning = Learner(
            events, state, config=config, kept=kept, settings=settings, at=first, last=last
        )
        learning.warm_up()
        learning.distiller.begin()
        yield learning


@dataclass(frozen=True, kw_only=True, eq=False)
class Distilled:
    """What a run gives: the student learning on, and the same one frozen as the stream began."""

    student: Outcome
    frozen: Outcome


def distil(
    events: Events,
    recipe: Recipe,
    *,
    kept: Mapping[int, Path],
    seed: int,
    say: Say,
    last: int | None = None,
) -> Distilled:
    """Warm up on the first half, then predict and learn up to `last`."""
    first = events.half
    last = len(events) if last is None else last
    begin_s = time.monotonic()
    say(0.0, "warming up")
    with learner(events, recipe, kept=kept, seed=seed, first=first, last=last) as learning:
        source, state, warm_s = learning.source, learning.state, learning.warm_s
        while source.at < last:
            learning.distiller.tick()
            say((source.at - first) / (last - first), f"event {source.at - first:,}")
        learning.distiller.checkpoint()
    train_s = time.monotonic() - begin_s
    cost = Cost(
        parameters=state.student.n_parameters,
        forward_ms=forward_ms(state.student, context=recipe.distill.context_events),
        train_s=train_s,
        peak_mb=peak_mb(),
    )
    notes = {
        "warm_s": warm_s,
        "steps": state.counters.steps,
        "learning_rate": state.counters.learning_rate,
        "rejected": state.counters.rejected_in_a_row,
    }
    student, frozen = (
        learning.heard.outcome(name, cost=cost, notes=notes)
        for name in ("student", "frozen_student")
    )
    frozen = replace(frozen, cost=replace(cost, train_s=warm_s))
    return Distilled(student=student, frozen=frozen)


class Heard:
    """Collects ranks of real events as the job scores them, and some top-10 lists."""

    def __init__(self, events: Events, state: Any, *, lists_every: int) -> None:
        self._events, self._state, self._every = events, state, lists_every
        self._keys: list[Ints] = []
        self._ranks: dict[str, list[Ranks]] = {}
        self._shown: dict[str, set[int]] = {}

    def __call__(self, batch: MicroBatch, ranks: Mapping[str, Ranks]) -> None:
        n_new = len(ranks["student"])
        self._keys.append(batch.key_N[:n_new])
        for name, values in ranks.items():
            self._ranks.setdefault(name, []).append(values)
        if len(self._keys) % self._every == 1:
            models = {"student": self._state.student, "frozen_student": self._state.frozen}
            for name, model in models.items():
                if model is not None:
                    rows = _top_of(model, batch, n_new)
                    self._shown.setdefault(name, set()).update(rows.tolist())

    def outcome(self, name: str, **more: Any) -> Outcome:
        key_N = np.concatenate(self._keys)
        rank_N = np.concatenate(self._ranks[name])
        order = np.argsort(key_N)
        order = order[self._events.real_N[key_N[order]]]
        return Outcome(
            event_N=key_N[order],
            user_N=self._events.user_N[key_N[order]],
            rank_N=rank_N[order],
            shown=len(self._shown.get(name, ())),
            catalog_rows=len(self._events.item_ids) - 1,
            **more,
        )


@torch.no_grad()
def _top_of(model: Recommender, batch: MicroBatch, n_new: int) -> Ints:
    model.eval()
    table_VD = model.encoder.item_table()
    hidden_ND = encode(model, batch, table_VD=table_VD)[:n_new]
    scores_NV = model.scores(hidden_ND, table_VD=table_VD)
    return top_rows(scores_NV, batch.seen(model.n_rows, slice(0, n_new)))
