"""The one place where weights are replaced for a while and put back bit for bit."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def swapped(replacements: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Let every parameter hold another tensor inside the ``with`` block.

    The original storage is set aside, never written: what comes back is bit-identical, also when the block raises,
    and there is no add-then-subtract rounding. A tied parameter is one object and is replaced everywhere at once.

    Backward passes through a forward of the block must run inside the block, since autograd reads the parameter's
    current tensor.

    Args:
        replacements: parameter → tensor of the same shape, dtype and device. Memory: one copy of these parameters.

    Raises:
        ValueError: a replacement differs from its parameter in shape, dtype or device.
    """
    for parameter, tensor in replacements.items():
        if (tensor.shape, tensor.dtype, tensor.device) != (parameter.shape, parameter.dtype, parameter.device):
            raise ValueError(
                f"a replacement of shape {tuple(tensor.shape)}, {tensor.dtype}, {tensor.device} does not fit a "
                f"parameter of shape {tuple(parameter.shape)}, {parameter.dtype}, {parameter.device}"
            )
    originals = {parameter: parameter.data for parameter in replacements}
    try:
        for parameter, tensor in replacements.items():
            parameter.data = tensor
        yield
    finally:
        for parameter, original in originals.items():
            parameter.data = original


@contextmanager
def perturbed(perturbations: Mapping[nn.Parameter, Tensor], scale: float = 1.0) -> Iterator[None]:
    """:func:`swapped` with ``parameter + scale·perturbation`` for each ``parameter → perturbation``."""
    with torch.no_grad():
        moved = {p: torch.add(p.data, e.to(p.dtype), alpha=scale) for p, e in perturbations.items()}
    with swapped(moved):
        yield
