"""Tests against chance: how a perturbation would fare had it been turned at random.

Under the null hypothesis eps_W is ``U·eps_W·Vᵀ`` with independent uniform rotations U and V: its singular values σ
stay, its directions mean nothing. With ``f = Σσ⁴/(Σσ²)²``, 1 for rank 1:

    outside share   has mean (1 − p/m)(1 − q/n), and E[share²] = α·α' + 2·β·β' + 2·f·(α·β' + β·α' + β·β'),
                    α = E[Q_11·Q_22], β = E[Q_12²] of the random projections Q of rank m − p in R^m and n − q in R^n
    alignment       has mean 0, variance 1/(m·n), and excess kurtosis 6·f·f_G up to terms of order 1/m and 1/n

The moments of the share are exact; it is then taken to be beta distributed, the alignment as Student's t, with these
moments. Nothing is drawn, and nothing of size m × n is made for a factored perturbation.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from analysis.subspace.lowrank import LowRank

Values = NDArray[np.float64]


def concentration(matrix: Tensor | LowRank) -> float:
    """``f = Σσ⁴/(Σσ²)²`` of a matrix, dense or factored: from 1/rank to 1; NaN for zero."""
    if isinstance(matrix, LowRank):
        product = (matrix.left.mT @ matrix.left) @ (matrix.right @ matrix.right.mT)
        fourth, square = float((product * product.mT).sum()), float(product.trace())
    else:
        dense = matrix.detach().double()
        gram = dense @ dense.mT if dense.shape[0] <= dense.shape[1] else dense.mT @ dense
        fourth, square = float(gram.square().sum()), float(gram.trace())
    return fourth / square**2 if square else math.nan


def share_variance(f: float, shape: tuple[int, int], ranks: tuple[int, int]) -> float:
    """Variance of the outside share of a randomly turned matrix.

    Args:
        f: its :func:`concentration`.
        shape: m and n.
        ranks: p and q, of B and A.
    """
    (m, n), (p, q) = shape, ranks
    (a1, b1), (a2, b2) = _moments(m, m - p), _moments(n, n - q)
    second = a1 * a2 + 2 * b1 * b2 + 2 * f * (a1 * b2 + b1 * a2 + b1 * b2)
    return max(0.0, second - ((1 - p / m) * (1 - q / n)) ** 2)


def share_p_value(share: float, means: Values, variances: Values, weights: Values) -> float:
    """How often randomly turned perturbations would lie outside by no more than ``share``; small where it is confined.

    Args:
        share: outside share over some layers together.
        means, variances: (L,), of each layer under random rotation.
        weights: (L,), ``‖eps_W‖²`` of the layers.
    """
    total = float(weights.sum())
    if math.isnan(share) or not total:
        return math.nan
    mean = float(means @ weights) / total
    variance = float(variances @ weights**2) / total**2
    if not variance or math.isnan(variance):
        return math.nan if math.isnan(variance) else float(share >= mean)
    count = mean * (1 - mean) / variance - 1
    return float(stats.beta.cdf(min(max(share, 0.0), 1.0), mean * count, (1 - mean) * count))


def alignment_p_value(alignment: float, variances: Values, concentrations: Sequence[Values]) -> float:
    """How often randomly turned perturbations would have a cosine with G at least as far from 0.

    Args:
        alignment: ``Σ⟨eps_W, G⟩/(‖eps_W‖·‖G‖)`` over some layers together.
        variances: (L,), the parts of its variance: ``‖eps_W‖²·‖G‖²/(m·n)`` of each layer over the product of the whole
            squared norms.
        concentrations: f of eps_W and of G, (L,) each.
    """
    variance = float(variances.sum())
    if math.isnan(alignment) or not variance:
        return math.nan
    both = np.where(variances > 0, concentrations[0] * concentrations[1], 0.0)  # undefined where either is zero
    excess = 6 * float(both @ variances**2) / variance**2
    degrees = 4 + 6 / excess
    return float(2 * stats.t.sf(abs(alignment) / math.sqrt(variance * (1 - 2 / degrees)), degrees))


def _moments(size: int, rank: int) -> tuple[float, float]:
    """E[Q_11·Q_22] and E[Q_12²] of the orthogonal projection on a uniform subspace."""
    if size == 1:
        return float(rank), 0.0
    below = size * (size - 1) * (size + 2)
    return (rank**2 * (size + 1) - 2 * rank) / below, rank * (size - rank) / below
