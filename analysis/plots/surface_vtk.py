"""Loss surfaces as a mesh for ParaView and other readers of VTK files.

A point lies at (x, y, h(e)), with the height h of the excess loss e (:mod:`analysis.plots.surface_data`). One whose
loss is not finite has no height: it is absent, and the cells around it are holes. Surfaces stand side by side, and each
has a point array of its own name, 1 on it and 0 elsewhere, to tell them apart by.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.plots.canvas import NothingToDraw
from analysis.plots.surface_data import Scale, Surface, scale_for, surface_table, surfaces
from bilora.errors import UserError

_GAP = 0.15  # between neighbours, as a share of the wider one
_ABSENT = -1  # number of a point that is not in the mesh


def write_surface_vtk(
    frame: pd.DataFrame,
    path: Path,
    kind: str | None = None,
    space: str | None = None,
    seed: int | None = None,
) -> Path:
    """Write the finite losses of all methods' surfaces as one mesh, atomically.

    Cells are quadrilaterals with four finite corners, and vertices for the points of none. Point data: ``x``, ``y``
    (coordinates in the plane), ``loss``, ``excess_loss``, ``accuracy`` (NaN where not known), ``interpolated``,
    ``surface`` (number, from 0), and one array a surface, named ``<method>, seed <n>, <space> space, <kind>, <split>``.

    Args:
        frame: the tidy rows of one study.
        path: a ``.vtu`` file; its folder is made if missing.
        kind: ``filter``, ``eigenvectors``, ``adapters`` or ``trajectory``; None: all that were measured.
        space: ``full``, ``lora`` or another; None: all that were measured.
        seed: the training seed; None: the first one of each method.

    Returns:
        ``path``.

    Raises:
        NothingToDraw: no such surface was measured, or none of its losses is finite.
        UserError: ``path`` has another suffix, a surface holds the same point twice, or its points are no grid.
    """
    import meshio

    if path.suffix != ".vtu":
        raise UserError(f"{path} is no .vtu file: name it so")
    drawn = [(s, scale_for(group)) for group in surfaces(surface_table(frame, kind, space, seed)) for s in group]
    parts, quads, vertices, start, left = [], [], [], 0, 0.0
    for number, (surface, scale) in enumerate(drawn):
        parts.append(_points(surface, scale, number, left - float(surface.x[0])))
        finite = np.isfinite(surface.loss)
        numbers = np.where(finite, start + np.cumsum(finite).reshape(finite.shape) - 1, _ABSENT)
        quads.append(_quads(numbers))
        vertices.append(numbers[surface.alone(4)].reshape(-1, 1))
        start += int(finite.sum())
        left += (1 + _GAP) * float(np.ptp(surface.x))
    if not start:
        raise NothingToDraw(f"no loss is finite: {path} would be empty")
    cells = [(name, found) for name, found in (("quad", quads), ("vertex", vertices)) if sum(map(len, found))]
    data: dict[str, Any] = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    points = np.stack([data.pop("at_x"), data["y"], data.pop("at_z")], axis=1)
    for number, (surface, _) in enumerate(drawn):
        data[_array_name(surface.name)] = (data["surface"] == number).astype(np.int32)
    mesh = meshio.Mesh(points, [(name, np.concatenate(found)) for name, found in cells], point_data=data)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")  # meshio goes by the suffix
    try:
        mesh.write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _points(surface: Surface, scale: Scale, number: int, shift: float) -> dict[str, np.ndarray]:
    """Arrays over the points of one surface whose loss is finite, row by row."""
    x, y = np.meshgrid(surface.x, surface.y)
    arrays: dict[str, np.ndarray] = {
        "at_x": x + shift,
        "at_z": scale.height(surface.excess),
        "x": x,
        "y": y,
        "loss": surface.loss,
        "excess_loss": surface.excess,
        "accuracy": surface.accuracy,
        "interpolated": surface.interpolated.astype(np.int32),
        "surface": np.full(x.shape, number, dtype=np.int32),
    }
    return {name: values[np.isfinite(surface.loss)] for name, values in arrays.items()}


def _quads(numbers: np.ndarray) -> np.ndarray:
    """Corners of each cell that has all four, counter-clockwise, (cells, 4), by the points' ``numbers`` on the grid."""
    corners = (numbers[:-1, :-1], numbers[:-1, 1:], numbers[1:, 1:], numbers[1:, :-1])
    cells = np.stack([corner.reshape(-1) for corner in corners], axis=1)
    return cells[(cells != _ABSENT).all(axis=1)]


def _array_name(name: str) -> str:
    """Without the characters that XML forbids."""
    return "".join(c if c.isprintable() else " " for c in name)
