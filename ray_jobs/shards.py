"""What a teacher's workers learn from: users' histories, in shards.

Shapes: E events of a shard (each user's contiguous, oldest first), V catalog rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from services.core.catalog import Catalog
from services.core.models.sequences import Features, Sequences

if TYPE_CHECKING:
    import ray

Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False, kw_only=True)
class Shard:
    """Some of the users. `fresh_E` marks the newest events, which are judged before they are
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
    """A log up to `offsets`, ready for training; its shards here, or where Ray holds them.
    `popularity` is that before the fresh events."""

    catalog: Catalog
    offsets: dict[int, int]
    shards: "Sequence[Shard | ray.ObjectRef[Shard]]"
    popularity: NDArray[np.float64]
    n_events: int
