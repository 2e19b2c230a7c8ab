"""What the factors say of a trained update s·B·A, layer by layer and over all layers.

    singular_value   of s·B·A, by thin QR                                         (:mod:`analysis.subspace.products`)
    update_norm      ‖s·B·A‖_F
    effective_rank   exp(−Σ p_i·ln p_i),  p_i = σ_i/Σσ                            (Roy & Vetterli 2007)
    stable_rank      Σσ_i²/σ_1²
    balancedness     ½(‖B‖² − ‖A‖²): depends on the gauge, all others do not
    intruders        new directions among the strongest of W0 + s·B·A, their count and share of the energy
                                                                                   (:mod:`analysis.subspace.intruders`)

Over all layers (``layer=""``): ``update_norm`` and ``balancedness`` are those of the layers together, ranks are means
in which a layer counts by ‖s·B·A‖², intruders are a sum, and their energy share is one of sums over layers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field
from torch import Tensor

from analysis.core.adapters import plain_lora_layers
from analysis.core.factors import Factors
from analysis.core.measure import Measure, Watch
from analysis.core.objective import Objective
from analysis.core.result import row
from analysis.core.space import WeightSpace
from analysis.core.trained import Trained
from analysis.settings import MeasureSettings
from analysis.subspace.intruders import Intruders, all_intruders
from analysis.subspace.products import balancedness, ratio, singular_values
from bilora.adapters.layers import AdaptedLayer
from bilora.errors import UserError

NAME = "update"
Array = npt.NDArray[np.float64]


class UpdateSettings(MeasureSettings):
    """Settings of the measure: of the search for intruders."""

    k: int = Field(default=10, ge=1, description="strongest directions that are looked at")
    threshold: float = Field(default=0.5, gt=0, le=1, description="|cosine| below which a direction is new")


@dataclass(frozen=True, eq=False)
class LayerUpdate:
    """One layer's update."""

    values: Array  # (r,) singular values of s·B·A, falling
    balancedness: float  # ½(‖B‖² − ‖A‖²)

    @property
    def squared_norm(self) -> float:
        """‖s·B·A‖²_F."""
        return float((self.values**2).sum())

    @property
    def effective_rank(self) -> float:
        """Between 1 and r; NaN of a zero update."""
        total = float(self.values.sum())
        if not total > 0:
            return math.nan
        shares = self.values[self.values > 0] / total
        return math.exp(-float((shares * np.log(shares)).sum()))

    @property
    def stable_rank(self) -> float:
        """Between 1 and r; NaN of a zero update."""
        return ratio(self.squared_norm, float(self.values[0] ** 2))


@dataclass(frozen=True, eq=False)
class Updates:
    """The updates of one adapter."""

    layers: Mapping[str, LayerUpdate]
    intruders: Mapping[str, Intruders] = field(default_factory=dict)  # empty where W0 was not given

    def rows(self) -> list[dict[str, Any]]:
        """The quantities of the module's list, of every layer and of all together."""
        rows: list[dict[str, Any]] = []
        for name, layer in self.layers.items():
            for rank, value in enumerate(layer.values, start=1):
                rows.append(row(NAME, "singular_value", value, space="full", layer=name, index=rank))
            rows += _ranks(name, math.sqrt(layer.squared_norm), layer.effective_rank, layer.stable_rank)
            rows.append(row(NAME, "balancedness", layer.balancedness, space="lora", layer=name))
        norms = np.array([layer.squared_norm for layer in self.layers.values()])
        weighted = [
            ratio(float(np.nansum(norms * np.array(values))), float(norms[~np.isnan(values)].sum()))
            for values in (
                [layer.effective_rank for layer in self.layers.values()],
                [layer.stable_rank for layer in self.layers.values()],
            )
        ]
        rows += _ranks("", math.sqrt(norms.sum()), *weighted)
        balance = math.fsum(layer.balancedness for layer in self.layers.values())
        rows.append(row(NAME, "balancedness", balance, space="lora"))
        return rows + self._intruder_rows()

    def _intruder_rows(self) -> list[dict[str, Any]]:
        rows = []
        above = below = 0.0
        for name, found in self.intruders.items():
            squares = found.singular_values**2
            above, below = above + float(squares[found.intruder].sum()), below + float(squares.sum())
            rows += _counts(name, found.count, found.energy_share, int(found.undecided.sum()))
        if rows:
            every = self.intruders.values()
            undecided = sum(int(found.undecided.sum()) for found in every)
            rows += _counts("", sum(found.count for found in every), ratio(above, below), undecided)
        return rows


def _ranks(layer: str, norm: float, effective: float, stable: float) -> list[dict[str, Any]]:
    found = {"update_norm": norm, "effective_rank": effective, "stable_rank": stable}
    return [row(NAME, name, value, space="full", layer=layer) for name, value in found.items()]


def _counts(layer: str, count: int, share: float, undecided: int) -> list[dict[str, Any]]:
    found = {"intruders": count, "intruder_energy": share, "intruders_undecided": undecided}
    return [row(NAME, name, value, space="full", layer=layer) for name, value in found.items()]


def inspect_updates(
    factors: Mapping[str, Factors],
    weights: Mapping[str, Tensor] | None = None,
    *,
    k: int = 10,
    threshold: float = 0.5,
) -> Updates:
    """Spectrum, ranks and balance of an adapter's updates; with the base weights its intruder dimensions too.

    Args:
        factors: layer → trained factors.
        weights: layer → W0 (m, n); None leaves the intruders out.
        k, threshold: as :func:`~analysis.subspace.intruders.intruder_dimensions`.

    Raises:
        UserError: no layer, a setting out of range, or as :func:`~analysis.subspace.intruders.all_intruders`.
    """
    settings = UpdateSettings.checked(k=k, threshold=threshold)
    if not factors:
        raise UserError("there are no LoRA factors to inspect: give a LoRA adapter on linear layers")
    layers = {
        name: LayerUpdate(
            singular_values(f).cpu().numpy(),
            balancedness(f),
        )
        for name, f in factors.items()
    }
    if weights is None:
        return Updates(layers)
    return Updates(layers, all_intruders(weights, factors, k=settings.k, threshold=settings.threshold))


def base_weight(layer: AdaptedLayer) -> Tensor:
    """W0 as (out, in), not copied.

    Raises:
        UserError: it is quantised.
    """
    if layer.quantised is not None:
        raise UserError(f"the base weight of {layer.name} is quantised ({layer.quantised}): load the base unquantised")
    weight = layer.base_weight.detach()
    return weight.T if layer.transposed else weight


def _run(
    objective: Objective,
    space: WeightSpace,
    settings: UpdateSettings,
    trained: Trained | None,
    watch: Watch | None = None,
) -> Updates:
    layers = {} if trained is None else plain_lora_layers(trained.model)
    factors = {name: Factors(layer.B.detach(), layer.A.detach(), layer.scale) for name, layer in layers.items()}
    weights = {name: base_weight(layer) for name, layer in layers.items()}
    return inspect_updates(factors, weights, **settings.model_dump())


MEASURE = Measure(
    name=NAME,
    summary="singular values, ranks and balance of the update s·B·A; intruder dimensions of W0 + s·B·A",
    spaces=("",),
    settings=UpdateSettings,
    run=_run,
    needs_adapter=True,
)
