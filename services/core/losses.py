"""Pure ranking and distillation losses: tensors in, a scalar out.

Shapes: N positions, V catalog rows, K candidates, S sampled rows, D width, T teacher width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def full_softmax(scores_NV: Tensor, targets_N: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy over the whole catalog, mean over positions."""
    if label_smoothing:
        # The padding row scores -inf, which label smoothing would turn into an infinite loss.
        return F.cross_entropy(scores_NV[:, 1:], targets_N - 1, label_smoothing=label_smoothing)
    return F.cross_entropy(scores_NV, targets_N)


def sampled_softmax(
    hidden_ND: Tensor,
    table_VD: Tensor,
    bias_V: Tensor,
    targets_N: Tensor,
    sampled_S: Tensor,
    log_q_V: Tensor,
) -> Tensor:
    """Cross-entropy over the target and S rows shared by all positions, drawn from q.

    Each logit is corrected by -log(S q) (Bengio & Senécal 2008), so that the gradient tends to the
    full softmax's as S grows; a sampled row that is the position's own target counts once.
    """
    targets_ND = table_VD[targets_N]
    own_N = (hidden_ND * targets_ND).sum(-1) + bias_V[targets_N]
    others_NS = hidden_ND @ table_VD[sampled_S].T + bias_V[sampled_S]
    log_expected_V = log_q_V + torch.log(torch.tensor(float(len(sampled_S))))
    others_NS = others_NS - log_expected_V[sampled_S]
    others_NS = others_NS.masked_fill(sampled_S == targets_N[:, None], -torch.inf)
    logits = torch.cat([own_N[:, None], others_NS], dim=1)
    return F.cross_entropy(logits, torch.zeros_like(targets_N))


def soft_labels(
    scores_NK: Tensor, teacher_NK: Tensor, *, temperature: float, weights_N: Tensor | None = None
) -> Tensor:
    """KL(teacher || student) over K candidates at a temperature, times temperature squared.

    Hinton et al. 2015. Candidates at -inf in the teacher's row are left out. `weights_N` weighs
    the positions (the mean is over their sum).
    """
    out = torch.isinf(teacher_NK)
    p_NK = torch.softmax(teacher_NK / temperature, -1)
    log_p_NK = torch.log_softmax(teacher_NK / temperature, -1).masked_fill(out, 0.0)
    scores_NK = scores_NK.masked_fill(out, -torch.inf) / temperature
    log_q_NK = torch.log_softmax(scores_NK, -1).masked_fill(out, 0.0)
    kl_N = (p_NK * (log_p_NK - log_q_NK)).sum(-1) * temperature**2
    return _mean(kl_N, weights_N)


def hidden_states(guess_NT: Tensor, teacher_NT: Tensor, weights_N: Tensor | None = None) -> Tensor:
    """1 - cosine between the projected and the teacher's hidden state: scale doesn't matter."""
    return _mean(1.0 - F.cosine_similarity(guess_NT, teacher_NT, dim=-1), weights_N)


def _mean(loss_N: Tensor, weights_N: Tensor | None) -> Tensor:
    if weights_N is None:
        return loss_N.mean()
    return (loss_N * weights_N).sum() / weights_N.sum().clamp_min(1e-9)
