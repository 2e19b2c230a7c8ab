"""The plane of two eigenvectors of the Hessian (Yao et al. 2020, PyHessian; Chatzimichailidis et al. 2019).

w(x, y) = W + x·v_1 + y·v_2,     H·v_i = λ_i·v_i,  ‖v_i‖ = 1
L(x, y) ≈ L(W) + ⟨∇L, x·v_1 + y·v_2⟩ + ½·(λ_1·x² + λ_2·y²)
"""

import math
from typing import Literal, get_args

import numpy as np

from analysis.core.measure import Watch
from analysis.core.objective import Objective
from analysis.core.space import WeightSpace
from analysis.core.vectors import Vector, norm, scaled
from analysis.curvature.eigen import Spectrum, top_eigenvalues
from analysis.landscape.plane import Plane, cosine, like
from bilora.errors import UserError

Ends = Literal["top", "both"]


def eigen_plane(space: WeightSpace, spectrum: Spectrum, *, which: Ends = "top", rise: float = 1.0) -> Plane:
    """The plane of two eigenvectors of a spectrum through the space's weights.

    An eigenvector has no sign: it is turned so that its entry of largest magnitude is positive, for methods whose
    eigenvectors resemble each other to share an orientation.

    Args:
        space: the space that the spectrum was measured in, at the same weights.
        spectrum: of :func:`analysis.curvature.top_eigenvalues` with ``vectors=True`` and k of 2 or more.
        which: ``"top"``: the first two pairs of the spectrum, which are those that its own ``which`` wanted most;
            ``"both"``: the largest and the most negative eigenvalue in it.
        rise: loss rise of the quadratic model at the edge of the window, along the axis of larger |λ|: the window is
            ±√(2·rise/|λ|), at most ±‖W‖, with equal scales on both axes.

    Returns:
        A :class:`Plane` of kind ``eigenvectors``; coordinates are distances ‖w − W‖.

    Raises:
        UserError: a spectrum without vectors, with one pair alone, of another space, or whose wanted pairs have not
            converged; ``which="both"`` with neither a negative eigenvalue nor the lower end in the spectrum; a rise
            that is not positive.
    """
    if which not in get_args(Ends):
        raise UserError(f"which is {which!r}: choose top or both")
    if not (rise > 0 and math.isfinite(rise)):
        raise UserError(f"rise is {rise}: the window needs a positive finite loss rise")
    first, second = _chosen(spectrum, which)
    values = float(spectrum.values[first]), float(spectrum.values[second])
    u, v = (like(space, _turned(_fitting(space, spectrum.vectors[i]))) for i in (first, second))
    size = norm({name: p.detach() for name, p in space.parameters.items()}) or 1.0
    steepest = max(abs(value) for value in values)
    radius = min(math.sqrt(2 * rise / steepest), size) if steepest else size
    return Plane(
        kind="eigenvectors",
        axes=(u, v),
        origin=None,
        axis_labels=(
            f"distance along eigenvector 1 (λ = {values[0]:.3g})",
            f"distance along eigenvector 2 (λ = {values[1]:.3g})",
        ),
        cosine=cosine(u, v),
        window=(-radius, radius, -radius, radius),
    )


def measured_eigen_plane(
    objective: Objective,
    space: WeightSpace,
    *,
    which: Ends = "top",
    rise: float = 1.0,
    tolerance: float = 1e-2,
    max_products: int = 100,
    seed: int = 0,
    watch: Watch | None = None,
) -> Plane:
    """:func:`eigen_plane` of eigenvectors computed here.

    Args:
        objective: the mean loss.
        space: where; its weights are bit-identical afterwards.
        which: ``"top"``: the two eigenvalues of largest magnitude; ``"both"``: the largest and the most negative.
        rise: as :func:`eigen_plane`.
        tolerance, max_products, seed, watch: as :func:`analysis.curvature.top_eigenvalues`.

    Raises:
        UserError: as :func:`eigen_plane` and :func:`analysis.curvature.top_eigenvalues`.
    """
    spectrum = top_eigenvalues(
        objective,
        space,
        2,
        which="both" if which == "both" else "magnitude",
        tolerance=tolerance,
        max_products=max_products,
        seed=seed,
        vectors=True,
        watch=watch,
    )
    return eigen_plane(space, spectrum, which=which, rise=rise)


def _chosen(spectrum: Spectrum, which: Ends) -> tuple[int, int]:
    """Numbers of the two pairs, converged."""
    values = spectrum.values
    if len(values) < 2:
        raise UserError("the spectrum holds one eigenpair: a plane needs k of 2 or more")
    if not spectrum.vectors:
        raise UserError("the spectrum holds no eigenvectors: compute it with vectors=True")
    chosen = (0, 1)
    if which == "both":
        chosen = (int(np.argmax(values)), int(np.argmin(values)))
        if values[chosen[1]] >= 0 and spectrum.which not in ("both", "smallest"):
            raise UserError(f"none of the {len(values)} eigenvalues is negative: compute them with which='both'")
        if chosen[0] == chosen[1]:
            raise UserError("all eigenvalues of the spectrum are equal: it has no two ends")
    for i in chosen:
        if not spectrum.converged[i]:
            raise UserError(
                f"eigenpair {i + 1} (λ = {values[i]:.3g}) has not converged, its residual is "
                f"{spectrum.residuals[i]:.1e}: raise max_products or the tolerance"
            )
    return chosen


def _fitting(space: WeightSpace, vector: Vector) -> Vector:
    if vector.keys() != space.parameters.keys():
        raise UserError(f"the spectrum was measured in another space than {space.name}: give one of the same weights")
    try:
        return space.aligned(vector)
    except ValueError as error:
        raise UserError(f"the spectrum does not fit the {space.name} space: {error}") from error


def _turned(vector: Vector) -> Vector:
    """Of norm 1, in float64, with the entry of largest magnitude positive (the first one of several)."""
    flattened = [tensor.reshape(-1) for tensor in vector.values()]
    peaks = [float(flat[flat.abs().argmax()]) for flat in flattened]
    sign = math.copysign(1.0, max(peaks, key=abs))
    return scaled({name: tensor.double() for name, tensor in vector.items()}, sign / norm(vector))
