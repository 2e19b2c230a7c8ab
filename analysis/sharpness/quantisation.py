"""Loss and metric of quantised weights: rounding as a perturbation that deployment applies.

    int8:  Q(W)_ij = q_ij·‖W_i,:‖_∞/127,   q_ij = round(127·W_ij/‖W_i,:‖_∞)        (each output row, symmetric)
    nf4:   Q(w)_k = c_k·‖b‖_∞,   c_k the level nearest to w_k/‖b‖_∞                (each block b of 64 entries)

    loss_rise = L(Q(W)) − L(W),    eps_W = Q(W) − W

NF4 is the 4-bit NormalFloat of QLoRA (Dettmers et al. 2023); its blocks run over the flattened weight. The constants
‖b‖_∞ are kept as they are: QLoRA's second quantisation, of these constants, is left out. The kinds with ``base``
quantise what QLoRA quantises and keep the adapter exact: W becomes ``Q(W0) + s·B·A``.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from analysis.core.example_losses import ExampleLosses, rise_error
from analysis.core.measure import Measure, Watch
from analysis.core.objective import Objective
from analysis.core.result import row
from analysis.core.space import WeightSpace
from analysis.core.trained import Trained
from analysis.core.vectors import Vector, tensor_dot
from analysis.settings import MeasureSettings
from bilora.adapters.swap import swapped
from bilora.errors import UserError

Kind = Literal["int8", "nf4", "int8 base", "nf4 base"]
KINDS: tuple[Kind, ...] = get_args(Kind)

BLOCK = 64
"""Entries that share a scale in NF4."""

NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The 16 levels of 4-bit NormalFloat (Dettmers et al. 2023, appendix E)."""


class QuantisationSettings(MeasureSettings):
    """Settings of :func:`quantisation`, described there."""

    kinds: tuple[Kind, ...] = Field(default=("int8", "nf4", "nf4 base"), min_length=1)


@dataclass(frozen=True)
class Quantised:
    """The loss and metrics under one kind of quantisation."""

    kind: Kind
    metrics: Mapping[str, float]  # loss, accuracy, matthews
    loss_rise: float  # L(Q(W)) − L(W)
    standard_error: float  # of the rise, over examples; NaN where theirs are not known
    norm: float  # realised ‖eps_W‖


@dataclass(frozen=True)
class Quantisation:
    """Loss and metrics of quantised weights. Non-finite losses stay."""

    space: str
    split: str
    base_metrics: Mapping[str, float]  # loss, accuracy, matthews at the exact weights
    results: tuple[Quantised, ...]

    def rows(self) -> list[dict[str, Any]]:
        """``loss``, ``accuracy`` and ``matthews`` if known, and ``loss_rise`` of every kind."""
        rows = []
        for found in self.results:
            where = {"space": self.space, "split": self.split, "kind": found.kind, "induced_norm": found.norm}
            rows += [row("quantisation", name, value, **where) for name, value in found.metrics.items()]
            spread = {"standard_error": found.standard_error}
            rows.append(row("quantisation", "loss_rise", found.loss_rise, **spread, **where))
        return rows


@torch.no_grad()
def int8(weight: Tensor) -> Tensor:
    """``weight`` (out, …) rounded to 8 bits, dequantised: 255 levels between ± the largest magnitude of each row."""
    rows = weight.detach().flatten(1)
    step = rows.abs().amax(dim=1, keepdim=True) / 127
    quantised = torch.where(step > 0, torch.round(rows / step), 0.0) * step
    return quantised.view_as(weight)


@torch.no_grad()
def nf4(weight: Tensor) -> Tensor:
    """``weight`` of any shape rounded to NF4 in blocks of 64, dequantised; the last block may be short."""
    flat = weight.detach().reshape(-1)
    blocks = functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    levels = torch.tensor(NF4_LEVELS, dtype=weight.dtype, device=weight.device)
    share = torch.where(largest > 0, blocks / largest, 0.0)
    nearest = torch.bucketize(share, (levels[1:] + levels[:-1]) / 2)
    return (levels[nearest] * largest).view(-1)[: len(flat)].view_as(weight)


@torch.no_grad()
def base_weights(space: WeightSpace) -> Vector | None:
    """``W0 = W − s·B·A`` of every parameter of a full space, exact to the rounding of W; None without LoRA factors.

    None too where only some of the parameters have factors: then there is no one base to speak of.
    """
    if space.factored or {f"{layer}.weight" for layer in space.factors} != space.parameters.keys():
        return None
    bases: Vector = {}
    for layer, factors in space.factors.items():
        weight = space.parameters[f"{layer}.weight"].detach()
        update = factors.scale * (factors.B.double() @ factors.A.double())
        bases[f"{layer}.weight"] = (weight.double() - update).to(weight.dtype)
    return bases


def quantisation(
    objective: Objective,
    space: WeightSpace,
    *,
    kinds: Sequence[Kind] = ("int8", "nf4", "nf4 base"),
    watch: Watch | None = None,
) -> Quantisation:
    """Loss and metrics with the weights of ``space`` quantised.

    Weights outside the space, and its parameters of one dimension, stay exact.

    Args:
        objective: the data side, the same for every compared model.
        space: the full space, or any set of parameters of a model; its weights are bit-identical afterwards.
        kinds: what is quantised to what. Those with ``base`` need LoRA factors and are left out without them.
        watch: called with (losses evaluated, losses in all).

    Memory: one copy of the space's weights, for kinds with ``base`` two.

    Raises:
        UserError: an unknown kind, or a space whose parameters are factors, of one dimension or not there.
    """
    settings = QuantisationSettings.checked(kinds=tuple(kinds))
    if space.factored:
        raise UserError("quantisation rounds weights, not LoRA factors: measure it in full space")
    if all(p.dim() < 2 for p in space.parameters.values()):
        raise UserError(
            f"space {space.name} has no parameter with at least two dimensions: there is nothing to quantise"
        )
    bases = base_weights(space) if any("base" in kind for kind in settings.kinds) else None
    chosen = [kind for kind in settings.kinds if bases is not None or "base" not in kind]

    def report(done: int) -> None:
        if watch is not None:
            watch(done, len(chosen) + 1, "losses")

    before = ExampleLosses()
    exact = objective.evaluate(space, before)
    report(1)
    results = []
    for done, kind in enumerate(chosen, start=2):
        rounded = _rounded(space, kind, bases if "base" in kind else None)
        changes = [rounded[name].double() - space.parameters[name].detach().double() for name in rounded]
        after = ExampleLosses()
        with swapped({space.parameters[name]: weight for name, weight in rounded.items()}):
            metrics = objective.evaluate(space, after)
        norm = math.sqrt(math.fsum(tensor_dot(change, change) for change in changes))
        results.append(Quantised(kind, metrics, metrics["loss"] - exact["loss"], rise_error(before, after), norm))
        report(done)
    return Quantisation(space.name, objective.name, exact, tuple(results))


def _rounded(space: WeightSpace, kind: Kind, bases: Vector | None) -> Vector:
    """The quantised weights: Q(W), or with ``bases`` W + (Q(W0) − W0)."""
    convert = int8 if kind.startswith("int8") else nf4
    rounded: Vector = {}
    for name, parameter in space.parameters.items():
        if parameter.dim() < 2:
            continue
        weight = parameter.detach()
        rounded[name] = convert(weight) if bases is None else weight + (convert(bases[name]) - bases[name])
    return rounded


def _run(
    objective: Objective,
    space: WeightSpace,
    settings: QuantisationSettings,
    trained: Trained | None,
    watch: Watch | None = None,
) -> Quantisation:
    return quantisation(objective, space, **settings.model_dump(), watch=watch)


MEASURE = Measure(
    name="quantisation",
    summary="loss and metric of weights rounded to int8 and to 4-bit NormalFloat, merged or the base alone",
    spaces=("full",),
    settings=QuantisationSettings,
    run=_run,
)
