"""The offline log as a teacher's shards, read by many: no process holds more than its part.

Readers take a portion of the log each, keep numbers alone (30 bytes an event) and split them by
user; the driver learns from what they tell which items there are and which events are the newest;
builders put the shards together. All are Ray tasks, so that a shard lost with its node is made
again. What comes out depends neither on how the log was cut nor on who read what.

Not by Ray Data, whose shuffle by key over the same readers and builders was measured (26 November
2026, Ray 2.60, 4 logical CPUs on one core, four portions): a million events took it 28 s and 23 CPU
seconds, tasks 11 s and 9; 100,000 in one portion 14 s and 12, tasks 2 s and 2. The largest process
had 328 MB, 282 MB with tasks; one that read all of it in place 826 MB (and 5 s).

Shapes: E events, K items of a portion, T points in time, V catalog rows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from numpy.typing import NDArray

from ray_jobs.shards import History, Shard
from services.core.catalog import TRENDING_HALF_LIFE_EVENTS, Catalog
from services.core.errors import RefluxError
from services.core.eventlog import PORTION_RECORDS, EventLog, Portion
from services.core.events import INTERACTIONS, ITEMS
from services.core.history import event_key, milliseconds
from services.core.models.sequences import Ints, Sequences, grouped, type_codes
from services.core.settings import Settings

APPEARED: Final = ("item_id", "timestamp", "partition", "offset")  # an item, and when
MOST_POINTS: Final = 10_000  # in time, by which a reader tells when its events were
COLUMNS: Final = (*APPEARED, "user_id", "type", "value", "event_id")
EVENT: Final = np.dtype(
    [
        ("user", "<u8"),  # a hash
        ("item", "<i4"),  # which one of its portion
        ("type", "i1"),
        ("unseen", "?"),  # by the parent
        ("time_ms", "<i8"),
        ("key", "<i8"),  # of the event_id
    ]
)
EventRows = NDArray[np.void]


class Runs(Protocol):
    """Runs functions somewhere. What stands for a value (`keep`) and for each of the `n` that a
    function returns (`start`) may be given to later functions, or fetched (`get`)."""

    def keep(self, value: Any) -> Any: ...
    def start(self, function: Callable[..., Any], *arguments: Any, n: int) -> list[Any]: ...
    def get(self, values: Sequence[Any]) -> list[Any]: ...


class OnRay:
    """As tasks on the Ray that this job was submitted to."""

    def keep(self, value: Any) -> Any:
        return ray.put(value)

    def start(self, function: Callable[..., Any], *arguments: Any, n: int) -> list[Any]:
        return list(ray.remote(function).options(num_returns=n, num_cpus=1).remote(*arguments))

    def get(self, values: Sequence[Any]) -> list[Any]:
        return list(ray.get(list(values))) if values else []


@dataclass(frozen=True, eq=False, kw_only=True)
class Told:
    """What a reader tells of its portion; its size goes with items, not with events.

    items: (K) item_id and when it first appeared: timestamp, partition, offset.
    times_ms: of at most `MOST_POINTS` of the events, evenly spread over them.
    """

    n_events: int
    items: pa.Table
    times_ms: Ints


@dataclass(frozen=True, eq=False, kw_only=True)
class Counted:
    """What a shard adds up to: users, events, and the popularity that they give each row (V), in
    all and before the fresh events."""

    users: int
    events: int
    popularity_V: NDArray[np.float64]
    popularity_before_V: NDArray[np.float64]


@dataclass(frozen=True, eq=False, kw_only=True)
class Plan:
    """What holds for all shards. `rows`: of each portion's items (K); `times_ms` (T) and how many
    events there are until each of them."""

    n_rows: int
    rows: list[NDArray[np.int32]]
    n_events: int
    n_old: int
    times_ms: Ints
    until_T: NDArray[np.float64]

    @property
    def fresh_from_ms(self) -> float:
        """When the newest events begin; what shares its moment with the first of them is one."""
        if self.n_old == self.n_events:
            return float("inf")
        return float(self.times_ms[np.searchsorted(self.until_T, self.n_old, side="right")])

    def ages(self, times_ms: Ints) -> NDArray[np.float64]:
        """How many events came after each of those (E), about."""
        return self.n_events - np.interp(times_ms, self.times_ms, self.until_T)


def read_history(
    settings: Settings,
    runs: Runs,
    *,
    n_shards: int,
    last_slice: float,
    parent: Catalog | None,
    parent_offsets: Mapping[int, int],
    portion_records: int = PORTION_RECORDS,
) -> History:
    """Read the offline log up to its end now; its newest `last_slice` is judged before it is
    learned, as far as the parent hasn't learned it.

    Rows of the parent's catalog stay what they are. `RefluxError` where there is too little.
    """
    stored = EventLog(settings.offline)
    offsets = stored.end()
    portions = stored.portions(until=offsets, records=portion_records)
    given = (settings.offline, dict(parent_offsets), n_shards)
    reading = [runs.start(read, portion, *given, n=1 + n_shards) for portion in portions]
    told: list[Told] = runs.get([values[0] for values in reading])
    n_events, least = sum(one.n_events for one in told), settings.teacher_first_events
    if n_events < least:
        raise RefluxError(
            f"the log at {settings.offline} holds {n_events} interactions, a teacher needs "
            f"{least}; send more events, or set REFLUX_TEACHER_FIRST_EVENTS"
        )
    catalog = Catalog()
    if parent is not None:
        catalog.add(parent.ids(range(1, len(parent))))
    items = EventLog(settings.offline, topic=ITEMS)
    catalog.describe(items.read(columns=["item_id", "title", "categories", "text"]))
    plan = runs.keep(planned(told, catalog, last_slice=last_slice))
    building = [
        runs.start(build, plan, *(values[1 + number] for values in reading), n=2)
        for number in range(n_shards)
    ]
    built: list[Counted] = runs.get([counted for counted, _ in building])
    if not all(one.users for one in built):
        n_users = sum(one.users for one in built)
        raise RefluxError(f"{n_users} users are too few to be shared by {n_shards} workers")
    catalog.trend(np.sum([one.popularity_V for one in built], axis=0))
    return History(
        catalog=catalog,
        offsets=offsets,
        shards=[shard for _, shard in building],
        popularity=np.sum([one.popularity_before_V for one in built], axis=0),
        n_events=sum(one.events for one in built),
    )


def read(
    portion: Portion, offline: str, learned_until: Mapping[int, int], n_shards: int
) -> tuple[Any, ...]:
    """What is told of a portion, and its events for each shard, in the order of time."""
    table = EventLog(offline).read_portion(portion, columns=COLUMNS)
    wanted = pc.is_in(table["type"], pa.array(INTERACTIONS))
    table = table.filter(wanted).combine_chunks()
    users, items = (
        table[name].combine_chunks().dictionary_encode() for name in ("user_id", "item_id")
    )
    # Of a user's id as of an event's: 64 bits, of which any share will do.
    hashes = np.array([event_key(user_id) for user_id in users.dictionary.to_pylist()], np.int64)
    partitions, offsets = (table[name].to_numpy() for name in ("partition", "offset"))
    learned = np.array([learned_until.get(p, 0) for p in range(1 + partitions.max(initial=0))])
    events = np.zeros(len(table), EVENT)
    events["user"] = hashes.view(np.uint64)[users.indices.to_numpy()]
    events["item"] = items.indices.to_numpy()
    events["type"] = type_codes(table["type"].to_pylist(), table["value"].to_numpy())
    events["unseen"] = offsets >= learned[partitions]
    events["time_ms"] = milliseconds(table["timestamp"])
    events["key"] = [event_key(event_id) for event_id in table["event_id"].to_pylist()]
    first = np.unique(events["item"], return_index=True)[1]  # in the order of their numbers
    at = np.linspace(0, len(table) - 1, min(len(table), MOST_POINTS)).round().astype(np.int64)
    told = Told(
        n_events=len(table),
        items=table.select(list(APPEARED)).take(first),
        times_ms=events["time_ms"][at].copy(),
    )
    shards = events["user"] % np.uint64(n_shards)
    return told, *(events[shards == number] for number in range(n_shards))


def planned(told: Sequence[Told], catalog: Catalog, *, last_slice: float) -> Plan:
    """Give the items that are new to it rows in `catalog`, in the order in which they appeared."""
    order = [("timestamp", "ascending"), ("partition", "ascending"), ("offset", "ascending")]
    catalog.add(pa.concat_tables(one.items for one in told).sort_by(order)["item_id"].to_pylist())
    times_ms = np.concatenate([one.times_ms for one in told])
    weights = np.concatenate(
        [np.full(len(one.times_ms), one.n_events / max(1, len(one.times_ms))) for one in told]
    )
    by_time = np.argsort(times_ms, kind="stable")
    n_events = sum(one.n_events for one in told)
    return Plan(
        n_rows=len(catalog),
        rows=[catalog.rows(one.items["item_id"].to_pylist()).astype(np.int32) for one in told],
        n_events=n_events,
        n_old=int(n_events * (1 - last_slice)),
        times_ms=times_ms[by_time],
        until_T=np.cumsum(weights[by_time]),
    )


def build(plan: Plan, *parts: EventRows) -> tuple[Counted, Shard]:
    """A shard of what the readers of all portions, in their order, have for it."""
    rows = np.concatenate(
        [row_K[part["item"]] for row_K, part in zip(plan.rows, parts, strict=True)]
    )
    events = np.concatenate(parts)
    _, first = np.unique(events["key"], return_index=True)  # a producer's retry counts once
    order = first[np.lexsort((first, events["time_ms"][first], events["user"][first]))]
    events, rows = events[order], rows[order].astype(np.int64)
    fresh_E = events["time_ms"] >= plan.fresh_from_ms
    ages_E = plan.ages(events["time_ms"])
    n_fresh = plan.n_events - plan.n_old

    def popularity(of_E: NDArray[np.bool_], ages_E: NDArray[np.float64]) -> NDArray[np.float64]:
        weights = 0.5 ** (np.maximum(ages_E[of_E], 0) / TRENDING_HALF_LIFE_EVENTS)
        return np.bincount(rows[of_E], weights, minlength=plan.n_rows).astype(np.float64)

    sequences = grouped(
        events["user"], rows, events["type"].astype(np.int64), events["time_ms"].astype(np.int64)
    )
    counted = Counted(
        users=len(sequences.starts) - 1,
        events=len(events),
        popularity_V=popularity(np.ones(len(events), bool), ages_E),
        popularity_before_V=popularity(~fresh_E, ages_E - n_fresh),
    )
    compact = Sequences(sequences.features.compact(), sequences.starts)
    shard = Shard(sequences=compact, fresh_E=fresh_E, judged_E=fresh_E & events["unseen"])
    return counted, shard
