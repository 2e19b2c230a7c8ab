"""Differences and autocast: what is said of their errors is true of the exact Hessian."""

from functools import cache

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from analysis import MEASURES
from analysis.core import Objective, WeightSpace
from analysis.core.measure import Interrupted
from analysis.curvature import (
    HessianOperator,
    curvature_operator,
    layer_curvature,
    spectral_density,
    top_eigenvalues,
    trace,
)
from bilora.errors import UserError
from tests.oracles import modules, tiny
from tests.oracles.dense import DenseOracle, flat, relative_error

EXAMPLES = tiny.examples()
WHOLE = tiny.padded(EXAMPLES)
OBJECTIVE = Objective([tiny.padded(part) for part in tiny.split(EXAMPLES)], name="train")
HALF = {"autocast": torch.bfloat16}
LABEL = "bfloat16 autocast"


@cache
def adapted():
    """(LoRA space in float32, dense Hessian in float64) of a BERT whose curvature changes fast."""
    oracle = DenseOracle.lora(tiny.bert(), tiny.factors_of(tiny.with_lora(tiny.bert())), WHOLE)
    return WeightSpace.lora(tiny.with_lora(tiny.bert(torch.float32))), oracle.hessian()


@cache
def calm():
    """(full space in float32, dense Hessian in float64) of a BERT that does not magnify rounding."""
    space = WeightSpace.full(modules.calm_bert(torch.float32))
    return space, DenseOracle.named(modules.calm_bert(), WHOLE, list(space.parameters)).hessian()


INEXACT = {
    "central": (adapted, {"differences": "central", "tolerance": 1e-2}),
    "one-sided": (adapted, {"differences": "one-sided", "tolerance": 1e-2}),
    "autocast": (calm, {**HALF, "tolerance": 3e-3}),
}


@pytest.mark.parametrize("backend", ["lanczos", "scipy"])
@pytest.mark.parametrize("name", INEXACT)
def test_residuals_of_inexact_products_are_those_of_the_exact_hessian(name, backend):
    build, settings = INEXACT[name]
    space, H = build()
    found = top_eigenvalues(OBJECTIVE, space, 2, backend=backend, vectors=True, **settings)
    products = {key: value for key, value in settings.items() if key != "tolerance"}
    for i, vector in enumerate(found.vectors):
        v, value = space.flat(vector), found.values[i]
        exact = float((H @ v.double() - value * v.double()).norm()) / abs(value)
        assert found.residuals[i] == pytest.approx(exact, rel=2e-3)
        assert found.converged[i] == (exact <= settings["tolerance"])
        # The operator's own residual is another number: the test tells them apart.
        with curvature_operator(OBJECTIVE, space, **products) as operator:
            own = operator.matmat(v[None])[0].double() - value * v.double()
        assert abs(float(own.norm()) / abs(value) / exact - 1) > 0.02


@pytest.mark.parametrize("backend", ["lanczos", "scipy"])
def test_what_only_the_inexact_operator_calls_an_eigenpair_has_not_converged(backend):
    space, _ = calm()
    found = top_eigenvalues(OBJECTIVE, space, 1, backend=backend, tolerance=3e-3, vectors=True, **HALF)
    with curvature_operator(OBJECTIVE, space, **HALF) as operator:
        own = operator.matmat(space.flat(found.vectors[0])[None])[0] - found.values[0] * space.flat(found.vectors[0])
    assert float(own.norm()) / abs(found.values[0]) < 3e-3 < found.residuals[0]
    assert not found.converged[0]


@pytest.mark.parametrize("name", INEXACT)
@pytest.mark.parametrize("moment", ["during the iteration", "during the exact products"])
def test_an_interrupt_leaves_the_exact_residuals_unknown(name, moment, monkeypatch):
    build, settings = INEXACT[name]
    space, H = build()

    def interrupt(done, most, note):
        if done == 7 and moment == "during the iteration":
            raise KeyboardInterrupt

    if moment == "during the exact products":
        original = HessianOperator.matmat

        def exact_is_interrupted(operator, rows):
            if not operator.label:
                raise KeyboardInterrupt
            return original(operator, rows)

        monkeypatch.setattr(HessianOperator, "matmat", exact_is_interrupted)
    with pytest.raises(Interrupted) as caught:
        top_eigenvalues(OBJECTIVE, space, 2, watch=interrupt, **settings)
    found = caught.value.result
    assert np.isnan(found.residuals).all()
    assert not found.converged.any()
    top = torch.linalg.eigvalsh(H)[-1]
    assert found.values[0] == pytest.approx(float(top), rel=0.05)


def test_autocast_with_float32_masters_is_closer_than_bfloat16_throughout():
    space, H = calm()
    V = torch.randn(8, space.size, generator=tiny.generator(0), dtype=torch.float64).float()
    with HessianOperator(OBJECTIVE, space, **HALF) as operator:
        masters = operator.matmat(V)
    model = modules.calm_bert(torch.bfloat16).eval()
    weights = [model.get_parameter(name) for name in space.parameters]
    coarse = torch.zeros_like(V, dtype=torch.float64)
    for batch, weight in zip(OBJECTIVE.batches, OBJECTIVE.weights, strict=True):
        with sdpa_kernel(SDPBackend.MATH):
            gradient = torch.autograd.grad(model(**batch).loss, weights, create_graph=True)
        for row, v in zip(coarse, V, strict=True):
            parts = [part.bfloat16() for part in space.named_vector(v).values()]
            product = torch.autograd.grad(gradient, weights, parts, retain_graph=True)
            row += weight / OBJECTIVE.weight * flat(product).double()
    assert 1e-5 < relative_error(masters, V.double() @ H) < 9e-3 < relative_error(coarse, V.double() @ H)


def test_eigenvalues_under_autocast_are_close_and_say_what_they_are():
    space, H = calm()
    found = top_eigenvalues(OBJECTIVE, space, 3, **HALF)
    exact = torch.linalg.eigvalsh(H)
    exact = exact[exact.abs().argsort(descending=True)][:3].numpy()
    np.testing.assert_allclose(found.values, exact, rtol=1e-2)
    assert (found.values != top_eigenvalues(OBJECTIVE, space, 3).values).all()
    assert {row["kind"] for row in found.rows()} == {LABEL}
    kept, rebuilt = (top_eigenvalues(OBJECTIVE, space, 2, graphs=graphs, **HALF) for graphs in ("retain", "rebuild"))
    assert (kept.values == rebuilt.values).all()
    assert (kept.residuals == rebuilt.residuals).all()


ESTIMATES = {
    "trace": lambda space, **settings: trace(OBJECTIVE, space, max_products=16, **settings),
    "density": lambda space, **settings: spectral_density(OBJECTIVE, space, runs=2, steps=5, **settings),
    "layers": lambda space, **settings: layer_curvature(OBJECTIVE, space, by="dense", max_products=12, **settings),
}


@pytest.mark.parametrize("measure", ESTIMATES)
def test_estimates_under_autocast_are_close_and_say_what_they_are(measure):
    # The probes are the same: what differs is the rounding. Nothing cancels in a positive semidefinite matrix.
    estimate, (space, _) = ESTIMATES[measure], calm()
    exact, kept, rebuilt = (
        estimate(space, curvature="ggn", **settings).rows()
        for settings in ({}, {**HALF, "graphs": "retain"}, {**HALF, "graphs": "rebuild"})
    )
    assert {row["kind"] for row in exact} == {"ggn"}
    assert {row["kind"] for row in kept} == {f"ggn {LABEL}"}
    wanted = {"trace", "eigenvalue", "frobenius_norm"}
    pairs = [(a["value"], b["value"]) for a, b in zip(kept, exact, strict=True) if a["quantity"] in wanted]
    assert pairs
    for found, expected in pairs:
        assert found == pytest.approx(expected, rel=5e-2)
        assert found != expected
    assert [row["value"] for row in kept] == [row["value"] for row in rebuilt]


@pytest.mark.parametrize("measure", ["spectrum", "trace", "density", "layers"])
def test_the_settings_of_every_measure_know_autocast(measure):
    space, _ = calm()
    small = {
        "spectrum": {"k": 1, "max_products": 3},
        "trace": {"max_products": 4},
        "density": {"runs": 1, "steps": 2},
        "layers": {"by": "query", "max_products": 12},
    }[measure]
    settings = MEASURES[measure].settings(**small, autocast="bfloat16", graphs="rebuild")
    rows = MEASURES[measure].run(OBJECTIVE, space, settings, None).rows()
    assert {row["kind"] for row in rows} == {LABEL}
    with pytest.raises(ValueError, match="autocast"):
        MEASURES[measure].settings(autocast="float8")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"autocast": torch.float64}, "choose torch.bfloat16 or torch.float16"),
        ({"autocast": "bfloat16"}, "choose torch.bfloat16 or torch.float16"),
        ({"autocast": torch.bfloat16, "differences": "central"}, "finite differences"),
    ],
)
def test_what_autocast_cannot_do_is_one_line(settings, message):
    space, _ = calm()
    for ask in (
        lambda: curvature_operator(OBJECTIVE, space, **settings),
        lambda: top_eigenvalues(OBJECTIVE, space, 1, **settings),
    ):
        with pytest.raises(UserError, match=message) as refusal:
            ask()
        assert "\n" not in str(refusal.value)
