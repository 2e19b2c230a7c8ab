"""The auxiliary pair against the gradient step: closed forms, weights changed by hand, a trained adapter."""

import copy
import math

import pytest
import torch

from analysis.core import COLUMNS, Factors, Trained, WeightSpace
from analysis.sharpness.ascent_gap import MEASURE, ascent_gap
from bilora.errors import UserError
from tests.sharpness.cases import (
    Fault,
    Quadratic,
    assert_same_bits,
    bert_objective,
    fail_at,
    losses_by_sentence,
    normal,
    quadratic_objective,
    state,
    tiny_bert,
    with_lora,
)


def pairs_for(space, size=0.1):
    """An auxiliary pair of rank 1 for every layer."""
    return {
        name.removesuffix(".weight"): Factors(
            size * normal(p.shape[0], 1, seed=i), normal(1, p.shape[1], seed=99 - i), 0.7
        )
        for i, (name, p) in enumerate(space.parameters.items())
    }


def test_a_quadratic_is_exact():
    model = Quadratic()
    objective, x = quadratic_objective()
    pair = Factors(normal(3, 2, seed=7), normal(2, 4, seed=8), 0.3)
    result = ascent_gap(objective, WeightSpace.full(model), {"layer": pair})
    H = model.H[:12, :12]
    g = (model.H @ (model.theta().detach() - x.mean(0)))[:12]
    eps = (0.3 * pair.B @ pair.A).flatten()
    step = float(eps.norm()) * g / g.norm()
    auxiliary, gradient = result.ascents
    assert (auxiliary.kind, gradient.kind) == ("auxiliary", "gradient")
    for found, e in ((auxiliary, eps), (gradient, step)):
        assert found.first_order == pytest.approx(float(g @ e), rel=1e-11)
        assert found.loss_rise == pytest.approx(float(g @ e + 0.5 * e @ H @ e), rel=1e-10)
        assert found.induced_norm == pytest.approx(float(eps.norm()), rel=1e-12)
    expected = float(g @ eps + 0.5 * eps @ H @ eps) / float(g @ step + 0.5 * step @ H @ step)
    assert result.ratio == pytest.approx(expected, rel=1e-9)


def test_a_pair_along_a_gradient_of_rank_one_leaves_no_gap():
    """Its perturbation is the gradient step itself."""
    model = Quadratic()
    objective, x = quadratic_objective()
    model.H.zero_()
    column, line = normal(3, 1, seed=1), normal(1, 4, seed=2)
    gap = model.theta().detach() - x.mean(0)
    G = torch.cat([(column @ line).flatten(), torch.zeros(3, dtype=torch.float64)])
    model.H.add_(torch.outer(G, gap) / gap.square().sum())
    model.H.add_(model.H.T.clone() - torch.outer(gap, gap) * float(G @ gap) / float(gap @ gap) ** 2)
    torch.testing.assert_close(model.H @ gap, G, rtol=1e-10, atol=1e-12)
    result = ascent_gap(objective, WeightSpace.full(model), {"layer": Factors(column, line, 0.01)})
    assert result.ratio == pytest.approx(1.0, rel=1e-8)
    assert result.ascents[0].first_order == pytest.approx(result.ascents[1].first_order, rel=1e-10)
    opposite = ascent_gap(objective, WeightSpace.full(model), {"layer": Factors(column, line, -0.01)})
    assert opposite.ascents[0].first_order == pytest.approx(-opposite.ascents[1].first_order, rel=1e-10)
    assert opposite.ratio < 0


def test_a_padded_bert_against_weights_changed_by_hand():
    model = with_lora(tiny_bert())
    objective, space = bert_objective(), WeightSpace.full(model)
    pairs = pairs_for(space)
    result = ascent_gap(objective, space, pairs)
    merged = copy.deepcopy(model).merge_and_unload()
    weights = {name: merged.get_parameter(name).requires_grad_(True) for name in space.parameters}
    alone = losses_by_sentence(merged)
    base = alone.mean()
    gradient = dict(zip(weights, torch.autograd.grad(base, list(weights.values())), strict=True))
    eps = {f"{layer}.weight": f.scale * f.B @ f.A for layer, f in pairs.items()}
    length = math.sqrt(sum(float(e.square().sum()) for e in eps.values()))
    steepness = math.sqrt(sum(float(g.square().sum()) for g in gradient.values()))
    step = {name: length / steepness * g for name, g in gradient.items()}
    by_sentence = []
    for found, change in zip(result.ascents, (eps, step), strict=True):
        moved = copy.deepcopy(merged)
        with torch.no_grad():
            for name, e in change.items():
                moved.get_parameter(name).add_(e)
            by_sentence.append((losses_by_sentence(moved) - alone).detach())
            rise = float(by_sentence[-1].mean())
        assert found.loss_rise == pytest.approx(rise, rel=1e-7)
        assert found.standard_error == pytest.approx(float(by_sentence[-1].std() / 7**0.5), rel=1e-7)
        assert found.first_order == pytest.approx(sum(float((change[n] * gradient[n]).sum()) for n in change), rel=1e-8)
        assert found.induced_norm == pytest.approx(length, rel=1e-10)
    assert abs(result.ratio) < 1
    gaps = by_sentence[0] - result.ratio * by_sentence[1]
    error = float(gaps.std() / 7**0.5 / by_sentence[1].mean().abs())
    assert result.ratio_error == pytest.approx(error, rel=1e-6)
    assert {r["quantity"]: r["standard_error"] for r in result.rows() if r["kind"] == ""} == {
        "ratio": result.ratio_error
    }


def test_rows():
    model = with_lora(tiny_bert())
    space, seen = WeightSpace.full(model), []
    trained = Trained(model, pairs_for(space))
    settings = MEASURE.settings()
    result = MEASURE.run(bert_objective(), space, settings, trained, lambda *progress: seen.append(progress))
    rows = result.rows()
    assert all(tuple(r) == COLUMNS for r in rows)
    assert [(r["kind"], r["quantity"]) for r in rows] == [
        ("auxiliary", "loss_rise"),
        ("auxiliary", "first_order"),
        ("gradient", "loss_rise"),
        ("gradient", "first_order"),
        ("", "ratio"),
    ]
    values = [r["value"] for r in rows]
    assert values[4] == values[0] / values[2] == result.ratio
    assert {(r["measure"], r["space"], r["split"]) for r in rows} == {("ascent_gap", "full", "validation")}
    assert all(r["induced_norm"] == pytest.approx(result.ascents[0].induced_norm, rel=1e-12) for r in rows)
    assert seen == [(i, 3, "steps") for i in range(1, 4)]
    again = MEASURE.run(bert_objective(), space, settings, trained)
    assert again.rows() == rows


def test_an_adapter_without_auxiliary_has_no_rows():
    model = with_lora(tiny_bert())
    for trained in (None, Trained(model)):
        result = MEASURE.run(bert_objective(), WeightSpace.full(model), MEASURE.settings(), trained)
        assert result.rows() == []
        assert math.isnan(result.ratio)


def test_a_zero_gradient_has_no_ratio():
    model = Quadratic()
    objective, _ = quadratic_objective()
    model.H.zero_()
    result = ascent_gap(
        objective, WeightSpace.full(model), {"layer": Factors(normal(3, 1, seed=1), normal(1, 4, seed=2), 1.0)}
    )
    assert result.ascents[1].loss_rise == 0
    assert result.ascents[1].induced_norm == 0
    assert math.isnan(result.ratio)


@pytest.mark.parametrize("call", [1, 5, 8, 10])
def test_weights_come_back_bit_for_bit(call):
    model = with_lora(tiny_bert(torch.float32))
    theirs, space, objective = state(model), WeightSpace.full(model), bert_objective()
    before, pairs = state(space.model), pairs_for(space)
    ascent_gap(objective, space, pairs)
    assert_same_bits(space.model, before)
    hook = fail_at(space.model, call)
    with pytest.raises(Fault):
        ascent_gap(objective, space, pairs)
    hook.remove()
    assert_same_bits(space.model, before)
    assert_same_bits(model, theirs)


def test_an_infinite_rise_stays_visible():
    model = with_lora(tiny_bert(torch.float32))
    space = WeightSpace.full(model)
    result = ascent_gap(bert_objective(), space, pairs_for(space, size=1e30))
    assert not math.isfinite(result.ascents[0].loss_rise)
    assert not math.isfinite(result.rows()[0]["value"])


def test_errors_are_one_line():
    model = with_lora(tiny_bert())
    space, objective = WeightSpace.full(model), bert_objective()
    pairs = pairs_for(space)
    layer = next(iter(pairs))
    for build, auxiliary, word in (
        (lambda: space, {key: pair for key, pair in pairs.items() if key != layer}, layer),
        (lambda: space, {**pairs, "head": pairs[layer]}, "head"),
        (lambda: WeightSpace.lora(model), pairs, "full space"),
    ):
        with pytest.raises(UserError, match=word) as error:
            ascent_gap(objective, build(), auxiliary)
        assert "\n" not in str(error.value)
