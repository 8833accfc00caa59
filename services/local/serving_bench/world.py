"""What the bench answers about: MovieLens users, their histories online, a catalog of any size."""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow.parquet as pq
import torch

from ray_jobs import datasets, recipes
from services.core.catalog import Catalog
from services.core.events import EventType
from services.core.features import FeatureStore, UserHistory
from services.core.history import event_key
from services.core.models.student import Student
from services.core.registry import Registry
from services.core.settings import Settings

KEPT_VERSIONS: Final = 3


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


@dataclass(frozen=True)
class Artifact:
    """A student on disk, published as often as wanted."""

    directory: Path
    registry: Registry

    @classmethod
    def make(cls, settings: Settings, log: datasets.InteractionLog, *, items: int) -> "Artifact":
        """A student of the recipe's size, with the log's items and random rows up to `items`.

        Untrained: an answer costs the same. Its files stay in the settings' home.
        """
        catalog = Catalog()
        catalog.describe(log.items)
        catalog.observe(catalog.add(log.events["item_id"].to_pylist()))
        catalog.add(f"random-{number}" for number in range(items - len(catalog) + 1))
        torch.manual_seed(settings.seed)
        student = Student(recipes.load(settings.recipe).student, n_rows=len(catalog))
        student.describe(catalog.content)
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
