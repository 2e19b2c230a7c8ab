"""Matrices kept as a product of thin factors, and the best low-rank ascent direction.

Among perturbations of one matrix with rank ≤ r and norm ≤ rho the first-order rise ⟨eps, G⟩ is largest at

    eps = rho·G_r/‖G_r‖,   rise = rho·‖G_r‖ = rho·sqrt(Σ_{i≤r} σ_i(G)²),

with G_r the rank-r truncated singular value decomposition of G: by von Neumann's trace inequality
⟨eps, G⟩ ≤ Σ_{i≤r} σ_i(eps)·σ_i(G), and Cauchy–Schwarz bounds that by rho·sqrt(Σ_{i≤r} σ_i²), attained there.
The Bi-LoRA paper's Proposition 3 names rho·U_r·V_rᵀ with the Ky Fan norm rho·Σ_{i≤r} σ_i instead; that point has
Frobenius norm rho·√r and lies outside the ball. Over several layers the same holds with the sum taken over layers.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bilora.adapters.norms import squared_product_norm


@dataclass(frozen=True)
class LowRank:
    """The matrix ``left·right``, never formed."""

    left: Tensor  # (m, k) float64
    right: Tensor  # (k, n) float64

    def squared_norm(self) -> float:
        """‖left·right‖²_F."""
        return float(squared_product_norm(self.left, self.right))


def _gram(matrix: Tensor) -> Tensor:
    """The Gram matrix of the shorter side, float64: its eigenvalues are the squared singular values."""
    matrix = matrix.detach().double()
    return matrix @ matrix.mT if matrix.shape[0] <= matrix.shape[1] else matrix.mT @ matrix


def leading_squared_norm(matrix: Tensor, rank: int) -> float:
    """``Σ_{i≤rank} σ_i²`` of a matrix (m, n), exact to float64 rounding; NaN if the matrix is not finite.

    From the eigenvalues of the shorter Gram matrix, an order cheaper than a singular value decomposition. Squaring
    blurs only singular values below 1e-8 of the largest, which do not show in this sum.
    """
    gram = _gram(matrix)
    if not torch.isfinite(gram).all():
        return math.nan
    return float(torch.linalg.eigvalsh(gram)[-rank:].clamp_min(0.0).sum())


def leading_part(matrix: Tensor, rank: int) -> LowRank:
    """The truncated singular value decomposition G_r of a matrix (m, n), as thin factors; NaN if it is not finite."""
    matrix = matrix.detach().double()
    gram = _gram(matrix)
    if not torch.isfinite(gram).all():
        rows, columns = matrix.shape
        return LowRank(matrix.new_full((rows, 1), math.nan), matrix.new_full((1, columns), math.nan))
    vectors = torch.linalg.eigh(gram).eigenvectors[:, -rank:]
    if matrix.shape[0] <= matrix.shape[1]:
        return LowRank(vectors, vectors.mT @ matrix)
    return LowRank(matrix @ vectors, vectors.mT)
