"""The teacher: large, refreshed from time to time, labels what the student learns from.

Shapes: N positions, D width, V catalog rows, K candidates.
"""

import torch
from torch import Tensor

from services.core.models.recommender import Recommender


class Teacher(Recommender):
    """A recommender that is asked for labels."""

    @torch.no_grad()
    def soft_labels(
        self, hidden_ND: Tensor, *, top_k: int, seen_NV: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The K best candidates per position: rows_NK and their logits_NK, best first.

        `seen_NV` (bool) leaves items out that the user has had.
        """
        scores_NV = self.scores(hidden_ND)
        if seen_NV is not None:
            scores_NV = scores_NV.masked_fill(seen_NV, -torch.inf)
        logits_NK, rows_NK = scores_NV.topk(min(top_k, self.n_rows - 1), dim=-1)
        return rows_NK, logits_NK
