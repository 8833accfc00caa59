"""The student: small, learns for ever, and serves.

The head that serves learns from real labels only; the teacher's soft labels go to a tower of
their own, its hidden states to a projection. Both shape the shared encoder, neither bends the
served scores, and serving drops them.

Shapes: B sequences, L events, N positions, D width, T the teacher's width, V catalog rows,
K candidates.
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from services.core.models.encoder import item_table
from services.core.models.recommender import CONFIG, WEIGHTS, Recommender
from services.core.models.sizes import EncoderConfig, StudentConfig

if TYPE_CHECKING:
    from services.core.models.serving import ServingStudent

TABLE: Final = "table.npy"


class Student(Recommender):
    config_type = StudentConfig

    def __init__(self, config: StudentConfig, *, n_rows: int) -> None:
        super().__init__(config, n_rows=n_rows)
        self.soft_tower: nn.Module = nn.Sequential(
            nn.Linear(config.dim, config.dim), nn.GELU(), nn.Linear(config.dim, config.dim)
        )
        self.to_teacher: nn.Module = nn.Linear(config.dim, config.teacher_dim)

    def soft_scores(
        self, hidden_ND: Tensor, rows_NK: Tensor, *, table_VD: Tensor, tower: bool = True
    ) -> Tensor:
        """scores_NK of a teacher's candidates, by the tower that learns soft labels and isn't
        served; `tower` false: by the head that is."""
        if tower:
            hidden_ND = hidden_ND + self.soft_tower(hidden_ND)
        candidates_NKD = F.embedding(rows_NK, table_VD)
        return torch.einsum("nd,nkd->nk", hidden_ND, candidates_NKD) + self.bias_V[rows_NK]

    def teacher_hidden(self, hidden_ND: Tensor) -> Tensor:
        """hidden_NT: our guess of the teacher's hidden state."""
        guess_NT: Tensor = self.to_teacher(hidden_ND)
        return guess_NT

    def for_serving(self) -> "ServingStudent":
        """What answers need and nothing else, on weights of its own."""
        weights = self.state_dict()
        return _serving(self.config, weights, _table_of(weights))

    @classmethod
    def load_for_serving(cls, directory: Path, *, share: bool = False) -> "ServingStudent":
        """The same of what `save` wrote, without a module that is filled with random numbers first.
        ValueError for weights of other shapes: compiled loops would read what is beside them.

        `share`: the item table is put beside it and mapped, so that who else loads from this
        directory has the same pages. It may be deleted meanwhile, but not written to.
        """
        sizes = json.loads((directory / CONFIG).read_text())
        n_rows = sizes.pop("n_rows")
        config, weights = cls.config_type(**sizes), load_file(directory / WEIGHTS)
        shapes = {name: one.shape for name, one in weights.items()}
        if found := shapes.items() ^ _shapes(config, n_rows).items():
            raise ValueError(f"weights of other shapes than their sizes say: {sorted(found)[:4]}")
        table_VD = _mapped_table(directory, weights) if share else _table_of(weights)
        if table_VD.shape != (n_rows, config.dim):
            raise ValueError(f"an item table of {table_VD.shape}, not {(n_rows, config.dim)}")
        return _serving(config, weights, table_VD)


@lru_cache(maxsize=4)  # 10 ms, and a version's are mostly those of the one before
def _shapes(config: StudentConfig, n_rows: int) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {
            name: one.shape for name, one in Student(config, n_rows=n_rows).state_dict().items()
        }


def _serving(
    config: EncoderConfig, weights: Mapping[str, Tensor], table_VD: NDArray[np.float32]
) -> "ServingStudent":
    from services.core.models.serving import ServingStudent  # a compiler, which training needs not

    return ServingStudent(config, weights, table_VD)


def _table_of(weights: Mapping[str, Tensor]) -> NDArray[np.float32]:
    """The item table (V, D) of a student's `state_dict`."""
    names = ("item_id.weight", "content.weight", "content_VC")
    table_VD: NDArray[np.float32] = item_table(*(weights[f"encoder.{n}"] for n in names)).numpy()
    return table_VD


def _mapped_table(directory: Path, weights: Mapping[str, Tensor]) -> NDArray[np.float32]:
    path = directory / TABLE
    if not path.exists():
        aside = path.with_suffix(".new.npy")
        np.save(aside, _table_of(weights))
        aside.rename(path)
    return np.asarray(np.load(path, mmap_mode="r"))
