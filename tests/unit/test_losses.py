import pytest
import torch
import torch.nn.functional as F

from services.core import losses

N, V, D, K = 64, 50, 8, 10


@pytest.fixture(name="scores_NV")
def random_scores() -> torch.Tensor:
    scores = torch.randn(N, V, generator=torch.Generator().manual_seed(0))
    scores[:, 0] = -torch.inf
    return scores


def test_full_softmax_is_cross_entropy_and_so_are_its_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    targets_N = torch.randint(1, V, (300,), generator=generator)  # more than one block
    weights_N = torch.rand(300, generator=generator)
    seen_NL = torch.randint(0, V, (300, 7), generator=generator)
    seen_NL[:5, 0] = targets_N[:5]  # had again: no rival of itself
    results = []
    for fused in (True, False):
        generator.manual_seed(1)
        inputs = [torch.randn(*s, generator=generator) for s in ((300, D), (V, D), (V,))]
        hidden_ND, table_VD, bias_V = (x.requires_grad_() for x in inputs)
        if fused:
            loss = losses.full_softmax(
                hidden_ND, table_VD, bias_V, targets_N, weights_N, seen_NL=seen_NL
            )
        else:
            scores_NV = hidden_ND @ table_VD.T + bias_V
            out_NV = torch.zeros(300, V, dtype=torch.bool).scatter(1, seen_NL, True)
            out_NV = out_NV.scatter(1, targets_N[:, None], False)
            scores_NV = scores_NV.masked_fill(out_NV, -torch.inf)
            loss_N = F.cross_entropy(scores_NV[:, 1:], targets_N - 1, reduction="none")
            loss = (loss_N * weights_N).sum() / weights_N.sum()
        (3 * loss).backward()
        results.append([loss, hidden_ND.grad, table_VD.grad, bias_V.grad])
    torch.testing.assert_close(results[0], results[1])


def test_sampling_tends_to_the_full_softmax() -> None:
    """With the log q correction, the mean over many draws nears the exact loss."""
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(N, D, generator=generator)
    table_VD, bias_V = torch.randn(V, D, generator=generator), torch.zeros(V)
    q_V = torch.rand(V, generator=generator)
    q_V[0] = 0.0
    q_V /= q_V.sum()
    targets_N = torch.randint(1, V, (N,), generator=generator)
    exact = losses.full_softmax(hidden_ND, table_VD, bias_V, targets_N)
    sampled_S = torch.multinomial(q_V, 100_000, replacement=True, generator=generator)
    sampled = losses.sampled_softmax(hidden_ND, table_VD, bias_V, targets_N, sampled_S, q_V.log())
    torch.testing.assert_close(sampled, exact, rtol=0.02, atol=0.02)


def test_soft_labels_vanish_only_where_the_student_agrees(scores_NV: torch.Tensor) -> None:
    teacher_NK = scores_NV[:, 1 : K + 1].clone()
    agrees = losses.soft_labels(teacher_NK + 3.0, teacher_NK, temperature=2.0)
    torch.testing.assert_close(agrees, torch.tensor(0.0), atol=1e-6, rtol=0)
    assert losses.soft_labels(-teacher_NK, teacher_NK, temperature=2.0) > 0.1


def test_soft_labels_leave_masked_candidates_out(scores_NV: torch.Tensor) -> None:
    teacher_NK = scores_NV[:, 1 : K + 1].clone()
    teacher_NK[:, -1] = -torch.inf
    student_NK = (-teacher_NK).nan_to_num(posinf=100.0).requires_grad_()
    loss = losses.soft_labels(student_NK, teacher_NK, temperature=1.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert student_NK.grad is not None
    assert torch.isfinite(student_NK.grad).all()
    assert not student_NK.grad[:, -1].any()


def test_weights_choose_the_positions(scores_NV: torch.Tensor) -> None:
    teacher_NK, student_NK = scores_NV[:, 1:11], scores_NV[:, 11:21]
    weights_N = torch.zeros(N)
    weights_N[3] = 0.5
    torch.testing.assert_close(
        losses.soft_labels(student_NK, teacher_NK, temperature=1.0, weights_N=weights_N),
        losses.soft_labels(student_NK[3:4], teacher_NK[3:4], temperature=1.0),
    )
    none = losses.hidden_states(student_NK, teacher_NK, torch.zeros(N))
    assert none == 0.0
    assert losses.hidden_states(2 * teacher_NK, teacher_NK) == pytest.approx(0.0, abs=1e-6)
