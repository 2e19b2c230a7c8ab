"""Intruder dimensions: new directions among the strongest of a merged weight (Shuttleworth et al., arXiv 2410.21228).

Of the k left singular vectors u_i of W0 + s·B·A with the largest singular values σ_i, those are intruders whose largest
|cosine| with *any* left singular vector of W0 (of a singular value above 0) is below a threshold. Reported are how many
there are and their share Σ_intruders σ_i² / Σ_i σ_i² of the energy of the k.

W0 is used in matrix–vector products alone. The triplets come from ARPACK. Whether u meets a left singular vector of W0
is read off the spectral measure of u under W0·W0ᵀ, which t Lanczos steps from u approximate by Ritz values θ_i with
weights ω_i. An atom of the measure is the squared cosine of u with the nearest vector of that eigenspace, and

- no atom at λ ∈ [θ_i, θ_{i+1}] is larger than ω_i + ω_{i+1} (Chebyshev, Markov, Stieltjes): where all these are below
  the threshold's square, u is an intruder;
- where a Ritz pair has converged and ω_i reaches the threshold's square, u is none.

What neither decides within ``max_steps`` is reported as undecided and counted as no intruder.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal
from scipy.sparse.linalg import LinearOperator, svds
from torch import Tensor

from analysis.core.factors import Factors
from analysis.subspace.products import ratio
from bilora.errors import UserError

Array = NDArray[np.float64]

CONVERGED = 1e-5
"""Residual of a Ritz pair over its value at which it counts as an eigenpair."""
ZERO = {torch.float64: 1e-12, torch.float32: 1e-6}
"""Ritz values below this share of the largest belong to what W0ᵀ maps to 0, by the dtype of products."""
SMALL = 1 << 22
"""Entries up to which W0 is multiplied in float64, in a copy."""


@dataclass(frozen=True, eq=False)
class Intruders:
    """The strongest directions of one merged weight.

    Attributes:
        singular_values: (k,) σ of W0 + s·B·A, falling.
        intruder: (k,) whether each is one.
        undecided: (k,) whether the steps did not suffice to tell.
    """

    singular_values: Array
    intruder: NDArray[np.bool_]
    undecided: NDArray[np.bool_]

    @property
    def count(self) -> int:
        """Number of intruders."""
        return int(self.intruder.sum())

    @property
    def energy_share(self) -> float:
        """Their part of Σ σ²."""
        squares = self.singular_values**2
        return ratio(float(squares[self.intruder].sum()), float(squares.sum()))


def intruder_dimensions(
    weight: Tensor, update: Factors, *, k: int = 10, threshold: float = 0.5, max_steps: int = 1000, seed: int = 0
) -> Intruders:
    """Intruders among the ``k`` strongest left singular vectors of ``weight + s·B·A``.

    Args:
        weight: W0, (m, n); not changed, and copied only where it is small or in half precision.
        update: the adapter's factors.
        k: how many are looked at; at most min(m, n) − 1.
        threshold: |cosine| with a left singular vector of W0 below which a direction is new.
        max_steps: Lanczos steps for each vector.
        seed: of ARPACK's start.

    Raises:
        UserError: a setting out of range, or shapes that do not fit.
    """
    m, n = weight.shape
    if (update.B.shape[0], update.A.shape[1]) != (m, n):
        raise UserError(
            f"the update is {update.B.shape[0]} × {update.A.shape[1]} and the weight {m} × {n}: give those of one layer"
        )
    if not 1 <= k < min(m, n):
        raise UserError(f"k is {k}: choose from 1 to {min(m, n) - 1}, below the smaller side of the weight")
    if not 0 < threshold <= 1:
        raise UserError(f"threshold is {threshold}: choose a cosine above 0 and at most 1")
    dtype = torch.float64 if weight.dtype == torch.float64 or weight.numel() <= SMALL else torch.float32
    W = weight.detach().to(dtype)
    B, A = (t.detach().to(W) for t in (update.scale * update.B, update.A))
    if not bool(W.isfinite().all() and A.isfinite().all() and B.isfinite().all()):
        nothing = np.zeros(k, dtype=bool)
        return Intruders(np.full(k, math.nan), nothing, ~nothing)
    merged = LinearOperator(
        (m, n),
        dtype=np.float64,
        matvec=lambda x: _product(W, x) + _product(B, _product(A, x)),
        rmatvec=lambda y: _product(W.T, y) + _product(A.T, _product(B.T, y)),
    )
    U, values, _ = svds(merged, k=k, random_state=np.random.default_rng(seed), return_singular_vectors="u")
    order = np.argsort(-values)
    strongest: Array = np.asarray(values[order], dtype=np.float64)
    U = U[:, order]
    verdicts = [_is_new(W, U[:, i], threshold**2, max_steps) for i in range(k)]
    return Intruders(strongest, np.array([v is True for v in verdicts]), np.array([v is None for v in verdicts]))


def all_intruders(
    weights: Mapping[str, Tensor], updates: Mapping[str, Factors], *, k: int = 10, threshold: float = 0.5
) -> dict[str, Intruders]:
    """:func:`intruder_dimensions` of every layer of ``updates``; of narrow layers with as many directions as they have.

    Raises:
        UserError: a layer without weight, or as :func:`intruder_dimensions`.
    """
    found = {}
    for layer, update in updates.items():
        if layer not in weights:
            raise UserError(f"the base model has no weight for {layer}: give the base the adapter was trained on")
        most = min(weights[layer].shape) - 1
        found[layer] = intruder_dimensions(weights[layer], update, k=min(k, most), threshold=threshold)
    return found


def _product(matrix: Tensor, vector: Array) -> Array:
    found: Array = (matrix @ torch.from_numpy(np.asarray(vector).ravel()).to(matrix)).double().cpu().numpy()
    return found


def _is_new(W: Tensor, u: Array, mass: float, max_steps: int) -> bool | None:
    """Whether no eigenvector of W·Wᵀ holds ``mass`` of ``u``; None if the steps do not tell."""
    basis: list[Array] = [u / np.linalg.norm(u)]
    alphas: list[float] = []
    betas: list[float] = []
    zero = ZERO[W.dtype]
    looks = {2**i for i in range(2, 30)} | {max_steps}
    for step in range(1, min(max_steps, len(u)) + 1):
        v = _product(W, _product(W.T, basis[-1]))
        alphas.append(float(v @ basis[-1]))
        Q = np.stack(basis)
        for _ in range(2):  # once leaves rounding of what was taken away
            v -= Q.T @ (Q @ v)
        beta = float(np.linalg.norm(v))
        scale = max(alphas[0], *map(abs, alphas), 1e-300)
        ended = beta <= zero * scale or step == len(u)
        if step in looks or ended:
            verdict = _verdict(np.array(alphas), np.array(betas), 0.0 if ended else beta, mass, zero)
            if verdict is not None or ended:
                return verdict
        betas.append(beta)
        basis.append(v / beta)
    return None


def _verdict(alphas: Array, betas: Array, beta: float, mass: float, zero: float) -> bool | None:
    theta, vectors = eigh_tridiagonal(alphas, betas)
    weights, residuals = vectors[0] ** 2, beta * np.abs(vectors[-1])
    largest = max(float(theta[-1]), 1e-300)
    above = theta > zero * largest
    settled = ~above | (residuals <= CONVERGED * theta)
    if bool((settled & above & (weights >= mass)).any()):
        return False
    weights = np.where(above, weights, 0.0)  # ‖Wᵀ·y‖² is the Ritz value: this part lies outside the range of W
    if settled.all():
        return True
    pairs = np.concatenate([[weights[0]], weights[:-1] + weights[1:], [weights[-1]]])
    return True if bool((pairs < mass).all()) else None
