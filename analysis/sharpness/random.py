"""Random sharpness: the mean loss rise under random weight perturbations.

    isotropic:  eps = rho·u/‖u‖,  u ~ N(0, I) over the whole space            (radius rho)
    filter:     eps_ij ~ N(0, sigma²/n · ‖W_i,:‖²), row i of n columns        (radius sigma; Flat-LoRA, Li et al. 2025)

    sharpness = E[L(W + eps) − L(W)]

Directions are named by seed, number and parameter, so that adapters of one base model are compared along the same ones:
compare them in pairs. Loss rises of single directions scatter by their own size or more; many are needed for a mean.
With ``se`` their number is chosen so that

    standard error ≤ se·|mean|  at every radius.

It is asked at few, growing counts (:func:`checkpoints`) and never below 8 directions: a spread looked at after every
direction would sooner or later be small by luck. Intervals from such an estimate are still a little short: in simulated
rises of coefficient of variation 1.2 and se = 0.1, ±1.96 standard errors held the true mean in 91 to 95 % of runs.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from analysis.core.directions import gaussian
from analysis.core.example_losses import ExampleLosses, MeanLosses
from analysis.core.measure import Measure, Watch
from analysis.core.objective import Objective
from analysis.core.ranks import shared
from analysis.core.result import row
from analysis.core.space import WeightSpace
from analysis.core.trained import Trained
from analysis.core.vectors import Vector, norm, scaled
from analysis.settings import MeasureSettings, Radii
from bilora.errors import UserError

Kind = Literal["filter", "isotropic"]

LEAST = 8
"""Directions before a standard error is trusted to end the sampling."""


class RandomSettings(MeasureSettings):
    """Settings of :func:`random_sharpness`, described there."""

    radii: Radii = (0.05, 0.1, 0.2, 0.5)
    kind: Kind = "filter"
    directions: int = Field(default=10, ge=1)
    seed: int = 0
    antithetic: bool = False
    se: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    max_directions: int = Field(default=1000, ge=LEAST)

    @model_validator(mode="after")
    def _room_for_directions(self) -> "RandomSettings":
        if self.se is not None and self.max_directions < self.directions:
            raise ValueError(f"max_directions must be at least directions = {self.directions}")
        return self


@dataclass(frozen=True)
class RandomSharpness:
    """Loss rises along random directions. Non-finite values are the loss's own and stay."""

    space: str
    split: str
    kind: Kind
    seed: int  # of the directions
    base_loss: float  # L(W)
    radii: tuple[float, ...]  # (R,)
    rises: npt.NDArray[np.float64]  # (R, D): L(W + eps) − L(W) of D directions, with antithetic the mean over ±eps
    induced_norms: npt.NDArray[np.float64]  # (R, D): realised ‖eps_W‖
    se: float | None = None  # relative standard error asked for; None where D was fixed
    example_errors: tuple[float, ...] = ()  # (R,): of the mean rise over examples, at these directions; NaN if unknown

    @property
    def mean(self) -> npt.NDArray[np.float64]:
        """Mean rise over directions, (R,)."""
        return self.rises.mean(axis=1)

    @property
    def standard_error(self) -> npt.NDArray[np.float64]:
        """Standard error of the mean over directions, (R,); NaN with one direction or a non-finite rise."""
        return standard_errors(self.rises)

    @property
    def reached(self) -> npt.NDArray[np.bool_]:
        """Whether the standard error asked for was reached, (R,); false where a rise is not finite or none was."""
        return within(self.rises, self.se) if self.se is not None else np.zeros(len(self.radii), dtype=bool)

    def rows(self) -> list[dict[str, Any]]:
        """``loss_rise`` of every radius and direction, and ``loss_rise_mean`` of every radius.

        With ``se`` also ``reached`` (1 or 0) and ``directions`` (how many were used) of every radius.
        """
        rows = []
        means, errors, norms = self.mean, self.standard_error, self.induced_norms.mean(axis=1)
        for i, radius in enumerate(self.radii):
            where: dict[str, Any] = {"space": self.space, "split": self.split, "kind": self.kind, "radius": radius}
            where["direction_seed"] = self.seed
            for j, (rise, induced) in enumerate(zip(self.rises[i], self.induced_norms[i], strict=True)):
                rows.append(row("random", "loss_rise", float(rise), index=j, induced_norm=float(induced), **where))
            summary = {"standard_error": float(errors[i]), "induced_norm": float(norms[i])}
            rows.append(row("random", "loss_rise_mean", float(means[i]), **summary, **where))
            if self.se is not None:
                rows.append(row("random", "reached", float(self.reached[i]), **where))
                rows.append(row("random", "directions", self.rises.shape[1], **where))
        return rows


def standard_errors(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Standard error of the mean of each row of ``values`` (R, D); NaN for D = 1 and where a value is not finite."""
    count = values.shape[1]
    if count < 2:
        return np.full(len(values), math.nan)
    with np.errstate(invalid="ignore"):
        return values.std(axis=1, ddof=1) / math.sqrt(count)


def within(rises: npt.NDArray[np.float64], se: float) -> npt.NDArray[np.bool_]:
    """Which rows of ``rises`` (R, D) have a standard error of at most ``se`` times their absolute mean, (R,)."""
    return standard_errors(rises) <= se * np.abs(rises.mean(axis=1))


def checkpoints(least: int, most: int) -> Iterator[int]:
    """Counts of directions at which the standard error is looked at, in ascending order; the last one is ``most``.

    ``max(least, 8)``, then those of 8, 12, 16, 24, 32, 48, … (powers of two and half-way between) that lie above it.
    """
    count = max(least, LEAST)
    grid = LEAST
    while count < most:
        yield count
        while grid <= count:
            grid = grid * 3 // 2 if grid.bit_count() == 1 else grid * 4 // 3
        count = grid
    yield most


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
    se: float | None = None,
    max_directions: int = 1000,
    watch: Watch | None = None,
) -> RandomSharpness:
    """Loss rise under random perturbations of the weights, the module's two kinds.

    Args:
        objective: the data side, the same for every compared model.
        space: the model side; its weights are bit-identical afterwards.
        radii: rho (isotropic: the norm of the perturbation) or sigma (filter: relative to the norm of each row).
        kind: ``"filter"`` or ``"isotropic"``.
        directions: independent directions, numbered 0, 1, 2, …; each is used at every radius. With ``se`` the least.
        seed: names the directions.
        antithetic: evaluate at ±eps and take the mean, which removes the first-order term; twice the cost.
        se: standard error of the mean, relative to it, for example 0.1: directions are added until every radius has it.
            A radius with a rise that is not finite cannot reach it and is not waited for. Models compared may use
            different numbers of directions; the first ones are the same. None takes ``directions`` of them.
        max_directions: with ``se``, how many at most, 8 or more; the result says whether it was reached.
        watch: called with (losses evaluated, losses in all; with ``se`` the most there can be).

    Ranks of an initialised ``torch.distributed`` share the directions; every rank gets the whole result, which is that
    of one process.

    Raises:
        UserError: a setting is out of bounds, or ``kind="filter"`` in a space without such parameters.
    """
    settings = RandomSettings.checked(
        radii=tuple(radii),
        kind=kind,
        directions=directions,
        seed=seed,
        antithetic=antithetic,
        se=se,
        max_directions=max_directions,
    )
    draw = filter_noise if settings.kind == "filter" else isotropic_noise
    signs = (1.0, -1.0) if settings.antithetic else (1.0,)
    most = settings.directions if settings.se is None else settings.max_directions
    stops = {most} if settings.se is None else set(checkpoints(settings.directions, most))
    losses = np.empty((len(settings.radii), most, len(signs)))
    norms = np.empty_like(losses)
    progress = Progress(watch, losses.size + 1)

    def unperturbed(_: None) -> tuple[float, ExampleLosses]:
        examples = ExampleLosses()
        return objective.evaluate(space, examples)["loss"], examples

    def along(number: int) -> list[list[tuple[float, float, ExampleLosses]]]:
        """Loss, realised ‖eps_W‖ and losses of examples at every radius and sign."""
        direction = draw(space, settings.seed, number)
        return [[at(direction, sign * radius) for sign in signs] for radius in settings.radii]

    def at(direction: Vector, scale: float) -> tuple[float, float, ExampleLosses]:
        examples = ExampleLosses()
        with space.perturbed(direction, scale):
            loss = objective.evaluate(space, examples)["loss"]
        progress.step()
        return loss, space.induced_norm(direction, scale), examples

    ((base_loss, before),) = shared([None], unperturbed)
    progress.reached(1)
    after = [MeanLosses() for _ in settings.radii]
    for used, found in enumerate(shared(range(most), along), start=1):
        for i, of_radius in enumerate(found):
            for k, (loss, length, examples) in enumerate(of_radius):
                losses[i, used - 1, k], norms[i, used - 1, k] = loss, length
                after[i].add(examples)
        progress.reached(1 + used * len(settings.radii) * len(signs))
        if settings.se is not None and used in stops:
            rises = losses[:, :used].mean(axis=2) - base_loss
            if bool((within(rises, settings.se) | ~np.isfinite(rises).all(axis=1)).all()):
                break
    return RandomSharpness(
        space=space.name,
        split=objective.name,
        kind=settings.kind,
        seed=settings.seed,
        base_loss=base_loss,
        radii=settings.radii,
        rises=losses[:, :used].mean(axis=2) - base_loss,
        induced_norms=norms[:, :used].mean(axis=2),
        se=settings.se,
        example_errors=tuple(mean.rise_error(before) for mean in after),
    )


class Progress:
    """Tells ``watch`` of losses evaluated: this process's as they come, those of other ranks once they are known."""

    def __init__(self, watch: Watch | None, total: int) -> None:
        self._watch = watch
        self._total = total
        self._done = 0

    def step(self) -> None:
        """One loss more."""
        self.reached(self._done + 1)

    def reached(self, done: int) -> None:
        """``done`` losses; fewer than were told of already are not told."""
        if done > self._done:
            self._done = done
            if self._watch is not None:
                self._watch(done, self._total, "losses")


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
