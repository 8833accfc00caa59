"""A student's forward pass for one user on one core: the same numbers, a third of the time.

Only the last event's hidden state is wanted, so each block computes what the blocks above it look
at and no more; masks, rotations and the item table are computed once.

Shapes: L events, T the most events looked at, Q events a block computes, D width, H heads, K head
width, V catalog rows.
"""

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from services.core.models.encoder import Block, Encoder, attention_mask, rotary


class ServingStudent:
    """A frozen student: what answers need and nothing else, on weights of its own."""

    def __init__(self, encoder: Encoder, bias_V: Tensor) -> None:
        config = encoder.config
        self.n_rows = encoder.n_rows
        self.max_events = 2 * config.max_len if config.ordered else config.max_len
        with torch.no_grad():
            self._table_VD = encoder.item_table().clone()
            self._bias_V = bias_V.clone()
            weight_V = encoder.weight_V
            self._weight_V1 = weight_V.exp()[:, None] if weight_V is not None else None
            self._type = encoder.event_type.weight.clone()
            self._gap = encoder.gap.weight.clone()
            self._norm = _Norm.of(encoder.norm)
            recent = encoder.recent
            self._recent_KD = recent.weight_KD.clone() if recent else torch.zeros(0, config.dim)
            cos, sin = rotary(self.max_events, config.dim // config.n_heads, bias_V.device)
            self._cos_T1K = torch.cat((cos, cos), dim=-1)[:, None]
            self._sin_T1K = torch.cat((-sin, sin), dim=-1)[:, None]
            blocks_above = reversed(range(config.n_layers))
            self._blocks = [
                _ServingBlock.of(
                    cast(Block, block), config.max_len, 1 + above * (config.max_len - 1)
                )
                for block, above in zip(encoder.blocks, blocks_above, strict=True)
            ]

    @torch.inference_mode()
    def score_next(self, rows_1L: Tensor, types_1L: Tensor, gaps_1L: Tensor) -> Tensor:
        """scores_V, logits of one user's next item, from the last `max_events` events.

        L >= 1, no padding; row 0 (padding) scores -inf.
        """
        at = slice(-self.max_events, None)
        x_LD = self._table_VD[rows_1L[0, at]]
        if self._weight_V1 is None:
            x_LD += self._type[types_1L[0, at]]
            x_LD += self._gap[gaps_1L[0, at]]
            x_LD = self._blend(x_LD)
        else:
            x_LD *= self._weight_V1[rows_1L[0, at]]
            x_LD = x_LD.sum(0, keepdim=True) * len(x_LD) ** -0.5
        for block in self._blocks:
            x_LD = block(x_LD, self._cos_T1K, self._sin_T1K)
        scores_V = torch.addmv(self._bias_V, self._table_VD, self._norm(x_LD[-1]))
        scores_V[0] = -torch.inf
        return scores_V

    def _blend(self, x_LD: Tensor) -> Tensor:
        """`Recent` for one user."""
        y_LD = x_LD.clone()
        for back, weight_D in enumerate(self._recent_KD[: len(x_LD) - 1], start=1):
            y_LD[back:].addcmul_(x_LD[:-back], weight_D)
        return y_LD


@dataclass(frozen=True, eq=False)
class _Norm:
    weight_D: Tensor
    bias_D: Tensor
    eps: float

    @classmethod
    def of(cls, norm: torch.nn.LayerNorm) -> "_Norm":
        return cls(norm.weight.clone(), norm.bias.clone(), norm.eps)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.layer_norm(x, self.weight_D.shape, self.weight_D, self.bias_D, self.eps)


@dataclass(frozen=True, eq=False)
class _ServingBlock:
    """`Block` for the last `n_computed` events of one user.

    Rotating a head is `x * cos + swapped(x) * sin`, and the swapped halves come out of the same
    matrix product as the head itself.
    """

    n_heads: int
    n_computed: int
    n_seen: int  # events that the computed ones look at, themselves included
    mask_QT: Tensor  # added to the attention's scores; the last row and column are the last event
    query: Tensor  # (D, 2D): the queries and their swapped halves
    key_value: Tensor  # (D, 3D): keys, their swapped halves, values
    out: Tensor
    norm_attention: _Norm
    norm_mlp: _Norm
    up: tuple[Tensor, Tensor]
    down: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, block: Block, max_len: int, n_computed: int) -> "_ServingBlock":
        n_events = 2 * max_len
        q, k, v = block.qkv.weight.chunk(3)
        dim = len(q)
        halves = torch.arange(dim).view(block.n_heads, 2, -1)
        swapped = halves.flip(1).reshape(-1)
        mask_TT = attention_mask(n_events, max_len, None, q.device)
        mask_QT = torch.where(mask_TT[-n_computed:], 0.0, -torch.inf)
        return cls(
            n_heads=block.n_heads,
            n_computed=n_computed,
            n_seen=n_computed + max_len - 1,
            mask_QT=mask_QT,
            query=torch.cat((q, q[swapped])).T.contiguous(),
            key_value=torch.cat((k, k[swapped], v)).T.contiguous(),
            out=block.out.weight.T.contiguous(),
            norm_attention=_Norm.of(block.norm_attention),
            norm_mlp=_Norm.of(block.norm_mlp),
            up=(block.up.weight.clone(), block.up.bias.clone()),
            down=(block.down.weight.clone(), block.down.bias.clone()),
        )

    def __call__(self, x_LD: Tensor, cos_T1K: Tensor, sin_T1K: Tensor) -> Tensor:
        """x_QD, the last `n_computed` (or fewer) events after this block."""
        x_LD = x_LD[-self.n_seen :]
        n_seen, dim = x_LD.shape
        n_computed = min(self.n_computed, n_seen)
        cos_L1K, sin_L1K = cos_T1K[-n_seen:], sin_T1K[-n_seen:]
        h_LD, x_QD = self.norm_attention(x_LD), x_LD[-n_computed:]

        q_Q2HK = (h_LD[-n_computed:] @ self.query).view(n_computed, 2, self.n_heads, -1)
        kv_L3HK = (h_LD @ self.key_value).view(n_seen, 3, self.n_heads, -1)
        q_QHK = torch.addcmul(
            q_Q2HK[:, 0] * cos_L1K[-n_computed:], q_Q2HK[:, 1], sin_L1K[-n_computed:]
        )
        k_LHK = torch.addcmul(kv_L3HK[:, 0] * cos_L1K, kv_L3HK[:, 1], sin_L1K)
        a_1HQK = F.scaled_dot_product_attention(
            q_QHK.transpose(0, 1)[None],
            k_LHK.transpose(0, 1)[None],
            kv_L3HK[:, 2].transpose(0, 1)[None],
            attn_mask=self.mask_QT[-n_computed:, -n_seen:],
        )
        x_QD = torch.addmm(x_QD, a_1HQK[0].transpose(0, 1).reshape(n_computed, dim), self.out)
        return x_QD + F.linear(F.gelu(F.linear(self.norm_mlp(x_QD), *self.up)), *self.down)
