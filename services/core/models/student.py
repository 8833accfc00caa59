"""The student: small, learns for ever, and serves.

The head that serves learns from real labels only; the teacher's soft labels go to a tower of
their own, its hidden states to a projection. Both shape the shared encoder, neither bends the
served scores, and serving drops them.

Shapes: B sequences, L events, N positions, D width, T the teacher's width, V catalog rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from services.core.models.encoder import EncoderConfig
from services.core.models.recommender import Recommender


@dataclass(frozen=True, kw_only=True)
class StudentConfig(EncoderConfig):
    """Sizes of a student. `teacher_dim`: width T of the hidden states it learns to project to."""

    teacher_dim: int


class Student(Recommender):
    config_type = StudentConfig

    def __init__(self, config: StudentConfig, *, n_rows: int) -> None:
        super().__init__(config, n_rows=n_rows)
        self.soft_tower: nn.Module = nn.Sequential(
            nn.Linear(config.dim, config.dim), nn.GELU(), nn.Linear(config.dim, config.dim)
        )
        self.to_teacher: nn.Module = nn.Linear(config.dim, config.teacher_dim)

    def soft_scores(self, hidden_ND: Tensor, *, table_VD: Tensor | None = None) -> Tensor:
        """scores_NV of the tower that learns soft labels; not what is served."""
        return self.scores(hidden_ND + self.soft_tower(hidden_ND), table_VD=table_VD)

    def teacher_hidden(self, hidden_ND: Tensor) -> Tensor:
        """hidden_NT: our guess of the teacher's hidden state."""
        guess_NT: Tensor = self.to_teacher(hidden_ND)
        return guess_NT

    def for_serving(self) -> "ServingStudent":
        """What answers need and nothing else, on weights of its own."""
        return ServingStudent(self)


class ServingStudent:
    """A frozen student with its item table computed once."""

    def __init__(self, student: Student) -> None:
        self.n_rows = student.n_rows
        self.max_events = 2 * student.config.max_len
        copy = Student(student.config, n_rows=student.n_rows)  # type: ignore[arg-type]
        copy.load_state_dict(student.state_dict())
        self._encoder = copy.eval().requires_grad_(False).encoder
        self._bias_V = copy.bias_V.detach()
        with torch.no_grad():
            self._table_VD = self._encoder.item_table()

    @torch.inference_mode()
    def score_next(self, rows_1L: Tensor, types_1L: Tensor, gaps_1L: Tensor) -> Tensor:
        """scores_V, logits of one user's next item, from the last `max_events` events.

        L >= 1, no padding; row 0 (padding) scores -inf.
        """
        at = slice(-self.max_events, None)
        hidden_1LD = self._encoder(
            rows_1L[:, at], types_1L[:, at], gaps_1L[:, at], table_VD=self._table_VD
        )
        scores_V = torch.addmv(self._bias_V, self._table_VD, hidden_1LD[0, -1])
        scores_V[0] = -torch.inf
        return scores_V
