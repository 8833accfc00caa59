"""What the bench answers about: MovieLens users, their histories online, a catalog of any size."""

import copy
import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow.parquet as pq
import torch

from ray_jobs import datasets, recipes
from ray_jobs.checkpoint import State
from ray_jobs.evaluate.events import LogChoice
from ray_jobs.evaluate.events import load as events_of
from ray_jobs.evaluate.students import ArraySource, ArrayTeachers
from ray_jobs.peers import ALONE
from ray_jobs.warm_up import state_of, warm_up
from services.core.events import EventType
from services.core.features import FeatureStore, UserHistory
from services.core.history import event_key
from services.core.registry import Registry
from services.core.settings import Settings

KEPT_VERSIONS: Final = 3
LEARN_S: Final = 20.0


@dataclass(frozen=True)
class Users:
    """Whoever asks, and a stream of what they do."""

    log: datasets.InteractionLog
    histories: list[UserHistory]

    @property
    def user_ids(self) -> list[str]:
        return [history.user_id for history in self.histories]

    def events(self) -> Iterator[dict[str, Any]]:
        """The log's events once more, as new ones, without end."""
        columns = self.log.events.select(["user_id", "item_id", "timestamp_ms"]).to_pydict()
        lap = 0
        while True:
            for number, (user_id, item_id, stamp_ms) in enumerate(
                zip(*columns.values(), strict=True)
            ):
                yield {
                    "event_id": f"bench-{lap}-{number}",
                    "user_id": user_id,
                    "item_id": item_id,
                    "type": "click",
                    "timestamp": stamp_ms,
                }
            lap += 1


def users(log: datasets.InteractionLog, *, limit: int, now_ms: int) -> Users:
    """Everyone in the log, with the `limit` latest of what they did."""
    names = ("user_id", "item_id", "timestamp_ms", "value")
    columns = (log.events[name].to_pylist() for name in names)
    events: dict[str, list[tuple[str, int, float, int]]] = defaultdict(list)
    for number, (user_id, item_id, stamp_ms, value) in enumerate(zip(*columns, strict=True)):
        events[user_id].append((item_id, stamp_ms, math.nan if value is None else value, number))
    histories = []
    for user_id, done in events.items():
        item_ids, stamps_ms, values, numbers = zip(*done[-limit:], strict=True)
        histories.append(
            UserHistory(
                user_id=user_id,
                item_ids=item_ids,
                event_types=(EventType.RATING.value,) * len(item_ids),
                timestamps_ms=stamps_ms,
                values=values,
                event_keys=tuple(event_key(f"log-{number}") for number in numbers),
                n_events=len(done),
                last_arrival_ms=now_ms,
                updated_ms=now_ms,
            )
        )
    return Users(log, histories)


def write_online(settings: Settings, found: Users) -> None:
    store = FeatureStore(settings, timeout_s=30.0)
    store.apply()
    store.write_users(found.histories)


def learned(settings: Settings, choice: LogChoice) -> State:
    """A student of the recipe's size that has learned the log for a moment: it places the log's
    items as a real one does, which is what a search among many more has to cope with."""
    recipe, events = recipes.load(settings.recipe), events_of(choice)
    torch.manual_seed(settings.seed)
    state = state_of(
        events.received(0, len(events)), events.items, recipe=recipe, seed=settings.seed
    )
    config = dataclasses.replace(recipe.distill, warm_up_s=LEARN_S)
    nobody = ArrayTeachers({}, ArraySource(events, len(events), len(events)), config)
    warm_up(state, nobody, config, ALONE)
    return state


@dataclass(frozen=True)
class Artifact:
    """A student on disk, published as often as wanted."""

    directory: Path
    registry: Registry

    @classmethod
    @torch.no_grad()
    def make(cls, settings: Settings, state: State, *, items: int) -> "Artifact":
        """What was learned, with random rows up to `items`: of any direction, and of the lengths
        and biases that learned ones have. Its files stay in the settings' home."""
        catalog, student = state.catalog.copy(), copy.deepcopy(state.student)
        n_learned = len(catalog)
        table_VD, bias_V = student.encoder.item_table()[1:], student.bias_V[1:].clone()
        catalog.add(f"random-{number}" for number in range(items - n_learned + 1))
        student.grow(catalog.content)
        random = torch.Generator().manual_seed(settings.seed)
        n_random = len(catalog) - n_learned
        like = torch.randint(n_learned - 1, (2, n_random), generator=random)
        rows_ND = torch.randn(n_random, table_VD.shape[1], generator=random)
        rows_ND *= table_VD[like[0]].norm(dim=1, keepdim=True) / rows_ND.norm(dim=1, keepdim=True)
        student.encoder.item_id.weight[n_learned:] = rows_ND
        student.bias_V[n_learned:] = bias_V[like[1]]
        directory = settings.home.absolute() / f"student-{items}"
        student.save(directory)
        pq.write_table(catalog.to_table(), directory / "catalog.parquet")
        return cls(directory, Registry(settings.registry))

    def publish(self, reason: str) -> int:
        """Make a new version of it serve."""
        version = self.registry.publish("student", self.directory, {"teacher_version": None})
        self.registry.promote("student", version, reason)
        self.registry.prune("student", KEPT_VERSIONS)
        return version
