"""Which part of a perturbation LoRA-SAM could not reach, and how well the perturbation ascends.

    outside share = Σ_layers ‖(I − P_B)·eps_W·(I − P_A)‖² / Σ_layers ‖eps_W‖²     (:mod:`analysis.subspace.reachable`)
    alignment     = Σ_layers ⟨eps_W, G⟩ / (‖eps_W‖·‖G‖)

G is the gradient with respect to the merged weights of the adapted layers: alignment is the share of the steepest
first-order rise that a perturbation of this length attains.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from analysis.core.factors import Factors
from analysis.core.objective import Objective
from analysis.core.result import row
from analysis.core.space import WeightSpace
from analysis.core.vectors import Vector
from analysis.subspace import perturbations
from analysis.subspace.perturbations import KINDS, Kind
from analysis.subspace.reachable import Perturbation, ReachableSet, inner, squared_norm
from analysis.subspace.rotations import alignment_p_value, concentration, share_p_value, share_variance
from bilora.errors import UserError


def _ratio(numerator: float, denominator: float) -> float:
    """NaN for an empty perturbation, and for one that is not finite."""
    return numerator / denominator if denominator else math.nan


@dataclass(frozen=True)
class Reach:
    """One kind of perturbation against LoRA-SAM's reachable set and against the gradient, layer by layer."""

    kind: Kind
    split: str
    layers: tuple[str, ...]  # (L,)
    squared_norms: npt.NDArray[np.float64]  # (L,): ‖eps_W‖²
    outside: npt.NDArray[np.float64]  # (L,): ‖(I − P_B)·eps_W·(I − P_A)‖²
    chances: npt.NDArray[np.float64]  # (L,): mean share of random perturbations
    ascents: npt.NDArray[np.float64]  # (L,): ⟨eps_W, G⟩
    gradient_squared_norms: npt.NDArray[np.float64]  # (L,): ‖G‖²
    variances: npt.NDArray[np.float64]  # (L,): of the share of random perturbations
    sizes: npt.NDArray[np.float64]  # (L,): m·n
    concentrations: npt.NDArray[np.float64]  # (L,): Σσ⁴/(Σσ²)² of eps_W
    gradient_concentrations: npt.NDArray[np.float64]  # (L,): the same of G

    @property
    def share(self) -> float:
        """Outside share of the whole: every layer counts by its part of ‖eps_W‖². NaN if eps_W is zero."""
        return _ratio(float(self.outside.sum()), float(self.squared_norms.sum()))

    @property
    def chance(self) -> float:
        """The layers' chance levels, weighted as in :attr:`share`."""
        return _ratio(float((self.chances * self.squared_norms).sum()), float(self.squared_norms.sum()))

    @property
    def alignment(self) -> float:
        """Cosine of eps_W with G over all layers. NaN if either is zero."""
        squared = float(self.squared_norms.sum()) * float(self.gradient_squared_norms.sum())
        return _ratio(float(self.ascents.sum()), math.sqrt(squared))

    @property
    def share_p_value(self) -> float:
        """How often random perturbations would be confined as much (:mod:`analysis.subspace.rotations`)."""
        return share_p_value(self.share, self.chances, self.variances, self.squared_norms)

    @property
    def alignment_p_value(self) -> float:
        """How often random perturbations would have a cosine at least as far from 0."""
        whole = float(self.squared_norms.sum()) * float(self.gradient_squared_norms.sum())
        if not whole:
            return math.nan
        variances = self.squared_norms * self.gradient_squared_norms / self.sizes / whole
        return alignment_p_value(self.alignment, variances, (self.concentrations, self.gradient_concentrations))

    def of_layer(self, index: int) -> "Reach":
        """The same of one layer alone."""
        fields = {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        only: dict[str, Any] = {name: value[index : index + 1] for name, value in fields.items()}
        return replace(self, layers=(self.layers[index],), **only)

    def rows(self) -> list[dict[str, Any]]:
        """``outside_share`` and ``alignment`` with their p-values, of every layer and of the whole (``layer=""``)."""
        rows = [r for i, layer in enumerate(self.layers) for r in self.of_layer(i)._rows_of(layer)]
        return rows + self._rows_of("")

    def _rows_of(self, layer: str) -> list[dict[str, Any]]:
        length = math.sqrt(self.squared_norms.sum())
        where = {"space": "full", "kind": self.kind, "split": self.split, "layer": layer, "induced_norm": length}
        return [
            row("subspace", "outside_share", self.share, chance=self.chance, **where),
            row("subspace", "outside_share_p_value", self.share_p_value, **where),
            row("subspace", "alignment", self.alignment, chance=0.0, **where),
            row("subspace", "alignment_p_value", self.alignment_p_value, **where),
        ]


def reach_of(
    kind: Kind,
    eps: Mapping[str, Perturbation],
    factors: Mapping[str, Factors],
    gradient: Vector,
    *,
    split: str = "",
) -> Reach:
    """Compare a perturbation with the reachable set at ``factors`` and with the gradient.

    Args:
        kind: label of the result.
        eps: layer → eps_W (m, n), dense or factored.
        factors: layer → trained factors, the same layers.
        gradient: ``<layer>.weight`` → G (m, n).
        split: which examples the gradient is of.
    """
    columns: list[tuple[float, ...]] = []
    for layer, f in factors.items():
        reachable, e, G = ReachableSet.of(f), eps[layer], gradient[f"{layer}.weight"]
        outside, own = squared_norm(reachable.outside(e)), concentration(e)
        variance = share_variance(own, reachable.shape, reachable.ranks)
        columns.append(
            (
                *(squared_norm(e), outside, reachable.chance, inner(e, G), squared_norm(G)),
                *(variance, math.prod(reachable.shape), own, concentration(G)),
            )
        )
    return Reach(kind, split, tuple(factors), *np.array(columns, dtype=np.float64).T)


def outside_shares(
    objective: Objective,
    full: WeightSpace,
    lora: WeightSpace,
    *,
    auxiliary: Mapping[str, Factors] | None = None,
    kinds: Sequence[Kind] = KINDS,
    rho: float = 0.05,
    sigma: float = 0.05,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Reach, ...]:
    """Outside share and alignment of several perturbations at a trained adapter.

    Args:
        objective: the examples whose mean loss has the gradients.
        full: the full space of a model with a LoRA adapter; its weights are bit-identical afterwards.
        lora: the LoRA space of the same model; likewise.
        auxiliary: layer → factors of Bi-LoRA's auxiliary pair; None for a method that has none.
        kinds: which perturbations (:mod:`analysis.subspace.perturbations`); ``auxiliary`` only where there is one.
        rho: length of LoRA-SAM's step in the factors; the share grows with it through eps_B·eps_A.
        sigma: strength of Flat-LoRA's noise; changes the reported norm only.
        seed: names the noise.
        progress: called with (steps done, steps in all); the gradient is the first.

    Memory: the gradient with respect to the merged weights, and one dense perturbation for ``filter_noise``.

    Raises:
        UserError: the auxiliary belongs to other layers than the adapter.
    """
    chosen = [kind for kind in kinds if kind != "auxiliary" or auxiliary]
    if auxiliary and auxiliary.keys() != lora.factors.keys():
        odd = sorted(auxiliary.keys() ^ lora.factors.keys())
        raise UserError(f"the auxiliary and the adapter differ in layer {odd[0]}: give the files of one training run")
    gradient = objective.gradient(full)

    def perturbation(kind: Kind) -> Mapping[str, Perturbation]:
        match kind:
            case "auxiliary":
                return {layer: perturbations.factored(f, full.device) for layer, f in (auxiliary or {}).items()}
            case "lora_sam":
                return perturbations.lora_sam(objective, lora, rho)
            case "gradient":
                return {layer: gradient[f"{layer}.weight"] for layer in lora.factors}
            case "gradient_rank_r":
                return perturbations.rank_r(gradient, lora.factors)
            case "filter_noise":
                return perturbations.flat_lora(full, sigma, seed)

    total = len(chosen) + 1
    if progress is not None:
        progress(1, total)
    results = []
    for done, kind in enumerate(chosen, start=2):
        results.append(reach_of(kind, perturbation(kind), lora.factors, gradient, split=objective.name))
        if progress is not None:
            progress(done, total)
    return tuple(results)
