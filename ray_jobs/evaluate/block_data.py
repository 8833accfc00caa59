"""A log in blocks, each with its own train, validation and test split, and who is ranked how there.

The rules are those of the CCD paper's code (Lee et al., KDD 2024): a user's list for a block leaves
out what is in the block's other two splits, and nothing else; Recall@20 is the mean over the users
who have something in the split. An item of theirs that stands in both splits can't be found.

Shapes: N events of all training splits, block after block; M pairs of a split; U users, V rows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from ray_jobs.evaluate.events import Events
from services.core.catalog import Catalog
from services.core.events import EventType
from services.core.metrics import MISS, Ranks, ranks_of

Ints = NDArray[np.int64]
Scores = Callable[[Ints], Tensor]  # of some users (M,) over the rows known by then: scores_MV

COLUMNS: Final = ("block", "split", "user_id", "item_id")
SPLITS: Final = ("train", "valid", "test")
K: Final = 20
USERS_AT_ONCE: Final = 512
EVENT_EVERY_MS: Final = 1_000  # the blocks have no timestamps


@dataclass(frozen=True, kw_only=True, eq=False)
class Pairs:
    """Who has what in a split of a block, once each."""

    user_M: Ints
    row_M: Ints

    def __len__(self) -> int:
        return len(self.user_M)


@dataclass(frozen=True, kw_only=True, eq=False)
class Blocks:
    """events: all training splits, in an order drawn by the seed within each block. ends: how many
    of them are known after each block. splits: by name, the pairs of each block."""

    events: Events
    ends: list[int]
    splits: dict[str, list[Pairs]]

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def n_users(self) -> int:
        return len(self.events.user_ids)

    def known_rows(self, block: int) -> int:
        """Catalog rows after a block."""
        return 1 + int(self.events.row_N[: self.ends[block]].max())


def load(path: str, *, seed: int) -> Blocks:
    """A Parquet file with `COLUMNS`; ValueError where it is another."""
    if not Path(path).exists():
        raise ValueError(f"--dataset {path}: no such file; a Parquet file of {', '.join(COLUMNS)}")
    table = pq.read_table(path)
    if missing := set(COLUMNS) - set(table.column_names):
        raise ValueError(f"{path} has no column {', '.join(sorted(missing))}")
    block_R = table["block"].to_numpy()
    split_R = np.asarray(table["split"].to_pylist())
    user_ids, user_R = np.unique(table["user_id"].to_numpy(), return_inverse=True)
    item_R = np.asarray([str(item) for item in table["item_id"].to_pylist()])
    rng = np.random.default_rng(seed)

    def pairs(block: int, split: str) -> Ints:
        places = np.flatnonzero((block_R == block) & (split_R == split))
        both = np.stack([user_R[places], np.unique(item_R[places], return_inverse=True)[1]])
        return rng.permutation(places[np.unique(both, axis=1, return_index=True)[1]])

    blocks = range(int(block_R.max()) + 1)
    places = {split: [pairs(block, split) for block in blocks] for split in SPLITS}
    trained = np.concatenate(places["train"])
    catalog = Catalog()
    catalog.add(item_R[trained])
    row_R = catalog.rows(item_R)
    n = len(trained)
    events = Events(
        user_N=user_R[trained],
        row_N=row_R[trained],
        type_N=np.full(n, EventType.CLICK.value),
        value_N=np.full(n, np.nan),
        time_ms_N=np.arange(n) * EVENT_EVERY_MS,
        real_N=np.ones(n, bool),
        user_ids=[str(user) for user in user_ids],
        item_ids=catalog.ids(range(len(catalog))),
        items=pa.table({name: [] for name in ("item_id", "title", "categories", "text")}),
    )
    splits = {
        split: [Pairs(user_M=user_R[at], row_M=row_R[at]) for at in places[split]]
        for split in SPLITS
    }
    return Blocks(
        events=events, ends=np.cumsum([len(at) for at in places["train"]]).tolist(), splits=splits
    )


@torch.no_grad()
def ranks(blocks: Blocks, task: int, scores: Scores, *, split: str = "test") -> Ranks:
    """Where each pair of a block's split stands in its user's list, in the split's order."""
    held = blocks.splits[split][task]
    others = [blocks.splits[name][task] for name in SPLITS if name != split]
    found = np.full(len(held), MISS)
    users, of_M = np.unique(held.user_M, return_inverse=True)
    for begin in range(0, len(users), USERS_AT_ONCE):
        asked = users[begin : begin + USERS_AT_ONCE]
        scores_UV = scores(asked)
        places = np.flatnonzero((of_M >= begin) & (of_M < begin + len(asked)))
        of, row = torch.from_numpy(of_M[places] - begin), torch.from_numpy(held.row_M[places])
        out_UV = torch.zeros(scores_UV.shape, dtype=torch.bool)
        for other in others:
            inside = np.isin(other.user_M, asked) & (other.row_M < out_UV.shape[1])
            at = np.searchsorted(asked, other.user_M[inside])
            out_UV[torch.from_numpy(at), torch.from_numpy(other.row_M[inside])] = True
        row = torch.where(row < out_UV.shape[1], row, 0)
        row = torch.where(out_UV[of, row], 0, row)
        found[places] = ranks_of(scores_UV[of], row, seen_NV=out_UV[of]).numpy()
    return found


def recalls(
    blocks: Blocks, task: int, rank_M: Ranks, *, split: str = "test"
) -> NDArray[np.float64]:
    """recall_U at 20; NaN for who has nothing in the split."""
    user_M = blocks.splits[split][task].user_M
    hits_U = np.bincount(user_M, rank_M <= K, minlength=blocks.n_users)
    count_U = np.bincount(user_M, minlength=blocks.n_users)
    with np.errstate(invalid="ignore"):
        return hits_U / count_U


def valid_recall(blocks: Blocks, task: int, scores: Scores) -> float:
    """What settings may be chosen by."""
    rank_M = ranks(blocks, task, scores, split="valid")
    return float(np.nanmean(recalls(blocks, task, rank_M, split="valid")))


def parts(n_blocks: int) -> Iterator[tuple[int, int]]:
    """(block just learned, task looked at), in the order of `part`."""
    return ((block, task) for block in range(n_blocks) for task in range(block + 1))


def averages(score_T: NDArray[np.float64], n_blocks: int) -> dict[str, NDArray[np.float64]]:
    """From the scores of all `parts` (..., T), for each block (..., B): `own` (its task, just
    learned), `ra` (mean of all tasks so far), `la` (mean of their scores when each was just
    learned), and the harmonic mean of both.

    >>> both = averages(np.array([0.4, 0.2, 0.2]), 2)
    >>> [round(float(both[name][1]), 3) for name in ("ra", "la", "h-mean")]
    [0.2, 0.3, 0.24]
    """
    block_T, task_T = np.array(list(parts(n_blocks))).T
    own_B = score_T[..., block_T == task_T]
    ra_B = np.stack([score_T[..., block_T == b].mean(-1) for b in range(n_blocks)], -1)
    la_B = own_B.cumsum(-1) / np.arange(1, n_blocks + 1)
    return {"own": own_B, "ra": ra_B, "la": la_B, "h-mean": 2 * ra_B * la_B / (ra_B + la_B)}
