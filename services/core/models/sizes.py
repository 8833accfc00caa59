"""How large models are. Apart from them, for who needs the numbers and not torch."""

from dataclasses import dataclass

from services.core.catalog import N_CONTENT
from services.core.models.sequences import N_GAPS, N_TYPES


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Sizes of an encoder.

    max_len: how far back one layer looks, in events. n_recent: how many events before it are
    blended into each one ahead of the first layer (`Recent`); 0: none. ordered: False where events
    come in no order: their items are added up (`pooled`), and nothing else of them is read.
    """

    dim: int
    n_layers: int
    n_heads: int
    max_len: int
    n_recent: int = 0
    ordered: bool = True
    dropout: float = 0.0
    content_buckets: int = 1024
    n_types: int = N_TYPES
    n_gaps: int = N_GAPS
    n_content: int = N_CONTENT

    def __post_init__(self) -> None:
        if self.dim % (2 * self.n_heads):
            raise ValueError(f"dim={self.dim}: must be a multiple of 2 * n_heads={self.n_heads}")
        if not self.ordered and (self.n_layers or self.n_recent):
            raise ValueError("ordered=False: a set is read without layers; n_layers=0, n_recent=0")


@dataclass(frozen=True, kw_only=True)
class StudentConfig(EncoderConfig):
    """Sizes of a student. `teacher_dim`: width T of the hidden states it learns to project to."""

    teacher_dim: int
