"""LoRA-SAM: sharpness-aware minimization on the LoRA factors (Foret et al. 2021; Li, Zhang, He 2024, arXiv 2410.14802).

    F = sqrt(Σ_layers ‖∂L/∂B‖² + ‖∂L/∂A‖²)
    eps_B = rho·∂L/∂B / F,   eps_A = rho·∂L/∂A / F
    descend along the gradient of the same batch at (A + eps_A, B + eps_B), taken from (A, B)

The induced perturbation of the merged weight, s·(B·eps_A + eps_B·A + eps_B·eps_A), lies in Col(B) and Row(A) up to its
last term.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from bilora.adapters.layers import adapted_layers
from bilora.adapters.swap import perturbed
from bilora.methods.base import Method, Step
from bilora.methods.checks import check_positive


@dataclass(kw_only=True)
class LoraSam(Method):
    """LoRA-SAM: ascend in factor space, then descend along the gradient found there.

    Args:
        rho: radius of the perturbation in factor space, over all layers together.

    Raises:
        UserError: rho is not above 0.
    """

    name: ClassVar[str] = "lora_sam"
    summary: ClassVar[str] = "SAM on the LoRA factors: perturbs in Col(B) and Row(A)"
    source: ClassVar[str] = "Foret et al. 2021, arXiv 2010.01412; Li, Zhang, He 2024, arXiv 2410.14802"
    passes: ClassVar[float] = 2
    replays: ClassVar[bool] = True

    rho: float = 0.05

    def __post_init__(self) -> None:
        check_positive(self.name, "rho", self.rho)
        self._factors: list[nn.Parameter] = []
        self._gradient_norm = float("nan")

    def prepare(self, model: nn.Module, seed: int) -> None:
        self._factors = [p for layer in adapted_layers(model).values() for p in (layer.A, layer.B)]

    def extra_passes(self, step: Step, replay: Callable[[], None]) -> None:
        gradients = {p: p.grad for p in self._factors if p.grad is not None}
        norm = _norm(list(gradients.values()))
        self._gradient_norm = norm
        # A zero gradient gives no direction; a non-finite one must not reach the weights: keep the plain gradient.
        if not 0 < norm < float("inf"):
            return
        with perturbed(gradients, scale=self.rho / norm):
            replay()

    def metrics(self) -> dict[str, float]:
        return {"factor_grad_norm": self._gradient_norm}


def _norm(tensors: list[Tensor]) -> float:
    """Frobenius norm over all tensors, the last reduction in float64."""
    return float(torch.stack([n.double().cpu() for n in torch._foreach_norm(tensors)]).norm()) if tensors else 0.0
