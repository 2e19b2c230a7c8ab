"""The largest Hessian eigenvalues, each with its true residual."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pydantic
import torch
from numpy.typing import NDArray

from analysis.core.measure import Interrupted, Measure, Watch
from analysis.core.memory import free_memory
from analysis.core.objective import Objective
from analysis.core.result import row
from analysis.core.space import WeightSpace
from analysis.core.trained import Trained
from analysis.core.vectors import Vector
from analysis.curvature.basis import Coefficients
from analysis.curvature.differences import Differences
from analysis.curvature.factory import Curvature, curvature_operator
from analysis.curvature.graphs import Graphs
from analysis.curvature.lanczos import Which, lanczos, rounding_floor, wanted
from analysis.curvature.operator import CurvatureOperator
from analysis.curvature.pairs import rayleigh, ritz_pairs, with_exact_errors
from analysis.curvature.pyhessian_solver import pyhessian_eigenpairs
from analysis.curvature.scipy_solver import eigsh_vectors
from analysis.curvature.settings import CurvatureSettings
from analysis.curvature.start import Start, first_block
from bilora.errors import UserError
from bilora.seeds import generator_for

Backend = Literal["lanczos", "pyhessian", "scipy"]

BASIS_BUDGET = 4 << 30
"""Bytes that Lanczos vectors and their products take at most, unless k needs more."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Eigenvalues of the Hessian of the mean loss in one space, the most wanted first."""

    values: Coefficients  # (k,), fewer where ARPACK found fewer
    residuals: Coefficients  # (k,) ‖H·v − λ·v‖/|λ|, from products
    converged: NDArray[np.bool_]  # (k,) residual ≤ tolerance, or zero as far as products in the weights' dtype can tell
    products: int  # operator–vector products, those of the residuals included
    space: str
    split: str
    backend: str
    which: str
    label: str = ""  # what the operator is, where it is not the exact Hessian
    vectors: tuple[Vector, ...] = ()  # k unit vectors, if asked for
    part: str = ""  # which block of the space

    def rows(self) -> list[dict[str, Any]]:
        """``eigenvalue`` with its residual and ``converged`` (1 or 0) for each rank from 1, and ``products``."""
        kind = " ".join(word for word in (self.label, "" if self.which == "magnitude" else self.which) if word)
        common: dict[str, Any] = {"space": self.space, "split": self.split, "kind": kind, "layer": self.part}
        rows = []
        for i, value in enumerate(self.values):
            rows.append(row("spectrum", "eigenvalue", value, index=i + 1, residual=float(self.residuals[i]), **common))
            rows.append(row("spectrum", "converged", float(self.converged[i]), index=i + 1, **common))
        return [*rows, row("spectrum", "products", self.products, **common)]


def top_eigenvalues(
    objective: Objective,
    space: WeightSpace,
    k: int = 5,
    *,
    tolerance: float = 1e-2,
    max_products: int = 100,
    which: Which = "magnitude",
    seed: int = 0,
    start: Start | Sequence[Vector] = "gradient",
    block: int = 1,
    max_basis: int | None = None,
    curvature: Curvature = "hessian",
    backend: Backend = "lanczos",
    graphs: Graphs = "auto",
    autocast: torch.dtype | None = None,
    differences: Differences | None = None,
    vectors: bool = False,
    offload: bool = False,
    watch: Watch | None = None,
) -> Spectrum:
    """The top ``k`` eigenvalues of ∇²L at the space's weights, by Lanczos with full reorthogonalisation.

    Iterates until the residual of every wanted pair is ≤ ``tolerance·|λ|``. The error of an eigenvalue is at most its
    residual norm, and about its square over the gap to the next eigenvalue. A small residual shows an eigenpair, not
    that no other is wanted more: a Krylov space meets an eigenspace in ``block`` directions, so that an eigenvalue of
    higher multiplicity (the zero of a singular matrix, with ``which="smallest"``) may be listed ``block`` times only.

    Args:
        objective: the mean loss.
        space: where, and with respect to which weights.
        k: how many.
        tolerance: relative residual ‖Hv − λv‖/|λ| at which a pair counts as converged.
        max_products: operator–vector products at most.
        which: largest magnitude, largest, smallest (most negative), or both ends in turn.
        seed: of the random start or restarts.
        start: first Lanczos vector. The gradient saves products and costs one gradient at most. Eigenvectors of a
            nearby point (another adapter of the same base model: ``Spectrum.vectors``) save more: give them in their
            order, for the last get the largest share. A little noise is added: either may be blind to what is wanted.
        block: Lanczos vectors a step; above 1 finds multiple eigenvalues, for more products.
        max_basis: Lanczos vectors kept before a restart, each with its product. Default: all, up to 4 GiB, and on a
            GPU up to a quarter of it.
        curvature: ``"hessian"``, or ``"ggn"`` for the generalised Gauss–Newton matrix.
        backend: a second opinion on the same operator or objective. ``"pyhessian"`` runs PyHessian's power iteration
            (``which="magnitude"`` of the Hessian alone; ``tolerance`` is then the change of the eigenvalue between two
            of its iterations and ``max_products`` the iterations for each pair); ``"scipy"`` runs ARPACK, which counts
            restarts, may make a few products more, and returns no pair but those it finds converged. The residuals
            are ours in any case.
        graphs: keep the gradient's graphs between products, rebuild them, or keep as many as leave half of the
            memory free.
        autocast: dtype in which the model runs, with the float32 weights as masters.
        differences: ``"central"`` or ``"one-sided"`` differences of the gradient instead of exact products, for a quick
            look: residuals stay near 1e-2. With them, and under autocast, residuals are taken from exact products in
            the weights' own precision, one a pair.
        vectors: return the eigenvectors as well: ``k`` times the memory of the weights.
        offload: keep all vectors, also those returned, in host memory, for a model on a GPU that has room for little
            more: it holds one vector and one product at a time.
        watch: told of (products so far, ``max_products``, the worst residual).

    Returns:
        A :class:`Spectrum`. Pairs that did not reach the tolerance are in it, with ``converged`` false.

    Raises:
        UserError: a setting out of range, or a loss that is not finite or does not depend on the space.
        Interrupted: ``KeyboardInterrupt`` after the first product of our own Lanczos; its ``result`` is the spectrum so
            far. Residuals of differences and under autocast are not known then: NaN, and nothing has converged.
    """
    _check(space, k, tolerance, max_products, which, backend, start, block, max_basis, curvature, differences, autocast)
    inexact = differences is not None or autocast is not None
    with curvature_operator(
        objective, space, curvature, graphs=graphs, autocast=autocast, differences=differences, offload=offload
    ) as operator:
        if backend == "lanczos":
            generator = generator_for("lanczos", seed)
            ritz = lanczos(
                operator,
                first_block(operator, start, block, generator),
                k,
                which=which,
                tolerance=tolerance,
                max_products=max_products,
                max_basis=max_basis or _default_basis(operator, k, block, max_products),
                generator=generator,
                watch=watch,
            )
            found = ritz_pairs(ritz, vectors=vectors or inexact)
        elif backend == "scipy":
            found = rayleigh(operator, eigsh_vectors(operator, k, which, tolerance, max_products, seed, watch))
        else:
            theirs, named, made = pyhessian_eigenpairs(objective, space, k, tolerance, max_products, seed, watch)
            found = replace(rayleigh(operator, [space.flat(v) for v in named], theirs), products=made)
        label = operator.label
    if inexact:
        found = with_exact_errors(objective, space, curvature, found, offload=offload)
    order = wanted(found.values, which)
    values, errors = found.values[order], found.errors[order]
    with np.errstate(divide="ignore", invalid="ignore"):
        residuals = np.where(errors == 0, 0.0, errors / np.abs(values))
    floor = found.floor or rounding_floor(values, operator.dtype)
    spectrum = Spectrum(
        values=values,
        residuals=residuals,
        converged=(residuals <= tolerance) | ((errors <= floor) & (np.abs(values) <= floor)),
        products=operator.products + found.products,
        space=space.name,
        part=space.part,
        split=objective.name,
        backend=backend,
        which=which,
        label=label,
        vectors=tuple(space.named_vector(found.vectors[i]) for i in order) if vectors else (),
    )
    if found.interrupted:
        raise Interrupted(spectrum)
    return spectrum


def _default_basis(operator: CurvatureOperator, k: int, block: int, max_products: int) -> int:
    itemsize = torch.finfo(operator.dtype).bits // 8
    budget = BASIS_BUDGET
    if operator.device.type == "cuda":
        budget = max(budget, free_memory(operator.device) // 2)  # graphs may take as much
    affordable = budget // (2 * operator.size * itemsize)
    return max(2 * k + 3 * block, min(max_products, affordable))


def _check(
    space: WeightSpace,
    k: int,
    tolerance: float,
    max_products: int,
    which: str,
    backend: str,
    start: Start | Sequence[Vector],
    block: int,
    max_basis: int | None,
    curvature: str,
    differences: str | None,
    autocast: torch.dtype | None,
) -> None:
    if which not in ("magnitude", "largest", "smallest", "both"):
        raise UserError(f"which is {which!r}: choose magnitude, largest, smallest or both")
    if isinstance(start, str) and start not in ("gradient", "random"):
        raise UserError(f"start is {start!r}: choose gradient or random, or give vectors")
    if len(start) == 0:
        raise UserError("start holds no vector: choose gradient or random, or give eigenvectors of a nearby point")
    if backend not in ("lanczos", "pyhessian", "scipy"):
        raise UserError(f"backend is {backend!r}: choose lanczos, pyhessian or scipy")
    problem = _combination(which, k, backend, curvature, differences, autocast)
    if problem:
        raise UserError(problem)
    if not 1 <= k <= space.size:
        raise UserError(f"k is {k}: choose from 1 to {space.size}, the size of the {space.name} space")
    if not 0 < tolerance < 1:
        raise UserError(f"tolerance is {tolerance}: choose a relative residual between 0 and 1")
    if max_products < k:
        raise UserError(f"max_products is {max_products}: {k} pairs need at least {k}")
    if not 1 <= block <= space.size:
        raise UserError(f"block is {block}: choose from 1 to {space.size}, the size of the {space.name} space")
    if max_basis is not None and max_basis < k + 2 * block + 1:
        raise UserError(f"max_basis is {max_basis}: {k} pairs in blocks of {block} need at least {k + 2 * block + 1}")


def _combination(
    which: str, k: int, backend: str, curvature: str, differences: str | None, autocast: object | None
) -> str:
    """What is wrong with settings that are right one by one; empty if nothing is."""
    if backend == "pyhessian" and (which != "magnitude" or curvature != "hessian" or differences or autocast):
        return "PyHessian finds exact Hessian eigenvalues of largest magnitude alone: use backend='lanczos'"
    if backend == "scipy" and which == "both" and k == 1:
        return "ARPACK needs k of 2 or more for both ends: use backend='lanczos'"
    if differences is not None and (curvature == "ggn" or autocast is not None):
        return "finite differences approximate the float32 Hessian: leave out differences, or ggn and autocast"
    return ""


class SpectrumSettings(CurvatureSettings):
    """Settings of the measure ``spectrum``."""

    k: int = pydantic.Field(default=5, ge=1, le=1000, description="number of eigenvalues")
    tolerance: float = pydantic.Field(default=1e-2, gt=0, lt=1, description="relative residual of a converged pair")
    max_products: int = pydantic.Field(default=100, ge=1, description="operator–vector products at most")
    which: Which = pydantic.Field(default="magnitude", description="magnitude, largest, smallest or both")
    block: int = pydantic.Field(default=1, ge=1, le=100, description="Lanczos vectors a step")
    differences: Differences | None = pydantic.Field(default=None, description="central or one-sided, for a quick look")
    backend: Backend = pydantic.Field(default="lanczos", description="lanczos, pyhessian or scipy")
    offload: bool = pydantic.Field(default=False, description="keep Lanczos vectors in host memory (GPU)")

    @pydantic.model_validator(mode="after")
    def _enough_products(self) -> "SpectrumSettings":
        if self.max_products < self.k:
            raise ValueError(f"max_products must be at least {self.k} for k = {self.k}")
        problem = _combination(self.which, self.k, self.backend, self.curvature, self.differences, self.autocast)
        if problem:
            raise ValueError(problem)
        return self


def _run(
    objective: Objective,
    space: WeightSpace,
    settings: SpectrumSettings,
    trained: Trained | None,
    watch: Watch | None = None,
) -> Spectrum:
    return top_eigenvalues(objective, space, **settings.arguments(), watch=watch)


MEASURE = Measure(
    name="spectrum",
    summary="top eigenvalues of the loss Hessian, with residuals",
    spaces=("full", "lora"),
    settings=SpectrumSettings,
    run=_run,
)
