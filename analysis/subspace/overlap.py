"""Overlap of two adapters' subspaces, layer by layer: Col(B1) with Col(B2), Row(A1) with Row(A2).

    overlap = ‖UᵀV‖²_F / min(p, q),        chance = max(p, q)/m   (columns; /n for rows)

with U, V orthonormal bases of the two spaces and p, q their dimensions. Everything comes from the thin factors.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor

from analysis.core.adapters import plain_lora_layers
from analysis.core.factors import Factors
from analysis.core.result import row
from analysis.core.space import WeightSpace
from analysis.core.trained import Trained
from analysis.subspace.bases import overlap, principal_angles
from analysis.subspace.chance import overlap_p_value
from bilora.adapters.bases import column_basis, row_basis
from bilora.errors import UserError

LEVEL = 0.05
"""p-value up to which an overlap is called more than chance."""


@dataclass(frozen=True)
class LayerOverlap:
    """Overlap of two subspaces of one layer.

    Attributes:
        layer: layer name.
        side: ``"column"`` for Col(B1) with Col(B2), ``"row"`` for Row(A1) with Row(A2).
        overlap: between 0 and 1; NaN if a factor is zero (nothing to compare) or not finite.
        chance: mean overlap of random subspaces of these dimensions; where a space is empty, of the nominal rank.
        angles: principal angles, radians, rising; none where the overlap is NaN.
        p_value: share of random pairs of subspaces that overlap at least as much (:mod:`analysis.subspace.chance`).
    """

    layer: str
    side: Literal["column", "row"]
    overlap: float
    chance: float
    angles: tuple[float, ...]
    p_value: float = math.nan


@dataclass(frozen=True)
class SubspaceOverlap:
    """Overlaps of two adapters on the layers they share."""

    layers: tuple[LayerOverlap, ...]

    def mean(self, side: Literal["column", "row"]) -> tuple[float, float]:
        """Mean overlap and mean chance over the layers where the overlap is defined, every layer weighted equally.

        NaN, NaN if there is none.
        """
        defined = [x for x in self.layers if x.side == side and not math.isnan(x.overlap)]
        if not defined:
            return math.nan, math.nan
        return float(np.mean([x.overlap for x in defined])), float(np.mean([x.chance for x in defined]))

    def above_chance(self, side: Literal["column", "row"]) -> float:
        """Share of the layers with a defined overlap whose p-value is at most :data:`LEVEL`; NaN if there is none."""
        values = [x.p_value for x in self.layers if x.side == side and not math.isnan(x.p_value)]
        return float(np.mean([value <= LEVEL for value in values])) if values else math.nan

    def rows(self) -> list[dict[str, Any]]:
        """``overlap``, ``overlap_p_value`` and each ``principal_angle`` (``index`` from 1) per layer and side.

        Of the whole (``layer=""``) the mean ``overlap``, and as ``above_chance`` the share of layers that overlap more
        than 95 % of random ones: 0.05 by chance.
        """
        rows = []
        for x in self.layers:
            where = {"space": "lora", "kind": x.side, "layer": x.layer}
            rows.append(row("subspace", "overlap", x.overlap, chance=x.chance, **where))
            rows.append(row("subspace", "overlap_p_value", x.p_value, **where))
            for i, angle in enumerate(x.angles, start=1):
                rows.append(row("subspace", "principal_angle", angle, index=i, **where))
        for side in ("column", "row"):
            value, chance = self.mean(side)
            rows.append(row("subspace", "overlap", value, chance=chance, space="lora", kind=side))
            above = self.above_chance(side)
            rows.append(row("subspace", "above_chance", above, chance=LEVEL, space="lora", kind=side))
        return rows


def _compared(layer: str, side: Literal["column", "row"], first: Tensor, second: Tensor) -> LayerOverlap:
    """Compare Col(B1), Col(B2), both (m, ·), or Row(A1), Row(A2), both (·, n)."""
    ambient = first.shape[0] if side == "column" else first.shape[1]
    nominal = first.numel() // ambient, second.numel() // ambient
    basis = column_basis if side == "column" else row_basis
    U, V = basis(first), basis(second.to(first.device))
    dimensions = (U.shape[1], V.shape[1]) if min(U.shape[1], V.shape[1]) else nominal
    value = overlap(U, V)
    p_value = overlap_p_value(value, U.shape[1], V.shape[1], ambient)
    return LayerOverlap(layer, side, value, max(dimensions) / ambient, principal_angles(U, V), p_value)


def primary_factors(source: Trained | WeightSpace | Mapping[str, Factors]) -> Mapping[str, Factors]:
    """Layer → trained factors, of a loaded adapter, of a weight space, or as given.

    Raises:
        UserError: the space is not that of a model with a LoRA adapter.
    """
    factors: Mapping[str, Factors]
    if isinstance(source, Trained):
        layers = plain_lora_layers(source.model)
        factors = {name: Factors(x.B.detach(), x.A.detach(), x.scale) for name, x in layers.items()}
    else:
        factors = source.factors if isinstance(source, WeightSpace) else source
    if not factors:
        raise UserError("the model has no LoRA factors to compare: give a PEFT model with a LoRA adapter")
    return factors


def subspace_overlap(
    primary: Trained | WeightSpace | Mapping[str, Factors], auxiliary: Mapping[str, Factors] | None = None
) -> SubspaceOverlap:
    """Overlap of the primary factors' subspaces with those of ``auxiliary``, on every layer.

    Args:
        primary: a loaded adapter, a weight space of a PEFT model, or factors by layer name.
        auxiliary: factors to compare with, of Bi-LoRA's auxiliary pair or of any other adapter of the same base model;
            None takes the auxiliary of a loaded adapter.

    Raises:
        UserError: there is no auxiliary, or the two adapt different layers or layers of different shapes.
    """
    if auxiliary is None:
        auxiliary = primary.auxiliary if isinstance(primary, Trained) else None
    if not auxiliary:
        raise UserError("there is no auxiliary pair to compare with: train with method bilora, or give other factors")
    first = primary_factors(primary)
    if first.keys() != auxiliary.keys():
        odd = sorted(first.keys() ^ auxiliary.keys())
        raise UserError(f"the two adapters adapt different layers, first {odd[0]}: compare adapters of one base model")
    compared = []
    for layer, f in first.items():
        g = auxiliary[layer]
        if (f.B.shape[0], f.A.shape[1]) != (g.B.shape[0], g.A.shape[1]):
            raise UserError(f"layer {layer} has another shape in the two adapters: compare adapters of one base model")
        compared.append(_compared(layer, "column", f.B, g.B))
        compared.append(_compared(layer, "row", f.A, g.A))
    return SubspaceOverlap(tuple(compared))
