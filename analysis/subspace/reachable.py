"""LoRA-SAM's reachable tangent space {B·X + Y·A}, and the share of a perturbation outside it.

LoRA-SAM perturbs the factors: to first order eps_W = s·(B·eps_A + eps_B·A): columns in Col(B) or rows in Row(A).
With P_B and P_A the orthogonal projections on Col(B) and Row(A), the part out of its reach and its share are

    (I − P_B)·eps_W·(I − P_A),      ‖(I − P_B)·eps_W·(I − P_A)‖² / ‖eps_W‖².

A random perturbation has the share (1 − p/m)(1 − q/n) on average, p and q being the ranks of B and A.
"""

from dataclasses import dataclass

from torch import Tensor

from analysis.core.factors import Factors
from analysis.subspace.lowrank import LowRank
from bilora.adapters.bases import column_basis, off_columns, off_rows, row_basis

Perturbation = Tensor | LowRank
"""eps_W of one layer, (m, n): dense, or thin factors that are never multiplied out."""


@dataclass(frozen=True)
class ReachableSet:
    """The tangent space {B·X + Y·A} of one layer, by orthonormal bases."""

    columns: Tensor  # (m, p) float64, of Col(B)
    rows: Tensor  # (n, q) float64, of Row(A)

    @classmethod
    def of(cls, factors: Factors) -> "ReachableSet":
        """The reachable set at the point ``factors``."""
        return cls(column_basis(factors.B), row_basis(factors.A))

    @property
    def shape(self) -> tuple[int, int]:
        """m and n."""
        return self.columns.shape[0], self.rows.shape[0]

    @property
    def ranks(self) -> tuple[int, int]:
        """p and q, of B and A."""
        return self.columns.shape[1], self.rows.shape[1]

    @property
    def chance(self) -> float:
        """Mean outside share of random perturbations: (1 − p/m)(1 − q/n)."""
        (m, n), (p, q) = self.shape, self.ranks
        return (1 - p / m) * (1 - q / n)

    def outside(self, perturbation: Perturbation) -> Perturbation:
        """``(I − P_B)·eps_W·(I − P_A)``, factored if the perturbation is."""
        if isinstance(perturbation, LowRank):
            return LowRank(off_columns(perturbation.left, self.columns), off_rows(perturbation.right, self.rows))
        return off_rows(off_columns(perturbation.detach().double(), self.columns), self.rows)


def squared_norm(perturbation: Perturbation) -> float:
    """‖eps_W‖²_F, float64."""
    if isinstance(perturbation, LowRank):
        return perturbation.squared_norm()
    return float(perturbation.detach().double().square().sum())


def inner(perturbation: Perturbation, gradient: Tensor) -> float:
    """⟨eps_W, G⟩ with the dense gradient (m, n) of the layer, float64."""
    gradient = gradient.detach().double()
    if isinstance(perturbation, LowRank):
        return float(((perturbation.left.mT @ gradient) * perturbation.right).sum())
    return float((perturbation.detach().double() * gradient).sum())
