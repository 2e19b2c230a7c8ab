"""The operator that a measure's settings ask for."""

from typing import Literal

import torch

from analysis.core.objective import Objective
from analysis.core.space import WeightSpace
from analysis.curvature.differences import DifferenceOperator, Differences
from analysis.curvature.gauss_newton import GaussNewtonOperator
from analysis.curvature.graphs import Graphs
from analysis.curvature.hessian import HessianOperator
from analysis.curvature.operator import CurvatureOperator
from bilora.errors import UserError

Curvature = Literal["hessian", "ggn"]


def curvature_operator(
    objective: Objective,
    space: WeightSpace,
    curvature: Curvature = "hessian",
    *,
    graphs: Graphs = "auto",
    autocast: torch.dtype | None = None,
    differences: Differences | None = None,
    offload: bool = False,
) -> CurvatureOperator:
    """The Hessian or the Gauss–Newton matrix of the mean loss at the space's weights.

    Args:
        objective: the mean loss.
        space: where, and with respect to which weights.
        curvature: ``"hessian"`` or ``"ggn"`` (generalised Gauss–Newton).
        graphs: kept between products or not (:class:`~analysis.curvature.graphs.GraphOperator`).
        autocast: dtype in which the model runs, with the float32 weights as masters.
        differences: ``"central"`` or ``"one-sided"`` differences of the gradient instead of exact Hessian products.
        offload: keep vectors and sums in host memory (:class:`~analysis.curvature.operator.CurvatureOperator`).

    Raises:
        UserError: an unknown name, or differences asked for together with ``ggn`` or ``autocast``.
    """
    if curvature not in ("hessian", "ggn"):
        raise UserError(f"curvature is {curvature!r}: choose hessian or ggn")
    if differences is not None:
        if curvature == "ggn" or autocast is not None:
            raise UserError(
                "finite differences approximate the float32 Hessian: leave out differences, or ggn and autocast"
            )
        return DifferenceOperator(objective, space, kind=differences, offload=offload)
    kind = HessianOperator if curvature == "hessian" else GaussNewtonOperator
    return kind(objective, space, graphs=graphs, autocast=autocast, offload=offload)
