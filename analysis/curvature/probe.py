"""Is there one Hessian to speak of? Checks before the first product."""

import math

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from analysis.core.objective import Objective
from analysis.core.space import WeightSpace
from bilora.errors import UserError

ROUNDING = 1e-5
"""Relative difference of two passes that parallel summation may cause."""


def check_precision(space: WeightSpace) -> None:
    """Refuse weights too coarse to differentiate at.

    Raises:
        UserError: weights in half precision.
    """
    for name, parameter in space.parameters.items():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise UserError(
                f"{name} is {parameter.dtype}: products with half-precision weights are off by whole per cents; "
                "keep the weights in float32 and ask for autocast"
            )


def check_autocast(autocast: torch.dtype | None) -> None:
    """Refuse what autocast cannot run in.

    Raises:
        UserError: another dtype than bfloat16 and float16.
    """
    if autocast not in (None, torch.bfloat16, torch.float16):
        raise UserError(f"autocast is {autocast}: choose torch.bfloat16 or torch.float16")


@torch.no_grad()
def check_deterministic(objective: Objective, space: WeightSpace) -> None:
    """Two passes over the largest batch must agree; the global random state is left as it was.

    Raises:
        UserError: active dropout or batch statistics, or a loss that differs between the passes.
    """
    for name, module in space.model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise UserError(
                f"{name} uses the statistics of the batch: call space.model.eval() first, with track_running_stats"
            )
        if module.training and isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise UserError(f"{name} is active dropout: call space.model.eval() first")
    sizes = [sum(tensor.numel() for tensor in batch.values()) for batch in objective.batches]
    index = sizes.index(max(sizes))  # where something drawn an example is seen most surely
    with torch.random.fork_rng([space.device] if space.device.type == "cuda" else []):
        first, second = (float(objective.batch_value(space, index)) for _ in range(2))
    training = any(module.training for module in space.model.modules())
    cure = "call space.model.eval() first" if training else "switch them off in its forward"
    if math.isfinite(first) and not math.isclose(first, second, rel_tol=ROUNDING, abs_tol=1e-12):
        raise UserError(
            f"the loss of one batch was {first:.9g}, then {second:.9g}: the model draws random numbers, so that there "
            f"is no one Hessian; {cure}"
        )
