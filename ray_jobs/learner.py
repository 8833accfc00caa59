"""What and how the student learns from one micro-batch. Pure of I/O.

    loss = hard * CE(served scores, what happened)
         + trust * ( soft * T^2 * KL(teacher || tower) + hidden * (1 - cos(projection, teacher)) )

Hinton et al. 2015 (soft labels), Romero et al. 2015 (hidden states). `trust` (0..1) is what the
teacher still deserves. A weight of 0 switches its term off.

Shapes: N targets, D student width, T teacher width, K candidates, V catalog rows.
"""

import inspect
import logging
from typing import Any

import torch
from torch import Tensor

from ray_jobs.labels import Items, Labels
from ray_jobs.microbatch import COLD, MicroBatch
from ray_jobs.peers import ALONE, Peers
from ray_jobs.ranking import encode
from ray_jobs.recipes import DistillConfig
from services.core import losses
from services.core.models.student import Student

logger = logging.getLogger(__name__)

CONTENT_SHARE = 0.1  # of its usual spread, where items start from a teacher's


class Adam(torch.optim.AdamW):
    """torch's, without what lets torch.compile trace it: at the first step that imports the
    compiler, a fifth of what a worker that starts imports."""

    add_param_group: Any = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad: Any = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    step: Any = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))


def adam(student: Student, config: DistillConfig) -> Adam:
    return Adam(
        student.parameters(),
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        betas=(0.9, 0.98),
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


@torch.no_grad()
def start_from(student: Student, items: Items) -> None:
    """Give a new student the teacher's view of the items: the leading principal components of its
    item table, scaled as ours, and its bias.

    Measured on ML-1M (1,138 steps of 400 targets, hard labels only, then 20k events of the stream):
    NDCG@10 .133 frozen and .138 learning on, against .119 and .122 from random embeddings.
    """
    table_VT = torch.from_numpy(items.table_VT)[1:]
    center = table_VT.mean(0) if student.config.ordered else 0.0
    u_VK, spread_K, _ = torch.linalg.svd(table_VT - center, full_matrices=False)
    dim = min(student.config.dim, u_VK.shape[1])
    table_VD = u_VK[:, :dim] * spread_K[:dim]
    # A set is no more than its items: with these the student's logits are the teacher's, its
    # hidden state having a norm of sqrt(D) where the teacher's has sqrt(T).
    scale = (table_VT.shape[1] / student.config.dim) ** 0.5
    if student.config.ordered:
        scale = float(student.config.dim**-0.5 / table_VD.std(correction=0).clamp_min(1e-9))
    embedding = student.encoder.item_id.weight
    embedding[1:, :dim] = table_VD * scale
    student.encoder.content.weight.mul_(CONTENT_SHARE)  # the table has it already
    student.bias_V.copy_(torch.from_numpy(items.bias_V))
    if student.encoder.weight_V is not None and items.weight_V is not None:
        student.encoder.weight_V.copy_(torch.from_numpy(items.weight_V))


def loss_terms(
    student: Student,
    batch: MicroBatch,
    labels: Labels | None,
    *,
    config: DistillConfig,
    weights_N: Tensor,
    trust: float,
) -> dict[str, Tensor]:
    """The weighted terms whose sum is learned; only those that are switched on.

    `weights_N` weighs the targets. A user's first event has no state that predicts it and is
    not learned, only remembered.
    """
    warm = batch.at_N != COLD  # for arrays: torch warns of labels, which Ray gives read-only
    warm_N = torch.from_numpy(warm)
    weights_N = weights_N[warm_N]
    table_VD = student.encoder.item_table()
    hidden_ND = encode(student, batch, table_VD=table_VD)[warm_N]
    terms: dict[str, Tensor] = {}
    if config.hard_weight:
        target_N = torch.from_numpy(batch.target_N[warm])
        terms["hard"] = config.hard_weight * losses.full_softmax(
            hidden_ND,
            table_VD,
            student.bias_V,
            target_N,
            weights_N,
            seen_NL=batch.seen_rows()[warm_N] if config.mask_seen else None,
        )
    if labels is None or trust == 0:
        return terms
    if config.soft_weight:
        rows_NK = torch.from_numpy(labels.rows_NK[warm]).long()
        logits_NK = torch.from_numpy(labels.logits_NK[warm]).float()
        terms["soft"] = (trust * config.soft_weight) * losses.soft_labels(
            student.soft_scores(hidden_ND, rows_NK, table_VD=table_VD, tower=config.soft_tower),
            logits_NK,
            temperature=config.temperature,
            weights_N=weights_N,
        )
    if config.hidden_weight:
        hidden_NT = torch.from_numpy(labels.hidden_NT[warm]).float()
        terms["hidden"] = (trust * config.hidden_weight) * losses.hidden_states(
            student.teacher_hidden(hidden_ND), hidden_NT, weights_N
        )
    return terms


def learn(
    student: Student,
    optimizer: torch.optim.Optimizer,
    batch: MicroBatch,
    labels: Labels | None,
    *,
    config: DistillConfig,
    weights_N: Tensor,
    trust: float,
    peers: Peers = ALONE,
) -> dict[str, float]:
    """One step; returns the terms of its loss (none where the batch has nothing to learn).

    None is taken where the gradient is not finite: the student would never be so again.
    """
    weight = float(weights_N[torch.from_numpy(batch.at_N != COLD)].sum())
    terms: dict[str, Tensor] = {}
    student.train()
    optimizer.zero_grad(set_to_none=True)
    if weight:
        terms = loss_terms(student, batch, labels, config=config, weights_N=weights_N, trust=trust)
        sum(terms.values(), torch.zeros(())).backward()
    if not peers.average(student, weight):
        return {}
    norm = torch.nn.utils.clip_grad_norm_(student.parameters(), config.clip_norm)
    if norm.isfinite():
        optimizer.step()
    else:
        logger.error("a micro-batch is not learned, its gradient is not finite: loss %s", terms)
    return {name: term.item() for name, term in terms.items()}


def trust_in(
    *, age_events: int, half_life_events: float, teacher_ndcg: float, student_ndcg: float
) -> float:
    """How much a teacher deserves: halves with age, falls once the student has overtaken it.

    A teacher that is as good as the student, or whose quality is not known yet, loses by age
    only; one at half the student's NDCG counts (1/2)^2, garbage next to nothing.
    """
    fresh = 0.5 ** (age_events / half_life_events)
    able = 1.0 if student_ndcg <= 0 else min(teacher_ndcg / student_ndcg, 1.0) ** 2
    return float(fresh * able)
