"""One step of a teacher's training: its loss, its optimizers, how fast it learns when.

Shapes: B packed lines of L events, N targets, S sampled rows, R rows of a step, V catalog rows,
D width.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ray_jobs.muon import Muon
from ray_jobs.parallel import Optimizers, share_of_all
from ray_jobs.recipes import TrainConfig
from services.core import losses
from services.core.models.encoder import attention_mask
from services.core.models.teacher import Teacher


class NextItemLoss(nn.Module):
    """Cross-entropy of every next item in packed lines; what DDP wraps."""

    log_q_V: Tensor

    def __init__(
        self,
        model: Teacher,
        *,
        popularity: NDArray[np.float64],
        negatives: int,
        mask_seen: bool,
        bf16: bool = False,
    ) -> None:
        super().__init__()
        if negatives and not model.config.ordered:
            raise ValueError("sampled_negatives: only for a model that reads events in order")
        self.model = model
        self.bf16 = bf16
        self.negatives = negatives
        self.mask_seen = mask_seen
        q_V = torch.tensor(popularity).float().pow(0.75)
        q_V[1:] += 1e-3 * q_V.mean()  # every item may be drawn
        self.register_buffer("log_q_V", torch.log(q_V / q_V.sum()))

    def forward(
        self, rows_BL: Tensor, types_BL: Tensor, gaps_BL: Tensor, segments_BL: Tensor, y_BL: Tensor
    ) -> Tensor:
        if self.negatives:
            return self._sampled(rows_BL, types_BL, gaps_BL, segments_BL, y_BL)
        table_VD = self.model.encoder.item_table()
        hidden_BLD = self._hidden(rows_BL, types_BL, gaps_BL, segments_BL, table_VD)
        seen_NL = seen_before(rows_BL, segments_BL)[y_BL > 0] if self.mask_seen else None
        return losses.full_softmax(
            hidden_BLD[y_BL > 0], table_VD, self.model.bias_V, y_BL[y_BL > 0], seen_NL=seen_NL
        )

    def _sampled(
        self, rows_BL: Tensor, types_BL: Tensor, gaps_BL: Tensor, segments_BL: Tensor, y_BL: Tensor
    ) -> Tensor:
        """Without ever having the table: of a large one, each step needs but a few rows."""
        sampled_S = torch.multinomial(self.log_q_V.exp(), self.negatives, replacement=True)
        all_rows = torch.cat([rows_BL.flatten(), y_BL.flatten(), sampled_S])
        rows_R, at = torch.unique(all_rows, return_inverse=True)
        at_BL, at_y_BL = (part.view_as(y_BL) for part in at[: 2 * y_BL.numel()].chunk(2))
        table_RD = self.model.encoder.items(rows_R)
        hidden_BLD = self._hidden(at_BL, types_BL, gaps_BL, segments_BL, table_RD)
        return losses.sampled_softmax(
            hidden_BLD[y_BL > 0],
            table_RD,
            self.model.bias_V[rows_R],
            at_y_BL[y_BL > 0],
            at[2 * y_BL.numel() :],
            self.log_q_V[rows_R],
        )

    def _hidden(
        self,
        rows_BL: Tensor,
        types_BL: Tensor,
        gaps_BL: Tensor,
        segments_BL: Tensor,
        table_VD: Tensor,
    ) -> Tensor:
        with torch.autocast(rows_BL.device.type, torch.bfloat16, enabled=self.bf16):
            hidden_BLD = self.model(rows_BL, types_BL, gaps_BL, segments_BL, table_VD=table_VD)
        return hidden_BLD.float()


def seen_before(rows_BL: Tensor, segments_BL: Tensor) -> Tensor:
    """seen_BLL: the rows of a line that the user of each position has had by then; else 0."""
    earlier_BLL = attention_mask(rows_BL.shape[1], rows_BL.shape[1], segments_BL, rows_BL.device)
    return rows_BL[:, None, :] * earlier_BLL[:, 0]


def learn(
    wrapped: nn.Module, model: Teacher, optimizers: Optimizers, batch: list[Tensor], *, rate: float
) -> Tensor:
    """One step on this worker's lines, at `rate` of the peak; its share of the loss: the mean over
    workers is that over all targets."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss: Tensor = wrapped(*batch) * share_of_all((batch[-1] > 0).sum())
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        optimizer.step()
    return loss.detach()


def schedule(done: float, *, warm_up: float) -> float:
    """Share of the learning rate: linear up over `warm_up` of the run, then linear down to 0."""
    return min(1.0, (done + 1e-3) / warm_up) * (1 - done)


def optimizers_of(
    model: Teacher, *, learning_rate: float, train: TrainConfig
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest: no decay for biases and norms, a
    second moment that forgets in 50 steps, for short runs. `peak`: what the schedule scales."""
    blocks = [p for p in model.encoder.blocks.parameters() if p.ndim == 2]
    learned = [p for p in model.parameters() if p.requires_grad]
    others = [p for p in learned if not any(p is block for block in blocks)]
    decay = train.weight_decay
    groups: list[dict[str, Any]] = [
        {"params": [p for p in others if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), fused=True)
    ]
    if blocks:
        rate = learning_rate * train.muon_factor
        optimizers.append(Muon(blocks, lr=rate, weight_decay=decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers
