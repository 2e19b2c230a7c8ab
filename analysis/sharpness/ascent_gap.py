"""How much of the steepest ascent Bi-LoRA's auxiliary pair attains at the trained weights.

    auxiliary:  eps = s2·B2·A2                rise = L(W + eps) − L(W),    first order: ⟨G, eps⟩
    gradient:   eps' = ‖eps‖·G/‖G‖            rise = L(W + eps') − L(W),   first order: ‖eps‖·‖G‖

    ratio = rise of the auxiliary pair / rise of the gradient step of the same length

G is the gradient of the mean loss over all examples with respect to the merged weights, ‖·‖ the norm over all adapted
layers. The gradient step is the best to first order only: where the loss curves, a ratio above 1 is possible.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from analysis.core.example_losses import ExampleLosses, ratio_error, rise_error
from analysis.core.factors import Factors
from analysis.core.measure import Measure, Watch
from analysis.core.objective import Objective
from analysis.core.result import row
from analysis.core.space import WeightSpace
from analysis.core.trained import Trained
from analysis.core.vectors import Vector, dot, norm, scaled
from analysis.settings import MeasureSettings
from bilora.errors import UserError


class AscentGapSettings(MeasureSettings):
    """The measure ``ascent_gap`` has no settings."""


@dataclass(frozen=True)
class Ascent:
    """One perturbation of the merged weights."""

    kind: Literal["auxiliary", "gradient"]
    loss_rise: float  # L(W + eps) − L(W)
    standard_error: float  # of the rise, over examples; NaN where theirs are not known
    first_order: float  # ⟨G, eps⟩
    induced_norm: float  # realised ‖eps_W‖


@dataclass(frozen=True)
class AscentGap:
    """The auxiliary pair against the gradient step of the same length. Non-finite losses stay."""

    split: str
    ascents: tuple[Ascent, ...]  # auxiliary, gradient; empty for an adapter without an auxiliary pair
    ratio_error: float = math.nan  # standard error of the ratio, over examples

    @property
    def ratio(self) -> float:
        """Rise of the auxiliary pair over the gradient step's; NaN if that is 0 or there is no pair."""
        if not self.ascents:
            return math.nan
        auxiliary, gradient = self.ascents
        return auxiliary.loss_rise / gradient.loss_rise if gradient.loss_rise else math.nan

    def rows(self) -> list[dict[str, Any]]:
        """``loss_rise`` and ``first_order`` of either kind, and ``ratio``; none without an auxiliary pair."""
        rows = []
        for a in self.ascents:
            where = {"space": "full", "split": self.split, "kind": a.kind, "induced_norm": a.induced_norm}
            rows.append(row("ascent_gap", "loss_rise", a.loss_rise, standard_error=a.standard_error, **where))
            rows.append(row("ascent_gap", "first_order", a.first_order, **where))
        if self.ascents:
            where = {"space": "full", "split": self.split, "induced_norm": self.ascents[0].induced_norm}
            rows.append(row("ascent_gap", "ratio", self.ratio, standard_error=self.ratio_error, **where))
        return rows


def ascent_gap(
    objective: Objective,
    space: WeightSpace,
    auxiliary: Mapping[str, Factors],
    *,
    watch: Watch | None = None,
) -> AscentGap:
    """Loss rise of the auxiliary perturbation and of the gradient step of its length.

    A zero gradient has no ascent direction: that step stays at W and the ratio is NaN.

    Args:
        objective: the data side, the same for every compared model.
        space: the full space of the model with the trained adapter; its weights are bit-identical afterwards.
        auxiliary: layer → factors B2, A2 and s2 (:attr:`analysis.core.trained.Trained.auxiliary`).
        watch: called with (steps done, 3): the gradient, then the two rises.

    Memory: the gradient and one dense perturbation.

    Raises:
        UserError: ``space`` is not a full space, the auxiliary belongs to other layers than it has, or the loss or its
            gradient is not finite at the unperturbed weights.
    """
    if space.name != "full":
        raise UserError(
            f"the auxiliary pair perturbs merged weights, not the {space.name} space: measure in full space"
        )
    names = {f"{layer}.weight" for layer in auxiliary}
    if names != space.parameters.keys():
        odd = sorted(names ^ space.parameters.keys())[0].removesuffix(".weight")
        raise UserError(f"the auxiliary and the adapter differ in layer {odd}: give the files of one training run")
    before = ExampleLosses()
    base = objective.evaluate(space, before)["loss"]
    gradient = objective.gradient(space)
    length = norm(gradient)

    def report(done: int) -> None:
        if watch is not None:
            watch(done, 3, "steps")

    report(1)
    eps = space.aligned(_perturbations(space, auxiliary))
    loss, at_auxiliary = _loss_at(objective, space, eps, 1.0)
    error = rise_error(before, at_auxiliary)
    first = Ascent("auxiliary", loss - base, error, dot(gradient, eps), space.induced_norm(eps))
    report(2)
    direction = scaled(gradient, 1 / length if length else 0.0)
    rho = first.induced_norm
    loss, at_gradient = _loss_at(objective, space, direction, rho)
    error = rise_error(before, at_gradient)
    second = Ascent("gradient", loss - base, error, rho * length, space.induced_norm(direction, rho))
    report(3)
    return AscentGap(objective.name, (first, second), _ratio_error(before, at_auxiliary, at_gradient))


@torch.no_grad()
def _perturbations(space: WeightSpace, auxiliary: Mapping[str, Factors]) -> Vector:
    """s2·B2·A2 of every layer, float64, on the space's device."""
    device = space.device
    return {
        f"{layer}.weight": pair.scale * (pair.B.detach().to(device).double() @ pair.A.detach().to(device).double())
        for layer, pair in auxiliary.items()
    }


def _loss_at(objective: Objective, space: WeightSpace, direction: Vector, scale: float) -> tuple[float, ExampleLosses]:
    examples = ExampleLosses()
    with space.perturbed(direction, scale):
        return objective.evaluate(space, examples)["loss"], examples


def _ratio_error(before: ExampleLosses, auxiliary: ExampleLosses, gradient: ExampleLosses) -> float:
    if not (before.known and auxiliary.known and gradient.known):
        return math.nan
    return ratio_error(auxiliary.sums - before.sums, gradient.sums - before.sums)


def _run(
    objective: Objective,
    space: WeightSpace,
    settings: AscentGapSettings,
    trained: Trained | None,
    watch: Watch | None = None,
) -> AscentGap:
    if trained is None or trained.auxiliary is None:
        return AscentGap(objective.name, ())
    return ascent_gap(objective, space, trained.auxiliary, watch=watch)


MEASURE = Measure(
    name="ascent_gap",
    summary="loss rise of Bi-LoRA's auxiliary pair against the gradient step of the same length",
    spaces=("full",),
    settings=AscentGapSettings,
    run=_run,
)
