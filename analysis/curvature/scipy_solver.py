"""ARPACK's restarted Lanczos through scipy, as a second opinion."""

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor

from analysis.core.measure import Watch
from analysis.curvature.lanczos import Which
from analysis.curvature.operator import CurvatureOperator
from bilora.errors import UserError
from bilora.seeds import generator_for

ENDS: dict[Which, Literal["LM", "LA", "SA", "BE"]] = {
    "magnitude": "LM",
    "largest": "LA",
    "smallest": "SA",
    "both": "BE",
}


def eigsh_vectors(
    operator: CurvatureOperator,
    k: int,
    which: Which,
    tolerance: float,
    max_products: int,
    seed: int,
    watch: Watch | None = None,
) -> list[Tensor]:
    """The ``k`` Ritz vectors that ``eigsh`` ends with, as good as they are after ``max_products``.

    Raises:
        UserError: k is the whole space, which ARPACK cannot do, or it gave up, or not one pair converged.
    """
    if k >= operator.size:
        raise UserError(f"ARPACK finds fewer than all {operator.size} eigenvalues: use backend='lanczos'")
    inner = operator.as_linear_operator()

    def matvec(vector: NDArray[np.float64]) -> NDArray[np.float64]:
        product = inner.matvec(vector)
        if watch is not None:
            watch(operator.products, max_products, "")
        return product

    counted = LinearOperator(shape=inner.shape, matvec=matvec, dtype=inner.dtype)
    start = torch.randn(operator.size, generator=generator_for("scipy", seed), dtype=torch.float64)
    krylov = min(operator.size, max(2 * k + 1, 20))
    rounds = max(1, (max_products - krylov) // max(1, krylov - k))  # ARPACK counts restarts, not products
    try:
        _, vectors = eigsh(
            counted, k, which=ENDS[which], v0=start.numpy(), tol=tolerance / 10, ncv=krylov, maxiter=rounds
        )
    except ArpackNoConvergence as error:
        vectors = error.eigenvectors
        if vectors.shape[1] == 0:
            raise UserError(f"ARPACK converged on no pair within {max_products} products: allow more") from error
    except ArpackError as error:
        raise UserError(f"ARPACK gave up ({error}): use backend='lanczos'") from error
    return [torch.from_numpy(np.ascontiguousarray(column)) for column in vectors.T]
