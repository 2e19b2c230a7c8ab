"""Orthonormal bases of the spaces that thin factors span, and what of a matrix lies outside them."""

import math

import torch
from torch import Tensor


def column_basis(factor: Tensor) -> Tensor:
    """Orthonormal basis of Col(factor), (m, rank), float64, of a factor (m, r).

    Directions below the rounding of the factor's own dtype are not counted: a zero factor has the empty basis (m, 0).
    A factor with non-finite entries spans nothing that could be named: its basis is NaN, as is all computed from it.
    """
    if not torch.isfinite(factor).all():
        return torch.full_like(factor, math.nan, dtype=torch.float64)
    # The decomposition of a thin factor is that of its small triangle: ten times as fast, and as accurate.
    Q, R = torch.linalg.qr(factor.detach().double())
    left, singular, _ = torch.linalg.svd(R, full_matrices=False)
    tolerance = max(factor.shape) * torch.finfo(factor.dtype).eps * singular.max()
    return Q @ left[:, singular > tolerance]


def row_basis(factor: Tensor) -> Tensor:
    """Orthonormal basis of Row(factor) as columns, (n, rank), float64, of a factor (r, n)."""
    return column_basis(factor.mT)


def off_columns(matrix: Tensor, columns: Tensor) -> Tensor:
    """``(I − U·Uᵀ)·M`` of a matrix (m, k) and an orthonormal basis U (m, p)."""
    return matrix - columns @ (columns.mT @ matrix)


def off_rows(matrix: Tensor, rows: Tensor) -> Tensor:
    """``M·(I − V·Vᵀ)`` of a matrix (k, n) and an orthonormal basis V (n, q)."""
    return matrix - (matrix @ rows) @ rows.mT
