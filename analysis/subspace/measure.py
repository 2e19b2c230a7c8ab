"""The measure ``subspace``: overlap of primary and auxiliary, outside share and alignment of perturbations."""

from dataclasses import dataclass
from typing import Any

from pydantic import Field

from analysis.core.measure import Measure, Watch
from analysis.core.objective import Objective
from analysis.core.space import WeightSpace
from analysis.core.trained import Trained
from analysis.settings import MeasureSettings, Radius
from analysis.subspace.outside import Reach, outside_shares
from analysis.subspace.overlap import SubspaceOverlap, subspace_overlap
from analysis.subspace.perturbations import KINDS, Kind
from bilora.errors import UserError


class SubspaceSettings(MeasureSettings):
    """Settings of the measure; see :func:`analysis.subspace.outside.outside_shares`."""

    kinds: tuple[Kind, ...] = Field(default=KINDS, min_length=1)
    rho: Radius = 0.05
    sigma: Radius = 0.05
    seed: int = 0


@dataclass(frozen=True)
class Subspaces:
    """Overlap (None without an auxiliary pair) and reach of the perturbations asked for."""

    overlap: SubspaceOverlap | None
    reaches: tuple[Reach, ...]

    def rows(self) -> list[dict[str, Any]]:
        """The rows of both parts."""
        rows = self.overlap.rows() if self.overlap else []
        return rows + [r for reach in self.reaches for r in reach.rows()]


def _run(
    objective: Objective,
    space: WeightSpace,
    settings: SubspaceSettings,
    trained: Trained | None,
    watch: Watch | None = None,
) -> Subspaces:
    if trained is None:
        raise UserError("measure subspace needs a LoRA adapter: give an adapter folder, not a plain model")
    overlap = subspace_overlap(space, trained.auxiliary) if trained.auxiliary else None
    full = WeightSpace.full(trained.model)
    return Subspaces(
        overlap, outside_shares(objective, full, space, auxiliary=trained.auxiliary, **settings.model_dump())
    )


MEASURE = Measure(
    name="subspace",
    summary="overlap of primary and auxiliary factors; share of perturbations outside LoRA-SAM's reach",
    spaces=("lora",),
    settings=SubspaceSettings,
    run=_run,
)
