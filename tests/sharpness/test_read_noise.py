"""Read noise against closed forms, its statistics and weights changed by hand."""

import copy
import math

import numpy as np
import pytest
import torch

from analysis.core import COLUMNS, Objective, WeightSpace, gaussian
from analysis.sharpness.read_noise import MEASURE, read_noise
from bilora.adapters.layers import adapted_layers
from bilora.errors import UserError
from tests.oracles import tiny
from tests.sharpness.cases import (
    Fault,
    Quadratic,
    assert_same_bits,
    bert_objective,
    fail_at,
    flat,
    loss_by_sentence,
    quadratic_objective,
    state,
    tiny_bert,
    with_lora,
)


def test_the_rise_on_a_quadratic_is_exact_along_each_draw():
    model = Quadratic()
    objective, x = quadratic_objective()
    space = WeightSpace.all(model)
    result = read_noise(objective, space, [0.05, 0.3], directions=3, seed=4)
    theta = model.theta().detach()
    g = model.H @ (theta - x.mean(0))
    for j in range(3):
        u = flat(gaussian(space, 4, j))
        for i, sigma in enumerate((0.05, 0.3)):
            eps = sigma * u * theta
            assert result.rises[i, j] == pytest.approx(float(g @ eps + 0.5 * eps @ model.H @ eps), rel=1e-10)
            assert result.induced_norms[i, j] == pytest.approx(float(eps.norm()), rel=1e-12)
    assert result.kind == "merged"
    assert result.scores == {}


def test_the_mean_at_a_minimum_is_half_the_weighted_trace():
    """E = sigma²/2·Σ_i H_ii·θ_i², within the reported standard error."""
    model = Quadratic(definite=True)
    theta = model.theta().detach()
    objective, _ = quadratic_objective(centre=theta)
    result = read_noise(objective, WeightSpace.all(model), [0.4], directions=500)
    expected = 0.4**2 / 2 * float(model.H.diagonal() @ theta.square())
    assert abs(result.mean[0] - expected) < 4 * result.standard_error[0]
    assert result.standard_error[0] < 0.1 * expected
    assert result.standard_error[0] == pytest.approx(np.std(result.rises[0], ddof=1) / math.sqrt(500))


@pytest.mark.parametrize("kind", ["base", "merged"])
def test_a_padded_bert_against_weights_changed_by_hand(kind):
    """``base`` on the model with its adapter beside the noisy base, ``merged`` on the merged weights."""
    model = with_lora(tiny_bert())
    objective, space = bert_objective(), WeightSpace.full(model)
    result = read_noise(objective, space, [0.2], kind=kind, directions=2, seed=3)
    assert result.kind == kind
    exact = float(loss_by_sentence(model).detach())
    assert result.base_loss == pytest.approx(exact, rel=1e-12)
    for j in range(2):
        u, squares = gaussian(space, 3, j), 0.0
        moved = copy.deepcopy(model)
        if kind == "merged":
            moved = moved.merge_and_unload()
            weights = {name: moved.get_parameter(name) for name in u}
        else:
            weights = {f"{name}.weight": layer.base_weight for name, layer in adapted_layers(moved).items()}
        with torch.no_grad():
            for name, weight in weights.items():
                squares += float((0.2 * weight * u[name]).square().sum())
                weight.mul_(1 + 0.2 * u[name])
        assert result.rises[0, j] == pytest.approx(float(loss_by_sentence(moved).detach()) - exact, rel=1e-8)
        assert result.induced_norms[0, j] == pytest.approx(math.sqrt(squares), rel=1e-9)


def test_adapters_of_one_base_meet_the_same_perturbation_of_it():
    first, second = (with_lora(tiny_bert(), seed=seed) for seed in (5, 6))
    objective = bert_objective()
    base = [read_noise(objective, WeightSpace.full(m), [0.1], directions=3) for m in (first, second)]
    np.testing.assert_allclose(base[0].induced_norms, base[1].induced_norms, rtol=1e-12)
    assert not np.allclose(base[0].rises, base[1].rises)
    merged = [read_noise(objective, WeightSpace.full(m), [0.1], kind="merged", directions=3) for m in (first, second)]
    assert not np.allclose(merged[0].induced_norms, merged[1].induced_norms, rtol=1e-6)


def test_without_factors_the_noise_is_on_the_weights():
    objective = bert_objective()
    for model in (tiny_bert(), tiny.with_lora(tiny_bert(), use_dora=True)):
        space = WeightSpace.full(model)
        asked = read_noise(objective, space, [0.1], kind="base", directions=1)
        assert asked.kind == "merged"
        assert {r["kind"] for r in asked.rows()} == {"merged"}
        assert np.array_equal(asked.rises, read_noise(objective, space, [0.1], kind="merged", directions=1).rises)


def test_rows():
    space, seen = WeightSpace.full(with_lora(tiny_bert())), []
    settings = MEASURE.settings(sigmas=(0.1, 0.4), directions=3, seed=7)
    result = MEASURE.run(bert_objective(), space, settings, None, lambda *progress: seen.append(progress))
    rows = result.rows()
    assert all(tuple(r) == COLUMNS for r in rows)
    assert result.seed == 7
    assert {r["direction_seed"] for r in rows} == {7}
    assert {(r["measure"], r["space"], r["kind"]) for r in rows} == {("read_noise", "full", "base")}
    single = [r for r in rows if r["quantity"] == "loss_rise"]
    assert [(r["radius"], r["index"]) for r in single] == [(s, j) for s in (0.1, 0.4) for j in range(3)]
    assert [r["value"] for r in single] == result.rises.flatten().tolist()
    assert [r["induced_norm"] for r in single] == result.induced_norms.flatten().tolist()
    means = [r for r in rows if r["quantity"] == "loss_rise_mean"]
    assert [r["value"] for r in means] == pytest.approx([np.mean(line) for line in result.rises])
    assert [r["standard_error"] for r in means] == result.standard_error.tolist()
    accuracies = [r for r in rows if r["quantity"] == "accuracy"]
    assert [r["value"] for r in accuracies] == pytest.approx([np.mean(line) for line in result.scores["accuracy"]])
    errors = [np.std(line, ddof=1) / math.sqrt(3) for line in result.scores["accuracy"]]
    assert [r["standard_error"] for r in accuracies] == pytest.approx(errors)
    assert [r["induced_norm"] for r in accuracies] == [np.mean(line) for line in result.induced_norms]
    matthews = [r["value"] for r in rows if r["quantity"] == "matthews"]
    assert matthews == pytest.approx([np.mean(line) for line in result.scores["matthews"]])
    assert len(rows) == 6 + 2 + 2 + 2
    assert seen == [(i, 7, "losses") for i in range(1, 8)]


def test_the_accuracies_are_those_of_the_noisy_models():
    model = with_lora(tiny_bert())
    space, objective = WeightSpace.full(model), bert_objective()
    result = read_noise(objective, space, [2.0], kind="merged", directions=4)
    for j in range(4):
        u = gaussian(space, 0, j)
        direction = {name: u[name] * p.detach() for name, p in space.parameters.items()}
        with space.perturbed(direction, 2.0):
            for name in ("accuracy", "matthews"):
                assert result.scores[name][0, j] == objective.evaluate(space)[name]
    assert len(set(result.scores["accuracy"][0].tolist())) > 1


def test_same_seed_same_result():
    space, objective = WeightSpace.full(with_lora(tiny_bert(torch.float32))), bert_objective()
    first, again, other = (read_noise(objective, space, [0.1], directions=2, seed=s) for s in (1, 1, 2))
    assert np.array_equal(first.rises, again.rises)
    assert not np.array_equal(first.rises, other.rises)


@pytest.mark.parametrize("call", [1, 4, 9])
def test_weights_come_back_bit_for_bit(call):
    model = with_lora(tiny_bert(torch.float32))
    theirs, space, objective = state(model), WeightSpace.full(model), bert_objective()
    before = state(space.model)
    read_noise(objective, space, [0.1], directions=3)
    assert_same_bits(space.model, before)
    hook = fail_at(space.model, call)
    with pytest.raises(Fault):
        read_noise(objective, space, [0.1], directions=3)
    hook.remove()
    assert_same_bits(space.model, before)
    assert_same_bits(model, theirs)


class Overflowing(torch.nn.Module):
    """A loss that leaves float32 when the weights move."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 3)

    def forward(self, x):
        return {"loss": self.layer.weight.square().sum().exp().mean() + 0 * x.mean()}


def test_infinite_losses_stay_visible():
    objective = Objective([{"x": torch.zeros(2, 1)}])
    result = read_noise(objective, WeightSpace.full(Overflowing()), [0.01, 100.0], directions=3)
    assert np.isfinite(result.rises[0]).all()
    assert np.isposinf(result.mean[1])
    assert math.isnan(result.standard_error[1])


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"sigmas": []}, "sigmas"),
        ({"sigmas": [0.1, 0.0]}, "sigmas.1"),
        ({"sigmas": [math.nan]}, "sigmas.0"),
        ({"directions": 0}, "directions"),
        ({"kind": "both"}, "kind"),
    ],
)
def test_bad_settings_are_one_line(change, word):
    objective, _ = quadratic_objective()
    with pytest.raises(UserError, match=word) as error:
        read_noise(objective, WeightSpace.all(Quadratic()), **{"sigmas": [0.1], **change})
    assert "\n" not in str(error.value)


def test_factors_are_not_stored_weights():
    with pytest.raises(UserError, match="full space"):
        read_noise(bert_objective(), WeightSpace.lora(with_lora(tiny_bert())), [0.1])
