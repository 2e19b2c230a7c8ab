"""The largest Hessian eigenvalues, each with its true residual."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pydantic
import torch
from numpy.typing import NDArray
from torch import Tensor

from analysis.core.measure import Measure
from analysis.core.objective import Objective
from analysis.core.result import row
from analysis.core.space import WeightSpace
from analysis.core.trained import Trained
from analysis.core.vectors import Vector, added, dot, norm, scaled
from analysis.curvature.lanczos import Coefficients, Which, lanczos, rounding_floor, wanted
from analysis.curvature.operator import HessianOperator
from analysis.curvature.power import pyhessian_eigenpairs
from analysis.settings import MeasureSettings
from bilora.errors import UserError
from bilora.seeds import generator_for

GRAPH_BUDGET = 2 << 30
"""Bytes of retained graphs with ``retain="auto"``."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Eigenvalues of the Hessian of the mean loss in one space, the most wanted first."""

    values: Coefficients  # (k,)
    residuals: Coefficients  # (k,) ‖H·v − λ·v‖/|λ|, from a product with the final vector
    converged: NDArray[np.bool_]  # (k,) residual ≤ tolerance, or ‖H·v − λ·v‖ at the rounding of the products
    products: int  # Hessian–vector products, those of the residuals included
    space: str
    split: str
    backend: str
    which: str
    vectors: tuple[Vector, ...] = ()  # k unit vectors, if asked for

    def rows(self) -> list[dict[str, Any]]:
        """``eigenvalue`` with its residual and ``converged`` (1 or 0) for each rank from 1, and ``products``."""
        common: dict[str, Any] = {"space": self.space, "split": self.split}
        if self.which != "magnitude":
            common["kind"] = self.which
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
    start: Literal["gradient", "random"] = "gradient",
    backend: Literal["lanczos", "pyhessian"] = "lanczos",
    retain: bool | Literal["auto"] = "auto",
    vectors: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Spectrum:
    """The top ``k`` eigenvalues of ∇²L at the space's weights, by Lanczos with full reorthogonalisation.

    Iterates until the residual estimate of every wanted pair is ≤ ``tolerance·|λ|``, then measures the residuals with
    one more product each. The error of an eigenvalue is at most its residual norm, and about its square over the
    gap to the next eigenvalue. An eigenvalue of multiplicity above one may be listed once: a Krylov space meets each
    eigenspace in one direction.

    Args:
        objective: the mean loss.
        space: where, and with respect to which weights.
        k: how many.
        tolerance: relative residual ‖Hv − λv‖/|λ| at which a pair counts as converged.
        max_products: Hessian–vector products at most, those for residuals included.
        which: largest magnitude, largest, or smallest (most negative).
        seed: of the random start or restarts.
        start: first Lanczos vector; the gradient saves products and costs one gradient.
        backend: ``"pyhessian"`` runs PyHessian's power iteration on the same objective instead (``which="magnitude"``
            alone; ``tolerance`` is then the change of the eigenvalue between two of its iterations, ``max_products``
            the iterations for each pair, and no graph is retained). The residuals are ours in any case.
        retain: keep the gradient's graphs between products; ``"auto"`` keeps as many as fit into 2 GiB.
        vectors: return the eigenvectors as well: ``k`` times the memory of the weights.
        progress: called with (products so far, ``max_products``) after each product.

    Returns:
        A :class:`Spectrum`. Pairs that did not reach the tolerance are in it, with ``converged`` false.

    Raises:
        UserError: a setting out of range, or a loss that is not finite or does not depend on the space.
    """
    _check(space, k, tolerance, max_products, which, start, backend)
    budget = GRAPH_BUDGET if retain == "auto" else None
    keep = retain is not False and backend == "lanczos"
    with HessianOperator(objective, space, retain=keep, budget=budget) as operator:

        def multiply(vector: Vector) -> Vector:
            product = operator(vector)
            if progress is not None:
                progress(operator.products, max_products)
            return product

        values: Sequence[float | None]
        if backend == "pyhessian":
            values, candidates, products = pyhessian_eigenpairs(objective, space, k, tolerance, max_products, seed)
        else:
            generator = generator_for("lanczos", seed)
            ritz = lanczos(
                lambda flat: _flat(multiply(_named(flat, space)), space),
                _start(objective, space, start, generator),
                k,
                which=which,
                tolerance=tolerance,
                max_steps=max_products - k,
                generator=generator,
            )
            values, products = [None] * k, 0
            candidates = [_named(ritz.basis.combination(ritz.coefficients[:, i]), space) for i in range(k)]
        pairs = [_verified(multiply, v, value) for v, value in zip(candidates, values, strict=True)]
        products += operator.products
    found = np.array([value for value, _, _ in pairs])
    order = wanted(found, which)
    found = found[order]
    errors = np.array([error for _, error, _ in pairs])[order]
    with np.errstate(divide="ignore", invalid="ignore"):
        residuals = np.where(errors == 0, 0.0, errors / np.abs(found))
    floor = rounding_floor(found, next(iter(space.parameters.values())).dtype)
    return Spectrum(
        values=found,
        residuals=residuals,
        converged=(residuals <= tolerance) | (errors <= floor),
        products=products,
        space=space.name,
        split=objective.name,
        backend=backend,
        which=which,
        vectors=tuple(pairs[i][2] for i in order) if vectors else (),
    )


def _check(
    space: WeightSpace, k: int, tolerance: float, max_products: int, which: str, start: str, backend: str
) -> None:
    if which not in ("magnitude", "largest", "smallest"):
        raise UserError(f"which is {which!r}: choose magnitude, largest or smallest")
    if start not in ("gradient", "random"):
        raise UserError(f"start is {start!r}: choose gradient or random")
    if backend not in ("lanczos", "pyhessian"):
        raise UserError(f"backend is {backend!r}: choose lanczos or pyhessian")
    if backend == "pyhessian" and which != "magnitude":
        raise UserError("PyHessian finds eigenvalues of largest magnitude alone: use backend='lanczos'")
    if not 1 <= k <= space.size:
        raise UserError(f"k is {k}: choose from 1 to {space.size}, the size of the {space.name} space")
    if not 0 < tolerance < 1:
        raise UserError(f"tolerance is {tolerance}: choose a relative residual between 0 and 1")
    if max_products < 2 * k:
        raise UserError(f"max_products is {max_products}: {k} pairs need at least {2 * k}")


def _start(objective: Objective, space: WeightSpace, start: str, generator: torch.Generator) -> Tensor:
    if start == "gradient":
        gradient = _flat(objective.gradient(space), space)
        if bool(gradient.any()):
            return gradient
    random = torch.randn(space.size, generator=generator)
    return random.to(next(iter(space.parameters.values())))


def _verified(multiply: Callable[[Vector], Vector], vector: Vector, value: float | None) -> tuple[float, float, Vector]:
    """(eigenvalue, ‖H·v − λ·v‖, unit v); the eigenvalue is the Rayleigh quotient unless a ``value`` is given."""
    unit = scaled(vector, 1 / norm(vector))
    product = multiply(unit)
    eigenvalue = dot(unit, product) if value is None else value
    return eigenvalue, norm(added(product, unit, -eigenvalue)), unit


def _flat(vector: Vector, space: WeightSpace) -> Tensor:
    return torch.cat([vector[name].reshape(-1) for name in space.parameters])


def _named(flat: Tensor, space: WeightSpace) -> Vector:
    parts = flat.split([p.numel() for p in space.parameters.values()])
    return {name: part.view_as(p) for (name, p), part in zip(space.parameters.items(), parts, strict=True)}


class SpectrumSettings(MeasureSettings):
    """Settings of the measure ``spectrum``."""

    k: int = pydantic.Field(default=5, ge=1, le=1000, description="number of eigenvalues")
    tolerance: float = pydantic.Field(default=1e-2, gt=0, lt=1, description="relative residual of a converged pair")
    max_products: int = pydantic.Field(default=100, ge=2, description="Hessian–vector products at most")
    seed: int = pydantic.Field(default=0, ge=0, description="of the random restarts")
    which: Which = pydantic.Field(default="magnitude", description="magnitude, largest or smallest")
    backend: Literal["lanczos", "pyhessian"] = pydantic.Field(default="lanczos", description="lanczos or pyhessian")

    @pydantic.model_validator(mode="after")
    def _enough_products(self) -> "SpectrumSettings":
        if self.max_products < 2 * self.k:
            raise ValueError(f"max_products must be at least {2 * self.k} for k = {self.k}")
        return self


def _run(objective: Objective, space: WeightSpace, settings: SpectrumSettings, trained: Trained | None) -> Spectrum:
    return top_eigenvalues(
        objective,
        space,
        settings.k,
        tolerance=settings.tolerance,
        max_products=settings.max_products,
        seed=settings.seed,
        which=settings.which,
        backend=settings.backend,
    )


MEASURE = Measure(
    name="spectrum",
    summary="top eigenvalues of the loss Hessian, with residuals",
    spaces=("full", "lora"),
    settings=SpectrumSettings,
    run=_run,
)
