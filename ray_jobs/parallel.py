"""How several workers hold one teacher: each all of it (DDP), or each a part (FSDP).

Checkpoints are the same for both, and for any number of workers: whole tensors by name.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from services.core.models.teacher import Teacher

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
Optimizers = Sequence[torch.optim.Optimizer]


def world() -> int:
    """How many workers there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def prepared(loss: nn.Module, model: Teacher, *, device: torch.device, sharded: bool) -> nn.Module:
    """`loss`, which computes with `model`, on this worker's device and in step with the others."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    loss.to(device)
    if world() == 1:
        return loss
    if not sharded:
        return DistributedDataParallel(loss, device_ids=[device] if device.type == "cuda" else None)
    for block in model.encoder.blocks:
        fully_shard(block)
    fully_shard(loss)
    return loss


def whole(model: Teacher) -> Teacher:
    """The model with all of its weights; itself where it has them. All workers must call it."""
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return model
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    copy = Teacher(model.config, n_rows=model.n_rows).to(model.encoder.content_VC.device)
    copy.load_state_dict(state)
    return copy


def states(model: Teacher, optimizers: Optimizers) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Weights, and each optimizer's state, whole: at worker 0. All workers must call it."""
    weights = get_model_state_dict(model, options=WHOLE)
    moments = [get_optimizer_state_dict(model, one, options=WHOLE) for one in optimizers]
    return weights, moments


def restore(
    model: Teacher,
    optimizers: Optimizers,
    weights: dict[str, Any],
    moments: Sequence[dict[str, Any]],
) -> None:
    """What `states` gave, given to every worker."""
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, weights, options=options)
    for optimizer, kept in zip(optimizers, moments, strict=True):
        set_optimizer_state_dict(model, optimizer, kept, options=options)


def share_of_all(n: Tensor) -> Tensor:
    """What weighs a worker's mean over `n` so that the mean over workers is that over all."""
    if world() == 1:
        return torch.ones((), device=n.device)
    total = n.float().clone()
    dist.all_reduce(total)
    return n * world() / total.clamp_min(1e-9)
