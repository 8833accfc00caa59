"""What the teacher learns from: a log in memory as shards (one in files: `teacher_log`), and
shards as batches.

Shapes: E events of a shard (each user's contiguous, oldest first), B packed lines of L events.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ray_jobs.shards import Bools, History, Shard
from services.core.catalog import Catalog
from services.core.models.sequences import Ints, Layout, Sequences, sequences_of

Batch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # rows, types, gaps, segments, targets: BL


@dataclass(frozen=True, eq=False, kw_only=True)
class Interactions:
    """A log in time order, as arrays (E,). `users` are numbered from 0; `values` are NaN where
    there are none."""

    users: Ints
    rows: Ints
    types: NDArray[np.str_]
    times_ms: Ints
    values: NDArray[np.float64]


def history_of(
    log: Interactions,
    *,
    catalog: Catalog,
    n_shards: int,
    last_slice: float,
    unseen_E: Bools | None = None,
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
        offsets={},
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
        self._layout: Layout
        self._order: NDArray[np.int64]

    def batch(self, step: int) -> Batch:
        epoch, at = divmod(step, self._steps_per_epoch)
        if epoch != self._epoch:
            random = np.random.default_rng([*self._seed, epoch])
            users = random.permutation(len(self._sequences.starts) - 1)
            sequences = self._sequences if self._ordered else self._sequences.shuffled(random)
            self._layout = Layout(sequences, length=self._length, order=users)
            self._order = random.permutation(self._layout.n_lines)
            self._epoch = epoch
        chosen = self._order[at * self._batch_lines : (at + 1) * self._batch_lines]
        packed = self._layout.lines(chosen)
        columns = (*packed.features, packed.segments, packed.targets)
        rows, types, gaps, segments, targets = map(torch.from_numpy, columns)
        return rows, types, gaps, segments, targets
