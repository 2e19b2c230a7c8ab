"""How far lines and surfaces reach, where that is chosen by a rise of the loss."""

from collections.abc import Callable, Sequence

import numpy as np

from analysis.landscape.points import Points, Precision
from analysis.landscape.store import Key
from bilora.errors import UserError

LADDER = tuple(m * 10.0**e for e in range(-3, 3) for m in (1, 2, 5))
"""Extents to choose from: round numbers, so that compared methods mostly get the same."""


def extent_for(
    at: Points, centre: Key, ends: Callable[[float], Sequence[Key]], target: float, precision: Precision
) -> float:
    """The extent of :data:`LADDER` at whose ends the median loss rise reaches ``target``, but not at the one before.

    A loss that is not finite counts as too much. It is found by bisection: where the rise does not grow with the extent
    there may be a smaller one.

    Args:
        at: where points are evaluated.
        centre: the point that losses rise from, in the same precision.
        ends: the points at the ends, for an extent.
        target: the rise.
        precision: of all losses.

    Raises:
        UserError: the rise is not reached at the largest extent of the ladder.
    """
    base = at([centre], precision)[0]["loss"]

    def rise(extent: float) -> float:
        losses = [metrics["loss"] for metrics in at(ends(extent), precision)]
        return float(np.median([loss - base if np.isfinite(loss) else np.inf for loss in losses]))

    low, high = 0, len(LADDER) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if rise(LADDER[middle]) >= target else (middle + 1, high)
    if low == len(LADDER) - 1 and rise(LADDER[low]) < target:
        raise UserError(
            f"the loss rises by less than {target:g} up to ±{LADDER[low]:g}: ask for less, or give the extent"
        )
    return LADDER[low]
