"""The data side (``Objective``), the model side (``WeightSpace``), and what both speak in: vectors and rows."""

from analysis.core.directions import filter_normalized, gaussian
from analysis.core.factors import Factors
from analysis.core.measure import Measure
from analysis.core.objective import Objective
from analysis.core.result import COLUMNS, Result, row
from analysis.core.space import WeightSpace
from analysis.core.trained import Trained, load_trained
from analysis.core.vectors import Vector, added, dot, norm, scaled

__all__ = [
    "COLUMNS",
    "Factors",
    "Measure",
    "Objective",
    "Result",
    "Trained",
    "Vector",
    "WeightSpace",
    "added",
    "dot",
    "filter_normalized",
    "gaussian",
    "load_trained",
    "norm",
    "row",
    "scaled",
]
