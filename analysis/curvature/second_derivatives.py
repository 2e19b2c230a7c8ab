"""GELU, SiLU and LayerNorm whose second derivatives are computed with the graph and not again at each product.

An elementwise ``y = f(x)`` has backward ``f'(x)·g`` and, of that, backward ``(f'(x)·v, f''(x)·g·v)``: with f'(x) and
``f''(x)·g`` at hand a product costs two multiplications instead of the ten and more of the formula. LayerNorm without
learnt weights in the space,

    x̂ = (x − μ)·r,   P = I − 1·1ᵀ/n − x̂·x̂ᵀ/n,   backward r·P·h with h = gamma·g,

has ``(gamma·r·P·v, −r²·(x̂·mean(v·P·h) + mean(v·x̂)·P·h + mean(h·x̂)·P·v))`` as backward of its backward. All is exact.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

ELEMENTWISE: frozenset[Any] = frozenset({torch._C._nn.gelu, torch._C._nn.silu, F.silu})


class StoredSecondDerivatives(TorchFunctionMode):
    """Inside, graphs are built with the functions above: for graphs that many products go through."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in ELEMENTWISE and args and _differentiable(args[0]) and not kwargs.get("inplace"):
            return _Curve.apply(args[0], lambda x: func(x, *args[1:], **kwargs))
        if func is F.layer_norm:
            return _layer_norm(*args, **kwargs)
        return func(*args, **kwargs)


def _differentiable(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad and x.dtype in (torch.float32, torch.float64)


class _Curve(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.enable_grad():
            free = x.detach().requires_grad_()
            y = function(free)
            (slope,) = torch.autograd.grad(y.sum(), free, create_graph=True)
            (bend,) = torch.autograd.grad(slope.sum(), free)
        ctx.save_for_backward(x, slope.detach(), bend)
        return y.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        x, slope, bend = ctx.saved_tensors
        # Products come through here too, without a graph of their own.
        return _Slope.apply(g, x, slope, bend) if torch.is_grad_enabled() else g * slope, None


class _Slope(Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, slope: Tensor, bend: Tensor) -> Tensor:
        ctx.save_for_backward(slope, g * bend)
        return g * slope

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, Tensor, None, None]:
        slope, bent = ctx.saved_tensors
        return v * slope, v * bent, None, None


def _layer_norm(
    x: Tensor,
    shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    learnt = any(p is not None and p.requires_grad for p in (weight, bias))
    if learnt or len(shape) != 1 or not _differentiable(x):
        return F.layer_norm(x, shape, weight, bias, eps)
    return _Norm.apply(x, weight, bias, eps)


class _Norm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        y, mean, r = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
        ctx.save_for_backward(x, (x - mean) * r, mean, r, weight)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        x, unit, mean, r, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _NormSlope.apply(g, x, unit, r, weight), None, None, None
        wanted = [True, False, False]
        return (
            torch.ops.aten.native_layer_norm_backward(g, x, x.shape[-1:], mean, r, weight, None, wanted)[0],
            None,
            None,
            None,
        )


class _NormSlope(Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, unit: Tensor, r: Tensor, weight: Tensor | None) -> Tensor:
        h = g if weight is None else g * weight
        along = (h * unit).mean(-1, keepdim=True)
        Ph = h - h.mean(-1, keepdim=True) - along * unit
        scale = r if weight is None else r * weight
        ctx.save_for_backward(unit, scale, -r.square(), Ph, along)
        return r * Ph

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        unit, scale, minus, Ph, along = ctx.saved_tensors
        across = (v * unit).mean(-1, keepdim=True)
        Pv = torch.addcmul(v - v.mean(-1, keepdim=True), across, unit, value=-1)
        bent = unit * (v * Ph).mean(-1, keepdim=True)
        bent.addcmul_(across, Ph).addcmul_(along, Pv).mul_(minus)
        return scale * Pv, bent, None, None, None
