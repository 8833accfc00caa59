import numpy as np
import pytest
import torch

from services.core.metrics import MISS, Prequential, hr_at, mrr, ndcg_at, ranks_of


def test_ranks_skip_seen_items_padding_and_what_cannot_be_ranked() -> None:
    scores_NV = torch.tensor([[9.0, 5.0, 4.0, 3.0], [9.0, 5.0, 4.0, 3.0], [9.0, 1.0, 1.0, 1.0]])
    seen_NV = torch.zeros(3, 4, dtype=torch.bool)
    targets_N = torch.tensor([3, 3, 0])
    seen_NV[1, 1] = seen_NV[1, 3] = True  # the target itself is never masked
    assert ranks_of(scores_NV, targets_N, seen_NV=seen_NV).tolist() == [3, 2, MISS]


def test_a_constant_score_ranks_in_the_middle() -> None:
    scores_NV = torch.zeros(5, 102)
    assert (ranks_of(scores_NV, torch.arange(1, 6)) == 51).all()


def test_scores_that_are_not_numbers_rank_nowhere() -> None:
    scores_NV = torch.tensor([[-torch.inf, 0.1, 0.2], [-torch.inf, torch.nan, 0.2]])
    assert ranks_of(scores_NV, torch.tensor([2, 2])).tolist() == [1, MISS]


def test_known_values() -> None:
    ranks = np.array([1, 2, 11, MISS])
    assert hr_at(ranks, 10) == 0.5
    assert ndcg_at(ranks, 10) == pytest.approx((1 + 1 / np.log2(3)) / 4)
    assert mrr(ranks) == pytest.approx((1 + 1 / 2 + 1 / 11) / 4)
    assert hr_at(ranks[:0], 10) == ndcg_at(ranks[:0], 10) == mrr(ranks[:0]) == 0.0


def test_windows_end_and_the_stream_goes_on() -> None:
    quality = Prequential()
    quality.add({"student": np.array([1, 50]), "teacher": np.array([1, 1])})
    quality.start_window()
    quality.add({"student": np.array([MISS]), "teacher": np.array([1])})
    again = Prequential.from_state(quality.state())
    for metrics in (quality.metrics(), again.metrics()):
        assert metrics["window.events"] == 1
        assert metrics["stream.events"] == 3
        assert metrics["window.student.hr@10"] == 0.0
        assert metrics["stream.student.hr@10"] == pytest.approx(1 / 3)
        assert metrics["stream.teacher.ndcg@10"] == 1.0


def test_rankers_are_scored_on_the_same_events() -> None:
    with pytest.raises(ValueError, match="different numbers"):
        Prequential().add({"student": np.array([1]), "teacher": np.array([1, 2])})
