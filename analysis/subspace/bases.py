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


def largest_angle(U: Tensor, V: Tensor) -> float:
    """The largest principal angle in radians, between 0 and π/2; NaN if either basis is empty or not finite.

    From its sine and its cosine (Björck & Golub 1973): accurate for small angles too, where the arc cosine loses half
    of the digits.
    """
    if not min(U.shape[1], V.shape[1]) or not (torch.isfinite(U).all() and torch.isfinite(V).all()):
        return math.nan
    if U.shape[1] < V.shape[1]:
        U, V = V, U
    inner = U.mT @ V
    outside = torch.linalg.qr(V - U @ inner, mode="r").R
    sine, cosine = torch.linalg.svdvals(outside).max(), torch.linalg.svdvals(inner).min()
    return math.atan2(float(sine), float(cosine))
