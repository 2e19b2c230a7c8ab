"""One-step adversarial sharpness: the loss rise one gradient step of length rho away (SAM, Foret et al. 2021).

    eps = rho·G/‖G‖,    loss_rise = L(W + eps) − L(W),    first order: rho·‖G‖

G is the exact gradient of the mean loss over all examples, in the measured space. In the full space the first-order
rise of the best perturbation of rank ≤ r in every layer is reported beside it,

    rho·sqrt(Σ_layers Σ_{i≤r} σ_i(G)²),

attained by rho·G_r/‖G_r‖: what an auxiliary pair of rank r could reach at most. It is not the Ky Fan norm, which
belongs to a point outside the ball (:mod:`analysis.subspace.lowrank`). Both are also given of each layer alone: the
rise by the best perturbation of that layer, of length rho.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field
from torch import Tensor

from analysis.core.example_losses import ExampleLosses, rise_error
from analysis.core.measure import Measure, Watch
from analysis.core.objective import Objective
from analysis.core.result import row
from analysis.core.space import WeightSpace
from analysis.core.trained import Trained
from analysis.core.vectors import Vector, norm, scaled, tensor_dot
from analysis.curvature.blocks import layer_of
from analysis.settings import MeasureSettings, Radii
from analysis.subspace.lowrank import leading_squared_norm


class AdversarialSettings(MeasureSettings):
    """Settings of :func:`adversarial_sharpness`, described there."""

    radii: Radii = (0.005, 0.01, 0.02, 0.05, 0.1)
    rank: int = Field(default=8, ge=1)


@dataclass(frozen=True)
class Slope:
    """First-order loss rise per length of the perturbation."""

    steepest: float  # ‖G‖
    rank_r: float  # ‖G_r‖, of the best perturbation of rank ≤ r in every layer; NaN outside the full space


@dataclass(frozen=True)
class AdversarialPoint:
    """The loss and metrics at one radius along the gradient."""

    radius: float
    metrics: Mapping[str, float]  # loss, accuracy, matthews
    loss_rise: float
    standard_error: float  # of the rise, over examples at this perturbation; NaN where theirs are not known
    first_order: float  # rho·‖G‖
    first_order_rank_r: float  # rho·‖G_r‖ over layers; NaN outside the full space
    induced_norm: float  # realised ‖eps_W‖


@dataclass(frozen=True)
class AdversarialSharpness:
    """One-step adversarial sharpness. Non-finite losses under perturbation stay."""

    space: str
    split: str
    rank: int  # r of the rank-r prediction
    gradient_norm: float  # ‖G‖ in the measured space; 0 means that no direction ascends and every rise is 0
    layers: Mapping[str, Slope]  # of each layer alone; in a LoRA space of its A and B together
    base_metrics: Mapping[str, float]  # loss, accuracy, matthews at the unperturbed weights
    points: tuple[AdversarialPoint, ...]

    def rows(self) -> list[dict[str, Any]]:
        """``loss`` and metrics at radius 0 and every radius; ``loss_rise`` and ``first_order`` at every radius.

        ``first_order`` has kind ``gradient``, and in the full space a second row of kind ``gradient_rank_r`` whose
        index is r; with a layer it is that of the layer alone.
        """
        where = {"space": self.space, "split": self.split}
        gradient = {"kind": "gradient", **where}
        rows = [
            row("adversarial", name, value, radius=0.0, induced_norm=0.0, **gradient)
            for name, value in self.base_metrics.items()
        ]
        for p in self.points:
            at = {"radius": p.radius, "induced_norm": p.induced_norm, **gradient}
            rows += [row("adversarial", name, value, **at) for name, value in p.metrics.items()]
            rows.append(row("adversarial", "loss_rise", p.loss_rise, standard_error=p.standard_error, **at))
            slopes = {layer: (p.radius * s.steepest, p.radius * s.rank_r) for layer, s in self.layers.items()}
            for layer, (rise, low) in {"": (p.first_order, p.first_order_rank_r), **slopes}.items():
                there = {"layer": layer, "radius": p.radius, **where}
                rows.append(row("adversarial", "first_order", rise, kind="gradient", **there))
                if self.space == "full":
                    there |= {"kind": "gradient_rank_r", "index": self.rank}
                    rows.append(row("adversarial", "first_order", low, **there))
        return rows


def adversarial_sharpness(
    objective: Objective,
    space: WeightSpace,
    radii: Sequence[float],
    *,
    rank: int = 8,
    watch: Watch | None = None,
) -> AdversarialSharpness:
    """Loss and metrics after one ascent step of length rho along the full-batch gradient.

    A zero gradient has no ascent direction: the weights stay, every rise and induced norm is 0.

    Args:
        objective: the data side, the same for every compared model.
        space: the model side; its weights are bit-identical afterwards.
        radii: norms rho of the step in the measured space.
        rank: r of the low-rank first-order prediction (full space only).
        watch: called with (points done, points in all); the gradient is the first.

    Raises:
        UserError: a setting is out of bounds, or the loss or its gradient is not finite at the unperturbed weights.
    """
    settings = AdversarialSettings.checked(radii=tuple(radii), rank=rank)
    total = len(settings.radii) + 1
    before = ExampleLosses()
    base = objective.evaluate(space, before)
    gradient = objective.gradient(space)
    length = norm(gradient)
    layers = slopes_by_layer(gradient, settings.rank if space.name == "full" else None)
    low_rank_length = math.sqrt(math.fsum(slope.rank_r**2 for slope in layers.values()))
    if watch is not None:
        watch(1, total, "points")
    direction = scaled(gradient, 1 / length if length else 0.0)
    points = []
    for done, radius in enumerate(settings.radii, start=2):
        after = ExampleLosses()
        with space.perturbed(direction, radius):
            metrics = objective.evaluate(space, after)
        points.append(
            AdversarialPoint(
                radius=radius,
                metrics=metrics,
                loss_rise=metrics["loss"] - base["loss"],
                standard_error=rise_error(before, after),
                first_order=radius * length,
                first_order_rank_r=radius * low_rank_length,
                induced_norm=space.induced_norm(direction, radius),
            )
        )
        if watch is not None:
            watch(done, total, "points")
    return AdversarialSharpness(space.name, objective.name, settings.rank, length, layers, base, tuple(points))


def slopes_by_layer(gradient: Vector, rank: int | None) -> dict[str, Slope]:
    """The slopes of each layer in ``gradient``, in its order; without ``rank`` only the steepest.

    A weight of more than two dimensions counts as the matrix of its output rows, one of a single dimension as a column.
    """
    parts: dict[str, list[Tensor]] = {}
    for name, G in gradient.items():
        parts.setdefault(layer_of(name), []).append(G.flatten(1) if G.dim() > 1 else G[:, None])
    return {
        layer: Slope(
            math.sqrt(math.fsum(tensor_dot(G, G) for G in matrices)),
            math.nan if rank is None else math.sqrt(math.fsum(leading_squared_norm(G, rank) for G in matrices)),
        )
        for layer, matrices in parts.items()
    }


def _run(
    objective: Objective,
    space: WeightSpace,
    settings: AdversarialSettings,
    trained: Trained | None,
    watch: Watch | None = None,
) -> AdversarialSharpness:
    return adversarial_sharpness(objective, space, **settings.model_dump(), watch=watch)


MEASURE = Measure(
    name="adversarial",
    summary="loss and metric one gradient step of length rho away, with the first-order prediction",
    spaces=("full", "lora"),
    settings=AdversarialSettings,
    run=_run,
)
