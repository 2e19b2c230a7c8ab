"""Long iterations: a basis that is kept orthogonal only locally repeats eigenvalues, and this one must not."""

import numpy as np
import pytest
import torch

from analysis.curvature.basis import Basis
from analysis.curvature.density import lanczos_quadrature
from analysis.curvature.lanczos import lanczos
from bilora.seeds import generator_for
from tests.oracles.operators import Dense

VALUES = np.concatenate([[100.0, -60.0], np.linspace(-1, 0.9, 198)])
STEPS = 90


def largest(k):
    """The ``k`` eigenvalues of largest magnitude after ``STEPS`` Lanczos steps on a diagonal of ``VALUES``."""
    operator = Dense(VALUES)
    stream = torch.Generator().manual_seed(0)
    start = torch.randn(1, operator.size, generator=stream, dtype=torch.float64)
    settings = {"which": "magnitude", "tolerance": 1e-14, "max_products": STEPS, "max_basis": STEPS}
    return lanczos(operator, start, k, generator=stream, **settings).values


def of_the_density():
    """Nodes of one run of the density."""
    return lanczos_quadrature(Dense(VALUES), runs=1, steps=STEPS)[0][0]


def copies(values):
    """How many of ``values`` lie at each of the two outliers."""
    return [int((np.abs(values - outlier) < 1e-6).sum()) for outlier in VALUES[:2]]


@pytest.fixture
def local(monkeypatch):
    """Vectors are orthogonalised against the last six of the basis alone, as in plain Lanczos with some more care."""
    everything = Basis.products

    def products(basis, vector):
        found = everything(basis, vector)
        found[: max(0, basis.length - 6)] = 0
        return found

    monkeypatch.setattr(Basis, "products", products)


def test_each_eigenvalue_is_found_once():
    assert copies(largest(6)) == [1, 1]
    assert copies(of_the_density()) == [1, 1]
    np.testing.assert_allclose(largest(4)[2:], [-1, -1 + 1.9 / 197], rtol=1e-9)


def test_the_density_of_as_many_steps_as_entries_finds_every_eigenvalue():
    nodes, weights = lanczos_quadrature(Dense(VALUES), runs=1, steps=len(VALUES))
    np.testing.assert_allclose(nodes[0], np.sort(VALUES), atol=1e-9)
    start = torch.randn(len(VALUES), generator=generator_for("density", 0, 0)).double().numpy()
    np.testing.assert_allclose(weights[0], (start**2 / (start @ start))[np.argsort(VALUES)], atol=1e-9)


@pytest.mark.usefixtures("local")
def test_without_full_reorthogonalisation_eigenvalues_are_repeated():
    assert min(copies(largest(6))) > 1
    assert min(copies(of_the_density())) > 1
