"""Loss under multiplicative read noise, as analogue in-memory computing adds it to stored weights.

    base:    W = W0∘(1 + sigma·u) + s·B·A       the frozen weight in the analogue array, the adapter kept digital
    merged:  W = (W0 + s·B·A)∘(1 + sigma·u)     all of W in the array

    u ~ N(0, 1) for every entry,    loss_rise = L(perturbed) − L(W)

u is named by seed, number and parameter, so that adapters of one base model meet the same noise, under ``base`` the
very same perturbation of W0: compare them in pairs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from analysis.core.directions import gaussian
from analysis.core.measure import Measure, Watch
from analysis.core.objective import Objective
from analysis.core.ranks import shared
from analysis.core.result import row
from analysis.core.space import WeightSpace
from analysis.core.trained import Trained
from analysis.core.vectors import Vector
from analysis.settings import MeasureSettings, Radii
from analysis.sharpness.quantisation import base_weights
from analysis.sharpness.random import Progress, standard_errors
from bilora.errors import UserError

Kind = Literal["base", "merged"]


class ReadNoiseSettings(MeasureSettings):
    """Settings of :func:`read_noise`, described there."""

    sigmas: Radii = (0.01, 0.02, 0.05, 0.1)
    kind: Kind = "base"
    directions: int = Field(default=10, ge=1)
    seed: int = 0


@dataclass(frozen=True)
class ReadNoise:
    """Loss rises under read noise. Non-finite values are the loss's own and stay."""

    space: str
    split: str
    kind: Kind  # what the noise was on; "merged" where "base" was asked for and there are no LoRA factors
    seed: int  # of the noise
    base_loss: float  # L(W)
    sigmas: tuple[float, ...]  # (R,)
    rises: npt.NDArray[np.float64]  # (R, directions): L(perturbed) − L(W)
    scores: Mapping[str, npt.NDArray[np.float64]]  # accuracy, matthews where defined → (R, directions)
    induced_norms: npt.NDArray[np.float64]  # (R, directions): realised ‖eps_W‖

    @property
    def mean(self) -> npt.NDArray[np.float64]:
        """Mean rise over directions, (R,)."""
        return self.rises.mean(axis=1)

    @property
    def standard_error(self) -> npt.NDArray[np.float64]:
        """Standard error of the mean over directions, (R,); NaN with one direction or a non-finite rise."""
        return standard_errors(self.rises)

    def rows(self) -> list[dict[str, Any]]:
        """``loss_rise`` of every sigma and direction; ``loss_rise_mean`` and mean ``accuracy``, ``matthews`` by sigma.

        ``radius`` is sigma.
        """
        rows = []
        means, errors, norms = self.mean, self.standard_error, self.induced_norms.mean(axis=1)
        for i, sigma in enumerate(self.sigmas):
            where: dict[str, Any] = {"space": self.space, "split": self.split, "kind": self.kind, "radius": sigma}
            where["direction_seed"] = self.seed
            for j, (rise, induced) in enumerate(zip(self.rises[i], self.induced_norms[i], strict=True)):
                rows.append(row("read_noise", "loss_rise", float(rise), index=j, induced_norm=float(induced), **where))
            where["induced_norm"] = float(norms[i])
            rows.append(row("read_noise", "loss_rise_mean", float(means[i]), standard_error=float(errors[i]), **where))
            for name, values in self.scores.items():
                spread = float(standard_errors(values[i : i + 1])[0])
                rows.append(row("read_noise", name, float(values[i].mean()), standard_error=spread, **where))
        return rows


def read_noise(
    objective: Objective,
    space: WeightSpace,
    sigmas: Sequence[float],
    *,
    kind: Kind = "base",
    directions: int = 10,
    seed: int = 0,
    watch: Watch | None = None,
) -> ReadNoise:
    """Loss and accuracy under multiplicative noise on the base weights, or on all of W.

    Args:
        objective: the data side, the same for every compared model.
        space: the full space, or any set of parameters of a model; its weights are bit-identical afterwards.
        sigmas: standard deviations of the noise relative to each weight.
        kind: ``"base"`` or ``"merged"``; without LoRA factors the noise is on W and the result says ``"merged"``.
        directions: independent draws; each is used at every sigma.
        seed: names the draws.
        watch: called with (losses evaluated, losses in all).

    Ranks share the draws, as :func:`~analysis.sharpness.random.random_sharpness` does.

    Raises:
        UserError: a setting is out of bounds, or the parameters of the space are LoRA factors.
    """
    settings = ReadNoiseSettings.checked(sigmas=tuple(sigmas), kind=kind, directions=directions, seed=seed)
    if space.factored:
        raise UserError("read noise is on stored weights, not on LoRA factors: measure it in full space")
    bases = base_weights(space) if settings.kind == "base" else None
    shape = (len(settings.sigmas), settings.directions)
    losses, norms = np.empty(shape), np.empty(shape)
    progress = Progress(watch, losses.size + 1)

    def along(number: int) -> list[tuple[dict[str, float], float]]:
        """Metrics and realised ‖eps_W‖ at every sigma."""
        direction, found = _noise(space, bases, settings.seed, number), []
        for sigma in settings.sigmas:
            with space.perturbed(direction, sigma):
                metrics = objective.evaluate(space)
            found.append((metrics, space.induced_norm(direction, sigma)))
            progress.step()
        return found

    (exact,) = shared([space], objective.evaluate)
    progress.reached(1)
    scores = {name: np.empty(shape) for name in exact if name != "loss"}
    for j, found in enumerate(shared(range(settings.directions), along)):
        for i, (metrics, length) in enumerate(found):
            losses[i, j], norms[i, j] = metrics["loss"], length
            for name, values in scores.items():
                values[i, j] = metrics[name]
        progress.reached(1 + (j + 1) * len(settings.sigmas))
    return ReadNoise(
        space=space.name,
        split=objective.name,
        kind="merged" if bases is None else "base",
        seed=settings.seed,
        base_loss=exact["loss"],
        sigmas=settings.sigmas,
        rises=losses - exact["loss"],
        scores=scores,
        induced_norms=norms,
    )


def _noise(space: WeightSpace, bases: Vector | None, seed: int, index: int) -> Vector:
    """The perturbation at sigma = 1: u∘W0, or u∘W without ``bases``."""
    noise = gaussian(space, seed, index)
    for name, values in noise.items():
        values *= space.parameters[name].detach() if bases is None else bases[name]
    return noise


def _run(
    objective: Objective,
    space: WeightSpace,
    settings: ReadNoiseSettings,
    trained: Trained | None,
    watch: Watch | None = None,
) -> ReadNoise:
    return read_noise(objective, space, **settings.model_dump(), watch=watch)


MEASURE = Measure(
    name="read_noise",
    summary="mean loss rise and accuracy under multiplicative noise on the base weights",
    spaces=("full",),
    settings=ReadNoiseSettings,
    run=_run,
)
