"""Two adapters of one base model, from their factors: how alike their updates and their subspaces are.

    cosine     ⟨U, U'⟩/(‖U‖·‖U'‖),  U = s·B·A: of each layer, and with sums over layers taken before dividing
    distance   ‖U − U'‖/‖U'‖, the drift where U' is a later checkpoint
    overlap    of Col(B) with Col(B'), Row(A) with Row(A'), its chance level, and how often random ones overlap as much
                                                                                     (:mod:`analysis.subspace.chance`)

In LoRA space (of factors of one rank) the cosine is that of the factors themselves, which depends on the gauge. All
else does not.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.core.factors import Factors
from analysis.core.result import row
from analysis.subspace.overlap import SubspaceOverlap, subspace_overlap
from analysis.subspace.products import cosine, factor_inner, product_inner, ratio

NAME = "compare"


@dataclass(frozen=True, eq=False)
class Comparison:
    """One adapter beside another."""

    pair: str  # "first – second"
    layers: tuple[str, ...]
    inner: Mapping[str, np.ndarray]  # full, lora (where ranks are equal) → (L, 3): ⟨f, g⟩, ⟨f, f⟩, ⟨g, g⟩
    overlap: SubspaceOverlap

    def rows(self) -> list[dict[str, Any]]:
        """``cosine``, ``distance``, and the rows of the overlaps, with the pair as ``label``."""
        rows = []
        for space, products in self.inner.items():
            for layer, values in [*zip(self.layers, products, strict=True), ("", products.sum(axis=0))]:
                where: dict[str, Any] = {"space": space, "layer": layer, "label": self.pair}
                between, first, second = values.tolist()
                rows.append(row(NAME, "cosine", cosine(between, first, second), **where))
                if space == "full":
                    away = ratio(first + second - 2 * between, second)
                    rows.append(row(NAME, "distance", math.sqrt(max(away, 0.0)) if away == away else away, **where))
        return rows + [{**found, "measure": NAME, "label": self.pair} for found in self.overlap.rows()]


def compare_adapters(first: Mapping[str, Factors], second: Mapping[str, Factors], pair: str) -> Comparison:
    """Cosines, distances and overlaps of two adapters.

    Args:
        first, second: layer → factors.
        pair: how the pair is called.

    Raises:
        UserError: they adapt different layers, or layers of different shapes.
    """
    overlap = subspace_overlap(first, second)
    inner = {"full": np.array([_products(product_inner, f, second[name]) for name, f in first.items()])}
    if all(f.A.shape == second[name].A.shape for name, f in first.items()):
        inner["lora"] = np.array([_products(factor_inner, f, second[name]) for name, f in first.items()])
    return Comparison(pair, tuple(first), inner, overlap)


def _products(inner: Any, f: Factors, g: Factors) -> tuple[float, float, float]:
    return inner(f, g), inner(f, f), inner(g, g)
