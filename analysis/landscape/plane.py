"""A plane through weight space, and where points lie relative to it.

    w(x, y) = W + origin + x·u + y·v

W are the weights a space holds. The axes u and v need not be orthogonal: ``cosine`` says what they are, and a point w
has the coordinates of its projection, the least-squares solution of x·u + y·v ≈ w − (W + origin). Axes through many
points are principal axes: the eigenvectors of the T×T Gram matrix of the points' offsets, never of a d×d matrix.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from analysis.core.space import WeightSpace
from analysis.core.vectors import CHUNK, Vector, added, dot, norm, scaled
from bilora.errors import UserError

MARGIN = 0.2
"""Free room around marked points, as a share of the longer side of the box around them: a path may be a thin one."""

Window = tuple[float, float, float, float]
"""xmin, xmax, ymin, ymax."""


@dataclass(frozen=True)
class Mark:
    """A point drawn on the surface at its projection onto the plane."""

    label: str  # "LoRA seed 0", "step 40"
    x: float
    y: float
    off_plane: float  # ‖w − projection‖, zero to the rounding of the axes if w lies in the plane
    loss: float  # loss at w itself, not at its projection; NaN if not evaluated


@dataclass(frozen=True, eq=False)
class Plane:
    """Two axes through the weights of a space, with what there is to draw on them."""

    kind: str  # "filter", "eigenvectors", "adapters" or "trajectory"
    axes: tuple[Vector, Vector]  # u, v in the parameters' dtype
    origin: Vector | None  # added to the space's weights; None: the weights themselves
    axis_labels: tuple[str, str]  # with units
    cosine: float  # ⟨u, v⟩/(‖u‖·‖v‖)
    window: Window
    marks: tuple[Mark, ...] = ()
    explained: tuple[float, float] | None = None  # share of the marks' variance along each axis
    path: bool = False  # the marks are one trajectory, in order

    def at(self, x: float, y: float) -> Vector:
        """``origin + x·u + y·v`` in the axes' dtype: what ``space.perturbed`` takes.

        Exactly zero at x = y = 0 where there is no origin. Summed in the axes' dtype: its rounding is far below that of
        the weights it is added to, and conversions would cost a third of a forward pass.
        """
        u, v = self.axes
        if self.origin is None:
            return {name: torch.mul(along, x).add_(v[name], alpha=y) for name, along in u.items()}
        return {name: torch.add(self.origin[name], along, alpha=x).add_(v[name], alpha=y) for name, along in u.items()}


def weights_of(space: WeightSpace) -> Vector:
    """The space's current weights, not copied: they are read only."""
    return {name: parameter.detach() for name, parameter in space.parameters.items()}


def fitting(space: WeightSpace, point: Vector, label: str) -> Vector:
    """``point``, called ``label``, in the dtype and on the device of the parameters, all of which it must name.

    Raises:
        UserError: it lacks one, or a shape differs.
    """
    missing = space.parameters.keys() - point.keys()
    if missing:
        raise UserError(f"{label} lacks {min(missing)}: give weights for every parameter of the {space.name} space")
    try:
        return space.aligned(point)
    except ValueError as error:
        raise UserError(f"{label} does not fit the {space.name} space: {error}") from error


def like(space: WeightSpace, vector: Vector) -> Vector:
    """A vector rounded from float64 to the dtype of the space's parameters, on their device."""
    return {name: tensor.to(space.parameters[name]) for name, tensor in vector.items()}


def difference(end: Vector, start: Vector) -> Vector:
    """``end − start`` in float64."""
    return {name: tensor.double() - start[name].double() for name, tensor in end.items()}


def cosine(u: Vector, v: Vector) -> float:
    """⟨u, v⟩/(‖u‖·‖v‖), accumulated in float64."""
    return dot(u, v) / (norm(u) * norm(v))


def orthogonal_part(v: Vector, u: Vector) -> Vector:
    """``v`` without its part along ``u``. Taken twice: once leaves rounding of the size of what was taken away."""
    for _ in range(2):
        v = added(v, u, -dot(u, v) / dot(u, u))
    return v


def coordinates(offset: Vector, axes: tuple[Vector, Vector]) -> tuple[float, float, float]:
    """x and y of the projection of ``offset``, seen from the plane's centre, and its distance from the plane.

    The distance is the norm of the remainder itself: from ‖offset‖² − ‖projection‖² half of the digits would be lost.
    """
    u, v = axes
    uv = dot(u, v)
    gram = np.array([[dot(u, u), uv], [uv, dot(v, v)]])
    x, y = (float(c) for c in np.linalg.solve(gram, np.array([dot(offset, u), dot(offset, v)])))
    rest = {name: tensor.double() - x * u[name].double() - y * v[name].double() for name, tensor in offset.items()}
    return x, y, norm(rest)


def window_around(marks: Sequence[Mark]) -> Window:
    """The square around the box of the marks, with :data:`MARGIN` of its side on all sides."""
    xs, ys = [mark.x for mark in marks], [mark.y for mark in marks]
    half = (0.5 + MARGIN) * max(max(xs) - min(xs), max(ys) - min(ys))
    x, y = (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2
    return x - half, x + half, y - half, y + half


def rounding_length(points: Sequence[Vector]) -> float:
    """Distances below this are rounding of the stored weights: 4·eps of their dtype, times the largest ‖w‖."""
    coarsest = max(torch.finfo(tensor.dtype).eps for tensor in points[0].values())
    return 4 * coarsest * max(norm(point) for point in points)


def refuse_non_finite(points: Sequence[Vector], labels: Sequence[str]) -> None:
    """A plane or a path through weights that are not numbers is none.

    Raises:
        UserError: a point has NaN or infinite entries.
    """
    for point, label in zip(points, labels, strict=True):
        for name, tensor in point.items():
            if not bool(tensor.isfinite().all()):
                raise UserError(f"{label} has weights that are not finite in {name}: leave it out")


def principal_axes(
    points: Sequence[Vector], centre: Vector, what: str
) -> tuple[tuple[Vector, Vector], tuple[float, float]]:
    """The plane through ``centre`` with the least Σ distance² to the points: orthonormal axes, and their shares.

    The offsets are taken from ``centre``, not from the points' mean. An axis points to where the point that lies
    farthest along it has a positive coordinate.

    Args:
        points: T weight vectors of the same parameters.
        centre: where the plane passes through.
        what: the points' name in errors.

    Returns:
        Axes in float64, and the share of the variance Σ‖point − mean‖² along each.

    Raises:
        UserError: the points coincide, or lie on one line through ``centre``.
    """
    gram = _gram(points, centre)
    values, vectors = np.linalg.eigh(gram)
    values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]
    noise = rounding_length(points) * math.sqrt(len(points))
    if math.sqrt(values[0]) <= noise:
        raise UserError(f"the {what} are all equal, to rounding: there is nothing to draw a plane through")
    # The Gram matrix squares lengths: below 1e-7 of the longest it shows its own rounding.
    if math.sqrt(values[1]) <= max(noise, 1e-7 * math.sqrt(values[0])):
        raise UserError(f"the {what} lie on one line (parallel axes): measure the loss along it instead of on a plane")
    first = _combined(points, centre, _pointing_up(vectors[:, 0]))
    second = orthogonal_part(_combined(points, centre, _pointing_up(vectors[:, 1])), first)
    axes = scaled(first, 1 / norm(first)), scaled(second, 1 / norm(second))
    along = vectors[:, :2] * np.sqrt(values[:2])  # (T, 2): the points' coordinates, seen from the centre
    total = np.trace(gram) - gram.mean() * len(points)  # Σ‖p − c‖² − T·‖mean − c‖²
    shares = len(points) * along.var(axis=0) / total
    return axes, (float(shares[0]), float(shares[1]))


def _pointing_up(column: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return column * np.sign(column[np.argmax(np.abs(column))])


def _gram(points: Sequence[Vector], centre: Vector) -> npt.NDArray[np.float64]:
    """(T, T): ⟨p_i − c, p_j − c⟩, a piece of the parameters at a time."""
    gram = np.zeros((len(points), len(points)))
    width = max(1, CHUNK // len(points))
    for name, middle in centre.items():
        flat = [point[name].reshape(-1) for point in points]
        for start in range(0, middle.numel(), width):
            part = slice(start, start + width)
            offsets = torch.stack([f[part].double() for f in flat]) - middle.reshape(-1)[part].double()
            gram += (offsets @ offsets.T).cpu().numpy()
    return gram


def _combined(points: Sequence[Vector], centre: Vector, coefficients: npt.NDArray[np.float64]) -> Vector:
    """Σ c_i·(p_i − centre) in float64."""
    total = {name: torch.zeros_like(middle, dtype=torch.float64) for name, middle in centre.items()}
    for coefficient, point in zip(coefficients, points, strict=True):
        for name, tensor in total.items():
            tensor.add_(point[name].double() - centre[name].double(), alpha=float(coefficient))
    return total
