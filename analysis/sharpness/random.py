"""Random sharpness: the mean loss rise under random weight perturbations.

    isotropic:  eps = rho·u/‖u‖,  u ~ N(0, I) over the whole space            (radius rho)
    filter:     eps_ij ~ N(0, sigma²/n · ‖W_i,:‖²), row i of n columns        (radius sigma; Flat-LoRA, Li et al. 2025)

    sharpness = E[L(W + eps) − L(W)]

Directions are named by seed, number and parameter, so that adapters of one base model are compared along the same ones:
compare them in pairs. Loss rises of single directions scatter by their own size or more; many are needed for a mean.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from analysis.core.directions import gaussian
from analysis.core.measure import Measure, Watch
from analysis.core.objective import Objective
from analysis.core.result import row
from analysis.core.space import WeightSpace
from analysis.core.trained import Trained
from analysis.core.vectors import Vector, norm, scaled
from analysis.settings import MeasureSettings, Radii
from bilora.errors import UserError

Kind = Literal["filter", "isotropic"]


class RandomSettings(MeasureSettings):
    """Settings of :func:`random_sharpness`, described there."""

    radii: Radii = (0.05, 0.1, 0.2, 0.5)
    kind: Kind = "filter"
    directions: int = Field(default=10, ge=1)
    seed: int = 0
    antithetic: bool = False


@dataclass(frozen=True)
class RandomSharpness:
    """Loss rises along random directions. Non-finite values are the loss's own and stay."""

    space: str
    split: str
    kind: Kind
    base_loss: float  # L(W)
    radii: tuple[float, ...]  # (R,)
    rises: npt.NDArray[np.float64]  # (R, directions): L(W + eps) − L(W), with antithetic the mean over ±eps
    induced_norms: npt.NDArray[np.float64]  # (R, directions): realised ‖eps_W‖

    @property
    def mean(self) -> npt.NDArray[np.float64]:
        """Mean rise over directions, (R,)."""
        return self.rises.mean(axis=1)

    @property
    def standard_error(self) -> npt.NDArray[np.float64]:
        """Standard error of the mean over directions, (R,); NaN with one direction or a non-finite rise."""
        count = self.rises.shape[1]
        if count < 2:
            return np.full(len(self.radii), math.nan)
        with np.errstate(invalid="ignore"):
            return self.rises.std(axis=1, ddof=1) / math.sqrt(count)

    def rows(self) -> list[dict[str, Any]]:
        """``loss_rise`` of every radius and direction, and ``loss_rise_mean`` of every radius."""
        rows = []
        means, errors, norms = self.mean, self.standard_error, self.induced_norms.mean(axis=1)
        for i, radius in enumerate(self.radii):
            where = {"space": self.space, "split": self.split, "kind": self.kind, "radius": radius}
            for j, (rise, induced) in enumerate(zip(self.rises[i], self.induced_norms[i], strict=True)):
                rows.append(row("random", "loss_rise", float(rise), index=j, induced_norm=float(induced), **where))
            summary = {"standard_error": float(errors[i]), "induced_norm": float(norms[i])}
            rows.append(row("random", "loss_rise_mean", float(means[i]), **summary, **where))
        return rows


def isotropic_noise(space: WeightSpace, seed: int, index: int) -> Vector:
    """Direction number ``index`` of norm 1, uniform on the sphere of the whole space."""
    direction = gaussian(space, seed, index)
    return scaled(direction, 1 / norm(direction))


def filter_noise(space: WeightSpace, seed: int, index: int) -> Vector:
    """Flat-LoRA's noise at sigma = 1: entry ij of variance ‖W_i,:‖²/n; 1-D parameters get none.

    In the LoRA space the rows are those of A and of B, so that this noise depends on the gauge; in the full space not.

    Raises:
        UserError: the space has no parameter with at least two dimensions.
    """
    row_norms = space.filter_norms()
    if not row_norms:
        raise UserError(f"space {space.name} has no parameter with rows to scale noise by: use kind isotropic")
    noise = gaussian(space, seed, index)
    for name, values in noise.items():
        if name not in row_norms:
            values.zero_()
            continue
        rows = values.view(len(values), -1)
        rows *= row_norms[name].unsqueeze(1) / math.sqrt(rows.shape[1])
    return noise


def random_sharpness(
    objective: Objective,
    space: WeightSpace,
    radii: Sequence[float],
    *,
    kind: Kind = "filter",
    directions: int = 10,
    seed: int = 0,
    antithetic: bool = False,
    watch: Watch | None = None,
) -> RandomSharpness:
    """Loss rise under random perturbations of the weights, the module's two kinds.

    Args:
        objective: the data side, the same for every compared model.
        space: the model side; its weights are bit-identical afterwards.
        radii: rho (isotropic: the norm of the perturbation) or sigma (filter: relative to the norm of each row).
        kind: ``"filter"`` or ``"isotropic"``.
        directions: independent directions; each is used at every radius.
        seed: names the directions.
        antithetic: evaluate at ±eps and take the mean, which removes the first-order term; twice the cost.
        watch: called with (losses evaluated, losses in all).

    Raises:
        UserError: a setting is out of bounds, or ``kind="filter"`` in a space without such parameters.
    """
    settings = RandomSettings.checked(
        radii=tuple(radii), kind=kind, directions=directions, seed=seed, antithetic=antithetic
    )
    draw = filter_noise if settings.kind == "filter" else isotropic_noise
    signs = (1.0, -1.0) if settings.antithetic else (1.0,)
    shape = (len(settings.radii), settings.directions)
    losses = np.empty((*shape, len(signs)))
    norms = np.empty((*shape, len(signs)))
    total = losses.size + 1

    def report(done: int) -> None:
        if watch is not None:
            watch(done, total, "losses")

    base_loss = objective.loss(space)
    report(1)
    done = 1
    for j in range(settings.directions):
        direction = draw(space, settings.seed, j)
        for i, radius in enumerate(settings.radii):
            for k, sign in enumerate(signs):
                with space.perturbed(direction, sign * radius):
                    losses[i, j, k] = objective.loss(space)
                norms[i, j, k] = space.induced_norm(direction, sign * radius)
                done += 1
                report(done)
    return RandomSharpness(
        space=space.name,
        split=objective.name,
        kind=settings.kind,
        base_loss=base_loss,
        radii=settings.radii,
        rises=losses.mean(axis=2) - base_loss,
        induced_norms=norms.mean(axis=2),
    )


def _run(
    objective: Objective,
    space: WeightSpace,
    settings: RandomSettings,
    trained: Trained | None,
    watch: Watch | None = None,
) -> RandomSharpness:
    return random_sharpness(objective, space, **settings.model_dump(), watch=watch)


MEASURE = Measure(
    name="random",
    summary="mean loss rise under random weight perturbations, isotropic or scaled by row norms",
    spaces=("full", "lora"),
    settings=RandomSettings,
    run=_run,
)
