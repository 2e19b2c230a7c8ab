"""A random filter-normalised plane (Li et al. 2018).

    w(x, y) = W + x·u + y·v,     ‖u_i,:‖ = ‖v_i,:‖ = ‖W_i,:‖ for every row i, 1-D parameters zero

u and v are Gaussian, scaled row by row. In many dimensions they are nearly orthogonal by themselves; ``cosine`` says
how nearly. Orthogonalising whole vectors before the rows are scaled would not last: the scaling weighs the rows anew.
What lasts is to orthogonalise row by row, since Σ_i ‖W_i‖²·cos_i is zero when every cos_i is.
"""

import torch

from analysis.core.directions import filter_normalized, gaussian
from analysis.core.space import WeightSpace
from analysis.core.vectors import Vector, norm
from analysis.landscape.plane import Plane, cosine
from bilora.errors import UserError


def random_plane(space: WeightSpace, *, seed: int = 0, orthogonal: bool = False) -> Plane:
    """The plane of two filter-normalised random directions through the space's weights.

    One such plane is one draw: the loss rise along a random direction varies by its own size between draws.

    Args:
        space: the model side. In the LoRA space the rows are those of A and of B, which depends on the gauge.
        seed: names the directions, numbers 0 and 1 of :func:`analysis.core.directions.gaussian`: the same for every
            adapter of one base model, and those of :func:`analysis.landscape.lines.loss_lines`.
        orthogonal: take the part of each row of v along the same row of u away before rows are scaled. The cosine is
            then zero to rounding; only rows of a single entry, which have no orthogonal direction, keep theirs.

    Returns:
        A :class:`Plane` of kind ``filter``; coordinate 1 moves every filter by its own norm. The window is ±1.

    Raises:
        UserError: the space has no parameter with rows, or all of its rows are zero.
    """
    if not space.filter_norms():
        raise UserError(f"space {space.name} has no parameter with rows: a filter-normalised plane needs weights")
    first, second = gaussian(space, seed, 0), gaussian(space, seed, 1)
    if orthogonal:
        second = _orthogonal_rows(second, first)
    u, v = filter_normalized(space, first), filter_normalized(space, second)
    if not norm(u):
        raise UserError(f"all rows of the {space.name} space are zero: filter normalisation leaves no direction")
    return Plane(
        kind="filter",
        axes=(u, v),
        origin=None,
        axis_labels=("x / filter norms", "y / filter norms"),
        cosine=cosine(u, v),
        window=(-1.0, 1.0, -1.0, 1.0),
    )


def _orthogonal_rows(second: Vector, first: Vector) -> Vector:
    rows = {}
    for name, step in second.items():
        if step.dim() < 2 or step[0].numel() < 2:
            rows[name] = step
            continue
        v, u = step.flatten(1).double(), first[name].flatten(1).double()
        v = v - u * ((v * u).sum(1) / u.square().sum(1).clamp_min(torch.finfo(torch.float64).tiny))[:, None]
        rows[name] = v.view_as(step).to(step.dtype)
    return rows
