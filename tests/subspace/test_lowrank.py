"""Low-rank parts of a gradient, against the singular value decomposition and against any competitor."""

import math

import pytest
import torch

from analysis.subspace.lowrank import LowRank, leading_part, leading_squared_norm


def gaussian(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (9, 9)])
@pytest.mark.parametrize("rank", [1, 4, 9, 20])
def test_truncation_is_the_singular_value_decomposition(shape: tuple[int, int], rank: int) -> None:
    G = gaussian(*shape, seed=sum(shape) + rank)
    left, singular, right = torch.linalg.svd(G, full_matrices=False)
    expected = (left[:, :rank] * singular[:rank]) @ right[:rank]
    part = leading_part(G, rank)
    torch.testing.assert_close(part.left @ part.right, expected, rtol=0, atol=1e-11)
    assert leading_squared_norm(G, rank) == pytest.approx(float(singular[:rank].square().sum()), rel=1e-12)
    assert part.squared_norm() == pytest.approx(float(singular[:rank].square().sum()), rel=1e-12)


def test_steep_spectrum_keeps_its_leading_sum() -> None:
    left, right = torch.linalg.qr(gaussian(20, 20, seed=1)).Q, torch.linalg.qr(gaussian(20, 20, seed=2)).Q
    singular = 10.0 ** -torch.arange(20, dtype=torch.float64)
    G = (left * singular) @ right
    assert leading_squared_norm(G, 5) == pytest.approx(float(singular[:5].square().sum()), rel=1e-14)


def test_no_low_rank_perturbation_in_the_ball_ascends_more() -> None:
    """rho·G_r/‖G_r‖ beats random rank-r competitors and the direction of U_r·V_rᵀ scaled into the ball."""
    G, rank, rho = gaussian(15, 10, seed=3), 3, 0.7
    best = leading_part(G, rank)
    attained = rho * float((G * (best.left @ best.right)).sum()) / math.sqrt(best.squared_norm())
    assert attained == pytest.approx(rho * math.sqrt(leading_squared_norm(G, rank)), rel=1e-12)
    left, _, right = torch.linalg.svd(G, full_matrices=False)
    competitors = [left[:, :rank] @ right[:rank]]
    competitors += [gaussian(15, rank, seed=10 + i) @ gaussian(rank, 10, seed=50 + i) for i in range(30)]
    competitors += [best.left @ best.right + 0.1 * c for c in competitors[1:]]
    for c in competitors:
        truncated = leading_part(c, rank)
        c = truncated.left @ truncated.right
        assert rho * float((G * c).sum() / torch.linalg.matrix_norm(c)) < attained


def test_the_ky_fan_point_lies_outside_the_ball() -> None:
    left, _, right = torch.linalg.svd(gaussian(15, 10, seed=4), full_matrices=False)
    assert float(torch.linalg.matrix_norm(left[:, :4] @ right[:4])) == pytest.approx(2.0)


def test_non_finite_gradient_gives_nan() -> None:
    G = gaussian(6, 5, seed=5)
    G[0, 0] = math.inf
    assert math.isnan(leading_squared_norm(G, 2))
    part = leading_part(G, 2)
    assert part.left.shape[0] == 6
    assert part.right.shape[1] == 5
    assert torch.isnan(part.left).all()


def test_factored_norm() -> None:
    left, right = gaussian(8, 2, seed=6), gaussian(2, 9, seed=7)
    assert LowRank(left, right).squared_norm() == pytest.approx(float((left @ right).square().sum()), rel=1e-12)
