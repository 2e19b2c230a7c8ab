"""m-sharpness: the worst case of each group of m examples, averaged over groups (Foret et al. 2021, section 4.1).

    Σ_g w_g·(max L_g(W + T∘delta_g) − L_g(W)) / Σ_g w_g,     ‖delta_g‖ ≤ rho,     each g of exactly m examples

L_g is the mean loss of group g and w_g its number of terms. Every group meets its own perturbation, so that the value
grows as m falls, severalfold: m is part of what is measured, and values of different m are never compared. For the same
reason a smaller last group is refused.

Groups are drawn at random, by seed, so that the spread between them is that of groups of fresh examples. Neighbours in
an objective's own order, which is by length, are alike: their groups would spread much wider.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from analysis.core.measure import Measure, Watch
from analysis.core.objective import Objective
from analysis.core.result import row
from analysis.core.space import WeightSpace
from analysis.core.trained import Trained
from analysis.settings import MeasureSettings, Radii
from analysis.sharpness.ascent import Ball, centre, one_step, worst
from analysis.sharpness.scaling import ScalingKind, scaling_of
from bilora.errors import UserError
from bilora.seeds import generator_for


class MSharpnessSettings(MeasureSettings):
    """Settings of :func:`m_sharpness`, described there."""

    radii: Radii = (0.01, 0.05, 0.1)
    m: int = Field(default=32, ge=1)
    kind: ScalingKind = "isotropic"
    steps: int = Field(default=1, ge=1)
    restarts: int = Field(default=1, ge=1)
    seed: int = 0


@dataclass(frozen=True, eq=False)
class MSharpness:
    """Loss rises of groups of m examples, each at its own worst point found. Non-finite values stay."""

    space: str
    split: str
    m: int  # examples of a group
    scaling: ScalingKind
    steps: int  # 1: one-step points; more: lower bounds by the searches of the worst case
    restarts: int
    seed: int  # of the groups and of the random starts
    radii: tuple[float, ...]  # (R,)
    weights: npt.NDArray[np.float64]  # (groups,): terms of each group's loss
    rises: npt.NDArray[np.float64]  # (R, groups)
    induced_norms: npt.NDArray[np.float64]  # (R, groups): realised ‖eps_W‖

    @property
    def kind(self) -> str:
        """``m=32``, with the scaling behind it where there is one: ``m=32 elementwise``."""
        return f"m={self.m}" if self.scaling == "isotropic" else f"m={self.m} {self.scaling}"

    @property
    def mean(self) -> npt.NDArray[np.float64]:
        """Mean rise over groups, weighted by terms, (R,)."""
        return self.rises @ self._shares

    @property
    def standard_error(self) -> npt.NDArray[np.float64]:
        """Standard error of the mean over groups, (R,): its spread over fresh examples, grouped anew.

        NaN with one group or a rise that is not finite.
        """
        count = len(self.weights)
        if count < 2:
            return np.full(len(self.radii), math.nan)
        with np.errstate(invalid="ignore"):
            gaps = (self.rises - self.mean[:, None]) * self._shares
            return np.sqrt((gaps**2).sum(axis=1) * count / (count - 1))

    @property
    def _shares(self) -> npt.NDArray[np.float64]:
        return self.weights / self.weights.sum()

    def rows(self) -> list[dict[str, Any]]:
        """``loss_rise`` of every radius, with its standard error over groups; ``groups``, ``steps``, ``restarts``.

        All are of kind ``m=…``.
        """
        where = {"space": self.space, "split": self.split, "kind": self.kind, "direction_seed": self.seed}
        effort = (("groups", len(self.weights)), ("steps", self.steps), ("restarts", self.restarts))
        rows = [row("m_sharpness", name, value, **where) for name, value in effort]
        columns = (self.radii, self.mean, self.standard_error, self.induced_norms @ self._shares)
        for radius, mean, error, induced in zip(*columns, strict=True):
            spread = {"standard_error": float(error), "induced_norm": float(induced)}
            rows.append(row("m_sharpness", "loss_rise", float(mean), radius=radius, **spread, **where))
        return rows


def groups_of(objective: Objective, m: int, seed: int) -> list[Objective]:
    """The examples of ``objective`` in random groups of exactly ``m``; every example is in one of them.

    A group holds one batch from each batch that its examples come from, in their order, so that nothing is padded anew
    and neighbours in length stay together. The same seed and numbers of examples give the same groups.

    Raises:
        UserError: ``m`` does not divide the number of examples, or a group has no term in the loss.
    """
    sizes = [len(next(iter(batch.values()))) for batch in objective.batches]
    count = sum(sizes)
    if count % m:
        fitting = f"measure {count - count % m} examples" if m < count else f"take m = {count}"
        raise UserError(
            f"m = {m} does not divide the {count} {objective.name} examples: {fitting}, or choose another m"
        )
    group_of = torch.empty(count, dtype=torch.long)
    group_of[torch.randperm(count, generator=generator_for("groups", seed))] = torch.arange(count) // m
    groups: list[list[dict[str, Tensor]]] = [[] for _ in range(count // m)]
    for batch, its_groups in zip(objective.batches, group_of.split(sizes), strict=True):
        for group in its_groups.unique().tolist():
            chosen = its_groups == group
            groups[group].append({key: tensor[chosen] for key, tensor in batch.items()})
    return [Objective(parts, name=objective.name, shifted=objective.shifted) for parts in groups]


def m_sharpness(
    objective: Objective,
    space: WeightSpace,
    radii: Sequence[float],
    *,
    m: int = 32,
    kind: ScalingKind = "isotropic",
    steps: int = 1,
    restarts: int = 1,
    seed: int = 0,
    watch: Watch | None = None,
) -> MSharpness:
    """Mean over groups of m examples of the loss rise at each group's own worst point, the module's equation.

    With m = all examples it is the worst case of the whole objective.

    Args:
        objective: the data side, the same for every compared model.
        space: the model side; its weights are bit-identical afterwards.
        radii: norms rho of delta, as in :func:`analysis.sharpness.worst_case.worst_case_sharpness`.
        m: examples of a group; must divide the number of examples.
        kind: ``"isotropic"``, ``"elementwise"`` or ``"filter"``.
        steps: 1 takes each group's one-step point; more search on from there as the worst case does, and give lower
            bounds.
        restarts: starts of these searches; has no effect with one step.
        seed: names the groups and the random starts; the groups are the same for every compared model.
        watch: called with (groups and radii done, all of them).

    Raises:
        UserError: a setting is out of bounds, m does not divide the number of examples, the scaling is 0 everywhere,
            or a group's loss or gradient is not finite at the unperturbed weights.
    """
    settings = MSharpnessSettings.checked(radii=tuple(radii), m=m, kind=kind, steps=steps, restarts=restarts, seed=seed)
    groups = groups_of(objective, settings.m, settings.seed)
    scaling = scaling_of(space, settings.kind)
    shape = (len(settings.radii), len(groups))
    rises, norms = np.empty(shape), np.empty(shape)
    for j, group in enumerate(groups):
        middle = centre(group, space, scaling)
        for i, radius in enumerate(settings.radii):
            ball = Ball(group, space, scaling, radius)
            if settings.steps == 1:
                point = one_step(ball, middle)
            else:
                point = worst(ball, middle, settings.steps, settings.restarts, settings.seed).winner.best
            rises[i, j] = point.loss - middle.loss
            norms[i, j] = ball.induced_norm(point.delta)
            if watch is not None:
                watch(j * len(settings.radii) + i + 1, rises.size, f"m={settings.m}")
    return MSharpness(
        space=space.name,
        split=objective.name,
        m=settings.m,
        scaling=settings.kind,
        steps=settings.steps,
        restarts=settings.restarts,
        seed=settings.seed,
        radii=settings.radii,
        weights=np.array([group.weight for group in groups]),
        rises=rises,
        induced_norms=norms,
    )


def _run(
    objective: Objective,
    space: WeightSpace,
    settings: MSharpnessSettings,
    trained: Trained | None,
    watch: Watch | None = None,
) -> MSharpness:
    return m_sharpness(objective, space, **settings.model_dump(), watch=watch)


MEASURE = Measure(
    name="m_sharpness",
    summary="worst-case loss rise of each group of m examples, averaged; values of different m are not comparable",
    spaces=("full", "lora"),
    settings=MSharpnessSettings,
    run=_run,
)
