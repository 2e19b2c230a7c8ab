import math

import numpy as np
import pytest
import torch

from analysis.core import COLUMNS, Objective, WeightSpace
from analysis.core.measure import Interrupted
from analysis.curvature.trace import MEASURE, hutchinson, trace, xtrace
from bilora.errors import UserError
from bilora.seeds import generator_for
from tests.oracles import tiny
from tests.oracles.operators import Dense

EXAMPLES = tiny.examples()
BATCHES = [tiny.padded(part) for part in tiny.split(EXAMPLES)]
BUILD = {"full": WeightSpace.full, "lora": WeightSpace.lora}

SPECTRA = {
    "decaying": np.geomspace(10, 1e-2, 60),
    "clustered": np.concatenate([[20, 20.001, 20.002], np.linspace(1, 1.1, 57)]),
    "indefinite": np.concatenate([np.geomspace(10, 1e-2, 40), -np.geomspace(4, 1e-2, 20)]),
    "multiple": np.repeat([8.0, 3.0, -1.0, 0.5], 15),
}


def with_spectrum(values):
    Q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((len(values), len(values))))
    return (Q * values) @ Q.T


def left_out_one_by_one(H, probes):
    """The t_i by their definition, each with a basis of its own."""
    n, q = probes.shape
    found = []
    for i in range(q):
        Q, _ = np.linalg.qr(H @ np.delete(probes, i, axis=1))
        x = probes[:, i] - Q @ (Q.T @ probes[:, i])
        found.append(np.trace(Q.T @ H @ Q) + (n - q + 1) / (x @ x) * (x @ H @ x))
    return np.array(found)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("pairs", [2, 7, 15])
def test_samples_are_those_of_bases_that_leave_one_probe_out(name, pairs):
    H = with_spectrum(SPECTRA[name])
    found = xtrace(Dense(H), tolerance=1e-9, max_products=2 * pairs, seed=3)
    probes = [torch.randn(60, generator=generator_for("trace", 3, i)).double().numpy() for i in range(pairs)]
    expected = left_out_one_by_one(H, np.stack(probes, axis=1))
    np.testing.assert_allclose(found.samples, expected, rtol=1e-8)
    assert found.value == pytest.approx(expected.mean(), rel=1e-8)
    assert found.standard_error == pytest.approx(expected.std(ddof=1) / math.sqrt(pairs), rel=1e-6)
    assert found.products == 2 * pairs


def spread_and_reported_error(estimate, values, most, seeds=200):
    H = Dense(values)  # sums over Gaussian probes do not depend on the eigenvectors
    runs = [estimate(H, tolerance=1e-9, max_products=most, seed=seed) for seed in range(seeds)]
    found = np.array([run.value for run in runs])
    spread = found.std(ddof=1)
    assert abs(found.mean() - values.sum()) <= 4 * spread / math.sqrt(seeds)
    return spread, math.sqrt(np.mean([run.standard_error**2 for run in runs]))


@pytest.mark.parametrize("values", [np.geomspace(10, 1e-2, 600), np.linspace(-1, 1.1, 400), 1 / np.arange(1, 501.0)])
def test_the_mean_over_seeds_is_the_trace_and_the_spread_is_the_reported_error(values):
    spread, reported = spread_and_reported_error(xtrace, values, 24)
    assert reported == pytest.approx(spread, rel=0.3)


@pytest.mark.parametrize("name", ["decaying", "clustered", "indefinite"])
def test_the_reported_error_of_few_eigenvalues_is_below_the_spread_by_no_more_than_documented(name):
    # The samples share their bases: the paper's error takes them for independent.
    spread, reported = spread_and_reported_error(xtrace, SPECTRA[name], 24)
    assert 0.6 * spread <= reported <= 1.1 * spread


@pytest.mark.parametrize("name", ["decaying", "clustered", "indefinite"])
def test_hutchinson_is_unbiased_and_its_error_that_of_independent_samples(name):
    H = with_spectrum(SPECTRA[name])
    runs = [hutchinson(Dense(H), tolerance=1e-9, max_products=24, seed=seed) for seed in range(200)]
    values = np.array([run.value for run in runs])
    # Random signs: variance 2·Σ_{i≠j} H_ij² of one sample.
    error = math.sqrt(2 * ((H**2).sum() - (np.diag(H) ** 2).sum()) / 24)
    assert abs(values.mean() - SPECTRA[name].sum()) <= 4 * error / math.sqrt(200)
    assert values.std(ddof=1) == pytest.approx(error, rel=0.2)
    assert math.sqrt(np.mean([run.standard_error**2 for run in runs])) == pytest.approx(error, rel=0.1)


def test_leaving_one_out_beats_plain_sampling_where_the_spectrum_decays():
    values = 1 / np.arange(1, 301.0) ** 2
    H = Dense(with_spectrum(values))
    errors = [
        [abs(estimate(H, tolerance=1e-9, max_products=40, seed=seed).value - values.sum()) for seed in range(20)]
        for estimate in (xtrace, hutchinson)
    ]
    assert np.mean(errors[0]) < 0.1 * np.mean(errors[1])


@pytest.mark.parametrize("name", ["decaying", "indefinite"])
def test_what_is_called_converged_errs_by_the_tolerance(name):
    exact, H = SPECTRA[name].sum(), Dense(with_spectrum(SPECTRA[name]))
    # A root mean square over 40 seeds is itself known to 1/√80. XTrace goes on after the first small standard error and
    # stays well below the tolerance; Hutchinson's error falls slowly and ends at it.
    for estimate, most, allowed in ((xtrace, 120, 0.05), (hutchinson, 3000, 0.05 * (1 + 4 / math.sqrt(80)))):
        runs = [estimate(H, tolerance=0.05, max_products=most, seed=seed) for seed in range(40)]
        assert all(run.converged and run.standard_error <= 0.05 * abs(run.value) for run in runs)
        assert math.sqrt(np.mean([(run.value / exact - 1) ** 2 for run in runs])) <= allowed


@pytest.mark.parametrize("values", [[4.0, -2.0, 1e-3], [5.0] * 4, [3.0, -3.0], []])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_trace_is_exact_once_the_probes_reach_the_rank(values, dtype):
    spectrum = np.array([*values, *np.zeros(40 - len(values))])
    found = xtrace(Dense(with_spectrum(spectrum), dtype), tolerance=0.01, max_products=60)
    accuracy = 1e-12 if dtype == torch.float64 else 1e-5
    assert found.value == pytest.approx(sum(values), abs=accuracy * max(1, np.abs(spectrum).sum()))
    assert found.standard_error <= accuracy * max(1, np.abs(spectrum).sum())
    assert found.converged
    assert found.products < 24


@pytest.mark.parametrize("size", [1, 2, 5, 9])
def test_the_trace_is_exact_where_there_are_as_many_probes_as_entries(size):
    spectrum = np.linspace(-1, 3, size)
    found = xtrace(Dense(with_spectrum(spectrum)), tolerance=1e-6, max_products=200)
    assert found.value == pytest.approx(spectrum.sum(), rel=1e-10)
    assert found.converged
    assert found.products <= 2 * size


def test_no_vector_is_multiplied_twice_and_a_longer_run_begins_like_a_shorter_one():
    H = with_spectrum(SPECTRA["decaying"])
    for estimate in (xtrace, hutchinson):
        short, long = Dense(H), Dense(H)
        estimate(short, tolerance=1e-9, max_products=16)
        estimate(long, tolerance=1e-9, max_products=48)
        assert all(torch.equal(a, b) for a, b in zip(short.seen, long.seen, strict=False))
        assert len({tuple(row.tolist()) for row in long.seen}) == 48


def test_the_same_seed_gives_the_same_numbers():
    H = with_spectrum(SPECTRA["multiple"])
    for estimate in (xtrace, hutchinson):
        one, two, other = (estimate(Dense(H), tolerance=1e-9, max_products=20, seed=seed) for seed in (4, 4, 5))
        assert (one.samples == two.samples).all()
        assert (one.samples != other.samples).all()


def test_a_spread_over_a_handful_of_samples_ends_nothing():
    # A diagonal matrix gives random signs no spread at all.
    found = hutchinson(Dense(np.diag(np.arange(50.0))), tolerance=0.05, max_products=100)
    assert found.products == 12
    assert found.standard_error == 0
    assert found.value == pytest.approx(np.arange(50.0).sum(), rel=1e-12)


def test_a_budget_that_does_not_suffice_is_not_called_converged():
    H = with_spectrum(np.linspace(-1, 1.1, 200))
    for estimate in (xtrace, hutchinson):
        found = estimate(Dense(H), tolerance=0.01, max_products=30)
        assert not found.converged
        assert found.products == 30


def test_a_million_entries_in_float32_are_summed_without_bias():
    diagonal = torch.cat([torch.linspace(50, 100, 6), torch.full((999_994,), 1e-3)])
    exact = float(diagonal.double().sum())
    plain = hutchinson(Dense(diagonal, torch.float32), tolerance=0.01, max_products=12)
    assert plain.value == pytest.approx(exact, rel=1e-6)
    found = xtrace(Dense(diagonal, torch.float32), tolerance=1e-6, max_products=16)
    # Beyond its 6 large eigenvalues the matrix is a multiple of the identity, which every probe measures exactly.
    assert found.value == pytest.approx(exact, rel=1e-4)
    assert abs(found.value - exact) <= 4 * found.standard_error + 1e-6 * exact


def test_pyhessian_ends_on_a_negative_running_mean_and_ours_does_not():
    # PyHessian divides the change of its running mean by the mean, sign included: once negative, any change will do.
    spectrum = np.concatenate([np.full(30, 1.0), np.full(30, -1.0), [3.8]])
    space = WeightSpace.all(tiny.Quadratic(spectrum.tolist()))
    objective = Objective([{"x": torch.zeros(2, 1)}])
    stopped = []
    for seed in range(12):
        theirs = trace(objective, space, tolerance=1e-3, max_products=400, seed=seed, backend="pyhessian")
        assert theirs.products == len(theirs.samples)
        assert theirs.value == pytest.approx(theirs.samples.mean(), rel=1e-12)
        assert theirs.standard_error == pytest.approx(
            theirs.samples.std(ddof=1) / math.sqrt(len(theirs.samples)), rel=1e-9
        )
        assert not theirs.converged
        if theirs.products <= 5 and theirs.value < 0:
            stopped.append(seed)
    assert stopped
    for seed in stopped:
        for backend in ("xtrace", "hutchinson"):
            ours = trace(objective, space, tolerance=0.05, max_products=100, seed=seed, backend=backend)
            assert ours.products > 12
            assert abs(ours.value - 3.8) <= 4 * ours.standard_error + 1e-10


@pytest.fixture(scope="module", params=BUILD)
def case(request):
    """(WeightSpace, trace of the dense Hessian) of a tiny BERT."""
    model = tiny.with_lora(tiny.bert())
    oracle = tiny.ClassifierOracle(tiny.bert(), tiny.factors_of(model), EXAMPLES, request.param)
    return BUILD[request.param](model), float(oracle.hessian().diagonal().sum())


def test_the_trace_of_a_model_is_that_of_its_dense_hessian(case):
    space, exact = case
    found = trace(Objective(BATCHES), space, tolerance=0.1, max_products=160)
    assert abs(found.value - exact) <= 4 * found.standard_error
    assert found.standard_error <= 0.1 * abs(found.value) or found.products == 160
    assert found.standard_error <= 0.1 * abs(found.value) or not found.converged


def test_pyhessian_samples_the_same_objective(case):
    space, exact = case
    theirs = trace(Objective(BATCHES), space, tolerance=1e-12, max_products=20, backend="pyhessian")
    assert abs(theirs.value - exact) <= 5 * theirs.standard_error
    assert all(p.grad is None for p in space.model.parameters())


def test_pyhessian_reports_every_product(case):
    space, _ = case
    told = []
    found = trace(
        Objective(BATCHES),
        space,
        tolerance=1e-12,
        max_products=5,
        backend="pyhessian",
        watch=lambda *seen: told.append(seen),
    )
    assert found.products == 5
    assert told == [(products, 5, "") for products in range(1, 6)]


def test_rows_of_the_measure(case):
    space, _ = case
    calls = []
    settings = MEASURE.settings(max_products=16, tolerance=0.01)
    result = MEASURE.run(Objective(BATCHES, name="train"), space, settings, None, lambda *call: calls.append(call))
    rows = result.rows()
    assert all(tuple(r) == COLUMNS and r["measure"] == "trace" for r in rows)
    assert {(r["space"], r["split"], r["kind"], r["layer"]) for r in rows} == {(space.name, "train", "", "")}
    values = {r["quantity"]: r for r in rows}
    assert set(values) == {"trace", "products", "converged"}
    assert values["trace"]["value"] == result.value
    assert values["trace"]["standard_error"] == result.standard_error > 0
    assert values["products"]["value"] == 16
    assert values["converged"]["value"] == 0
    assert [call[:2] for call in calls] == [(8, 16), (16, 16)]


def test_rows_of_the_gauss_newton_matrix_name_it(case):
    space, _ = case
    found = trace(Objective(BATCHES), space, curvature="ggn", max_products=16)
    assert found.value > 0
    assert {r["kind"] for r in found.rows()} == {"ggn"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tolerance": 0.0}, "tolerance"),
        ({"tolerance": 1.0}, "tolerance"),
        ({"max_products": 3}, "max_products"),
        ({"seed": -1}, "seed"),
        ({"backend": "exact"}, "backend"),
        ({"curvature": "fisher"}, "curvature"),
        ({"backend": "pyhessian", "curvature": "ggn"}, "Hessian alone"),
        ({"backend": "pyhessian", "autocast": torch.bfloat16}, "own precision"),
    ],
)
def test_bad_settings_are_one_line(settings, message):
    space = WeightSpace.all(tiny.Quadratic([1.0, 2.0]))
    with pytest.raises(UserError, match=message) as caught:
        trace(Objective([{"x": torch.zeros(2, 1)}]), space, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("backend", ["xtrace", "hutchinson"])
def test_an_interrupt_gives_the_estimate_so_far(backend):
    model = tiny.Quadratic(np.linspace(-1.0, 3.0, 60).tolist())
    objective, space = Objective([{"x": torch.zeros(2, 1)}]), WeightSpace.all(model)

    def interrupt(done, most, note):
        if done >= 24:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as caught:
        trace(objective, space, tolerance=1e-6, backend=backend, watch=interrupt)
    shorter = trace(objective, space, tolerance=1e-6, backend=backend, max_products=24)
    assert caught.value.result.products == 24
    assert caught.value.result.value == shorter.value
    assert not caught.value.result.converged
