"""Loss surfaces as a mesh for ParaView and other readers of VTK files.

A point lies at (x, y, h(e)), with the height h of the excess loss e (:mod:`analysis.plots.surface_data`). Surfaces
stand side by side, and each has a point array of its own name, 1 on it and 0 elsewhere, to tell them apart by.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.plots.surface_data import Scale, Surface, scale_for, surface_table, surfaces
from bilora.errors import UserError

_GAP = 0.15  # between neighbours, as a share of the wider one


def write_surface_vtk(
    frame: pd.DataFrame,
    path: Path,
    kind: str | None = None,
    space: str | None = None,
    seed: int | None = None,
) -> Path:
    """Write the surfaces of all methods as one mesh of quadrilaterals, atomically.

    Point data: ``x``, ``y`` (coordinates in the plane), ``loss``, ``excess_loss``, ``accuracy`` (NaN where not known),
    ``finite`` (0 where the loss is not: there ``loss`` and ``excess_loss`` are NaN and the height is 0),
    ``interpolated``, ``surface`` (number, from 0), and one array a surface, named ``<method>, seed <n>, <space> space,
    <kind>, <split>``.

    Args:
        frame: the tidy rows of one study.
        path: a ``.vtu`` file; its folder is made if missing.
        kind: ``filter``, ``eigenvectors``, ``adapters`` or ``trajectory``; None: all that were measured.
        space: ``full``, ``lora`` or another; None: all that were measured.
        seed: the training seed; None: the first one of each method.

    Returns:
        ``path``.

    Raises:
        NothingToDraw: no such surface was measured.
        UserError: ``path`` has another suffix, a surface holds the same point twice, or its points are no grid.
    """
    import meshio

    if path.suffix != ".vtu":
        raise UserError(f"{path} is no .vtu file: name it so")
    drawn = [(s, scale_for(group)) for group in surfaces(surface_table(frame, kind, space, seed)) for s in group]
    parts, cells, start, left = [], [], 0, 0.0
    for number, (surface, scale) in enumerate(drawn):
        width = float(np.ptp(surface.x))
        parts.append(_points(surface, scale, number, left - float(surface.x[0])))
        cells.append(start + _quads(len(surface.y), len(surface.x)))
        start += surface.loss.size
        left += (1 + _GAP) * width
    data: dict[str, Any] = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    points = np.stack([data.pop("at_x"), data["y"], data.pop("at_z")], axis=1)
    for number, (surface, _) in enumerate(drawn):
        data[_array_name(surface.name)] = (data["surface"] == number).astype(np.int32)
    mesh = meshio.Mesh(points, [("quad", np.concatenate(cells))], point_data=data)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")  # meshio goes by the suffix
    try:
        mesh.write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _points(surface: Surface, scale: Scale, number: int, shift: float) -> dict[str, np.ndarray]:
    """Arrays over the points of one surface, row by row."""
    x, y = np.meshgrid(surface.x, surface.y)
    finite = np.isfinite(surface.loss)
    arrays = {
        "at_x": x + shift,
        "at_z": np.nan_to_num(scale.height(surface.excess)),
        "x": x,
        "y": y,
        "loss": np.where(finite, surface.loss, np.nan),
        "excess_loss": np.where(finite, surface.excess, np.nan),
        "accuracy": surface.accuracy,
        "finite": finite.astype(np.int32),
        "interpolated": surface.interpolated.astype(np.int32),
        "surface": np.full(x.shape, number, dtype=np.int32),
    }
    return {name: values.reshape(-1) for name, values in arrays.items()}


def _quads(rows: int, columns: int) -> np.ndarray:
    """Corners of every cell, counter-clockwise, ((rows−1)·(columns−1), 4)."""
    numbers = np.arange(rows * columns).reshape(rows, columns)
    corners = (numbers[:-1, :-1], numbers[:-1, 1:], numbers[1:, 1:], numbers[1:, :-1])
    return np.stack([corner.reshape(-1) for corner in corners], axis=1)


def _array_name(name: str) -> str:
    """Without the characters that XML forbids."""
    return "".join(c if c.isprintable() else " " for c in name)
