"""How much of the best ascent a perturbation attains, at one length ‖eps_W‖ = rho in full space.

    efficiency         (L(W + eps_W) − L(W)) / best rise found in the ball ‖eps‖ ≤ rho
    first_order_share  ⟨eps_W, G⟩/(rho·‖G‖),       G the gradient with respect to W: 1 for eps_W = rho·G/‖G‖
    rank_r_share       ⟨eps_W, G⟩/(rho·‖G_r‖),     1 for rho·G_r/‖G_r‖, the best of rank r in every layer

The perturbations are those of :mod:`analysis.subspace.perturbations`, each over all adapted layers together and of the
same realised length, and as ``applied`` what the last recorded step of the run itself applied, where that is known in
factors: at that step's own batch and weights, so that it need not be what the method would do here. LoRA-SAM's is no
multiple of one matrix: its length in factor space is the one at which ‖eps_W‖ is rho. It has rank 2r, and depends on
the gauge of the factors; noise and the gradient have full rank: their rank_r_share may exceed 1. ``isotropic`` noise is
the level of chance. Of random kinds there are several draws.

The best rise is itself a lower bound: the highest of two searches with restarts (:mod:`analysis.sharpness.ascent`), and
never below that of any of the perturbations compared. ``late_gain`` is what the last quarter of the steps added to it,
as in ``worst_case``.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from pydantic import Field
from scipy.optimize import brentq

from analysis.core.factors import Factors
from analysis.core.measure import Measure, Watch
from analysis.core.objective import Objective
from analysis.core.result import row
from analysis.core.space import WeightSpace
from analysis.core.trained import Trained
from analysis.core.vectors import Vector, dot, norm, scaled
from analysis.settings import MeasureSettings, Radii
from analysis.sharpness.ascent import Ball, centre, late_gain, worst
from analysis.sharpness.random import Progress, filter_noise, isotropic_noise, standard_errors
from analysis.sharpness.scaling import scaling_of
from analysis.subspace.lowrank import LowRank, leading_squared_norm
from analysis.subspace.perturbations import factored, induced, last_applied, rank_r
from analysis.subspace.products import ratio
from analysis.subspace.reachable import Perturbation
from bilora.errors import UserError
from bilora.training.recording import is_recorded, read_recording

NAME = "efficiency"
Kind = Literal["applied", "auxiliary", "lora_sam", "gradient", "gradient_rank_r", "filter_noise", "isotropic"]
KINDS: tuple[Kind, ...] = get_args(Kind)
RANDOM = ("filter_noise", "isotropic")
Array = npt.NDArray[np.float64]


class EfficiencySettings(MeasureSettings):
    """Settings of :func:`ascent_efficiency`, described there."""

    radii: Radii = (0.05,)
    draws: int = Field(default=4, ge=1)
    steps: int = Field(default=10, ge=1)
    restarts: int = Field(default=1, ge=1)
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Attained:
    """What one kind of perturbation attains at one radius; arrays have an entry a draw."""

    kind: Kind
    radius: float
    rises: Array  # (D,) L(W + eps_W) − L(W)
    first_order: Array  # (D,) ⟨eps_W, G⟩/(rho·‖G‖)
    rank_r: Array  # (D,) ⟨eps_W, G⟩/(rho·‖G_r‖)


@dataclass(frozen=True, eq=False)
class Efficiency:
    """Perturbations of equal length, and the best rise found at it."""

    split: str
    seed: int
    attained: tuple[Attained, ...]
    best: Mapping[float, float]  # radius → best rise found
    late: Mapping[float, float]  # radius → share of it that the last quarter of the search added

    def rows(self) -> list[dict[str, Any]]:
        """The quantities of the module's list by kind and radius, means over draws with their standard error."""
        rows = []
        for found in self.attained:
            where: dict[str, Any] = {"space": "full", "split": self.split, "kind": found.kind, "radius": found.radius}
            where["induced_norm"] = found.radius
            if found.kind in RANDOM:
                where["direction_seed"] = self.seed
            best = self.best[found.radius]
            shares = found.rises / best if best > 0 else np.full_like(found.rises, math.nan)
            values = {
                "loss_rise": found.rises,
                "efficiency": shares,
                "first_order_share": found.first_order,
                "rank_r_share": found.rank_r,
            }
            for quantity, draws in values.items():
                mean = float(draws.mean()) if len(draws) else math.nan  # a zero direction has no draw
                error = float(standard_errors(draws[None])[0])
                rows.append(row(NAME, quantity, mean, standard_error=error, **where))
        for radius, best in self.best.items():
            at = {"space": "full", "split": self.split, "radius": radius, "induced_norm": radius}
            rows.append(row(NAME, "best_rise", best, **at))
            rows.append(row(NAME, "late_gain", self.late[radius], **at))
        return rows


def ascent_efficiency(
    objective: Objective,
    full: WeightSpace,
    lora: WeightSpace,
    radii: Sequence[float] = (0.05,),
    *,
    auxiliary: Mapping[str, Factors] | None = None,
    applied: Mapping[str, LowRank] | None = None,
    draws: int = 4,
    steps: int = 10,
    restarts: int = 1,
    seed: int = 0,
    watch: Watch | None = None,
) -> Efficiency:
    """Rises of several perturbations of one length ‖eps_W‖, and what part of the best one they are.

    Args:
        objective: the examples.
        full: the full space of a model with a plain LoRA adapter; its weights are bit-identical afterwards.
        lora: the LoRA space of the same model; likewise.
        radii: lengths ‖eps_W‖ over all adapted layers.
        auxiliary: factors of Bi-LoRA's auxiliary pair; None for a method that has none.
        applied: layer → the perturbation of a recorded step; None or empty where there is none.
        draws: of noise.
        steps, restarts: of the search for the best rise, as at
            :func:`~analysis.sharpness.worst_case.worst_case_sharpness`.
        seed: names noise and random starts.
        watch: told of (losses and gradients evaluated, in all); a perturbation that is zero is passed over.

    Raises:
        UserError: a setting out of range, or a loss or gradient that is not finite.
    """
    settings = EfficiencySettings.checked(radii=tuple(radii), draws=draws, steps=steps, restarts=restarts, seed=seed)
    given: dict[Kind, Mapping[str, Perturbation]] = {
        "applied": applied or {},
        "auxiliary": {name: factored(f) for name, f in (auxiliary or {}).items()},
    }
    kinds = [kind for kind in KINDS if given.get(kind, True)]
    passes = sum(settings.draws if kind in RANDOM else 1 for kind in kinds)
    each = passes + 2 * settings.restarts * settings.steps
    total = 2 + len(settings.radii) * each
    progress = Progress(watch, total)
    middle = centre(objective, full, scaling_of(full, "isotropic"))
    progress.step()
    gradient = middle.gradient
    assert gradient is not None  # or centre would have raised
    factor_gradient = objective.gradient(lora)
    progress.step()
    made = _Perturbations(full, lora, gradient, factor_gradient, given, settings)
    size, size_r = norm(gradient), _rank_r_norm(gradient, lora.factors)
    attained: list[Attained] = []
    best: dict[float, float] = {}
    late: dict[float, float] = {}
    for done, radius in enumerate(settings.radii):
        here: list[Attained] = []
        for kind in kinds:
            found = []
            for eps in made.of(kind, radius):
                with full.perturbed(eps):
                    rise = objective.loss(full) - middle.loss
                inner = dot(eps, gradient)
                found.append((rise, ratio(inner, radius * size), ratio(inner, radius * size_r)))
                progress.step()
            here.append(Attained(kind, radius, *np.array(found, dtype=np.float64).reshape(-1, 3).T))
        begun = 2 + done * each + passes
        ball = Ball(objective, full, scaling_of(full, "isotropic"), radius)
        report = partial(_report, progress, begun)
        search = worst(ball, middle, settings.steps, settings.restarts, settings.seed, report)
        rises = search.winner.curve - middle.loss
        known = [float(rises[-1]), *(float(rise) for a in here for rise in a.rises)]
        best[radius] = max((rise for rise in known if not math.isnan(rise)), default=math.nan)
        late[radius] = late_gain(rises)
        attained += here
    return Efficiency(objective.name, settings.seed, tuple(attained), best, late)


def _report(progress: Progress, begun: int, step: int) -> None:
    progress.reached(begun + step)


class _Perturbations:
    """The perturbations of each kind, as vectors of the full space."""

    def __init__(
        self,
        full: WeightSpace,
        lora: WeightSpace,
        gradient: Vector,
        factor_gradient: Vector,
        given: Mapping[Kind, Mapping[str, Perturbation]],
        settings: EfficiencySettings,
    ) -> None:
        self._full, self._lora, self._gradient, self._settings = full, lora, gradient, settings
        length = norm(factor_gradient)
        self._unit = scaled(factor_gradient, 1 / length) if length else factor_gradient
        self._given = given

    def of(self, kind: Kind, radius: float) -> list[Vector]:
        """One perturbation, or several draws, of length ``radius``; none where the direction is zero."""
        match kind:
            case "applied" | "auxiliary":
                found = [self._dense(self._given[kind])]
            case "lora_sam":
                return self._lora_sam(radius)
            case "gradient":
                found = [self._gradient]
            case "gradient_rank_r":
                found = [self._dense(rank_r(self._gradient, self._lora.factors))]
            case "filter_noise" | "isotropic":
                draw = filter_noise if kind == "filter_noise" else isotropic_noise
                found = [draw(self._full, self._settings.seed, j) for j in range(self._settings.draws)]
        lengths = [norm(eps) for eps in found]
        return [scaled(eps, radius / size) for eps, size in zip(found, lengths, strict=True) if size > 0]

    def _lora_sam(self, radius: float) -> list[Vector]:
        """The ascent step of the factors whose ‖eps_W‖ is ``radius``; it is found between powers of two."""
        if not norm(self._unit):
            return []

        def excess(rho: float) -> float:
            return self._lora.induced_norm(self._unit, rho) - radius

        high = radius
        while excess(high) < 0:
            high *= 2
        low = high
        while excess(low) >= 0:
            low /= 2
        rho = float(brentq(excess, low, high, xtol=1e-12 * high, rtol=1e-10))
        eps = {
            layer: induced(f, rho * self._unit[f"{layer}.B"], rho * self._unit[f"{layer}.A"])
            for layer, f in self._lora.factors.items()
        }
        found = self._dense(eps)
        return [scaled(found, radius / norm(found))]

    def _dense(self, eps: Mapping[str, Perturbation]) -> Vector:
        named = {f"{layer}.weight": e.left @ e.right if isinstance(e, LowRank) else e for layer, e in eps.items()}
        return {name: tensor.to(self._full.parameters[name]) for name, tensor in named.items()}


def _rank_r_norm(gradient: Vector, factors: Mapping[str, Factors]) -> float:
    squares = [leading_squared_norm(gradient[f"{layer}.weight"], f.A.shape[0]) for layer, f in factors.items()]
    return math.sqrt(math.fsum(squares))


def _run(
    objective: Objective,
    space: WeightSpace,
    settings: EfficiencySettings,
    trained: Trained | None,
    watch: Watch | None = None,
) -> Efficiency:
    if trained is None:
        raise UserError("measure efficiency needs a LoRA adapter: give an adapter folder, not a plain model")
    full = WeightSpace.full(trained.model)
    run = trained.folder
    applied = last_applied(read_recording(run)) if run is not None and is_recorded(run) else None
    return ascent_efficiency(
        objective,
        full,
        space,
        auxiliary=trained.auxiliary,
        applied=applied,
        watch=watch,
        **settings.model_dump(),
    )


MEASURE = Measure(
    name=NAME,
    summary="loss rise of each method's perturbation over the best found at the same length in full space",
    spaces=("lora",),
    settings=EfficiencySettings,
    run=_run,
)
