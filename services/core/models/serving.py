"""A student's forward pass for one user on one core, compiled: the same numbers in less time.

Its matrices are so small that PyTorch and NumPy spend more on each call than on the arithmetic.
Only the last event's hidden state is wanted, so each block computes what the blocks above it look
at and no more; rotations and the item table are computed once.

Shapes: L events, Q events a block computes, T events it looks at, D width, H heads, K head width,
U width of the MLP, V catalog rows.
"""

import math
from collections.abc import Mapping
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.core.compiled import compiled
from services.core.models.encoder import rotary
from services.core.models.sequences import N_GAPS, N_TYPES
from services.core.models.sizes import EncoderConfig

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

_EPS: Final = np.float32(1e-5)  # of PyTorch's LayerNorm
_ONE: Final = np.float32(1)
_HALF: Final = np.float32(0.5)
_ROOT_HALF: Final = np.float32(0.5**0.5)
_LOWEST: Final = np.finfo(np.float32).min


class ServingStudent:
    """A frozen student: what answers need and nothing else, on weights of its own."""

    def __init__(
        self, config: EncoderConfig, weights: Mapping[str, Tensor], table_VD: Floats
    ) -> None:
        """`weights`: a student's `state_dict`; `table_VD`: the item table that they make."""
        encoder = {name.removeprefix("encoder."): tensor for name, tensor in weights.items()}
        if config.n_types < N_TYPES or config.n_gaps < N_GAPS:  # `_embedded` doesn't look
            raise ValueError(f"{config.n_types} event types and {config.n_gaps} gaps are too few")
        self.n_rows = len(table_VD)
        # One more than the last event can look at: the first one's gap counts as none.
        looks_at = config.n_layers * (config.max_len - 1) + 1 + config.n_recent
        whole = 2 * config.max_len if config.ordered else config.max_len
        self.max_events = min(whole, looks_at + 1) if config.ordered else whole
        self.table_VD = table_VD.view()
        self.table_VD.flags.writeable = False  # one type to compile for, mapped from a file or not
        self.bias_V = _own(weights["bias_V"])
        self.bias_V[0] = -np.inf  # padding is no item
        weight_V = encoder.get("weight_V")
        self._weight_V = None if weight_V is None else _own(weight_V.exp())
        self._embedding = (
            _own(encoder["event_type.weight"]),
            _own(encoder["gap.weight"]),
            _own(encoder.get("recent.weight_KD", torch.zeros(0, config.dim))),
        )
        self._norm = _Norm.of(encoder, "norm")
        rotation = rotary(self.max_events, config.dim // config.n_heads, torch.device("cpu"))
        cos_TK, sin_TK = map(_own, rotation)
        self._blocks = [
            _Block.of(encoder, f"blocks.{at}", cos_TK, sin_TK) for at in range(config.n_layers)
        ]
        self._n_heads, self._max_len = config.n_heads, config.max_len

    def state(self, rows_L: Ints, types_L: Ints, gaps_L: Ints) -> Floats:
        """h_D of one user after the last event; `scores` makes logits of it. L >= 1, no padding."""
        at = slice(-self.max_events, None)
        if self._weight_V is not None:
            x_LD = _pooled(rows_L[at], self.table_VD, self._weight_V)
        else:
            x_LD = _embedded(rows_L[at], types_L[at], gaps_L[at], self.table_VD, *self._embedding)
        for above, block in zip(range(len(self._blocks) - 1, -1, -1), self._blocks, strict=True):
            n_computed = 1 + above * (self._max_len - 1)
            x_LD = _attended(x_LD, n_computed, self._max_len, self._n_heads, block)
        h_D: Floats = _normed(x_LD[-1:], self._norm)[0]
        return h_D

    def scores(self, h_D: Floats) -> Floats:
        """scores_V, logits of the next item; row 0 (padding) scores -inf."""
        return _scored(self.table_VD, self.bias_V, h_D)

    def score_next(self, rows_L: Ints, types_L: Ints, gaps_L: Ints) -> Floats:
        """scores_V of one user's next item, from the last `max_events` events."""
        return self.scores(self.state(rows_L, types_L, gaps_L))


@compiled
def best_of(scores_V: Floats, n: int) -> tuple[Ints, Floats]:
    """Rows and scores of the n highest finite scores, best first; of equal ones the lower row."""
    rows, best = np.empty(n, np.int64), np.empty(n, np.float32)
    found, least = 0, _LOWEST
    for row in range(len(scores_V)):
        score = scores_V[row]
        # NaN is not at least anything; of equal ones the earlier row is there already.
        if not (score > least if found == n else score >= least):
            continue
        at = min(found, n - 1)
        while at > 0 and best[at - 1] < score:
            best[at], rows[at] = best[at - 1], rows[at - 1]
            at -= 1
        best[at], rows[at] = score, row
        found = min(found + 1, n)
        if found == n:
            least = best[n - 1]
    return rows[:found], best[:found]


def _own(tensor: Tensor) -> Floats:
    """A contiguous copy, so that the training's weights may go on changing, or go."""
    return np.array(tensor.detach().numpy(), np.float32, order="C", copy=True)


class _Norm(NamedTuple):
    weight_D: Floats
    bias_D: Floats

    @classmethod
    def of(cls, encoder: Mapping[str, Tensor], name: str) -> "_Norm":
        return cls(_own(encoder[f"{name}.weight"]), _own(encoder[f"{name}.bias"]))


class _Block(NamedTuple):
    """`encoder.Block`'s weights, turned so that they stand on the right: x @ weight."""

    norm_attention: _Norm
    query_DD: Floats
    key_value_D2D: Floats
    out_DD: Floats
    norm_mlp: _Norm
    up_DU: Floats
    up_U: Floats
    down_UD: Floats
    down_D: Floats
    cos_TK: Floats  # K: half a head
    sin_TK: Floats

    @classmethod
    def of(
        cls, encoder: Mapping[str, Tensor], name: str, cos_TK: Floats, sin_TK: Floats
    ) -> "_Block":
        q, k, v = encoder[f"{name}.qkv.weight"].chunk(3)
        return cls(
            norm_attention=_Norm.of(encoder, f"{name}.norm_attention"),
            query_DD=_own(q.T),
            key_value_D2D=_own(torch.cat((k, v)).T),
            out_DD=_own(encoder[f"{name}.out.weight"].T),
            norm_mlp=_Norm.of(encoder, f"{name}.norm_mlp"),
            up_DU=_own(encoder[f"{name}.up.weight"].T),
            up_U=_own(encoder[f"{name}.up.bias"]),
            down_UD=_own(encoder[f"{name}.down.weight"].T),
            down_D=_own(encoder[f"{name}.down.bias"]),
            cos_TK=cos_TK,
            sin_TK=sin_TK,
        )


@compiled
def _embedded(
    rows_L: Ints,
    types_L: Ints,
    gaps_L: Ints,
    table_VD: Floats,
    type_ED: Floats,
    gap_GD: Floats,
    recent_BD: Floats,
) -> Floats:
    """x_LD: the events, and the B before each blended in (`encoder.Recent`)."""
    length, width = len(rows_L), table_VD.shape[1]
    own_LD = np.empty((length, width), np.float32)
    for i in range(length):
        row, kind, gap = rows_L[i], types_L[i], gaps_L[i]
        for d in range(width):
            own_LD[i, d] = table_VD[row, d] + type_ED[kind, d] + gap_GD[gap, d]
    x_LD = own_LD.copy()
    for i in range(length):
        for back in range(1, 1 + min(len(recent_BD), i)):
            for d in range(width):
                x_LD[i, d] += own_LD[i - back, d] * recent_BD[back - 1, d]
    return x_LD


@compiled
def _pooled(rows_L: Ints, table_VD: Floats, weight_V: Floats) -> Floats:
    """x_1D of a set: its items' weighted sum, over the root of their number."""
    length, width = len(rows_L), table_VD.shape[1]
    x_1D = np.zeros((1, width), np.float32)
    for i in range(length):
        row = rows_L[i]
        for d in range(width):
            x_1D[0, d] += table_VD[row, d] * weight_V[row]
    for d in range(width):
        x_1D[0, d] /= np.float32(math.sqrt(length))
    return x_1D


@compiled
def _normed(x_LD: Floats, norm: _Norm) -> Floats:
    y_LD, width = np.empty_like(x_LD), np.float32(x_LD.shape[1])
    for i in range(len(x_LD)):
        mean = variance = np.float32(0)
        for d in range(x_LD.shape[1]):
            mean += x_LD[i, d]
        mean /= width
        for d in range(x_LD.shape[1]):
            centred = x_LD[i, d] - mean
            variance += centred * centred
        scale = _ONE / np.sqrt(variance / width + _EPS)
        for d in range(x_LD.shape[1]):
            y_LD[i, d] = (x_LD[i, d] - mean) * scale * norm.weight_D[d] + norm.bias_D[d]
    return y_LD


@compiled
def _product(x_LM: Floats, y_MN: Floats) -> Floats:
    """Compiled once, for all: Numba takes a second for each place where it stands itself."""
    return x_LM @ y_MN


@compiled
def _add(x_LD: Floats, y_LD: Floats) -> None:
    """In place; loops like this one compile in a tenth of the time of `+=`."""
    for i in range(x_LD.shape[0]):
        for d in range(x_LD.shape[1]):
            x_LD[i, d] += y_LD[i, d]


@compiled
def _softmax(a_QT: Floats, max_len: int, scale: np.float32) -> None:
    """In place, of the `max_len` events up to each of the last Q; the others weigh nothing."""
    n_computed, n_seen = a_QT.shape
    for i in range(n_computed):
        end = n_seen - n_computed + i + 1
        first = max(0, end - max_len)
        most, total = np.float32(-np.inf), np.float32(0)
        for j in range(first, end):
            most = max(most, a_QT[i, j])
        for j in range(n_seen):
            inside = first <= j < end
            a_QT[i, j] = math.exp((a_QT[i, j] - most) * scale) if inside else np.float32(0)
            total += a_QT[i, j]
        for j in range(first, end):
            a_QT[i, j] /= total


@compiled
def _attention(
    q_QD: Floats, kv_T2D: Floats, n_heads: int, max_len: int, cos_TK: Floats, sin_TK: Floats
) -> Floats:
    """a_QD, of the last Q events to the T; queries and keys have yet to be turned."""
    (n_computed, width), n_seen = q_QD.shape, len(kv_T2D)
    width_K = width // n_heads
    q_QK, a_QD = np.empty((n_computed, width_K), np.float32), np.empty_like(q_QD)
    k_KT, v_TK = np.empty((width_K, n_seen), np.float32), np.empty((n_seen, width_K), np.float32)
    for head in range(n_heads):
        begin, half = head * width_K, width_K // 2
        for i in range(n_computed):
            at = n_seen - n_computed + i
            for k in range(half):
                one, other = q_QD[i, begin + k], q_QD[i, begin + half + k]
                q_QK[i, k] = one * cos_TK[at, k] - other * sin_TK[at, k]
                q_QK[i, half + k] = one * sin_TK[at, k] + other * cos_TK[at, k]
        for i in range(n_seen):
            for k in range(half):
                one, other = kv_T2D[i, begin + k], kv_T2D[i, begin + half + k]
                k_KT[k, i] = one * cos_TK[i, k] - other * sin_TK[i, k]
                k_KT[half + k, i] = one * sin_TK[i, k] + other * cos_TK[i, k]
            for k in range(width_K):
                v_TK[i, k] = kv_T2D[i, width + begin + k]
        a_QT = _product(q_QK, k_KT)
        _softmax(a_QT, max_len, np.float32(1 / math.sqrt(width_K)))
        a_QK = _product(a_QT, v_TK)
        for i in range(n_computed):
            for k in range(width_K):
                a_QD[i, begin + k] = a_QK[i, k]
    return a_QD


@compiled
def _attended(x_LD: Floats, n_computed: int, max_len: int, n_heads: int, block: _Block) -> Floats:
    """x_QD, the last `n_computed` (or fewer) events after this block."""
    n_seen = min(n_computed + max_len - 1, len(x_LD))
    n_computed = min(n_computed, n_seen)
    x_TD = x_LD[len(x_LD) - n_seen :]
    h_TD = _normed(x_TD, block.norm_attention)
    q_QD = _product(h_TD[n_seen - n_computed :], block.query_DD)
    kv_T2D = _product(h_TD, block.key_value_D2D)
    a_QD = _attention(q_QD, kv_T2D, n_heads, max_len, block.cos_TK, block.sin_TK)
    x_QD = _product(a_QD, block.out_DD)
    _add(x_QD, x_TD[n_seen - n_computed :])

    u_QU = _product(_normed(x_QD, block.norm_mlp), block.up_DU)
    for i in range(n_computed):
        for u in range(u_QU.shape[1]):
            z = u_QU[i, u] + block.up_U[u]
            u_QU[i, u] = _HALF * z * (_ONE + math.erf(z * _ROOT_HALF))  # GELU
    down_QD = _product(u_QU, block.down_UD)
    for i in range(n_computed):
        for d in range(down_QD.shape[1]):
            x_QD[i, d] += down_QD[i, d] + block.down_D[d]
    return x_QD


@compiled
def _scored(table_VD: Floats, bias_V: Floats, h_D: Floats) -> Floats:
    scores_V = table_VD @ h_D
    for row in range(len(scores_V)):
        scores_V[row] += bias_V[row]
    return scores_V
