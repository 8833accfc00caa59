"""Item popularity over windows of event time, and the log's compaction; by one worker.

Windows end at the log's newest event, not at the clock: a replayed log has its own present.
"""

import logging
import time
from collections.abc import Mapping
from typing import Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from services.core.eventlog import ITEMS_RECORDS, EventLog
from services.core.events import EVENTS, INTERACTIONS, ITEMS
from services.core.features import FeatureStore
from services.core.history import ItemStats, Popularity
from services.core.settings import Settings
from services.core.spans import Span, SpanFiles
from services.ingest import offline

DAY_H: Final = 24
WINDOWS_H: Final = {
    "popularity_1d": DAY_H,
    "popularity_7d": 7 * DAY_H,
    "popularity_30d": 30 * DAY_H,
}
WINDOWS: Final = (*WINDOWS_H, "n_events")
COUNTS: Final = pa.schema([("item_id", pa.string()), ("hour", pa.int32()), ("n", pa.int64())])
HOUR_US: Final = 3600 * 1_000_000
METADATA: Final = ["item_id", "title", "categories", "text", "timestamp"]
ROWS_AT_ONCE: Final = 1_000  # as Python's objects

logger = logging.getLogger(__name__)


class Metadata(NamedTuple):
    """What an item's sender has said of it."""

    title: str | None = None
    categories: tuple[str, ...] = ()
    text: str | None = None
    timestamp_us: int = 0


def counted(counts: pa.Table, events: pa.Table) -> pa.Table:
    """`counts` (rows of COUNTS) and `events` (item_id, timestamp): interactions per item and hour
    of event time, hours before every window as one.

    As large as the interactions of 30 days and the catalog at most, however long the log is.
    """
    hours = pc.divide(events["timestamp"].cast(pa.int64()), HOUR_US).cast(pa.int32())
    news = pa.table([events["item_id"], hours, np.ones(len(events), np.int64)], schema=COUNTS)
    rows = pa.concat_tables([counts, news])
    if len(rows) == 0:
        return rows
    past = pa.scalar(pc.max(rows["hour"]).as_py() - max(WINDOWS_H.values()), pa.int32())
    rows = rows.set_column(1, "hour", pc.max_element_wise(rows["hour"], past))
    summed = rows.group_by(["item_id", "hour"]).aggregate([("n", "sum")])
    return summed.rename_columns({"n_sum": "n"}).select(COUNTS.names)


def popularity(counts: pa.Table) -> list[Popularity]:
    """Interactions per item; a window of d days is the newest event's hour and the 24 d - 1
    hours before it.

    counts: rows of COUNTS.
    """
    if len(counts) == 0:
        return []
    items = counts["item_id"].combine_chunks().dictionary_encode()
    codes, n = items.indices.to_numpy(), counts["n"].to_numpy()
    age_h = -counts["hour"].to_numpy()
    age_h -= age_h.min()

    def within(hours: float) -> list[int]:
        inside = age_h < hours
        summed = np.bincount(codes[inside], n[inside], minlength=len(items.dictionary))
        return summed.astype(np.int64).tolist()

    windows = {name: within(hours) for name, hours in (WINDOWS_H | {"n_events": np.inf}).items()}
    return [
        Popularity(item_id=item_id, **{name: sums[i] for name, sums in windows.items()})
        for i, item_id in enumerate(items.dictionary.to_pylist())
    ]


def statistics(counts: pa.Table, metadata: Mapping[str, Metadata]) -> dict[str, ItemStats]:
    """All that is known of each item."""
    known = {row.item_id: row for row in popularity(counts)}
    found = {}
    for item_id in known.keys() | metadata.keys():
        given = metadata.get(item_id, Metadata())
        count = known.get(item_id)
        found[item_id] = ItemStats(
            item_id=item_id,
            title=given.title,
            categories=given.categories,
            text=given.text,
            **({} if count is None else {name: getattr(count, name) for name in WINDOWS}),
        )
    return found


class RollUp:
    """Writes what changed since the last time, online and offline."""

    def __init__(self, settings: Settings, features: FeatureStore) -> None:
        self._features = features
        self._events = EventLog(settings.offline, EVENTS)
        self._items = EventLog(settings.offline, ITEMS)
        self._rows = SpanFiles(  # numbered as if they were one partition's offsets
            settings.offline,
            "item_stats",
            prefix="rollup",
            schema=offline.ITEM_STATS,
            merged_offsets=ITEMS_RECORDS,
        )
        # Of the log so far: reading the whole of it again at every pass took 2 s of every 30 at
        # half a million events, and features waited for it.
        self._counts = COUNTS.empty_table()
        self._newest_ms: int | None = None  # when the newest interaction happened
        self._counted: dict[int, int] = {}
        self._metadata: dict[str, Metadata] = {}  # the latest by (timestamp, offset)
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
        self._count(until=end[0])
        self._learn(since=self._end[1], until=end[1])
        stats = statistics(self._counts, self._metadata)
        changed = [row for row in stats.values() if row != self._written.get(row.item_id)]
        if changed:
            self._write(changed)
        self._written, self._end = stats, end
        logger.info(
            "rolled up %d items (%d changed) of %d events in %.1f s",
            *(len(stats), len(changed), pc.sum(self._counts["n"]).as_py() or 0),
            time.monotonic() - started,
        )

    def compact(self) -> None:
        """Merge small files of the log and of what it wrote itself."""
        gone = self._events.compact() + self._items.compact() + self._rows.compact()
        if gone:
            logger.info("%d files compacted", gone)

    def _count(self, *, until: dict[int, int]) -> None:
        """Count what the log holds before `until`; only what is new is read."""
        counts, newest_ms = self._counts, self._newest_ms
        for part in self._events.portions(since=self._counted, until=until):
            news = self._events.read_portion(part, columns=["item_id", "type", "timestamp"])
            news = news.filter(pc.is_in(news["type"], value_set=pa.array(INTERACTIONS)))
            if len(news):
                counts = counted(counts, news)
                last_ms = pc.max(news["timestamp"]).cast(pa.timestamp("ms", tz="UTC")).value
                newest_ms = max(last_ms, newest_ms or last_ms)
        self._counts, self._newest_ms, self._counted = counts, newest_ms, until

    def _learn(self, *, since: dict[int, int], until: dict[int, int]) -> None:
        """Take in metadata; the same again changes nothing."""
        for part in self._items.portions(since=since, until=until, records=ITEMS_RECORDS):
            news = self._items.read_portion(part, columns=METADATA)
            news = news.append_column("timestamp_us", news["timestamp"].cast(pa.int64()))
            for batch in news.drop_columns("timestamp").to_batches(max_chunksize=ROWS_AT_ONCE):
                for row in batch.to_pylist():
                    item_id = row.pop("item_id")
                    known = self._metadata.get(item_id)
                    if known is None or known.timestamp_us <= row["timestamp_us"]:
                        row["categories"] = tuple(row["categories"] or ())
                        self._metadata[item_id] = Metadata(**row)

    def _write(self, changed: list[ItemStats]) -> None:
        self._features.write_popularity(
            Popularity(item_id=row.item_id, **{name: getattr(row, name) for name in WINDOWS})
            for row in changed
        )
        now_ms = time.time_ns() // 1_000_000
        table = offline.item_stats_table(
            changed,
            valid_from_ms=0 if self._newest_ms is None else self._newest_ms + 1,
            now_ms=now_ms,
        )
        written = max((span.last + 1 for span in self._rows.spans()), default=0)
        self._rows.write(table, Span(partition=0, first=written, last=written + len(table) - 1))
