"""The measures, found by name. A new one is a file with a ``MEASURE`` and a line here."""

from analysis.core.measure import Measure
from analysis.curvature.density import MEASURE as DENSITY
from analysis.curvature.eigen import MEASURE as SPECTRUM
from analysis.curvature.layers import MEASURE as LAYERS
from analysis.curvature.trace import MEASURE as TRACE
from analysis.landscape.lines import MEASURE as LANDSCAPE
from analysis.landscape.surface import MEASURE as SURFACE
from analysis.quality import MEASURE as QUALITY
from analysis.sharpness.adversarial import MEASURE as ADVERSARIAL
from analysis.sharpness.ascent_gap import MEASURE as ASCENT_GAP
from analysis.sharpness.m_sharpness import MEASURE as M_SHARPNESS
from analysis.sharpness.quantisation import MEASURE as QUANTISATION
from analysis.sharpness.random import MEASURE as RANDOM
from analysis.sharpness.read_noise import MEASURE as READ_NOISE
from analysis.sharpness.worst_case import MEASURE as WORST_CASE
from analysis.subspace.dynamics import MEASURE as DYNAMICS
from analysis.subspace.efficiency import MEASURE as EFFICIENCY
from analysis.subspace.measure import MEASURE as SUBSPACE
from analysis.subspace.update import MEASURE as UPDATE
from bilora.errors import UserError

MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        QUALITY,
        RANDOM,
        ADVERSARIAL,
        WORST_CASE,
        M_SHARPNESS,
        ASCENT_GAP,
        QUANTISATION,
        READ_NOISE,
        SPECTRUM,
        TRACE,
        DENSITY,
        LAYERS,
        LANDSCAPE,
        SURFACE,
        SUBSPACE,
        DYNAMICS,
        UPDATE,
        EFFICIENCY,
    )
}


def measure_named(name: str) -> Measure:
    """The measure registered as ``name``.

    Raises:
        UserError: no such measure.
    """
    if name not in MEASURES:
        raise UserError(f"unknown measure {name!r}: choose one of {', '.join(MEASURES)}")
    return MEASURES[name]


__all__ = ["MEASURES", "Measure", "measure_named"]
