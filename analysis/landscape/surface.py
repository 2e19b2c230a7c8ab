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
from pydantic import AfterValidator, Field, model_validator

from analysis.core.measure import Measure, Watch
from analysis.core.objective import Objective
from analysis.core.result import row
from analysis.core.space import WeightSpace
from analysis.core.trained import Trained
from analysis.core.vectors import Vector, dot, norm
from analysis.landscape.adaptive import Node, adaptive_grid
from analysis.landscape.eigen_plane import measured_eigen_plane
from analysis.landscape.lines import odd
from analysis.landscape.plane import Plane, cosine
from analysis.landscape.points import Points, Precision
from analysis.landscape.random_plane import random_plane
from analysis.landscape.rounding import factor, nodes_to_check
from analysis.landscape.store import Key, PointStore
from analysis.settings import MeasureSettings, Radius
from bilora.errors import UserError

Array = npt.NDArray[np.float64]

LADDER = tuple(m * 10.0**e for e in range(-3, 3) for m in (1, 2, 5))
"""Half widths to choose from: round numbers, so that compared methods mostly get the same."""
PRECISION_ERROR = 0.02
"""Of the range: a bfloat16 surface that may be farther off is computed again in full precision."""
PARALLEL = 1e-6
"""Axes whose |cosine| is this close to 1 are refused: to rounding they are one."""


class SurfaceSettings(MeasureSettings):
    """Settings of the measure ``surface``; the last ones are those of :func:`loss_surface`."""

    plane: Literal["filter", "eigenvectors"] = Field(default="filter", description="filter or eigenvectors")
    seed: int = Field(default=0, description="of the directions, or of the eigenvalue iteration")
    extent: Radius | None = Field(default=None, description="largest coordinate; by default the plane's own")
    target_rise: Radius | None = Field(default=None, description="choose extent by the loss rise at its ends")
    points: Annotated[int, Field(ge=5), AfterValidator(odd)] = Field(default=21, description="points a side, odd")
    error: float | None = Field(default=0.02, gt=0, lt=1, description="of interpolated values, over the range")
    precision: Precision = Field(default="full", description="full or bfloat16")
    workers: int = Field(default=1, ge=1, description="processes")

    @model_validator(mode="after")
    def _one_window(self) -> "SurfaceSettings":
        if self.extent is not None and self.target_rise is not None:
            raise ValueError("extent and target_rise exclude each other: give one of them")
        return self


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
    precision_error: float  # what bfloat16 is off by at most in 95 % of surfaces, over the range; 0 in full precision
    precision_seen: float  # largest difference to full precision at the points checked, over the range
    precision_checked: int  # how many these are
    precision_cosine: float  # smallest cosine of a realised with its asked perturbation; 1 in full precision
    induced_norms: Array  # (rows, columns): realised ‖eps_W‖

    def rows(self) -> list[dict[str, Any]]:
        """``loss`` and ``accuracy`` of every point, marked points, and what the surface is worth."""
        where: dict[str, Any] = {"space": self.space, "split": self.split, "kind": self.plane.kind}
        rows = []
        span = _span(self.losses)
        for number, (i, j) in enumerate(np.ndindex(self.losses.shape)):
            at = {"radius": float(self.x[j]), "y": float(self.y[i]), "index": number, **where}
            at["induced_norm"] = float(self.induced_norms[i, j])
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
            "precision_seen": self.precision_seen,
            "precision_checked": self.precision_checked,
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
        extent: largest |x| and |y|. Default: the plane's own window. One for several spaces: :func:`common_extent`.
        target_rise: choose the extent instead, for this space alone, as :func:`common_extent` does.
        error: evaluate only as many points as are needed to interpolate the others to within this share of the
            range of losses, by :mod:`analysis.landscape.adaptive`'s estimate; None: evaluate every point. Also where
            the error is not met.
        precision: ``"bfloat16"``: run the model in bfloat16, from perturbed weights in full precision. The
            difference to full precision at the centre is taken away everywhere; at one point of twenty, and eight at
            least, it is evaluated, and what it is at most everywhere concluded (:mod:`analysis.landscape.rounding`).
            Where that is above 2 % of the range, all is done again in full precision.
        workers: processes; the result does not depend on it.
        store: keeps points as they come, so that a killed run continues.
        watch: told of points done.

    Raises:
        UserError: a setting is out of bounds, both extent and target_rise are given, the rise is not reached, or the
            axes are zero, parallel or not of this space.
    """
    settings = SurfaceSettings.checked(
        points=points, extent=extent, target_rise=target_rise, error=error, precision=precision, workers=workers
    )
    _check_plane(space, plane)
    with Points(objective, space, InPlane(plane), workers=settings.workers, store=store, watch=watch) as at:
        at.most = settings.points**2
        (base,) = at([(0.0, 0.0)])
        if target_rise is not None:
            extent = _extent_for(at, target_rise, settings.precision)
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
        space=space.name,
        split=split,
        plane=plane,
        base=base,
        x=x,
        y=y,
        losses=values,
        accuracies=accuracies,
        evaluated=evaluated,
        error=seen,
        precision=settings.precision,
        precision_error=0.0,
        precision_seen=0.0,
        precision_checked=0,
        precision_cosine=1.0,
        induced_norms=_induced_norms(space, plane, x, y),
    )
    return surface if settings.precision == "full" else _checked(at, surface)


def _checked(at: Points, surface: LossSurface) -> LossSurface:
    """With the errors of bfloat16 at some points, and what follows for all."""
    centre = (len(surface.y) // 2, len(surface.x) // 2)
    # The centre's loss is exact: it says nothing of the others.
    known = [(int(i), int(j)) for i, j in np.argwhere(surface.evaluated) if surface.x[j] or surface.y[i]]
    losses = [float(surface.losses[node]) for node in known]
    nodes = nodes_to_check(known, losses, *surface.losses.shape)
    keys = [(float(surface.x[j]), float(surface.y[i])) for i, j in nodes]
    exact = np.array([metrics["loss"] for metrics in at(keys)])
    with np.errstate(invalid="ignore"):
        found = np.array([surface.losses[node] for node in nodes])
        differences = np.abs(found - exact) / max(_span(surface.losses), 1e-300)
    agree = ~np.isfinite(exact) & ~np.isfinite(found)  # not finite in both
    seen = float(np.where(agree, 0.0, differences).max())
    seen = seen if np.isfinite(seen) else np.inf
    nearest = (
        float(surface.x[centre[1] + 1]),
        float(surface.y[centre[0]]),
    )  # the smallest step, of which least is left
    return replace(
        surface,
        precision_error=seen * factor(len(nodes), len(known)),
        precision_seen=seen,
        precision_checked=len(nodes),
        precision_cosine=min(at.cosine(key) for key in [nearest, *keys[:2]]),
    )


def _check_plane(space: WeightSpace, plane: Plane) -> None:
    for label, axis in zip(plane.axis_labels, plane.axes, strict=True):
        if axis.keys() != space.parameters.keys():
            raise UserError(
                f"the plane's axis {label!r} is none of the {space.name} space: make the plane in this space"
            )
        if not norm(axis):
            raise UserError(f"the plane's axis {label!r} is zero: a plane needs two directions")
    if abs(cosine(*plane.axes)) > 1 - PARALLEL:
        raise UserError("the plane's axes are parallel: take two directions that differ, or measure along a line")


def common_extent(
    objective: Objective,
    spaces: Sequence[WeightSpace],
    planes: Sequence[Plane],
    target_rise: float = 1.0,
    *,
    precision: Precision = "full",
    workers: int = 1,
) -> float:
    """One extent for the surfaces of several spaces, which are then drawn on the same axes.

    The extent of one space is that of :data:`LADDER`'s 1, 2, 5 · 10ⁿ at which the median loss rise at the four ends of
    the axes reaches ``target_rise``, and does not at the one before; a loss that is not finite counts as too much. It
    is found by bisection: where the rise does not grow with the extent there may be a smaller one. The common one is
    the largest.

    Args:
        objective: the data side.
        spaces: those compared; their weights are bit-identical afterwards.
        planes: one for each.
        target_rise: above the loss of each space's plane at x = y = 0.
        precision, workers: as :func:`loss_surface`.

    Raises:
        UserError: a setting is out of bounds, numbers of spaces and planes differ, or a rise is not reached at the
            largest extent of the ladder.
    """
    settings = SurfaceSettings.checked(target_rise=target_rise, precision=precision, workers=workers)
    if not spaces or len(spaces) != len(planes):
        raise UserError(f"{len(planes)} planes do not fit {len(spaces)} spaces: give one for each")
    extents = []
    for space, plane in zip(spaces, planes, strict=True):
        _check_plane(space, plane)
        with Points(objective, space, InPlane(plane), workers=settings.workers) as at:
            extents.append(_extent_for(at, target_rise, settings.precision))
    return max(extents)


def _extent_for(at: Points, target: float, precision: Precision) -> float:
    """Bisection over :data:`LADDER`, all of it in one precision."""
    base = at([(0.0, 0.0)], precision)[0]["loss"]

    def rise(r: float) -> float:
        losses = [metrics["loss"] for metrics in at([(r, 0.0), (-r, 0.0), (0.0, r), (0.0, -r)], precision)]
        return float(np.median([loss - base if np.isfinite(loss) else np.inf for loss in losses]))

    low, high = 0, len(LADDER) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if rise(LADDER[middle]) >= target else (middle + 1, high)
    if low == len(LADDER) - 1 and rise(LADDER[low]) < target:
        raise UserError(
            f"the loss rises by less than {target:g} up to ±{LADDER[low]:g}: ask for less, or give the extent"
        )
    return LADDER[low]


def _induced_norms(space: WeightSpace, plane: Plane, x: Array, y: Array) -> Array:
    """‖eps_W‖ at every point: (len(y), len(x)).

    Where the weights are the vector, from the inner products of axes and origin. Of factors it is no quadratic form of
    x and y, and taken from the thin factors of each point.
    """
    if space.factored:
        return np.array([[space.induced_norm(plane.at(float(a), float(b))) for a in x] for b in y])
    vectors = [plane.origin, *plane.axes] if plane.origin is not None else [*plane.axes]
    gram = np.array([[dot(one, other) for other in vectors] for one in vectors])
    a, b = np.meshgrid(x, y)
    at = np.stack([np.ones_like(a), a, b][-len(vectors) :])
    squared = np.einsum("ikl,ij,jkl->kl", at, gram, at)
    return np.sqrt(np.maximum(squared, 0.0))


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
    common = settings.model_dump(include={"points", "extent", "target_rise", "error", "precision", "workers"})
    return loss_surface(objective, space, plane, store=store, watch=watch, **common)


MEASURE = Measure(
    name="surface",
    summary="loss on a plane of random filter-normalised directions, or of Hessian eigenvectors",
    spaces=("full", "lora"),
    settings=SurfaceSettings,
    run=_run,
    keeps_points=True,
)
