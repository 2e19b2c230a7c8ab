"""Random, eigenvector and adapter planes against norms taken by hand, dense matrices and weights merged by PEFT."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from analysis.core import Objective, WeightSpace, filter_normalized, gaussian, norm
from analysis.curvature import top_eigenvalues
from analysis.landscape.adapter_plane import adapter_plane, trained_space
from analysis.landscape.eigen_plane import eigen_plane, measured_eigen_plane
from analysis.landscape.plane import coordinates
from analysis.landscape.random_plane import random_plane
from bilora.errors import UserError
from tests.oracles import tiny
from tests.sharpness.cases import (
    Fault,
    Quadratic,
    assert_same_bits,
    bert_objective,
    change_gauge,
    fail_at,
    flat,
    quadratic_objective,
    state,
    tiny_bert,
    with_lora,
)


def dense_cosine(plane):
    u, v = (flat(axis).double().numpy() for axis in plane.axes)
    return float(u @ v / math.sqrt((u @ u) * (v @ v)))


def adapter(seed, dtype=torch.float64, head=True):
    """An adapter of the one base, its head trained along unless told."""
    model = with_lora(tiny_bert(dtype), seed=seed)
    if head:
        with torch.no_grad():
            weight = model.get_parameter("base_model.model.classifier.modules_to_save.default.weight")
            weight.add_(0.1 * seed)
    return model


def adapters(*seeds, dtype=torch.float64, head=False):
    return [adapter(seed, dtype, head) for seed in seeds]


# Random planes


def test_rows_of_both_axes_have_the_norms_of_the_rows_of_the_weights_and_one_dimensional_parameters_do_not_move():
    space = WeightSpace.all(tiny_bert())
    plane = random_plane(space, seed=3)
    seen = set()
    for axis in plane.axes:
        for name, step in axis.items():
            weight = space.parameters[name].detach()
            if weight.dim() < 2:
                assert torch.count_nonzero(step) == 0, name
                seen.add(name.split(".")[-2])
            else:
                torch.testing.assert_close(step.norm(dim=1), weight.norm(dim=1), rtol=1e-6, atol=0)
    assert "LayerNorm" in seen
    assert (plane.kind, plane.origin, plane.window) == ("filter", None, (-1, 1, -1, 1))


def test_tied_tensors_are_one_parameter():
    space = WeightSpace.all(tiny.llama(tied=True))
    u, _ = random_plane(space).axes
    names = [name for name in u if u[name].shape == space.model.get_input_embeddings().weight.shape]
    assert names == ["model.embed_tokens.weight"]
    with space.perturbed(random_plane(space).at(0.5, 0.5)):
        assert space.model.lm_head.weight.data_ptr() == space.model.get_input_embeddings().weight.data_ptr()


def test_axes_are_the_named_directions_of_the_loss_lines():
    space = WeightSpace.full(adapter(5))
    plane = random_plane(space, seed=2)
    for i, axis in enumerate(plane.axes):
        assert torch.equal(flat(axis), flat(filter_normalized(space, gaussian(space, 2, i))))
    again, other = random_plane(space, seed=2), random_plane(space, seed=3)
    assert torch.equal(flat(again.axes[1]), flat(plane.axes[1]))
    assert not torch.equal(flat(other.axes[0]), flat(plane.axes[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cosine_is_the_dense_one_and_orthogonal_rows_make_it_zero(dtype):
    space = WeightSpace.full(adapter(5, dtype))
    plain, orthogonal = random_plane(space, seed=1), random_plane(space, seed=1, orthogonal=True)
    assert plain.cosine == pytest.approx(dense_cosine(plain), rel=1e-9)
    assert 1e-3 < abs(plain.cosine) < 5 * spread_of_the_cosine(space)
    assert abs(orthogonal.cosine) < (1e-7 if dtype == torch.float32 else 1e-14)
    assert torch.equal(flat(orthogonal.axes[0]), flat(plain.axes[0]))
    for name, step in orthogonal.axes[1].items():
        torch.testing.assert_close(step.norm(dim=1), space.parameters[name].detach().norm(dim=1), rtol=1e-5, atol=0)


def spread_of_the_cosine(space):
    """Its standard deviation over draws: the cosine of two Gaussian rows of n entries has 1/n for a variance.

    ⟨u, v⟩ = Σ_i ‖W_i‖²·cos_i and ‖u‖·‖v‖ = Σ_i ‖W_i‖².
    """
    squares = [(p.detach().flatten(1).double().square().sum(1), p[0].numel()) for p in space.parameters.values()]
    total = sum(float(rows.sum()) for rows, _ in squares)
    return math.sqrt(sum(float(rows.square().sum()) / n for rows, n in squares)) / total


def test_random_axes_are_as_orthogonal_as_chance_makes_them():
    """Of a layer of 64 × 256 the cosine is around 1/128: 60 draws have that standard deviation, and none is 0.1."""
    torch.manual_seed(0)
    space = WeightSpace.named(nn.Linear(256, 64), "weight")
    expected = spread_of_the_cosine(space)
    assert expected == pytest.approx(1 / math.sqrt(64 * 256), rel=0.05)
    cosines = [random_plane(space, seed=seed).cosine for seed in range(60)]
    assert max(map(abs, cosines)) < 5 * expected < 0.1
    assert math.sqrt(np.mean(np.square(cosines))) == pytest.approx(expected, rel=0.3)


def test_rows_of_one_entry_keep_their_direction():
    torch.manual_seed(0)
    narrow = nn.Sequential(nn.Linear(1, 5), nn.Linear(5, 5))
    space = WeightSpace.named(narrow, ".*weight")
    u, v = random_plane(space, orthogonal=True).axes
    torch.testing.assert_close(v["0.weight"].abs(), narrow[0].weight.detach().abs())
    torch.testing.assert_close((u["1.weight"] * v["1.weight"]).sum(1), torch.zeros(5), rtol=0, atol=1e-7)


def test_a_plane_needs_rows():
    with pytest.raises(UserError, match="no parameter with rows"):
        random_plane(WeightSpace.named(tiny_bert(), ".*bias"))
    zero = nn.Linear(3, 2)
    nn.init.zeros_(zero.weight)
    with pytest.raises(UserError, match="all rows"):
        random_plane(WeightSpace.named(zero, "weight"))


def test_the_centre_is_exactly_zero_and_a_quadratic_at_its_minimum_is_symmetric():
    model = Quadratic(definite=True)
    objective, _ = quadratic_objective(centre=model.theta().detach())
    space = WeightSpace.all(model)
    plane = random_plane(space)
    assert not any(torch.count_nonzero(step) for step in plane.at(0.0, 0.0).values())
    base = objective.loss(space)
    u, v = (flat(axis) for axis in plane.axes)

    def loss(x, y):
        with space.perturbed(plane.at(x, y)):
            return objective.loss(space)

    assert loss(0.0, 0.0) == base
    for x, y in ((0.3, -0.7), (1.0, 0.2)):
        step = x * u + y * v
        assert loss(x, y) == pytest.approx(base + float(0.5 * step @ model.H @ step), rel=1e-12)
        assert loss(x, y) == pytest.approx(loss(-x, -y), rel=1e-12)


def test_points_are_summed_in_the_dtype_of_the_weights():
    space = WeightSpace.full(adapter(5, torch.float32))
    plane = random_plane(space)
    for name, step in plane.at(0.1, -0.7).items():
        u, v = (axis[name].double() for axis in plane.axes)
        assert step.dtype == torch.float32
        expected = 0.1 * u - 0.7 * v
        assert float((step - expected).norm()) <= 1e-7 * float(expected.norm())


def test_weights_come_back_bit_for_bit_also_after_a_fault():
    model, objective = adapter(5), bert_objective()
    space = WeightSpace.full(model)
    own, users = state(space.model), state(model)
    plane = random_plane(space)
    with space.perturbed(plane.at(1.0, 1.0)):
        objective.loss(space)
    assert_same_bits(space.model, own)
    hook = fail_at(space.model, 2)
    with pytest.raises(Fault), space.perturbed(plane.at(1.0, 1.0)):
        objective.loss(space)
    hook.remove()
    with pytest.raises(KeyboardInterrupt), space.perturbed(plane.at(-1.0, 1.0)):
        raise KeyboardInterrupt
    assert_same_bits(space.model, own)
    assert_same_bits(model, users)


# Eigenvector planes


def indefinite(spectrum=(9.0, 4.0, 1.0, 0.5, -0.2, -3.0)):
    """At its stationary point, with a gradient of zero."""
    model = tiny.Quadratic(list(spectrum), slope=torch.zeros(len(spectrum), dtype=torch.float64))
    return model, Objective([{"x": torch.zeros(1, 1)}], name="train"), WeightSpace.all(model)


@pytest.mark.parametrize(("which", "values"), [("top", (9.0, 4.0)), ("both", (9.0, -3.0))])
def test_axes_of_a_quadratic_carry_their_curvatures(which, values):
    model, objective, space = indefinite()
    plane = measured_eigen_plane(objective, space, which=which, tolerance=1e-9, rise=0.5)
    base = objective.loss(space)
    for x, y in ((0.4, 0.0), (0.0, 0.4), (-0.2, 0.3)):
        with space.perturbed(plane.at(x, y)):
            expected = base + 0.5 * (values[0] * x**2 + values[1] * y**2)
            assert objective.loss(space) == pytest.approx(expected, abs=1e-9)
    assert plane.cosine == pytest.approx(0, abs=1e-8)
    radius = math.sqrt(2 * 0.5 / 9)
    # The weights are zero, so that their norm does not cap the window.
    assert plane.window == pytest.approx((-radius, radius, -radius, radius))
    for axis, value, label in zip(plane.axes, values, plane.axis_labels, strict=True):
        v = flat(axis)
        assert norm(axis) == pytest.approx(1, rel=1e-12)
        assert float(v[v.abs().argmax()]) > 0
        assert f"λ = {value:.3g}" in label
        torch.testing.assert_close(model.H @ v, value * v, rtol=0, atol=1e-7)


def test_sign_does_not_depend_on_the_start():
    _, objective, space = indefinite()
    planes = [measured_eigen_plane(objective, space, seed=seed, tolerance=1e-9) for seed in (0, 1, 2)]
    for plane in planes[1:]:
        for axis, other in zip(plane.axes, planes[0].axes, strict=True):
            torch.testing.assert_close(flat(axis), flat(other), rtol=0, atol=1e-7)


def test_window_is_at_most_the_norm_of_the_weights():
    model, objective, space = indefinite((1e-6, 1e-7, 1e-8, 0.0, 0.0, 0.0))
    with torch.no_grad():
        model.theta.fill_(0.5)
        space.parameters["theta"].fill_(0.5)
    plane = measured_eigen_plane(objective, space, tolerance=1e-6)
    assert plane.window[1] == pytest.approx(math.sqrt(6) / 2)


def test_eigen_plane_of_a_padded_bert_bends_as_its_eigenvalues_say():
    objective = bert_objective()
    space = WeightSpace.lora(adapter(5))
    before = state(space.model)
    spectrum = top_eigenvalues(objective, space, 2, tolerance=1e-6, vectors=True)
    plane = eigen_plane(space, spectrum)
    assert_same_bits(space.model, before)
    h = 1e-3
    for i, (x, y) in enumerate(((h, 0.0), (0.0, h))):
        losses = []
        for sign in (-1, 0, 1):
            with space.perturbed(plane.at(sign * x, sign * y)):
                losses.append(objective.loss(space))
        curvature = (losses[0] - 2 * losses[1] + losses[2]) / h**2
        assert curvature == pytest.approx(spectrum.values[i], rel=1e-4)


def no_vectors(objective, space):
    return {}, {"vectors": False}


def one_pair(objective, space):
    return {}, {"k": 1}


def not_converged(objective, space):
    return {}, {"max_products": 2, "tolerance": 1e-12}


def nothing_negative(objective, space):
    return {"which": "both"}, {"k": 2, "which": "largest"}


def wrong_word(objective, space):
    return {"which": "lowest"}, {}


def bad_rise(objective, space):
    return {"rise": 0.0}, {}


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (no_vectors, "vectors=True"),
        (one_pair, "k of 2"),
        (not_converged, "has not converged"),
        (nothing_negative, "which='both'"),
        (wrong_word, "choose top or both"),
        (bad_rise, "positive"),
    ],
)
def test_a_spectrum_that_makes_no_plane_is_refused_in_one_line(case, message):
    _, objective, space = indefinite()
    ours, theirs = case(objective, space)
    spectrum = top_eigenvalues(objective, space, **{"k": 2, "vectors": True, **theirs})
    with pytest.raises(UserError, match=message) as error:
        eigen_plane(space, spectrum, **ours)
    assert "\n" not in str(error.value)


def test_a_spectrum_of_another_space_is_refused():
    _, objective, space = indefinite()
    spectrum = top_eigenvalues(objective, space, 2, vectors=True)
    with pytest.raises(UserError, match="another space"):
        eigen_plane(WeightSpace.full(adapter(5)), spectrum)


# Planes of adapters


def merged(model, name):
    return copy.deepcopy(model).merge_and_unload().get_parameter(name).detach()


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_three_adapters_lie_at_their_marks(dtype, close):
    models, objective = adapters(1, 2, 3, dtype=dtype, head=True), bert_objective()
    spaces = [trained_space(model) for model in models]
    before = [state(space.model) for space in spaces]
    plane = adapter_plane(spaces, ["a", "b", "c"], objective=objective)
    for space, bits in zip(spaces, before, strict=True):
        assert_same_bits(space.model, bits)
    u, v = plane.axes
    one, two, three = (torch.cat([p.detach().flatten() for p in s.parameters.values()]).double() for s in spaces)
    side, along = two - one, float((three - one) @ (two - one) / (two - one).norm())
    height = float((three - one - along * side / side.norm()).norm())
    expected = [(0, 0), (float(side.norm()), 0), (along, height)]
    for mark, (x, y) in zip(plane.marks, expected, strict=True):
        assert (mark.x, mark.y) == pytest.approx((x, y), rel=close, abs=close)
        assert mark.off_plane <= close
    assert (plane.origin, plane.marks[0].x, plane.marks[0].y, plane.marks[0].off_plane) == (None, 0, 0, 0)
    assert (norm(u), norm(v)) == pytest.approx((1, 1), rel=1e-6)
    assert abs(plane.cosine) < close
    assert "b" in plane.axis_labels[0]
    assert "c" in plane.axis_labels[1]
    for mark, model, space in zip(plane.marks, models, spaces, strict=True):
        with spaces[0].perturbed(plane.at(mark.x, mark.y)):
            for name, parameter in spaces[0].parameters.items():
                torch.testing.assert_close(parameter.detach(), merged(model, name), rtol=0, atol=close)
            on_plane = objective.loss(spaces[0])
        # The head that was trained along moves with the rest.
        assert mark.loss == pytest.approx(objective.loss(space), abs=close)
        assert mark.loss == pytest.approx(on_plane, abs=max(close, 1e-12))
    assert len({mark.loss for mark in plane.marks}) == 3


def test_marks_lie_well_inside_the_window():
    plane = adapter_plane([WeightSpace.full(m) for m in adapters(1, 2, 3)])
    xs, ys = [m.x for m in plane.marks], [m.y for m in plane.marks]
    side = max(np.ptp(xs), np.ptp(ys))
    left, right, bottom, top = plane.window
    assert right - left == pytest.approx(top - bottom) == pytest.approx(1.4 * side)
    assert (left + right, bottom + top) == pytest.approx((min(xs) + max(xs), min(ys) + max(ys)))
    assert all(math.isnan(mark.loss) for mark in plane.marks)
    assert [mark.label for mark in plane.marks] == ["adapter 1", "adapter 2", "adapter 3"]


def test_the_plane_does_not_depend_on_the_gauge_in_full_space_but_in_lora_space():
    models = adapters(1, 2, 3)
    other = copy.deepcopy(models[1])
    change_gauge(other, 4.0)
    full, changed = (
        adapter_plane([WeightSpace.full(m) for m in (models[0], second, models[2])]) for second in (models[1], other)
    )
    for mark, same in zip(full.marks, changed.marks, strict=True):
        assert (mark.x, mark.y) == pytest.approx((same.x, same.y), abs=1e-12)
    lora, moved = (
        adapter_plane([WeightSpace.lora(m) for m in (models[0], second, models[2])]) for second in (models[1], other)
    )
    assert moved.marks[1].x > 1.5 * lora.marks[1].x


def test_more_than_three_adapters_get_the_nearest_plane():
    spaces = [WeightSpace.full(m) for m in adapters(1, 2, 3, 4, 5)]
    plane = adapter_plane(spaces)
    points = np.stack([flat({n: p.detach() for n, p in s.parameters.items()}).numpy() for s in spaces])
    centred = points - points.mean(0)
    _, sigma, right = np.linalg.svd(centred, full_matrices=False)
    for i, axis in enumerate(plane.axes):
        assert abs(flat(axis).numpy() @ right[i]) == pytest.approx(1, abs=1e-9)
    left = centred - centred @ right[:2].T @ right[:2]
    np.testing.assert_allclose([m.off_plane for m in plane.marks], np.linalg.norm(left, axis=1), rtol=1e-9)
    assert math.sqrt(sum(m.off_plane**2 for m in plane.marks)) == pytest.approx(np.linalg.norm(sigma[2:]), rel=1e-9)
    np.testing.assert_allclose(flat(plane.at(0.0, 0.0)).numpy(), points.mean(0) - points[0], atol=1e-12)
    for mark, point in zip(plane.marks, points, strict=True):
        distance = np.linalg.norm(flat(plane.at(mark.x, mark.y)).numpy() + points[0] - point)
        assert distance == pytest.approx(mark.off_plane, rel=1e-9)


def test_coordinates_solve_for_axes_that_are_not_orthogonal():
    generator = torch.Generator().manual_seed(0)
    u, v, n = ({"w": torch.randn(4, 5, generator=generator, dtype=torch.float64)} for _ in range(3))
    v["w"] += 2 * u["w"]
    n["w"] = torch.from_numpy(np.linalg.qr(torch.stack([flat(u), flat(v), flat(n)]).numpy().T)[0][:, 2]).view(4, 5)
    x, y, off = coordinates({"w": 0.3 * u["w"] - 1.7 * v["w"] + 0.25 * n["w"]}, (u, v))
    assert (x, y, off) == pytest.approx((0.3, -1.7, 0.25), rel=1e-12)


def test_trained_space_without_modules_trained_along_is_the_space_itself():
    model = tiny.with_lora(tiny.llama(torch.float64), task="CAUSAL_LM")
    assert trained_space(model).parameters.keys() == WeightSpace.full(model).parameters.keys()


@pytest.mark.parametrize("form", [WeightSpace.full, WeightSpace.lora])
def test_trained_space_holds_the_head_as_trained(form):
    model = adapter(2)
    space, plain = trained_space(model, form), form(model)
    assert space.parameters.keys() - plain.parameters.keys() == {"classifier.weight", "classifier.bias"}
    head = model.get_parameter("base_model.model.classifier.modules_to_save.default.weight")
    assert torch.equal(space.parameters["classifier.weight"], head)
    objective = bert_objective()
    base = objective.loss(space)
    with space.perturbed({"classifier.weight": torch.ones_like(head) * torch.arange(3.0)[:, None]}):
        assert objective.loss(space) != base
    assert objective.loss(space) == pytest.approx(base, rel=1e-14)
    assert objective.loss(plain) == pytest.approx(base, rel=1e-14)


def other_base(models):
    with torch.no_grad():
        models[1].get_parameter("base_model.model.bert.embeddings.word_embeddings.weight")[3, 3] += 1
    return models, "adapter 1 and adapter 2 differ in bert.embeddings.word_embeddings.weight"


def other_head(models):
    return [models[0], adapter(2, head=True), models[2]], "differ in classifier.weight.*trained along"


def other_layers(models):
    return [*models[:2], tiny.with_lora(tiny_bert(), target_modules=["query"])], "adapt different layers, such as bert"


def other_precision(models):
    return [*models[:2], adapter(3, torch.float32, head=False)], "float64 and .*float32"


def twins(models):
    return [models[0], models[1], models[0]], "adapter 1 and adapter 3 have equal weights .parallel axes"


def on_a_line(models):
    third = copy.deepcopy(models[1])
    with torch.no_grad():
        for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            if "lora_A" in name:
                b.copy_(a)
        for (name, a), b, c in zip(
            models[0].named_parameters(), models[1].parameters(), third.parameters(), strict=True
        ):
            c.copy_(a if "lora_B" not in name else 3 * b - 2 * a)
    return [*models[:2], third], "on one line .parallel axes"


def two_alone(models):
    return models[:2], "needs three adapters"


@pytest.mark.parametrize("case", [other_base, other_head, other_layers, other_precision, twins, on_a_line, two_alone])
def test_adapters_that_span_no_plane_are_refused_in_one_line(case):
    models, message = case(adapters(1, 2, 3))
    with pytest.raises(UserError, match=message) as error:
        adapter_plane([WeightSpace.full(m) for m in models])
    assert "\n" not in str(error.value)


def test_labels_must_fit():
    with pytest.raises(UserError, match="2 labels do not fit 3 adapters"):
        adapter_plane([WeightSpace.full(m) for m in adapters(1, 2, 3)], ["a", "b"])


def test_weights_that_are_not_finite_make_no_plane():
    spaces = [WeightSpace.full(m) for m in adapters(1, 2, 3)]
    with torch.no_grad():
        next(iter(spaces[2].parameters.values()))[0, 0] = math.nan
    with pytest.raises(UserError, match="adapter 3 has weights that are not finite"):
        adapter_plane(spaces)
