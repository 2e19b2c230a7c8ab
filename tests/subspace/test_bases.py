"""Bases and angles of subspaces, against planted angles and chance."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from analysis.subspace.bases import overlap, principal_angles
from bilora.adapters.bases import column_basis, row_basis


def gaussian(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(m: int, angles: list[float], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two m×k matrices whose column spaces have the given principal angles, in arbitrary coordinates."""
    k = len(angles)
    frame = torch.linalg.qr(gaussian(m, 2 * k, seed=seed)).Q
    a = torch.tensor(angles, dtype=torch.float64)
    first, second = frame[:, :k], frame[:, :k] * a.cos() + frame[:, k:] * a.sin()
    return first @ gaussian(k, k, seed=seed + 1), second @ gaussian(k, k, seed=seed + 2)


@pytest.mark.parametrize("angles", [[0.3, 0.7, 1.2], [0.0, 0.0, 0.0], [math.pi / 2] * 3, [1e-6, 1e-6, 1e-6]])
def test_planted_principal_angles(angles: list[float]) -> None:
    first, second = planted(40, angles, seed=0)
    U, V = column_basis(first), column_basis(second)
    assert overlap(U, V) == pytest.approx(np.mean(np.cos(angles) ** 2), abs=1e-12)
    assert principal_angles(U, V) == pytest.approx(angles, abs=1e-11)


def test_different_dimensions_against_scipy() -> None:
    first, second = gaussian(30, 3, seed=1), gaussian(30, 7, seed=2)
    theirs = scipy.linalg.subspace_angles(first.numpy(), second.numpy())
    for pair in ((first, second), (second, first)):
        assert principal_angles(*map(column_basis, pair)) == pytest.approx(theirs[::-1], abs=1e-12)
    cosines = np.cos(theirs)
    assert overlap(column_basis(first), column_basis(second)) == pytest.approx((cosines**2).sum() / 3, rel=1e-12)
    contained = torch.cat([first @ gaussian(3, 3, seed=3), second], dim=1)
    assert overlap(column_basis(first), column_basis(contained)) == pytest.approx(1.0, abs=1e-12)


def test_chance_level_of_random_subspaces() -> None:
    m, p, q, trials = 24, 3, 6, 300
    values = [
        overlap(column_basis(gaussian(m, p, seed=2 * i)), column_basis(gaussian(m, q, seed=2 * i + 1)))
        for i in range(trials)
    ]
    error = np.std(values, ddof=1) / math.sqrt(trials)
    assert abs(np.mean(values) - q / m) < 4 * error
    assert error < 0.01


def test_bases_are_orthonormal_and_span() -> None:
    A = gaussian(4, 50, seed=5).float()
    V = row_basis(A)
    torch.testing.assert_close(V.mT @ V, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(A.double() @ V @ V.mT, A.double(), rtol=0, atol=1e-12)


def test_rank_deficient_factors() -> None:
    B = gaussian(20, 3, seed=6)
    doubled = torch.cat([B, B @ gaussian(3, 2, seed=7)], dim=1)
    assert column_basis(doubled).shape == (20, 3)
    assert column_basis(doubled.float()).shape == (20, 3)
    assert column_basis(torch.zeros(20, 8)).shape == (20, 0)
    assert math.isnan(overlap(column_basis(torch.zeros(20, 8)), column_basis(B)))
    assert principal_angles(column_basis(torch.zeros(20, 8)), column_basis(B)) == ()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_factors_stay_visible(bad: float) -> None:
    B = gaussian(20, 3, seed=8)
    broken = B.clone()
    broken[4, 1] = bad
    assert math.isnan(overlap(column_basis(broken), column_basis(B)))
    assert principal_angles(column_basis(broken), column_basis(B)) == ()
