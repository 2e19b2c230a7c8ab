"""Symmetric operators on the weights of a space, summed over an objective's batches.

``H·v = Σ_b w_b·H_b·v / Σ_b w_b`` with the weights of :class:`~analysis.core.objective.Objective`. The processes of
``torch.distributed`` share the batches among them.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol, Self

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator
from torch import Tensor, nn

from analysis.core.objective import Objective
from analysis.core.space import WeightSpace
from analysis.core.vectors import Vector
from analysis.curvature.probe import check_deterministic, check_precision
from bilora.errors import UserError


class SymmetricOperator(Protocol):
    """What the estimators need of a symmetric matrix.

    Attributes:
        size: entries of a vector.
        dtype: of vectors.
        device: of vectors.
        products: products with one vector made so far.
    """

    size: int
    dtype: torch.dtype
    device: torch.device
    products: int

    def matmat(self, rows: Tensor) -> Tensor:
        """Row i of the result is the operator times row i of ``rows``, (m, size)."""
        ...


class CurvatureOperator(ABC):
    """A symmetric operator at the current weights of a space; a context manager that frees what it holds.

    Under ``torch.distributed`` the batches are shared among the processes: every process must make the same calls, and
    gets the same products.

    Args:
        objective: the mean loss.
        space: where, and with respect to which weights. The model must not change during the operator's life.
        offload: keep vectors and sums in host memory: the model's device holds one vector and one product at a time.

    Attributes:
        size, dtype, device: of vectors: entries of the space, what its weights have, and where they are, or the CPU.
        products: products with one vector made so far.
        label: what is not the exact Hessian names itself here (``kind`` of rows).

    Raises:
        UserError: half-precision weights, a model whose loss is not deterministic, or that has no finite loss.
    """

    label: str = ""

    def __init__(self, objective: Objective, space: WeightSpace, *, offload: bool = False) -> None:
        check_precision(space)
        check_deterministic(objective, space)
        self.objective = objective
        self.space = space
        self.size = space.size
        self.products = 0
        parameter = next(iter(space.parameters.values()))
        self.dtype, self._at_device = parameter.dtype, parameter.device
        self.device = torch.device("cpu") if offload else self._at_device
        self._offload = offload
        self._at = _state(space.model)
        shared = dist.is_available() and dist.is_initialized()
        rank, world = (dist.get_rank(), dist.get_world_size()) if shared else (0, 1)
        self._world = world
        self._mine = range(rank, len(objective.batches), world)

    def __call__(self, vector: Vector) -> Vector:
        """The operator times ``vector``; entries not named count as zero.

        Raises:
            UserError: the loss or the product is not finite, or the loss depends on no parameter of the space.
            ValueError: the vector does not fit the space.
            RuntimeError: the space's model was changed since the operator was made.
        """
        return self.many([vector])[0]

    def many(self, vectors: Sequence[Vector]) -> list[Vector]:
        """The operator times each vector: batches outside, vectors inside, so that a batch's graph serves them all.

        Raises:
            as calling it with one vector.
        """
        space = self.space
        rows = torch.zeros(len(vectors), self.size, dtype=self.dtype, device=self.device)
        for row, vector in zip(rows, vectors, strict=True):
            target = space.named_vector(row)
            for name, part in space.aligned(vector).items():
                target[name].copy_(part)
        return [space.named_vector(row) for row in self.matmat(rows)]

    def matmat(self, rows: Tensor) -> Tensor:
        """Row i of the result is the operator times row i of ``rows``, (m, size), summed over batches in float64.

        Raises:
            as calling it with one vector.
        """
        if rows.dim() != 2 or rows.shape[1] != self.size:
            raise ValueError(
                f"rows have shape {tuple(rows.shape)}: the {self.space.name} space has {self.size} entries"
            )
        self._check_point()
        with torch.inference_mode(False), torch.enable_grad():
            rows = rows.detach().to(self.device, self.dtype)
            totals = torch.cat([self._summed(part) for part in rows.split(1)]) if self._offload else self._summed(rows)
        self.products += len(rows)
        result = totals.to(self.dtype)
        if not bool(result.isfinite().all()):
            raise UserError(f"a curvature product is not finite: {self._reason()}")
        return result

    def gradient(self) -> Tensor:
        """∇L, (size,), summed over batches in float64.

        Raises:
            UserError: it is not finite.
        """
        self._check_point()
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            self._shared(torch.zeros(1, self.size, dtype=torch.float64, device=self.device)) as totals,
        ):
            for index in self._mine:
                self._add(totals[0], self._batch_gradient(index), self._share(index))
        if not bool(totals.isfinite().all()):
            raise UserError(f"the gradient is not finite: {self._reason()}")
        return totals[0].to(self.dtype)

    def as_linear_operator(self) -> LinearOperator:
        """The operator for scipy, on float64 arrays; products are made in the weights' dtype."""

        def matmat(columns: NDArray[np.float64]) -> NDArray[np.float64]:
            rows = torch.from_numpy(np.ascontiguousarray(columns.T))
            return self.matmat(rows).double().cpu().numpy().T

        def matvec(column: NDArray[np.float64]) -> NDArray[np.float64]:
            return matmat(column.reshape(-1, 1)).reshape(-1)

        return LinearOperator(
            shape=(self.size, self.size),
            matvec=matvec,
            rmatvec=matvec,
            matmat=matmat,
            rmatmat=matmat,
            dtype=np.dtype(np.float64),
        )

    @abstractmethod
    def close(self) -> None:
        """Free what is held between products. They go on working, more slowly."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def _summed(self, rows: Tensor) -> Tensor:
        """The products with ``rows``, (m, size) of float64."""

    def _batch_gradient(self, index: int) -> Sequence[Tensor]:
        return self.objective.batch_gradient(self.space, index)

    def _share(self, index: int) -> float:
        return self.objective.weights[index] / self.objective.weight

    def _add(self, total: Tensor, parts: Sequence[Tensor | None], share: float) -> None:
        start = 0
        for parameter, part in zip(self.space.parameters.values(), parts, strict=True):
            end = start + parameter.numel()
            if part is not None:
                total[start:end].add_(part.detach().reshape(-1).to(total.device), alpha=share)
            start = end

    @contextmanager
    def _shared(self, totals: Tensor) -> Iterator[Tensor]:
        """Sum what each process adds to ``totals`` inside the block; one that fails makes all others fail."""
        try:
            yield totals
        except Exception:
            if self._world > 1:
                dist.all_reduce(totals.fill_(torch.nan))
            raise
        if self._world > 1:
            dist.all_reduce(totals)

    def _reason(self) -> str:
        too_large = f"the weights are too large for {self.dtype}"
        return too_large if self._world == 1 else f"{too_large}, or another process failed and says why"

    def _check_point(self) -> None:
        if _state(self.space.model) != self._at:
            raise RuntimeError("the model was changed since this operator was made: make one at the new point")


def _state(model: nn.Module) -> list[tuple[int, int]]:
    """Changes when a weight of the model is replaced or changed, or a module starts or ends training."""
    weights = [(p.data_ptr(), p._version) for p in model.parameters()]
    return [*weights, *((id(module), module.training) for module in model.modules())]
