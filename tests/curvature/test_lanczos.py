import numpy as np
import pytest
import torch

from analysis.core import Objective, WeightSpace
from analysis.core.measure import Interrupted
from analysis.curvature import top_eigenvalues
from analysis.curvature.basis import ROWS, Basis
from bilora.errors import UserError
from tests.oracles import tiny

BATCH = [{"x": torch.zeros(2, 1)}]


def spectrum(values, k, *, slope=None, dtype=torch.float64, **settings):
    model = tiny.Quadratic(values, slope, dtype=dtype)
    settings = {"tolerance": 1e-9, "max_products": 200, **settings}
    return top_eigenvalues(Objective(BATCH), WeightSpace.all(model), k, **settings)


INDEFINITE = [-9.0, -4.0, *np.linspace(-1, 1, 40), 3.0, 7.0, 12.0]


@pytest.mark.parametrize(
    ("which", "expected"),
    [("magnitude", [12, -9, 7, -4]), ("largest", [12, 7, 3, 1]), ("smallest", [-9, -4, -1, -1 + 2 / 39])],
)
@pytest.mark.parametrize("start", ["gradient", "random"])
def test_known_indefinite_spectrum(which, expected, start):
    found = spectrum(INDEFINITE, 4, which=which, start=start)
    np.testing.assert_allclose(found.values, expected, rtol=1e-10)
    assert found.converged.all()
    assert (found.residuals <= 1e-9).all()


def test_residuals_are_true():
    model = tiny.Quadratic(INDEFINITE)
    space = WeightSpace.all(model)
    found = top_eigenvalues(Objective(BATCH), space, 3, tolerance=1e-3, vectors=True)
    for value, residual, vector in zip(found.values, found.residuals, found.vectors, strict=True):
        v = vector["theta"].flatten()
        assert float(v.norm()) == pytest.approx(1, rel=1e-12)
        expected = float((model.H @ v - value * v).norm()) / abs(value)
        assert residual == pytest.approx(expected, rel=1e-6, abs=1e-14)


def test_what_did_not_converge_is_flagged():
    values = np.linspace(1, 2, 300).tolist()
    found = spectrum(values, 3, max_products=12)
    assert found.products == 12
    assert not found.converged.any()
    assert (found.residuals > 1e-9).all()
    flags = [r["value"] for r in found.rows() if r["quantity"] == "converged"]
    assert flags == [0.0, 0.0, 0.0]


def test_looser_tolerance_takes_fewer_products_and_meets_it():
    values = np.geomspace(1e-3, 10, 200).tolist()
    products = []
    for tolerance in (1e-1, 1e-3, 1e-6):
        found = spectrum(values, 5, tolerance=tolerance)
        assert found.converged.all()
        assert (found.residuals <= tolerance).all()
        # An eigenvalue's error is bounded by the residual norm.
        np.testing.assert_allclose(found.values, values[::-1][:5], rtol=tolerance)
        products.append(found.products)
    assert products == sorted(set(products))


@pytest.mark.parametrize("k", [1, 3])
def test_a_gradient_inside_an_eigenspace_does_not_hide_the_rest(k):
    # The Krylov space of this start is spanned by one eigenvector, of the smallest eigenvalue.
    slope = torch.zeros(20, dtype=torch.float64)
    slope[0] = 1.0
    found = spectrum(np.arange(1.0, 21.0).tolist(), k, slope=slope)
    np.testing.assert_allclose(found.values, [20, 19, 18][:k], rtol=1e-9)
    assert found.converged.all()


def test_multiple_eigenvalues_are_all_found_when_krylov_spaces_close():
    found = spectrum([5.0] * 3 + [1.0] * 27, 4)
    np.testing.assert_allclose(found.values, [5, 5, 5, 1], rtol=1e-9)
    assert found.products < 20


def test_a_rank_deficient_hessian_gives_zeros_beyond_its_rank():
    found = spectrum([4.0, -2.0] + [0.0] * 30, 4)
    np.testing.assert_allclose(found.values, [4, -2, 0, 0], atol=1e-12)
    assert found.converged.all()
    assert found.products < 20


def test_a_vanishing_gradient_starts_at_random():
    found = spectrum([3.0, 2.0, 1.0], 1, slope=torch.zeros(3, dtype=torch.float64))
    np.testing.assert_allclose(found.values, [3], rtol=1e-9)


def test_the_whole_spectrum_of_a_small_matrix():
    found = spectrum([1.0, -2.0, 3.0, -4.0], 4)
    np.testing.assert_allclose(found.values, [-4, 3, -2, 1], rtol=1e-9)
    assert found.converged.all()


def test_float32_reaches_float32_accuracy():
    found = spectrum(INDEFINITE, 4, dtype=torch.float32, tolerance=1e-4)
    np.testing.assert_allclose(found.values, [12, -9, 7, -4], rtol=1e-5)
    assert found.converged.all()


def test_the_same_seed_gives_the_same_numbers():
    one, two = (spectrum(INDEFINITE, 3, start="random", seed=4) for _ in range(2))
    other = spectrum(INDEFINITE, 3, start="random", seed=5)
    assert (one.values == two.values).all()
    assert (one.residuals == two.residuals).all()
    assert (one.residuals != other.residuals).any()


def test_the_basis_stays_orthonormal_across_blocks_in_float32():
    size, stream = 400, torch.Generator().manual_seed(0)
    basis = Basis(size, torch.float32, torch.device("cpu"))
    common = torch.randn(size, generator=stream, dtype=torch.float64)
    for _ in range(3 * ROWS + 5):
        # Nearly parallel vectors: one pass of Gram–Schmidt would leave 1e-4 of the others in each.
        vector = common + 1e-4 * torch.randn(size, generator=stream, dtype=torch.float64)
        basis.project_out(vector)
        basis.append((vector / vector.norm()).float())
    Q = torch.stack([basis.row(i) for i in range(basis.length)]).double()
    assert float((Q @ Q.T - torch.eye(len(Q))).abs().max()) < 1e-6
    weights = np.arange(1.0, len(Q) + 1)
    torch.testing.assert_close(basis.combination(weights), torch.from_numpy(weights) @ Q)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "k is 0"),
        ({"k": 5}, "size of the all space"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"tolerance": 1.5}, "tolerance"),
        ({"max_products": 1}, "at least 2"),
        ({"block": 0}, "block is 0"),
        ({"max_basis": 4}, "at least 5"),
        ({"graphs": "some"}, "choose auto, retain or rebuild"),
        ({"curvature": "fisher"}, "choose hessian or ggn"),
        ({"differences": "left"}, "choose central or one-sided"),
        ({"curvature": "ggn", "differences": "central"}, "finite differences"),
        ({"start": []}, "no vector"),
        ({"which": "biggest"}, "choose magnitude"),
        ({"backend": "numpy"}, "choose lanczos, pyhessian or scipy"),
        ({"start": "zero"}, "choose gradient or random"),
        ({"backend": "pyhessian", "which": "smallest"}, "largest magnitude alone"),
    ],
)
def test_bad_settings_are_one_line(settings, message):
    with pytest.raises(UserError, match=message):
        spectrum([1.0, 2.0, 3.0, 4.0], **{"k": 2, **settings})


def blind(size=62):
    """A slope without any part along the top eigenvector, and the spectrum."""
    slope = torch.ones(size, dtype=torch.float64)
    slope[0] = 0.0
    return [100.0, *(1 + 0.05 * i for i in range(30)), -5.0, *[0.01] * 30], slope


@pytest.mark.parametrize("k", [1, 3])
def test_a_gradient_blind_to_the_top_eigenvector_does_not_hide_it(k):
    values, slope = blind()
    found = spectrum(values, k, slope=slope, tolerance=1e-2)
    assert found.values[0] == pytest.approx(100, rel=1e-4)
    assert found.converged.all()


def test_given_vectors_that_lack_the_top_one_do_not_hide_it():
    values = [100.0, 50.0, 25.0, 12.0, *np.linspace(0, 11, 200)]
    model = tiny.Quadratic(values)
    objective, space = Objective(BATCH), WeightSpace.all(model)
    exact = top_eigenvalues(objective, space, 4, tolerance=1e-9, vectors=True)
    found = top_eigenvalues(objective, space, 3, tolerance=1e-3, start=exact.vectors[1:])
    np.testing.assert_allclose(found.values, [100, 50, 25], rtol=1e-4)
    warm = top_eigenvalues(objective, space, 3, tolerance=1e-3, start=exact.vectors)
    assert warm.products < top_eigenvalues(objective, space, 3, tolerance=1e-3, start="random").products


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ([{}], "does not name exactly"),
        ([{"elsewhere": torch.ones(1, 4)}], "does not name exactly"),
        ([{"theta": torch.ones(2, 2)}], "does not fit"),
        ([{"theta": torch.zeros(1, 4)}], "zero or not finite"),
        ([{"theta": torch.full((1, 4), float("nan"))}], "zero or not finite"),
        ({"theta": torch.ones(1, 4)}, "does not name exactly"),
    ],
)
def test_bad_start_vectors_are_one_line(start, message):
    with pytest.raises(UserError, match=message):
        spectrum([1.0, 2.0, 3.0, 4.0], 2, start=start)


def test_opposite_start_vectors_are_no_start_at_all():
    ones = {"theta": torch.ones(1, 4)}
    np.testing.assert_allclose(
        spectrum([1.0, 2.0, 3.0, 4.0], 2, start=[ones, {"theta": -ones["theta"]}]).values, [4, 3]
    )


def test_the_zeros_of_a_singular_matrix_have_converged():
    found = spectrum([4.0, 2.0, *np.linspace(0.1, 1, 11), *[0.0] * 30], 2, which="smallest", tolerance=1e-6, block=2)
    np.testing.assert_allclose(found.values, [0, 0], atol=1e-12)
    assert found.converged.all()


def test_a_value_that_rounding_hides_from_its_tolerance_is_not_called_converged():
    # Beside 1e5 in float32 an error of 0.6 is rounding: 2 is not zero by that, and not good to 1e-6 either.
    found = spectrum([1e5, 2.0, 1.5, 1.0], 2, dtype=torch.float32, tolerance=1e-6)
    assert found.values[0] == pytest.approx(1e5, rel=1e-6)
    assert found.residuals[1] > 1e-6
    assert not found.converged[1]


@pytest.mark.parametrize("block", [1, 20])
@pytest.mark.parametrize("moment", range(1, 90, 4))
def test_an_interrupt_at_any_moment_leaves_something_sound(monkeypatch, block, moment):
    """The moments are the calls of what a step is made of."""
    calls = 0
    for name in ("append", "products", "compressed", "residual_norms"):
        original = getattr(Basis, name)

        def counted(*arguments, original=original):
            nonlocal calls
            calls += 1
            if calls == moment:
                raise KeyboardInterrupt
            return original(*arguments)

        monkeypatch.setattr(Basis, name, counted)
    values = np.linspace(-3, 10, 120)
    try:
        found = spectrum(values.tolist(), 3, block=block, max_basis=50 if block == 20 else 12, tolerance=1e-6)
    except Interrupted as interrupt:
        found = interrupt.result
    except KeyboardInterrupt:
        assert moment <= 3 * block  # before the first step was complete
        return
    for value, good in zip(found.values, found.converged, strict=True):
        assert not good or np.abs(values - value).min() < 1e-4


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_products_do_not_depend_on_the_callers_gradient_mode(mode):
    expected = spectrum(INDEFINITE, 2)
    model = tiny.Quadratic(INDEFINITE)
    space = WeightSpace.all(model)
    with mode():
        found = top_eigenvalues(Objective(BATCH), space, 2, tolerance=1e-9, max_products=200)
    assert (found.values == expected.values).all()


def test_scipy_says_what_it_cannot_do():
    for settings, message in [
        ({"k": 1, "which": "both"}, "2 or more"),
        ({"k": 4}, "fewer than all"),
    ]:
        with pytest.raises(UserError, match=message):
            spectrum([1.0, 2.0, 3.0, 4.0], backend="scipy", **settings)
    with pytest.raises(UserError, match="ARPACK"):
        spectrum([0.0] * 30, 2, backend="scipy")
