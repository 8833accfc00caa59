"""What teacher and student have in common: an encoder, scores over the catalog, files, growth.

Shapes: B sequences, L events, N positions picked from them, D width, V catalog rows.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from services.core.models.encoder import Encoder
from services.core.models.sizes import EncoderConfig

WEIGHTS = "weights.safetensors"
CONFIG = "config.json"


class Recommender(nn.Module):
    """An encoder whose hidden state scores every catalog row as the next item."""

    config_type: ClassVar[type[EncoderConfig]] = EncoderConfig
    bias_V: nn.Parameter

    def __init__(self, config: EncoderConfig, *, n_rows: int) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, n_rows=n_rows)
        self.bias_V = nn.Parameter(torch.zeros(n_rows))

    @property
    def n_rows(self) -> int:
        return self.encoder.n_rows

    @property
    def n_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(
        self,
        rows_BL: Tensor,
        types_BL: Tensor,
        gaps_BL: Tensor,
        segments_BL: Tensor | None = None,
        *,
        table_VD: Tensor | None = None,
    ) -> Tensor:
        """hidden_BLD: see `Encoder.forward`."""
        hidden_BLD: Tensor = self.encoder(
            rows_BL, types_BL, gaps_BL, segments_BL, table_VD=table_VD
        )
        return hidden_BLD

    def scores(self, hidden_ND: Tensor, *, table_VD: Tensor | None = None) -> Tensor:
        """scores_NV, logits of the next item; padding scores -inf."""
        table_VD = self.encoder.item_table() if table_VD is None else table_VD
        scores_NV = torch.addmm(self.bias_V, hidden_ND, table_VD.T)
        scores_NV[:, 0] = -torch.inf
        return scores_NV

    def describe(self, content: NDArray[np.int32]) -> None:
        """Take over `Catalog.content` of exactly our rows."""
        # A copy: what an actor gets from Ray may not be written to, of which torch warns.
        self.encoder.describe(torch.tensor(content))

    def grow(
        self, content: NDArray[np.int32], *, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        """Make rows for a catalog that has grown to `content` (V', C); old outputs stay.

        A new row's id embedding and bias start at 0, so it is scored by its content alone. An
        `optimizer` over our parameters goes on with the new ones, its moments padded with 0.
        """
        encoder, n_rows = self.encoder, len(content)
        if n_rows < self.n_rows:
            raise ValueError(f"a catalog never shrinks: {n_rows} rows < {self.n_rows}")
        if n_rows > self.n_rows:
            encoder.item_id.weight = _grown(encoder.item_id.weight, n_rows, optimizer)
            encoder.item_id.num_embeddings = n_rows
            self.bias_V = _grown(self.bias_V, n_rows, optimizer)
            if encoder.weight_V is not None:
                encoder.weight_V = _grown(encoder.weight_V, n_rows, optimizer)
            encoder.content_VC = _padded(encoder.content_VC, n_rows)
        self.describe(content)

    def save(self, directory: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write `weights.safetensors` and `config.json`; nothing is ever pickled.

        weights: the whole ones, where this module holds but a part of each.
        """
        directory.mkdir(parents=True, exist_ok=True)
        save_file(dict(weights or self.state_dict()), directory / WEIGHTS)
        config = {**dataclasses.asdict(self.config), "n_rows": self.n_rows}
        (directory / CONFIG).write_text(json.dumps(config, indent=1))

    @classmethod
    def load(cls, directory: Path) -> Self:
        """The model that `save` wrote, in eval mode."""
        config = json.loads((directory / CONFIG).read_text())
        n_rows = config.pop("n_rows")
        model = cls(cls.config_type(**config), n_rows=n_rows)
        model.load_state_dict(load_file(directory / WEIGHTS))
        return model.eval()


def _padded(tensor: Tensor, n_rows: int) -> Tensor:
    return torch.cat([tensor, tensor.new_zeros(n_rows - len(tensor), *tensor.shape[1:])])


def _grown(old: Tensor, n_rows: int, optimizer: torch.optim.Optimizer | None) -> nn.Parameter:
    new = nn.Parameter(_padded(old.detach(), n_rows))
    if optimizer is not None:
        for group in optimizer.param_groups:
            group["params"] = [new if p is old else p for p in group["params"]]
        state = optimizer.state.pop(old, {})
        optimizer.state[new] = {
            name: _padded(value, n_rows) if value.shape == old.shape else value
            for name, value in state.items()
        }
    return new
