"""Intruders against a dense singular value decomposition, and planted at known angles."""

import math

import numpy as np
import pytest
import torch

from analysis.core.factors import Factors
from analysis.subspace.intruders import all_intruders, intruder_dimensions
from bilora.errors import UserError


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(weight, update, k, threshold=0.5):
    weight = weight.double()
    U0, S0, _ = torch.linalg.svd(weight, full_matrices=False)
    U0 = U0[:, 1e-10 * S0[0] < S0]
    merged = weight + update.scale * update.B.double() @ update.A.double()
    U, S, _ = torch.linalg.svd(merged, full_matrices=False)
    cosines = (U0.T @ U[:, :k]).abs().max(dim=0).values
    return (cosines < threshold).numpy(), S[:k].numpy()


@pytest.mark.parametrize("shape", [(48, 48), (96, 32), (32, 96)])
@pytest.mark.parametrize("strength", [0.02, 0.1, 0.3, 2.0])
def test_as_by_dense_decompositions(shape, strength):
    m, n = shape
    weight = normal(m, n, seed=m + n) / math.sqrt(n)
    update = Factors(strength * normal(m, 4, seed=1), normal(4, n, seed=2) / math.sqrt(n), 2.0)
    found = intruder_dimensions(weight, update)
    expected, values = dense(weight, update, 10)
    np.testing.assert_array_equal(found.intruder, expected)
    np.testing.assert_allclose(found.singular_values, values, rtol=1e-9)
    assert not found.undecided.any()
    assert found.count == expected.sum()
    assert found.energy_share == pytest.approx(float((values**2)[expected].sum() / (values**2).sum()), rel=1e-9)


def test_float32_weights_are_decided_alike(monkeypatch):
    """Products in float32, as of large weights."""
    monkeypatch.setattr("analysis.subspace.intruders.SMALL", 0)
    weight = (normal(96, 32, seed=3) / 6).float()
    update = Factors(0.3 * normal(96, 4, seed=4), normal(4, 32, seed=5) / 6, 2.0)
    before = weight.clone()
    found = intruder_dimensions(weight, update)
    np.testing.assert_array_equal(found.intruder, dense(weight, update, 10)[0])
    assert torch.equal(weight, before)


def planted(directions, strength=50.0):
    """A weight with known singular vectors and an update that makes ``directions(U0)`` its strongest ones."""
    m = n = 40
    U0 = torch.linalg.qr(normal(m, m, seed=6)).Q
    V0 = torch.linalg.qr(normal(n, n, seed=7)).Q
    weight = U0 @ torch.diag(torch.linspace(4, 1, m, dtype=torch.float64)) @ V0.T
    B = directions(U0)
    A = torch.linalg.qr(normal(n, B.shape[1], seed=8)).Q.T
    falling = torch.arange(B.shape[1], 0, -1, dtype=torch.float64)
    return weight, Factors(B * (strength * falling), A, 1.0)


def test_a_direction_aligned_with_a_vector_from_the_middle_of_the_spectrum_is_none():
    weight, update = planted(lambda U0: U0[:, [20]])
    assert not intruder_dimensions(weight, update, k=1).intruder.any()


def test_an_even_mixture_is_new_from_five_vectors_on():
    """Of t vectors of W0 in equal parts every cosine is 1/√t: below 0.5 from t = 5 on."""
    for t in (2, 3, 5, 8):
        columns = torch.arange(10, 10 + t)
        weight, update = planted(lambda U0, c=columns, t=t: U0[:, c].sum(dim=1, keepdim=True) / math.sqrt(t))
        assert intruder_dimensions(weight, update, k=1).intruder.tolist() == [t >= 5], t


def test_an_angle_to_one_vector_decides():
    for angle, new in ((math.radians(55), False), (math.radians(65), True)):

        def direction(U0, angle=angle):
            rest = U0[:, 5:35].sum(dim=1, keepdim=True) / math.sqrt(30)
            return math.cos(angle) * U0[:, [2]] + math.sin(angle) * rest

        weight, update = planted(direction)
        assert intruder_dimensions(weight, update, k=1).intruder.tolist() == [new]


def test_outside_the_range_of_the_weight_a_direction_is_new():
    """Vectors that W0ᵀ maps to 0 are no left singular vectors of a singular value above 0."""
    weight = normal(60, 20, seed=9) / 4
    basis = torch.linalg.svd(weight, full_matrices=True).U
    update = Factors(80 * basis[:, [40]], normal(1, 20, seed=10), 1.0)
    found = intruder_dimensions(weight, update, k=1)
    assert found.intruder.tolist() == [True]
    assert found.energy_share == 1


def test_too_few_steps_are_undecided_and_not_counted():
    weight = normal(64, 64, seed=11) / 8
    update = Factors(0.02 * normal(64, 4, seed=12), normal(4, 64, seed=13) / 8, 2.0)
    found = intruder_dimensions(weight, update, max_steps=3)
    assert found.undecided.any()
    assert not (found.undecided & found.intruder).any()


def test_the_gauge_does_not_matter():
    weight = normal(48, 48, seed=14) / 7
    update = Factors(0.2 * normal(48, 4, seed=15), normal(4, 48, seed=16) / 7, 2.0)
    other = Factors(update.B / 5, 5 * update.A, 2.0)
    first, second = (intruder_dimensions(weight, f) for f in (update, other))
    np.testing.assert_array_equal(first.intruder, second.intruder)
    np.testing.assert_allclose(first.singular_values, second.singular_values, rtol=1e-9)


def test_a_zero_update_has_no_intruder_and_a_broken_one_no_answer():
    weight = normal(30, 30, seed=17)
    zero = Factors(torch.zeros(30, 2), torch.ones(2, 30), 1.0)
    assert intruder_dimensions(weight, zero).count == 0
    broken = Factors(torch.full((30, 2), math.nan), torch.ones(2, 30), 1.0)
    found = intruder_dimensions(weight, broken)
    assert found.undecided.all()
    assert math.isnan(found.energy_share)


def test_bad_settings_are_one_line():
    weight, update = normal(30, 20, seed=18), Factors(normal(30, 2, seed=19), normal(2, 20, seed=20), 1.0)
    with pytest.raises(UserError, match="choose from 1 to 19"):
        intruder_dimensions(weight, update, k=20)
    with pytest.raises(UserError, match="threshold is 0"):
        intruder_dimensions(weight, update, threshold=0)
    with pytest.raises(UserError, match="give those of one layer"):
        intruder_dimensions(weight.T, update)
    with pytest.raises(UserError, match="has no weight for b"):
        all_intruders({"a": weight}, {"b": update})
