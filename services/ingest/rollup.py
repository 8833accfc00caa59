"""Item popularity over windows of event time, and the log's compaction; by one worker.

Windows end at the log's newest event, not at the clock: a replayed log has its own present.
"""

import logging
import time
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from services.core.eventlog import EventLog
from services.core.events import EVENTS, ITEMS
from services.core.features import FeatureStore
from services.core.history import INTERACTIONS, ItemStats, Popularity
from services.core.settings import Settings
from services.core.spans import filesystem, write_whole
from services.ingest import offline

DAY_US: Final = 86_400 * 1_000_000
WINDOWS_DAYS: Final = {"popularity_1d": 1, "popularity_7d": 7, "popularity_30d": 30}
COUNTS: Final = (*WINDOWS_DAYS, "n_events")

logger = logging.getLogger(__name__)


def popularity(events: pa.Table) -> list[Popularity]:
    """Interactions per item; a window of d days holds `newest - d < timestamp <= newest`.

    `events`: interactions, with the columns item_id and timestamp.
    """
    if len(events) == 0:
        return []
    items = events["item_id"].combine_chunks().dictionary_encode()
    codes = items.indices.to_numpy()
    age_us = -events["timestamp"].cast(pa.int64()).to_numpy()
    age_us -= age_us.min()
    ids = items.dictionary.to_pylist()
    counts = {"n_events": np.bincount(codes, minlength=len(ids))}
    for name, days in WINDOWS_DAYS.items():
        counts[name] = np.bincount(codes[age_us < days * DAY_US], minlength=len(ids))
    return [
        Popularity(item_id=item_id, **{name: int(count[i]) for name, count in counts.items()})
        for i, item_id in enumerate(ids)
    ]


def statistics(events: pa.Table, items: pa.Table) -> dict[str, ItemStats]:
    """All that is known of each item; of its metadata the latest by (timestamp, offset)."""
    counts = {row.item_id: row for row in popularity(events)}
    metadata = {row["item_id"]: row for row in items.to_pylist()}
    found = {}
    for item_id in counts.keys() | metadata.keys():
        given = metadata.get(item_id, {})
        count = counts.get(item_id)
        found[item_id] = ItemStats(
            item_id=item_id,
            title=given.get("title"),
            categories=tuple(given.get("categories") or ()),
            text=given.get("text"),
            **(
                {} if count is None else {n: getattr(count, n) for n in (*WINDOWS_DAYS, "n_events")}
            ),
        )
    return found


class RollUp:
    """Writes what changed since the last time, online and offline."""

    def __init__(self, settings: Settings, features: FeatureStore) -> None:
        self._settings = settings
        self._features = features
        self._events = EventLog(settings.offline, EVENTS)
        self._items = EventLog(settings.offline, ITEMS)
        # All interactions so far, 30 bytes each: reading the whole log again at every pass took
        # 2 s of every 30 at half a million events, and features waited for it.
        self._seen: pa.Table | None = None
        self._end: tuple[dict[int, int], dict[int, int]] = ({}, {})
        self._written: dict[str, ItemStats] = {}
        self._lost = False

    def write_all(self) -> None:
        """Let the next pass write every item, changed or not: the online store has lost them."""
        self._lost = True

    def run(self) -> None:
        """One pass; nothing to do where the log has not grown."""
        end = (self._events.end(), self._items.end())
        if self._lost:
            self._lost, self._written = False, {}
        elif end == self._end:
            return
        started = time.monotonic()
        events = self._interactions(until=end[0])
        items = self._items.read(until=end[1], columns=["item_id", "title", "categories", "text"])
        stats = statistics(events, items)
        changed = [row for row in stats.values() if row != self._written.get(row.item_id)]
        if changed:
            self._write(changed, events)
        self._written, self._seen, self._end = stats, events, end
        gone = self._events.compact() + self._items.compact()
        logger.info(
            "rolled up %d items (%d changed) of %d events in %.1f s; %d files compacted",
            *(len(stats), len(changed), len(events), time.monotonic() - started, gone),
        )

    def _interactions(self, *, until: dict[int, int]) -> pa.Table:
        """Every interaction in the log before `until`; only what is new is read."""
        news = self._events.read(
            since=self._end[0], until=until, columns=["item_id", "type", "timestamp"]
        )
        news = news.filter(pc.is_in(news["type"], value_set=pa.array(INTERACTIONS)))
        news = news.select(["item_id", "timestamp"])
        return news if self._seen is None else pa.concat_tables([self._seen, news]).combine_chunks()

    def _write(self, changed: list[ItemStats], events: pa.Table) -> None:
        counts = [
            Popularity(
                item_id=row.item_id,
                **{name: getattr(row, name) for name in COUNTS},
            )
            for row in changed
        ]
        self._features.write_popularity(counts)
        now_ms = time.time_ns() // 1_000_000
        newest = pc.max(events["timestamp"]).cast(pa.timestamp("ms", tz="UTC")).value
        table = offline.item_stats_table(
            changed, valid_from_ms=0 if newest is None else newest + 1, now_ms=now_ms
        )
        fs, root = filesystem(self._settings.offline)
        write_whole(fs, f"{root}/item_stats/rollup-{now_ms:015d}.parquet", table)
