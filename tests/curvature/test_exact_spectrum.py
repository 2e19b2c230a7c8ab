"""Eigenvalues against numpy's of dense float64 matrices that are formed without the project's code."""

from functools import cache

import numpy as np
import pytest
import torch

from analysis.core import Objective, WeightSpace, dot, gaussian, norm
from analysis.curvature import top_eigenvalues
from bilora.errors import UserError
from tests.oracles import modules, tiny
from tests.oracles.dense import DenseOracle

EXAMPLES = tiny.examples((3, 9, 5, 7, 4, 6, 8))
BATCHES = [tiny.padded(part) for part in tiny.split(EXAMPLES, (5, 2))]
NOTHING = [{"x": torch.zeros(2, 1)}]
EXACT = {"tolerance": 1e-8, "max_products": 400}
INDEFINITE = [-9.0, -4.0, *np.linspace(-1, 1, 40), 3.0, 7.0, 12.0]


def ranked(values, k, which):
    """The ``k`` of ``values`` that are asked for, in the order of the answer."""
    rising = np.sort(values)
    both = np.stack([rising[::-1], rising], axis=1).flatten()  # in turn, the largest first
    return {
        "both": both,
        "magnitude": rising[np.argsort(-np.abs(rising), kind="stable")],
        "largest": rising[::-1],
        "smallest": rising,
    }[which][:k]


@cache
def bert(name):
    """(space, matrix → its eigenvalues) of the adapted BERT."""
    model = tiny.with_lora(tiny.bert())
    oracle = getattr(DenseOracle, name)(tiny.bert(), tiny.factors_of(model), tiny.padded(EXAMPLES))
    matrices = {"hessian": oracle.hessian(), "ggn": oracle.gauss_newton()}
    values = {curvature: np.linalg.eigvalsh(matrix.numpy()) for curvature, matrix in matrices.items()}
    return getattr(WeightSpace, name)(model), values


def quadratic(spectrum, k, *, slope=None, **settings):
    """(model of that spectrum, what is found of it)."""
    model = tiny.Quadratic(spectrum, slope)
    return model, top_eigenvalues(Objective(NOTHING), WeightSpace.all(model), k, **{**EXACT, **settings})


@pytest.mark.parametrize("name", ["full", "lora"])
@pytest.mark.parametrize("which", ["magnitude", "largest", "smallest", "both"])
def test_eigenvalues_of_the_hessian_are_numpys(name, which):
    space, dense = bert(name)
    found = top_eigenvalues(Objective(BATCHES), space, 5, which=which, **EXACT)
    assert found.converged.all()
    np.testing.assert_allclose(found.values, ranked(dense["hessian"], 5, which), rtol=1e-10)


@pytest.mark.parametrize("name", ["full", "lora"])
@pytest.mark.parametrize("which", ["magnitude", "largest"])
def test_eigenvalues_of_the_gauss_newton_matrix_are_numpys(name, which):
    space, dense = bert(name)
    found = top_eigenvalues(Objective(BATCHES), space, 5, which=which, curvature="ggn", **EXACT)
    assert found.converged.all()
    np.testing.assert_allclose(found.values, ranked(dense["ggn"], 5, which), rtol=1e-10)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("which", ["magnitude", "largest", "smallest", "both"])
@pytest.mark.parametrize("start", ["gradient", "random"])
def test_any_number_of_eigenvalues(k, which, start):
    _, found = quadratic(INDEFINITE, k, which=which, start=start)
    assert len(found.values) == len(found.residuals) == len(found.converged) == k
    assert found.converged.all()
    np.testing.assert_allclose(found.values, ranked(INDEFINITE, k, which), rtol=1e-10)


def test_a_restarted_basis_reaches_the_same_eigenvalues():
    space, dense = bert("lora")
    settings = {**EXACT, "max_products": 2000, "max_basis": 12}
    for which in ("magnitude", "largest", "smallest", "both"):
        found = top_eigenvalues(Objective(BATCHES), space, 3, which=which, **settings)
        assert found.products > 12
        assert found.converged.all()
        np.testing.assert_allclose(found.values, ranked(dense["hessian"], 3, which), rtol=1e-10)


def test_blocks_reach_the_same_eigenvalues():
    space, dense = bert("lora")
    found = top_eigenvalues(Objective(BATCHES), space, 4, block=2, **EXACT)
    assert found.converged.all()
    np.testing.assert_allclose(found.values, ranked(dense["hessian"], 4, "magnitude"), rtol=1e-10)


def test_a_block_finds_every_copy_of_a_triple_eigenvalue():
    # The Krylov space of one vector holds one direction of the triple eigenspace, and does not close soon.
    spectrum = [5.0] * 3 + np.linspace(-1, 4, 60).tolist()
    model, found = quadratic(spectrum, 4, block=3, vectors=True)
    assert found.converged.all()
    np.testing.assert_allclose(found.values, [5, 5, 5, 4], rtol=1e-10)
    triple = torch.stack([vector["theta"].flatten() for vector in found.vectors[:3]]) @ model.Q[:, :3]
    torch.testing.assert_close(triple @ triple.T, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-7)


@pytest.mark.parametrize("block", [1, 2, 4])
def test_multiple_eigenvalues_of_few_different_values(block):
    _, found = quadratic([5.0] * 4 + [-3.0] * 2 + [1.0] * 30, 7, block=block)
    assert found.converged.all()
    np.testing.assert_allclose(found.values, [5, 5, 5, 5, -3, -3, 1], rtol=1e-10)


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("which", ["magnitude", "largest"])
def test_eigenvalues_that_differ_by_little_are_told_apart(block, which):
    cluster = [10 - 1e-4 * i for i in range(4)]
    _, found = quadratic([*np.linspace(-4, 5, 80), *cluster], 4, which=which, block=block)
    assert found.converged.all()
    np.testing.assert_allclose(found.values, cluster, rtol=1e-10)


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_vectors_are_orthonormal_eigenvectors(curvature):
    model = tiny.with_lora(tiny.bert())
    oracle = DenseOracle.lora(tiny.bert(), tiny.factors_of(model), tiny.padded(EXAMPLES))
    H = oracle.hessian() if curvature == "hessian" else oracle.gauss_newton()
    space = WeightSpace.lora(model)
    found = top_eigenvalues(Objective(BATCHES), space, 4, curvature=curvature, tolerance=1e-4, vectors=True)
    assert found.converged.all()
    for i, vector in enumerate(found.vectors):
        assert list(vector) == list(space.parameters)
        assert norm(vector) == pytest.approx(1, rel=1e-12)
        assert all(abs(dot(vector, other)) <= 1e-12 for other in found.vectors[:i])
        v = torch.cat([part.flatten() for part in vector.values()])
        residual = float((H @ v - found.values[i] * v).norm()) / abs(found.values[i])
        assert residual <= 1e-4
        assert found.residuals[i] == pytest.approx(residual, rel=1e-3, abs=1e-12)


def test_the_vectors_of_a_point_nearby_save_products():
    space, _ = bert("full")
    objective, settings = Objective(BATCHES), {"k": 3, "tolerance": 1e-3, "max_products": 200}
    here = top_eigenvalues(objective, space, vectors=True, **settings)
    step = gaussian(space, 0, 0)
    with space.perturbed(step, 1e-4 / norm(step)):
        cold = top_eigenvalues(objective, space, **settings)
        warm = top_eigenvalues(objective, space, start=here.vectors, **settings)
    assert cold.converged.all()
    assert warm.converged.all()
    np.testing.assert_allclose(warm.values, cold.values, rtol=1e-3)
    assert warm.products < 0.7 * cold.products


def random_spectrum(stream, size, kind):
    """A spectrum that is hard in one of four ways."""
    if kind == "normal":
        return stream.normal(size=size)
    if kind == "crowded":
        return 1 + 0.01 * stream.random(size)
    if kind == "graded":
        return np.geomspace(1e-3, 1, size) * stream.choice([-1, 1], size)
    return stream.choice([-2.0, 1.0, 3.0], size) + 0.1 * (stream.random(size) > 0.7)


@pytest.mark.parametrize("kind", ["normal", "crowded", "graded", "repeated"])
def test_converged_is_never_claimed_of_a_pair_whose_true_residual_is_larger(kind):
    stream = np.random.default_rng(11)
    claims = []
    for _ in range(40):
        size, k, block = int(stream.integers(12, 60)), int(stream.integers(1, 5)), int(stream.integers(1, 4))
        tolerance = float(10 ** stream.uniform(-7, -1))
        model, found = quadratic(
            random_spectrum(stream, size, kind),
            k,
            tolerance=tolerance,
            max_products=int(stream.integers(k + block + 2, 24)),
            which=str(stream.choice(["magnitude", "largest", "smallest", "both"])),
            start=str(stream.choice(["gradient", "random"])),
            block=block,
            seed=int(stream.integers(1000)),
            vectors=True,
        )
        for value, residual, converged, vector in zip(
            found.values, found.residuals, found.converged, found.vectors, strict=True
        ):
            v = vector["theta"].detach().flatten()
            exact = float((model.H @ v - value * v).norm()) / abs(value)
            assert not converged or exact <= tolerance * (1 + 1e-6)
            assert residual >= exact * (1 - 1e-6) - 1e-13
            claims.append(bool(converged))
    assert any(claims)
    assert not all(claims)


@pytest.mark.parametrize("which", ["magnitude", "largest", "smallest", "both"])
def test_scipy_agrees(which):
    _, ours = quadratic(INDEFINITE, 3, which=which)
    _, theirs = quadratic(INDEFINITE, 3, which=which, backend="scipy")
    assert theirs.converged.all()
    np.testing.assert_allclose(theirs.values, ours.values, rtol=1e-10)


@pytest.mark.parametrize("backend", ["scipy", "pyhessian"])
@pytest.mark.parametrize("name", ["full", "lora"])
def test_the_other_backends_agree_on_a_model(name, backend):
    space, dense = bert(name)
    settings = {"tolerance": 1e-4, "max_products": 1500, "backend": backend}
    found = top_eigenvalues(Objective(BATCHES), space, 2, **settings)
    np.testing.assert_allclose(found.values, ranked(dense["hessian"], 2, "magnitude"), rtol=1e-3)


@pytest.mark.slow
def test_ten_million_float32_weights_leave_no_bias():
    size, top = 10_000_000, 3.0
    diagonal = torch.linspace(0.0, 1.0, size)
    diagonal[size // 3] = top
    space = WeightSpace.all(modules.Diagonal(diagonal))
    found = top_eigenvalues(Objective(NOTHING), space, 1, tolerance=1e-4, max_products=30, vectors=True)
    assert found.converged.all()
    assert found.values[0] == pytest.approx(top, rel=1e-6)
    (vector,) = found.vectors
    assert vector["theta"].dtype == torch.float32
    assert float(vector["theta"].double().norm()) == pytest.approx(1, abs=1e-6)
    assert abs(float(vector["theta"][size // 3])) == pytest.approx(1, abs=1e-6)


def test_scaling_the_factors_against_each_other_moves_the_lora_spectrum_alone():
    values = {}
    for c in (1.0, 5.0):
        model = tiny.with_lora(tiny.bert())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.mul_(c if "lora_A" in name else 1 / c)
        for build in (WeightSpace.full, WeightSpace.lora):
            space = build(model)
            values[space.name, c] = top_eigenvalues(Objective(BATCHES), space, 3, **EXACT).values
    np.testing.assert_allclose(values["full", 5.0], values["full", 1.0], rtol=1e-10)
    assert (np.abs(values["lora", 5.0] / values["lora", 1.0] - 1) > 0.1).all()


@pytest.mark.parametrize("backend", ["lanczos", "scipy", "pyhessian"])
def test_more_eigenvalues_than_weights_are_refused(backend):
    with pytest.raises(UserError, match="k is 5") as refusal:
        quadratic([1.0, 2.0, 3.0, 4.0], 5, backend=backend)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "settings",
    [{"curvature": "fisher"}, {"backend": "numpy"}, {"which": "widest"}, {"start": "zero"}, {"graphs": "keep"}],
    ids=str,
)
def test_unknown_choices_are_refused(settings):
    with pytest.raises(UserError, match="choose") as refusal:
        quadratic([1.0, 2.0, 3.0, 4.0], 1, **settings)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("settings", [{"block": 0}, {"start": []}, {"max_basis": 2}], ids=str)
def test_settings_that_leave_nothing_to_work_with_are_refused(settings):
    with pytest.raises(UserError) as refusal:
        quadratic(INDEFINITE, 2, **settings)
    assert "\n" not in str(refusal.value)
