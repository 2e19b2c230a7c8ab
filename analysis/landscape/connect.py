"""Linear mode connectivity: the loss on the straight line between two adapters (Frankle et al. 2020, arXiv 1912.05671).

    w(t) = (1 − t)·w_A + t·w_B,     0 ≤ t ≤ 1
    barrier = max_{0<t<1} [ L(w(t)) − ((1 − t)·L(w_A) + t·L(w_B)) ]

Two minima are linearly connected where the barrier is zero or below. The chord between the ends is the baseline
(Entezari et al. 2022), not Frankle's mean of both, so that ends of different loss make no barrier by themselves. The
maximum is taken between the ends, where a convex loss has a negative one; on a grid it is a lower bound.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from analysis.core.measure import Watch
from analysis.core.objective import Objective
from analysis.core.result import row
from analysis.core.space import WeightSpace
from analysis.core.vectors import Vector, norm
from analysis.landscape.adapter_plane import check_comparable
from analysis.landscape.plane import difference, fitting, refuse_non_finite, weights_of
from analysis.landscape.points import Points
from analysis.landscape.store import Key, PointStore
from analysis.settings import MeasureSettings
from bilora.adapters.interrupts import Exchange
from bilora.adapters.swap import swapped
from bilora.errors import UserError


class ConnectivitySettings(MeasureSettings):
    """Settings of :func:`connectivity`, described there."""

    points: Annotated[int, Field(ge=3)] = 21
    workers: int = Field(default=1, ge=1)


@dataclass(frozen=True, eq=False)
class Connectivity:
    """Loss and accuracy on the line between two points of a space. Non-finite values stay."""

    space: str
    split: str
    labels: tuple[str, str]  # of t = 0 and t = 1
    t: npt.NDArray[np.float64]  # (points,): equidistant, exactly 0 first and 1 last
    losses: npt.NDArray[np.float64]  # (points,)
    accuracies: npt.NDArray[np.float64] | None  # (points,); None where there are no classes or tokens
    distance: float  # ‖w_B − w_A‖

    @property
    def barrier(self) -> float:
        """Largest excess of the loss over the chord between the ends; NaN if a loss is, or an end is not finite."""
        return self._highest(self.losses)[0]

    @property
    def barrier_at(self) -> float:
        """t at which :attr:`barrier` is attained."""
        return self._highest(self.losses)[1]

    @property
    def error_barrier(self) -> float | None:
        """:attr:`barrier` of the error rate, 1 − accuracy; None without accuracy."""
        return None if self.accuracies is None else self._highest(1 - self.accuracies)[0]

    @property
    def pair(self) -> str:
        """Both labels, as rows name the line."""
        return " – ".join(self.labels)

    def rows(self) -> list[dict[str, Any]]:
        """``loss`` and, if known, ``accuracy`` at every t (radius); ``barrier`` and ``error_barrier``, with the t where
        each is attained as radius; ``distance``. ``label`` names the pair.
        """
        where = {"space": self.space, "split": self.split, "label": self.pair}
        curves = {"loss": self.losses, "accuracy": self.accuracies}
        rows = [
            row("connectivity", quantity, float(value), radius=float(t), index=i, **where)
            for quantity, curve in curves.items()
            if curve is not None
            for i, (t, value) in enumerate(zip(self.t, curve, strict=True))
        ]
        rows.append(row("connectivity", "barrier", self.barrier, radius=self.barrier_at, **where))
        if self.accuracies is not None:
            barrier, at = self._highest(1 - self.accuracies)
            rows.append(row("connectivity", "error_barrier", barrier, radius=at, **where))
        return [*rows, row("connectivity", "distance", self.distance, **where)]

    def _highest(self, curve: npt.NDArray[np.float64]) -> tuple[float, float]:
        """Largest excess over the chord between the ends, and where. A NaN is larger than anything."""
        if not (np.isfinite(curve[0]) and np.isfinite(curve[-1])):  # finite − ∞ would pass for no barrier at all
            return math.nan, math.nan
        excess = (curve - ((1 - self.t) * curve[0] + self.t * curve[-1]))[1:-1]
        at = int(np.argmax(excess))  # numpy's argmax finds the first NaN, if there is one
        return float(excess[at]), float(self.t[1:-1][at])


def connectivity(
    objective: Objective,
    start: WeightSpace,
    end: WeightSpace | Vector,
    *,
    labels: Sequence[str] = ("A", "B"),
    points: int = 21,
    workers: int = 1,
    store: PointStore | None = None,
    watch: Watch | None = None,
) -> Connectivity:
    """The loss on the line from the weights of one space to those of another.

    In the full space merged weights are interpolated, which no gauge can change. In the LoRA space the factors are: the
    points between have updates that are no mixture of the two, and the barrier depends on the gauge of both (A → 4A,
    B → B/4 of one of them changes it); two adapters of equal function may have a barrier.

    Args:
        objective: the data side.
        start: A, at t = 0. Its weights are bit-identical afterwards.
        end: B, at t = 1: a space of the same names, equal in all other weights (take
            :func:`analysis.landscape.adapter_plane.trained_space` of both where a head was trained along), or the
            weights themselves, naming every parameter. Both ends are evaluated exactly at their own weights.
        labels: names of A and B.
        points: values of t, equidistant, both ends included; 3 or more.
        workers: processes; the result does not depend on it.
        store: keeps points as they come, so that a killed run continues.
        watch: called with (points done, points in all).

    Raises:
        UserError: a setting is out of bounds; A and B differ in layers, shapes, dtype or weights outside the space;
            weights are not finite.
    """
    settings = ConnectivitySettings.checked(points=points, workers=workers)
    if len(labels) != 2:
        raise UserError(f"labels are {len(labels)}: give the names of both ends")
    names = (labels[0], labels[1])
    here, there = weights_of(start), _weights_at(start, end, names)
    refuse_non_finite((here, there), names)
    t = np.arange(settings.points) / (settings.points - 1)
    placed = _Placed(start.name, start.model, start.parameters, start.factors)
    with Points(objective, placed, OnLine(there), workers=settings.workers, store=store, watch=watch) as at:
        at.most = len(t)
        found = at([(float(share),) for share in t])
    losses = np.array([metrics["loss"] for metrics in found])
    known = all("accuracy" in metrics for metrics in found)
    accuracies = np.array([metrics["accuracy"] for metrics in found]) if known else None
    distance = norm(difference(there, here))
    return Connectivity(start.name, objective.name, names, t, losses, accuracies, distance)


@dataclass(frozen=True, eq=False)
class OnLine:
    """Where the point t between a space's own weights and ``end`` is: the weights themselves, for :class:`_Placed`."""

    end: Vector

    @property
    def identity(self) -> str:
        """Digest of the end."""
        digest = hashlib.sha256(b"line")
        for name, tensor in self.end.items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def __call__(self, space: WeightSpace, key: Key) -> tuple[Vector, float]:
        """The weights at t, with a scale that does not count."""
        return _between(weights_of(space), self.end, key[0]), 1.0


class _Placed(WeightSpace):
    """The space with weights put where they are given, rounded once: W plus a step would not end at B bit for bit."""

    def perturbed(self, direction: Vector, scale: float = 1.0) -> Exchange:
        """Let the weights be ``direction`` inside the block."""
        return swapped({self.parameters[name]: tensor for name, tensor in self.aligned(direction).items()})


def _weights_at(start: WeightSpace, end: WeightSpace | Vector, names: tuple[str, str]) -> Vector:
    if isinstance(end, WeightSpace):
        check_comparable((start, end), names)
        return start.aligned(weights_of(end))
    return fitting(start, end, names[1])


def _between(here: Vector, there: Vector, t: float) -> Vector:
    """(1 − t)·here + t·there in float64, rounded once; either end itself, bit for bit."""
    if t in (0.0, 1.0):
        return there if t else here
    return {name: ((1 - t) * a.double() + t * there[name].double()).to(a.dtype) for name, a in here.items()}
