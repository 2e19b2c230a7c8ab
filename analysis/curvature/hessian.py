"""``v ↦ ∇²L·v`` by reverse-over-reverse differentiation.

A product is a forward, a backward and a backward through the backward: 3.7 gradients, or 2.2 where the first two are
kept (``benchmarks/products.py``). Of a batch's gradient its place in the graph is kept, not its values. Forward-mode
differentiation is avoided: it is silently wrong through ``layer_norm`` (pytorch#198017).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from analysis.curvature.graphs import GraphOperator


class HessianOperator(GraphOperator):
    """The Hessian of the mean loss.

    Arguments, attributes and errors are those of :class:`~analysis.curvature.graphs.GraphOperator`.
    """

    def _build(self, index: int) -> tuple[Tensor, ...]:
        loss, _ = self._output(index)
        parameters = list(self.space.parameters.values())
        return torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True, materialize_grads=True)

    def _kept(self, built: tuple[Tensor, ...]) -> list[GradientEdge | None]:
        return [get_gradient_edge(gradient) if gradient.requires_grad else None for gradient in built]

    def _product(self, graph: list[GradientEdge | None], parts: list[Tensor], retain: bool) -> Sequence[Tensor | None]:
        parameters = list(self.space.parameters.values())
        pairs = [(gradient, part) for gradient, part in zip(graph, parts, strict=True) if gradient is not None]
        if not pairs:  # the gradient is constant
            return [None] * len(parameters)
        return torch.autograd.grad(
            [gradient for gradient, _ in pairs],
            parameters,
            [part for _, part in pairs],
            retain_graph=retain,
            allow_unused=True,
        )

    def _batch_gradient(self, index: int) -> Sequence[Tensor]:
        return self._built(index)[0]
