"""How often random subspaces overlap as much: the test of an overlap against chance.

For independent uniform subspaces of dimensions p and q in R^m the overlap is tr((W1 + W2)⁻¹·W1)/min(p, q) with
independent Wishart matrices W1 of q and W2 of m − q degrees of freedom, p × p (the matrix-variate beta law). They are
drawn by Bartlett's decomposition: nothing of size m is. The p-value of an overlap is (1 + #draws that overlap at least
as much)/(1 + draws): at least 1/1000, and never below what it should be.
"""

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

DRAWS = 999


def overlap_p_value(overlap: float, first: int, second: int, ambient: int) -> float:
    """Share of random pairs of subspaces with at least this overlap.

    Args:
        overlap: ‖UᵀV‖²/min(p, q); NaN gives NaN.
        first, second: dimensions p and q.
        ambient: m.
    """
    if math.isnan(overlap) or not first or not second:
        return math.nan
    small, large = sorted((first, second))
    drawn = _overlaps(small, large, ambient)
    return float((1 + (drawn >= overlap * (1 - 1e-9)).sum()) / (1 + len(drawn)))


@lru_cache(maxsize=1024)
def _overlaps(p: int, q: int, m: int) -> NDArray[np.float64]:
    """(DRAWS,) overlaps of random subspaces of dimensions p ≤ q; the same for every call."""
    if p + q > m:  # they meet in p + q − m dimensions at least: their complements are the generic pair
        rest = _overlaps(m - q, m - p, m) * (m - q) if m > q else np.zeros(DRAWS)
        return np.asarray((p + q - m + rest) / p)
    rng = np.random.default_rng([p, q, m])
    first, second = _wishart(rng, p, q), _wishart(rng, p, m - q)
    traces = np.trace(np.linalg.solve(first + second, first), axis1=1, axis2=2)
    return np.asarray(traces / p)


def _wishart(rng: np.random.Generator, p: int, degrees: int) -> NDArray[np.float64]:
    """(DRAWS, p, p) of identity scale, ``degrees`` ≥ p."""
    L = np.zeros((DRAWS, p, p))
    below = np.tril_indices(p, -1)
    L[:, below[0], below[1]] = rng.standard_normal((DRAWS, len(below[0])))
    diagonal = np.arange(p)
    L[:, diagonal, diagonal] = np.sqrt(rng.chisquare(degrees - diagonal, (DRAWS, p)))
    return L @ L.transpose(0, 2, 1)
