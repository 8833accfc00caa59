"""What the teacher learns from: the offline log, split by user among the workers.

Not by Ray Data: a resumed or repeated run needs batch `step` to be the same again for any number of
workers, and a line the whole histories of its users, while `streaming_split` hands out blocks of
rows to whoever asks first. What it would give is that no single process reads the whole log
(deploy/capacity.md says how far that carries).

Shapes: E events of a shard (each user's contiguous, oldest first), B packed lines of L events.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.core.catalog import Catalog
from services.core.errors import RefluxError
from services.core.eventlog import EventLog
from services.core.events import ITEMS
from services.core.history import INTERACTIONS
from services.core.models.sequences import Features, Ints, Packed, Sequences, pack, sequences_of
from services.core.settings import Settings

Bools = NDArray[np.bool_]
Batch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # rows, types, gaps, segments, targets: BL


@dataclass(frozen=True, eq=False, kw_only=True)
class Shard:
    """One worker's users. `fresh_E` marks the newest events, which are judged before they are
    learned; `judged_E` those of them that the parent hasn't learned either."""

    sequences: Sequences
    fresh_E: Bools
    judged_E: Bools

    def past(self) -> Sequences:
        """The same users without their fresh events."""
        starts, old_E = self.sequences.starts, ~self.fresh_E
        kept = np.concatenate([[0], np.cumsum(old_E)])[starts]
        features = Features(*(column[old_E] for column in self.sequences.features))
        return Sequences(features, np.unique(kept))


@dataclass(frozen=True, eq=False, kw_only=True)
class History:
    """The log up to `offsets`, ready for training. `popularity` is that before the fresh events."""

    catalog: Catalog
    offsets: dict[int, int]
    shards: list[Shard]
    popularity: NDArray[np.float64]
    n_events: int


@dataclass(frozen=True, eq=False, kw_only=True)
class Interactions:
    """A log in time order, as arrays (E,). `users` are numbered from 0; `values` are NaN where
    there are none."""

    users: Ints
    rows: Ints
    types: NDArray[np.str_]
    times_ms: Ints
    values: NDArray[np.float64]


def read_history(
    settings: Settings,
    *,
    n_shards: int,
    last_slice: float,
    parent: Catalog | None,
    parent_offsets: Mapping[int, int],
) -> History:
    """Read the offline log up to its end now.

    Rows of the parent's catalog stay what they are. `RefluxError` where there is too little.
    """
    stored = EventLog(settings.offline)
    offsets = stored.end()
    names = ["user_id", "item_id", "type", "timestamp", "value", "partition", "offset"]
    events = stored.read(until=offsets, columns=names)
    events = events.filter(pc.is_in(events["type"], pa.array(INTERACTIONS)))
    least = settings.teacher_first_events
    if events.num_rows < least:
        raise RefluxError(
            f"the log at {settings.offline} holds {events.num_rows} interactions, a teacher needs "
            f"{least}; send more events, or set REFLUX_TEACHER_FIRST_EVENTS"
        )
    users = events["user_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    if users.max() + 1 < n_shards:
        raise RefluxError(f"{users.max() + 1} users can't be shared by {n_shards} workers")

    catalog = Catalog()
    if parent is not None:
        catalog.add(parent.ids(range(1, len(parent))))
    items = EventLog(settings.offline, topic=ITEMS)
    catalog.describe(items.read(columns=["item_id", "title", "categories", "text"]))

    learned_until = np.zeros(1 + max(offsets), np.int64)
    for partition, offset in parent_offsets.items():
        learned_until[partition] = offset
    unseen = events["offset"].to_numpy() >= learned_until[events["partition"].to_numpy()]
    log = Interactions(
        users=users,
        rows=catalog.add(events["item_id"].to_pylist()),
        types=np.asarray(events["type"].to_pylist()),
        times_ms=events["timestamp"].cast(pa.timestamp("ms", tz="UTC")).cast(pa.int64()).to_numpy(),
        values=events["value"].to_numpy(),
    )
    return history_of(
        log,
        catalog=catalog,
        n_shards=n_shards,
        last_slice=last_slice,
        unseen_E=unseen,
        offsets=offsets,
    )


def history_of(
    log: Interactions,
    *,
    catalog: Catalog,
    n_shards: int,
    last_slice: float,
    unseen_E: Bools | None = None,
    offsets: Mapping[int, int] = MappingProxyType({}),
) -> History:
    """A log in time order, split by user; `catalog` is one that hasn't observed it yet, and does.

    The newest `last_slice` of the events is judged before it is learned, as far as `unseen_E`
    (default: all) says that the parent hasn't learned it.
    """
    users, rows = log.users, log.rows
    fresh = np.arange(len(rows)) >= int(len(rows) * (1 - last_slice))
    unseen = np.ones(len(rows), bool) if unseen_E is None else unseen_E
    catalog.observe(rows[~fresh])
    popularity = catalog.popularity.copy()
    catalog.observe(rows[fresh])
    shards = []
    for shard in range(n_shards):
        mine = np.flatnonzero(users % n_shards == shard)
        mine = mine[np.argsort(users[mine], kind="stable")]
        sequences = sequences_of(
            users[mine], rows[mine], log.types[mine].tolist(), log.times_ms[mine], log.values[mine]
        )
        judged = fresh[mine] & unseen[mine]
        shards.append(Shard(sequences=sequences, fresh_E=fresh[mine], judged_E=judged))
    return History(
        catalog=catalog,
        offsets=dict(offsets),
        shards=shards,
        popularity=popularity,
        n_events=len(rows),
    )


class Lines:
    """Endless batches of packed lines: every epoch lays the users end to end in a new order, and
    where a user's events have none (`ordered` false), those, too: each becomes the target of
    others than before.

    Batch `step` is always the same one, whichever process asks: that is what resuming needs.
    """

    def __init__(
        self,
        sequences: Sequences,
        *,
        line_events: int,
        batch_lines: int,
        seed: list[int],
        ordered: bool = True,
    ) -> None:
        self._sequences = sequences
        self._ordered = ordered
        self._length = line_events
        self._batch_lines = batch_lines
        self._seed = seed
        n_lines = -(-len(sequences.features.rows) // line_events)
        self._steps_per_epoch = max(1, -(-n_lines // batch_lines))
        self._epoch = -1
        self._packed: Packed
        self._order: NDArray[np.int64]

    def batch(self, step: int) -> Batch:
        epoch, at = divmod(step, self._steps_per_epoch)
        if epoch != self._epoch:
            random = np.random.default_rng([*self._seed, epoch])
            users = random.permutation(len(self._sequences.starts) - 1)
            sequences = self._sequences if self._ordered else self._sequences.shuffled(random)
            self._packed = pack(sequences, length=self._length, order=users)
            self._order = random.permutation(len(self._packed.targets))
            self._epoch = epoch
        chosen = self._order[at * self._batch_lines : (at + 1) * self._batch_lines]
        packed = self._packed
        columns = (*packed.features, packed.segments, packed.targets)
        rows, types, gaps, segments, targets = (torch.from_numpy(c[chosen]) for c in columns)
        return rows, types, gaps, segments, targets
