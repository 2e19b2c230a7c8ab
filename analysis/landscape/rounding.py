"""How far losses in bfloat16 are off, from a few of them evaluated in full precision as well.

Half of the points checked are those whose loss fits the others least, left out of their interpolant: rounding shows as
roughness. The other half lies as far from these and from each other as can be, for errors that are smooth.

The largest difference seen at n of N points is below the largest there is. Of differences with exponential tails, as
those of bfloat16 have (Gaussian ones are lighter), the largest of the other N − n is at most c times it with
probability

    P(c) = ∫₀¹ [1 − (1 − u^{1/n})^c]^{N−n} du,      u = (1 − e^{−m})^n the distribution function of the largest seen

whatever their scale. The surface is said to be off by c times the largest difference seen, where P(c) = 95 %.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from analysis.landscape.adaptive import Interpolant, Values
from analysis.landscape.points import Points
from analysis.landscape.store import Key

PRECISION_ERROR = 0.02
"""Of the range: losses in bfloat16 that may be farther off are computed again in full precision."""
FEWEST = 8
"""Points checked at least."""
SHARE = 0.05
"""Of the points, checked where these are more."""
CONFIDENCE = 0.95
MOST = 2000
"""Points that are interpolated to find those that stand out: it takes their cube of time."""


@dataclass(frozen=True)
class Check:
    """What was found at the points checked."""

    keys: tuple[Key, ...]  # those checked
    seen: float  # largest difference to full precision among them, over the range of losses
    error: float  # what the largest of all is below, with :data:`CONFIDENCE`


def checked_points(
    at: Points, keys: Sequence[Key], losses: Values, places: Values, rough: Values, span: float
) -> Check:
    """Evaluate some of the points in full precision.

    Args:
        at: where.
        keys: N points evaluated in bfloat16.
        losses: (N,) found there.
        places: (N, 2) where they lie, for distances between them.
        rough: (N,) how badly each fits its neighbours.
        span: the range of losses.
    """
    chosen = to_check(places, rough)
    picked = [keys[i] for i in chosen]
    exact = np.array([metrics["loss"] for metrics in at(picked)])
    found = losses[chosen]
    with np.errstate(invalid="ignore"):
        differences = np.abs(found - exact) / max(span, 1e-300)
    agree = ~np.isfinite(exact) & ~np.isfinite(found)  # not finite in both
    seen = float(np.where(agree, 0.0, differences).max())
    seen = seen if np.isfinite(seen) else np.inf
    return Check(tuple(picked), seen, seen * factor(len(picked), len(keys)))


def roughness(places: Values, losses: Values) -> Values:
    """(N,) by how much each loss differs from what the others predict there.

    Zero where a loss is not finite, or there are more than :data:`MOST`: then no point stands out.
    """
    if len(losses) > MOST or not np.isfinite(losses).all():
        return np.zeros(len(losses))
    return Interpolant(places, losses).left_out


def to_check(places: Values, rough: Values) -> list[int]:
    """Which points to check: the roughest, then those farthest from the ones chosen.

    Args:
        places, rough: as :func:`checked_points`.
    """
    count = min(len(places), max(FEWEST, round(SHARE * len(places))))
    rough_ones = count // 2 if rough.any() else 1
    chosen = [int(i) for i in np.argsort(-rough, kind="stable")[:rough_ones]]
    gap = np.linalg.norm(places[:, None] - places[None, chosen], axis=2).min(axis=1)
    gap[chosen] = -1
    while len(chosen) < count:
        chosen.append(int(np.argmax(gap)))
        gap = np.minimum(gap, np.linalg.norm(places - places[chosen[-1]], axis=1))
        gap[chosen[-1]] = -1
    return chosen


def factor(checked: int, points: int, confidence: float = CONFIDENCE) -> float:
    """The c of P(c) = ``confidence``: what the largest of ``points`` differences is over the largest of ``checked``.

    At least 1, which it is where all are checked.
    """
    u = (np.arange(20000) + 0.5) / 20000
    tails: Values = 1 - u ** (1 / checked)
    low, high = 1.0, 1e3
    for _ in range(60):
        middle = (low + high) / 2
        covered = np.mean((1 - tails**middle) ** (points - checked))
        low, high = (middle, high) if covered < confidence else (low, middle)
    return high if points > checked else 1.0
