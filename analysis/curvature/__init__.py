"""Second derivatives of the mean loss."""

from analysis.curvature.eigen import Spectrum, top_eigenvalues
from analysis.curvature.operator import HessianOperator

__all__ = ["HessianOperator", "Spectrum", "top_eigenvalues"]
