"""Loss along filter-normalised random lines (Li et al. 2018).

    L(W + t·d),   −extent ≤ t ≤ extent,     ‖d_i,:‖ = ‖W_i,:‖ for every row i, 1-D parameters zero

A random Gaussian d is scaled row by row, so that t is relative to the size of each filter. In the full space the rows
are those of the merged weights; in the LoRA space those of A and of B, which depends on the gauge.
"""

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, Field, model_validator

from analysis.core.directions import filter_normalized, gaussian
from analysis.core.measure import Measure, Watch
from analysis.core.objective import Objective
from analysis.core.result import row
from analysis.core.space import WeightSpace
from analysis.core.trained import Trained
from analysis.core.vectors import Vector
from analysis.landscape.points import Points, Precision
from analysis.landscape.rounding import PRECISION_ERROR, Check, checked_points
from analysis.landscape.store import Key, PointStore
from analysis.landscape.window import extent_for
from analysis.settings import MeasureSettings, Radius

CENTRE: Key = (-1.0, 0.0)
"""The weights themselves, a point of every line."""


def odd(points: int) -> int:
    if points % 2 == 0:
        raise ValueError("an odd number is needed, so that the centre is a point")
    return points


class LandscapeSettings(MeasureSettings):
    """Settings of :func:`loss_lines`, described there."""

    extent: Radius | None = Field(default=None, description="largest coordinate; by default 1")
    target_rise: Radius | None = Field(default=None, description="choose extent by the loss rise at its ends")
    points: Annotated[int, Field(ge=3), AfterValidator(odd)] = 21
    directions: int = Field(default=5, ge=1)
    seed: int = 0
    precision: Precision = Field(default="full", description="full or bfloat16")
    workers: int = Field(default=1, ge=1, description="processes")

    @model_validator(mode="after")
    def _one_window(self) -> "LandscapeSettings":
        if self.extent is not None and self.target_rise is not None:
            raise ValueError("extent and target_rise exclude each other: give one of them")
        return self


@dataclass(frozen=True)
class LossLines:
    """Losses on lines through the weights. Non-finite losses stay."""

    space: str
    split: str
    coordinates: npt.NDArray[np.float64]  # (points,): symmetric, exactly 0 in the middle
    losses: npt.NDArray[np.float64]  # (directions, points); the middle column is the unperturbed loss
    induced_norms: npt.NDArray[np.float64]  # (directions, points): realised ‖eps_W‖
    seed: int  # of the directions
    check: Check | None = None  # how far bfloat16 is off; None in full precision

    def rows(self) -> list[dict[str, Any]]:
        """``loss`` of every direction (index) and coordinate (radius, signed); what bfloat16 costs, if it ran so."""
        where = {"space": self.space, "split": self.split, "kind": "filter", "direction_seed": self.seed}
        rows = [
            row("landscape", "loss", float(loss), index=i, radius=float(t), induced_norm=float(induced), **where)
            for i, (line, norms) in enumerate(zip(self.losses, self.induced_norms, strict=True))
            for t, loss, induced in zip(self.coordinates, line, norms, strict=True)
        ]
        if self.check is not None:
            rows.append(row("landscape", "precision_error", self.check.error, **where))
            rows.append(row("landscape", "precision_seen", self.check.seen, **where))
            rows.append(row("landscape", "precision_checked", len(self.check.keys), **where))
        return rows


class Line:
    """Where the point t of line number i is: the key (i, t)."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._last: tuple[int, Vector] | None = None

    @property
    def identity(self) -> str:
        """Names the directions, whose rows are those of the space."""
        return f"filter-normalised lines of seed {self.seed}"

    def direction(self, space: WeightSpace, number: int) -> Vector:
        """Line ``number``'s; the last one is kept, since drawing one costs as much as a loss."""
        if self._last is None or self._last[0] != number:
            self._last = number, filter_normalized(space, gaussian(space, self.seed, number))
        return self._last[1]

    def __call__(self, space: WeightSpace, key: Key) -> tuple[Vector, float] | None:
        """None for the space's own weights."""
        return None if key == CENTRE else (self.direction(space, int(key[0])), key[1])

    def __getstate__(self) -> dict[str, Any]:
        return {"seed": self.seed, "_last": None}


def line_coordinates(extent: float, points: int) -> npt.NDArray[np.float64]:
    """``points`` equidistant values from −extent to extent, exactly symmetric, exactly 0 in the middle."""
    half = points // 2
    positive = extent * np.arange(1, half + 1) / half
    return np.concatenate([-positive[::-1], [0.0], positive])


def loss_lines(
    objective: Objective,
    space: WeightSpace,
    *,
    extent: float | None = None,
    target_rise: float | None = None,
    points: int = 21,
    directions: int = 5,
    seed: int = 0,
    precision: Precision = "full",
    workers: int = 1,
    store: PointStore | None = None,
    watch: Watch | None = None,
) -> LossLines:
    """The loss along random filter-normalised directions.

    Five directions show shapes; the loss rise varies by its own size between directions, so claims about a mean need
    the band and many more.

    Args:
        objective: the data side, the same for every compared model.
        space: the model side; its weights are bit-identical afterwards.
        extent: largest coordinate; 1, the default, moves every filter by its own norm.
        target_rise: choose the extent instead, for this space alone, by the median loss rise at all ends
            (:func:`analysis.landscape.window.extent_for`).
        points: points on a line, odd.
        directions: number of lines, named by ``seed`` and number: the same for every adapter of one base model.
        precision: as :func:`analysis.landscape.surface.loss_surface`.
        workers: processes; the result does not depend on it.
        store: keeps points as they come, so that a killed run continues.
        watch: called with (losses evaluated, losses in all). The centre is evaluated once for all lines.

    Raises:
        UserError: a setting is out of bounds, both extent and target_rise are given, or the rise is not reached.
    """
    settings = LandscapeSettings.checked(
        extent=extent,
        target_rise=target_rise,
        points=points,
        directions=directions,
        seed=seed,
        precision=precision,
        workers=workers,
    )
    line = Line(settings.seed)
    with Points(objective, space, line, workers=settings.workers, store=store, watch=watch) as at:
        at.most = settings.directions * (settings.points - 1) + 1
        base = at([CENTRE])[0]["loss"]
        reach = _extent(at, settings)
        coordinates = line_coordinates(reach, settings.points)
        losses, check = _losses(at, settings, coordinates, base)
    norms = np.array(
        [
            [space.induced_norm(line.direction(space, i), float(t)) if t else 0.0 for t in coordinates]
            for i in range(settings.directions)
        ]
    )
    return LossLines(space.name, objective.name, coordinates, losses, norms, settings.seed, check)


def _extent(at: Points, settings: LandscapeSettings) -> float:
    if settings.target_rise is None:
        return settings.extent or 1.0

    def ends(extent: float) -> list[Key]:
        return [(float(i), sign * extent) for i in range(settings.directions) for sign in (1, -1)]

    return extent_for(at, CENTRE, ends, settings.target_rise, settings.precision)


def _losses(
    at: Points, settings: LandscapeSettings, coordinates: npt.NDArray[np.float64], base: float
) -> tuple[npt.NDArray[np.float64], Check | None]:
    """(directions, points), and how far bfloat16 is off; all in full precision where that is too far."""
    losses = np.full((settings.directions, settings.points), base)
    keys = [(float(i), float(t)) for i in range(settings.directions) for t in coordinates if t]
    moved = np.broadcast_to(coordinates != 0, losses.shape)
    if settings.precision == "bfloat16":
        offset = at([CENTRE], "bfloat16")[0]["loss"] - base
        losses[moved] = [metrics["loss"] - offset for metrics in at(keys, "bfloat16")]
        places = np.array(keys) / [max(settings.directions - 1, 1), coordinates[-1]]
        finite = losses[np.isfinite(losses)]
        check = checked_points(at, keys, losses[moved], places, _bends(losses)[moved], float(np.ptp(finite)))
        if check.error <= PRECISION_ERROR:
            return losses, check
    losses[moved] = [metrics["loss"] for metrics in at(keys)]
    return losses, None


def _bends(losses: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """|Second differences| along lines, zero at ends and where a loss is not finite."""
    bends = np.zeros_like(losses)
    with np.errstate(invalid="ignore"):
        bends[:, 1:-1] = np.abs(np.diff(losses, 2, axis=1))
    return np.where(np.isfinite(bends), bends, 0.0)


def _run(
    objective: Objective,
    space: WeightSpace,
    settings: LandscapeSettings,
    trained: Trained | None,
    watch: Watch | None = None,
    store: PointStore | None = None,
) -> LossLines:
    return loss_lines(objective, space, **settings.model_dump(), store=store, watch=watch)


MEASURE = Measure(
    name="landscape",
    summary="loss along filter-normalised random lines through the weights",
    spaces=("full", "lora"),
    settings=LandscapeSettings,
    run=_run,
    keeps_points=True,
)
