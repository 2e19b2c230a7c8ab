"""Second derivatives of the mean loss."""

from analysis.curvature.blocks import blocks_of
from analysis.curvature.density import SpectralDensity, spectral_density
from analysis.curvature.diagonal import Diagonal, diagonal
from analysis.curvature.differences import DifferenceOperator
from analysis.curvature.eigen import Spectrum, top_eigenvalues
from analysis.curvature.factory import curvature_operator
from analysis.curvature.gauss_newton import GaussNewtonOperator
from analysis.curvature.hessian import HessianOperator
from analysis.curvature.layers import LayerCurvature, layer_curvature
from analysis.curvature.operator import CurvatureOperator
from analysis.curvature.trace import Trace, trace

__all__ = [
    "CurvatureOperator",
    "Diagonal",
    "DifferenceOperator",
    "GaussNewtonOperator",
    "HessianOperator",
    "LayerCurvature",
    "SpectralDensity",
    "Spectrum",
    "Trace",
    "blocks_of",
    "curvature_operator",
    "diagonal",
    "layer_curvature",
    "spectral_density",
    "top_eigenvalues",
    "trace",
]
