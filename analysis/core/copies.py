"""Standalone evaluation copies of a user's model."""

from copy import deepcopy
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from bilora.adapters.auxiliary import AuxiliaryVariant
from bilora.adapters.layers import AdaptedLayer, adapted_layers
from bilora.errors import UserError


def evaluation_dtype(model: nn.Module) -> torch.dtype:
    """float64 if any parameter is, else float32: nothing the user's model holds is rounded."""
    return torch.float64 if any(p.dtype == torch.float64 for p in model.parameters()) else torch.float32


def evaluation_copy(model: nn.Module) -> nn.Module:
    """A copy in :func:`evaluation_dtype`, ``eval()``, without gradients or key-value cache; ``model`` is untouched.

    Raises:
        UserError: the model has quantised weights, or its adapter is merged, disabled or outside a ``PeftModel``.
    """
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise UserError(f"{name} is stored as {parameter.dtype}: load the model unquantised to measure it")
    if isinstance(model, PeftModel):
        for layer in adapted_layers(model).values():
            if layer.module.merged:
                raise UserError(f"the adapter of {layer.name} is merged in place: call model.unmerge_adapter() first")
            if layer.module.disable_adapters:
                raise UserError("the adapter is disabled: call model.enable_adapter_layers() first")
    elif any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise UserError("this model holds adapter layers but is no PeftModel: pass the PeftModel that wraps it")
    copy = deepcopy(model).eval()
    # nn.Module's own method: transformers refuses to cast models that were ever quantised, also once dequantised.
    nn.Module.to(copy, dtype=evaluation_dtype(model))
    for parameter in copy.parameters():
        parameter.grad = None
        parameter.requires_grad_(False)
    config: Any = getattr(copy, "config", None)
    if getattr(config, "use_cache", False):
        config.use_cache = False
    return copy


def merged_copy(model: nn.Module) -> nn.Module:
    """:func:`evaluation_copy` with the active adapter merged in by PEFT and every ``Conv1D`` replaced by ``nn.Linear``.

    Merging happens in the copy's precision, so a bf16 base gains the update without rounding it away. A weight that an
    adapted layer shares with another module (a tied output embedding) is untied first, as it is in the adapted model.

    Raises:
        UserError: as :func:`evaluation_copy`, or a merged weight is not finite.
    """
    copy = evaluation_copy(model)
    if isinstance(copy, PeftModel):
        layers = adapted_layers(copy)
        _untie(copy, layers)
        copy = copy.merge_and_unload()
        for name in layers:
            if not bool(copy.get_parameter(f"{name}.weight").isfinite().all()):
                raise UserError(f"the merged weight of {name} is not finite: the training diverged, take a sound one")
    for name, module in list(copy.named_modules()):
        if isinstance(module, Conv1D):
            copy.set_submodule(name, _linear(module))
    return copy


def has_plain_factors(layer: AdaptedLayer) -> bool:
    """Whether the merged weight is ``W0 + s·B·A``, without DoRA or another variant of PEFT's."""
    variant = layer.module.lora_variant.get(layer.adapter)
    return variant is None or isinstance(variant, AuxiliaryVariant)


def _untie(model: nn.Module, layers: dict[str, AdaptedLayer]) -> None:
    users: dict[nn.Parameter, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users[parameter] = users.get(parameter, 0) + 1
    for layer in layers.values():
        base = layer.module.get_base_layer()
        if users[base.weight] > 1:
            base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)


def _linear(conv: Conv1D) -> nn.Linear:
    """The ``nn.Linear`` that computes what GPT-2's ``Conv1D``, stored (in, out), computes."""
    linear = nn.Linear(conv.nx, conv.nf, device="meta").eval()
    linear.weight = nn.Parameter(conv.weight.detach().T.contiguous(), requires_grad=False)
    linear.bias = conv.bias
    return linear
