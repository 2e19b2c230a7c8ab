"""Losses at perturbed weights with matrix products in bfloat16, from masters in full precision.

bfloat16 keeps eight bits: of a perturbation of relative size 1e-3 most entries would be lost if it were added to
weights that are stored so. Here the perturbation is added to the masters, and the weights of linear layers are rounded
once, for the forward pass. Weights of embeddings and layer norms and the classification head stay in full precision, as
under autocast, which would round the others again for every batch. What a BERT-like model's embeddings put out is
rounded, and with it the stream that runs through its layers, since conversions there and back take a tenth of the time.
"""

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from analysis.core.space import WeightSpace
from analysis.core.vectors import Vector, tensor_dot
from bilora.adapters.interrupts import Exchange
from bilora.adapters.layers import HEADS


class HalfSpace:
    """A copy of a space's model that follows perturbations of the space; :class:`Objective` takes it as a space.

    Attributes:
        model: the copy.
        space: the masters; never changed.
    """

    def __init__(self, space: WeightSpace) -> None:
        self.space = space
        self.name = space.name
        self.device = space.device
        self.model = deepcopy(space.model)
        twins = dict(zip(space.model.parameters(), self.model.parameters(), strict=True))
        self._twins = {name: twins[parameter] for name, parameter in space.parameters.items()}
        self._moved: set[str] = set()
        head = _head(self.model)
        own = set(head.parameters()) if head is not None else set()
        elsewhere = {p for module in self.model.modules() if not isinstance(module, nn.Linear) for p in _direct(module)}
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
            if parameter not in own and parameter not in elsewhere:
                parameter.data = parameter.data.bfloat16()
        embeddings = _embeddings(self.model)
        if embeddings is not None:
            embeddings.register_forward_hook(_rounded)
        if head is not None:
            head.forward = _in_full_precision(head.forward, self.device.type)

    def perturbed(self, direction: Vector, scale: float = 1.0) -> Exchange:
        """Let the copy hold the rounded ``master + scale·direction`` inside the block, and run it under autocast.

        Raises:
            ValueError: as :meth:`WeightSpace.perturbed`.
        """
        moved = self.space.aligned(direction)
        stale = self._moved - moved.keys()
        self._moved = self._moved | moved.keys()  # before any copy: an interrupt must not leave one unnamed
        for name in stale:
            self._twins[name].data.copy_(self.space.parameters[name].detach())
        for name, step in moved.items():
            self._twins[name].data.copy_(torch.add(self.space.parameters[name].detach(), step, alpha=scale))
        self._moved = set(moved)
        autocast = torch.autocast(self.device.type, dtype=torch.bfloat16)
        return Exchange(autocast.__enter__, lambda: autocast.__exit__(None, None, None))

    @torch.no_grad()
    def realised(self, direction: Vector, scale: float = 1.0) -> tuple[float, float]:
        """Length of what reaches the forward pass over ``‖scale·direction‖``, and its cosine with ``direction``.

        What reaches it is ``round(w + scale·direction) − round(w)`` over the entries of the space.
        """
        asked = inner = got = 0.0
        for name, step in self.space.aligned(direction).items():
            weight, dtype = self.space.parameters[name], self._twins[name].dtype
            change = torch.add(weight, step, alpha=scale).to(dtype).double() - weight.to(dtype).double()
            wanted = step.double() * scale
            asked += tensor_dot(wanted, wanted)
            got += tensor_dot(change, change)
            inner += tensor_dot(change, wanted)
        if not asked or not got:
            return 0.0, math.nan
        return math.sqrt(got / asked), inner / math.sqrt(asked * got)


def _direct(module: nn.Module) -> Iterator[nn.Parameter]:
    return module.parameters(recurse=False)


def _head(model: nn.Module) -> nn.Module | None:
    """The classification head of a transformers model, wherever an adapter has put it."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            for name in HEADS:
                head = getattr(module, name, None)
                if isinstance(head, nn.Module) and any(True for _ in head.parameters()):
                    return head
    return None


def _embeddings(model: nn.Module) -> nn.Module | None:
    """The module that makes hidden states of tokens, in models that have one for it."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and isinstance(getattr(module, "embeddings", None), nn.Module):
            return module.get_submodule("embeddings")
    return None


def _rounded(_: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
    return output.bfloat16() if isinstance(output, Tensor) else output


def _in_full_precision(forward: Callable[..., Any], device: str) -> Callable[..., Any]:
    """A loss from bfloat16 logits would have two digits."""

    def run(*arguments: Any) -> Any:
        with torch.autocast(device, enabled=False):
            return forward(*(a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments))

    return run
