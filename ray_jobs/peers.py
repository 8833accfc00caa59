"""What several distillation workers agree on, so that their students stay one and the same.

Worker r reads the partitions p with p % world == r. Every tick the workers exchange what they
have read of new items and how it was predicted, take rank 0's clock, and average their gradients.
What is learned of given micro-batches is the same for any number of workers, up to the order in
which floats are added (and to dropout, whose noise each worker draws for itself).
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

    def average(self, model: nn.Module, weight: float) -> float:
        """Replace gradients by their mean over workers, each weighted. A worker's missing one
        counts as zero; one that all are missing stays so: an optimizer leaves it alone.
        Returns the sum of the weights; where it is 0 there is nothing to learn."""
        if self.world == 1:
            return weight
        parameters = list(model.parameters())
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        there = [float(p.grad is not None) for p in parameters]
        flat = torch.cat(
            [*(g.flatten() * weight for g in gradients), torch.tensor([*there, weight])]
        )
        dist.all_reduce(flat)
        total = float(flat[-1])
        sizes = [p.numel() for p in parameters]
        *means, there_P, _ = (flat / max(total, 1e-9)).split([*sizes, len(parameters), 1])
        for parameter, gradient, anywhere in zip(parameters, means, there_P > 0, strict=True):
            parameter.grad = gradient.view_as(parameter) if anywhere else None
        return total


ALONE = Peers()
