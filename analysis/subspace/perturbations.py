"""The perturbations of the merged weights whose reach is compared, each as eps_W of every adapted layer.

    auxiliary         s2·B2·A2, Bi-LoRA's trained auxiliary pair
    lora_sam          s·((B + eps_B)(A + eps_A) − B·A),  eps = rho·∂/F,  F² = Σ ‖∂B‖² + ‖∂A‖²
    gradient          rho·G/‖G‖, SAM in the full space (only its direction matters here)
    gradient_rank_r   rho·G_r/‖G_r‖, r the rank of the layer's adapter
    filter_noise      eps_ij ~ N(0, sigma²/n · ‖W_i,:‖²), a draw of Flat-LoRA's noise

Filter noise is not spread evenly over rows: where B has lengthened rows of W it leans towards Col(B), and its outside
share falls below the chance level. What thin factors can hold stays factored. Gradients are those of the mean loss over
all examples.
"""

from collections.abc import Mapping
from typing import Literal, get_args

import torch

from analysis.core.factors import Factors
from analysis.core.objective import Objective
from analysis.core.space import WeightSpace
from analysis.core.vectors import Vector, norm, scaled
from analysis.sharpness.random import filter_noise
from analysis.subspace.lowrank import LowRank, leading_part
from analysis.subspace.reachable import Perturbation
from bilora.training.recording import LayerMoment, Recording

Kind = Literal["auxiliary", "lora_sam", "gradient", "gradient_rank_r", "filter_noise"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def factored(factors: Factors, device: torch.device | str = "cpu") -> LowRank:
    """``s·B·A`` on ``device`` without forming it."""
    B, A = (t.detach().to(device, torch.float64) for t in (factors.B, factors.A))
    return LowRank(factors.scale * B, A)


def induced(factors: Factors, eps_B: torch.Tensor, eps_A: torch.Tensor) -> LowRank:
    """``s·((B + eps_B)(A + eps_A) − B·A) = s·[B, eps_B]·[eps_A; A + eps_A]``, of rank at most 2r."""
    B, A, eps_B, eps_A = (t.detach().double() for t in (factors.B, factors.A, eps_B, eps_A))
    return LowRank(factors.scale * torch.cat([B, eps_B], dim=1), torch.cat([eps_A, A + eps_A], dim=0))


def recorded(at: LayerMoment) -> LowRank | None:
    """What a recorded step added to the layer's merged weight; None where nothing, or noise of W's own size, was."""
    if at.noise is not None:
        return None
    if at.auxiliary_A is not None and at.auxiliary_B is not None:
        return factored(Factors(at.auxiliary_B, at.auxiliary_A, at.auxiliary_scale))
    step = at.factor_step()
    return None if step is None else induced(Factors(at.B, at.A, at.scale), *step)


def last_applied(recording: Recording) -> dict[str, LowRank]:
    """The perturbation of the last recorded step that had one, layer by layer; empty where none was recorded."""
    for step in reversed(recording.steps):
        found = {layer: recorded(at) for layer, at in recording.at(step).layers.items()}
        eps = {layer: e for layer, e in found.items() if e is not None}
        if eps:
            return eps
    return {}


def lora_sam(objective: Objective, space: WeightSpace, rho: float) -> dict[str, LowRank]:
    """The perturbation LoRA-SAM would apply at these factors, layer by layer; zero where the gradient is zero."""
    gradient = objective.gradient(space)
    length = norm(gradient)
    eps = scaled(gradient, rho / length if length else 0.0)
    return {layer: induced(f, eps[f"{layer}.B"], eps[f"{layer}.A"]) for layer, f in space.factors.items()}


def rank_r(gradient: Vector, factors: Mapping[str, Factors]) -> dict[str, LowRank]:
    """G truncated to the rank of each layer's adapter."""
    return {layer: leading_part(gradient[f"{layer}.weight"], f.A.shape[0]) for layer, f in factors.items()}


def flat_lora(full: WeightSpace, sigma: float, seed: int) -> dict[str, Perturbation]:
    """One draw of Flat-LoRA's noise in the full space, layer by layer."""
    noise = scaled(filter_noise(full, seed, 0), sigma)
    return {layer: noise[f"{layer}.weight"] for layer in full.factors}
