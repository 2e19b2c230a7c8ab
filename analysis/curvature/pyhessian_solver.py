"""PyHessian (Yao et al. 2020) on our objective, as a second opinion."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyhessian import hessian
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from analysis.core.measure import Watch
from analysis.core.objective import Objective
from analysis.core.space import WeightSpace
from analysis.core.vectors import Vector
from bilora.seeds import generator_for


@contextmanager
def pyhessian_engine(objective: Objective, space: WeightSpace, seed: int) -> Iterator[tuple[Any, "LossModel"]]:
    """PyHessian's ``hessian`` of the objective, and the model it runs, which counts its losses.

    Inside, the global random state is seeded for PyHessian's starts and nothing but the space requires a gradient, by
    which PyHessian chooses parameters; afterwards all is as before.
    """
    adapter = LossModel(objective, space)
    devices = [space.device] if space.device.type == "cuda" else []
    own = set(space.parameters.values())
    others = [p for p in space.model.parameters() if p.requires_grad and p not in own]
    held = [(p, p.grad) for p in own]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        with torch.random.fork_rng(devices), warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
            warnings.filterwarnings("ignore", message=".*backward.*create_graph.*")
            torch.manual_seed(generator_for("pyhessian", seed).initial_seed())
            batches = _Batches(objective)
            yield hessian(adapter, _loss, dataloader=batches, cuda=space.device.type == "cuda"), adapter
    finally:
        for parameter, gradient in held:
            parameter.grad = gradient
        for parameter in others:
            parameter.requires_grad_(True)


def pyhessian_eigenpairs(
    objective: Objective,
    space: WeightSpace,
    k: int,
    tolerance: float,
    max_iterations: int,
    seed: int,
    watch: Watch | None = None,
) -> tuple[list[float], list[Vector], int]:
    """The ``k`` eigenpairs of largest magnitude as PyHessian finds them, and the products it made.

    Args:
        tolerance: relative change of the eigenvalue between two iterations at which PyHessian stops.
        max_iterations: per eigenpair.
        watch: told of (products so far, ``k·max_iterations``, "").
    """
    names = {parameter: name for name, parameter in space.parameters.items()}
    ordered = [names[p] for p in space.model.parameters() if p in names]
    with pyhessian_engine(objective, space, seed) as (engine, adapter):
        if watch is not None:
            adapter.each_product = lambda products: watch(products, k * max_iterations, "")
        values, vectors = engine.eigenvalues(maxIter=max_iterations, tol=tolerance, top_n=k)
    named = [dict(zip(ordered, (part.detach() for part in vector), strict=True)) for vector in vectors]
    return [float(value) for value in values], named, adapter.products


class _Batches:
    """Batches as PyHessian reads them, (inputs, targets).

    PyHessian weights a batch by ``inputs.size(0)``. The inputs are therefore the batch's number, repeated as often as
    the batch has terms in the loss: the weights are then the objective's, also for language models.
    """

    def __init__(self, objective: Objective) -> None:
        self._weights = objective.weights

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index, weight in enumerate(self._weights):
            yield torch.full((weight,), index), torch.empty(0)


class LossModel(nn.Module):
    """Batch number → mean loss of that batch."""

    def __init__(self, objective: Objective, space: WeightSpace) -> None:
        super().__init__()
        self.model = space.model
        self.losses = 0
        self.each_product: Callable[[int], None] = lambda products: None
        self._objective = objective
        self._space = space

    @property
    def products(self) -> int:
        """Products made so far: passes over all batches."""
        return self.losses // len(self._objective.batches)

    def forward(self, index: Tensor) -> Tensor:
        self.losses += 1
        if self.losses % len(self._objective.batches) == 0:
            self.each_product(self.products)
        loss = self._objective.batch_loss(self._space, int(index[0]))
        # PyHessian fails on a parameter without a gradient: give every parameter one, which is exactly zero.
        return loss + sum((p * p).sum() for p in self._space.parameters.values()) * 0.0


def _loss(output: Tensor, target: Tensor) -> Tensor:
    return output
