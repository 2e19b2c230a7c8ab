"""Lanczos with full reorthogonalisation, for a symmetric operator on flat vectors.

``H·Q_j = Q_j·T_j + beta_j·q_{j+1}·e_jᵀ`` with orthonormal ``Q_j`` and tridiagonal ``T_j``. A Ritz pair
``(theta, y = Q_j·s)`` of ``T_j`` satisfies ``‖H·y − theta·y‖ = beta_j·|s_j|`` (Paige 1971; Parlett, The Symmetric
Eigenvalue Problem, ch. 13), which is known without another product and serves to stop.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from analysis.core.vectors import tensor_dot

Which = Literal["magnitude", "largest", "smallest"]
Coefficients = NDArray[np.float64]

ROWS = 16
"""Basis vectors stored in one matrix; memory grows by this many."""
COLUMNS = 1 << 18
"""Entries of each basis vector converted to float64 at a time."""


class Basis:
    """Orthonormal vectors as rows of matrices, in the vectors' own dtype; products with them run in float64."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._empty = lambda: torch.empty(ROWS, size, dtype=dtype, device=device)
        self._blocks: list[Tensor] = []
        self.length = 0

    def append(self, vector: Tensor) -> None:
        """Add a row."""
        if self.length == len(self._blocks) * ROWS:
            self._blocks.append(self._empty())
        self._blocks[-1][self.length % ROWS] = vector
        self.length += 1

    def row(self, index: int) -> Tensor:
        """Row ``index``, (size,)."""
        return self._blocks[index // ROWS][index % ROWS]

    def orthogonalized(self, vector: Tensor) -> Tensor:
        """``vector`` (size,), float64, less its projection on the rows, taken away twice ("twice is enough").

        Works in place.
        """
        for _ in range(2):
            for block, columns in self._tiles(vector.numel()):
                # One block of rows after the other: modified Gram–Schmidt between blocks.
                coefficients = torch.zeros(len(block), dtype=torch.float64, device=vector.device)
                for part in columns:
                    coefficients += block[:, part].double() @ vector[part]
                for part in columns:
                    vector[part] -= coefficients @ block[:, part].double()
        return vector

    def combination(self, coefficients: Coefficients) -> Tensor:
        """Σ_i coefficients_i·row_i, (size,), float64."""
        weights = torch.from_numpy(np.ascontiguousarray(coefficients))
        first = self._blocks[0]
        result = torch.zeros(first.shape[1], dtype=torch.float64, device=first.device)
        start = 0
        for block, columns in self._tiles(result.numel()):
            own = weights[start : start + len(block)].to(result.device)
            start += len(block)
            for part in columns:
                result[part] += own @ block[:, part].double()
        return result

    def _tiles(self, size: int) -> list[tuple[Tensor, list[slice]]]:
        columns = [slice(start, start + COLUMNS) for start in range(0, size, COLUMNS)]
        return [(block[: self.length - i * ROWS], columns) for i, block in enumerate(self._blocks)]


@dataclass(frozen=True, eq=False)
class Ritz:
    """The wanted Ritz pairs of a finished iteration, the most wanted first."""

    values: Coefficients  # (k,)
    coefficients: Coefficients  # (steps, k), columns in the basis
    basis: Basis


def wanted(values: Coefficients, which: Which) -> NDArray[np.intp]:
    """Indices of ``values`` from the most to the least wanted."""
    return np.argsort(-_worth(values, which), kind="stable")


def rounding_floor(values: Coefficients, dtype: torch.dtype) -> float:
    """Residual norm below which a pair is exact as far as products in ``dtype`` can tell."""
    return float(50 * torch.finfo(dtype).eps * np.abs(values).max())


def lanczos(
    multiply: Callable[[Tensor], Tensor],
    start: Tensor,
    k: int,
    *,
    which: Which,
    tolerance: float,
    max_steps: int,
    generator: torch.Generator,
) -> Ritz:
    """The ``k`` wanted Ritz pairs, iterated until the residual estimate of each is ≤ ``tolerance·|theta|``.

    A Krylov space holds one vector of each eigenspace, and only of eigenspaces in which the start vector has a part.
    So when it turns out to be invariant (beta vanishes), the iteration restarts from a random vector orthogonal to all
    before, and ends only once such a part has brought nothing that is wanted more than the ``k``-th pair.

    Args:
        multiply: the operator on a flat vector (size,) of ``start``'s dtype.
        start: first vector, not zero.
        k: how many, at most the size.
        which: largest magnitude, largest or smallest (most negative) value.
        tolerance: relative residual.
        max_steps: products at most, at least ``k``.
        generator: CPU stream for restarts.
    """
    size = start.numel()
    basis = Basis(size, start.dtype, start.device)
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    part = 0  # where in the basis the part since the last restart begins
    vector = _unit(start.double())
    while True:
        basis.append(vector.to(start.dtype))
        q = basis.row(basis.length - 1)
        w = multiply(q).double()
        diagonal.append(tensor_dot(w, q))
        w = basis.orthogonalized(w)
        beta = math.sqrt(tensor_dot(w, w))
        values, vectors = _eigenpairs(diagonal, off_diagonal)
        chosen = wanted(values, which)[:k]
        floor = rounding_floor(values, start.dtype)
        steps = len(diagonal)
        if steps in (max_steps, size):
            break
        settled = steps >= k and _settled(values, vectors, chosen, beta, tolerance, floor)
        invariant = beta <= floor
        if settled:
            own, own_vectors = _eigenpairs(diagonal[part:], off_diagonal[part:])
            best = wanted(own, which)[:1]
            exceeds = _worth(own[best], which)[0] > _worth(values[chosen[-1:]], which)[0] + floor
            if invariant and part > 0 and not exceeds:
                break
            if not invariant and _settled(own, own_vectors, best, beta, tolerance, floor):
                break
        if invariant:
            part = steps
            off_diagonal.append(0.0)
            noise = torch.randn(size, generator=generator, dtype=torch.float64).to(start.device)
            vector = _unit(basis.orthogonalized(noise))
        else:
            off_diagonal.append(beta)
            vector = w / beta
    return Ritz(values[chosen], vectors[:, chosen], basis)


def _eigenpairs(diagonal: list[float], off_diagonal: list[float]) -> tuple[Coefficients, Coefficients]:
    values, vectors = eigh_tridiagonal(np.array(diagonal), np.array(off_diagonal))
    return values.astype(np.float64), vectors.astype(np.float64)


def _settled(
    values: Coefficients,
    vectors: Coefficients,
    chosen: NDArray[np.intp],
    beta: float,
    tolerance: float,
    floor: float,
) -> bool:
    estimates = beta * np.abs(vectors[-1, chosen])
    return bool(np.all(estimates <= np.maximum(tolerance * np.abs(values[chosen]), floor)))


def _worth(values: Coefficients, which: Which) -> Coefficients:
    if which == "magnitude":
        return np.abs(values)
    return values if which == "largest" else -values


def _unit(vector: Tensor) -> Tensor:
    return vector / math.sqrt(tensor_dot(vector, vector))
