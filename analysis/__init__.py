"""Measurements of trained weights: sharpness, curvature, landscapes, subspaces, in LoRA space and in full space."""

from analysis.core import Objective, Trained, WeightSpace, load_trained
from analysis.curvature import (
    HessianOperator,
    blocks_of,
    curvature_operator,
    diagonal,
    layer_curvature,
    spectral_density,
    top_eigenvalues,
    trace,
)
from analysis.frame import to_frame
from analysis.landscape.adapter_plane import adapter_plane
from analysis.landscape.connect import connectivity
from analysis.landscape.eigen_plane import eigen_plane
from analysis.landscape.lines import loss_lines
from analysis.landscape.random_plane import random_plane
from analysis.landscape.surface import loss_surface
from analysis.landscape.trajectory import trajectory_plane
from analysis.quality import quality
from analysis.registry import MEASURES, Measure, measure_named
from analysis.sharpness.adversarial import adversarial_sharpness
from analysis.sharpness.random import random_sharpness
from analysis.sharpness.worst_case import worst_case_sharpness
from analysis.subspace.overlap import subspace_overlap

__all__ = [
    "MEASURES",
    "HessianOperator",
    "Measure",
    "Objective",
    "Trained",
    "WeightSpace",
    "adapter_plane",
    "adversarial_sharpness",
    "blocks_of",
    "connectivity",
    "curvature_operator",
    "diagonal",
    "eigen_plane",
    "layer_curvature",
    "load_trained",
    "loss_lines",
    "loss_surface",
    "measure_named",
    "quality",
    "random_plane",
    "random_sharpness",
    "spectral_density",
    "subspace_overlap",
    "to_frame",
    "top_eigenvalues",
    "trace",
    "trajectory_plane",
    "worst_case_sharpness",
]
