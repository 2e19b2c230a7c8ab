"""The angles between the spaces that thin factors span.

For orthonormal U (m×p), V (m×q) the singular values of UᵀV are the cosines of the principal angles. The overlap is

    ‖UᵀV‖²_F / min(p, q)  ∈ [0, 1],

1 when the smaller space lies in the larger, and max(p, q)/m on average for independent random spaces.
"""

import math

import torch
from torch import Tensor


def overlap(U: Tensor, V: Tensor) -> float:
    """``‖UᵀV‖²/min(p, q)`` of orthonormal bases (m, p) and (m, q); NaN if either is empty."""
    smaller = min(U.shape[1], V.shape[1])
    return float((U.mT @ V).square().sum()) / smaller if smaller else math.nan


def principal_angles(U: Tensor, V: Tensor) -> tuple[float, ...]:
    """The principal angles in radians, min(p, q) of them from 0 to π/2 in rising order; none if a basis is not finite.

    From their sines and cosines (Björck & Golub 1973): accurate for small angles too, where the arc cosine loses half
    of the digits.
    """
    if not min(U.shape[1], V.shape[1]) or not (torch.isfinite(U).all() and torch.isfinite(V).all()):
        return ()
    if U.shape[1] < V.shape[1]:
        U, V = V, U
    inner = U.mT @ V
    outside = torch.linalg.qr(V - U @ inner, mode="r").R
    sines, cosines = torch.linalg.svdvals(outside).flip(0), torch.linalg.svdvals(inner)
    return tuple(torch.atan2(sines, cosines).tolist())
