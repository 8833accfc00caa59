"""A student's forward pass for one user on one core, in NumPy: the same numbers in less time.

Its matrices are so small that PyTorch spends more on each call than on the arithmetic. Only the
last event's hidden state is wanted, so each block computes what the blocks above it look at and no
more; masks, rotations and the item table are computed once, norms' weights are merged into the
matrices that follow them.

Shapes: L events, Q events a block computes, T events it looks at, D width, H heads, K head width,
V catalog rows, N users.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import erf
from torch import Tensor

from services.core.models.encoder import attention_mask, item_table, rotary
from services.core.models.sizes import EncoderConfig

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

_EPS: Final = np.float32(1e-5)  # of PyTorch's LayerNorm
_ONE: Final = np.float32(1)
_ROOT_HALF: Final = np.float32(0.5**0.5)
_BLOCK: Final = (
    *("norm_attention.weight", "norm_attention.bias", "qkv.weight", "out.weight"),
    *("norm_mlp.weight", "norm_mlp.bias", "up.weight", "up.bias", "down.weight", "down.bias"),
)


class ServingStudent:
    """A frozen student: what answers need and nothing else, on weights of its own."""

    def __init__(
        self, config: EncoderConfig, weights: Mapping[str, Tensor], table_VD: Floats
    ) -> None:
        """`weights`: a student's `state_dict`; `table_VD`: what `table_of` makes of it."""
        encoder = {name.removeprefix("encoder."): tensor for name, tensor in weights.items()}
        self.n_rows = len(table_VD)
        # One more than the last event can look at: the first one's gap counts as none.
        looks_at = config.n_layers * (config.max_len - 1) + 1 + config.n_recent
        whole = 2 * config.max_len if config.ordered else config.max_len
        self.max_events = min(whole, looks_at + 1) if config.ordered else whole
        self.table_VD = table_VD
        self.bias_V = _own(weights["bias_V"])
        self.bias_V[0] = -np.inf  # padding is no item
        weight_V = encoder.get("weight_V")
        self._weight_V1 = None if weight_V is None else _own(weight_V.exp()[:, None])
        # What a type and a gap add, as one row: type * n_gaps + gap.
        self._n_gaps = config.n_gaps
        both = encoder["event_type.weight"][:, None] + encoder["gap.weight"][None]
        self._type_gap = _own(both.flatten(0, 1))
        self._norm_weight, self._norm_bias = (
            _own(encoder["norm.weight"]),
            _own(encoder["norm.bias"]),
        )
        recent_KD = encoder.get("recent.weight_KD", torch.zeros(0, config.dim))
        self._recent_KD = _own(recent_KD)
        self._blocks = [
            _ServingBlock.of(
                {name: encoder[f"blocks.{at}.{name}"] for name in _BLOCK},
                config,
                n_events=self.max_events,
                n_computed=1 + (config.n_layers - 1 - at) * (config.max_len - 1),
            )
            for at in range(config.n_layers)
        ]

    def state(self, rows_L: Ints, types_L: Ints, gaps_L: Ints) -> Floats:
        """h_D of one user after the last event; `scores` makes logits of it. L >= 1, no padding."""
        at = slice(-self.max_events, None)
        x_LD = self.table_VD[rows_L[at]]
        if self._weight_V1 is None:
            x_LD += self._type_gap[types_L[at] * self._n_gaps + gaps_L[at]]
            x_LD = self._blend(x_LD)
        else:
            x_LD *= self._weight_V1[rows_L[at]]
            x_LD = x_LD.sum(0, keepdims=True) * np.float32(len(x_LD) ** -0.5)
        for block in self._blocks:
            x_LD = block(x_LD)
        h_D: Floats = _normed(x_LD[-1:])[0]
        h_D *= self._norm_weight
        h_D += self._norm_bias
        return h_D

    def scores(self, h_D: Floats) -> Floats:
        """scores_V, logits of the next item; row 0 (padding) scores -inf."""
        scores_V: Floats = self.table_VD @ h_D
        scores_V += self.bias_V
        return scores_V

    def score_next(self, rows_L: Ints, types_L: Ints, gaps_L: Ints) -> Floats:
        """scores_V of one user's next item, from the last `max_events` events."""
        return self.scores(self.state(rows_L, types_L, gaps_L))

    def _blend(self, x_LD: Floats) -> Floats:
        """`Recent` for one user."""
        y_LD = x_LD.copy()
        for back, weight_D in enumerate(self._recent_KD[: len(x_LD) - 1], start=1):
            y_LD[back:] += x_LD[:-back] * weight_D
        return y_LD


def table_of(weights: Mapping[str, Tensor]) -> Floats:
    """The item table (V, D) of a student's `state_dict`."""
    names = ("item_id.weight", "content.weight", "content_VC")
    table_VD: Floats = item_table(*(weights[f"encoder.{name}"] for name in names)).numpy()
    return table_VD


def _own(tensor: Tensor) -> Floats:
    """A contiguous copy, so that the training's weights may go on changing, or go."""
    return np.array(tensor.detach().numpy(), np.float32, order="C", copy=True)


def _normed(x: Floats) -> Floats:
    """A layer norm without its weight and bias; a new array."""
    centred, mean_D1 = _moments(x.shape[-1])
    y: Floats = x @ centred
    y /= np.sqrt((y * y) @ mean_D1 + _EPS)
    return y


@cache
def _moments(width: int) -> tuple[Floats, Floats]:
    """What takes the mean off, and what takes it: products cost less here than reductions."""
    mean_D1 = np.full((width, 1), 1 / width, np.float32)
    return np.eye(width, dtype=np.float32) - mean_D1, mean_D1


@dataclass(frozen=True, eq=False)
class _Linear:
    """x @ weight + bias, with the norm before it merged in."""

    weight: Floats
    bias: Floats

    @classmethod
    def after(cls, norm: tuple[Tensor, Tensor], weight: Tensor, bias: Tensor | None) -> "_Linear":
        """`norm`: its weight and bias."""
        shift = weight @ norm[1]
        merged = shift if bias is None else shift + bias
        return cls(_own((weight * norm[0]).T), _own(merged))

    def __call__(self, x: Floats) -> Floats:
        y: Floats = x @ self.weight
        y += self.bias
        return y


@dataclass(frozen=True, eq=False)
class _ServingBlock:
    """`Block` for the last `n_computed` events of one user.

    Rotating a head is `x * cos + swapped(x) * sin`, and the swapped halves come out of the same
    matrix product as the head itself.
    """

    n_heads: int
    n_computed: int
    n_seen: int  # events that the computed ones look at, themselves included
    mask_QT: Floats | None  # added to the attention's scores, aligned at the last event
    cos_TD: Floats
    sin_TD: Floats
    query: _Linear  # to 2D: the scaled queries and their swapped halves
    key_value: _Linear  # to 3D: keys, their swapped halves, values
    out: Floats
    up: _Linear
    down: _Linear

    @classmethod
    def of(
        cls, block: Mapping[str, Tensor], config: EncoderConfig, *, n_events: int, n_computed: int
    ) -> "_ServingBlock":
        q, k, v = block["qkv.weight"].chunk(3)
        dim, n_heads, max_len = config.dim, config.n_heads, config.max_len
        q = q * (dim // n_heads) ** -0.5
        halves = torch.arange(dim).view(n_heads, 2, -1)
        swapped = halves.flip(1).reshape(-1)
        n_seen = min(n_computed + max_len - 1, n_events)
        mask_LL = attention_mask(n_events, max_len, None, q.device)
        mask_QT = torch.where(mask_LL[-n_computed:, -n_seen:], 0.0, -torch.inf)
        cos, sin = rotary(n_events, dim // n_heads, q.device)
        attention, mlp = (
            (block[f"{name}.weight"], block[f"{name}.bias"])
            for name in ("norm_attention", "norm_mlp")
        )
        return cls(
            n_heads=n_heads,
            n_computed=n_computed,
            n_seen=n_seen,
            mask_QT=_own(mask_QT) if n_computed > 1 else None,
            cos_TD=_own(torch.cat((cos, cos), dim=-1).tile(n_heads)[-n_seen:]),
            sin_TD=_own(torch.cat((-sin, sin), dim=-1).tile(n_heads)[-n_seen:]),
            query=_Linear.after(attention, torch.cat((q, q[swapped])), None),
            key_value=_Linear.after(attention, torch.cat((k, k[swapped], v)), None),
            out=_own(block["out.weight"].T),
            up=_Linear.after(mlp, block["up.weight"], block["up.bias"]),
            down=_Linear(_own(block["down.weight"].T / 2), _own(block["down.bias"])),
        )

    def __call__(self, x_LD: Floats) -> Floats:
        """x_QD, the last `n_computed` (or fewer) events after this block."""
        x_TD = x_LD[-self.n_seen :]
        n_seen, dim = x_TD.shape
        n_computed = min(self.n_computed, n_seen)
        cos_TD, sin_TD = self.cos_TD[-n_seen:], self.sin_TD[-n_seen:]
        h_TD, x_QD = _normed(x_TD), x_TD[-n_computed:]

        q_Q2D, kv_T3D = self.query(h_TD[-n_computed:]), self.key_value(h_TD)
        q_QD = q_Q2D[:, :dim] * cos_TD[-n_computed:] + q_Q2D[:, dim:] * sin_TD[-n_computed:]
        k_TD = kv_T3D[:, :dim] * cos_TD + kv_T3D[:, dim : 2 * dim] * sin_TD
        heads = (-1, self.n_heads, dim // self.n_heads)
        q_HQK = q_QD.reshape(heads).transpose(1, 0, 2)
        k_HKT = k_TD.reshape(heads).transpose(1, 2, 0)
        v_HTK = kv_T3D[:, 2 * dim :].reshape(heads).transpose(1, 0, 2)
        a_HQT = q_HQK @ k_HKT
        if self.mask_QT is not None:
            a_HQT += self.mask_QT[-n_computed:, -n_seen:]
        a_HQT -= np.maximum.reduce(a_HQT, axis=-1, keepdims=True)
        np.exp(a_HQT, out=a_HQT)
        a_HQT /= np.add.reduce(a_HQT, axis=-1, keepdims=True)
        a_QD = (a_HQT @ v_HTK).transpose(1, 0, 2).reshape(n_computed, dim)
        x_QD = np.add(x_QD, a_QD @ self.out)

        u_QU = self.up(_normed(x_QD))
        gelu = erf(u_QU * _ROOT_HALF)  # the half of GELU is in `down`
        gelu += _ONE
        u_QU *= gelu
        x_QD += self.down(u_QU)
        return x_QD
