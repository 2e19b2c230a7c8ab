"""The rescaled variable of adaptive sharpness: ``eps = T∘delta`` with ``‖delta‖ ≤ rho``.

    isotropic:    T = 1                                        ‖eps‖ ≤ rho
    elementwise:  T_ij = |W_ij|                                ‖eps/|W|‖ ≤ rho            (ASAM, Kwon et al. 2021)
    filter:       T_ij = ‖W_i,:‖, 0 for 1-D parameters          Σ_i ‖eps_i,:‖²/‖W_i,:‖² ≤ rho²

With elementwise and filter T, rescaling a weight and undoing it elsewhere leaves the ball's image under the function
as it was (Andriushchenko et al. 2023). Where T is 0 the weight cannot move. In the full and the LoRA space every
parameter has rows; in the space of all parameters biases and gains move by elementwise T and stay under filter T, as in
filter normalisation.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from analysis.core.space import WeightSpace
from analysis.core.vectors import Vector
from bilora.errors import UserError

ScalingKind = Literal["isotropic", "elementwise", "filter"]


@dataclass(frozen=True, eq=False)
class Scaling:
    """T of one space at its weights when it was built; later changes of the weights do not reach it."""

    kind: ScalingKind
    factors: dict[str, Tensor]  # T by parameter, of a shape that broadcasts to the parameter's; empty for T = 1

    def applied(self, vector: Vector) -> Vector:
        """``T∘vector``: from delta to eps, and from the gradient in eps to the gradient in delta."""
        if not self.factors:
            return vector
        return {name: tensor * self.factors[name] for name, tensor in vector.items()}

    def movable(self, vector: Vector) -> Vector:
        """``vector`` with 0 where T is 0: a part of delta there would spend radius without moving a weight."""
        if not self.factors:
            return vector
        return {name: torch.where(self.factors[name] != 0, tensor, 0) for name, tensor in vector.items()}


def scaling_of(space: WeightSpace, kind: ScalingKind) -> Scaling:
    """T at the space's current weights.

    Args:
        space: its weights define T; in the LoRA space these are A and B, so that T depends on the gauge.
        kind: ``"isotropic"``, ``"elementwise"`` or ``"filter"``.

    Raises:
        UserError: T is 0 everywhere, so that no weight could move.
    """
    if kind == "isotropic":
        return Scaling(kind, {})
    if kind == "elementwise":
        factors = {name: p.detach().abs() for name, p in space.parameters.items()}
    else:
        rows = space.filter_norms()
        factors = {
            name: rows[name].view(-1, *[1] * (p.dim() - 1)) if name in rows else torch.zeros_like(p)
            for name, p in space.parameters.items()
        }
    if not any(bool(factor.any()) for factor in factors.values()):
        raise UserError(f"{kind} scaling is 0 on all of space {space.name}, no weight could move: use kind isotropic")
    return Scaling(kind, factors)
