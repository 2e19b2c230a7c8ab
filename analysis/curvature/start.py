"""Where Lanczos starts."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from analysis.core.vectors import Vector, tensor_dot
from analysis.curvature.operator import CurvatureOperator
from bilora.errors import UserError

Start = Literal["gradient", "random"]

RANDOM_SHARE = 0.03
"""Length of the random part of a start, relative to the gradient's or the given vectors'."""


def first_block(
    operator: CurvatureOperator, start: Start | Sequence[Vector], block: int, generator: torch.Generator
) -> Tensor:
    """The first Lanczos vectors, (block, size): random but for the first, which is ``start`` with a little noise.

    Raises:
        UserError: a start vector that does not fit the space, is zero or not finite.
    """
    rows = torch.randn(block, operator.size, generator=generator).to(operator.device, operator.dtype)
    if start == "random":
        return rows
    first = operator.gradient() if start == "gradient" else _sum_of(start, operator)
    length = tensor_dot(first, first) ** 0.5
    if length:
        # A gradient, or another point's eigenvectors, may have no part in what is wanted here.
        rows[0] = first / length + rows[0] * (RANDOM_SHARE / tensor_dot(rows[0], rows[0]) ** 0.5)
    return rows


def _sum_of(vectors: Any, operator: CurvatureOperator) -> Tensor:
    """Σ i²·v_i of unit vectors, the most wanted first.

    The less wanted lie closer to the rest of the spectrum and converge last: the larger share saves a product or two.
    """
    space = operator.space
    total = torch.zeros(space.size, dtype=torch.float64, device=operator.device)
    for rank, vector in enumerate(vectors, start=1):
        if not isinstance(vector, Mapping) or vector.keys() != space.parameters.keys():
            raise UserError(
                f"a start vector does not name exactly the parameters of the {space.name} space: "
                "give Spectrum.vectors of the same space"
            )
        try:
            flat = space.flat(space.aligned(dict(vector))).to(operator.device).double()
        except ValueError as error:
            raise UserError(f"a start vector does not fit the {space.name} space: {error}") from error
        length = tensor_dot(flat, flat) ** 0.5
        if not math.isfinite(length) or not length:
            raise UserError("a start vector is zero or not finite: give eigenvectors of a nearby point")
        total += flat * (rank**2 / length)
    return total
