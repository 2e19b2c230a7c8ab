import math

import numpy as np
import pytest
import torch

from analysis.core import COLUMNS, Objective, WeightSpace
from analysis.core.measure import Interrupted
from analysis.curvature.density import MEASURE, Axis, SpectralDensity, lanczos_quadrature, spectral_density
from bilora.errors import UserError
from bilora.seeds import generator_for
from tests.oracles import tiny
from tests.oracles.operators import Dense

EXAMPLES = tiny.examples()
BATCHES = [tiny.padded(part) for part in tiny.split(EXAMPLES)]
BUILD = {"full": WeightSpace.full, "lora": WeightSpace.lora}

SPECTRA = {
    "indefinite": np.concatenate([[12, 9], np.geomspace(3, 1e-2, 38), -np.geomspace(4, 1e-2, 20)]),
    "clustered": np.concatenate([[20, 20.001, 20.002], np.linspace(-0.1, 0.1, 57)]),
    "multiple": np.repeat([8.0, 3.0, -1.0, 0.5], 15),
}


def with_spectrum(values):
    Q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((len(values), len(values))))
    return (Q * values) @ Q.T


def quadrature(matrix, **settings):
    operator = Dense(matrix)
    nodes, weights = lanczos_quadrature(operator, **settings)
    return SpectralDensity(nodes, weights, operator.size, operator.products, "full", "train", "")


def start(size, seed, run):
    vector = torch.randn(size, generator=generator_for("density", seed, run)).double().numpy()
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize("name", SPECTRA)
def test_each_run_is_a_gauss_rule(name):
    H = with_spectrum(SPECTRA[name])
    nodes, weights = lanczos_quadrature(Dense(H), runs=3, steps=6, seed=2)
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-12)
    assert (weights >= 0).all()
    for run in range(3):
        v = start(60, 2, run)
        moment = v
        for degree in range(12):
            size = np.abs(SPECTRA[name]).max() ** degree
            assert weights[run] @ nodes[run] ** degree == pytest.approx(v @ moment, abs=1e-11 * size)
            moment = H @ moment


def test_as_many_steps_as_entries_find_every_eigenvalue():
    values = np.linspace(-2, 5, 30)
    nodes, weights = lanczos_quadrature(Dense(with_spectrum(values)), runs=2, steps=100)
    assert nodes.shape == (2, 30)
    Q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((30, 30)))
    for run in range(2):
        np.testing.assert_allclose(nodes[run], values, atol=1e-8)
        np.testing.assert_allclose(weights[run], (Q.T @ start(30, 0, run)) ** 2, atol=1e-8)


def test_a_run_that_meets_an_invariant_space_ends_and_is_padded_by_zero_weights():
    found = quadrature(with_spectrum(np.array([4.0, -2.0] + [0.0] * 30)), runs=4, steps=10)
    assert found.products == 4 * 3
    np.testing.assert_allclose(np.sort(found.nodes[:, :3], axis=1), [[-2, 0, 4]] * 4, atol=1e-12)
    assert not found.weights[:, 3:].any()
    np.testing.assert_allclose(found.weights.sum(axis=1), 1, rtol=1e-12)


def test_a_zero_matrix_is_a_single_node():
    found = quadrature(np.zeros((20, 20)), runs=3, steps=5)
    assert found.products == 3
    assert found.trace().value == found.frobenius_norm().value == found.effective_dimension(0.1).value == 0
    assert math.isnan(found.negative_share().value)
    assert np.isfinite(found.density().value).all()


def exact_numbers(values, alpha):
    positive = np.maximum(values, 0)
    return {
        "trace": values.sum(),
        "frobenius_norm": np.linalg.norm(values),
        "negative_share": np.maximum(-values, 0).sum() / np.abs(values).sum(),
        "effective_dimension": (positive / (positive + alpha)).sum(),
    }


def estimated_numbers(density, alpha):
    return {
        "trace": density.trace(),
        "frobenius_norm": density.frobenius_norm(),
        "negative_share": density.negative_share(),
        "effective_dimension": density.effective_dimension(alpha),
    }


@pytest.mark.parametrize("name", ["indefinite", "multiple"])
def test_summaries_are_those_of_the_spectrum_and_their_spread_is_the_reported_error(name):
    H, exact = with_spectrum(SPECTRA[name]), exact_numbers(SPECTRA[name], 0.5)
    seeds = [estimated_numbers(quadrature(H, runs=12, steps=30, seed=seed), 0.5) for seed in range(60)]
    for quantity, expected in exact.items():
        values = np.array([found[quantity].value for found in seeds])
        spread = values.std(ddof=1)
        # A ratio of means is off by a share of its variance.
        curved = spread**2 / expected if quantity == "negative_share" else 0
        assert abs(values.mean() - expected) <= 4 * spread / math.sqrt(60) + curved, quantity
        reported = math.sqrt(np.mean([found[quantity].standard_error ** 2 for found in seeds]))
        assert reported == pytest.approx(spread, rel=0.3), quantity


def quadratic_forms(f, values, seed, runs):
    """vᵀ·f(H)·v of the starts of a diagonal H, without a rule: (runs,)."""
    return np.array([start(len(values), seed, run) ** 2 @ f(values) for run in range(runs)])


def test_what_bends_at_zero_is_biased_and_its_standard_error_does_not_show_it():
    # The numbers of docs/curvature.md.
    values = np.concatenate([np.geomspace(20, 1e-4, 1200), -np.geomspace(3, 1e-4, 800)])
    negative, positive = (
        quadratic_forms(f, values, 1, 60) for f in (lambda x: np.maximum(-x, 0), lambda x: np.maximum(x, 0))
    )
    exact = negative.mean() / (negative.mean() + positive.mean())
    for steps, ratio in ((4, 1.90), (8, 1.32), (20, 0.97), (30, 1.14), (40, 0.97), (80, 1.04)):
        found = quadrature(torch.from_numpy(values), runs=60, steps=steps, seed=1)
        share = found.negative_share()
        assert share.value / exact == pytest.approx(ratio, abs=0.006), steps
        assert share.standard_error < 0.022 * share.value, steps
        added = [(found.weights * np.maximum(sign * found.nodes, 0)).sum(axis=1) for sign in (-1, 1)]
        np.testing.assert_allclose(added[0] - negative, added[1] - positive, atol=1e-10)
        if steps == 40:
            for alpha, value, error, right in ((1.0, 300, 2, 300), (0.1, 533, 6, 521), (0.01, 1101, 15, 746)):
                dimension = found.effective_dimension(alpha)
                assert dimension.value == pytest.approx(value, rel=0.01)
                assert dimension.standard_error == pytest.approx(error, rel=0.3)
                assert exact_numbers(values, alpha)["effective_dimension"] == pytest.approx(right, abs=0.6)


@pytest.mark.parametrize("steps", [2, 5, 20])
def test_a_semidefinite_matrix_has_no_negative_share_at_any_number_of_steps(steps):
    values = torch.cat([torch.zeros(500), torch.logspace(-6, 1, 500)]).double()
    assert quadrature(values, runs=4, steps=steps).negative_share().value < 1e-12


def test_two_steps_suffice_for_trace_and_norm():
    H = with_spectrum(SPECTRA["indefinite"])
    short, long = (quadrature(H, runs=4, steps=steps) for steps in (2, 20))
    assert short.trace().value == pytest.approx(long.trace().value, rel=1e-10)
    assert short.frobenius_norm().value == pytest.approx(long.frobenius_norm().value, rel=1e-10)


@pytest.mark.parametrize("axis", [Axis(), Axis(0.05)])
def test_the_density_is_the_smoothed_spectrum(axis):
    values = SPECTRA["indefinite"]
    found = quadrature(with_spectrum(values), runs=80, steps=60)
    grid, width = np.linspace(-6, 14, 81), 0.3 if math.isinf(axis.linear) else 0.02
    u = axis.position(grid)
    kernel = np.exp(-0.5 * ((u[:, None] - axis.position(values)) / width) ** 2) / (width * math.sqrt(2 * math.pi))
    # Per unit eigenvalue: the kernel times du/dλ, here by differences.
    slope = (axis.position(grid + 1e-6) - axis.position(grid - 1e-6)) / 2e-6
    expected = kernel.mean(axis=1) * slope
    density = found.density(grid, width, axis=axis)
    assert (np.abs(density.value - expected) <= 4.5 * density.standard_error + 1e-9).all()
    assert (density.standard_error[expected > 1e-3] < 0.6 * expected[expected > 1e-3]).all()


@pytest.mark.parametrize("scale", ["linear", "symlog"])
@pytest.mark.parametrize("name", SPECTRA)
def test_the_density_on_its_own_grid_integrates_to_one(name, scale):
    nodes, weights = lanczos_quadrature(Dense(with_spectrum(SPECTRA[name])), runs=4, steps=20)
    found = SpectralDensity(nodes, weights, 60, 80, "full", "train", "", scale=scale, points=4001)
    assert np.trapezoid(found.density().value, found.grid()) == pytest.approx(1, abs=1e-3)


def test_the_symmetric_logarithm_resolves_what_lies_decades_apart():
    values = np.concatenate([np.full(50, 1e-2), np.full(40, -3e-2), np.full(10, 10.0)])
    nodes, weights = lanczos_quadrature(Dense(with_spectrum(values)), runs=60, steps=10)
    found = SpectralDensity(nodes, weights, 100, 180, "full", "train", "", points=20001)
    grid, density = found.grid(), found.density().value
    for low, high, share in ((-0.1, -0.002, 0.4), (0.002, 0.1, 0.5), (1, 100, 0.1)):
        inside = (grid > low) & (grid < high)
        assert np.trapezoid(density[inside], grid[inside]) == pytest.approx(share, abs=0.05)
        assert grid[inside][density[inside].argmax()] == pytest.approx(
            {0.4: -3e-2, 0.5: 1e-2, 0.1: 10.0}[share], rel=0.1
        )


def test_an_axis_and_its_inverse():
    values = np.array([-30.0, -0.01, 0.0, 1e-5, 2.0])
    for axis in (Axis(), Axis(0.1)):
        np.testing.assert_allclose(axis.eigenvalue(axis.position(values)), values, rtol=1e-12)
    np.testing.assert_allclose(Axis(0.1).position(np.array([1e-5])), 1e-5, rtol=1e-6)


@pytest.mark.parametrize(("memory", "together"), [(1, 1), (2 * 48 * 60 * 8, 2), (1 << 30, 5)])
def test_the_memory_decides_how_many_runs_go_together_and_nothing_else(memory, together):
    H = with_spectrum(SPECTRA["indefinite"])
    expected = lanczos_quadrature(Dense(H), runs=5, steps=40)
    operator = Dense(H)
    found = lanczos_quadrature(operator, runs=5, steps=40, memory=memory)
    assert max(operator.calls) == together
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-9)


def test_a_seed_names_the_runs_and_more_runs_begin_with_those_of_fewer():
    H = with_spectrum(SPECTRA["indefinite"])
    few, many, other = (
        lanczos_quadrature(Dense(H), runs=runs, steps=8, seed=seed)[0] for runs, seed in ((2, 1), (5, 1), (2, 2))
    )
    np.testing.assert_allclose(few, many[:2], rtol=1e-10)
    assert (np.abs(few - other) > 1e-6).any()


def test_a_million_entries_in_float32_give_the_quadratic_forms_of_the_starts():
    diagonal = torch.cat([torch.linspace(50, 100, 20), torch.linspace(-1e-2, 2e-2, 999_980)])
    nodes, weights = lanczos_quadrature(Dense(diagonal, torch.float32), runs=2, steps=8)
    exact = diagonal.double().numpy()
    for run in range(2):
        v = start(1_000_000, 0, run)
        for degree in (1, 2):
            assert weights[run] @ nodes[run] ** degree == pytest.approx(v * v @ exact**degree, rel=1e-5)


def test_one_run_has_no_standard_error():
    found = quadrature(with_spectrum(SPECTRA["indefinite"]), runs=1, steps=10)
    assert all(math.isnan(number.standard_error) for number in estimated_numbers(found, 1.0).values())
    assert np.isnan(found.density().standard_error).all()
    assert np.isfinite(found.density().value).all()


@pytest.fixture(scope="module", params=BUILD)
def case(request):
    """(WeightSpace, eigenvalues of the dense Hessian) of a tiny BERT."""
    model = tiny.with_lora(tiny.bert())
    oracle = tiny.ClassifierOracle(tiny.bert(), tiny.factors_of(model), EXAMPLES, request.param)
    return BUILD[request.param](model), np.linalg.eigvalsh(oracle.hessian().numpy())


def test_the_summaries_of_a_model_are_those_of_its_dense_hessian(case):
    space, values = case
    found = spectral_density(Objective(BATCHES), space, runs=8, steps=20)
    assert (found.size, found.products, found.space) == (len(values), 160, space.name)
    alpha = float(values.max()) / 10
    exact, estimated = exact_numbers(values, alpha), estimated_numbers(found, alpha)
    for quantity, expected in exact.items():
        number = estimated[quantity]
        # 4 standard errors of 8 runs, and a percent for the rule at the kink of |λ|.
        assert abs(number.value - expected) <= 4 * number.standard_error + 0.01 * abs(expected), quantity
    assert found.nodes.max() <= values.max() * (1 + 1e-9)
    assert found.nodes.min() >= values.min() * (1 + 1e-9)


def test_rows_of_the_measure(case):
    space, _ = case
    calls = []
    settings = MEASURE.settings(runs=3, steps=6, points=11, bounds=(-2.0, 5.0), alphas=(0.1, 2.0), scale="linear")
    result = MEASURE.run(Objective(BATCHES, name="train"), space, settings, None, lambda *call: calls.append(call))
    rows = result.rows()
    assert all(tuple(r) == COLUMNS and r["measure"] == "density" for r in rows)
    assert {(r["space"], r["split"], r["kind"]) for r in rows} == {(space.name, "train", "")}
    points = [r for r in rows if r["quantity"] == "density"]
    assert [r["index"] for r in points] == list(range(11))
    np.testing.assert_allclose([r["radius"] for r in points], np.linspace(-2, 5, 11), rtol=1e-12)
    np.testing.assert_array_equal([r["value"] for r in points], result.density().value)
    np.testing.assert_array_equal([r["standard_error"] for r in points], result.density().standard_error)
    rest = [(r["quantity"], r["radius"]) for r in rows if r["quantity"] != "density"]
    assert [quantity for quantity, _ in rest] == [
        "trace",
        "frobenius_norm",
        "negative_share",
        "effective_dimension",
        "effective_dimension",
        "runs",
        "products",
        "complete",
    ]
    assert [radius for quantity, radius in rest if quantity == "effective_dimension"] == [0.1, 2.0]
    assert [r["value"] for r in rows[-3:]] == [3, 18, 1]
    assert [call[:2] for call in calls] == [(3 * step, 18) for step in range(1, 7)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"runs": 0}, "runs"),
        ({"steps": 1}, "steps"),
        ({"seed": -1}, "seed"),
        ({"curvature": "fisher"}, "curvature"),
    ],
)
def test_bad_settings_are_one_line(settings, message):
    space = WeightSpace.all(tiny.Quadratic([1.0, 2.0]))
    with pytest.raises(UserError, match=message) as caught:
        spectral_density(Objective([{"x": torch.zeros(2, 1)}]), space, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings", [{"bounds": (1, 1)}, {"bounds": (0, math.inf)}, {"points": 1}, {"alphas": (0.0,)}, {"scale": "log"}]
)
def test_settings_of_the_measure_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        MEASURE.settings(**settings)


def test_the_norm_of_few_runs_is_not_biased_by_its_root():
    # The root of a mean of 3 is 7 % low here.
    values = np.concatenate([[50.0], 0.3 * np.random.default_rng(1).standard_normal(999)])
    w = np.random.default_rng(2).chisquare(1, (2000, 3, 1000))
    w /= w.sum(axis=2, keepdims=True)
    found = [
        SpectralDensity(np.tile(values, (3, 1)), run, 1000, 0, "full", "train", "").frobenius_norm().value for run in w
    ]
    roots = np.sqrt(1000 * (w @ values**2).mean(axis=1))
    exact, error = np.linalg.norm(values), np.std(found) / math.sqrt(2000)
    assert np.mean(roots) < 0.95 * exact
    assert abs(np.mean(found) - exact) <= 0.02 * exact + 3 * error


def interrupted(at, **settings):
    """(objective, space, what is found by an interrupt once ``at`` products are made)."""
    model = tiny.Quadratic([50.0, *np.linspace(-1.0, 3.0, 59)])
    objective, space = Objective([{"x": torch.zeros(2, 1)}]), WeightSpace.all(model)

    def interrupt(done, most, note):
        if done == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        spectral_density(objective, space, watch=interrupt, **settings)
    return objective, space, caught.value


def test_an_interrupt_gives_the_density_of_the_steps_made():
    objective, space, caught = interrupted(30, runs=5, steps=10)
    shorter = spectral_density(objective, space, runs=5, steps=6)
    assert caught.result.products == 30
    np.testing.assert_allclose(caught.result.nodes, shorter.nodes, rtol=1e-12)
    np.testing.assert_allclose(caught.result.weights, shorter.weights, rtol=1e-9)
    assert not caught.result.complete
    assert shorter.complete
    assert [r["value"] for r in caught.result.rows() if r["quantity"] == "complete"] == [0]


def test_runs_of_a_single_step_say_nothing_of_the_norm_and_do_not_enter():
    settings = {"runs": 4, "steps": 10, "memory": 1}
    # One run at a time: two are finished and the third has made a step.
    objective, space, caught = interrupted(21, **settings)
    assert caught.result.products == 21
    assert caught.result.runs == 2
    both = spectral_density(objective, space, **{**settings, "runs": 2})
    assert caught.result.frobenius_norm().value == both.frobenius_norm().value
    _, _, first = interrupted(1, **settings)
    assert not isinstance(first, Interrupted)
