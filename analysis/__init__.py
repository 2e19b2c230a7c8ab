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
from analysis.landscape.lines import loss_lines
from analysis.quality import quality
from analysis.registry import MEASURES, Measure, measure_named
from analysis.sharpness.adversarial import adversarial_sharpness
from analysis.sharpness.random import random_sharpness
from analysis.subspace.overlap import subspace_overlap

__all__ = [
    "MEASURES",
    "HessianOperator",
    "Measure",
    "Objective",
    "Trained",
    "WeightSpace",
    "adversarial_sharpness",
    "blocks_of",
    "curvature_operator",
    "diagonal",
    "layer_curvature",
    "load_trained",
    "loss_lines",
    "measure_named",
    "quality",
    "random_sharpness",
    "spectral_density",
    "subspace_overlap",
    "to_frame",
    "top_eigenvalues",
    "trace",
]
