import math

import pytest
import torch

from analysis.core import Objective, WeightSpace
from analysis.curvature.diagonal import diagonal, rademacher_diagonal
from bilora.errors import UserError
from tests.oracles import tiny
from tests.oracles.operators import Dense

EXAMPLES = tiny.examples()
BATCHES = [tiny.padded(part) for part in tiny.split(EXAMPLES)]
BUILD = {"full": WeightSpace.full, "lora": WeightSpace.lora}


def symmetric(size):
    half = torch.randn(size, size, generator=tiny.generator(0), dtype=torch.float64)
    return half + half.T


def test_the_mean_over_seeds_is_the_diagonal():
    H = symmetric(30)
    means = torch.stack([rademacher_diagonal(Dense(H), samples=8, seed=seed)[0] for seed in range(300)])
    error = means.std(dim=0) / math.sqrt(300)
    assert bool(((means.mean(dim=0) - H.diagonal()).abs() <= 4 * error).all())


@pytest.mark.parametrize("samples", [2, 9])
def test_the_reported_variance_is_that_of_the_off_diagonal(samples):
    H = symmetric(30)
    errors = torch.stack([rademacher_diagonal(Dense(H), samples=samples, seed=seed)[1] for seed in range(600)])
    off_diagonal = H.square().sum(dim=1) - H.diagonal().square()
    torch.testing.assert_close(errors.square().mean(dim=0), off_diagonal / samples, rtol=0.3, atol=0)
    torch.testing.assert_close(errors.square().mean(dim=0).sum(), off_diagonal.sum() / samples, rtol=0.05, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_diagonal_matrix_of_a_million_entries_is_found_exactly(dtype):
    expected = torch.linspace(-3, 7, 1_000_000, dtype=dtype)
    mean, error = rademacher_diagonal(Dense(expected, dtype), samples=6)
    assert torch.equal(mean, expected.double())
    assert not error.any()


def test_more_samples_begin_with_those_of_fewer_and_a_seed_names_them():
    H = symmetric(30)
    seen = []

    class Recording(Dense):
        def matmat(self, rows):
            seen.append(rows.clone())
            return super().matmat(rows)

    def rows_of(**settings):
        seen.clear()
        rademacher_diagonal(Recording(H), **settings)
        return torch.cat(seen)

    short, long, other = rows_of(samples=5), rows_of(samples=11), rows_of(samples=5, seed=1)
    assert torch.equal(short, long[:5])
    assert bool((short != other).any())
    assert bool((long.abs() == 1).all())
    assert len(long) == 11


@pytest.mark.parametrize("name", BUILD)
def test_the_diagonal_of_a_model_is_that_of_its_dense_hessian(name):
    model = tiny.with_lora(tiny.bert())
    exact = tiny.ClassifierOracle(tiny.bert(), tiny.factors_of(model), EXAMPLES, name).hessian()
    space, calls = BUILD[name](model), []
    found = diagonal(Objective(BATCHES), space, samples=48, watch=lambda *call: calls.append(call[:2]))
    assert found.values.keys() == found.standard_error.keys() == space.parameters.keys()
    assert all(found.values[key].shape == p.shape for key, p in space.parameters.items())
    value, error = space.flat(found.values), space.flat(found.standard_error)
    off_diagonal = (exact.square().sum(dim=1) - exact.diagonal().square()).clamp(min=0)
    # The true standard error of each of several hundred entries: 5 of them cover all but one in a million.
    allowed = 5 * (off_diagonal / 48).sqrt() + 1e-12
    assert bool(((value - exact.diagonal()).abs() <= allowed).all())
    assert float(error.square().sum()) == pytest.approx(float(off_diagonal.sum()) / 48, rel=0.5)
    assert (found.products, found.space, found.split, found.label) == (48, name, "validation", "")
    assert calls[-1] == (48, 48)


def test_the_gauss_newton_matrix_has_a_diagonal_without_negative_entries():
    # One weight a layer output: the sum of a row's off-diagonal part vanishes only in the mean over samples.
    space = WeightSpace.lora(tiny.with_lora(tiny.bert()))
    found = diagonal(Objective(BATCHES), space, samples=64, curvature="ggn")
    value, error = space.flat(found.values), space.flat(found.standard_error)
    assert bool((value >= -5 * error - 1e-12).all())
    assert found.label == "ggn"


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"samples": 1}, "samples"), ({"seed": -1}, "seed"), ({"curvature": "fisher"}, "choose hessian or ggn")],
)
def test_bad_settings_are_one_line(settings, message):
    space = WeightSpace.all(tiny.Quadratic([1.0, 2.0]))
    with pytest.raises(UserError, match=message) as caught:
        diagonal(Objective([{"x": torch.zeros(2, 1)}]), space, **settings)
    assert "\n" not in str(caught.value)
