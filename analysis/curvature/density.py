"""The density of the curvature's eigenvalues, by stochastic Lanczos quadrature.

    φ(λ) = 1/n·Σ_i δ(λ − λ_i)  ≈  mean over runs of Σ_k w_k·δ(λ − θ_k)

A run is ``m`` Lanczos steps from a random unit vector v: θ_k and ``w_k = (first entry of eigenvector k)²`` are the
nodes and weights of the Gauss rule for ``vᵀ·f(H)·v``, exact for polynomials f of degree ≤ 2m − 1, and the mean of
``vᵀ·f(H)·v`` over v is ``tr f(H)/n``. So the trace and the square of the Frobenius norm are unbiased from two
steps on. Where f bends at 0 (share of negative curvature, effective dimension of a small alpha) the rule itself errs,
up or down, because a node next to 0 stands for eigenvalues on both sides: by tens of per cent at few steps, which the
standard error over runs does not show. ``docs/curvature.md`` gives its size on a known spectrum.

Lin, Saad, Yang 2016 (Approximating spectral densities of large matrices); Ghorbani, Krishnan, Xiao 2019. All basis
vectors are orthogonalised against each other (without that, Lanczos repeats eigenvalues and the weights are wrong).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import pydantic
import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from analysis.core.measure import Interrupted, Measure, Watch
from analysis.core.objective import Objective
from analysis.core.result import row
from analysis.core.space import WeightSpace
from analysis.core.trained import Trained
from analysis.core.vectors import tensor_dot
from analysis.curvature.basis import Basis, Coefficients, stored_bytes
from analysis.curvature.factory import Curvature, curvature_operator
from analysis.curvature.graphs import Graphs
from analysis.curvature.operator import SymmetricOperator
from analysis.curvature.probes import gaussian
from analysis.curvature.settings import CurvatureSettings
from analysis.settings import Radius

MEMORY = 2 << 30
"""Bytes that the bases of runs advanced together may take."""
RELATIVE_WIDTH = 0.01
"""Default kernel width, as a share of the range of the axis."""
LINEAR_SHARE = 1e-3
"""On the symmetric-log axis, the share of the largest magnitude within which it is linear."""

Scale = Literal["symlog", "linear"]
Numbers = TypeVar("Numbers", float, Coefficients)


class DensitySettings(CurvatureSettings):
    """Settings of the measure ``density``, described at :func:`spectral_density` and :class:`SpectralDensity`."""

    runs: int = pydantic.Field(default=8, ge=1, description="random starts")
    steps: int = pydantic.Field(default=40, ge=2, description="Lanczos steps of each run")
    scale: Scale = pydantic.Field(default="symlog", description="axis of grid and kernel: symlog or linear")
    points: int = pydantic.Field(default=201, ge=2, description="grid points")
    bounds: tuple[float, float] | None = pydantic.Field(
        default=None, description="first and last eigenvalue of the grid; by default the model's own range"
    )
    alphas: tuple[Radius, ...] = pydantic.Field(
        default=(0.01, 0.1, 1.0), description="alpha of effective dimensions, in units of eigenvalues"
    )

    @pydantic.model_validator(mode="after")
    def _bounds_in_order(self) -> "DensitySettings":
        if self.bounds is not None and not -math.inf < self.bounds[0] < self.bounds[1] < math.inf:
            raise ValueError(f"bounds must be two finite numbers, the smaller first, not {self.bounds}")
        return self


@dataclass(frozen=True, eq=False)
class Estimated(Generic[Numbers]):
    """A number, or an array of them, with its standard error over runs (NaN of a single run)."""

    value: Numbers
    standard_error: Numbers


@dataclass(frozen=True)
class Axis:
    """``u = linear·asinh(λ/linear)``: eigenvalues where |λ| ≪ linear, logarithms beyond; ``inf`` means u = λ."""

    linear: float = math.inf

    def position(self, values: Coefficients) -> Coefficients:
        """u of each eigenvalue."""
        return values if math.isinf(self.linear) else self.linear * np.arcsinh(values / self.linear)

    def eigenvalue(self, positions: Coefficients) -> Coefficients:
        """The inverse of :meth:`position`."""
        return positions if math.isinf(self.linear) else self.linear * np.sinh(positions / self.linear)

    def slope(self, values: Coefficients) -> Coefficients:
        """du/dλ."""
        return np.asarray(1 / np.sqrt(1 + np.square(values / self.linear)))


@dataclass(frozen=True, eq=False)
class SpectralDensity:
    """Gauss rules of the curvature of the mean loss in one space, one a run, and what follows from them."""

    nodes: Coefficients  # (runs, steps) θ
    weights: Coefficients  # (runs, steps) w, of sum 1 in each run; 0 (with node 0) beyond the end of a shorter run
    size: int  # n, entries of the space
    products: int
    space: str
    split: str
    label: str  # the operator's: "" for the exact Hessian
    part: str = ""  # which block of the space
    complete: bool = True  # not cut short by an interrupt
    scale: Scale = "symlog"  # the axis on which rows() spaces its grid and smooths
    points: int = 201  # of that grid
    bounds: tuple[float, float] | None = None  # of that grid
    alphas: tuple[float, ...] = (0.01, 0.1, 1.0)  # of the effective dimensions in rows()

    @property
    def runs(self) -> int:
        """Number of random starts."""
        return len(self.nodes)

    def axis(self) -> Axis:
        """The axis of :attr:`scale`: linear within 1/1000 of the largest magnitude of :attr:`bounds`, or of a node."""
        largest = float(np.abs(self.nodes if self.bounds is None else self.bounds).max())
        return Axis() if self.scale == "linear" or not largest else Axis(LINEAR_SHARE * largest)

    def grid(self) -> Coefficients:
        """:attr:`points` eigenvalues, evenly spaced on :meth:`axis`, over :attr:`bounds` or all nodes and a margin."""
        axis = self.axis()
        low, high = axis.position(np.array(self._range()))
        margin = 4 * RELATIVE_WIDTH * (high - low) if self.bounds is None else 0.0
        return axis.eigenvalue(np.linspace(low - margin, high + margin, self.points))

    def density(
        self, grid: Coefficients | None = None, width: float | None = None, *, axis: Axis | None = None
    ) -> Estimated[Coefficients]:
        """Share of eigenvalues per unit eigenvalue, smoothed by a Gaussian kernel; its integral over λ is 1.

        Args:
            grid: eigenvalues at which to evaluate it, (points,). Default: :meth:`grid`.
            width: standard deviation of the kernel in units of ``axis``, which are eigenvalues on a linear axis.
                Default: 1/100 of the range of the axis.
            axis: where the kernel is a Gaussian. On a symmetric-log axis its width is a share of the eigenvalue, so
                that a bulk near zero and outliers decades away are both resolved. Default: :meth:`axis`.

        Returns:
            Mean and standard error over runs, (points,).
        """
        axis = self.axis() if axis is None else axis
        grid = self.grid() if grid is None else grid
        if width is None:
            low, high = axis.position(np.array(self._range()))
            width = RELATIVE_WIDTH * (high - low)
        away = (axis.position(grid)[:, None, None] - axis.position(self.nodes)) / width
        kernel = np.exp(-0.5 * away * away) / (width * math.sqrt(2 * math.pi))
        return Estimated(*_jackknife(lambda mean: mean, (self.weights * kernel).sum(axis=2).T * axis.slope(grid)))

    def trace(self) -> Estimated[float]:
        """tr H = n·E[Σ w·θ]."""
        return _number(lambda mean: mean, self.size * self._expected(self.nodes))

    def frobenius_norm(self) -> Estimated[float]:
        """‖H‖_F = sqrt(n·E[Σ w·θ²]), of several runs without the bias of the root to first order in 1/runs."""
        return _number(np.sqrt, self.size * self._expected(np.square(self.nodes)), unbiased=True)

    def negative_share(self) -> Estimated[float]:
        """Σ over negative λ of |λ|, as a share of Σ |λ|; NaN of a zero matrix.

        Biased by the rule's error at 0 where eigenvalues crowd there, which the standard error does not show. A
        semidefinite matrix has 0 or 1 to rounding, whatever the steps: no node lies outside the eigenvalues.
        """
        negative = self._expected(np.maximum(-self.nodes, 0))
        both = np.stack([negative, self._expected(np.abs(self.nodes))], axis=1)
        with np.errstate(invalid="ignore"):
            return _number(lambda mean: mean[..., 0] / mean[..., 1], both)

    def effective_dimension(self, alpha: float) -> Estimated[float]:
        """Σ λ⁺/(λ⁺ + alpha), λ⁺ = max(λ, 0): number of directions of curvature above about ``alpha`` (MacKay 1992).

        An ``alpha`` not above the nodes nearest to 0 is beyond what the steps resolve: the value may then be off by
        half, which the standard error does not show.
        """
        positive = np.maximum(self.nodes, 0)
        return _number(lambda mean: mean, self.size * self._expected(positive / (positive + alpha)))

    def rows(self) -> list[dict[str, Any]]:
        """``density`` (radius: the eigenvalue, index: the grid point) and the summaries, each with its standard error;
        ``effective_dimension`` has its alpha as radius; ``runs``; ``products``; ``complete`` (1 or 0)."""
        common: dict[str, Any] = {"space": self.space, "split": self.split, "kind": self.label, "layer": self.part}

        def estimated(quantity: str, found: Estimated[float], **columns: Any) -> dict[str, Any]:
            return row("density", quantity, found.value, standard_error=found.standard_error, **columns, **common)

        grid, density = self.grid().tolist(), self.density()
        found = zip(density.value.tolist(), density.standard_error.tolist(), strict=True)
        return [
            *(estimated("density", Estimated(*found_at), radius=grid[i], index=i) for i, found_at in enumerate(found)),
            estimated("trace", self.trace()),
            estimated("frobenius_norm", self.frobenius_norm()),
            estimated("negative_share", self.negative_share()),
            *(estimated("effective_dimension", self.effective_dimension(a), radius=a) for a in self.alphas),
            row("density", "runs", self.runs, **common),
            row("density", "products", self.products, **common),
            row("density", "complete", float(self.complete), **common),
        ]

    def _expected(self, values: Coefficients) -> Coefficients:
        """Σ w·values of each run, (runs,)."""
        return np.asarray((self.weights * values).sum(axis=1))

    def _range(self) -> tuple[float, float]:
        """Smallest and largest eigenvalue shown; never equal."""
        if self.bounds is not None:
            return self.bounds
        held = self.nodes[self.weights > 0]
        low, high = float(held.min()), float(held.max())
        if high - low <= 1e-6 * max(abs(low), abs(high)):
            half = 0.5 * max(abs(low), abs(high)) or 0.5
            return low - half, high + half
        return low, high


def spectral_density(
    objective: Objective,
    space: WeightSpace,
    *,
    runs: int = 8,
    steps: int = 40,
    seed: int = 0,
    curvature: Curvature = "hessian",
    graphs: Graphs = "auto",
    autocast: torch.dtype | None = None,
    memory: int = MEMORY,
    watch: Watch | None = None,
) -> SpectralDensity:
    """The density of the eigenvalues of the Hessian (or Gauss–Newton matrix) of the mean loss at the space's weights.

    Args:
        objective: the mean loss.
        space: where, and with respect to which weights.
        runs: random starts. Standard errors are over them: NaN of one.
        steps: products of each run; the more, the finer the density. At most the size of the space are made.
        seed: of the starts.
        curvature: the Hessian or the Gauss–Newton matrix.
        graphs, autocast: as of the operator.
        memory: bytes for bases. As many runs are advanced together as have room (one at least, ``steps`` vectors).
        watch: called with (products so far, ``runs·steps``, which runs) after each step.

    Raises:
        UserError: a setting out of range, or a loss or product that is not finite.
        Interrupted: ``KeyboardInterrupt`` after the second step of a run; its ``result``, not ``complete``, is the
            density of the steps made by the runs that made two at least.
    """
    DensitySettings.checked(runs=runs, steps=steps, seed=seed, curvature=curvature)
    with curvature_operator(objective, space, curvature, graphs=graphs, autocast=autocast) as operator:
        rules, interrupted = _quadrature(operator, runs, steps, seed, memory, watch, keep=True)
        nodes, weights = _padded(rules)
        density = SpectralDensity(
            nodes=nodes,
            weights=weights,
            size=operator.size,
            products=operator.products,
            space=space.name,
            part=space.part,
            split=objective.name,
            label=operator.label,
            complete=not interrupted,
        )
    if interrupted:
        raise Interrupted(density)
    return density


def lanczos_quadrature(
    operator: SymmetricOperator,
    *,
    runs: int = 8,
    steps: int = 40,
    seed: int = 0,
    memory: int = MEMORY,
    watch: Watch | None = None,
) -> tuple[Coefficients, Coefficients]:
    """Nodes and weights of the Gauss rules of any symmetric operator, (runs, steps) each: see :class:`SpectralDensity`.

    Raises:
        UserError: a setting out of range.
    """
    DensitySettings.checked(runs=runs, steps=steps, seed=seed)
    return _padded(_quadrature(operator, runs, steps, seed, memory, watch)[0])


Rule = tuple[Coefficients, Coefficients]
"""Nodes and weights of one run."""


def _quadrature(
    operator: SymmetricOperator,
    runs: int,
    steps: int,
    seed: int,
    memory: int,
    watch: Watch | None,
    *,
    keep: bool = False,
) -> tuple[list[Rule], bool]:
    """The rule of each run, and whether an interrupt cut them short, which passes through unless ``keep``.

    A run that was cut short has the rule of the steps it made.
    """
    steps = min(steps, operator.size)
    together = max(1, memory // stored_bytes(steps, operator.size, operator.dtype))
    before, most = operator.products, runs * steps
    rules: list[Rule] = []
    group: list[_Run] = []
    interrupted = False
    try:
        for first in range(0, runs, together):
            group = [_Run(operator, seed, number, steps) for number in range(first, min(first + together, runs))]
            for _ in range(steps):
                active = [run for run in group if not run.ended]
                if not active:
                    break
                products = operator.matmat(torch.stack([run.vector for run in active]))
                for run, product in zip(active, products, strict=True):
                    run.advance(product)
                if watch is not None:
                    watch(operator.products - before, most, f"runs {first + 1} to {first + len(group)} of {runs}")
            rules, group = [*rules, *(run.rule() for run in group)], []
    except KeyboardInterrupt:
        rules += [run.rule() for run in group if run.usable]
        if not rules or not keep:
            raise
        interrupted = True
    return rules, interrupted


def _padded(rules: list[Rule]) -> Rule:
    """(runs, steps) of nodes and of weights; shorter rules are filled with nodes 0 of weight 0."""
    longest = max(len(theta) for theta, _ in rules)
    nodes, weights = np.zeros((len(rules), longest)), np.zeros((len(rules), longest))
    for number, (theta, w) in enumerate(rules):
        nodes[number, : len(theta)], weights[number, : len(theta)] = theta, w
    return nodes, weights


class _Run:
    """Lanczos from one random unit vector, of at most ``steps`` steps."""

    def __init__(self, operator: SymmetricOperator, seed: int, number: int, steps: int) -> None:
        self.ended = False
        self._steps = steps
        self._dtype = operator.dtype
        self._basis = Basis(operator.size, operator.dtype, operator.device)
        self._diagonal: list[float] = []
        self._off_diagonal: list[float] = []
        self._largest = 0.0  # ‖H·q‖ so far
        self._append(gaussian(operator, "density", seed, number).double())

    @property
    def vector(self) -> Tensor:
        """The one to multiply next, (n,)."""
        return self._basis.row(self._basis.length - 1)

    @property
    def usable(self) -> bool:
        """Whether its rule is exact for squares at least: the rule of one step gives their trace far too low."""
        return self.ended or len(self._diagonal) > 1

    def advance(self, product: Tensor) -> None:
        """Take H times :attr:`vector`."""
        self._diagonal.append(tensor_dot(product, self.vector))
        if self._basis.length == self._steps:
            self.ended = True
            return
        self._largest = max(self._largest, math.sqrt(tensor_dot(product, product)))
        left = product.to(torch.float64, copy=True)
        self._basis.project_out(left)
        beta = math.sqrt(tensor_dot(left, left))
        if beta <= 50 * torch.finfo(self._dtype).eps * self._largest:
            self.ended = True  # the Krylov space is invariant, to rounding: the rule is exact
            return
        self._off_diagonal.append(beta)
        self._append(left)

    def rule(self) -> tuple[Coefficients, Coefficients]:
        """(θ, w), (steps made,) each."""
        beside = self._off_diagonal[: len(self._diagonal) - 1]  # the last leads to a vector not multiplied yet
        theta, vectors = eigh_tridiagonal(np.array(self._diagonal), np.array(beside))
        return theta.astype(np.float64), np.square(vectors[0].astype(np.float64))

    def _append(self, vector: Tensor) -> None:
        self._basis.append((vector / math.sqrt(tensor_dot(vector, vector))).to(self._dtype))


def _jackknife(
    statistic: Callable[[Coefficients], Coefficients], samples: Coefficients, *, unbiased: bool = False
) -> tuple[Coefficients, Coefficients]:
    """``statistic`` of the mean over runs, and its standard error from leaving out one run at a time (Tukey 1958).

    Args:
        statistic: of means along axis 0.
        samples: (runs, ...). For the mean itself the error is the usual ``s/√runs``.
        unbiased: take the bias away that leaving out runs shows (Quenouille 1956).
    """
    runs = len(samples)
    value = np.asarray(statistic(samples.mean(axis=0)), dtype=np.float64)
    if runs == 1:
        return value, np.full_like(value, math.nan)
    left_out = statistic((samples.sum(axis=0) - samples) / (runs - 1))
    if unbiased:
        value = runs * value - (runs - 1) * left_out.mean(axis=0)
    deviation = left_out - left_out.mean(axis=0)
    variance = np.asarray((runs - 1) / runs * np.square(deviation).sum(axis=0), dtype=np.float64)
    return value, np.sqrt(variance)


def _number(
    statistic: Callable[[Coefficients], Coefficients], samples: Coefficients, *, unbiased: bool = False
) -> Estimated[float]:
    value, error = _jackknife(statistic, samples, unbiased=unbiased)
    return Estimated(float(value), float(error))


def _run(
    objective: Objective,
    space: WeightSpace,
    settings: DensitySettings,
    trained: Trained | None,
    watch: Watch | None = None,
) -> SpectralDensity:
    shown = {"scale", "points", "bounds", "alphas"}
    found = spectral_density(objective, space, **settings.arguments(exclude=shown), watch=watch)
    return replace(found, **settings.model_dump(include=shown))


MEASURE = Measure(
    name="density",
    summary="density of the loss Hessian's eigenvalues, with its trace, norm and share of negative curvature",
    spaces=("full", "lora"),
    settings=DensitySettings,
    run=_run,
)
