"""A log as arrays in the order of the stream, with noise where it is asked for.

Shapes: N events of the log, V catalog rows.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ray_jobs import datasets
from ray_jobs.stream import Received
from ray_jobs.teacher_data import Interactions
from services.core.catalog import Catalog
from services.core.events import INTERACTIONS, EventType

Ints = NDArray[np.int64]

COLUMNS: Final = ("user_N", "row_N", "type_N", "value_N", "time_ms_N", "real_N")
BOT_EVENTS_SHARE: Final = 0.02  # of the log, in one burst
BOT_AT: Final = 0.6  # of the log
BOT_ITEMS: Final = 20
BOT_EVERY_MS: Final = 100


@dataclass(frozen=True, kw_only=True)
class LogChoice:
    """Which log, in which order, how disturbed. Plain values: part of a row's key.

    `content`: of a log that is a file (`datasets.content_of`); empty for a named one.
    """

    dataset: str
    home: Path
    data: str
    ties: str
    noise: str
    seed: int
    content: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Events:
    """The interactions of a log.

    row_N: catalog rows, as `catalog` gives them. real_N: False where injected; only real events
    are judged. user_ids: by the numbers in user_N. items: the metadata there is.
    """

    user_N: Ints
    row_N: Ints
    type_N: NDArray[np.str_]
    value_N: NDArray[np.float64]
    time_ms_N: Ints
    real_N: NDArray[np.bool_]
    user_ids: list[str]
    item_ids: list[str]  # by row; row 0 is none
    items: pa.Table

    def __len__(self) -> int:
        return len(self.row_N)

    @property
    def half(self) -> int:
        """Where the second half of the real events begins: from there on is judged."""
        return int(np.flatnonzero(self.real_N)[self.real_N.sum() // 2])

    def until(self, last: int) -> "Events":
        """The first `last` of them."""
        return replace(self, **{name: getattr(self, name)[:last] for name in COLUMNS})

    def catalog(self, until: int) -> Catalog:
        """As known after the first `until` events, not observed: every larger one begins alike."""
        catalog = Catalog()
        catalog.describe(self.items)
        catalog.add(self.item_ids[row] for row in self.row_N[:until])
        return catalog

    def interactions(self, until: int) -> Interactions:
        """The first `until` events, as a teacher reads them."""
        users = np.unique(self.user_N[:until], return_inverse=True)[1]
        return Interactions(
            users=users,
            rows=self.row_N[:until],
            types=self.type_N[:until],
            times_ms=self.time_ms_N[:until],
            values=self.value_N[:until],
        )

    def received(self, first: int, last: int) -> Received:
        """As the distillation job reads them; an event's key is its place in the log."""
        at = slice(first, min(last, len(self)))
        return Received(
            user_ids=[self.user_ids[user] for user in self.user_N[at]],
            item_ids=[self.item_ids[row] for row in self.row_N[at]],
            types=self.type_N[at].tolist(),
            values=self.value_N[at],
            times_ms=self.time_ms_N[at],
            arrivals_ms=self.time_ms_N[at],
            partitions=[0] * (at.stop - at.start),
            keys=np.arange(at.start, at.stop),
            impressions=[],
        )


def load(choice: LogChoice) -> Events:
    """The log in time order; ties as the file has them, or shuffled by the seed."""
    log = datasets.load(choice.dataset, home=choice.home, data=choice.data)
    if choice.ties == "shuffled":
        log = datasets.shuffle_ties(log, choice.seed)
    columns = set(log.events.column_names)
    n = log.events.num_rows
    value_N = log.events["value"].to_numpy() if "value" in columns else np.full(n, np.nan)
    if "type" in columns:
        type_N = np.asarray(log.events["type"].to_pylist())
    else:
        type_N = np.where(np.isnan(value_N), EventType.CLICK.value, EventType.RATING.value)
    users, items = (
        log.events[name].combine_chunks().dictionary_encode() for name in ("user_id", "item_id")
    )
    kept_N = np.isin(type_N, INTERACTIONS)
    events = Events(
        user_N=users.indices.to_numpy().astype(np.int64)[kept_N],
        row_N=items.indices.to_numpy().astype(np.int64)[kept_N],
        type_N=type_N[kept_N],
        value_N=value_N[kept_N],
        time_ms_N=log.events["timestamp_ms"].to_numpy()[kept_N],
        real_N=np.ones(int(kept_N.sum()), bool),
        user_ids=users.dictionary.to_pylist(),
        item_ids=items.dictionary.to_pylist(),
        # Items of which nothing is known are met when they happen, as in production.
        items=log.items.filter(
            pc.or_(pc.is_valid(log.items["title"]), pc.is_valid(log.items["text"]))
        ),
    )
    return _numbered(disturbed(events, choice.noise, seed=choice.seed))


def _numbered(events: Events) -> Events:
    """With the rows that a catalog gives the items: the described ones first, then as they come."""
    catalog = Catalog()
    catalog.describe(events.items)
    row_N = catalog.add(events.item_ids[item] for item in events.row_N)
    return replace(events, row_N=row_N, item_ids=catalog.ids(range(len(catalog))))


def disturbed(events: Events, noise: str, *, seed: int) -> Events:
    """With events injected into the whole log.

    `random:SHARE`: that many more events, each right after a random one, by its user, of a random
    item and value. `duplicates:SHARE`: that many events happen twice in a row, under ids of their
    own (a repeated id is dropped by every reader). `bot`: one new user's burst over few items.
    """
    if not noise:
        return events
    kind, _, given = noise.partition(":")
    rng = np.random.default_rng([seed, 1])
    n = len(events)
    if kind in ("random", "duplicates"):
        share = _share(noise, given)
        after = np.sort(rng.integers(0, n, round(share * n)))
        changes: dict[str, Any] = {}
        if kind == "random":
            changes["row_N"] = rng.choice(np.unique(events.row_N), len(after))
            changes["value_N"] = events.value_N[rng.integers(0, n, len(after))]
    elif kind == "bot" and not given:
        after = np.full(round(BOT_EVENTS_SHARE * n), round(BOT_AT * n))
        few = rng.choice(np.unique(events.row_N[: after[0]]), BOT_ITEMS, replace=False)
        changes = {
            "user_N": np.full(len(after), len(events.user_ids)),
            "row_N": rng.choice(few, len(after)),
            "time_ms_N": events.time_ms_N[after] + BOT_EVERY_MS * np.arange(len(after)),
        }
        events = replace(events, user_ids=[*events.user_ids, "bot"])
    else:
        raise ValueError(f"--noise={noise!r}: random:SHARE, duplicates:SHARE or bot")
    return _injected(events, after, changes)


def _injected(events: Events, after: Ints, changes: dict[str, Any]) -> Events:
    """Copies of the events at `after`, with `changes`, each put right behind its original."""
    order = np.argsort(np.concatenate([np.arange(len(events)), after]), kind="stable")
    columns: dict[str, Any] = {}
    for name in COLUMNS:
        column = getattr(events, name)
        new = np.zeros(len(after), bool) if name == "real_N" else changes.get(name, column[after])
        columns[name] = np.concatenate([column, new])[order]
    return replace(events, **columns)


def _share(noise: str, given: str) -> float:
    try:
        share = float(given)
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise ValueError(f"--noise={noise!r}: give a share above 0 and at most 1, e.g. random:0.05")
    return share
