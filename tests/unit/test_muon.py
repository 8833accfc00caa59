import torch
from torch import nn

from ray_jobs.muon import Muon, orthogonal


def test_singular_values_become_alike() -> None:
    torch.manual_seed(0)
    for shape in ((16, 64), (64, 16)):
        spread = torch.linalg.svdvals(
            orthogonal(torch.randn(shape) @ torch.randn(shape[1], shape[1]))
        )
        assert 0.5 < spread.min() < spread.max() < 1.5


def test_it_is_torchs_in_single_precision() -> None:
    torch.manual_seed(0)
    start, slope = torch.randn(32, 8), torch.randn(5, 32, 8)
    ends = []
    for make in (Muon, torch.optim.Muon):
        matrix = nn.Parameter(start.clone())
        optimizer = make([matrix], lr=0.02, weight_decay=0.1)
        for gradient in slope:
            matrix.grad = gradient.clone()
            optimizer.step()
        ends.append(matrix.detach())
    torch.testing.assert_close(*ends, atol=0.01, rtol=0.0)  # bfloat16 has 3 digits
    assert (ends[0] - start).abs().max() > 0.03
