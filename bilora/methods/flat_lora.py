"""Flat-LoRA: descend at randomly perturbed merged weights (Li et al. ICML 2025, arXiv 2409.14396).

    W' = W0 + s·B·A                                  (m × n)
    E_ij ~ N(0, sigma_t²/n · ‖W'_i,:‖²)              a fresh draw each optimizer step
    sigma_t = sigma·½(1 − cos(π·t/T))                rising from 0
    descend (A, B) along the gradient at W' + E

The noise is never added to the stored weight: while a micro-batch runs, the base layer holds another tensor, W0 + E,
and afterwards it holds the untouched original again. The published code adds and subtracts, which drifts.
Memory: one copy of the adapted base weights while a window lasts.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from bilora.adapters.layers import AdaptedLayer, adapted_layers
from bilora.adapters.swap import swapped
from bilora.errors import UserError
from bilora.methods.base import Method, Step
from bilora.methods.checks import check_not_negative
from bilora.seeds import generator_for


@dataclass(kw_only=True)
class FlatLora(Method):
    """Flat-LoRA: one Gaussian draw per optimizer step, scaled by the norms of the merged weight's rows.

    Args:
        sigma: strength reached at the end of training, relative to a row's norm: 0.05 for language, 0.1 to 0.15
            for vision.

    Raises:
        UserError: sigma is negative, or the base weights are quantised.
    """

    name: ClassVar[str] = "flat_lora"
    summary: ClassVar[str] = "random filter-scaled noise on the merged weights"
    source: ClassVar[str] = "Li et al. ICML 2025, arXiv 2409.14396"
    passes: ClassVar[float] = 1

    sigma: float = 0.05

    def __post_init__(self) -> None:
        check_not_negative(self.name, "sigma", self.sigma)
        self._layers: dict[str, AdaptedLayer] = {}
        self._noisy: dict[nn.Parameter, Tensor] = {}
        self._drawn_at: int | None = None
        self._sigma_t = 0.0

    def prepare(self, model: nn.Module, seed: int) -> None:
        self._layers = adapted_layers(model)
        for name, layer in self._layers.items():
            if not layer.base_weight.is_floating_point():
                raise UserError(
                    f"flat_lora perturbs base weights, and {name} is quantised ({layer.base_weight.dtype}): "
                    "load the base model in a floating-point type"
                )
        self._base_norms = {name: _squared_row_norms(layer) for name, layer in self._layers.items()}
        self._noisy, self._drawn_at = {}, None

    @contextmanager
    def perturbed(self, step: Step) -> Iterator[None]:
        if self._drawn_at != step.index:
            self._draw(step)
        with swapped(self._noisy):
            yield

    def after_update(self, step: Step) -> None:
        self._noisy, self._drawn_at = {}, None

    def metrics(self) -> dict[str, float]:
        return {"sigma_t": self._sigma_t}

    def finish(self) -> None:
        self._layers, self._noisy, self._drawn_at = {}, {}, None

    @torch.no_grad()
    def _draw(self, step: Step) -> None:
        self._sigma_t = self.sigma * 0.5 * (1 - math.cos(math.pi * step.index / max(1, step.total)))
        self._noisy = {}
        self._drawn_at = step.index
        if self._sigma_t == 0:
            return
        for name, layer in self._layers.items():
            weight = layer.base_weight
            std = self._sigma_t * (merged_squared_row_norms(layer, self._base_norms[name]) / layer.A.shape[1]).sqrt()
            generator = generator_for("flat_lora", step.seed, step.index, name, device=weight.device)
            noise = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device).normal_(generator=generator)
            column = (std[None, :] if layer.transposed else std[:, None]).to(weight.dtype)
            self._noisy[weight] = torch.addcmul(weight.data, noise, column, out=noise)


def _squared_row_norms(layer: AdaptedLayer) -> Tensor:
    """‖W0_i,:‖² for each output row, (m,), float32 or better."""
    weight = layer.base_weight.detach()
    weight = weight if weight.dtype == torch.float64 else weight.float()
    return weight.square().sum(dim=0 if layer.transposed else 1)


@torch.no_grad()
def merged_squared_row_norms(layer: AdaptedLayer, base: Tensor) -> Tensor:
    """‖(W0 + s·B·A)_i,:‖² for each output row, (m,), without forming B·A.

    ``‖W0_i‖² + 2s·(W0·Aᵀ)_i·B_i + s²·(B·A·Aᵀ)_i·B_i``, with ``base`` = ‖W0_i‖² of a weight that does not change.
    """
    A, B = layer.A.detach().to(base.dtype), layer.B.detach().to(base.dtype)
    weight = layer.base_weight.detach().to(base.dtype)
    projected = (A @ weight).T if layer.transposed else weight @ A.T
    cross = (projected * B).sum(dim=1)
    update = ((B @ (A @ A.T)) * B).sum(dim=1)
    return (base + 2 * layer.scale * cross + layer.scale**2 * update).clamp_min(0)
