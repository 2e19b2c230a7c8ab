"""Random sharpness against closed forms, noise statistics and perturbations made by hand."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from analysis.core import COLUMNS, Objective, WeightSpace
from analysis.sharpness.random import MEASURE, checkpoints, filter_noise, isotropic_noise, random_sharpness
from bilora.adapters.layers import adapted_layers
from bilora.errors import UserError
from tests.sharpness.cases import (
    Fault,
    Quadratic,
    assert_same_bits,
    bert_objective,
    change_gauge,
    fail_at,
    flat,
    loss_by_sentence,
    normal,
    quadratic_objective,
    state,
    tiny_bert,
    with_lora,
)


def test_isotropic_rise_on_a_quadratic_is_exact_along_each_direction():
    model = Quadratic()
    objective, x = quadratic_objective()
    space = WeightSpace.all(model)
    result = random_sharpness(objective, space, [0.3, 2.0], kind="isotropic", directions=4, seed=7)
    gradient = model.H @ (model.theta().detach() - x.mean(0))
    for j in range(4):
        u = flat(isotropic_noise(space, 7, j))
        assert float(u.norm()) == pytest.approx(1.0, rel=1e-14)
        for i, rho in enumerate((0.3, 2.0)):
            expected = rho * gradient @ u + 0.5 * rho**2 * u @ model.H @ u
            assert result.rises[i, j] == pytest.approx(float(expected), rel=1e-11)
    np.testing.assert_allclose(result.induced_norms, [[0.3] * 4, [2.0] * 4], rtol=1e-13)


def test_isotropic_mean_at_a_minimum_is_the_trace():
    """E = rho²·tr(H)/(2n), within the reported standard error."""
    model = Quadratic(definite=True)
    objective, _ = quadratic_objective(centre=model.theta().detach())
    result = random_sharpness(objective, WeightSpace.all(model), [0.5], kind="isotropic", directions=400)
    expected = 0.5**2 * float(model.H.trace()) / (2 * 15)
    assert abs(result.mean[0] - expected) < 4 * result.standard_error[0]
    assert result.standard_error[0] < 0.05 * expected
    assert result.standard_error[0] == pytest.approx(np.std(result.rises[0], ddof=1) / math.sqrt(400))


def test_antithetic_pairs_remove_the_first_order_term():
    model = Quadratic()
    objective, _ = quadratic_objective()
    space = WeightSpace.all(model)
    result = random_sharpness(objective, space, [1.5], kind="isotropic", directions=3, antithetic=True)
    for j in range(3):
        u = flat(isotropic_noise(space, 0, j))
        assert result.rises[0, j] == pytest.approx(float(0.5 * 1.5**2 * u @ model.H @ u), rel=1e-11)


def test_filter_noise_has_the_variance_of_flat_lora():
    """Row i of n columns: standard deviation ‖W_i‖/√n, mean 0, rows independent, biases untouched."""
    model = nn.Linear(4000, 4)
    with torch.no_grad():
        model.weight.copy_(normal(4, 4000, seed=1) * torch.tensor([[0.1], [1.0], [5.0], [0.0]]))
    space = WeightSpace.all(model)
    noise = filter_noise(space, 0, 0)
    assert torch.count_nonzero(noise["bias"]) == 0
    rows = noise["weight"].double()
    for i in range(3):
        expected = float(model.weight[i].detach().double().norm()) / math.sqrt(4000)
        assert float(rows[i].std()) == pytest.approx(expected, rel=4 / math.sqrt(2 * 4000))
        assert abs(float(rows[i].mean())) < 4 * expected / math.sqrt(4000)
    assert torch.count_nonzero(rows[3]) == 0
    assert abs(float(torch.corrcoef(rows[:3])[0, 1])) < 4 / math.sqrt(4000)


def test_filter_rise_on_a_quadratic_is_exact():
    model = Quadratic()
    objective, x = quadratic_objective()
    space = WeightSpace.all(model)
    result = random_sharpness(objective, space, [0.2], directions=3)
    gradient = model.H @ (model.theta().detach() - x.mean(0))
    for j in range(3):
        e = 0.2 * flat(filter_noise(space, 0, j))
        assert result.rises[0, j] == pytest.approx(float(gradient @ e + 0.5 * e @ model.H @ e), rel=1e-11)
        assert result.induced_norms[0, j] == pytest.approx(float(e.norm()), rel=1e-13)


def test_full_space_on_a_padded_bert_against_weights_changed_by_hand():
    model = with_lora(tiny_bert())
    objective, space = bert_objective(), WeightSpace.full(model)
    result = random_sharpness(objective, space, [0.3], directions=2, seed=3)
    merged = copy.deepcopy(model).merge_and_unload()
    base = float(loss_by_sentence(merged).detach())
    assert result.base_loss == pytest.approx(base, rel=1e-12)
    for j in range(2):
        noise = filter_noise(space, 3, j)
        moved = copy.deepcopy(merged)
        squares = 0.0
        with torch.no_grad():
            for name, e in noise.items():
                moved.get_parameter(name).add_(0.3 * e)
                squares += float((0.3 * e).square().sum())
        assert result.rises[0, j] == pytest.approx(float(loss_by_sentence(moved).detach()) - base, rel=1e-9)
        assert result.induced_norms[0, j] == pytest.approx(math.sqrt(squares), rel=1e-10)


@pytest.mark.parametrize("kind", ["filter", "isotropic"])
def test_lora_space_on_a_padded_bert_against_factors_changed_by_hand(kind):
    model = with_lora(tiny_bert())
    objective, space = bert_objective(), WeightSpace.lora(model)
    result = random_sharpness(objective, space, [0.7], kind=kind, directions=1)
    noise = (filter_noise if kind == "filter" else isotropic_noise)(space, 0, 0)
    moved = copy.deepcopy(model)
    before, after = adapted_layers(model), adapted_layers(moved)
    squares = 0.0
    with torch.no_grad():
        for name, layer in after.items():
            layer.A.add_(0.7 * noise[f"{name}.A"])
            layer.B.add_(0.7 * noise[f"{name}.B"])
            change = layer.merged_weight(torch.float64) - before[name].merged_weight(torch.float64)
            squares += float(change.square().sum())
    rise = float(loss_by_sentence(moved).detach()) - float(loss_by_sentence(model).detach())
    assert result.rises[0, 0] == pytest.approx(rise, rel=1e-9)
    assert result.induced_norms[0, 0] == pytest.approx(math.sqrt(squares), rel=1e-9)


def test_two_adapters_of_one_base_meet_the_same_directions():
    first, second = (with_lora(tiny_bert(), seed=seed) for seed in (5, 6))
    one, two = WeightSpace.full(first), WeightSpace.full(second)
    for index in range(2):
        assert torch.equal(flat(isotropic_noise(one, 0, index)), flat(isotropic_noise(two, 0, index)))
    a, b = filter_noise(one, 0, 0), filter_noise(two, 0, 0)
    for name, norms in one.filter_norms().items():
        ratio = norms / two.filter_norms()[name]
        torch.testing.assert_close(a[name], b[name] * ratio[:, None], rtol=1e-12, atol=0)
    assert not torch.equal(flat(isotropic_noise(one, 0, 0)), flat(isotropic_noise(one, 0, 1)))
    assert not torch.equal(flat(isotropic_noise(one, 0, 0)), flat(isotropic_noise(one, 1, 0)))


def test_full_space_does_not_depend_on_the_gauge_and_lora_space_does():
    model, other = with_lora(tiny_bert()), with_lora(tiny_bert())
    change_gauge(other, 4.0)
    objective = bert_objective()
    for kind in ("filter", "isotropic"):
        full = [
            random_sharpness(objective, WeightSpace.full(m), [0.5], kind=kind, directions=2) for m in (model, other)
        ]
        assert np.array_equal(full[0].rises, full[1].rises)
        assert np.array_equal(full[0].induced_norms, full[1].induced_norms)
    lora = [
        random_sharpness(objective, WeightSpace.lora(m), [0.5], kind="isotropic", directions=2) for m in (model, other)
    ]
    assert (lora[1].induced_norms > 1.5 * lora[0].induced_norms).all()


def test_same_seed_same_result():
    model, objective = with_lora(tiny_bert(torch.float32)), bert_objective()
    runs = [random_sharpness(objective, WeightSpace.full(model), [0.1, 0.4], directions=2, seed=1) for _ in range(2)]
    assert np.array_equal(runs[0].rises, runs[1].rises)
    other = random_sharpness(objective, WeightSpace.full(model), [0.1, 0.4], directions=2, seed=2)
    assert not np.array_equal(runs[0].rises, other.rises)


class Overflowing(nn.Module):
    """A loss that leaves float32 when the weights move."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return {"loss": self.layer.weight.square().sum().exp().mean() + 0 * x.mean()}


def test_infinite_losses_stay_visible():
    objective = Objective([{"x": torch.zeros(2, 1)}])
    result = random_sharpness(objective, WeightSpace.full(Overflowing()), [0.01, 100.0], directions=3)
    assert np.isfinite(result.rises[0]).all()
    assert np.isposinf(result.rises[1]).all()
    assert np.isposinf(result.mean[1])
    assert math.isnan(result.standard_error[1])
    values = [r["value"] for r in result.rows() if r["radius"] == 100.0]
    assert values == [math.inf] * 4


def test_rows_are_directions_and_means():
    model = Quadratic()
    objective, _ = quadratic_objective()
    settings = MEASURE.settings(radii=(0.1, 0.2), kind="isotropic", directions=3, seed=7)
    result = MEASURE.run(objective, WeightSpace.all(model), settings, None)
    rows = result.rows()
    assert all(tuple(r) == COLUMNS for r in rows)
    assert result.seed == 7
    assert {r["direction_seed"] for r in rows} == {7}
    assert {(r["measure"], r["space"], r["split"], r["kind"]) for r in rows} == {
        ("random", "all", "train", "isotropic")
    }
    single = [r for r in rows if r["quantity"] == "loss_rise"]
    assert [(r["radius"], r["index"]) for r in single] == [(rho, j) for rho in (0.1, 0.2) for j in range(3)]
    assert [r["value"] for r in single] == result.rises.flatten().tolist()
    means = [r for r in rows if r["quantity"] == "loss_rise_mean"]
    assert [r["value"] for r in means] == pytest.approx([np.mean(line) for line in result.rises])
    assert [r["standard_error"] for r in means] == pytest.approx(result.standard_error.tolist())
    assert [r["induced_norm"] for r in means] == pytest.approx([0.1, 0.2])
    assert len(rows) == 8


def test_one_direction_has_no_standard_error():
    objective, _ = quadratic_objective()
    result = random_sharpness(objective, WeightSpace.all(Quadratic()), [0.1], directions=1)
    assert math.isnan(result.standard_error[0])


def test_progress_counts_losses():
    objective, _ = quadratic_objective()
    seen = []
    random_sharpness(
        objective,
        WeightSpace.all(Quadratic()),
        [0.1, 0.2],
        directions=2,
        antithetic=True,
        watch=lambda done, total, note: seen.append((done, total)),
    )
    assert seen == [(i, 9) for i in range(1, 10)]


@pytest.mark.parametrize(
    ("least", "most", "expected"),
    [
        (1, 100, [8, 12, 16, 24, 32, 48, 64, 96, 100]),
        (10, 33, [10, 12, 16, 24, 32, 33]),
        (16, 24, [16, 24]),
        (20, 20, [20]),
        (3, 8, [8]),
    ],
)
def test_the_standard_error_is_looked_at_few_times(least, most, expected):
    assert list(checkpoints(least, most)) == expected


@pytest.mark.parametrize("antithetic", [False, True])
def test_directions_are_added_until_the_standard_error_is_reached(antithetic):
    """The first count of the rule at which it holds at every radius, along the directions of a fixed run."""
    model = Quadratic(definite=True)
    objective, _ = quadratic_objective(centre=model.theta().detach() + 0.01)
    space = WeightSpace.all(model)
    common = {"kind": "isotropic", "seed": 3, "antithetic": antithetic}
    result = random_sharpness(objective, space, [0.1, 0.5], directions=2, se=0.04, **common)
    used = result.rises.shape[1]
    fixed = random_sharpness(objective, space, [0.1, 0.5], directions=used, **common)
    assert np.array_equal(result.rises, fixed.rises)
    assert np.array_equal(result.induced_norms, fixed.induced_norms)

    def holds(count):
        part = fixed.rises[:, :count]
        return (part.std(axis=1, ddof=1) / math.sqrt(count) <= 0.04 * abs(part.mean(axis=1))).all()

    looked_at = [count for count in checkpoints(2, 1000) if count <= used]
    assert [holds(count) for count in looked_at] == [False] * (len(looked_at) - 1) + [True]
    assert len(looked_at) > 2
    assert result.reached.tolist() == [True, True]
    assert not fixed.reached.any()
    rows = [(r["radius"], r["quantity"], r["value"]) for r in result.rows() if r["index"] == -1]
    assert [r for r in rows if r[1] != "loss_rise_mean"] == [
        (radius, quantity, value) for radius in (0.1, 0.5) for quantity, value in (("reached", 1), ("directions", used))
    ]


def test_no_spread_at_all_still_takes_eight_directions():
    model = Quadratic(definite=True)
    model.H.copy_(torch.eye(15))
    objective, _ = quadratic_objective(centre=model.theta().detach())
    result = random_sharpness(objective, WeightSpace.all(model), [0.3], kind="isotropic", directions=1, se=0.01)
    assert result.rises.shape == (1, 8)
    np.testing.assert_allclose(result.rises, 0.5 * 0.3**2, rtol=1e-12)


def test_a_standard_error_out_of_reach_is_said_to_be():
    objective, _ = quadratic_objective()
    seen = []
    result = random_sharpness(
        objective,
        WeightSpace.all(Quadratic()),
        [0.3],
        se=1e-6,
        max_directions=14,
        watch=lambda done, most, note: seen.append((done, most)),
    )
    assert result.rises.shape == (1, 14)
    assert result.reached.tolist() == [False]
    values = {r["quantity"]: r["value"] for r in result.rows() if r["index"] == -1}
    assert (values["reached"], values["directions"]) == (0.0, 14.0)
    assert seen == [(i, 15) for i in range(1, 16)]


def test_a_radius_with_infinite_losses_is_not_waited_for():
    objective = Objective([{"x": torch.zeros(2, 1)}])
    space = WeightSpace.full(Overflowing())
    alone = random_sharpness(objective, space, [0.01], se=0.3, antithetic=True)
    both = random_sharpness(objective, space, [0.01, 100.0], se=0.3, antithetic=True)
    assert alone.rises.shape[1] < 1000
    assert both.rises.shape[1] == alone.rises.shape[1]
    assert both.reached.tolist() == [True, False]
    assert np.isposinf(both.mean[1])


@pytest.mark.parametrize("call", [1, 4, 30])
def test_weights_come_back_after_an_exception(call):
    model = Quadratic()
    objective, _ = quadratic_objective()
    space = WeightSpace.all(model)
    before = state(space.model)
    hook = fail_at(space.model, call)
    with pytest.raises(Fault):
        random_sharpness(objective, space, [0.5], se=1e-6)
    assert_same_bits(space.model, before)
    hook.remove()
    random_sharpness(objective, space, [0.5], se=0.5, max_directions=8, directions=8)
    assert_same_bits(space.model, before)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"se": 0.0}, "se"),
        ({"se": math.inf}, "se"),
        ({"se": math.nan}, "se"),
        ({"se": 0.1, "max_directions": 7}, "max_directions"),
        ({"se": 0.1, "directions": 30, "max_directions": 20}, "max_directions must be at least directions = 30"),
        ({"radii": []}, "radii"),
        ({"radii": [0.1, -0.1]}, "radii.1"),
        ({"radii": [0.0]}, "radii.0"),
        ({"radii": [math.inf]}, "radii.0"),
        ({"radii": [math.nan]}, "radii.0"),
        ({"directions": 0}, "directions"),
        ({"kind": "gaussian"}, "kind"),
    ],
)
def test_bad_settings_are_one_line(change, word):
    objective, _ = quadratic_objective()
    arguments = {"radii": [0.1], "directions": 2, **change}
    with pytest.raises(UserError, match=word) as error:
        random_sharpness(objective, WeightSpace.all(Quadratic()), **arguments)
    assert "\n" not in str(error.value)


def test_unknown_settings_are_refused():
    with pytest.raises(UserError, match="radiuses"):
        MEASURE.settings.checked(radiuses=(0.1,))


def test_filter_noise_needs_rows():
    objective, _ = quadratic_objective()
    with pytest.raises(UserError, match="isotropic"):
        random_sharpness(objective, WeightSpace.named(Quadratic(), r".*bias"), [0.1])
