"""Approximate eigenpairs with their errors."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from analysis.core.objective import Objective
from analysis.core.space import WeightSpace
from analysis.core.vectors import tensor_dot
from analysis.curvature.basis import Coefficients
from analysis.curvature.factory import Curvature, curvature_operator
from analysis.curvature.lanczos import Ritz
from analysis.curvature.operator import CurvatureOperator


@dataclass(frozen=True, eq=False)
class Pairs:
    """What a solver has found."""

    values: Coefficients  # (k,)
    errors: Coefficients  # (k,) ‖H·v − λ·v‖; NaN where it is not known
    vectors: list[Tensor]  # of length 1, in the weights' dtype
    products: int = 0  # made besides the operator's
    floor: float = 0.0  # error at the rounding of products, where more of the spectrum is known than the values
    interrupted: bool = False


def ritz_pairs(ritz: Ritz, *, vectors: bool) -> Pairs:
    """The pairs of a Lanczos iteration, with the errors it knows; with their ``vectors``, or with none."""
    dtype = ritz.basis.row(0).dtype
    found = [ritz.vector(i).to(dtype) for i in range(len(ritz.values))] if vectors else []
    return Pairs(ritz.values, ritz.errors, found, floor=ritz.floor, interrupted=ritz.interrupted)


def rayleigh(operator: CurvatureOperator, vectors: Sequence[Tensor], values: Sequence[float] | None = None) -> Pairs:
    """Unit vectors with their Rayleigh quotients, unless ``values`` are given, and errors: a product each."""
    units = torch.stack([(v.double() / tensor_dot(v, v) ** 0.5).to(operator.device, operator.dtype) for v in vectors])
    found, errors = [], []
    for i, (unit, product) in enumerate(zip(units, operator.matmat(units), strict=True)):
        value = tensor_dot(unit, product) if values is None else float(values[i])
        rest = product.double() - value * unit.double()
        found.append(value)
        errors.append(tensor_dot(rest, rest) ** 0.5)
    return Pairs(np.array(found), np.array(errors), list(units))


def with_exact_errors(
    objective: Objective, space: WeightSpace, curvature: Curvature, pairs: Pairs, *, offload: bool = False
) -> Pairs:
    """The pairs of an inexact operator with the errors that exact products show, one a pair; the values stay.

    Where ``pairs`` were interrupted, or this is, the errors are NaN: the operator's own say nothing of the exact ones.
    """
    unknown = Pairs(
        pairs.values, np.full(len(pairs.values), np.nan), pairs.vectors, pairs.products, pairs.floor, interrupted=True
    )
    if pairs.interrupted:
        return unknown
    try:
        with curvature_operator(objective, space, curvature, graphs="rebuild", offload=offload) as exact:
            errors = rayleigh(exact, pairs.vectors, list(pairs.values)).errors
            return Pairs(pairs.values, errors, pairs.vectors, pairs.products + exact.products, pairs.floor)
    except KeyboardInterrupt:
        return unknown
