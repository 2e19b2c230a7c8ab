"""Planes of trajectories against motion planted by hand, numpy's SVD, and checkpoints that PEFT saved."""

import json
import math
import shutil

import numpy as np
import pytest
import torch

from analysis.core import Objective, WeightSpace, norm
from analysis.landscape.trajectory import load_checkpoints, trajectory_plane
from bilora.errors import UserError
from tests.oracles import tiny
from tests.sharpness.cases import (
    Fault,
    assert_same_bits,
    bert_objective,
    fail_at,
    flat,
    randomise_factors,
    state,
    tiny_bert,
    with_lora,
)


def space_of(dtype=torch.float64):
    return WeightSpace.full(with_lora(tiny_bert(dtype)))


def planted(space, steps, seed=1):
    """Weights w_T + steps·directions, orthonormal: ``steps`` (T, k) ends with zeros. Also the final ones, flat."""
    steps = torch.tensor(steps, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    directions, _ = torch.linalg.qr(torch.randn(space.size, steps.shape[1], generator=generator, dtype=torch.float64))
    final = flat({name: p.detach() for name, p in space.parameters.items()}).double()
    dtype = next(iter(space.parameters.values())).dtype
    return [space.named_vector((final + directions @ row).to(dtype)) for row in steps], final, directions


SPIRAL = [(3.0, 0.0), (2.0, 1.0), (1.0, -0.5), (0.5, 0.7), (0.0, 0.0)]


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_motion_in_a_plane_is_explained_and_nothing_lies_off_it(dtype, close):
    space = space_of(dtype)
    weights, final, _ = planted(space, SPIRAL)
    plane = trajectory_plane(space, weights)
    assert sum(plane.explained) == pytest.approx(1, abs=close)
    assert plane.explained[0] > plane.explained[1] > 0.01
    assert (plane.kind, plane.path, plane.origin) == ("trajectory", True, None)
    assert abs(plane.cosine) < close
    assert [norm(axis) for axis in plane.axes] == pytest.approx([1, 1], rel=1e-6)
    for mark, point, (a, b) in zip(plane.marks, weights, SPIRAL, strict=True):
        assert mark.off_plane <= close
        assert math.hypot(mark.x, mark.y) == pytest.approx(math.hypot(a, b), abs=close)
        landed = flat(plane.at(mark.x, mark.y)).double() + final
        torch.testing.assert_close(landed, flat(point).double(), rtol=0, atol=close)
    assert (plane.marks[-1].x, plane.marks[-1].y, plane.marks[-1].off_plane) == (0, 0, 0)
    assert max(plane.marks, key=lambda m: abs(m.x)).x > 0
    assert max(plane.marks, key=lambda m: abs(m.y)).y > 0
    assert plane.window[0] < min(m.x for m in plane.marks)
    assert plane.window[3] > max(m.y for m in plane.marks)


def test_what_leaves_the_plane_is_what_numpys_svd_leaves():
    space = space_of()
    third = [(a, b, c) for (a, b), c in zip(SPIRAL, (0.2, -0.4, 0.3, 0.1, 0.0), strict=True)]
    weights, final, _ = planted(space, third)
    plane = trajectory_plane(space, weights)
    matrix = torch.stack([flat(w) - final for w in weights]).numpy()
    _, _, right = np.linalg.svd(matrix, full_matrices=False)
    shares = (matrix @ right.T).var(axis=0) / matrix.var(axis=0).sum()
    assert plane.explained == pytest.approx(tuple(shares[:2]), rel=1e-10)
    assert shares.sum() == pytest.approx(1, rel=1e-12)
    left = np.linalg.norm(matrix - matrix @ right[:2].T @ right[:2], axis=1)
    np.testing.assert_allclose([m.off_plane for m in plane.marks], left, rtol=1e-9, atol=1e-12)
    assert left.max() > 0.1


def test_a_second_axis_a_thousand_times_shorter_is_still_right():
    space = space_of()
    thin = [(3.0, 1e-3), (2.0, -1e-3), (1.0, 2e-3), (0.0, 0.0)]
    weights, _, directions = planted(space, thin)
    plane = trajectory_plane(space, weights)
    v = flat(plane.axes[1])
    assert float((directions.T @ v).norm()) == pytest.approx(1, abs=1e-9)
    assert abs(plane.cosine) < 1e-14
    assert max(m.off_plane for m in plane.marks) < 1e-12


def test_true_losses_are_those_of_the_checkpoints_and_weights_come_back():
    space, objective = space_of(), bert_objective()
    weights, final, directions = planted(space, [(1.0, 0.0), (0.3, 0.6), (0.5, -0.2), (0.0, 0.0)])
    weights[1] = space.named_vector(flat(weights[1]) + directions[:, 0].roll(1))
    bits, seen = state(space.model), []
    plane = trajectory_plane(
        space, weights, ["a", "b", "c", "d"], objective=objective, watch=lambda *at: seen.append(at)
    )
    assert_same_bits(space.model, bits)
    assert seen == [(i, 4, "losses") for i in range(1, 5)]
    for mark, point in zip(plane.marks, weights, strict=True):
        with space.perturbed(space.named_vector(flat(point) - final)):
            assert mark.loss == pytest.approx(objective.loss(space), rel=1e-10)
    away = max(plane.marks, key=lambda m: m.off_plane)
    with space.perturbed(plane.at(away.x, away.y)):
        assert abs(objective.loss(space) - away.loss) > 1e-6
    hook = fail_at(space.model, 2)
    with pytest.raises(Fault):
        trajectory_plane(space, weights, objective=objective)
    hook.remove()
    assert_same_bits(space.model, bits)


def test_a_space_elsewhere_gets_the_difference_as_origin():
    space = space_of()
    weights, final, _ = planted(space, SPIRAL)
    moved = [space.named_vector(flat(point) + 0.25) for point in weights]
    plane = trajectory_plane(space, moved)
    np.testing.assert_allclose(flat(plane.at(0.0, 0.0)).numpy(), 0.25, rtol=1e-12)
    mark = plane.marks[1]
    torch.testing.assert_close(flat(plane.at(mark.x, mark.y)) + final, flat(moved[1]), rtol=0, atol=1e-12)


def test_losses_that_are_not_finite_stay_visible():
    class Overflowing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 3)

        def forward(self, x):
            return {"loss": (100 * self.layer.weight.sum() + 0 * x.sum()).exp()}

    space = WeightSpace.named(Overflowing(), ".*weight")
    zero = {name: torch.zeros_like(p) for name, p in space.parameters.items()}
    up, side = ({name: tensor.clone() for name, tensor in zero.items()} for _ in range(2))
    up["layer.weight"].fill_(1.0)
    side["layer.weight"][0, 0] = -1.0
    objective = Objective([{"x": torch.zeros(2, 1)}])
    plane = trajectory_plane(space, [up, side, zero], objective=objective)
    assert math.isinf(plane.marks[0].loss)
    assert plane.marks[2].loss == 1.0


def fewer(space, weights):
    return weights[-2:], "3 checkpoints or more, not 2: train with save_total_limit null"


def all_equal(space, weights):
    return [weights[0]] * 4, "all equal"


def rounding_alone(space, weights):
    rows = [flat(weights[-1]) * (1 + i * torch.finfo(torch.float64).eps) for i in range(4)]
    return [space.named_vector(row) for row in rows], "all equal, to rounding"


def straight(space, weights):
    return planted(space, [(3.0,), (2.0,), (1.0,), (0.0,)])[0], "on one line"


def broken(space, weights):
    weights[1] = {name: tensor.clone() for name, tensor in weights[1].items()}
    next(iter(weights[1].values()))[0, 0] = math.inf
    return weights, "checkpoint 2 has weights that are not finite"


def incomplete(space, weights):
    weights[1] = dict(list(weights[1].items())[1:])
    return weights, "checkpoint 2 lacks bert"


def misshapen(space, weights):
    weights[0] = {name: tensor[:1] for name, tensor in weights[0].items()}
    return weights, "checkpoint 1 does not fit the full space"


@pytest.mark.parametrize("case", [fewer, all_equal, rounding_alone, straight, broken, incomplete, misshapen])
def test_checkpoints_that_make_no_plane_are_refused_in_one_line(case):
    space = space_of()
    weights, message = case(space, planted(space, SPIRAL)[0])
    with pytest.raises(UserError, match=message) as error:
        trajectory_plane(space, weights)
    assert "\n" not in str(error.value)


# Checkpoints on disk

STEPS = (90, 100, 8)


@pytest.fixture
def run(tmp_path):
    """A run folder with checkpoints in steps 8, 90 and 100; their models by label."""
    models = {}
    for step in STEPS:
        model = with_lora(tiny_bert())
        randomise_factors(model, step)
        with torch.no_grad():
            model.get_parameter("base_model.model.classifier.modules_to_save.default.weight").add_(step / 100)
        model.save_pretrained(tmp_path / "checkpoints" / f"checkpoint-{step}")
        models[f"step {step}"] = model
    (tmp_path / "checkpoints" / "checkpoint-last").mkdir()
    return tmp_path, models


def assert_weights_of(model, point):
    merged = dict(model.eval().merge_and_unload().named_parameters())
    for name, tensor in point.items():
        torch.testing.assert_close(tensor, merged[name], rtol=0, atol=1e-14)


def test_checkpoints_are_loaded_by_number_with_the_head_trained_along(run):
    folder, models = run
    seen = []
    found = load_checkpoints(folder, tiny_bert, watch=lambda *at: seen.append(at))
    assert found.labels == ("step 8", "step 90", "step 100")
    assert seen == [(i, 3, "checkpoints") for i in (1, 2, 3)]
    objective = bert_objective()
    plane = trajectory_plane(found.space, found.weights, found.labels, objective=objective)
    assert plane.origin is None
    for mark, label, point in zip(plane.marks, found.labels, found.weights, strict=True):
        model = models[label].eval()
        expected = objective.loss(WeightSpace.full(model))
        assert mark.loss == pytest.approx(expected, rel=1e-12)
        assert mark.label == label
        assert "classifier.weight" in point
        assert_weights_of(model, point)
    # Three points: the plane holds them all, and the loss on it is theirs.
    for mark in plane.marks:
        with found.space.perturbed(plane.at(mark.x, mark.y)):
            assert objective.loss(found.space) == pytest.approx(mark.loss, rel=1e-10)


def test_the_adapter_of_the_run_comes_last_unless_it_is_the_last_checkpoint(run):
    folder, models = run
    models["step 100"].save_pretrained(folder)
    assert load_checkpoints(folder, tiny_bert).labels == ("step 8", "step 90", "step 100")
    models["step 8"].save_pretrained(folder)
    found = load_checkpoints(folder, tiny_bert)
    assert found.labels == ("step 8", "step 90", "step 100", "final")
    assert_weights_of(models["step 8"], found.weights[-1])
    assert torch.equal(flat(found.weights[-1]), flat({n: p.detach() for n, p in found.space.parameters.items()}))


def test_a_folder_of_checkpoints_and_factors(run):
    folder, models = run
    found = load_checkpoints(folder / "checkpoints", tiny_bert, form=WeightSpace.lora)
    layer = "bert.pooler.dense"
    factor = models["step 8"].get_parameter(f"base_model.model.{layer}.lora_A.default.weight")
    assert torch.equal(found.weights[0][f"{layer}.A"], factor)
    assert found.space.name == "lora"
    assert trajectory_plane(found.space, found.weights).explained[0] > 0


def test_checkpoints_that_do_not_fit_the_stock_base_are_refused(run):
    folder, _ = run
    config = folder / "checkpoints" / "checkpoint-90" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"init_lora_weights": "lora_ga"}))
    with pytest.raises(UserError, match="step 90 started by LoRA-GA"):
        load_checkpoints(folder, tiny_bert)


def test_folders_without_usable_checkpoints_are_refused(run, tmp_path):
    folder, _ = run
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="holds no checkpoints: train with save_total_limit null"):
        load_checkpoints(empty, tiny_bert)
    with pytest.raises(UserError, match="another base model"):
        load_checkpoints(folder, lambda: tiny.bert(hidden=12))
    place = folder / "checkpoints" / "checkpoint-90"
    shutil.rmtree(place)
    other = tiny.with_lora(tiny_bert(), target_modules=["query"])
    other.save_pretrained(place)
    with pytest.raises(UserError, match="step 90 differs from the checkpoint before it in bert"):
        load_checkpoints(folder, tiny_bert)
    (place / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="checkpoint-90 has no adapter_model"):
        load_checkpoints(folder, tiny_bert)
