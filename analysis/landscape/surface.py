"""The loss on a plane through weight space.

    L(W + o + x·u + y·v),   xmin ≤ x ≤ xmax,  ymin ≤ y ≤ ymax

with the axes u, v of a :class:`~analysis.landscape.plane.Plane`: two filter-normalised random directions (Li et al.
2018), two Hessian eigenvectors, differences of adapters, or principal components of a training trajectory. Always on
all examples of the objective.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, Field

from analysis.core.measure import Measure, Watch
from analysis.core.objective import Objective
from analysis.core.result import row
from analysis.core.space import WeightSpace
from analysis.core.trained import Trained
from analysis.core.vectors import Vector, norm
from analysis.landscape.adaptive import Node, adaptive_grid
from analysis.landscape.eigen_plane import measured_eigen_plane
from analysis.landscape.lines import odd
from analysis.landscape.plane import Plane
from analysis.landscape.points import Points, Precision
from analysis.landscape.random_plane import random_plane
from analysis.landscape.store import Key, PointStore
from analysis.settings import MeasureSettings, Radius

Array = npt.NDArray[np.float64]

LADDER = tuple(m * 10.0**e for e in range(-3, 3) for m in (1, 2, 5))
"""Half widths to choose from: round numbers, so that compared methods mostly get the same."""
PRECISION_ERROR = 0.02
"""Of the range: a bfloat16 surface that is farther off is computed again in full precision."""


class SurfaceSettings(MeasureSettings):
    """Settings of the measure ``surface``; the last ones are those of :func:`loss_surface`."""

    plane: Literal["filter", "eigenvectors"] = Field(default="filter", description="filter or eigenvectors")
    seed: int = Field(default=0, description="of the directions, or of the eigenvalue iteration")
    extent: Radius | None = Field(default=None, description="largest coordinate; by default chosen by target_rise")
    target_rise: float = Field(default=1.0, gt=0, allow_inf_nan=False, description="loss rise at the window's edge")
    points: Annotated[int, Field(ge=5), AfterValidator(odd)] = Field(default=21, description="points a side, odd")
    error: float | None = Field(default=0.02, gt=0, lt=1, description="of interpolated values, over the range")
    precision: Precision = Field(default="full", description="full or bfloat16")
    workers: int = Field(default=1, ge=1, description="processes")


@dataclass(frozen=True, eq=False)
class LossSurface:
    """Losses on a grid in a plane. Non-finite losses stay."""

    space: str
    split: str
    plane: Plane
    base: Mapping[str, float]  # loss, accuracy at the centre: x = y = 0
    x: Array  # (columns,)
    y: Array  # (rows,)
    losses: Array  # (rows, columns); the loss at the centre is exactly the one of ``base``
    accuracies: Array  # (rows, columns), NaN where not evaluated or not defined
    evaluated: npt.NDArray[np.bool_]  # (rows, columns); the others are interpolated
    error: float  # estimated largest error of an interpolated loss, over the range of losses; 0 where there is none
    precision: Precision
    precision_error: float  # largest difference to full precision at the points checked, over the range
    precision_cosine: float  # smallest cosine of a realised with its asked perturbation; 1 in full precision

    def rows(self) -> list[dict[str, Any]]:
        """``loss`` and ``accuracy`` of every point, marked points, and what the surface is worth."""
        where: dict[str, Any] = {"space": self.space, "split": self.split, "kind": self.plane.kind}
        rows = []
        span = _span(self.losses)
        for number, (i, j) in enumerate(np.ndindex(self.losses.shape)):
            at = {"radius": float(self.x[j]), "y": float(self.y[i]), "index": number, **where}
            error = np.nan if self.evaluated[i, j] else self.error * span
            rows.append(row("surface", "loss", float(self.losses[i, j]), residual=error, **at))
            if not np.isnan(self.accuracies[i, j]):
                rows.append(row("surface", "accuracy", float(self.accuracies[i, j]), **at))
        for number, mark in enumerate(self.plane.marks):
            place = {"radius": mark.x, "y": mark.y, "index": number, "residual": mark.off_plane}
            rows.append(row("surface", "mark", mark.loss, label=mark.label, **place, **where))
        for number, (label, axis) in enumerate(zip(self.plane.axis_labels, self.plane.axes, strict=True), start=1):
            rows.append(row("surface", "axis", norm(axis), label=label, index=number, **where))
        for number, share in enumerate(self.plane.explained or (), start=1):
            rows.append(row("surface", "explained_variance", share, index=number, **where))
        worth = {
            "cosine": self.plane.cosine,
            "evaluated": self.evaluated.sum(),
            "interpolation_error": self.error,
            "precision_error": self.precision_error,
            "precision_cosine": self.precision_cosine,
        }
        return rows + [row("surface", name, value, **where) for name, value in worth.items()]


@dataclass(frozen=True, eq=False)
class InPlane:
    """Where the point (x, y) of a plane is."""

    plane: Plane

    @property
    def identity(self) -> str:
        """Digest of origin and axes."""
        digest = hashlib.sha256()
        for vector in (self.plane.origin or {}, *self.plane.axes):
            for name, tensor in vector.items():
                digest.update(f"{name} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def __call__(self, space: WeightSpace, key: Key) -> tuple[Vector, float] | None:
        """None for the space's own weights."""
        if key == (0.0, 0.0) and self.plane.origin is None:
            return None
        return self.plane.at(*key), 1.0


def loss_surface(
    objective: Objective,
    space: WeightSpace,
    plane: Plane,
    *,
    points: int = 21,
    extent: float | None = None,
    target_rise: float | None = None,
    error: float | None = 0.02,
    precision: Precision = "full",
    workers: int = 1,
    store: PointStore | None = None,
    watch: Watch | None = None,
) -> LossSurface:
    """The loss on a grid in a plane.

    Args:
        objective: the data side, the same for every compared model.
        space: the model side; its weights are bit-identical afterwards.
        plane: the axes, from :func:`random_plane`, :func:`eigen_plane`, :func:`adapter_plane` or
            :func:`trajectory_plane`.
        points: points along each side, at least 5 and odd, so that the middle of the window is one.
        extent: largest |x| and |y|. Default: the plane's own window.
        target_rise: choose the extent instead, as the smallest of 1, 2, 5 · 10ⁿ at which the median loss rise at the
            four ends of the axes reaches this; a loss that is not finite counts as too much.
        error: evaluate only as many points as are needed to interpolate the others to within this share of the
            range of losses, by :mod:`analysis.landscape.adaptive`'s estimate; None: evaluate every point. Also where
            the error is not met.
        precision: ``"bfloat16"``: run the model in bfloat16, from perturbed weights in full precision. The
            difference to full precision at the centre is taken away everywhere, and that at two corners and two
            points half-way is reported; where it is above 2 % of the range, all is done again in full precision.
        workers: processes; the result does not depend on it.
        store: keeps points as they come, so that a killed run continues.
        watch: told of points done.

    Raises:
        UserError: a setting is out of bounds.
    """
    settings = SurfaceSettings.checked(
        points=points, extent=extent, target_rise=target_rise or 1.0, error=error, precision=precision, workers=workers
    )
    with Points(objective, space, InPlane(plane), workers=settings.workers, store=store, watch=watch) as at:
        at.most = settings.points**2
        (base,) = at([(0.0, 0.0)])
        if target_rise is not None:
            extent = _extent_for(at, base["loss"], target_rise, settings.precision)
        window = plane.window if extent is None else (-extent, extent, -extent, extent)
        surface = _on_grid(at, space, objective.name, plane, base, window, settings)
        if surface.precision_error > PRECISION_ERROR:
            surface = _on_grid(at, space, objective.name, plane, base, window, replace_precision(settings))
    return surface


def replace_precision(settings: SurfaceSettings) -> SurfaceSettings:
    """The same settings in full precision."""
    return settings.model_copy(update={"precision": "full"})


def _on_grid(
    at: Points,
    space: WeightSpace,
    split: str,
    plane: Plane,
    base: dict[str, float],
    window: tuple[float, float, float, float],
    settings: SurfaceSettings,
) -> LossSurface:
    x, y = _coordinates(window[0], window[1], settings.points), _coordinates(window[2], window[3], settings.points)
    shape = (len(y), len(x))
    accuracies = np.full(shape, np.nan)
    offset = 0.0
    if settings.precision == "bfloat16":
        offset = at([(0.0, 0.0)], "bfloat16")[0]["loss"] - base["loss"]

    def evaluate(nodes: Sequence[Node]) -> list[float]:
        found = at([(float(x[j]), float(y[i])) for i, j in nodes], settings.precision)
        for node, metrics in zip(nodes, found, strict=True):
            accuracies[node] = metrics.get("accuracy", np.nan)
        return [
            base["loss"] if x[j] == y[i] == 0 else metrics["loss"] - offset
            for (i, j), metrics in zip(nodes, found, strict=True)
        ]

    if settings.error is None:
        values = np.array(evaluate([*np.ndindex(shape)])).reshape(shape)
        evaluated, seen = np.ones(shape, dtype=bool), 0.0
    else:
        grid = adaptive_grid(evaluate, *shape, settings.error)
        values, evaluated, seen = grid.values, grid.evaluated, grid.error
    surface = LossSurface(
        space.name, split, plane, base, x, y, values, accuracies, evaluated, seen, settings.precision, 0.0, 1.0
    )
    return surface if settings.precision == "full" else _checked(at, surface, evaluate)


def _checked(at: Points, surface: LossSurface, evaluate: Any) -> LossSurface:
    """With the errors of bfloat16, measured at two corners and at two points half-way to the others."""
    rows, columns = surface.losses.shape
    nodes = [(0, 0), (rows - 1, columns - 1), (rows // 4, 3 * columns // 4), (3 * rows // 4, columns // 4)]
    keys = [(float(surface.x[j]), float(surface.y[i])) for i, j in nodes]
    exact = np.array([metrics["loss"] for metrics in at(keys)])
    with np.errstate(invalid="ignore"):
        differences = np.abs(np.array(evaluate(nodes)) - exact) / max(_span(surface.losses), 1e-300)
    agree = ~np.isfinite(exact) & ~np.isfinite(differences)  # not finite in both
    worst = float(np.where(agree, 0.0, differences).max())
    cosine = min(at.cosine(key) for key in keys[2:])
    return replace(surface, precision_error=worst if np.isfinite(worst) else np.inf, precision_cosine=cosine)


def _extent_for(at: Points, base: float, target: float, precision: Precision) -> float:
    """Bisection over :data:`LADDER`."""
    low, high = 0, len(LADDER) - 1
    while low < high:
        middle = (low + high) // 2
        r = LADDER[middle]
        losses = [metrics["loss"] for metrics in at([(r, 0.0), (-r, 0.0), (0.0, r), (0.0, -r)], precision)]
        rises = [loss - base if np.isfinite(loss) else np.inf for loss in losses]
        if np.median(rises) >= target:
            high = middle
        else:
            low = middle + 1
    return LADDER[low]


def _coordinates(low: float, high: float, points: int) -> Array:
    """Equidistant; exactly symmetric with an exact 0 where the window is."""
    if low == -high:
        half = points // 2
        positive = high * np.arange(1, half + 1) / half
        return np.concatenate([-positive[::-1], [0.0], positive])
    return np.linspace(low, high, points)


def _span(losses: Array) -> float:
    finite = losses[np.isfinite(losses)]
    return float(np.ptp(finite)) if len(finite) else 0.0


def _run(
    objective: Objective,
    space: WeightSpace,
    settings: SurfaceSettings,
    trained: Trained | None,
    watch: Watch | None = None,
    store: PointStore | None = None,
) -> LossSurface:
    if settings.plane == "filter":
        plane = random_plane(space, seed=settings.seed)
    else:
        plane = measured_eigen_plane(objective, space, seed=settings.seed, max_products=300, watch=watch)
    common = settings.model_dump(include={"points", "extent", "error", "precision", "workers"})
    rise = settings.target_rise if settings.extent is None else None
    return loss_surface(objective, space, plane, target_rise=rise, store=store, watch=watch, **common)


MEASURE = Measure(
    name="surface",
    summary="loss on a plane of random filter-normalised directions, or of Hessian eigenvectors",
    spaces=("full", "lora"),
    settings=SurfaceSettings,
    run=_run,
    keeps_points=True,
)
