"""Two adapters of one base model, from their factors: how alike their updates and their subspaces are.

    cosine     ⟨U, U'⟩/(‖U‖·‖U'‖),  U = s·B·A: of each layer, and with sums over layers taken before dividing
    distance   ‖U − U'‖/‖U'‖, the drift where U' is a later checkpoint
    overlap    of Col(B) with Col(B'), Row(A) with Row(A'), its chance level, and how often random ones overlap as much
                                                                                     (:mod:`analysis.subspace.chance`)

In LoRA space (of factors of one rank) the cosine is that of the factors themselves, which depends on the gauge. All
else does not.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from analysis.core.factors import Factors
from analysis.core.result import row
from analysis.subspace.overlap import SubspaceOverlap, subspace_overlap
from analysis.subspace.products import cosine, inner_products, relative_distance

NAME = "compare"


@dataclass(frozen=True, eq=False)
class Comparison:
    """One adapter beside another."""

    pair: str  # "first – second"
    inner: Mapping[str, Mapping[str, tuple[float, float, float]]]  # as by products.inner_products
    overlap: SubspaceOverlap

    def rows(self) -> list[dict[str, Any]]:
        """``cosine``, ``distance``, and the rows of the overlaps, with the pair as ``label``."""
        rows = []
        for space, products in self.inner.items():
            for layer, (between, first, second) in products.items():
                where: dict[str, Any] = {"space": space, "layer": layer, "label": self.pair}
                rows.append(row(NAME, "cosine", cosine(between, first, second), **where))
                if space == "full":
                    rows.append(row(NAME, "distance", relative_distance(between, first, second), **where))
        return rows + [{**found, "measure": NAME, "label": self.pair} for found in self.overlap.rows()]


def compare_adapters(first: Mapping[str, Factors], second: Mapping[str, Factors], pair: str) -> Comparison:
    """Cosines, distances and overlaps of two adapters.

    Args:
        first, second: layer → factors.
        pair: how the pair is called.

    Raises:
        UserError: they adapt different layers, or layers of different shapes.
    """
    overlap = subspace_overlap(first, second)  # first: it checks that the two fit together
    return Comparison(pair, inner_products(first, second), overlap)
