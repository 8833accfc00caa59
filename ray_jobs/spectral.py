"""Where items begin: as what they are interacted with together places them.

Two views of the user x item table, side by side in the item table: the factors of an implicit
factorisation (Hu et al. 2008), turned so that a user's items, added up, give what the
factorisation would give that user; and, fainter, the leading directions of the smoothed graph,
which also tell rare items apart (Shen et al. 2021, "How powerful is graph convolution for
recommendation?"). They cost seconds; gradient steps start from there.

CCD's first Yelp block, validation, Recall@20 of a set encoder without a gradient step: factors
alone .128 (dim 128), both .130 (dim 640), the graph alone .110 (dim 64).

Shapes: E events, U users, V catalog rows, D width, F factors, K directions.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from services.core.models.recommender import Recommender
from services.core.models.sequences import Sequences

FACTORS: Final = 128
REGULARISATION: Final = 150.0
ALPHA: Final = 40.0  # what an interaction weighs over its absence
DIRECTIONS_SHARE: Final = 0.3  # of the factors' spread
SCALE: Final = 0.25  # of a random table's spread: logits that a softmax can be learned from
BIAS_SHARE: Final = 0.1  # of the log of an item's users
WEIGHT_SHARE: Final = -0.6  # the same, of what it counts for in a set
SPARE_VECTORS: Final = 32  # computed beyond those wanted, for accuracy (Halko et al. 2011)
POWER_STEPS: Final = 4


@torch.no_grad()
def start_items(model: Recommender, shards: Sequence[Sequences]) -> None:
    """Give a model its item table, its bias and its weights from all users' events."""
    n_events = np.concatenate([np.diff(shard.starts) for shard in shards])
    user_E = np.repeat(np.arange(len(n_events)), n_events)
    row_E = np.concatenate([shard.features.rows for shard in shards])
    had_UV = scipy.sparse.csr_matrix(
        (np.ones(len(row_E), np.float32), (user_E, row_E)), shape=(len(n_events), model.n_rows)
    )
    had_UV.data[:] = 1.0

    dim = model.config.dim
    parts = [_factors(had_UV, min(dim, FACTORS))]
    if dim > FACTORS:
        vector_VK = _directions(had_UV, dim - FACTORS)
        parts.append(
            vector_VK * (DIRECTIONS_SHARE * parts[0].std() / vector_VK.std().clamp_min(1e-9))
        )
    table_VD = torch.cat(parts, dim=1)
    embedding = model.encoder.item_id.weight
    embedding.zero_()
    embedding[:, : table_VD.shape[1]] = table_VD * (
        SCALE * dim**-0.5 / table_VD.std().clamp_min(1e-9)
    )
    embedding[0] = 0.0
    log_count_V = torch.from_numpy(np.log(np.maximum(had_UV.sum(0).A1, 1)))
    model.bias_V.copy_(BIAS_SHARE * log_count_V)
    if model.encoder.weight_V is not None:
        # Sums of the order of 1, so that the encoder's norm finds more than its epsilon.
        model.encoder.weight_V.copy_(WEIGHT_SHARE * log_count_V - np.log(SCALE * dim**-0.5))


def _factors(had_UV: scipy.sparse.csr_matrix, n: int) -> Tensor:
    """table_VF: for a set's sum x of one-hot rows, x @ table @ table.T is what the items' factors Y
    give a user with that set, x Y (Y'Y + regularisation)^-1 Y', but for a scale."""
    from implicit.cpu.als import AlternatingLeastSquares  # .5 s that no other recipe needs

    model = AlternatingLeastSquares(
        factors=n, regularization=REGULARISATION, alpha=ALPHA, num_threads=1, random_state=0
    )
    model.fit(had_UV, show_progress=False)
    item_VF = torch.from_numpy(model.item_factors).double()
    gram_FF = item_VF.T @ item_VF + REGULARISATION * torch.eye(n, dtype=torch.float64)
    value_F, vector_FF = torch.linalg.eigh(gram_FF)
    return (item_VF @ (vector_FF * value_F.rsqrt())).float()


def _directions(had_UV: scipy.sparse.csr_matrix, n: int) -> Tensor:
    """table_VK: the right singular vectors of the table whose cells are divided by the roots of
    their user's and their item's events, each times its singular value."""
    cells = had_UV.tocoo()
    count_U, count_V = had_UV.sum(1).A1, had_UV.sum(0).A1
    table_UV = torch.sparse_coo_tensor(
        torch.from_numpy(np.stack([cells.row, cells.col]).astype(np.int64)),
        torch.from_numpy((count_U[cells.row] * count_V[cells.col]) ** -0.5).float(),
        had_UV.shape,
        check_invariants=True,
    )
    wanted = min(n + SPARE_VECTORS, *had_UV.shape)
    _, value_K, vector_VK = torch.svd_lowrank(table_UV, q=wanted, niter=POWER_STEPS)
    return (vector_VK * value_K)[:, :n]
