"""Losses between two adapters against closed forms and weights interpolated by hand."""

import copy
import math

import numpy as np
import pytest
import torch

from analysis.core import COLUMNS, Objective, WeightSpace
from analysis.landscape.adapter_plane import trained_space
from analysis.landscape.connect import Connectivity, connectivity
from bilora.errors import UserError
from tests.oracles import tiny
from tests.sharpness.cases import (
    Fault,
    Quadratic,
    assert_same_bits,
    bert_objective,
    change_gauge,
    fail_at,
    loss_by_sentence,
    normal,
    quadratic_objective,
    state,
    tiny_bert,
    with_lora,
)


def quadratic(shift, definite=True):
    model = Quadratic(definite=definite)
    with torch.no_grad():
        model.layer.weight.add_(shift * normal(3, 4, seed=8))
        model.layer.bias.add_(shift * normal(3, seed=9))
    return model


@pytest.mark.parametrize("definite", [True, False])
def test_barrier_of_a_quadratic_is_its_closed_form(definite):
    objective, _ = quadratic_objective()
    one, two = (quadratic(shift, definite) for shift in (0.0, 1.0))
    found = connectivity(objective, WeightSpace.all(one), WeightSpace.all(two), points=11)
    gap = two.theta() - one.theta()
    curvature = float(gap.detach() @ one.H @ gap.detach())
    chord = (1 - found.t) * found.losses[0] + found.t * found.losses[-1]
    np.testing.assert_allclose(found.losses - chord, -0.5 * found.t * (1 - found.t) * curvature, rtol=1e-9, atol=1e-12)
    highest, at = (-0.5 * 0.1 * 0.9 * curvature, (0.1, 0.9)) if curvature > 0 else (-0.125 * curvature, (0.5,))
    assert found.barrier == pytest.approx(highest, rel=1e-9)
    assert min(abs(found.barrier_at - t) for t in at) < 1e-12
    assert found.distance == pytest.approx(float(gap.detach().norm()), rel=1e-12)
    assert (found.accuracies, found.error_barrier) == (None, None)
    if definite:
        assert found.barrier < 0


def test_ends_are_exact_and_the_middle_is_the_mean_of_merged_weights():
    objective = bert_objective()
    one, two = with_lora(tiny_bert(), seed=1), with_lora(tiny_bert(), seed=2)
    spaces = WeightSpace.full(one), WeightSpace.full(two)
    bits = [state(space.model) for space in spaces]
    users = state(one)
    found = connectivity(objective, *spaces, points=5)
    for space, before in zip(spaces, bits, strict=True):
        assert_same_bits(space.model, before)
    assert_same_bits(one, users)
    assert (found.t[0], found.t[-1]) == (0.0, 1.0)
    for i, space in ((0, spaces[0]), (-1, spaces[1])):
        assert found.losses[i] == pytest.approx(objective.loss(space), rel=1e-14)
    first, second = (copy.deepcopy(m).merge_and_unload() for m in (one, two))
    with torch.no_grad():
        for parameter, other in zip(first.parameters(), second.parameters(), strict=True):
            parameter.copy_(0.75 * parameter + 0.25 * other)
    assert found.losses[1] == pytest.approx(float(loss_by_sentence(first).detach()), rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_weights_at_both_ends_are_those_of_the_adapters_bit_for_bit(dtype):
    one, two = (WeightSpace.full(with_lora(tiny_bert(dtype), seed=seed)) for seed in (1, 2))
    seen = []

    def record(module, arguments):
        seen.append({name: p.detach().clone() for name, p in one.parameters.items()})

    hook = one.model.register_forward_pre_hook(record)
    objective = bert_objective(sizes=(7,))
    connectivity(objective, one, two, points=3)
    hook.remove()
    for weights, space in ((seen[0], one), (seen[-1], two)):
        for name, tensor in weights.items():
            assert torch.equal(tensor, space.parameters[name]), name
    for name, tensor in seen[-2].items():
        middle = (0.5 * one.parameters[name].double() + 0.5 * two.parameters[name].double()).to(dtype)
        assert torch.equal(tensor, middle.detach()), name


def test_accuracy_and_its_barrier():
    objective = bert_objective()
    spaces = [trained_space(with_lora(tiny_bert(), seed=seed)) for seed in (1, 2)]
    found = connectivity(objective, *spaces, points=5)
    assert found.accuracies[0] == objective.evaluate(spaces[0])["accuracy"]
    assert found.accuracies[-1] == objective.evaluate(spaces[1])["accuracy"]
    error = 1 - found.accuracies
    excess = error - np.interp(found.t, [0, 1], error[[0, -1]])
    assert found.error_barrier == pytest.approx(max(excess[1:-1]), abs=1e-15)


def test_a_barrier_between_two_wells():
    """L = (w² − 1)² has wells at ±1 and 1 between them."""

    class Wells(torch.nn.Module):
        def __init__(self, w):
            super().__init__()
            self.w = torch.nn.Parameter(torch.tensor([w], dtype=torch.float64))

        def forward(self, x):
            return {"loss": ((self.w.square() - 1).square() + 0 * x.sum()).sum()}

    objective = Objective([{"x": torch.zeros(2, 1)}])
    found = connectivity(objective, WeightSpace.all(Wells(-1.0)), WeightSpace.all(Wells(1.0)))
    assert (found.barrier, found.barrier_at) == (1.0, 0.5)
    assert found.distance == 2


def test_factors_have_a_barrier_that_depends_on_the_gauge_and_merged_weights_have_none():
    objective = bert_objective()
    model, other = (with_lora(tiny_bert(), seed=1) for _ in range(2))
    change_gauge(other, -1.0)  # the same function from opposite factors
    full = connectivity(objective, WeightSpace.full(model), WeightSpace.full(other), points=5)
    lora = connectivity(objective, WeightSpace.lora(model), WeightSpace.lora(other), points=5)
    np.testing.assert_allclose(full.losses, full.losses[0], rtol=1e-12)
    assert full.distance == 0
    assert lora.losses[-1] == pytest.approx(lora.losses[0], rel=1e-12)
    # Half-way the factors cancel: what is left is the base model.
    with model.disable_adapter():
        assert lora.losses[2] == pytest.approx(float(loss_by_sentence(model).detach()), rel=1e-10)
    assert abs(lora.losses[2] - lora.losses[0]) > 1e-4


def test_bare_weights_are_an_end_as_well():
    objective = bert_objective()
    one, two = (WeightSpace.full(with_lora(tiny_bert(), seed=seed)) for seed in (1, 2))
    weights = {name: p.detach().clone() for name, p in two.parameters.items()}
    found, expected = (connectivity(objective, one, end, points=3) for end in (weights, two))
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-14)
    with pytest.raises(UserError, match="step 10 lacks bert"):
        connectivity(objective, one, dict(list(weights.items())[1:]), labels=("A", "step 10"))
    with pytest.raises(UserError, match="B does not fit the full space"):
        connectivity(objective, one, {name: tensor[:1] for name, tensor in weights.items()})


def test_losses_that_are_not_finite_stay_visible():
    def found(losses):
        t = np.linspace(0, 1, len(losses))
        return Connectivity("full", "train", ("a", "b"), t, np.array(losses), None, 1.0)

    assert found([0.0, math.inf, 0.0, 0.0]).barrier == math.inf
    missing = found([0.0, 5.0, math.nan, 0.0])
    assert math.isnan(missing.barrier)
    assert missing.barrier_at == pytest.approx(2 / 3)
    for ends in ([math.inf, 1.0, 0.0], [0.0, 1.0, math.nan]):
        assert math.isnan(found(ends).rows()[-2]["value"])

    class Overflowing(torch.nn.Module):
        def __init__(self, sign):
            super().__init__()
            self.w = torch.nn.Parameter(torch.full((3,), 10.0 * sign))

        def forward(self, x):
            return {"loss": (200 - 2 * self.w.square().sum() + 0 * x.sum()).exp()}

    objective = Objective([{"x": torch.zeros(2, 1)}])
    real = connectivity(objective, WeightSpace.all(Overflowing(1)), WeightSpace.all(Overflowing(-1)), points=3)
    assert real.losses.tolist() == [0.0, math.inf, 0.0]
    assert real.barrier == math.inf


def test_rows():
    objective, seen = bert_objective(), []
    spaces = [WeightSpace.full(with_lora(tiny_bert(), seed=seed)) for seed in (1, 2)]
    found = connectivity(objective, *spaces, labels=("LoRA", "Bi-LoRA"), points=4, watch=lambda *at: seen.append(at))
    rows = found.rows()
    assert seen == [(i, 4, "points") for i in range(5)]
    assert all(tuple(r) == COLUMNS for r in rows)
    assert {(r["measure"], r["space"], r["split"], r["label"]) for r in rows} == {
        ("connectivity", "full", "validation", "LoRA – Bi-LoRA")
    }
    losses = [r for r in rows if r["quantity"] == "loss"]
    assert [(r["index"], r["radius"], r["value"]) for r in losses] == [
        (i, t, loss) for i, (t, loss) in enumerate(zip(found.t, found.losses, strict=True))
    ]
    single = {r["quantity"]: r for r in rows if r["index"] == -1}
    assert set(single) == {"barrier", "error_barrier", "distance"}
    assert (single["barrier"]["value"], single["barrier"]["radius"]) == (found.barrier, found.barrier_at)
    assert single["error_barrier"]["value"] == found.error_barrier


def test_weights_come_back_after_a_fault():
    objective = bert_objective()
    spaces = [WeightSpace.full(with_lora(tiny_bert(), seed=seed)) for seed in (1, 2)]
    bits = state(spaces[0].model)
    hook = fail_at(spaces[0].model, 5)
    with pytest.raises(Fault):
        connectivity(objective, *spaces)
    hook.remove()

    def interrupt(done, most, note):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        connectivity(objective, *spaces, watch=interrupt)
    assert_same_bits(spaces[0].model, bits)


def test_what_cannot_be_joined_is_refused_in_one_line():
    objective = bert_objective()
    one = with_lora(tiny_bert(), seed=1)
    headed = copy.deepcopy(one)
    with torch.no_grad():
        headed.get_parameter("base_model.model.classifier.modules_to_save.default.weight").mul_(2)
    base = tiny_bert()
    with torch.no_grad():
        base.bert.embeddings.word_embeddings.weight.mul_(2)
    cases = [
        (WeightSpace.full(headed), "classifier.weight, outside the full space.*trained_space"),
        (WeightSpace.full(with_lora(base)), "word_embeddings.weight"),
        (WeightSpace.full(tiny.with_lora(tiny_bert(), target_modules=["key"])), "adapt different layers"),
    ]
    for end, message in cases:
        with pytest.raises(UserError, match=message) as error:
            connectivity(objective, WeightSpace.full(one), end)
        assert "\n" not in str(error.value)
    for bad in ({"points": 2}, {"labels": ("a",)}):
        with pytest.raises(UserError, match=next(iter(bad))):
            connectivity(objective, WeightSpace.full(one), WeightSpace.full(one), **bad)
    joined = connectivity(objective, trained_space(one), trained_space(headed), points=3)
    assert joined.losses[-1] == pytest.approx(float(loss_by_sentence(headed).detach()), rel=1e-10)
