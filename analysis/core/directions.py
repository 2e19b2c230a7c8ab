"""Random directions addressed by seed, number and parameter name: the same for every compared model."""

import torch

from analysis.core.space import WeightSpace
from analysis.core.vectors import Vector
from bilora.seeds import generator_for


def gaussian(space: WeightSpace, seed: int, index: int) -> Vector:
    """Direction number ``index`` of ``seed``: independent N(0, 1) entries in every parameter of ``space``.

    A parameter's entries depend on ``(seed, index, parameter name)`` and its shape alone, neither on the other
    parameters nor on device or dtype: models with the same layers get the same direction.
    """
    direction: Vector = {}
    for name, parameter in space.parameters.items():
        generator = generator_for("direction", seed, index, name)
        direction[name] = torch.randn(parameter.shape, generator=generator, dtype=torch.float32).to(parameter)
    return direction


def filter_normalized(space: WeightSpace, direction: Vector) -> Vector:
    """``direction`` with each output row scaled to the norm of the same row of the weight (Li et al. 2018, eq. 1).

    Parameters with one dimension (biases, LayerNorm gains) get zero, as do rows in which the direction is zero.
    """
    norms = space.filter_norms()
    normalized: Vector = {}
    for name, step in space.aligned(direction).items():
        if name not in norms:
            normalized[name] = torch.zeros_like(step)
            continue
        own = step.flatten(1).double().norm(dim=1)
        ratio = torch.where(own > 0, norms[name].double() / own.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
        normalized[name] = step * ratio.to(step.dtype).view(-1, *[1] * (step.dim() - 1))
    return normalized
