"""The trace of the curvature, with its standard error, from products alone.

XTrace (Epperly, Tropp, Webber 2024, SIAM J. Matrix Anal. Appl. 45, arXiv 2301.07825), of Gaussian probes ω_1 … ω_q and
an orthonormal basis Q of the products Y = H·Ω = Q·R: each probe tests what the basis of the other probes leaves over,

    t_i = tr(P_i·H) + (n − q + 1)/‖x_i‖²·x_iᵀ·H·x_i,    x_i = (I − P_i)·ω_i,    P_i onto the products of all but ω_i,
    trace = mean(t),    standard error = sqrt(Σ_i (t_i − trace)²/(q(q − 1))).

Leaving ω_i out takes one direction from Q: ``P_i = Q·(I − s_i·s_iᵀ)·Qᵀ`` where s_i is column i of R⁻ᵀ, of unit length.
So with ``T = Qᵀ·H·Q``, ``W = Qᵀ·Ω`` and ``p_i = (I − s_i·s_iᵀ)·w_i`` every t_i comes from matrices of size q:

    tr(P_i·H) = tr T − s_iᵀ·T·s_i,    ‖x_i‖² = ‖ω_i‖² − ‖p_i‖²,    x_iᵀ·H·x_i = ω_iᵀ·y_i − 2·p_iᵀ·r_i + p_iᵀ·T·p_i.

P_i does not depend on ω_i, so each t_i is unbiased. They share most of their bases, so they are not independent: the
standard error above is the paper's, and on decaying spectra it is 0.6 to 1.1 of the true spread (held by the tests).
The true error falls as the spectrum beyond the q largest values does, that of Hutchinson's mean of ``ωᵀ·H·ω`` (random
signs ω; memory O(n)) as 1/√products whatever the spectrum.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pydantic
import torch
from scipy.linalg import solve_triangular
from torch import Tensor

from analysis.core.measure import Interrupted, Measure, Watch
from analysis.core.objective import Objective
from analysis.core.result import row
from analysis.core.space import WeightSpace
from analysis.core.trained import Trained
from analysis.core.vectors import tensor_dot
from analysis.curvature.basis import Basis, Coefficients
from analysis.curvature.factory import Curvature, curvature_operator
from analysis.curvature.graphs import Graphs
from analysis.curvature.operator import SymmetricOperator
from analysis.curvature.probes import PROBES, gaussian, rademacher
from analysis.curvature.pyhessian_solver import pyhessian_engine
from analysis.curvature.settings import CurvatureSettings
from bilora.errors import UserError

Backend = Literal["xtrace", "hutchinson", "pyhessian"]

LEAST = 12
"""Products before an estimate is checked: the spread of fewer samples is no standard error."""


class TraceSettings(CurvatureSettings):
    """Settings of the measure ``trace``, described at :func:`trace`."""

    tolerance: float = pydantic.Field(default=0.05, gt=0, lt=1, description="standard error relative to the trace")
    max_products: int = pydantic.Field(default=200, ge=4, description="products at most")
    backend: Backend = pydantic.Field(default="xtrace", description="xtrace, hutchinson or pyhessian")

    @pydantic.model_validator(mode="after")
    def _one_curvature(self) -> "TraceSettings":
        if self.backend == "pyhessian" and (self.curvature != "hessian" or self.autocast):
            raise ValueError("PyHessian multiplies by the exact Hessian alone: use backend='xtrace'")
        return self


@dataclass(frozen=True, eq=False)
class TraceEstimate:
    """The trace of a symmetric operator."""

    value: float
    standard_error: float  # NaN of a single sample
    products: int
    converged: bool  # standard error ≤ tolerance·|value| at the last two checks, or at the rounding of the products
    samples: Coefficients  # (q,) the t_i, or the ωᵀ·H·ω: their mean is the value


@dataclass(frozen=True, eq=False)
class Trace(TraceEstimate):
    """The trace of the curvature of the mean loss in one space."""

    space: str
    split: str
    label: str  # the operator's: "" for the exact Hessian
    backend: str
    part: str = ""  # which block of the space

    def rows(self) -> list[dict[str, Any]]:
        """``trace`` with its standard error, ``products`` and ``converged`` (1 or 0)."""
        common = {"space": self.space, "split": self.split, "kind": self.label, "layer": self.part}
        return [
            row("trace", "trace", self.value, standard_error=self.standard_error, **common),
            row("trace", "products", self.products, **common),
            row("trace", "converged", float(self.converged), **common),
        ]


def trace(
    objective: Objective,
    space: WeightSpace,
    *,
    tolerance: float = 0.05,
    max_products: int = 200,
    seed: int = 0,
    curvature: Curvature = "hessian",
    backend: Backend = "xtrace",
    graphs: Graphs = "auto",
    autocast: torch.dtype | None = None,
    watch: Watch | None = None,
) -> Trace:
    """The trace of the Hessian (or Gauss–Newton matrix) of the mean loss at the space's weights.

    Adds probes until the standard error is ≤ ``tolerance·|trace|`` at two checks in a row, four probes apart: it is an
    estimate too, and the first small one is often an accident. No product is made twice, and a run of more products
    begins with the probes of a shorter one.

    Args:
        objective: the mean loss.
        space: where, and with respect to which weights.
        tolerance: standard error relative to the trace at which to stop. A trace near zero, of positive and negative
            parts that cancel, cannot reach it.
        max_products: products at most.
        seed: of the probes.
        curvature: the Hessian or the Gauss–Newton matrix.
        backend: ``"xtrace"`` keeps a probe and a basis vector for every two products, memory of
            ``max_products`` vectors at most; ``"hutchinson"`` keeps none. ``"pyhessian"`` runs PyHessian's Hutchinson
            on the same objective (Hessian alone): it ends once its running mean changes by less than ``tolerance``
            or is negative, which says nothing of its error; standard error and ``converged`` are ours.
        graphs, autocast: as of the operator.
        watch: called with (products so far, ``max_products``, estimate) after each block of probes; by PyHessian for
            each product, without an estimate.

    Returns:
        A :class:`Trace`, ``converged`` false if the products did not suffice.

    Raises:
        UserError: a setting out of range, or a loss or product that is not finite.
        Interrupted: ``KeyboardInterrupt`` after the first estimate; its ``result`` is the last one.
    """
    settings = TraceSettings.checked(
        tolerance=tolerance, max_products=max_products, seed=seed, curvature=curvature, backend=backend
    )
    interrupted = False
    if settings.backend == "pyhessian":
        if autocast is not None:
            raise UserError("PyHessian multiplies in the weights' own precision: use backend='xtrace' with autocast")
        found, label = _pyhessian(objective, space, tolerance, max_products, seed, watch), ""
    else:
        estimates = _xtrace_estimates if settings.backend == "xtrace" else _hutchinson_estimates
        with curvature_operator(objective, space, curvature, graphs=graphs, autocast=autocast) as operator:
            running = estimates(operator, tolerance, max_products, seed)
            found, interrupted = _last(running, max_products, watch, keep=True)
            label = operator.label
    result = Trace(**vars(found), space=space.name, part=space.part, split=objective.name, label=label, backend=backend)
    if interrupted:
        raise Interrupted(result)
    return result


def xtrace(
    operator: SymmetricOperator,
    *,
    tolerance: float = 0.05,
    max_products: int = 200,
    seed: int = 0,
    watch: Watch | None = None,
) -> TraceEstimate:
    """XTrace of any symmetric operator, as at :func:`trace`. Memory: ``2·q·n`` for q probes, two products each.

    Exact, to rounding, once the probes are as many as the rank.

    Raises:
        UserError: a setting out of range.
    """
    TraceSettings.checked(tolerance=tolerance, max_products=max_products, seed=seed)
    return _last(_xtrace_estimates(operator, tolerance, max_products, seed), max_products, watch)[0]


def hutchinson(
    operator: SymmetricOperator,
    *,
    tolerance: float = 0.05,
    max_products: int = 200,
    seed: int = 0,
    watch: Watch | None = None,
) -> TraceEstimate:
    """Mean of ``ωᵀ·H·ω`` over random signs ω (Hutchinson 1990), as at :func:`trace`. Memory: O(n).

    Raises:
        UserError: a setting out of range.
    """
    TraceSettings.checked(tolerance=tolerance, max_products=max_products, seed=seed)
    return _last(_hutchinson_estimates(operator, tolerance, max_products, seed), max_products, watch)[0]


def _last(
    estimates: Iterator[TraceEstimate], max_products: int, watch: Watch | None, *, keep: bool = False
) -> tuple[TraceEstimate, bool]:
    """The last estimate, and whether it is the last because of an interrupt, which passes through unless ``keep``."""
    found = None
    try:
        for found in estimates:
            if watch is not None:
                watch(found.products, max_products, f"{found.value:.3g} ± {found.standard_error:.1g}")
    except KeyboardInterrupt:
        if found is None or not keep:
            raise
        return found, True
    assert found is not None
    return found, False


def _xtrace_estimates(
    operator: SymmetricOperator, tolerance: float, max_products: int, seed: int
) -> Iterator[TraceEstimate]:
    before = operator.products
    state = _XTrace(operator)
    most = min(max_products // 2, operator.size)
    found: TraceEstimate | None = None
    while found is None or not (found.converged or state.count == most):
        block = range(state.count, min(state.count + PROBES, most))
        state.extend(torch.stack([gaussian(operator, "trace", seed, i) for i in block]))
        exact = state.count == operator.size
        products = operator.products - before
        found = _estimate(state.samples(), products, tolerance, state.rounding, found, exact=exact)
        yield found


def _hutchinson_estimates(
    operator: SymmetricOperator, tolerance: float, max_products: int, seed: int
) -> Iterator[TraceEstimate]:
    samples: list[float] = []
    found: TraceEstimate | None = None
    while found is None or not (found.converged or len(samples) == max_products):
        block = range(len(samples), min(len(samples) + PROBES, max_products))
        signs = torch.stack([rademacher(operator, "trace", seed, i) for i in block])
        samples += [tensor_dot(v, Hv) for v, Hv in zip(signs, operator.matmat(signs), strict=True)]
        rounding = 50 * torch.finfo(operator.dtype).eps * max(map(abs, samples))
        found = _estimate(np.array(samples), len(samples), tolerance, rounding, found)
        yield found


class _XTrace:
    """Probes, the basis of their products, and the small matrices of the module's equations, which only grow."""

    def __init__(self, operator: SymmetricOperator) -> None:
        self.exhausted = False  # a product lay in the span of those before: the basis holds the range, to rounding
        self._operator = operator
        self._eps = float(torch.finfo(operator.dtype).eps)
        self._probes = Basis(operator.size, operator.dtype, operator.device)
        self._basis = Basis(operator.size, operator.dtype, operator.device)
        self._T = self._R = self._W = np.zeros((0, 0))
        self._squares: list[float] = []  # ‖ω_i‖²
        self._forms: list[float] = []  # ω_iᵀ·y_i

    @property
    def count(self) -> int:
        """Number of probes, q."""
        return self._probes.length

    @property
    def rounding(self) -> float:
        """Error of the trace by rounding of the products, from the eigenvalues found."""
        return 50 * self._eps * float(np.abs(np.linalg.eigvalsh(self._T)).sum())

    def extend(self, probes: Tensor) -> None:
        """Add probes (m, n): a product for each, and one for each direction that they add to the basis."""
        basis, old, old_count = self._basis, self._basis.length, self.count
        images = self._operator.matmat(probes)
        columns = []
        for probe, image in zip(probes, images, strict=True):
            self._probes.append(probe)
            self._squares.append(tensor_dot(probe, probe))
            self._forms.append(tensor_dot(probe, image))
            columns.append(self._orthogonalized(image))
        length, count = basis.length, self.count
        R, W, T = np.zeros((length, count)), np.zeros((length, count)), np.zeros((length, length))
        R[:old, :old_count], W[:old, :old_count], T[:old, :old] = self._R, self._W, self._T
        for i, (probe, column) in enumerate(zip(probes, columns, strict=True), start=old_count):
            R[: len(column), i] = column
            W[:, i] = basis.products(probe).cpu().numpy()
        if length > old:
            new = torch.stack([basis.row(i) for i in range(old, length)])
            for i, (q, image) in enumerate(zip(new, self._operator.matmat(new), strict=True), start=old):
                W[i, :old_count] = self._probes.products(q).cpu().numpy()[:old_count]
                T[:, i] = basis.products(image).cpu().numpy()
            T[old:, :old] = T[:old, old:].T
            T[old:, old:] = (T[old:, old:] + T[old:, old:].T) / 2
        self._T, self._R, self._W = T, R, W

    def _orthogonalized(self, image: Tensor) -> Coefficients:
        """The column of R of one product, whose remainder enters the basis unless it is rounding."""
        left = image.to(torch.float64, copy=True)
        column = self._basis.project_out(left).cpu().numpy()
        size = math.sqrt(tensor_dot(left, left))
        if self.exhausted or size <= 50 * self._eps * math.sqrt(tensor_dot(image, image)):
            self.exhausted = True
            return column
        self._basis.append(left / size)
        return np.append(column, size)

    def samples(self) -> Coefficients:
        """The t_i, (q,)."""
        T, R, W = self._T, self._R, self._W
        rank, q = R.shape
        n = self._operator.size
        whole = float(np.trace(T))
        if q == n:  # the probes span everything: nothing is left over
            return np.full(q, whole)
        P, kept, free = W, np.full(q, whole), n - rank
        if not self.exhausted:
            S = solve_triangular(R, np.eye(q), trans="T")
            S /= np.linalg.norm(S, axis=0)
            P = W - S * (S * W).sum(axis=0)
            kept = whole - (S * (T @ S)).sum(axis=0)
            free = n - q + 1
        squares = np.array(self._squares) - (P * P).sum(axis=0)
        forms = np.array(self._forms) - 2 * (P * R).sum(axis=0) + (P * (T @ P)).sum(axis=0)
        t: Coefficients = kept + free / squares * forms
        return t


def _estimate(
    samples: Coefficients,
    products: int,
    tolerance: float,
    rounding: float,
    before: TraceEstimate | None,
    *,
    exact: bool = False,
) -> TraceEstimate:
    """The mean of the samples; ``before``: the estimate one block of probes ago."""
    value = float(samples.mean())
    error = 0.0 if exact else _standard_error(samples)
    met = [products >= LEAST and error <= tolerance * abs(value)]
    if before is not None:
        met.append(before.products >= LEAST and before.standard_error <= tolerance * abs(before.value))
    converged = exact or (products >= LEAST and error <= rounding) or (len(met) == 2 and all(met))
    return TraceEstimate(value, error, products, converged, samples)


def _standard_error(samples: Coefficients) -> float:
    return float(samples.std(ddof=1)) / math.sqrt(len(samples)) if len(samples) > 1 else math.nan


def _pyhessian(
    objective: Objective, space: WeightSpace, tolerance: float, max_products: int, seed: int, watch: Watch | None
) -> TraceEstimate:
    """PyHessian's ``trace`` (Yao et al. 2020) and the spread of its samples."""
    with pyhessian_engine(objective, space, seed) as (engine, adapter):
        if watch is not None:
            adapter.each_product = lambda products: watch(products, max_products, "")
        samples = np.array(engine.trace(maxIter=max_products, tol=tolerance), dtype=np.float64)
    products = adapter.products
    value, error = float(samples.mean()), _standard_error(samples)
    converged = len(samples) >= LEAST and error <= tolerance * abs(value)
    return TraceEstimate(value, error, products, converged, samples)


def _run(
    objective: Objective,
    space: WeightSpace,
    settings: TraceSettings,
    trained: Trained | None,
    watch: Watch | None = None,
) -> Trace:
    return trace(objective, space, **settings.arguments(), watch=watch)


MEASURE = Measure(
    name="trace",
    summary="trace of the loss Hessian, with its standard error",
    spaces=("full", "lora"),
    settings=TraceSettings,
    run=_run,
)
