"""One-step adversarial sharpness against closed forms and a gradient taken sentence by sentence."""

import copy
import math

import pytest
import torch

from analysis.core import COLUMNS, WeightSpace
from analysis.sharpness.adversarial import MEASURE, adversarial_sharpness, slopes_by_layer
from bilora.errors import UserError
from tests.sharpness.cases import (
    Quadratic,
    bert_objective,
    change_gauge,
    loss_by_sentence,
    losses_by_sentence,
    quadratic_objective,
    tiny_bert,
    with_lora,
)


def test_quadratic_is_exact():
    model = Quadratic()
    objective, x = quadratic_objective()
    result = adversarial_sharpness(objective, WeightSpace.all(model), [0.1, 3.0])
    g = model.H @ (model.theta().detach() - x.mean(0))
    length = float(g.norm())
    assert result.gradient_norm == pytest.approx(length, rel=1e-12)
    for point in result.points:
        curvature = float(g @ model.H @ g) / length**2
        expected = point.radius * length + 0.5 * point.radius**2 * curvature
        assert point.loss_rise == pytest.approx(expected, rel=1e-11)
        assert point.metrics["loss"] == pytest.approx(result.base_metrics["loss"] + expected, rel=1e-11)
        assert point.first_order == pytest.approx(point.radius * length, rel=1e-12)
        assert point.induced_norm == pytest.approx(point.radius, rel=1e-12)
        assert math.isnan(point.first_order_rank_r)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_rank_r_prediction_is_the_truncated_gradient(rank):
    model = Quadratic()
    objective, x = quadratic_objective()
    result = adversarial_sharpness(objective, WeightSpace.full(model), [0.5], rank=rank)
    G = (model.H @ (model.theta().detach() - x.mean(0)))[:12].view(3, 4)
    singular = torch.linalg.svdvals(G)
    point = result.points[0]
    assert point.first_order_rank_r == pytest.approx(0.5 * float(singular[:rank].square().sum().sqrt()), rel=1e-12)
    if rank == 3:
        assert point.first_order_rank_r == pytest.approx(point.first_order, rel=1e-12)
    else:
        assert point.first_order_rank_r < point.first_order


def test_full_space_of_a_padded_bert_against_sentences_one_by_one():
    model = with_lora(tiny_bert())
    objective, space = bert_objective(), WeightSpace.full(model)
    result = adversarial_sharpness(objective, space, [0.4], rank=2)
    merged = copy.deepcopy(model).merge_and_unload()
    weights = {name: merged.get_parameter(name).requires_grad_(True) for name in space.parameters}
    alone = losses_by_sentence(merged)
    base = alone.mean()
    gradient = torch.autograd.grad(base, list(weights.values()))
    length = torch.cat([g.flatten() for g in gradient]).norm()
    low = sum(float(torch.linalg.svdvals(g)[:2].square().sum()) for g in gradient) ** 0.5
    with torch.no_grad():
        for weight, g in zip(weights.values(), gradient, strict=True):
            weight.add_(0.4 * g / length)
        rises = losses_by_sentence(merged) - alone
        rise = rises.mean()
    point = result.points[0]
    assert point.standard_error == pytest.approx(float(rises.std() / 7**0.5), rel=1e-8)
    assert result.gradient_norm == pytest.approx(float(length), rel=1e-9)
    assert point.loss_rise == pytest.approx(float(rise), rel=1e-8)
    assert point.first_order_rank_r == pytest.approx(0.4 * low, rel=1e-9)
    for name, g in zip(weights, gradient, strict=True):
        singular, slope = torch.linalg.svdvals(g), result.layers[name.removesuffix(".weight")]
        assert slope.steepest == pytest.approx(float(singular.square().sum().sqrt()), rel=1e-9)
        assert slope.rank_r == pytest.approx(float(singular[:2].square().sum().sqrt()), rel=1e-9)
    assert len(result.layers) == len(weights) == 13
    assert 0 <= point.metrics["accuracy"] <= 1


def test_lora_space_of_a_padded_bert_against_sentences_one_by_one():
    model = with_lora(tiny_bert())
    result = adversarial_sharpness(bert_objective(), WeightSpace.lora(model), [0.4])
    moved = copy.deepcopy(model)
    names = [name for name, _ in moved.named_parameters() if "lora_" in name]
    factors = [moved.get_parameter(name).requires_grad_(True) for name in names]
    base = loss_by_sentence(moved)
    gradient = torch.autograd.grad(base, factors)
    by_layer = {}
    for name, g in zip(names, gradient, strict=True):
        layer = name.removeprefix("base_model.model.").partition(".lora_")[0]
        by_layer[layer] = by_layer.get(layer, 0.0) + float(g.square().sum())
    length = torch.cat([g.flatten() for g in gradient]).norm()
    with torch.no_grad():
        for factor, g in zip(factors, gradient, strict=True):
            factor.add_(0.4 * g / length)
        rise = loss_by_sentence(moved) - base
    assert result.points[0].loss_rise == pytest.approx(float(rise), rel=1e-8)
    assert result.points[0].first_order == pytest.approx(0.4 * float(length), rel=1e-9)
    assert math.isnan(result.points[0].first_order_rank_r)
    assert {layer: slope.steepest**2 for layer, slope in result.layers.items()} == pytest.approx(by_layer, rel=1e-9)


def test_the_best_step_of_one_layer_rises_by_its_slope():
    """To first order: rho·G_l/‖G_l‖ and rho·G_{l,r}/‖G_{l,r}‖ of a single layer."""
    objective, space = bert_objective(), WeightSpace.full(with_lora(tiny_bert()))
    gradient, base = objective.gradient(space), objective.loss(space)
    layers = adversarial_sharpness(objective, space, [0.1], rank=1).layers
    for layer in list(layers)[::4]:
        G = gradient[f"{layer}.weight"]
        U, S, Vh = torch.linalg.svd(G, full_matrices=False)
        slopes = layers[layer].steepest, layers[layer].rank_r
        for step, slope in zip((G / G.norm(), torch.outer(U[:, 0], Vh[0])), slopes, strict=True):
            with space.perturbed({f"{layer}.weight": step}, 1e-5):
                assert (objective.loss(space) - base) / 1e-5 == pytest.approx(slope, rel=1e-3)
        assert layers[layer].rank_r == pytest.approx(float(S[0]), rel=1e-9)


def test_weights_that_are_no_matrices_count_by_their_output_rows():
    kernel, gain = torch.arange(24.0).view(2, 3, 2, 2), torch.arange(3.0)
    slopes = slopes_by_layer({"conv.weight": kernel, "norm.weight": gain}, rank=1)
    assert slopes["conv"].rank_r == pytest.approx(float(torch.linalg.svdvals(kernel.view(2, 12).double())[0]), rel=1e-9)
    assert slopes["conv"].steepest == pytest.approx(float(kernel.norm()), rel=1e-6)
    assert slopes["norm"].rank_r == slopes["norm"].steepest == pytest.approx(5**0.5, rel=1e-12)


def test_rise_tends_to_the_first_order():
    result = adversarial_sharpness(bert_objective(), WeightSpace.full(with_lora(tiny_bert())), [1e-2, 1e-4])
    errors = [abs(p.loss_rise / p.first_order - 1) for p in result.points]
    assert errors[1] < 0.02 * errors[0]


def test_full_space_does_not_depend_on_the_gauge():
    model, other = with_lora(tiny_bert()), with_lora(tiny_bert())
    change_gauge(other, 4.0)
    objective = bert_objective()
    full = [adversarial_sharpness(objective, WeightSpace.full(m), [0.5]) for m in (model, other)]
    assert full[0] == full[1]
    lora = [adversarial_sharpness(objective, WeightSpace.lora(m), [0.5]) for m in (model, other)]
    assert lora[1].gradient_norm > 1.5 * lora[0].gradient_norm


def test_zero_gradient_has_no_ascent():
    model = Quadratic()
    objective, _ = quadratic_objective()
    with torch.no_grad():
        model.H.zero_()
    result = adversarial_sharpness(objective, WeightSpace.full(model), [0.1, 5.0])
    assert result.gradient_norm == 0
    for point in result.points:
        assert (point.loss_rise, point.first_order, point.first_order_rank_r, point.induced_norm) == (0, 0, 0, 0)


def test_rows_hold_the_sweep_from_radius_zero():
    settings = MEASURE.settings(radii=(0.1, 0.5), rank=2)
    result = MEASURE.run(bert_objective(), WeightSpace.full(with_lora(tiny_bert())), settings, None)
    rows = result.rows()
    assert all(tuple(r) == COLUMNS for r in rows)
    names = ("loss", "accuracy", "matthews")
    sweep = {q: [(r["radius"], r["value"]) for r in rows if r["quantity"] == q] for q in names}
    assert [radius for radius, _ in sweep["loss"]] == [0.0, 0.1, 0.5]
    assert sweep["accuracy"][0] == (0.0, result.base_metrics["accuracy"])
    assert sweep["matthews"] == [
        (0.0, result.base_metrics["matthews"]),
        *((p.radius, p.metrics["matthews"]) for p in result.points),
    ]
    rises = [r for r in rows if r["quantity"] == "loss_rise"]
    assert [r["standard_error"] for r in rises] == [p.standard_error for p in result.points]
    assert [r["value"] for r in rises] == [p.loss_rise for p in result.points]
    assert [r["induced_norm"] for r in rises] == pytest.approx([0.1, 0.5], rel=1e-9)
    low = [r for r in rows if r["kind"] == "gradient_rank_r" and not r["layer"]]
    assert [(r["quantity"], r["index"], r["value"]) for r in low] == [
        ("first_order", 2, p.first_order_rank_r) for p in result.points
    ]
    single = [r for r in rows if r["layer"]]
    assert {r["quantity"] for r in single} == {"first_order"}
    for kind, name in (("gradient", "steepest"), ("gradient_rank_r", "rank_r")):
        found = {r["layer"]: r["value"] for r in single if r["kind"] == kind and r["radius"] == 0.5}
        assert found == {layer: 0.5 * getattr(slope, name) for layer, slope in result.layers.items()}
    assert len(rows) == 15 + 2 * 2 * len(result.layers)
    other = MEASURE.run(bert_objective(), WeightSpace.lora(with_lora(tiny_bert())), settings, None)
    assert {r["kind"] for r in other.rows()} == {"gradient"}


def test_progress_counts_points():
    objective, _ = quadratic_objective()
    seen = []
    adversarial_sharpness(objective, WeightSpace.all(Quadratic()), [0.1, 0.2], watch=lambda *at: seen.append(at[:2]))
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("change", [{"radii": []}, {"radii": [-1.0]}, {"radii": [math.inf]}, {"rank": 0}])
def test_bad_settings_are_one_line(change):
    objective, _ = quadratic_objective()
    with pytest.raises(UserError, match=next(iter(change))) as error:
        adversarial_sharpness(objective, WeightSpace.all(Quadratic()), **{"radii": [0.1], **change})
    assert "\n" not in str(error.value)
