"""The teacher's labels: computed once per event, by actors with resources of their own.

Shapes: N targets, K candidates, T the teacher's width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ray_jobs.microbatch import MicroBatch
from ray_jobs.ranking import encode, parts, rank
from services.core.catalog import Catalog
from services.core.metrics import Ranks
from services.core.models.teacher import Teacher

Content = NDArray[np.int32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Labels:
    """What a teacher says of N targets: the best items that their users haven't had, at -inf
    where there are fewer. `ranks` are of the first targets: those to be scored."""

    rows_NK: NDArray[np.int32]
    logits_NK: NDArray[np.float16]
    hidden_NT: NDArray[np.float16]
    ranks: Ranks

    @classmethod
    def joined(cls, parts: "Sequence[Labels]") -> "Labels":
        """Of `MicroBatch.parts`, in order."""
        if len(parts) == 1:
            return parts[0]
        names = vars(parts[0])
        return cls(
            **{name: np.concatenate([getattr(one, name) for one in parts]) for name in names}
        )


@torch.no_grad()
def label(
    teacher: Teacher,
    batch: MicroBatch,
    *,
    top_k: int,
    n_ranked: int = 0,
    popularity: NDArray[np.float64] | None = None,
    known_rows: int = 0,
) -> Labels:
    """Candidates, logits and hidden states of every target, ranks of the first `n_ranked`."""
    teacher.eval()
    table_VD = teacher.encoder.item_table()
    hidden_NT = encode(teacher, batch, table_VD=table_VD)
    k = min(top_k, teacher.n_rows - 1)
    rows_NK = np.zeros((len(batch), k), np.int32)
    logits_NK = np.zeros((len(batch), k), np.float16)
    ranks = np.zeros(len(batch), np.int64)
    for part in parts(len(batch)):
        scores_MV = teacher.scores(hidden_NT[part], table_VD=table_VD)
        # What the user has had won't be ranked: it would only take the candidates' places.
        seen_MV = batch.seen(teacher.n_rows, part).to(scores_MV.device)
        logits_MK, rows_MK = scores_MV.masked_fill(seen_MV, -torch.inf).topk(k, dim=1)
        rows_NK[part], logits_NK[part] = rows_MK.int().cpu().numpy(), logits_MK.half().cpu().numpy()
        if part.start < n_ranked and popularity is not None:
            ranks[part] = rank(scores_MV, batch, part, popularity=popularity, known_rows=known_rows)
    return Labels(
        rows_NK=rows_NK,
        logits_NK=logits_NK,
        hidden_NT=hidden_NT.half().cpu().numpy(),
        ranks=ranks[:n_ranked],
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Items:
    """What a teacher makes of every row: its item table and its bias; of a set, its weight."""

    table_VT: NDArray[np.float32]
    bias_V: NDArray[np.float32]
    weight_V: NDArray[np.float32] | None = None


@torch.no_grad()
def items_of(teacher: Teacher) -> Items:
    weight_V = teacher.encoder.weight_V
    return Items(
        table_VT=teacher.encoder.item_table().cpu().numpy(),
        bias_V=teacher.bias_V.cpu().numpy(),
        weight_V=None if weight_V is None else weight_V.cpu().numpy(),
    )


def aligned(
    teacher: Teacher, own: Catalog, *, item_ids: Sequence[str], content: Content
) -> Teacher:
    """The same teacher on other rows: `item_ids` (without padding) are rows 1, 2, ...

    An item that the teacher has never met starts from its content, as one that is new to all.
    """
    rows = np.concatenate([[0], own.rows(item_ids)])
    known_V = torch.from_numpy(rows > 0)
    moved = Teacher(teacher.config, n_rows=len(rows))
    state = teacher.state_dict()
    for name in {"encoder.item_id.weight", "encoder.weight_V", "bias_V"} & state.keys():
        value = state[name][rows]
        state[name] = value * known_V.view(-1, *[1] * (value.dim() - 1))
    state["encoder.content_VC"] = moved.encoder.content_VC
    moved.load_state_dict(state)
    moved.describe(content)
    return moved.eval()
