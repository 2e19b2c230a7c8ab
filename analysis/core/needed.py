"""Running a model without the outputs that nobody reads.

The head of a BERT-like sequence classifier reads one position, the first. In the last layer every other position is
needed as key and value alone: its attention output and feed-forward network, nine of twelve equal matrix products, are
never read. Leaving them out changes neither the loss nor any derivative. (In DistilBERT the attention output is kept.)
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

TOLERANCE = 1e-5
"""Relative difference of loss and logits up to which the shorter run counts as the same."""

_found: WeakKeyDictionary[nn.Module, nn.Module | None] = WeakKeyDictionary()


def run_model(model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
    """``model(**batch)``, in which hidden states past the last attention may lack all positions but the first.

    Whether the model allows it is found out at its first batch of more than one position, by running both ways and
    comparing loss and logits; where they differ, the model is run as it is from then on.
    """
    # What is returned must not depend on whether this was the first batch: rounding may differ between both ways.
    inner = _found[model] if model in _found else _compared(model, batch)
    with nullcontext() if inner is None else first_position(inner):
        return model(**batch)


@contextmanager
def first_position(module: nn.Module) -> Iterator[None]:
    """Inside the block ``module`` gets position 0 of its (batch, positions, features) arguments only."""

    def shortened(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        return tuple(_first(value) for value in arguments), {name: _first(value) for name, value in named.items()}

    hook = module.register_forward_pre_hook(shortened, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _first(value: Any) -> Any:
    return value[:, :1] if isinstance(value, Tensor) and value.dim() == 3 else value


@torch.no_grad()
def _compared(model: nn.Module, batch: Mapping[str, Tensor]) -> nn.Module | None:
    """The module to shorten, if any; remembers the answer where the batch can give one."""
    candidate = _last_attention_output(model)
    if candidate is None:
        _found[model] = None
        return None
    tokens = batch.get("input_ids")
    if tokens is None or tokens.dim() != 2 or tokens.shape[1] < 2:
        return None
    expected = _numbers(model(**batch))
    if expected is None or not bool(expected.isfinite().all()):
        return None
    try:
        with first_position(candidate):
            got = _numbers(model(**batch))
    except (RuntimeError, ValueError, IndexError):
        got = None
    same = got is not None and got.shape == expected.shape and torch.allclose(got, expected, TOLERANCE, TOLERANCE)
    _found[model] = candidate if same else None
    return _found[model]


def _last_attention_output(model: nn.Module) -> nn.Module | None:
    """What follows the last attention of a sequence classifier built like BERT or DistilBERT."""
    for module in model.modules():
        if not type(module).__name__.endswith("ForSequenceClassification"):
            continue
        body = getattr(module, getattr(module, "base_model_prefix", ""), None)
        layers = getattr(getattr(body, "encoder", None) or getattr(body, "transformer", None), "layer", None)
        if isinstance(layers, nn.ModuleList) and len(layers):
            last = layers[-1]
            found = getattr(last, "sa_layer_norm", None)
            if isinstance(getattr(last, "intermediate", None), nn.Module):
                found = getattr(getattr(last, "attention", None), "output", None)
            if isinstance(found, nn.Module):
                return found
    return None


def _numbers(output: Any) -> Tensor | None:
    loss, logits = getattr(output, "loss", None), getattr(output, "logits", None)
    if not isinstance(loss, Tensor) or not isinstance(logits, Tensor):
        return None
    return torch.cat([loss.detach().reshape(-1), logits.detach().reshape(-1)])
