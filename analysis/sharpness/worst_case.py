"""Worst-case sharpness over a ball, plain or adaptive.

    max L(W + T∘delta) − L(W)  over  ‖delta‖ ≤ rho,     T = 1, |W| or row norms (:mod:`analysis.sharpness.scaling`)

The maximum is not computable: what is reported is a lower bound, the larger of two searches with restarts
(:mod:`analysis.sharpness.ascent`), with the curve that says whether they had still been rising. With T = |W| it is the
adaptive sharpness of Kwon et al. (2021) and Andriushchenko et al. (2023).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from analysis.core.example_losses import ExampleLosses, rise_error
from analysis.core.measure import Measure, Watch
from analysis.core.objective import Objective
from analysis.core.result import row
from analysis.core.space import WeightSpace
from analysis.core.trained import Trained
from analysis.settings import MeasureSettings, Radii
from analysis.sharpness.ascent import Ball, centre, late_gain, worst
from analysis.sharpness.scaling import ScalingKind, scaling_of


class WorstCaseSettings(MeasureSettings):
    """Settings of :func:`worst_case_sharpness`, described there."""

    radii: Radii = (0.01, 0.05, 0.1)
    kind: ScalingKind = "isotropic"
    steps: int = Field(default=20, ge=1)
    restarts: int = Field(default=2, ge=1)
    seed: int = 0


@dataclass(frozen=True, eq=False)
class WorstCasePoint:
    """The highest loss found in the ball of one radius: a lower bound of the worst case there."""

    radius: float  # rho: the norm of delta
    one_step: float  # L − L(W) at rho·g/‖g‖; may be negative
    pga: float  # lower bound by projected gradient ascent, at least 0 and one_step
    apgd: float  # lower bound by APGD, at least 0 and one_step
    lower_bound: float  # the larger of the two
    standard_error: float  # of that, over examples at the worst point; NaN where their losses are not known
    metrics: Mapping[str, float]  # loss, accuracy, matthews at the worst point
    induced_norm: float  # realised ‖eps_W‖ of the worst point
    induced_norms: Mapping[str, float]  # the same of the points of one_step, pga and apgd
    curve: npt.NDArray[np.float64]  # (steps+1,): best rise after each step of the winning search and start
    by_start: npt.NDArray[np.float64]  # (restarts,): rise by the better search from each start; near equal if settled
    note: str  # why the winning search ended early, or empty

    @property
    def late_gain(self) -> float:
        """Share of the lower bound that the last quarter of the steps added; NaN where it is not finite.

        Near 0 the search had settled; well above it more steps would raise the bound.
        """
        return late_gain(self.curve)


@dataclass(frozen=True, eq=False)
class WorstCase:
    """Lower bounds of the worst-case loss rise. Non-finite losses are the model's own and stay."""

    space: str
    split: str
    kind: ScalingKind
    base_loss: float  # L(W)
    base_metrics: Mapping[str, float]  # loss, accuracy, matthews at the unperturbed weights
    steps: int  # of each search from each start
    restarts: int
    seed: int  # of the random starts
    points: tuple[WorstCasePoint, ...]

    def rows(self) -> list[dict[str, Any]]:
        """``loss_rise``, the lower bound of the worst case, at every radius, and what it rests on.

        ``loss_rise_pga``, ``loss_rise_apgd`` and ``loss_rise_one_step`` are the single searches; ``accuracy`` and, of
        classes, ``matthews`` are those at the worst point, and at radius 0 those of the weights; ``best_rise`` is the
        curve of the winning search (``index`` = step), ``late_gain`` the share of its last quarter and ``start_rise``
        what each start led to (``index`` = its number); ``steps`` and ``restarts`` have no radius.
        """
        where = {"space": self.space, "split": self.split, "kind": self.kind, "direction_seed": self.seed}
        effort = (("steps", self.steps), ("restarts", self.restarts))
        rows = [row("worst_case", name, value, **where) for name, value in effort]
        rows += _metrics_rows(self.base_metrics, radius=0.0, induced_norm=0.0, **where)
        for p in self.points:
            at = {"radius": p.radius, **where}
            realised = {"induced_norm": p.induced_norm, **at}
            rows.append(row("worst_case", "loss_rise", p.lower_bound, standard_error=p.standard_error, **realised))
            for name, value in (("pga", p.pga), ("apgd", p.apgd), ("one_step", p.one_step)):
                rows.append(row("worst_case", f"loss_rise_{name}", value, induced_norm=p.induced_norms[name], **at))
            rows += _metrics_rows(p.metrics, **realised)
            rows += [row("worst_case", "best_rise", float(rise), index=k, **at) for k, rise in enumerate(p.curve)]
            rows += [row("worst_case", "start_rise", float(rise), index=k, **at) for k, rise in enumerate(p.by_start)]
            rows.append(row("worst_case", "late_gain", p.late_gain, **at))
        return rows


def _metrics_rows(metrics: Mapping[str, float], **where: Any) -> list[dict[str, Any]]:
    """Rows of what is known besides the loss."""
    return [row("worst_case", name, value, **where) for name, value in metrics.items() if name != "loss"]


def worst_case_sharpness(
    objective: Objective,
    space: WeightSpace,
    radii: Sequence[float],
    *,
    kind: ScalingKind = "isotropic",
    steps: int = 20,
    restarts: int = 2,
    seed: int = 0,
    watch: Watch | None = None,
) -> WorstCase:
    """Lower bound of the largest loss rise in the ball of each radius, the module's equation.

    Radii are searched one by one, so that the number at a radius does not depend on the others asked for. Where the
    loss becomes infinite or NaN inside the ball, that is the result, and the point's note says where.

    Args:
        objective: the data side, the same for every compared model.
        space: the model side; its weights are bit-identical afterwards.
        radii: norms rho of delta: absolute for ``isotropic``, relative for the others, where ``c·√(entries)``
            (elementwise) or ``c·√(rows)`` (filter) can move every weight by the share c of its entry or row.
        kind: ``"isotropic"``, ``"elementwise"`` or ``"filter"``.
        steps: losses and gradients of each search from each start; the cost of a radius is about
            ``2·restarts·steps`` gradients.
        restarts: starts: the one-step point, then random points of the ball.
        seed: names the random starts.
        watch: called with (steps done, steps in all).

    Raises:
        UserError: a setting is out of bounds, the scaling is 0 everywhere, or the loss or its gradient is not finite
            at the unperturbed weights.
    """
    settings = WorstCaseSettings.checked(radii=tuple(radii), kind=kind, steps=steps, restarts=restarts, seed=seed)
    scaling = scaling_of(space, settings.kind)
    each = 2 * settings.restarts * settings.steps
    total = each * len(settings.radii)
    before = ExampleLosses()
    base_metrics = objective.evaluate(space, before)
    middle = centre(objective, space, scaling)
    points = []
    for number, radius in enumerate(settings.radii):

        def report(step: int, before: int = number * each, radius: float = radius) -> None:
            if watch is not None:
                watch(before + step, total, f"rho {radius:g}")

        ball = Ball(objective, space, scaling, radius)
        found = worst(ball, middle, settings.steps, settings.restarts, settings.seed, report)
        winner = found.winner
        bests = {"one_step": found.one_step, "pga": found.projected.best, "apgd": found.apgd.best}
        after = ExampleLosses()
        with space.perturbed(scaling.applied(winner.best.delta)):
            metrics = objective.evaluate(space, after)
        points.append(
            WorstCasePoint(
                radius=radius,
                one_step=found.one_step.loss - middle.loss,
                pga=found.projected.best.loss - middle.loss,
                apgd=found.apgd.best.loss - middle.loss,
                lower_bound=winner.best.loss - middle.loss,
                standard_error=rise_error(before, after),
                metrics=metrics,
                induced_norm=ball.induced_norm(winner.best.delta),
                induced_norms={name: ball.induced_norm(best.delta) for name, best in bests.items()},
                curve=winner.curve - middle.loss,
                by_start=np.array(found.by_start) - middle.loss,
                note=winner.note,
            )
        )
    return WorstCase(
        space=space.name,
        split=objective.name,
        kind=settings.kind,
        base_loss=middle.loss,
        base_metrics=base_metrics,
        steps=settings.steps,
        restarts=settings.restarts,
        seed=settings.seed,
        points=tuple(points),
    )


def _run(
    objective: Objective,
    space: WeightSpace,
    settings: WorstCaseSettings,
    trained: Trained | None,
    watch: Watch | None = None,
) -> WorstCase:
    return worst_case_sharpness(objective, space, **settings.model_dump(), watch=watch)


MEASURE = Measure(
    name="worst_case",
    summary="highest loss found in a ball around the weights, plain or adaptive: a lower bound of the worst case",
    spaces=("full", "lora"),
    settings=WorstCaseSettings,
    run=_run,
)
