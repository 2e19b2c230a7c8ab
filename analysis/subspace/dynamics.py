"""How a recorded run moved, and where its perturbations lay: rows over optimizer steps, all from thin factors.

With U_t = s·B_t·A_t the update of the merged weight at step t, and T the end:

    cosine_to_end      ⟨U_t, U_T⟩/(‖U_t‖·‖U_T‖), of the primary, of the auxiliary (its end is the last step's), and
                       between both at t (kind ``primary_auxiliary``); in LoRA space of the factors themselves, which
                       depends on the gauge of the pair                       (Bi-LoRA paper, Figure 3)
    distance_to_end    ‖U_t − U_T‖/‖U_T‖
    perturbation_part  ‖s·B·eps_A‖, ‖s·eps_B·A‖, ‖s·eps_B·eps_A‖             (its Figure 2)
    second_order_ratio ‖eps_B·eps_A‖/‖B·eps_A + eps_B·A‖
    outside_share      ‖(I − P_B)·eps_W·(I − P_A)‖²/‖eps_W‖²                 (:mod:`analysis.subspace.reachable`), and
                       of a factored eps_W its p-value                       (:mod:`analysis.subspace.rotations`)
    overlap            of Col(B) with Col(B2), Row(A) with Row(A2)            (:mod:`analysis.subspace.overlap`)
    balancedness       ½(‖B‖² − ‖A‖²)
    gradient_norm      of A, B and of the auxiliary's factors, before clipping

The perturbation is what the run applied: of a method that perturbs the factors
``eps_W = s·((B + eps_B)(A + eps_A) − B·A)``, of Bi-LoRA ``s2·B2·A2``, of others what was added to W. Over all layers
(``layer=""``) norms, inner products and shares are those of the layers together: squares are summed before dividing;
overlaps are means over the layers in which they are defined. Rows carry the step as ``index``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from analysis.core.factors import Factors
from analysis.core.measure import Measure, Watch
from analysis.core.objective import Objective
from analysis.core.result import row
from analysis.core.space import WeightSpace
from analysis.core.trained import Trained
from analysis.settings import MeasureSettings
from analysis.subspace.overlap import subspace_overlap
from analysis.subspace.perturbations import factored, recorded
from analysis.subspace.products import (
    balancedness,
    cosine,
    inner_products,
    ratio,
    relative_distance,
)
from analysis.subspace.reachable import ReachableSet, squared_norm
from analysis.subspace.rotations import concentration, share_p_value, share_variance
from bilora.adapters.norms import squared_product_norm
from bilora.errors import UserError
from bilora.training.recording import LayerMoment, Moment, Recording, is_recorded, read_recording

NAME = "dynamics"
PARTS = ("B_eps_A", "eps_B_A", "eps_B_eps_A")


@dataclass(frozen=True)
class Dynamics:
    """The rows of one recorded run."""

    found: tuple[dict[str, Any], ...]

    def rows(self) -> list[dict[str, Any]]:
        """All quantities of the module's list, of every recorded step; the method's own numbers by their names."""
        return list(self.found)


def run_dynamics(recording: Recording) -> Dynamics:
    """What a recording says of its run; of one in progress, up to its last moment, which then counts as the end."""
    end = recording.at(recording.steps[-1])
    last = recording.at(recording.steps[-2]) if recording.finished and len(recording) > 1 else end
    found: list[dict[str, Any]] = []
    for moment in recording:
        found += _Rows(moment, end, last).all()
    return Dynamics(tuple(found))


class _Rows:
    """The rows of one moment.

    Args:
        moment: the moment.
        end: the last one, where the primary ends.
        last: the last one with a perturbation, where the auxiliary does.
    """

    def __init__(self, moment: Moment, end: Moment, last: Moment) -> None:
        self._moment, self._end, self._last = moment, end, last
        self._primary = {name: _primary(at) for name, at in moment.layers.items()}
        self._auxiliary = _auxiliary(moment)
        self._found: list[dict[str, Any]] = []

    def all(self) -> list[dict[str, Any]]:
        """Every quantity."""
        self._numbers()
        self._norms()
        self._convergence()
        self._parts()
        self._outside()
        self._overlaps()
        return self._found

    def _add(self, quantity: str, value: float, space: str = "full", **columns: Any) -> None:
        self._found.append(row(NAME, quantity, value, space=space, index=self._moment.step, **columns))

    def _add_norms(self, quantity: str, squares: Mapping[str, float], space: str = "full", kind: str = "") -> None:
        """Norms from their squares, of each layer and of all together."""
        for layer, squared in squares.items():
            self._add(quantity, math.sqrt(squared), space, kind=kind, layer=layer)
        self._add(quantity, math.sqrt(math.fsum(squares.values())), space, kind=kind)

    def _numbers(self) -> None:
        numbers = dict(self._moment.numbers)
        if {"loss", "loss_perturbed"} <= numbers.keys():
            numbers["loss_rise"] = numbers["loss_perturbed"] - numbers["loss"]
        for name, value in numbers.items():
            self._add(name, value, space="")

    def _norms(self) -> None:
        """Of updates and gradients, and the balance."""
        layers = self._moment.layers
        for kind, pairs in (("primary", self._primary), ("auxiliary", self._auxiliary)):
            if pairs:
                squares = {name: factored(f).squared_norm() for name, f in pairs.items()}
                self._add_norms("update_norm", squares, kind=kind)
        for position, kind in enumerate(("A", "B", "auxiliary_A", "auxiliary_B")):
            squares = {n: at.gradients[position] ** 2 for n, at in layers.items() if len(at.gradients) > position}
            if squares:
                self._add_norms("gradient_norm", squares, "lora", kind)
        balances = {name: balancedness(f) for name, f in self._primary.items()}
        for name, balance in balances.items():
            self._add("balancedness", balance, "lora", layer=name)
        self._add("balancedness", math.fsum(balances.values()), "lora")

    def _convergence(self) -> None:
        """Cosines and distances to the end, and between primary and auxiliary."""
        ends = {name: _primary(at) for name, at in self._end.layers.items()}
        self._compare("cosine_to_end", "primary", self._primary, ends)
        settled = _auxiliary(self._last)
        if self._auxiliary and settled:
            self._compare("cosine_to_end", "auxiliary", self._auxiliary, settled)
            self._compare("cosine", "primary_auxiliary", self._primary, self._auxiliary)

    def _compare(self, quantity: str, kind: str, first: Mapping[str, Factors], second: Mapping[str, Factors]) -> None:
        for space, products in inner_products(first, second).items():
            for layer, (inner, mine, other) in products.items():
                self._add(quantity, cosine(inner, mine, other), space, kind=kind, layer=layer)
                if space == "full" and quantity == "cosine_to_end":
                    self._add("distance_to_end", relative_distance(inner, mine, other), kind=kind, layer=layer)

    def _parts(self) -> None:
        """Norms of the three parts of a perturbation of the factors, and the ratio of second to first order."""
        parts: dict[str, dict[str, float]] = {name: {} for name in PARTS}
        first: dict[str, float] = {}
        for layer, at in self._moment.layers.items():
            step = at.factor_step()
            if step is None:
                continue
            eps_B, eps_A = step
            for name, (B, A) in zip(PARTS, ((at.B, eps_A), (eps_B, at.A), (eps_B, eps_A)), strict=True):
                parts[name][layer] = at.scale**2 * float(squared_product_norm(B, A))
            both = torch.cat([at.B, eps_B], dim=1), torch.cat([eps_A, at.A], dim=0)
            first[layer] = at.scale**2 * float(squared_product_norm(*both))
        if not first:
            return
        for name, squares in parts.items():
            self._add_norms("perturbation_part", squares, kind=name)
        second = parts["eps_B_eps_A"]
        for layer, squared in first.items():
            self._add("second_order_ratio", math.sqrt(ratio(second[layer], squared)), layer=layer)
        whole = ratio(math.fsum(second.values()), math.fsum(first.values()))
        self._add("second_order_ratio", math.sqrt(whole))

    def _outside(self) -> None:
        """Outside share and norm of the perturbation applied; nothing where there was none."""
        found: dict[str, tuple[float, float, float, float]] = {}
        for layer, at in self._moment.layers.items():
            reachable = ReachableSet.of(self._primary[layer])
            eps = recorded(at)
            if eps is not None:
                variance = share_variance(concentration(eps), reachable.shape, reachable.ranks)
                squares = squared_norm(eps), squared_norm(reachable.outside(eps))
                found[layer] = (*squares, reachable.chance, variance)
            elif at.noise is not None:
                found[layer] = (*at.noise, reachable.chance, math.nan)
        for layer, values in found.items():
            self._add_share([values], layer)
        if found:
            self._add_share([*found.values()])

    def _add_share(self, squares: list[tuple[float, float, float, float]], layer: str = "") -> None:
        """Of some layers together, from ‖eps_W‖², what of it is outside, and mean and variance by chance of each."""
        weights, outside, means, variances = np.array(squares).T
        whole = float(weights.sum())
        share, chance = ratio(float(outside.sum()), whole), ratio(float(means @ weights), whole)
        where: dict[str, Any] = {"layer": layer, "induced_norm": math.sqrt(whole)}
        self._add("outside_share", share, chance=chance, **where)
        if not np.isnan(variances).any():
            self._add("outside_share_p_value", share_p_value(share, means, variances, weights), **where)

    def _overlaps(self) -> None:
        """Overlap of primary and auxiliary subspaces, with its chance level."""
        if self._auxiliary:
            for found in subspace_overlap(self._primary, self._auxiliary).rows():
                if found["quantity"] == "overlap":
                    self._found.append({**found, "measure": NAME, "index": self._moment.step})


def _primary(at: LayerMoment) -> Factors:
    return Factors(at.B, at.A, at.scale)


def _auxiliary(moment: Moment) -> dict[str, Factors]:
    return {
        name: Factors(at.auxiliary_B, at.auxiliary_A, at.auxiliary_scale)
        for name, at in moment.layers.items()
        if at.auxiliary_A is not None and at.auxiliary_B is not None
    }


def _run(
    objective: Objective,
    space: WeightSpace,
    settings: MeasureSettings,
    trained: Trained | None,
    watch: Watch | None = None,
) -> Dynamics:
    if trained is None or trained.folder is None or not is_recorded(trained.folder):
        raise UserError("measure dynamics needs a recorded run: train with --record N (in a study: record: N)")
    return run_dynamics(read_recording(trained.folder))


MEASURE = Measure(
    name=NAME,
    summary="a recorded run over its steps: convergence, perturbations, their share outside LoRA-SAM's reach",
    spaces=("",),
    settings=MeasureSettings,
    run=_run,
    needs_adapter=True,
)
