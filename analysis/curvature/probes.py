"""Random vectors of the stochastic estimators, addressed like all random numbers here: by what they are for."""

import torch
from torch import Tensor

from analysis.curvature.operator import SymmetricOperator
from bilora.seeds import generator_for

PROBES = 4
"""Vectors multiplied at once: a graph that is rebuilt serves all of them."""


def gaussian(operator: SymmetricOperator, *address: object) -> Tensor:
    """The standard normal probe of that address, (n,), in the operator's dtype and on its device."""
    return torch.randn(operator.size, generator=generator_for(*address)).to(operator.device, operator.dtype)


def rademacher(operator: SymmetricOperator, *address: object) -> Tensor:
    """The probe of random signs of that address, (n,), in the operator's dtype and on its device."""
    bits = torch.randint(0, 2, (operator.size,), generator=generator_for(*address), dtype=torch.int8)
    return (2 * bits - 1).to(operator.device, operator.dtype)
