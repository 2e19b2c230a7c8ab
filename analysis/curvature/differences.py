"""Hessian products by finite differences of the gradient, for a quick look.

    central:    (∇L(W + h·v) − ∇L(W − h·v)) / 2h        2 gradients a product
    one-sided:  (∇L(W + h·v) − ∇L(W)) / h               1 gradient a product, and one in all

The step is scaled to vector and weights: ``h·‖v‖ = c·‖W‖`` with c = eps^(1/3)/7 and eps^(1/2)/2 of the weights' dtype:
the orders at which truncation and rounding balance (Nocedal & Wright, Numerical Optimization, section 8.1), the factors
tuned on BERTs in float32. There the error of a product is below 2e-3 with central and below 2e-2 with one-sided
differences; eigenpairs keep residuals near 1e-2, and larger ones where curvature is small.
"""

from typing import Literal

import torch
from torch import Tensor

from analysis.core.objective import Objective
from analysis.core.space import WeightSpace
from analysis.core.vectors import norm, tensor_dot
from analysis.curvature.operator import CurvatureOperator
from bilora.errors import UserError

Differences = Literal["central", "one-sided"]


class DifferenceOperator(CurvatureOperator):
    """Approximate Hessian products. The weights are moved and put back bit for bit.

    Args:
        objective: the mean loss.
        space: where, and with respect to which weights.
        kind: ``"central"`` or ``"one-sided"``.
        offload: as :class:`CurvatureOperator`.

    Attributes:
        as :class:`CurvatureOperator`; ``label`` is "central differences" or "one-sided differences".

    Raises:
        UserError: an unknown kind, or as :class:`CurvatureOperator`.
    """

    def __init__(
        self, objective: Objective, space: WeightSpace, *, kind: Differences = "central", offload: bool = False
    ) -> None:
        if kind not in ("central", "one-sided"):
            raise UserError(f"differences is {kind!r}: choose central or one-sided")
        super().__init__(objective, space, offload=offload)
        self.label = f"{kind} differences"
        self._central = kind == "central"
        eps = torch.finfo(self.dtype).eps
        relative = eps ** (1 / 3) / 7 if self._central else eps ** (1 / 2) / 2
        self._length = relative * (norm(dict(space.parameters)) or 1.0)
        self._here: Tensor | None = None

    def close(self) -> None:
        """Free the gradient that one-sided differences share."""
        self._here = None

    def gradient(self) -> Tensor:
        """∇L, (size,), which one-sided differences share."""
        return self._gradient_here().to(self.dtype)

    def _summed(self, rows: Tensor) -> Tensor:
        return torch.stack([self._difference(row) for row in rows])

    def _difference(self, row: Tensor) -> Tensor:
        length = tensor_dot(row, row) ** 0.5
        if not length:
            return torch.zeros_like(row, dtype=torch.float64)
        step = self._length / length
        ahead = self._gradient_at(row, step)
        if self._central:
            return (ahead - self._gradient_at(row, -step)) / (2 * step)
        return (ahead - self._gradient_here()) / step

    def _gradient_here(self) -> Tensor:
        if self._here is None:
            self._check_point()
            self._here = self._gradient_at(None)
        return self._here

    def _gradient_at(self, row: Tensor | None, scale: float = 0.0) -> Tensor:
        totals = torch.zeros(self.size, dtype=torch.float64, device=self.device)
        moved = {} if row is None else self.space.named_vector(row.to(self._at_device))
        with self.space.perturbed(moved, scale), self._shared(totals):
            for index in self._mine:
                self._add(totals, self._batch_gradient(index), self._share(index))
        if not bool(totals.isfinite().all()):  # checked by every process, or one would wait for another that has left
            failed = ", or another process failed and says why" if self._world > 1 else ""
            raise UserError(f"the gradient a finite step away is not finite: use exact products{failed}")
        return totals
