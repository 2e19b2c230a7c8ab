"""Second derivatives of the mean loss."""

from analysis.curvature.differences import DifferenceOperator
from analysis.curvature.eigen import Spectrum, top_eigenvalues
from analysis.curvature.factory import curvature_operator
from analysis.curvature.gauss_newton import GaussNewtonOperator
from analysis.curvature.hessian import HessianOperator
from analysis.curvature.operator import CurvatureOperator

__all__ = [
    "CurvatureOperator",
    "DifferenceOperator",
    "GaussNewtonOperator",
    "HessianOperator",
    "Spectrum",
    "curvature_operator",
    "top_eigenvalues",
]
