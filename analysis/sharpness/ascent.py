"""Maximising the loss over a ball in the rescaled variable: ``max L(W + T∘delta)`` over ``‖delta‖ ≤ rho``.

    g = T∘∇L(W + T∘delta)                                                   the gradient in delta
    one step:   delta = rho·g/‖g‖ at delta = 0                                        (SAM; ASAM for T = |W|)
    projected:  delta ← Π(delta + alpha_k·g/‖g‖),   alpha_k = 2·rho·(1 − (k−1)/steps) for k = 1 … steps
    APGD:       z = Π(delta_k + eta·g/‖g‖)                                           (Croce & Hein 2020, Algorithm 1)
                delta_{k+1} = Π(delta_k + 3/4·(z − delta_k) + 1/4·(delta_k − delta_{k−1}))
                eta = 2·rho at first; halved at a checkpoint without progress, where the search goes on from its best

Π projects onto the ball by shrinking. The loss is not concave: what a search finds is a lower bound of the maximum.
Neither search is always the better one, so :func:`worst` runs both.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from analysis.core.directions import gaussian
from analysis.core.objective import Objective, Sum
from analysis.core.space import WeightSpace
from analysis.core.vectors import Vector, added, norm, scaled
from analysis.sharpness.scaling import Scaling
from bilora.errors import UserError
from bilora.seeds import generator_for

MOMENTUM = 0.75
"""Weight of the new step in APGD; the rest goes to the step before."""
PROGRESS = 0.75
"""Share of steps since the last checkpoint that must raise the loss, or APGD halves its step."""

Report = Callable[[int], None]
"""Told the number of each finished step, from 1."""


@dataclass(frozen=True, eq=False)
class Point:
    """A point of the ball."""

    delta: Vector  # the perturbation is T∘delta
    loss: float  # L(W + T∘delta); infinite or NaN where the model's loss is
    gradient: Vector | None  # T∘∇L there; None where the loss or its gradient is not finite


@dataclass(frozen=True, eq=False)
class Ascent:
    """What one search found from one start."""

    best: Point
    curve: npt.NDArray[np.float64]  # (steps+1,): highest loss after 0, 1, … steps; constant after an early end
    note: str  # why the search ended early, or empty


@dataclass(frozen=True, eq=False)
class Worst:
    """The highest losses found in one ball, by search; each is at least that of the centre and of the one step."""

    one_step: Point
    projected: Ascent
    apgd: Ascent
    by_start: tuple[float, ...]  # (restarts,): the higher loss of the two searches from each start alone

    @property
    def winner(self) -> Ascent:
        """The search with the higher loss: projected ascent where they tie."""
        return self.apgd if exceeds(self.apgd.best.loss, self.projected.best.loss) else self.projected


@dataclass(frozen=True, eq=False)
class Ball:
    """``‖delta‖ ≤ radius`` around the weights of a space, in the variable that ``scaling`` defines."""

    objective: Objective
    space: WeightSpace
    scaling: Scaling
    radius: float

    def at(self, delta: Vector) -> Point:
        """Loss and gradient at ``delta``; the weights are bit-identical afterwards."""
        with self.space.perturbed(self.scaling.applied(delta)):
            try:
                loss, gradient = loss_and_gradient(self.objective, self.space)
            except UserError:  # the centre had a loss and a gradient, so they are not finite here
                return Point(delta, self.objective.loss(self.space), None)
        return Point(delta, loss, self.scaling.applied(gradient))

    def projected(self, delta: Vector) -> Vector:
        """The nearest point of the ball."""
        length = norm(delta)
        return delta if length <= self.radius else scaled(delta, self.radius / length)

    def induced_norm(self, delta: Vector) -> float:
        """Realised ‖eps_W‖ of ``delta``."""
        return self.space.induced_norm(self.scaling.applied(delta))


def loss_and_gradient(objective: Objective, space: WeightSpace) -> tuple[float, Vector]:
    """The loss and its gradient at the space's current weights, from one forward and backward pass.

    Raises:
        UserError: either is not finite, or the loss depends on no parameter of the space.
    """
    parameters = list(space.parameters.values())
    total, losses = Sum(space), []
    for index, weight in enumerate(objective.weights):
        loss = objective.batch_loss(space, index)
        losses.append(weight * float(loss.detach().double()))
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        total.add(gradients, weight / objective.weight)
    return math.fsum(losses) / objective.weight, total.vector("the gradient")


def centre(objective: Objective, space: WeightSpace, scaling: Scaling) -> Point:
    """The point ``delta = 0``, common to balls of all radii.

    Raises:
        UserError: as :func:`loss_and_gradient`.
    """
    loss, gradient = loss_and_gradient(objective, space)
    zero = {name: torch.zeros_like(tensor) for name, tensor in gradient.items()}
    return Point(zero, loss, scaling.applied(gradient))


def exceeds(loss: float, best: float) -> bool:
    """Whether ``loss`` is the worse of the two for the model. NaN counts as worse than any number, so that it stays."""
    return loss > best or (math.isnan(loss) and not math.isnan(best))


def one_step(ball: Ball, middle: Point) -> Point:
    """The point ``rho·g/‖g‖``, whose perturbation is ``rho·T²∇L/‖T∇L‖``; ``middle`` itself where the gradient is 0."""
    step = _ascending(middle)
    return middle if step is None else ball.at(scaled(step, ball.radius))


def random_start(ball: Ball, seed: int, index: int) -> Vector:
    """Start number ``index``: uniform in the ball, named by parameter, the same for every model of the same layers."""
    direction = ball.scaling.movable(gaussian(ball.space, seed, index))
    share = torch.rand(1, generator=generator_for("start", seed, index), dtype=torch.float64).item()
    return scaled(direction, ball.radius * share ** (1 / ball.space.size) / norm(direction))


def projected_ascent(ball: Ball, start: Point, steps: int, report: Report | None = None) -> Ascent:
    """Normalised gradient steps of lengths falling linearly from 2·rho to 2·rho/steps, projected; the best is kept.

    Args:
        ball: where to search.
        start: first point; its gradient is not computed again.
        steps: losses and gradients to evaluate.
        report: told of each step.
    """
    track = _Track(start, steps, report)
    point = start
    for k in range(steps):
        step = _ascending(point)
        if step is None:
            break
        length = 2 * ball.radius * (1 - k / steps)
        point = ball.at(ball.projected(added(point.delta, step, length)))
        track.add(point)
    return track.result()


def apgd(ball: Ball, start: Point, steps: int, report: Report | None = None) -> Ascent:
    """Auto-PGD of Croce & Hein (2020), Algorithm 1, for the Euclidean ball, with normalised gradients as in their code.

    Arguments as :func:`projected_ascent`.
    """
    track = _Track(start, steps, report)
    marks = checkpoints(steps)
    length, before, point = 2 * ball.radius, start.delta, start
    last_mark, raised, halved, best_then = 0, 0, False, start.loss
    for k in range(1, steps + 1):
        step = _ascending(point)
        if step is None:
            break
        target = ball.projected(added(point.delta, step, length))
        if k > 1:
            moved = added(point.delta, added(target, point.delta, -1), MOMENTUM)
            target = ball.projected(added(moved, added(point.delta, before, -1), 1 - MOMENTUM))
        new = ball.at(target)
        track.add(new)
        raised += new.loss > point.loss
        before, point = point.delta, new
        if new.gradient is None:
            break
        if k in marks:
            stalled = not halved and not exceeds(track.best.loss, best_then)
            halved = raised < PROGRESS * (k - last_mark) or stalled
            if halved:
                length /= 2
                point = track.best
            last_mark, raised, best_then = k, 0, track.best.loss
    return track.result()


def checkpoints(steps: int) -> frozenset[int]:
    """Steps at which APGD looks back.

    They are ``⌈p_j·steps⌉`` with p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j − p_{j−1} − 0.03, 0.06).
    """
    earlier, share = 0, 22  # in hundredths: ⌈0.57·100⌉ is 58 in floating point
    marks = set()
    while share <= 100:
        marks.add(-(-share * steps // 100))
        earlier, share = share, share + max(share - earlier - 3, 6)
    return frozenset(marks)


def worst(ball: Ball, middle: Point, steps: int, restarts: int, seed: int, report: Report | None = None) -> Worst:
    """Both searches from the one-step point and from ``restarts − 1`` random points, with the best of each.

    Where the gradient at the centre is 0 there is no one-step point, and the first start is random as well.

    Args:
        ball: where to search.
        middle: its centre, from :func:`centre`.
        steps: of each search from each start.
        restarts: starts in all.
        seed: names the random starts.
        report: told of each step of all the searches, counted through: ``2·restarts·steps`` in all.
    """
    first = one_step(ball, middle)
    known = first if exceeds(first.loss, middle.loss) else middle
    found: dict[str, Ascent] = {}
    by_start: list[float] = []
    for restart in range(restarts):
        start = first if restart == 0 and first is not middle else ball.at(random_start(ball, seed, restart))
        highest = start.loss
        for number, (name, search) in enumerate((("projected", projected_ascent), ("apgd", apgd))):
            done = (2 * restart + number) * steps
            alone = search(ball, start, steps, _shifted(report, done))
            highest = alone.best.loss if exceeds(alone.best.loss, highest) else highest
            ascent = _at_least(known, alone)
            if report is not None:
                report(done + steps)
            if name not in found or exceeds(ascent.best.loss, found[name].best.loss):
                found[name] = ascent
        by_start.append(highest)
    return Worst(first, found["projected"], found["apgd"], tuple(by_start))


def _shifted(report: Report | None, done: int) -> Report | None:
    return None if report is None else lambda step: report(done + step)


def late_gain(rises: npt.NDArray[np.float64]) -> float:
    """Share of the last of ``rises`` (steps+1,) that the last quarter of the steps added; NaN if it is not finite."""
    quarter = math.ceil((len(rises) - 1) / 4)
    last, before = float(rises[-1]), float(rises[-1 - quarter])
    if not math.isfinite(last):
        return math.nan
    return (last - before) / last if last else 0.0


def _at_least(known: Point, ascent: Ascent) -> Ascent:
    """``ascent`` if it went beyond ``known``, which lies in every ball; its curve starts there in any case."""
    curve = np.array([known.loss if exceeds(known.loss, loss) else loss for loss in ascent.curve.tolist()])
    best = ascent.best if exceeds(ascent.best.loss, known.loss) else known
    return Ascent(best, curve, ascent.note)


def _ascending(point: Point) -> Vector | None:
    """g/‖g‖; None where the gradient is 0 or not finite."""
    length = 0.0 if point.gradient is None else norm(point.gradient)
    return None if point.gradient is None or length == 0 else scaled(point.gradient, 1 / length)


class _Track:
    """The best point so far and the curve of its loss."""

    def __init__(self, start: Point, steps: int, report: Report | None) -> None:
        self.best = self.last = start
        self._curve = [start.loss]
        self._steps, self._report = steps, report

    def add(self, point: Point) -> None:
        self.last = point
        if exceeds(point.loss, self.best.loss):
            self.best = point
        self._curve.append(self.best.loss)
        if self._report is not None:
            self._report(len(self._curve) - 1)

    def result(self) -> Ascent:
        missing = self._steps + 1 - len(self._curve)
        note = ""
        if self.last.gradient is None:
            finite = math.isfinite(self.last.loss)
            note = "the gradient is not finite" if finite else f"the loss is {self.last.loss}"
            note += f" at ‖delta‖ = {norm(self.last.delta):.3g}, step {len(self._curve) - 1}"
        elif missing:
            note = f"the gradient is 0 at step {len(self._curve) - 1}"
        return Ascent(self.best, np.array(self._curve + [self.best.loss] * missing), note)
