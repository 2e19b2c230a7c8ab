"""Many Hessian–vector products at one point, with the gradient's graph kept alive between them."""

from types import TracebackType

import torch
from torch import Tensor

from analysis.core.objective import Objective, Sum, product
from analysis.core.space import WeightSpace
from analysis.core.vectors import Vector


class HessianOperator:
    """``v ↦ ∇²L·v`` of an objective at the current weights of a space; a context manager that frees its graphs.

    A product is a forward, a backward and a backward through the backward. With ``retain`` the first two are done
    once a batch and shared by all products, which costs 2.0–2.2 gradients a product instead of 3.2; the numbers are
    the same.

    Args:
        objective: the mean loss.
        space: where, and with respect to which weights. They must not change during the operator's life.
        retain: keep the graphs.
        budget: bytes that retained graphs may take; batches beyond it are rebuilt at each product. None: no limit.

    Attributes:
        products: number of products so far.
    """

    def __init__(
        self, objective: Objective, space: WeightSpace, *, retain: bool = False, budget: int | None = None
    ) -> None:
        self.objective = objective
        self.space = space
        self.products = 0
        self._at = _addresses(space)
        self._retained: list[tuple[Tensor, ...]] = []
        if retain:
            self._retain(budget)

    @property
    def retained(self) -> int:
        """Number of batches whose graph is kept."""
        return len(self._retained)

    def __call__(self, vector: Vector) -> Vector:
        """∇²L·vector, summed over batches in float64; entries not named count as zero.

        Raises:
            UserError: the loss or the product is not finite, or the loss depends on no parameter of the space.
            ValueError: the vector does not fit the space.
            RuntimeError: the space's weights were replaced since the operator was made.
        """
        if _addresses(self.space) != self._at:
            raise RuntimeError("the weights were replaced since this operator was made: make one at the new point")
        objective, space = self.objective, self.space
        total = Sum(space)
        for index, weight in enumerate(objective.weights):
            if index < len(self._retained):
                parts = product(self._retained[index], space, vector, retain_graph=True)
            else:
                parts = product(objective.gradient_graph(space, index), space, vector)
            total.add(parts, weight / objective.weight)
        self.products += 1
        return total.vector("the Hessian–vector product")

    def close(self) -> None:
        """Free the retained graphs. Products go on working, rebuilt each time."""
        self._retained.clear()

    def __enter__(self) -> "HessianOperator":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _retain(self, budget: int | None) -> None:
        meter = _GraphMeter(self.space)
        for index in range(len(self.objective.batches)):
            with torch.autograd.graph.saved_tensors_hooks(meter.pack, meter.unpack):
                graph = self.objective.gradient_graph(self.space, index)
            if budget is not None and meter.bytes > budget:
                break
            self._retained.append(graph)


class _GraphMeter:
    """Counts the bytes that autograd graphs keep alive beyond the space's model."""

    def __init__(self, space: WeightSpace) -> None:
        self.bytes = 0
        self._seen = {p.untyped_storage().data_ptr() for p in space.model.parameters()}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor.detach()  # a saved output that kept its own graph would be a cycle, never freed

    def unpack(self, tensor: Tensor) -> Tensor:
        return tensor


def _addresses(space: WeightSpace) -> list[int]:
    return [p.data_ptr() for p in space.parameters.values()]
