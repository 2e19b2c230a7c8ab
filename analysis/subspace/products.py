"""Inner products, norms and singular values of merged updates s·B·A by r × r algebra; m × n is never formed."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from analysis.core.factors import Factors


def product_inner(f: Factors, g: Factors) -> float:
    """⟨s·B·A, s'·B'·A'⟩ = s·s'·Σ (BᵀB')∘(AA'ᵀ), float64."""
    left, right = f.B.double().mT @ g.B.double(), f.A.double() @ g.A.double().mT
    return f.scale * g.scale * float((left * right).sum())


def factor_inner(f: Factors, g: Factors) -> float:
    """⟨(A, B), (A', B')⟩ of factors of one rank, float64."""
    return float((f.A.double() * g.A.double()).sum() + (f.B.double() * g.B.double()).sum())


def inner_products(
    first: Mapping[str, Factors], second: Mapping[str, Factors]
) -> dict[str, dict[str, tuple[float, float, float]]]:
    """⟨f, g⟩, ⟨f, f⟩ and ⟨g, g⟩ of two adapters: space → layer → the three, with their sums over layers under ``""``.

    ``full`` of the updates; ``lora`` of the factors themselves, where all ranks are equal.
    """
    kinds = {"full": product_inner}
    if all(f.A.shape == second[name].A.shape for name, f in first.items()):
        kinds["lora"] = factor_inner
    found = {}
    for space, inner in kinds.items():
        pairs = {name: (f, second[name]) for name, f in first.items()}
        layers = {name: (inner(f, g), inner(f, f), inner(g, g)) for name, (f, g) in pairs.items()}
        between, mine, other = (math.fsum(column) for column in zip(*layers.values(), strict=True))
        found[space] = {**layers, "": (between, mine, other)}
    return found


def balancedness(f: Factors) -> float:
    """½(‖B‖² − ‖A‖²), float64."""
    return 0.5 * float(f.B.double().square().sum() - f.A.double().square().sum())


def singular_values(f: Factors) -> Tensor:
    """The r singular values of s·B·A, falling, float64: those of s·R_B·R_Aᵀ with B = Q_B·R_B and Aᵀ = Q_A·R_A.

    NaN where a factor is not finite.
    """
    if not (f.A.isfinite().all() and f.B.isfinite().all()):
        return torch.full((f.A.shape[0],), math.nan, dtype=torch.float64)
    R_B = torch.linalg.qr(f.B.detach().double(), mode="r").R
    R_A = torch.linalg.qr(f.A.detach().double().mT, mode="r").R
    values: Tensor = torch.linalg.svdvals(f.scale * R_B @ R_A.mT)
    return values


def ratio(above: float, below: float) -> float:
    """NaN where ``below`` is 0."""
    return above / below if below else math.nan


def cosine(inner: float, first: float, second: float) -> float:
    """Of ⟨a, b⟩, ⟨a, a⟩ and ⟨b, b⟩; NaN where one is zero."""
    return ratio(inner, math.sqrt(first * second))


def relative_distance(inner: float, first: float, second: float) -> float:
    """‖a − b‖/‖b‖ from ⟨a, b⟩, ⟨a, a⟩ and ⟨b, b⟩; NaN where b is zero. Below 1e-8 it is rounding."""
    return math.sqrt(max(first + second - 2 * inner, 0.0) / second) if second else math.nan
