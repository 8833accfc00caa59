"""Score a micro-batch with a model that hasn't learned it yet: the prequential forecast.

Gradients are off by `no_grad`, not `inference_mode`: the lines packed here are learned later.
Without them a model reads few lines at a time: of a batch of 250 events a teacher on a CPU needed
three times the memory at once, and 15% longer, as activations did not stay in the cache.

Shapes: N targets, M of them at a time, D width, V catalog rows, U users.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ray_jobs.gate import TOP, Lists
from ray_jobs.microbatch import COLD, MicroBatch
from services.core.metrics import Ranks, ranks_of
from services.core.models.recommender import Recommender

SCORED_AT_ONCE = 512  # targets whose scores over the whole catalog are in memory together
READ_AT_ONCE = {"cpu": 2**17, "cuda": 2**24}  # numbers of a hidden state


def encode(model: Recommender, batch: MicroBatch, *, table_VD: Tensor) -> Tensor:
    """hidden_ND: the state that predicts each target; of a `COLD` one it means nothing."""
    lines = batch.lines.to(table_VD.device)
    inputs = (lines.rows_BL, lines.types_BL, lines.gaps_BL, lines.segments_BL)
    n_lines, length = lines.rows_BL.shape
    if not torch.is_grad_enabled():
        n_lines = max(READ_AT_ONCE[table_VD.device.type] // (length * table_VD.shape[1]), 1)
    pieces = zip(*(values_BL.split(n_lines) for values_BL in inputs), strict=True)
    hidden_BLD = torch.cat([model(*piece, table_VD=table_VD) for piece in pieces])
    hidden_ND: Tensor = hidden_BLD.flatten(0, 1)[lines.at_N.clamp_min(0)]
    return hidden_ND


@torch.no_grad()
def predict(
    model: Recommender, batch: MicroBatch, *, popularity: NDArray[np.float64], known_rows: int
) -> Ranks:
    """Ranks (N,) of the targets among the items that their users haven't had.

    `known_rows`: length of the catalog when the batch arrived; a target beyond it is a `MISS`. A
    user's very first event is ranked by what is trending, which is what serving would answer.
    """
    model.eval()
    table_VD = model.encoder.item_table()
    hidden_ND = encode(model, batch, table_VD=table_VD)
    ranks = [np.zeros(0, np.int64)]
    for part in parts(len(batch)):
        scores_MV = model.scores(hidden_ND[part], table_VD=table_VD)
        ranks.append(rank(scores_MV, batch, part, popularity=popularity, known_rows=known_rows))
    return np.concatenate(ranks)


@torch.no_grad()
def predict_popular(
    batch: MicroBatch, *, popularity: NDArray[np.float64], known_rows: int
) -> Ranks:
    """Ranks (N,) by what is trending: the baseline without a model."""
    trending_V = torch.from_numpy(popularity)
    ranks = [np.zeros(0, np.int64)]
    for part in parts(len(batch)):
        scores_MV = trending_V.repeat(len(batch.target_N[part]), 1)
        ranks.append(rank(scores_MV, batch, part, popularity=popularity, known_rows=known_rows))
    return np.concatenate(ranks)


def rank(
    scores_MV: Tensor,
    batch: MicroBatch,
    part: slice,
    *,
    popularity: NDArray[np.float64],
    known_rows: int,
) -> Ranks:
    """Ranks (M,) of the targets in `part` by their scores; see `predict`."""
    scores_MV = scores_MV[:, :known_rows]
    n_rows, device = scores_MV.shape[1], scores_MV.device
    cold = np.flatnonzero(batch.at_N[part] == COLD)
    if len(cold):
        trending_V = torch.from_numpy(popularity[:n_rows]).to(device, scores_MV.dtype)
        scores_MV[torch.from_numpy(cold).to(device)] = trending_V
    target_M = torch.from_numpy(batch.target_N[part]).to(device)
    target_M = torch.where(target_M < n_rows, target_M, 0)  # row 0: a miss
    ranks_M = ranks_of(scores_MV, target_M, seen_NV=batch.seen(n_rows, part).to(device))
    found: Ranks = ranks_M.cpu().numpy()
    return found


@torch.no_grad()
def top_lists(model: Recommender, batch: MicroBatch, *, n: int = TOP, users: int = 64) -> Lists:
    """(U, n) rows: what some of the batch's users would be answered, seen items included."""
    model.eval()
    warm = np.flatnonzero(batch.at_N != COLD)
    sequence = np.searchsorted(np.cumsum(batch.lengths), batch.at_N[warm], side="right")
    firsts = warm[np.unique(sequence, return_index=True)[1]][:users]
    table_VD = model.encoder.item_table()
    hidden_UD = encode(model, batch, table_VD=table_VD)[torch.from_numpy(firsts)]
    scores_UV = model.scores(hidden_UD, table_VD=table_VD)
    lists: Lists = scores_UV.topk(min(n, scores_UV.shape[1] - 1), dim=1)[1].int().numpy()
    return lists


def parts(n: int) -> Iterator[slice]:
    """0..n in slices small enough for scores over the whole catalog."""
    return (slice(at, min(at + SCORED_AT_ONCE, n)) for at in range(0, n, SCORED_AT_ONCE))
