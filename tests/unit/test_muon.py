import torch
from torch import nn

from ray_jobs.muon import Muon, orthogonal


def test_singular_values_become_alike() -> None:
    torch.manual_seed(0)
    for shape in ((3, 16, 64), (3, 64, 16)):
        spread = torch.linalg.svdvals(
            orthogonal(torch.randn(shape) @ torch.randn(shape[2], shape[2]))
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


def test_matrices_of_one_shape_move_as_each_would_alone() -> None:
    torch.manual_seed(0)
    shapes = [(8, 8), (16, 8), (8, 8)]
    starts, slopes = ([torch.randn(shape) for shape in shapes] for _ in range(2))
    ends = []
    for apart in (False, True):
        matrices = [nn.Parameter(start.clone()) for start in starts]
        groups = [[matrix] for matrix in matrices] if apart else [matrices]
        for matrix, slope in zip(matrices, slopes, strict=True):
            matrix.grad = slope.clone()
        for group in groups:
            Muon(group, lr=0.1, weight_decay=0.1).step()
        ends.append([matrix.detach() for matrix in matrices])
    torch.testing.assert_close(*ends)
    assert all((a - b).abs().max() > 0.01 for a, b in zip(ends[0], starts, strict=True))
