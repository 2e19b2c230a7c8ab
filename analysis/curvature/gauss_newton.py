"""``v ↦ Jᵀ·H_z·J·v``: the generalised Gauss–Newton matrix (Schraudolph 2002; Martens 2020, section 8).

    J = ∂z/∂W of a batch's logits z,   H_z = ∂²L/∂z² of its mean loss

Positive semidefinite where the loss is convex in the logits, as cross entropy is. ``J·v`` is the derivative along v of
``Jᵀ·u``, which is linear in u: two reverse passes, exact also where forward mode is not (``layer_norm``). Where the
graphs are kept, a product costs about 1.4 gradients.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from analysis.core.vectors import tensor_dot
from analysis.curvature.graphs import GraphOperator
from bilora.errors import UserError


class Linearisation(NamedTuple):
    """A batch's logits z, ∂L/∂z as a function of z, and Jᵀ·u as a function of u."""

    logits: Tensor
    slope: Tensor
    u: Tensor
    pulled: tuple[Tensor | None, ...]


class GaussNewtonOperator(GraphOperator):
    """The generalised Gauss–Newton matrix of the mean loss.

    Arguments, attributes and errors are those of :class:`~analysis.curvature.graphs.GraphOperator`; besides, the model
    must return the logits from which its loss is computed, and compute it from nothing else (``UserError``).
    """

    label = "ggn"
    _checked = False

    def _build(self, index: int) -> Linearisation:
        loss, logits = self._output(index)
        if logits is None or not logits.requires_grad:
            raise UserError("the Gauss–Newton matrix needs a model that returns the logits its loss is computed from")
        (slope,) = torch.autograd.grad(loss, logits, create_graph=True, allow_unused=True)
        if slope is None:
            raise UserError("the model's loss is not computed from the logits it returns: use curvature='hessian'")
        parameters = list(self.space.parameters.values())
        self._refuse_other_paths(loss, logits, slope, parameters)
        u = torch.zeros_like(logits, requires_grad=True)
        pulled = torch.autograd.grad(logits, parameters, u, create_graph=True, allow_unused=True)
        return Linearisation(logits, slope, u, pulled)

    def _product(self, graph: Linearisation, parts: list[Tensor], retain: bool) -> Sequence[Tensor | None]:
        parameters = list(self.space.parameters.values())
        pairs = [(p, part) for p, part in zip(graph.pulled, parts, strict=True) if p is not None and p.requires_grad]
        if not pairs or not graph.slope.requires_grad:  # no weight moves the logits, or the loss is linear in them
            return [None] * len(parameters)
        (moved,) = torch.autograd.grad(
            [pulled for pulled, _ in pairs], graph.u, [part for _, part in pairs], retain_graph=True
        )
        (bent,) = torch.autograd.grad(graph.slope, graph.logits, moved, retain_graph=True)
        return torch.autograd.grad(graph.logits, parameters, bent, retain_graph=retain, allow_unused=True)

    def _refuse_other_paths(self, loss: Tensor, logits: Tensor, slope: Tensor, parameters: Sequence[Tensor]) -> None:
        """A loss with terms besides the logits' (of a router, say) has a gradient that they do not explain."""
        if self._checked:
            return
        whole = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        through = torch.autograd.grad(logits, parameters, slope.detach(), retain_graph=True, materialize_grads=True)
        size = sum(tensor_dot(w, w) for w in whole)
        rest = sum(tensor_dot(w - t, w - t) for w, t in zip(whole, through, strict=True))
        if rest > 1e-6 * size:
            raise UserError(
                "the model's loss has terms besides that of its logits, which a Gauss–Newton matrix leaves out: "
                "use curvature='hessian'"
            )
        self._checked = True
