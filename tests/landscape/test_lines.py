"""Loss lines against closed forms and weights moved by hand."""

import copy
import math

import numpy as np
import pytest
import torch

from analysis.core import COLUMNS, Objective, WeightSpace, filter_normalized, gaussian
from analysis.landscape import lines as lines_module
from analysis.landscape.lines import MEASURE, line_coordinates, loss_lines
from analysis.landscape.store import PointStore
from analysis.landscape.window import LADDER
from bilora.errors import UserError
from tests.sharpness.cases import (
    Quadratic,
    bert_objective,
    change_gauge,
    flat,
    loss_by_sentence,
    quadratic_objective,
    tiny_bert,
    with_lora,
)


@pytest.mark.parametrize(("extent", "points"), [(1.0, 21), (0.3, 3), (0.7, 101)])
def test_coordinates_are_symmetric_around_an_exact_zero(extent, points):
    t = line_coordinates(extent, points)
    assert len(t) == points
    assert t[points // 2] == 0
    assert t[0] == -extent
    assert np.array_equal(t, -t[::-1])
    np.testing.assert_allclose(np.diff(t), 2 * extent / (points - 1), rtol=1e-12)


def test_quadratic_is_exact_and_symmetric_at_its_minimum():
    model = Quadratic(definite=True)
    objective, _ = quadratic_objective(centre=model.theta().detach())
    space = WeightSpace.all(model)
    lines = loss_lines(objective, space, extent=0.8, points=7, directions=3, seed=2)
    base = objective.loss(space)
    for i in range(3):
        d = flat(filter_normalized(space, gaussian(space, 2, i)))
        assert torch.count_nonzero(d[12:]) == 0
        for j, t in enumerate(lines.coordinates):
            assert lines.losses[i, j] == pytest.approx(base + float(0.5 * t**2 * d @ model.H @ d), rel=1e-12)
            assert lines.induced_norms[i, j] == pytest.approx(abs(t) * float(d.norm()), rel=1e-12)
    np.testing.assert_allclose(lines.losses, lines.losses[:, ::-1], rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_centre_is_the_unperturbed_loss_bit_for_bit(dtype):
    model, objective = with_lora(tiny_bert(dtype)), bert_objective()
    for space in (WeightSpace.full(model), WeightSpace.lora(model)):
        lines = loss_lines(objective, space, points=3, directions=2)
        assert (lines.losses[:, 1] == objective.loss(space)).all()
        with space.perturbed(filter_normalized(space, gaussian(space, 0, 0)), 0.0):
            assert objective.loss(space) == lines.losses[0, 1]
        assert (lines.induced_norms[:, 1] == 0).all()


def test_full_space_of_a_padded_bert_against_weights_moved_by_hand():
    model = with_lora(tiny_bert())
    space = WeightSpace.full(model)
    lines = loss_lines(bert_objective(), space, extent=0.5, points=3, directions=1, seed=4)
    for column, t in ((0, -0.5), (2, 0.5)):
        moved = copy.deepcopy(model).merge_and_unload()
        with torch.no_grad():
            for name, g in gaussian(space, 4, 0).items():
                weight = moved.get_parameter(name)
                weight.add_(t * g * (weight.norm(dim=1) / g.norm(dim=1))[:, None])
        assert lines.losses[0, column] == pytest.approx(float(loss_by_sentence(moved).detach()), rel=1e-10)


def test_lora_space_scales_rows_of_both_factors():
    model = with_lora(tiny_bert())
    space = WeightSpace.lora(model)
    lines = loss_lines(bert_objective(), space, extent=0.5, points=3, directions=1)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for name, g in gaussian(space, 0, 0).items():
            layer, _, factor = name.rpartition(".")
            weight = moved.get_parameter(f"base_model.model.{layer}.lora_{factor}.default.weight")
            weight.add_(0.5 * g * (weight.norm(dim=1) / g.norm(dim=1))[:, None])
    assert lines.losses[0, 2] == pytest.approx(float(loss_by_sentence(moved).detach()), rel=1e-10)


def test_adapters_of_one_base_meet_the_same_lines_and_the_gauge_is_immaterial_in_full_space():
    model, other = with_lora(tiny_bert()), with_lora(tiny_bert())
    change_gauge(other, 4.0)
    objective = bert_objective()
    one, two = (loss_lines(objective, WeightSpace.full(m), points=3, directions=2) for m in (model, other))
    assert np.array_equal(one.losses, two.losses)
    assert not np.array_equal(one.losses[0], one.losses[1])


def test_non_finite_losses_stay_visible():
    class Overflowing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 3)
            torch.nn.init.ones_(self.layer.weight)

        def forward(self, x):
            return {"loss": (self.layer.weight.square().sum() + 0 * x.sum()).exp()}

    objective = Objective([{"x": torch.zeros(2, 1)}])
    lines = loss_lines(objective, WeightSpace.full(Overflowing()), extent=30.0, points=3, directions=1)
    assert np.isposinf(lines.losses[0, [0, 2]]).all()
    assert math.isfinite(lines.losses[0, 1])
    assert [r["value"] for r in lines.rows()] == lines.losses[0].tolist()


def test_rows_are_points():
    objective, _ = quadratic_objective()
    settings = MEASURE.settings(extent=0.5, points=5, directions=2)
    lines = MEASURE.run(objective, WeightSpace.full(Quadratic()), settings, None)
    rows = lines.rows()
    assert all(tuple(r) == COLUMNS for r in rows)
    assert [(r["index"], r["radius"]) for r in rows] == [(i, t) for i in range(2) for t in (-0.5, -0.25, 0, 0.25, 0.5)]
    assert [r["value"] for r in rows] == lines.losses.flatten().tolist()
    assert [r["induced_norm"] for r in rows] == lines.induced_norms.flatten().tolist()
    assert {(r["measure"], r["space"], r["quantity"], r["split"]) for r in rows} == {
        ("landscape", "full", "loss", "train")
    }


def test_worker_processes_find_the_same_bits_and_a_stopped_run_continues(tmp_path):
    objective, space = bert_objective(), WeightSpace.full(with_lora(tiny_bert(torch.float32)))
    settings = {"points": 5, "directions": 3, "seed": 1}
    alone = loss_lines(objective, space, **settings)
    store = PointStore(tmp_path / "points.jsonl")

    def stop(done, most, note):
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loss_lines(objective, space, store=store, watch=stop, **settings)
    passes = []
    hook = space.model.register_forward_hook(lambda *_: passes.append(1))
    again = loss_lines(objective, space, store=store, **settings)
    hook.remove()
    assert len(passes) == 3 * (13 - 7)
    shared = loss_lines(objective, space, workers=2, **settings)
    for lines in (again, shared):
        assert np.array_equal(lines.losses, alone.losses)
        assert np.array_equal(lines.induced_norms, alone.induced_norms)


def test_the_extent_follows_the_rise_asked_for():
    model = Quadratic(definite=True)
    objective, _ = quadratic_objective(centre=model.theta().detach())
    space = WeightSpace.all(model)
    rises = []
    for i in range(3):
        d = flat(filter_normalized(space, gaussian(space, 0, i)))
        rises += [float(0.5 * d @ model.H @ d)] * 2
    for target in (0.01, 1.0, 40.0):
        extent = loss_lines(objective, space, points=3, directions=3, target_rise=target).coordinates[-1]
        smaller = LADDER[LADDER.index(extent) - 1]
        assert np.median(rises) * smaller**2 < target <= np.median(rises) * extent**2


def test_bfloat16_lines_say_how_far_they_are_off_or_are_not_bfloat16(monkeypatch):
    objective, space = bert_objective(), WeightSpace.full(with_lora(tiny_bert(torch.float32)))
    settings = {"extent": 2.0, "points": 9, "directions": 4}
    exact = loss_lines(objective, space, **settings)
    tiny_steps = loss_lines(objective, space, precision="bfloat16", **{**settings, "extent": 1e-5})
    assert tiny_steps.check is None
    assert np.array_equal(tiny_steps.losses, loss_lines(objective, space, **{**settings, "extent": 1e-5}).losses)
    monkeypatch.setattr(lines_module, "PRECISION_ERROR", math.inf)
    half = loss_lines(objective, space, precision="bfloat16", **settings)
    assert (half.losses[:, 4] == objective.loss(space)).all()
    assert len(half.check.keys) == 8
    assert 0 < np.abs(half.losses - exact.losses).max() <= half.check.error * np.ptp(half.losses)
    worth = {r["quantity"]: r["value"] for r in half.rows() if r["quantity"] != "loss"}
    assert worth == {
        "precision_error": half.check.error,
        "precision_seen": half.check.seen,
        "precision_checked": 8,
    }


def test_progress_counts_losses():
    objective, _ = quadratic_objective()
    seen = []
    loss_lines(objective, WeightSpace.all(Quadratic()), points=3, directions=2, watch=lambda *at: seen.append(at[:2]))
    assert seen == [(i, 5) for i in range(1, 6)]


@pytest.mark.parametrize(
    "change",
    [
        {"extent": 0.0},
        {"extent": math.inf},
        {"extent": 1.0, "target_rise": 1.0},
        {"target_rise": 0.0},
        {"points": 4},
        {"points": 1},
        {"directions": 0},
        {"workers": 0},
    ],
)
def test_bad_settings_are_one_line(change):
    objective, _ = quadratic_objective()
    with pytest.raises(UserError, match=next(iter(change))) as error:
        loss_lines(objective, WeightSpace.all(Quadratic()), **change)
    assert "\n" not in str(error.value)
