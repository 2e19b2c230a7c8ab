"""Worst-case sharpness against the trust-region optimum of quadratics, APGD written out, and weights moved by hand."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import brentq
from torch import nn

from analysis.core import COLUMNS, Objective, WeightSpace
from analysis.sharpness.adversarial import adversarial_sharpness
from analysis.sharpness.ascent import Ball, apgd, centre, checkpoints, one_step, projected_ascent, random_start, worst
from analysis.sharpness.scaling import scaling_of
from analysis.sharpness.worst_case import MEASURE, worst_case_sharpness
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
    loss_by_sentence,
    normal,
    quadratic_objective,
    state,
    tiny_bert,
    with_lora,
)

KINDS = ("isotropic", "elementwise", "filter")


def by_hand(model, kind):
    """T of ``Quadratic`` as one vector (15,)."""
    weight, theta = model.layer.weight.detach(), model.theta().detach()
    rows = weight.norm(dim=1, keepdim=True).expand(3, 4).flatten()
    T = {"isotropic": torch.ones(15), "elementwise": theta.abs(), "filter": torch.cat([rows, torch.zeros(3)])}
    return T[kind].double().numpy()


def slope_and_curvature(model, x, kind):
    """g and H of the rescaled variable at delta = 0."""
    T, H = by_hand(model, kind), model.H.numpy()
    return T * (H @ (model.theta().detach() - x.mean(0)).numpy()), H * np.outer(T, T)


def trust_region(g, H, rho):
    """max of gᵀd + ½dᵀHd over ‖d‖ ≤ rho: (lambda·I − H)·d = g with lambda ≥ max(0, eigenvalues) (Moré & Sorensen)."""
    values, Q = np.linalg.eigh(H)
    c = Q.T @ g
    if values[-1] < 0 and np.linalg.norm(c / values) <= rho:
        d = Q @ (c / -values)
    else:
        least = max(values[-1], 0.0)
        multiplier = brentq(
            lambda shift: np.linalg.norm(c / (shift - values)) - rho,
            least * (1 + 1e-14) + 1e-14,
            least + np.linalg.norm(g) / rho + 1,
            xtol=1e-15,
        )
        d = Q @ (c / (multiplier - values))
    return float(g @ d + 0.5 * d @ H @ d)


def quadratic_ball(kind, rho, definite=False):
    model = Quadratic(definite=definite)
    objective, x = quadratic_objective()
    space = WeightSpace.all(model)
    scaling = scaling_of(space, kind)
    ball = Ball(objective, space, scaling, rho)
    return ball, centre(objective, space, scaling), slope_and_curvature(model, x, kind)


def test_the_oracle_beats_every_sampled_point():
    _, _, (g, H) = quadratic_ball("isotropic", 2.0)
    points = np.random.default_rng(0).standard_normal((200_000, 15))
    points *= 2.0 / np.linalg.norm(points, axis=1, keepdims=True)
    sampled = points @ g + 0.5 * np.einsum("ni,ij,nj->n", points, H, points)
    best = trust_region(g, H, 2.0)
    assert 0.7 * best < sampled.max() < best


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("definite", [True, False])
def test_both_searches_reach_the_optimum_of_a_quadratic(kind, definite):
    for rho in (0.1, 1.0, 5.0, 30.0):
        ball, middle, (g, H) = quadratic_ball(kind, rho, definite)
        best = trust_region(g, H, rho)
        found = worst(ball, middle, steps=60, restarts=2, seed=0)
        for ascent in (found.projected, found.apgd):
            assert ascent.best.loss - middle.loss == pytest.approx(best, rel=1e-3)
            assert ascent.best.loss - middle.loss <= best * (1 + 1e-9)
            assert float(flat(ascent.best.delta).norm()) <= rho * (1 + 1e-12)


def test_both_searches_find_a_maximum_inside_the_ball():
    model = Quadratic(definite=True)
    model.H.neg_()
    objective, x = quadratic_objective()
    g, H = slope_and_curvature(model, x, "isotropic")
    inner = np.linalg.norm(np.linalg.solve(H, g))
    result = worst_case_sharpness(objective, WeightSpace.all(model), [2 * inner], steps=300)
    best = -0.5 * g @ np.linalg.solve(H, g)
    point = result.points[0]
    assert point.pga == pytest.approx(best, rel=1e-3)
    assert point.apgd == pytest.approx(best, rel=1e-3)
    assert point.lower_bound <= best * (1 + 1e-9)
    assert point.one_step < best


@pytest.mark.parametrize("kind", KINDS)
def test_one_step_is_the_closed_form(kind):
    ball, middle, (g, H) = quadratic_ball(kind, 0.7)
    d = 0.7 * g / np.linalg.norm(g)
    assert one_step(ball, middle).loss - middle.loss == pytest.approx(float(g @ d + 0.5 * d @ H @ d), rel=1e-11)


@pytest.mark.parametrize(
    ("spectrum", "slope", "rho", "reasons"),
    [
        ([3.0, 2.9, 1.0], [0.01, -1.0, 0.5], 20.0, set()),
        ([-9.0, -3.0, -1.0, -0.5], [1.0, -2.0, 0.5, 1.0], 8.0, {"few rises"}),
        ([1.0, -7.9], [-1.3, -0.1], 4.0, {"few rises", "no better", "halved before"}),
        ([-84.2, -1.0], [-0.9, 0.4], 0.1, {"few rises", "no better", "halved before"}),
    ],
)
def test_apgd_follows_the_published_algorithm(spectrum, slope, rho, reasons):
    """Algorithm 1 of Croce & Hein in NumPy, in cases that meet each reason to halve the step, or not to."""
    steps = 47
    model = tiny.Quadratic(spectrum, slope=torch.tensor(slope, dtype=torch.float64))
    space = WeightSpace.all(model)
    scaling = scaling_of(space, "isotropic")
    ball = Ball(Objective([{"x": torch.zeros(1, 1, dtype=torch.float64)}]), space, scaling, rho)
    middle = centre(ball.objective, space, scaling)
    g, H = -model.b.numpy(), model.H.numpy()

    def f(d):
        return g @ d + 0.5 * d @ H @ d

    def project(d):
        return d * min(1.0, rho / np.linalg.norm(d))

    def up(d):
        gradient = g + H @ d
        return gradient / np.linalg.norm(gradient)

    p = [0.0, 0.22]
    while p[-1] <= 1:
        p.append(p[-1] + max(p[-1] - p[-2] - 0.03, 0.06))
    w = [math.ceil(round(share * steps, 9)) for share in p if share <= 1]
    start = one_step(ball, middle)
    x = [flat(start.delta).numpy()]
    eta, etas = 2 * rho, [2 * rho]  # etas[k]: the step that made x[k]
    values, best, best_at, met = [f(x[0])], [f(x[0])], x[0], set()
    for k in range(1, steps + 1):
        z = project(x[k - 1] + eta * up(x[k - 1]))
        x.append(z if k == 1 else project(x[k - 1] + 0.75 * (z - x[k - 1]) + 0.25 * (x[k - 1] - x[k - 2])))
        etas.append(eta)
        values.append(f(x[k]))
        best_at = x[k] if values[k] > best[-1] else best_at
        best.append(max(best[-1], values[k]))
        if k in w:
            last = w[w.index(k) - 1]
            few = sum(values[i + 1] > values[i] for i in range(last, k)) < 0.75 * (k - last)
            if few:
                met.add("few rises")
            elif best[last] == best[k]:
                met.add("no better" if etas[last] == etas[k] else "halved before")
            if few or (etas[last] == etas[k] and best[last] == best[k]):
                eta, x[k], values[k] = eta / 2, best_at, best[k]
    assert met == reasons
    ascent = apgd(ball, start, steps)
    np.testing.assert_allclose(ascent.curve - middle.loss, best, rtol=1e-9)
    np.testing.assert_allclose(flat(ascent.best.delta), best_at, rtol=1e-6, atol=1e-9)


def test_checkpoints_are_those_of_the_paper():
    assert sorted(checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert sorted(checkpoints(1)) == [1]


def test_projected_ascent_follows_its_schedule():
    rho, steps = 3.0, 12
    ball, middle, (g, H) = quadratic_ball("filter", rho)
    start = one_step(ball, middle)
    d, best = flat(start.delta).numpy(), [start.loss - middle.loss]
    for k in range(1, steps + 1):
        gradient = g + H @ d
        d = d + 2 * rho * (1 - (k - 1) / steps) * gradient / np.linalg.norm(gradient)
        d = d * min(1.0, rho / np.linalg.norm(d))
        best.append(max(best[-1], g @ d + 0.5 * d @ H @ d))
    np.testing.assert_allclose(projected_ascent(ball, start, steps).curve - middle.loss, best, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_bounds_rise_with_the_radius_and_hold_what_is_known(kind):
    objective, _ = quadratic_objective()
    radii = [0.05, 0.2, 1.0, 4.0]
    result = worst_case_sharpness(objective, WeightSpace.all(Quadratic()), radii, kind=kind, steps=40)
    bounds = [p.lower_bound for p in result.points]
    assert bounds == sorted(bounds)
    assert bounds[0] > 0
    for p in result.points:
        assert p.lower_bound == max(p.pga, p.apgd)
        assert min(p.pga, p.apgd) >= max(p.one_step, 0.0)
        assert len(p.curve) == 41
        assert (np.diff(p.curve) >= 0).all()
        assert p.curve[-1] == p.lower_bound
        assert p.metrics["loss"] - result.base_loss == pytest.approx(p.lower_bound, rel=1e-10)


def test_a_radius_does_not_depend_on_the_others():
    objective, space = quadratic_objective()[0], WeightSpace.all(Quadratic())
    both = worst_case_sharpness(objective, space, [0.5, 2.0], steps=10)
    alone = worst_case_sharpness(objective, space, [2.0], steps=10)
    assert both.points[1].lower_bound == alone.points[0].lower_bound


def test_late_gain_tells_a_search_that_was_cut_short():
    objective, _ = quadratic_objective()
    gains = [
        worst_case_sharpness(objective, WeightSpace.all(Quadratic()), [1.0], steps=steps).points[0]
        for steps in (8, 200)
    ]
    short, settled = gains
    assert short.late_gain == pytest.approx(1 - short.curve[-3] / short.curve[-1], rel=1e-12)
    assert short.late_gain > 1e-4
    assert 0 <= settled.late_gain < 1e-6


def moved_rise(model, eps):
    """Loss rise of the merged model with ``eps`` (name → tensor) added, sentence by sentence."""
    merged = copy.deepcopy(model).merge_and_unload()
    base = float(loss_by_sentence(merged).detach())
    with torch.no_grad():
        for name, step in eps.items():
            merged.get_parameter(name).add_(step)
    return float(loss_by_sentence(merged).detach()) - base


@pytest.mark.parametrize("kind", KINDS)
def test_full_space_of_a_padded_bert_against_weights_moved_by_hand(kind):
    model = with_lora(tiny_bert())
    objective, space = bert_objective(), WeightSpace.full(model)
    rho = 0.5
    result = worst_case_sharpness(objective, space, [rho], kind=kind, steps=6, restarts=1)
    merged = copy.deepcopy(model).merge_and_unload()
    weights = {name: merged.get_parameter(name).requires_grad_(True) for name in space.parameters}
    gradient = torch.autograd.grad(loss_by_sentence(merged), list(weights.values()))
    T = {
        "isotropic": lambda W: torch.ones_like(W),
        "elementwise": lambda W: W.abs(),
        "filter": lambda W: W.norm(dim=1, keepdim=True).expand_as(W),
    }
    scales = [T[kind](W.detach()) for W in weights.values()]
    length = torch.cat([(t * g).flatten() for t, g in zip(scales, gradient, strict=True)]).norm()
    eps = {n: rho * t * t * g / length for n, t, g in zip(weights, scales, gradient, strict=True)}
    point = result.points[0]
    assert point.one_step == pytest.approx(moved_rise(model, eps), rel=1e-8)
    assert point.lower_bound > point.one_step

    scaling = scaling_of(space, kind)
    found = worst(Ball(objective, space, scaling, rho), centre(objective, space, scaling), 6, 1, 0).winner.best
    delta = dict(zip(weights, found.delta.values(), strict=True))
    assert torch.cat([d.flatten() for d in delta.values()]).norm() <= rho * (1 + 1e-12)
    eps = {name: t * delta[name] for name, t in zip(weights, scales, strict=True)}
    assert point.lower_bound == pytest.approx(moved_rise(model, eps), rel=1e-8)
    assert point.induced_norm == pytest.approx(float(flat(eps).norm()), rel=1e-10)


@pytest.mark.parametrize("space_of", [WeightSpace.full, WeightSpace.lora])
def test_one_step_of_the_isotropic_ball_is_adversarial_sharpness(space_of):
    model, objective = with_lora(tiny_bert()), bert_objective()
    one = adversarial_sharpness(objective, space_of(model), [0.1, 0.5])
    result = worst_case_sharpness(objective, space_of(model), [0.1, 0.5], steps=2, restarts=1)
    for expected, point in zip(one.points, result.points, strict=True):
        assert point.one_step == pytest.approx(expected.loss_rise, rel=1e-10)
        assert 0 <= point.metrics["accuracy"] <= 1


def test_full_space_does_not_depend_on_the_gauge_and_lora_space_does():
    model, other, objective = with_lora(tiny_bert()), with_lora(tiny_bert()), bert_objective()
    change_gauge(other, 4.0)

    def bound(m, space_of, kind):
        return worst_case_sharpness(objective, space_of(m), [0.3], kind=kind, steps=3, restarts=2).points[0].lower_bound

    assert bound(model, WeightSpace.full, "filter") == bound(other, WeightSpace.full, "filter")
    assert bound(other, WeightSpace.lora, "isotropic") > 1.5 * bound(model, WeightSpace.lora, "isotropic")
    for kind in ("elementwise", "filter"):
        assert bound(other, WeightSpace.lora, kind) == pytest.approx(bound(model, WeightSpace.lora, kind), rel=1e-9)


class TwoLayers(nn.Module):
    """``W_2·relu(W_1·x)`` with cross entropy."""

    def __init__(self, share=None):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6, bias=False).double(), nn.Linear(6, 3, bias=False).double()
        with torch.no_grad():
            c = torch.ones(6, dtype=torch.float64) if share is None else share
            self.first.weight.copy_(normal(6, 4, seed=1) * c[:, None])
            self.second.weight.copy_(normal(3, 6, seed=2) / c)

    def forward(self, x, labels):
        logits = self.second(torch.relu(self.first(x)))
        return SimpleNamespace(logits=logits, loss=F.cross_entropy(logits, labels))


def points_in_classes():
    return Objective([{"x": normal(9, 4, seed=3), "labels": torch.arange(9) % 3}])


@pytest.mark.parametrize(
    ("share", "pattern", "invariant"),
    [
        (torch.full((6,), 3.7, dtype=torch.float64), r".*", {"elementwise", "filter"}),
        (torch.tensor([0.2, 5.0, 1.3, 0.7, 2.0, 9.0]).double(), r".*", {"elementwise"}),
        (torch.tensor([0.2, 5.0, 1.3, 0.7, 2.0, 9.0]).double(), r"first\.weight", {"elementwise", "filter"}),
    ],
)
def test_rescalings_that_keep_the_function(share, pattern, invariant):
    """c·W_1 and W_2/c, for all hidden units alike or each by its own c; the function stays, the isotropic ball not."""
    objective = points_in_classes()
    models = TwoLayers(), TwoLayers(share)
    for kind in KINDS:
        one, two = (
            worst_case_sharpness(objective, WeightSpace.named(m, pattern), [0.5], kind=kind, steps=10) for m in models
        )
        assert one.base_loss == pytest.approx(two.base_loss, rel=1e-12)
        a, b = one.points[0], two.points[0]
        if kind in invariant:
            assert (a.one_step, a.pga, a.apgd) == pytest.approx((b.one_step, b.pga, b.apgd), rel=1e-7)
        else:
            assert abs(a.lower_bound / b.lower_bound - 1) > 0.05


def test_random_starts_lie_in_the_ball_and_are_the_same_for_all_models():
    balls = []
    for seed in (5, 6):
        space = WeightSpace.full(with_lora(tiny_bert(), seed=seed))
        balls.append(Ball(bert_objective(), space, scaling_of(space, "elementwise"), 0.3))
    for index in range(3):
        one, two = (random_start(ball, 0, index) for ball in balls)
        assert torch.equal(flat(one), flat(two))
        assert 0.25 < float(flat(one).norm()) <= 0.3 * (1 + 1e-12)
    assert not torch.equal(flat(random_start(balls[0], 0, 1)), flat(random_start(balls[0], 0, 2)))
    assert not torch.equal(flat(random_start(balls[0], 0, 1)), flat(random_start(balls[0], 1, 1)))


def test_random_starts_fill_a_ball_of_few_dimensions_evenly():
    """In n dimensions the share of points within r·rho is rⁿ; here n = 3."""
    model = Quadratic()
    space = WeightSpace.named(model, r".*bias")
    ball = Ball(quadratic_objective()[0], space, scaling_of(space, "isotropic"), 2.0)
    lengths = np.array([float(flat(random_start(ball, 0, i)).norm()) for i in range(1500)])
    assert abs((lengths < 1.0).mean() - 1 / 8) < 4 * math.sqrt(1 / 8 * 7 / 8 / 1500)


def test_random_starts_spend_no_radius_where_nothing_moves():
    ball, _, _ = quadratic_ball("filter", 0.3)
    start = random_start(ball, 0, 1)
    assert not start["layer.bias"].any()
    assert 0.25 < float(start["layer.weight"].norm()) <= 0.3 * (1 + 1e-12)


def test_a_random_start_escapes_a_flat_centre():
    """At a saddle the gradient is exactly 0 and one step goes nowhere."""
    model = tiny.Quadratic([3.0, 1.0, 0.0, -2.0, -5.0, 0.5], slope=torch.zeros(6, dtype=torch.float64))
    objective = Objective([{"x": torch.zeros(1, 1, dtype=torch.float64)}])
    result = worst_case_sharpness(objective, WeightSpace.all(model), [2.0], steps=60, restarts=1)
    point = result.points[0]
    assert point.one_step == 0
    assert point.lower_bound == pytest.approx(0.5 * 3.0 * 2.0**2, rel=1e-6)


def test_no_rise_at_all():
    model = Quadratic()
    objective, _ = quadratic_objective()
    model.H.zero_()
    point = worst_case_sharpness(objective, WeightSpace.all(model), [1.0], steps=4).points[0]
    assert (point.one_step, point.pga, point.apgd, point.late_gain, point.induced_norm) == (0, 0, 0, 0, 0)
    assert "gradient is 0" in point.note


def test_restarts_never_lower_the_bound():
    objective, space = bert_objective(), WeightSpace.full(with_lora(tiny_bert()))
    bounds = [
        worst_case_sharpness(objective, space, [0.8], steps=3, restarts=n).points[0].lower_bound for n in (1, 2, 3)
    ]
    assert bounds == sorted(bounds)


class Edge(nn.Module):
    """A loss that is finite near the weights and leaves the numbers beyond: ``how`` it does so."""

    def __init__(self, how):
        super().__init__()
        self.layer, self.how = nn.Linear(3, 3, bias=False), how
        with torch.no_grad():
            self.layer.weight.copy_(0.1 * torch.eye(3))

    def forward(self, x):
        size = self.layer.weight.square().sum()
        loss = size.exp() if self.how == "inf" else 2 - (1 - size).sqrt()
        return {"loss": loss + 0 * x.mean()}


@pytest.mark.parametrize("how", ["inf", "nan"])
def test_a_loss_that_is_not_finite_is_the_result(how):
    objective, space = Objective([{"x": torch.zeros(2, 1)}]), WeightSpace.full(Edge(how))
    before = state(space.model)
    result = worst_case_sharpness(objective, space, [0.1, 30.0], steps=5)
    near, far = result.points
    assert math.isfinite(near.lower_bound)
    assert near.note == ""
    assert str(far.lower_bound) == how
    assert str(far.one_step) == how
    assert f"the loss is {how}" in far.note
    assert math.isnan(far.late_gain)
    assert_same_bits(space.model, before)
    rises = {r["radius"]: r["value"] for r in result.rows() if r["quantity"] == "loss_rise"}
    assert str(rises[30.0]) == how


def test_an_infinite_loss_that_only_the_search_meets_ends_it_there():
    """The one-step point is finite; the worst point of the ball is not."""

    class Wall(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([0.0, 0.0], dtype=torch.float64))

        def forward(self, x):
            a, b = self.w
            wall = torch.where(b > 0.9, torch.inf, 0.0)
            return {"loss": 0.1 * a + 0.05 * b + 3 * b.square() + wall + 0 * x.mean()}

    objective = Objective([{"x": torch.zeros(2, 1)}])
    point = worst_case_sharpness(objective, WeightSpace.all(Wall()), [1.0], steps=30, restarts=1).points[0]
    assert math.isfinite(point.one_step)
    assert point.lower_bound == math.inf
    assert math.isfinite(point.curve[0])
    assert point.curve[-1] == math.inf
    assert "the loss is inf at ‖delta‖ = 1" in point.note


def test_a_gradient_that_is_not_finite_ends_a_search_and_keeps_the_loss():
    """√b has a finite value and no gradient where the ball ends at b = 0."""

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.b = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))

        def forward(self, x):
            return {"loss": 2 - self.b.sqrt().sum() + 0 * x.mean()}

    objective = Objective([{"x": torch.zeros(2, 1)}])
    point = worst_case_sharpness(objective, WeightSpace.all(Root()), [1.0], steps=5, restarts=1).points[0]
    assert point.lower_bound == pytest.approx(1.0, rel=1e-12)
    assert "the gradient is not finite" in point.note


def test_a_centre_that_is_not_finite_is_one_line():
    model = Edge("nan")
    with torch.no_grad():
        model.layer.weight.fill_(2.0)
    with pytest.raises(UserError, match="finite") as error:
        worst_case_sharpness(Objective([{"x": torch.zeros(2, 1)}]), WeightSpace.full(model), [0.1])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("space_of", [WeightSpace.full, WeightSpace.lora])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_the_same_bits_afterwards(space_of, kind):
    model = with_lora(tiny_bert(torch.float32))
    space, users = space_of(model), state(model)
    before = state(space.model)
    worst_case_sharpness(bert_objective(), space, [0.5], kind=kind, steps=3)
    assert_same_bits(space.model, before)
    assert_same_bits(model, users)


@pytest.mark.parametrize("error", [Fault, KeyboardInterrupt])
@pytest.mark.parametrize("call", [5, 8, 14, 26])
def test_weights_are_the_same_bits_after_an_interrupt(error, call):
    """Three batches: calls 1–6 are the centre, then the one step, both searches and the last evaluation."""
    space = WeightSpace.lora(with_lora(tiny_bert(torch.float32)))
    before, calls = state(space.model), []
    if error is Fault:
        fail_at(space.model, call)
    else:

        def interrupt(module, arguments):
            calls.append(None)
            if len(calls) == call:
                raise KeyboardInterrupt

        space.model.register_forward_pre_hook(interrupt)
    with pytest.raises(error):
        worst_case_sharpness(bert_objective(), space, [0.5], kind="elementwise", steps=3, restarts=1)
    assert_same_bits(space.model, before)


def test_same_seed_same_result():
    model, objective = with_lora(tiny_bert(torch.float32)), bert_objective()

    def values(seed):
        result = worst_case_sharpness(objective, WeightSpace.full(model), [0.4], steps=3, restarts=2, seed=seed)
        return [r["value"] for r in result.rows()]

    assert values(1) == values(1)
    space = WeightSpace.full(model)
    scaling = scaling_of(space, "isotropic")
    ball, middle = Ball(objective, space, scaling, 0.4), centre(objective, space, scaling)
    one, two = (projected_ascent(ball, ball.at(random_start(ball, seed, 1)), 3).curve for seed in (1, 2))
    assert not np.array_equal(one, two)
    assert one[0] != middle.loss


def test_rows_hold_the_bound_and_what_it_rests_on():
    settings = MEASURE.settings(radii=(0.1, 0.5), kind="filter", steps=3, restarts=2, seed=7)
    result = MEASURE.run(bert_objective(), WeightSpace.full(with_lora(tiny_bert())), settings, None)
    rows = result.rows()
    assert all(tuple(r) == COLUMNS for r in rows)
    assert result.seed == 7
    assert {r["direction_seed"] for r in rows} == {7}
    assert {(r["measure"], r["space"], r["split"], r["kind"]) for r in rows} == {
        ("worst_case", "full", "validation", "filter")
    }

    def column(quantity):
        return [(r["radius"], r["value"]) for r in rows if r["quantity"] == quantity]

    assert column("loss_rise") == [(p.radius, p.lower_bound) for p in result.points]
    assert column("loss_rise_pga") == [(p.radius, p.pga) for p in result.points]
    assert column("loss_rise_apgd") == [(p.radius, p.apgd) for p in result.points]
    assert column("loss_rise_one_step") == [(p.radius, p.one_step) for p in result.points]
    starts = [(r["radius"], r["index"], r["value"]) for r in rows if r["quantity"] == "start_rise"]
    assert starts == [(p.radius, k, rise) for p in result.points for k, rise in enumerate(p.by_start)]
    assert len(starts) == 4
    assert column("late_gain") == [(p.radius, p.late_gain) for p in result.points]
    for name in ("accuracy", "matthews"):
        assert column(name) == [
            (0.0, result.base_metrics[name]),
            *((p.radius, p.metrics[name]) for p in result.points),
        ]
    assert [value for _, value in column("steps") + column("restarts")] == [3, 2]
    curve = [r for r in rows if r["quantity"] == "best_rise" and r["radius"] == 0.5]
    assert [(r["index"], r["value"]) for r in curve] == list(enumerate(result.points[1].curve))
    errors = [r["standard_error"] for r in rows if r["quantity"] == "loss_rise"]
    assert errors == [p.standard_error for p in result.points]
    norms = [r["induced_norm"] for r in rows if r["quantity"] == "loss_rise"]
    assert norms == [p.induced_norm for p in result.points]
    for name in ("one_step", "pga", "apgd"):
        norms = [r["induced_norm"] for r in rows if r["quantity"] == f"loss_rise_{name}"]
        assert norms == [p.induced_norms[name] for p in result.points]
    isotropic = worst_case_sharpness(bert_objective(), WeightSpace.full(with_lora(tiny_bert())), [0.2], steps=1)
    assert isotropic.points[0].induced_norms["one_step"] == pytest.approx(0.2, rel=1e-9)
    assert all(norm <= 0.2 * (1 + 1e-9) for norm in isotropic.points[0].induced_norms.values())


def test_every_start_tells_what_it_led_to():
    """The best of them is the bound, the first is a run with one start, and on a ball without traps they agree."""
    space, objective = WeightSpace.full(with_lora(tiny_bert())), bert_objective()
    one, many = (worst_case_sharpness(objective, space, [0.3], steps=3, restarts=r, seed=5).points[0] for r in (1, 3))
    assert many.by_start.shape == (3,)
    assert max(many.by_start) == many.lower_bound
    assert one.by_start.tolist() == [many.by_start[0]] == [one.lower_bound]
    assert len(set(many.by_start)) == 3
    quadratic, _ = quadratic_objective()
    settled = worst_case_sharpness(quadratic, WeightSpace.all(Quadratic(definite=True)), [0.5], steps=80, restarts=3)
    assert settled.points[0].by_start == pytest.approx([settled.points[0].lower_bound] * 3, rel=1e-6)


def test_the_error_of_the_bound_is_over_examples_at_the_worst_point():
    space, objective = WeightSpace.full(with_lora(tiny_bert())), bert_objective()
    outputs = []
    space.model.register_forward_hook(lambda module, arguments, output: outputs.append(output.logits.detach()))
    point = worst_case_sharpness(objective, space, [0.3], steps=3).points[0]
    labels = torch.cat([batch["labels"] for batch in objective.batches])
    last = torch.cat(outputs[-3:])
    first = torch.cat([space.model(**batch).logits.detach() for batch in objective.batches])
    losses = [torch.nn.functional.cross_entropy(logits, labels, reduction="none") for logits in (first, last)]
    rises = losses[1] - losses[0]
    assert point.lower_bound == pytest.approx(float(rises.mean()), rel=1e-9)
    assert point.standard_error == pytest.approx(float(rises.std() / 7**0.5), rel=1e-9)


def test_progress_counts_steps_to_the_end():
    objective, _ = quadratic_objective()
    seen = []
    model = Quadratic()
    worst_case_sharpness(
        objective, WeightSpace.all(model), [0.1, 0.2], steps=3, restarts=2, watch=lambda *at: seen.append(at)
    )
    done = [at[0] for at in seen]
    assert done == sorted(done)
    assert set(done) == set(range(1, 25))
    assert {at[1] for at in seen} == {24}
    assert seen[-1] == (24, 24, "rho 0.2")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"radii": []}, "radii"),
        ({"radii": [0.0]}, "radii.0"),
        ({"radii": [math.nan]}, "radii.0"),
        ({"kind": "layer"}, "kind"),
        ({"steps": 0}, "steps"),
        ({"restarts": 0}, "restarts"),
    ],
)
def test_bad_settings_are_one_line(change, word):
    objective, _ = quadratic_objective()
    with pytest.raises(UserError, match=word) as error:
        worst_case_sharpness(objective, WeightSpace.all(Quadratic()), **{"radii": [0.1], **change})
    assert "\n" not in str(error.value)
