"""The encoder that teacher and student share: a causal transformer, or a set where order says
nothing.

Shapes: B sequences, L events, D width, H heads, K head width, V catalog rows, C content tokens a
row. Row, type, gap and segment 0 mean padding; padding stands after the events, never before.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from services.core.models.sizes import EncoderConfig


class Encoder(nn.Module):
    """hidden_BLD[b, t] tells what follows event t, from events 0..t of its segment alone.

    Positions are relative (rotary), so a prediction doesn't depend on where a history was cut.
    """

    content_VC: Tensor

    def __init__(self, config: EncoderConfig, *, n_rows: int) -> None:
        super().__init__()
        self.config = config
        self.item_id = nn.Embedding(n_rows, config.dim, padding_idx=0)
        self.content = nn.Embedding(config.content_buckets, config.dim, padding_idx=0)
        self.event_type = nn.Embedding(config.n_types, config.dim)
        self.gap = nn.Embedding(config.n_gaps, config.dim)
        for table in (self.item_id, self.content, self.event_type, self.gap):
            nn.init.normal_(table.weight, std=config.dim**-0.5)
            if table.padding_idx is not None:
                nn.init.zeros_(table.weight[table.padding_idx].detach())
        if not config.ordered:  # whose events have neither; DDP waits for every gradient
            self.event_type.requires_grad_(False)
            self.gap.requires_grad_(False)
        self.recent = Recent(config) if config.n_recent else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        # Log of what an item counts for in a set: what everybody has says little of who has it.
        self.weight_V = None if config.ordered else nn.Parameter(torch.zeros(n_rows))
        self.norm = nn.LayerNorm(config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.register_buffer("content_VC", torch.zeros(n_rows, config.n_content, dtype=torch.int32))

    @property
    def n_rows(self) -> int:
        return self.item_id.num_embeddings

    def item_table(self) -> Tensor:
        """table_VD: what each row is (id) plus what it is made of (mean of its content)."""
        return item_table(self.item_id.weight, self.content.weight, self.content_VC)

    def items(self, rows_R: Tensor) -> Tensor:
        """table_RD: the same of these rows alone."""
        return item_table(self.item_id(rows_R), self.content.weight, self.content_VC[rows_R])

    def forward(
        self,
        rows_BL: Tensor,
        types_BL: Tensor,
        gaps_BL: Tensor,
        segments_BL: Tensor | None = None,
        *,
        table_VD: Tensor | None = None,
    ) -> Tensor:
        """hidden_BLD. `segments_BL` for packed lines; `table_VD` where it is already at hand."""
        table_VD = self.item_table() if table_VD is None else table_VD
        x_BLD = F.embedding(rows_BL, table_VD)
        mask = attention_mask(rows_BL.shape[1], self.config.max_len, segments_BL, rows_BL.device)
        if self.weight_V is not None:
            x_BLD = x_BLD * self.weight_V.exp()[rows_BL][..., None]
            return self.norm(self.dropout(pooled(x_BLD, mask)))
        x_BLD = x_BLD + self.event_type(types_BL) + self.gap(gaps_BL)
        if self.recent is not None:
            x_BLD = self.recent(x_BLD, segments_BL)
        x_BLD = self.dropout(x_BLD)
        rotation = rotary(rows_BL.shape[1], self.config.dim // self.config.n_heads, rows_BL.device)
        for block in self.blocks:
            x_BLD = block(x_BLD, mask, rotation)
        return self.norm(x_BLD)

    def describe(self, content_VC: Tensor) -> None:
        """Take over the catalog's content (`Catalog.content`), hashed into our buckets."""
        if content_VC.shape != self.content_VC.shape:
            raise ValueError(f"content {tuple(content_VC.shape)} != {tuple(self.content_VC.shape)}")
        buckets = 1 + content_VC % (self.config.content_buckets - 1)
        self.content_VC.copy_(torch.where(content_VC > 0, buckets, 0))


class Recent(nn.Module):
    """x_t + sum over k of w_k * x_(t-k), per channel, within a segment: what a Markov chain over
    the last events sees, at next to no cost.

    It frees the attention from finding neighbours. MovieLens-1M, teacher of dim 64, 80 s on one
    core: NDCG@10 .1538 with the last four, .1485 without.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.weight_KD = nn.Parameter(torch.zeros(config.n_recent, config.dim))

    def forward(self, x_BLD: Tensor, segments_BL: Tensor | None) -> Tensor:
        y_BLD, length = x_BLD, x_BLD.shape[1]
        for back, weight_D in enumerate(self.weight_KD[: length - 1], start=1):
            before_BLD = x_BLD[:, :-back] * weight_D
            if segments_BL is not None:
                same_BL = segments_BL[:, back:] == segments_BL[:, :-back]
                before_BLD = before_BLD * same_BL[..., None]
            y_BLD = y_BLD + F.pad(before_BLD, (0, 0, back, 0))
        return y_BLD


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the stream."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.dropout = config.dropout
        self.norm_attention = nn.LayerNorm(config.dim)
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)
        self.norm_mlp = nn.LayerNorm(config.dim)
        self.up = nn.Linear(config.dim, 4 * config.dim)
        self.down = nn.Linear(4 * config.dim, config.dim)

    def forward(self, x_BLD: Tensor, mask: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        B, L, D = x_BLD.shape
        qkv = self.qkv(self.norm_attention(x_BLD)).view(B, L, 3, self.n_heads, D // self.n_heads)
        q_BHLK, k_BHLK, v_BHLK = qkv.permute(2, 0, 3, 1, 4)
        q_BHLK, k_BHLK = rotate(q_BHLK, rotation), rotate(k_BHLK, rotation)
        a_BHLK = F.scaled_dot_product_attention(q_BHLK, k_BHLK, v_BHLK, attn_mask=mask)
        x_BLD = x_BLD + self._drop(self.out(a_BHLK.transpose(1, 2).reshape(B, L, D)))
        return x_BLD + self._drop(self.down(F.gelu(self.up(self.norm_mlp(x_BLD)))))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


def item_table(item_id_VD: Tensor, content_BD: Tensor, content_VC: Tensor) -> Tensor:
    """table_VD, of the ids' embeddings and those of the B content buckets."""
    return item_id_VD + F.embedding_bag(content_VC, content_BD, mode="mean", padding_idx=0)


def pooled(x_BLD: Tensor, mask: Tensor) -> Tensor:
    """At each event the sum of all that it may look at, over the root of their number."""
    weight = mask.to(x_BLD.dtype)
    weight = weight * weight.sum(-1, keepdim=True).rsqrt()
    return (weight[:, 0] if weight.dim() == 4 else weight) @ x_BLD


def attention_mask(
    length: int, max_len: int, segments_BL: Tensor | None, device: torch.device
) -> Tensor:
    """True where event i may look at event j: j <= i, fewer than `max_len` back, same segment.

    (L, L), or (B, 1, L, L) for packed lines.
    """
    at = torch.arange(length, device=device)
    back_LL = at[:, None] - at[None, :]
    mask_LL = (back_LL >= 0) & (back_LL < max_len)
    if segments_BL is None:
        return mask_LL
    return (mask_LL & (segments_BL[:, :, None] == segments_BL[:, None, :]))[:, None]


def rotary(length: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin (L, K/2) of Su et al. 2021 (RoFormer): only distances survive in q.k."""
    at = torch.arange(length, device=device, dtype=torch.float32)
    frequency = 10_000.0 ** (-torch.arange(0, width, 2, device=device) / width)
    angle = at[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x_BHLK: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rotation
    a, b = x_BHLK.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
