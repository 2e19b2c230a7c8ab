"""Which weights form the vector, in which gauge, and the only door through which they are changed."""

import math
import re
from collections.abc import Iterable
from typing import Literal, get_args

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from analysis.core.adapters import plain_lora_layers, tuned_layers
from analysis.core.copies import evaluation_copy, merged_copy
from analysis.core.factors import Factors
from analysis.core.gauge import balanced
from analysis.core.vectors import Vector, tensor_dot
from bilora.adapters.interrupts import Exchange
from bilora.adapters.layers import HEADS, AdaptedLayer
from bilora.adapters.norms import squared_product_norms
from bilora.adapters.swap import perturbed
from bilora.errors import UserError

Gauge = Literal["trained", "balanced"]
"""Which of the pairs A, B of one merged weight is meant: as trained, or as :func:`analysis.core.gauge.balanced`."""

FACTORED = ("lora", "lora_balanced")
"""Names of the spaces whose parameters are LoRA factors: only models with a plain LoRA adapter have them."""


class WeightSpace:
    """Named weights of an evaluation copy of a model, seen as one vector.

    Build one with :meth:`full`, :meth:`lora`, :meth:`lora_balanced`, :meth:`all` or :meth:`named`. The user's model is
    never changed.

    Attributes:
        name: ``"full"``, ``"lora"``, ``"lora_balanced"``, ``"all"`` or the pattern.
        part: which block of the named space this is (:meth:`restricted`); empty for all of it.
        model: the copy: float32 (float64 if the user's model has float64 weights), ``eval()``, ``requires_grad`` on
            the parameters of this space alone.
        parameters: canonical name → parameter of ``model``; tied tensors once.
        factors: layer → primary LoRA factors. In a LoRA space they are the parameters themselves; in full space of a
            PEFT model they are copies; empty for other models and for layers that are not ``W0 + s·B·A`` (DoRA).
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        parameters: dict[str, nn.Parameter],
        factors: dict[str, Factors],
        *,
        part: str = "",
    ) -> None:
        self.name = name
        self.part = part
        self.model = model
        self.parameters = parameters
        self.factors = factors
        if not parameters:
            raise UserError(f"the {name} space has no parameters: choose weights that the model has")
        for parameter in parameters.values():
            parameter.requires_grad_(True)

    @classmethod
    def full(cls, model: nn.Module) -> "WeightSpace":
        """Merged weights of the adapted layers as ``<layer>.weight``, (out, in) for a linear layer.

        The adapter may be of any kind that PEFT can merge, on layers of any kind. For a model without adapter: the
        weight of every linear layer but the output head (PEFT's ``all-linear``).

        Raises:
            UserError: no such layer, quantised weights, or an adapter that is merged, disabled or not finite.
        """
        copy = merged_copy(model)
        if isinstance(model, PeftModel):
            weights = {f"{name}.weight": copy.get_parameter(f"{name}.weight") for name in tuned_layers(model)}
            dtype = next(iter(weights.values())).dtype
            factors = {
                name: Factors(layer.B.detach().to(dtype, copy=True), layer.A.detach().to(dtype, copy=True), layer.scale)
                for name, layer in plain_lora_layers(model).items()
            }
            return cls("full", copy, weights, factors)
        weights = _linear_weights(copy)
        if not weights:
            raise UserError(
                f"{type(model).__name__} has no linear layer besides its output head: "
                "choose its weights with WeightSpace.named(model, pattern)"
            )
        return cls("full", copy, weights, {})

    @classmethod
    def lora(cls, model: nn.Module, gauge: Gauge = "trained") -> "WeightSpace":
        """The LoRA factors: ``<layer>.A`` (r, in) and ``<layer>.B`` (out, r).

        Args:
            model: the model with its adapter.
            gauge: ``"trained"`` takes the factors as they are. ``"balanced"`` gives the copy the balanced pairs of the
                same products (:mod:`analysis.core.gauge`): the same function to rounding, and a space that does not
                depend on how a product is split into factors. Its name is ``"lora_balanced"``.

        Raises:
            UserError: the model carries no adapter, quantised weights, an adapter that is merged, disabled or a variant
                in which the merged weight is not ``W0 + s·B·A``, an unknown gauge, or factors that are not finite and
                so have no balanced pair.
        """
        if gauge not in get_args(Gauge):
            raise UserError(f"unknown gauge {gauge!r}: choose {' or '.join(get_args(Gauge))}")
        if not isinstance(model, PeftModel):
            raise UserError(f"{type(model).__name__} carries no LoRA adapter: measure it in full space")
        copy = evaluation_copy(model)
        assert isinstance(copy, PeftModel)
        plain = plain_lora_layers(copy)
        for name, module in tuned_layers(copy).items():
            if name not in plain:
                raise UserError(
                    f"{name} ({_kind(module)}) is not W0 + s·B·A of a linear layer: measure it in full space"
                )
        parameters: dict[str, nn.Parameter] = {}
        factors: dict[str, Factors] = {}
        for name, layer in plain.items():
            if gauge == "balanced":
                _balance(name, layer)
            parameters[f"{name}.A"] = layer.A
            parameters[f"{name}.B"] = layer.B
            factors[name] = Factors(layer.B, layer.A, layer.scale)
        return cls("lora" if gauge == "trained" else "lora_balanced", copy, parameters, factors)

    @classmethod
    def lora_balanced(cls, model: nn.Module) -> "WeightSpace":
        """:meth:`lora` in the balanced gauge.

        Raises:
            UserError: as :meth:`lora`.
        """
        return cls.lora(model, gauge="balanced")

    @classmethod
    def all(cls, model: nn.Module) -> "WeightSpace":
        """Every parameter, by its own name; an adapter is merged first. Tied tensors count once.

        Raises:
            UserError: as :meth:`full`.
        """
        copy = merged_copy(model)
        return cls("all", copy, dict(copy.named_parameters()), {})

    @classmethod
    def named(cls, model: nn.Module, pattern: str) -> "WeightSpace":
        """The parameters whose whole name matches the regular expression ``pattern``; an adapter is merged first.

        Raises:
            UserError: no parameter matches, the pattern is not a regular expression, or as :meth:`full`.
        """
        try:
            expression = re.compile(pattern)
        except re.error as error:
            raise UserError(f"{pattern!r} is not a regular expression: {error}") from error
        copy = merged_copy(model)
        chosen = {name: p for name, p in copy.named_parameters() if expression.fullmatch(name)}
        if not chosen:
            example = next((name for name, _ in copy.named_parameters()), "none")
            raise UserError(f"no parameter name matches {pattern!r} in full: names look like {example!r}")
        return cls(pattern, copy, chosen, {})

    @property
    def factored(self) -> bool:
        """Whether the parameters are LoRA factors, so that equal steps in them are not equal steps in W."""
        return self.name in FACTORED

    @property
    def size(self) -> int:
        """Number of entries of the vector."""
        return sum(p.numel() for p in self.parameters.values())

    @property
    def device(self) -> torch.device:
        """Where the model's first parameter lies: batches are moved there."""
        return next(self.model.parameters()).device

    def aligned(self, vector: Vector) -> Vector:
        """``vector`` checked and moved to the parameters' dtype and device; it may name only some of them.

        Raises:
            ValueError: an unknown parameter name, or a shape that differs from the parameter's.
        """
        unknown = vector.keys() - self.parameters.keys()
        if unknown:
            raise ValueError(f"{sorted(unknown)[0]!r} is no parameter of the {self.name} space")
        moved: Vector = {}
        for name, parameter in self.parameters.items():
            if name not in vector:
                continue
            if vector[name].shape != parameter.shape:
                raise ValueError(
                    f"{name}: shape {tuple(vector[name].shape)} is not the parameter's {tuple(parameter.shape)}"
                )
            moved[name] = vector[name].detach().to(parameter)
        return moved

    def restricted(self, part: str, parameters: Iterable[str]) -> "WeightSpace":
        """The space of some of these parameters, on the same model; ``part`` says which.

        Raises:
            UserError: no parameter is named.
            KeyError: one that this space does not have.
        """
        chosen = {key: self.parameters[key] for key in parameters}
        return WeightSpace(self.name, self.model, chosen, {}, part=part)

    def flat(self, vector: Vector) -> Tensor:
        """``vector``, which must name every parameter, as one row of :attr:`size` entries in the parameters' order."""
        return torch.cat([vector[name].reshape(-1) for name in self.parameters])

    def named_vector(self, flat: Tensor) -> Vector:
        """The inverse of :meth:`flat`, without a copy."""
        parts = flat.split([p.numel() for p in self.parameters.values()])
        return {name: part.view(p.shape) for (name, p), part in zip(self.parameters.items(), parts, strict=True)}

    def perturbed(self, direction: Vector, scale: float = 1.0) -> Exchange:
        """Let the weights be ``parameter + scale·direction`` inside the block, then put them back bit for bit.

        They come back after an exception too, and whenever Ctrl+C comes. A parameter that ``direction`` does not name
        stays as it is. Backward passes must run inside the block.

        Raises:
            ValueError: an unknown parameter name, or a shape that differs from the parameter's.
        """
        moved = self.aligned(direction)
        return perturbed({self.parameters[name]: tensor for name, tensor in moved.items()}, scale)

    @torch.no_grad()
    def induced_norm(self, direction: Vector, scale: float = 1.0) -> float:
        """Realised ‖eps_W‖ of ``perturbed(direction, scale)``, rounding of the stored weights included, in float64.

        In a LoRA space ``eps_W = s·((B + eps_B)(A + eps_A) − B·A) = s·[eps_B, B + eps_B]·[A; eps_A]`` for each layer,
        whose norm is taken from the thin factors. Of other parameters (a head that was trained along, everything
        outside a LoRA space) the change itself counts.

        Raises:
            ValueError: as :meth:`perturbed`.
        """
        changes = {name: self._change(name, step, scale) for name, step in self.aligned(direction).items()}
        pairs = []
        for layer, factors in self.factors.items() if self.factored else ():
            B, A = factors.B.double(), factors.A.double()
            eps_B = changes.pop(f"{layer}.B", torch.zeros_like(B))
            eps_A = changes.pop(f"{layer}.A", torch.zeros_like(A))
            left = factors.scale * torch.cat([eps_B, B + eps_B], dim=1)
            pairs.append((left, torch.cat([A, eps_A], dim=0)))
        products = squared_product_norms(pairs).sum().item() if pairs else 0.0
        return math.sqrt(products + math.fsum(tensor_dot(change, change) for change in changes.values()))

    @torch.no_grad()
    def filter_norms(self) -> dict[str, Tensor]:
        """Norm of each output row of each parameter with at least two dimensions: name → (rows,), in its dtype."""
        return {
            name: p.detach().flatten(1).double().norm(dim=1).to(p.dtype)
            for name, p in self.parameters.items()
            if p.dim() >= 2
        }

    def _change(self, name: str, step: Tensor, scale: float) -> Tensor:
        weight = self.parameters[name].detach()
        return torch.add(weight, step, alpha=scale).double() - weight.double()


@torch.no_grad()
def _balance(name: str, layer: AdaptedLayer) -> None:
    """Write the balanced pair into the factors of ``layer``, which must belong to a copy."""
    if not bool(layer.A.isfinite().all() and layer.B.isfinite().all()):
        raise UserError(f"the factors of {name} are not finite and have no balanced gauge: take a sound adapter")
    pair = balanced(Factors(layer.B, layer.A, layer.scale))
    layer.A.copy_(pair.A)
    layer.B.copy_(pair.B)


def _kind(module: BaseTunerLayer) -> str:
    """The class of PEFT's layer, or of the LoRA variant it runs."""
    variants = getattr(module, "lora_variant", {})
    return next((type(variant).__name__ for variant in variants.values()), type(module).__name__)


def _linear_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    heads: set[nn.Module] = set()
    if isinstance(model, PreTrainedModel):
        output = model.get_output_embeddings()
        candidates = [output] if output is not None else [getattr(model, name, None) for name in HEADS]
        heads = {module for head in candidates if head is not None for module in head.modules()}
    weights: dict[str, nn.Parameter] = {}
    seen: set[nn.Parameter] = set()
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or module in heads:
            continue
        weight = module.get_parameter("weight")
        if weight not in seen:
            seen.add(weight)
            weights[f"{name}.weight"] = weight
    return weights
