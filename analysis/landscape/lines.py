"""Loss along filter-normalised random lines (Li et al. 2018).

    L(W + t·d),   −extent ≤ t ≤ extent,     ‖d_i,:‖ = ‖W_i,:‖ for every row i, 1-D parameters zero

A random Gaussian d is scaled row by row, so that t is relative to the size of each filter. In the full space the rows
are those of the merged weights; in the LoRA space those of A and of B, which depends on the gauge.
"""

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, Field

from analysis.core.directions import filter_normalized, gaussian
from analysis.core.measure import Measure, Watch
from analysis.core.objective import Objective
from analysis.core.result import row
from analysis.core.space import WeightSpace
from analysis.core.trained import Trained
from analysis.settings import MeasureSettings, Radius


def odd(points: int) -> int:
    if points % 2 == 0:
        raise ValueError("an odd number is needed, so that the centre is a point")
    return points


class LandscapeSettings(MeasureSettings):
    """Settings of :func:`loss_lines`, described there."""

    extent: Radius = 1.0
    points: Annotated[int, Field(ge=3), AfterValidator(odd)] = 21
    directions: int = Field(default=5, ge=1)
    seed: int = 0


@dataclass(frozen=True)
class LossLines:
    """Losses on lines through the weights. Non-finite losses stay."""

    space: str
    split: str
    coordinates: npt.NDArray[np.float64]  # (points,): symmetric, exactly 0 in the middle
    losses: npt.NDArray[np.float64]  # (directions, points); the middle column is the unperturbed loss
    induced_norms: npt.NDArray[np.float64]  # (directions, points): realised ‖eps_W‖

    def rows(self) -> list[dict[str, Any]]:
        """``loss`` of every direction (index) and coordinate (radius, signed)."""
        where = {"space": self.space, "split": self.split, "kind": "filter"}
        return [
            row("landscape", "loss", float(loss), index=i, radius=float(t), induced_norm=float(induced), **where)
            for i, (line, norms) in enumerate(zip(self.losses, self.induced_norms, strict=True))
            for t, loss, induced in zip(self.coordinates, line, norms, strict=True)
        ]


def line_coordinates(extent: float, points: int) -> npt.NDArray[np.float64]:
    """``points`` equidistant values from −extent to extent, exactly symmetric, exactly 0 in the middle."""
    half = points // 2
    positive = extent * np.arange(1, half + 1) / half
    return np.concatenate([-positive[::-1], [0.0], positive])


def loss_lines(
    objective: Objective,
    space: WeightSpace,
    *,
    extent: float = 1.0,
    points: int = 21,
    directions: int = 5,
    seed: int = 0,
    watch: Watch | None = None,
) -> LossLines:
    """The loss along random filter-normalised directions.

    Five directions show shapes; the loss rise varies by its own size between directions, so claims about a mean need
    the band and many more.

    Args:
        objective: the data side, the same for every compared model.
        space: the model side; its weights are bit-identical afterwards.
        extent: largest coordinate; 1 moves every filter by its own norm.
        points: points on a line, odd.
        directions: number of lines, named by ``seed`` and number: the same for every adapter of one base model.
        watch: called with (losses evaluated, losses in all). The centre is evaluated once for all lines.

    Raises:
        UserError: a setting is out of bounds.
    """
    settings = LandscapeSettings.checked(extent=extent, points=points, directions=directions, seed=seed)
    coordinates = line_coordinates(settings.extent, settings.points)
    shape = (settings.directions, settings.points)
    losses = np.full(shape, objective.loss(space))
    norms = np.zeros(shape)
    total = settings.directions * (settings.points - 1) + 1

    def report(done: int) -> None:
        if watch is not None:
            watch(done, total, "losses")

    report(1)
    done = 1
    for i in range(settings.directions):
        direction = filter_normalized(space, gaussian(space, settings.seed, i))
        for j in np.flatnonzero(coordinates):
            t = float(coordinates[j])
            with space.perturbed(direction, t):
                losses[i, j] = objective.loss(space)
            norms[i, j] = space.induced_norm(direction, t)
            done += 1
            report(done)
    return LossLines(space.name, objective.name, coordinates, losses, norms)


def _run(
    objective: Objective,
    space: WeightSpace,
    settings: LandscapeSettings,
    trained: Trained | None,
    watch: Watch | None = None,
) -> LossLines:
    return loss_lines(objective, space, **settings.model_dump(), watch=watch)


MEASURE = Measure(
    name="landscape",
    summary="loss along filter-normalised random lines through the weights",
    spaces=("full", "lora"),
    settings=LandscapeSettings,
    run=_run,
)
