"""Thick-restart block Lanczos with full reorthogonalisation, for a symmetric operator on flat vectors.

``H·Q = Q·T + F`` with orthonormal Q, ``T = Qᵀ·H·Q`` and a remainder F ⟂ Q that vanishes but for the last block: with
its factors ``F_last = N·R``, N orthonormal, a Ritz pair ``(theta, y = Q·s)`` of T satisfies ``‖H·y − theta·y‖ =
‖R·s_last‖`` (Paige 1971; Parlett, The Symmetric Eigenvalue Problem, chapter 13), known without another product. N is
the next block. When the basis is full it is replaced by Ritz vectors (Wu & Simon, SIAM J. Matrix Anal. Appl. 22, 2000).

The products H·Q are kept beside Q. What is returned is therefore checked against them, ``‖(H·Q)·s − theta·Q·s‖``, which
relies on the operator being linear and on nothing else.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from analysis.core.measure import Watch
from analysis.core.vectors import tensor_dot
from analysis.curvature.basis import Basis, Coefficients
from analysis.curvature.operator import SymmetricOperator

Which = Literal["magnitude", "largest", "smallest", "both"]


@dataclass(frozen=True, eq=False)
class Ritz:
    """The wanted Ritz pairs, the most wanted first."""

    values: Coefficients  # (k,)
    errors: Coefficients  # (k,) ‖H·y − theta·y‖ from the products that made y
    coefficients: Coefficients  # (length of basis, k)
    basis: Basis
    floor: float  # error at which a pair is exact as far as products can tell
    interrupted: bool

    def vector(self, index: int) -> Tensor:
        """Ritz vector ``index``, (size,), float64, of length 1."""
        return _unit(self.basis.combination(self.coefficients[:, index]))


def wanted(values: Coefficients, which: Which) -> NDArray[np.intp]:
    """Indices of ``values`` from the most to the least wanted; for ``"both"`` the largest, the smallest, and so on."""
    if which == "magnitude":
        return np.argsort(-np.abs(values), kind="stable")
    falling = np.argsort(-values, kind="stable")
    if which == "both":
        turns = np.stack([falling, falling[::-1]], axis=1).reshape(-1)
        return turns[: len(values)]
    return falling if which == "largest" else np.argsort(values, kind="stable")


def rounding_floor(values: Coefficients, dtype: torch.dtype) -> float:
    """Residual norm below which a pair is exact as far as products in ``dtype`` can tell."""
    return float(50 * torch.finfo(dtype).eps * np.abs(values).max())


def lanczos(
    operator: SymmetricOperator,
    start: Tensor,
    k: int,
    *,
    which: Which,
    tolerance: float,
    max_products: int,
    max_basis: int,
    generator: torch.Generator,
    watch: Watch | None = None,
) -> Ritz:
    """The ``k`` wanted Ritz pairs, iterated until the residual of each is ≤ ``tolerance·|theta|``.

    A Krylov space holds as many vectors of each eigenspace as its block has rows, and only of eigenspaces in which
    these have a part. So when it turns out to be invariant (F vanishes), the iteration goes on from a random vector
    orthogonal to all before, and ends only once such a part has brought nothing that is wanted.

    Args:
        operator: the symmetric operator.
        start: first block, (b, size), not zero.
        k: how many, at most the size.
        which: largest magnitude, largest, smallest (most negative), or both ends in turn.
        tolerance: relative residual.
        max_products: at most, at least ``k``.
        max_basis: vectors kept at most, at least ``k + 2·b + 1``; their products take as much memory again.
        generator: CPU stream for restarts.
        watch: told of products and the worst residual estimate.

    Returns:
        What has been found, also when a limit ended the iteration or, once there is something, ``KeyboardInterrupt``.
    """
    size, dtype, device = operator.size, operator.dtype, operator.device
    basis, images = Basis(size, dtype, device), Basis(size, dtype, device)
    T: Coefficients = np.zeros((0, 0))
    part = 0  # where in the basis the part since the last random restart begins
    done = 0
    front, _ = _orthonormal([row.double() for row in start], 0.0)
    interrupted = False
    try:
        while True:
            if basis.length + len(front) > max_basis:
                room = max_basis - 2 * len(front)
                kept, locked = _restart(T, part, k, room, which)
                basis, images, T, part = basis.compressed(kept), images.compressed(kept), kept.T @ T @ kept, locked
            front = front[: max_products - done]
            rows = torch.stack([row.to(dtype) for row in front])
            made = operator.matmat(rows)
            done += len(rows)
            begin = len(T)
            for row, image in zip(rows, made, strict=True):
                basis.append(row)
                images.append(image)
            T, rest = _extended(T, basis, made)
            values, vectors = np.linalg.eigh(T)
            floor = rounding_floor(values, dtype)
            front, coupling = _orthonormal(rest, floor)
            chosen = wanted(values, which)[:k]
            estimates = np.linalg.norm(coupling.T @ vectors[begin:], axis=0)
            if watch is not None:
                worst = (estimates[chosen] / np.maximum(np.abs(values[chosen]), floor or 1)).max()
                watch(done, max_products, f"residual {worst:.1e}" if len(T) >= k else "")
            if done >= max_products or len(T) == size:
                break
            if len(T) >= k and _settled(estimates, values, chosen, tolerance, floor):
                errors = basis.residual_norms(images, vectors[:, chosen], values[chosen])
                if _settled(errors, values[chosen], np.arange(k), tolerance, floor):
                    if front:
                        complete = _own_settled(T[part:, part:], coupling, which, tolerance, floor)
                    else:
                        complete = part > 0 and _nothing_new(T, part, values[chosen], which, floor)
                    if complete:
                        break
            if not front:
                part = len(T)
                front, _ = _orthonormal([_random_outside(basis, size, generator)], 0.0)
    except KeyboardInterrupt:
        if len(T) < 1:
            raise
        interrupted = True
    basis.truncate(len(T))
    images.truncate(len(T))
    values, vectors = np.linalg.eigh(T)
    chosen = wanted(values, which)[:k]
    values, vectors, floor = values[chosen], vectors[:, chosen], rounding_floor(values, dtype)
    errors = basis.residual_norms(images, vectors, values)
    return Ritz(values, errors, vectors, basis, floor, interrupted)


def _extended(T: Coefficients, basis: Basis, made: Tensor) -> tuple[Coefficients, list[Tensor]]:
    """T with the products of the basis' last rows, and what of these lies outside the basis."""
    old, new = len(T), len(made)
    larger = np.zeros((old + new, old + new))
    larger[:old, :old] = T
    rest = []
    for i, image in enumerate(made):
        outside = image.double()
        coefficients = basis.project_out(outside).cpu().numpy()
        larger[old + i] = coefficients
        larger[:old, old + i] = coefficients[:old]
        rest.append(outside)
    corner = larger[old:, old:]
    larger[old:, old:] = (corner + corner.T) / 2
    return larger, rest


def _orthonormal(rows: Sequence[Tensor], floor: float) -> tuple[list[Tensor], Coefficients]:
    """Orthonormal rows N and R, (rows, N), with ``rows = R·N``; what is no longer than ``floor`` counts as nothing."""
    found: list[Tensor] = []
    coupling = np.zeros((len(rows), len(rows)))
    for i, row in enumerate(rows):
        rest = row
        for _ in range(2):
            for j, other in enumerate(found):
                share = tensor_dot(rest, other)
                coupling[i, j] += share
                rest = torch.add(rest, other, alpha=-share)
        length = math.sqrt(tensor_dot(rest, rest))
        if length > floor:
            coupling[i, len(found)] = length
            found.append(rest / length)
    return found, coupling[:, : len(found)]


def _settled(
    errors: Coefficients, values: Coefficients, chosen: NDArray[np.intp], tolerance: float, floor: float
) -> bool:
    return bool(np.all(errors[chosen] <= np.maximum(tolerance * np.abs(values[chosen]), floor)))


def _own_settled(own: Coefficients, coupling: Coefficients, which: Which, tolerance: float, floor: float) -> bool:
    """Whether the most wanted pair, at each end, of the part since the last random restart is settled."""
    values, vectors = np.linalg.eigh(own)
    best = wanted(values, which)[: 2 if which == "both" else 1]
    estimates = np.linalg.norm(coupling.T @ vectors[-len(coupling) :], axis=0)
    return _settled(estimates, values, best, tolerance, floor)


def _nothing_new(T: Coefficients, part: int, found: Coefficients, which: Which, floor: float) -> bool:
    """Whether the wanted values ``found`` were all there before the last random restart."""
    before = np.linalg.eigvalsh(T[:part, :part]).astype(np.float64)
    before = before[wanted(before, which)[: len(found)]]
    return len(before) == len(found) and bool(np.all(np.abs(np.sort(before) - np.sort(found)) <= floor))


def _restart(T: Coefficients, part: int, k: int, room: int, which: Which) -> tuple[Coefficients, int]:
    """Orthonormal coefficients of what stays in the basis, ``room`` columns at most, and where its last part begins.

    What lies before the last random restart is invariant: its Ritz pairs are exact and are kept by themselves.
    """
    before, own = _ritz(T[:part, :part], which)[:, :k], _ritz(T[part:, part:], which)
    locked = before.shape[1]
    own = own[:, : min(max(k + (room - locked - k) // 2, 1), room - locked)]
    kept = np.zeros((len(T), locked + own.shape[1]))
    kept[:part, :locked] = before
    kept[part:, locked:] = own
    return kept, locked


def _ritz(T: Coefficients, which: Which) -> Coefficients:
    values, vectors = np.linalg.eigh(T)
    return vectors[:, wanted(values, which)]


def _random_outside(basis: Basis, size: int, generator: torch.Generator) -> Tensor:
    noise = torch.randn(size, generator=generator, dtype=torch.float64).to(basis.device)
    basis.project_out(noise)
    return noise


def _unit(vector: Tensor) -> Tensor:
    return vector / math.sqrt(tensor_dot(vector, vector))
