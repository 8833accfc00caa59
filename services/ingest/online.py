"""Brings records online, and finds those that can't be."""

import logging
import time
from collections import Counter as Counts
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from typing import Any, Final

from services.core.errors import UnavailableError
from services.core.eventlog import Arrived, events_table, items_table
from services.core.events import EVENTS, Event, Item
from services.core.features import FeatureStore
from services.core.forgetting import Tombstone
from services.core.history import UserHistory, merge
from services.ingest.metrics import Metrics

TRIES: Final = 3  # of a record that fails for no reason the contract knows
PAUSE_S: Final = 0.1  # before the second and third

logger = logging.getLogger(__name__)

Poison = list[tuple[Arrived[Any], str]]  # each with the reason


class Online:
    """Features as of the records applied so far. Applying one again changes nothing."""

    def __init__(self, features: FeatureStore, metrics: Metrics, *, history_events: int) -> None:
        self._features = features
        self._metrics = metrics
        self._limit = history_events
        self._touched: dict[int, dict[str, UserHistory]] = defaultdict(dict)

    def apply(self, topic: str, arrived: Sequence[Arrived[Any]]) -> Poison:
        """Write them online, in order; return those that can't be. Raises `UnavailableError`."""
        try:
            self._write(topic, arrived)
            return []
        except (UnavailableError, OSError):  # not the records' fault
            raise
        except Exception as error:
            if len(arrived) > 1:
                middle = len(arrived) // 2
                parts = (arrived[:middle], arrived[middle:])
                return [poison for part in parts for poison in self.apply(topic, part)]
            return self._try_again(topic, arrived[0], error)

    def forget(self, tombstones: Sequence[Tombstone]) -> None:
        """Delete the rows of these users, whose earlier events no longer come to `apply`."""
        if tombstones:
            user_ids = [tombstone.user_id for tombstone in tombstones]
            self._features.forget_users(user_ids)
            self._metrics.forgotten.inc(len(user_ids))
            for rows in self._touched.values():
                for user_id in user_ids:
                    rows.pop(user_id, None)

    def touched(self, partition: int) -> list[UserHistory]:
        """The newest rows of its users written since the last `let_go`."""
        return list(self._touched[partition].values())

    def let_go(self, partition: int) -> None:
        """Its touched rows are in the offline files, or somebody else's to write."""
        self._touched.pop(partition, None)

    def _try_again(self, topic: str, record: Arrived[Any], error: Exception) -> Poison:
        for _ in range(TRIES - 1):
            time.sleep(PAUSE_S)
            try:
                self._write(topic, [record])
                return []
            except (UnavailableError, OSError):
                raise
            except Exception as again:
                error = again
        # The reason may quote the record: logs carry none of it, the dead letter all.
        where = (topic, record.partition, record.offset)
        logger.error("%s %d:%d is poison (%s)", *where, type(error).__name__)
        return [(record, f"{type(error).__name__}: {error}")]

    def _write(self, topic: str, arrived: Sequence[Arrived[Any]]) -> None:
        if topic == EVENTS:
            events_table(arrived)  # what can't be logged must not go online either
            self._write_users(arrived)
        else:
            items_table(arrived)
            self._write_items(arrived)

    def _write_users(self, events: Sequence[Arrived[Event]]) -> None:
        by_user: dict[str, list[Arrived[Event]]] = defaultdict(list)
        for arrived in events:
            if arrived.record.is_interaction:
                by_user[arrived.record.user_id].append(arrived)
        if by_user:
            merged: list[UserHistory] = []
            now_ms = time.time_ns() // 1_000_000
            for history in self._features.read_users(list(by_user)):
                news = by_user[history.user_id]
                row, duplicates = merge(history, news, limit=self._limit, now_ms=now_ms)
                self._metrics.duplicates.inc(duplicates)
                merged.append(row)
            self._features.write_users(merged)
            for row in merged:
                self._touched[row.partition][row.user_id] = row
            written_ms = time.time_ns() // 1_000_000
            for arrived in chain.from_iterable(by_user.values()):
                self._metrics.freshness.observe((written_ms - arrived.arrival_ms) / 1000)
        for kind, count in Counts(arrived.record.type.value for arrived in events).items():
            self._metrics.events.labels(kind).inc(count)

    def _write_items(self, items: Sequence[Arrived[Item]]) -> None:
        if items:
            latest = {arrived.record.item_id: arrived.record for arrived in items}
            self._features.write_items(latest.values())
            self._metrics.items.inc(len(items))
