"""Telling one base model from another."""

import hashlib

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

SAMPLED_BYTES = 4096


def base_fingerprint(model: nn.Module) -> str:
    """SHA-256 of the pretrained weights of ``model``: name, shape, dtype, first and last 4096 bytes of each tensor.

    The same before and after PEFT wrapping and adapter training, on any device. Adapter weights do not count, nor
    does what lies outside the pretrained body (``base_model_prefix``), such as a classifier or a language head.
    Milliseconds for small models; reads at most 8 KiB a tensor.
    """
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    body = getattr(model, getattr(model, "base_model_prefix", "") or "", model)
    digest = hashlib.sha256()
    for name, tensor in sorted(_pretrained_tensors(body).items()):
        digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
        flat = tensor.detach().reshape(-1)
        count = SAMPLED_BYTES // tensor.element_size()
        for part in (flat[:count], flat[-count:]):
            digest.update(part.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _pretrained_tensors(body: nn.Module) -> dict[str, Tensor]:
    """The state of ``body`` by its names before PEFT wrapped it."""
    wrapped: dict[str, str] = {}
    for path, module in body.named_modules():
        if isinstance(module, BaseTunerLayer):
            wrapped[path] = "base_layer"
        elif isinstance(module, ModulesToSaveWrapper):
            wrapped[path] = "original_module"
    kept: dict[str, Tensor] = {}
    for name, tensor in body.state_dict().items():
        parts, path = [], ""
        for part in name.split("."):
            inner = wrapped.get(path)
            path = f"{path}.{part}" if path else part
            if inner is None:
                parts.append(part)
            elif part != inner:
                break
        else:
            kept[".".join(parts)] = tensor
    return kept
