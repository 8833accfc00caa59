"""What several distillation workers agree on, so that their students stay one and the same.

Worker r reads the partitions p with p % world == r. Every tick the workers exchange what they
have read of new items, take rank 0's clock, and average their gradients.
"""

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

Value = TypeVar("Value")


class Peers:
    """The workers of one run; alone, every exchange is with oneself and costs nothing."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank = rank
        self.world = world

    def gather(self, value: Value) -> list[Value]:
        """Everyone's value, by rank. All workers must call it."""
        if self.world == 1:
            return [value]
        values: list[Value | None] = [None] * self.world
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def average(self, model: nn.Module, weight: float) -> None:
        """Replace gradients by their mean over workers, each weighted; none counts as zero."""
        if self.world == 1:
            return
        parameters = list(model.parameters())
        flat = torch.cat(
            [
                *(
                    (torch.zeros_like(p) if p.grad is None else p.grad).flatten() * weight
                    for p in parameters
                ),
                torch.tensor([weight]),
            ]
        )
        dist.all_reduce(flat)
        flat = flat[:-1] / flat[-1].clamp_min(1e-9)
        for parameter, gradient in zip(
            parameters, flat.split([p.numel() for p in parameters]), strict=True
        ):
            parameter.grad = gradient.view_as(parameter)


ALONE = Peers()
