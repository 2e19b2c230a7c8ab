"""The spaces in which a full matrix is largest, as factors: of a gradient, or of a Hessian eigenvector.

    M ≈ U_r·Σ_r·V_rᵀ   →   B = U_r·Σ_r,  A = V_rᵀ

so that whatever compares factors compares them too: ``subspace_overlap(primary, leading_factors(gradient, primary))``.
"""

from collections.abc import Mapping

from analysis.core.factors import Factors
from analysis.core.vectors import Vector
from analysis.subspace.lowrank import leading_part
from bilora.errors import UserError


def leading_factors(vector: Vector, like: Mapping[str, Factors], rank: int | None = None) -> dict[str, Factors]:
    """Layer → factors of the truncated singular value decomposition of its part of ``vector``.

    Args:
        vector: of the full space: ``<layer>.weight`` → (m, n). A gradient (``objective.gradient(space)``), or an
            eigenvector (``top_eigenvalues(…, vectors=True).vectors[0]``).
        like: the layers wanted; their ranks count where ``rank`` is None.
        rank: of all layers.

    Raises:
        UserError: the vector lacks a layer, or the rank is below 1.
    """
    if rank is not None and rank < 1:
        raise UserError(f"rank is {rank}: choose 1 or more")
    missing = next((layer for layer in like if f"{layer}.weight" not in vector), None)
    if missing is not None:
        raise UserError(f"the vector has no {missing}.weight: take one of the full space of the same adapter")
    found = {}
    for layer, factors in like.items():
        part = leading_part(vector[f"{layer}.weight"], factors.A.shape[0] if rank is None else rank)
        found[layer] = Factors(part.left, part.right, 1.0)
    return found
