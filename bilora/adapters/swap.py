"""The one place where weights are replaced for a while and put back bit for bit."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bilora.adapters.interrupts import Exchange


def swapped(replacements: Mapping[nn.Parameter, Tensor]) -> Exchange:
    """Let every parameter hold another tensor inside the ``with`` block.

    The original storage is set aside, never written: what comes back is bit-identical, also when the block raises or
    Ctrl+C comes while weights are being exchanged, and there is no add-then-subtract rounding. A tied parameter is one
    object and is replaced everywhere at once.

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
    originals: dict[nn.Parameter, Tensor] = {}

    def replace() -> None:
        originals.update((parameter, parameter.data) for parameter in replacements)
        for parameter, tensor in replacements.items():
            parameter.data = tensor

    def restore() -> None:
        for parameter, original in originals.items():
            parameter.data = original

    return Exchange(replace, restore)


def perturbed(perturbations: Mapping[nn.Parameter, Tensor], scale: float = 1.0) -> Exchange:
    """:func:`swapped` with ``parameter + scale·perturbation`` for each ``parameter → perturbation``."""
    return swapped({p: torch.add(p.data, e.detach().to(p.dtype), alpha=scale) for p, e in perturbations.items()})
