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
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from services.core.models.teacher import Teacher

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
Optimizers = Sequence[torch.optim.Optimizer]


def world() -> int:
    """How many workers there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def prepared(
    loss: nn.Module,
    model: Teacher,
    *,
    device: torch.device,
    sharded: bool,
    rows_apart: bool = False,
) -> nn.Module:
    """`loss`, which computes with `model`, on this worker's device and in step with the others.

    sharded: each worker keeps a part of every weight, and has them whole while it computes.
    rows_apart: but of the item table, of which `loss` asks for rows alone, it never has more than
    its part and those rows.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    loss.to(device)
    if world() == 1:
        return loss
    if not sharded:
        return DistributedDataParallel(loss, device_ids=[device] if device.type == "cuda" else None)
    mesh = init_device_mesh(device.type, (world(),))
    apart: set[nn.Parameter] = set()
    if rows_apart:
        model.encoder.item_id = RowsApart(model.encoder.item_id, mesh)
        apart.update(model.encoder.item_id.parameters())
    for block in model.encoder.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(loss, mesh=mesh, ignored_params=apart)
    return loss


class RowsApart(nn.Embedding):
    """An embedding whose rows are dealt out to the workers, each of which asks the others for the
    rows that it needs: what travels goes with those, not with the size of the table.

    All workers must call it, and go backward through it, at the same time.
    """

    def __init__(self, table: nn.Embedding, mesh: DeviceMesh) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = table.num_embeddings, table.embedding_dim
        self.padding_idx = table.padding_idx
        self.weight = nn.Parameter(distribute_tensor(table.weight.detach(), mesh, [Shard(0)]))

    def forward(self, rows_R: Tensor) -> Tensor:
        """table_RD of ascending rows."""
        weight = self.weight
        assert isinstance(weight, DTensor)
        each = -(-self.num_embeddings // world())  # as DTensor deals them out
        ends = torch.arange(1, world() + 1, device=rows_R.device) * each
        until = torch.searchsorted(rows_R, ends)
        wanted = torch.diff(until, prepend=until.new_zeros(1))
        asked = torch.empty_like(wanted)
        dist.all_to_all_single(asked, wanted)
        sizes = wanted.tolist(), asked.tolist()
        rows_A = rows_R.new_empty(sum(sizes[1]))
        dist.all_to_all_single(rows_A, rows_R, sizes[1], sizes[0])
        own_A = rows_A - dist.get_rank() * each
        table_RD: Tensor = _Exchange.apply(weight.to_local()[own_A], *sizes)
        return table_RD


class _Exchange(torch.autograd.Function):
    """Rows to those who asked; backward, their gradients to the rows' owner, as a mean over the
    workers, as FSDP's are."""

    @staticmethod
    def forward(ctx: Any, rows_AD: Tensor, wanted: list[int], asked: list[int]) -> Tensor:
        ctx.sizes = wanted, asked
        rows_RD = rows_AD.new_empty(sum(wanted), rows_AD.shape[1])
        dist.all_to_all_single(rows_RD, rows_AD.contiguous(), wanted, asked)
        return rows_RD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted, asked = ctx.sizes
        grad_AD = grads[0].new_empty(sum(asked), grads[0].shape[1])
        dist.all_to_all_single(grad_AD, grads[0].contiguous(), asked, wanted)
        return grad_AD / world(), None, None


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
