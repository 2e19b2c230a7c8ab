"""How a recorded run moved, and where its perturbations lay: rows over optimizer steps, all from thin factors.

With U_t = s·B_t·A_t the update of the merged weight at step t, and T the end:

    cosine_to_end      ⟨U_t, U_T⟩/(‖U_t‖·‖U_T‖), of the primary, of the auxiliary (its end is the last step's), and
                       between both at t (kind ``primary_auxiliary``); in LoRA space of the factors themselves, which
                       depends on the gauge of the pair                       (Bi-LoRA paper, Figure 3)
    distance_to_end    ‖U_t − U_T‖/‖U_T‖
    perturbation_part  ‖s·B·eps_A‖, ‖s·eps_B·A‖, ‖s·eps_B·eps_A‖             (its Figure 2)
    second_order_ratio ‖eps_B·eps_A‖/‖B·eps_A + eps_B·A‖
    outside_share      ‖(I − P_B)·eps_W·(I − P_A)‖²/‖eps_W‖²                 (:mod:`analysis.subspace.reachable`)
    overlap            of Col(B) with Col(B2), Row(A) with Row(A2)            (:mod:`analysis.subspace.overlap`)
    balancedness       ½(‖B‖² − ‖A‖²)
    gradient_norm      of A, B and of the auxiliary's factors, before clipping

The perturbation is what the run applied: of a method that perturbs the factors
``eps_W = s·((B + eps_B)(A + eps_A) − B·A)``, of Bi-LoRA ``s2·B2·A2``, of others what was added to W. Over all layers
(``layer=""``) norms, inner products and shares are those of the layers together: squares are summed before dividing;
overlaps are means over the layers in which they are defined. Rows carry the step as ``index``.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from analysis.core.factors import Factors
from analysis.core.measure import Measure, Watch
from analysis.core.objective import Objective
from analysis.core.result import row
from analysis.core.space import WeightSpace
from analysis.core.trained import Trained
from analysis.settings import MeasureSettings
from analysis.subspace.bases import column_basis, overlap, row_basis
from analysis.subspace.lowrank import LowRank
from analysis.subspace.perturbations import induced
from analysis.subspace.products import cosine, factor_inner, product_inner, ratio
from analysis.subspace.reachable import ReachableSet, squared_norm
from bilora.adapters.norms import squared_product_norm
from bilora.errors import UserError
from bilora.training.recording import LayerMoment, Moment, Recording

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
    rows: list[dict[str, Any]] = []
    for moment in recording:
        rows += list(_numbers(moment))
        rows += list(_of_moment(moment, end, last))
    return Dynamics(tuple(rows))


def _numbers(moment: Moment) -> Iterator[dict[str, Any]]:
    numbers = dict(moment.numbers)
    if {"loss", "loss_perturbed"} <= numbers.keys():
        numbers["loss_rise"] = numbers["loss_perturbed"] - numbers["loss"]
    for name, value in numbers.items():
        yield row(NAME, name, value, index=moment.step)


@dataclass
class _Sums:
    """Squares and products of one quantity by layer, for the ratio of their sums."""

    above: list[float] = field(default_factory=list)
    below: list[float] = field(default_factory=list)

    def add(self, above: float, below: float) -> float:
        self.above.append(above)
        self.below.append(below)
        return ratio(above, below)

    def total(self) -> float:
        return ratio(math.fsum(self.above), math.fsum(self.below))


def _of_moment(moment: Moment, end: Moment, last: Moment) -> Iterator[dict[str, Any]]:
    for name, values in _by_layer(moment, end, last).items():
        quantity, space, kind = name
        for layer, value, chance, norm in values:
            extra = {"space": space, "kind": kind, "layer": layer, "chance": chance, "induced_norm": norm}
            yield row(NAME, quantity, value, index=moment.step, **extra)


Entry = tuple[str, float, float, float]
"""layer ("" for all), value, chance, induced norm."""


def _by_layer(moment: Moment, end: Moment, last: Moment) -> Mapping[tuple[str, str, str], list[Entry]]:
    tables: dict[tuple[str, str, str], list[Entry]] = {}
    for part in (_norms(moment), _cosines(moment, end, last), _parts(moment), _outside(moment), _overlaps(moment)):
        for key, entries in part.items():
            tables.setdefault(key, []).extend(entries)
    return tables


def _norms(moment: Moment) -> dict[tuple[str, str, str], list[Entry]]:
    """Update norms, balancedness, gradient norms."""
    found: dict[tuple[str, str, str], list[Entry]] = {}
    squares: dict[tuple[str, str, str], float] = {}

    def add(key: tuple[str, str, str], layer: str, squared: float) -> None:
        found.setdefault(key, []).append((layer, math.sqrt(squared), math.nan, math.nan))
        squares[key] = squares.get(key, 0.0) + squared

    balance = 0.0
    for layer, at in moment.layers.items():
        add(("update_norm", "full", "primary"), layer, at.scale**2 * float(squared_product_norm(at.B, at.A)))
        if at.auxiliary_A is not None and at.auxiliary_B is not None:
            squared = float(squared_product_norm(at.auxiliary_B, at.auxiliary_A))
            add(("update_norm", "full", "auxiliary"), layer, at.auxiliary_scale**2 * squared)
        for kind, norm in zip(("A", "B", "auxiliary_A", "auxiliary_B"), at.gradients, strict=False):
            add(("gradient_norm", "lora", kind), layer, norm**2)
        own = 0.5 * (_square(at.B) - _square(at.A))
        found.setdefault(("balancedness", "lora", ""), []).append((layer, own, math.nan, math.nan))
        balance += own
    for key, squared in squares.items():
        found[key].append(("", math.sqrt(squared), math.nan, math.nan))
    found[("balancedness", "lora", "")].append(("", balance, math.nan, math.nan))
    return found


def _cosines(moment: Moment, end: Moment, last: Moment) -> dict[tuple[str, str, str], list[Entry]]:
    """Cosines and distances to the end, and between primary and auxiliary."""
    pairs: dict[tuple[str, str], list[tuple[str, Factors, Factors]]] = {}
    for layer, at in moment.layers.items():
        mine, final = _primary(at), _primary(end.layers[layer])
        pairs.setdefault(("cosine_to_end", "primary"), []).append((layer, mine, final))
        auxiliary, settled = _auxiliary(at), _auxiliary(last.layers[layer])
        if auxiliary is not None and settled is not None:
            pairs.setdefault(("cosine_to_end", "auxiliary"), []).append((layer, auxiliary, settled))
            pairs.setdefault(("cosine", "primary_auxiliary"), []).append((layer, mine, auxiliary))
    found: dict[tuple[str, str, str], list[Entry]] = {}
    for (quantity, kind), compared in pairs.items():
        for space, inner in (("full", product_inner), ("lora", factor_inner)):
            if space == "lora" and any(f.A.shape != g.A.shape for _, f, g in compared):
                continue  # factors of different ranks have no cosine
            squares = np.array([[inner(f, g), inner(f, f), inner(g, g)] for _, f, g in compared])
            key = (quantity, space, kind)
            found[key] = [
                (layer, cosine(*line), math.nan, math.nan)
                for (layer, _, _), line in zip(compared, squares.tolist(), strict=True)
            ]
            found[key].append(("", cosine(*squares.sum(axis=0).tolist()), math.nan, math.nan))
            if space == "full" and quantity == "cosine_to_end":
                distances = squares[:, 1] + squares[:, 2] - 2 * squares[:, 0]
                ends = squares[:, 2]
                found["distance_to_end", space, kind] = [
                    (layer, math.sqrt(max(ratio(d, e), 0.0)), math.nan, math.nan)
                    for (layer, _, _), d, e in zip(compared, distances.tolist(), ends.tolist(), strict=True)
                ] + [("", math.sqrt(max(ratio(float(distances.sum()), float(ends.sum())), 0.0)), math.nan, math.nan)]
    return found


def _parts(moment: Moment) -> dict[tuple[str, str, str], list[Entry]]:
    """Norms of the three parts of a perturbation of the factors, and the ratio of second to first order."""
    found: dict[tuple[str, str, str], list[Entry]] = {}
    squares: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    orders = _Sums()
    ratios: list[Entry] = []
    for layer, at in moment.layers.items():
        if at.eps_A is None and at.eps_B is None:
            continue
        eps_A = torch.zeros_like(at.A) if at.eps_A is None else at.eps_A
        eps_B = torch.zeros_like(at.B) if at.eps_B is None else at.eps_B
        products = {"B_eps_A": (at.B, eps_A), "eps_B_A": (eps_B, at.A), "eps_B_eps_A": (eps_B, eps_A)}
        norms = {name: at.scale**2 * float(squared_product_norm(B, A)) for name, (B, A) in products.items()}
        for name, squared in norms.items():
            squares[name] += squared
            found.setdefault(("perturbation_part", "full", name), []).append(
                (layer, math.sqrt(squared), math.nan, math.nan)
            )
        both = torch.cat([at.B, eps_B], dim=1), torch.cat([eps_A, at.A], dim=0)
        first = at.scale**2 * float(squared_product_norm(*both))
        ratios.append((layer, math.sqrt(orders.add(norms["eps_B_eps_A"], first)), math.nan, math.nan))
    for name in PARTS if found else ():
        found["perturbation_part", "full", name].append(("", math.sqrt(squares[name]), math.nan, math.nan))
    if ratios:
        found["second_order_ratio", "full", ""] = [*ratios, ("", math.sqrt(orders.total()), math.nan, math.nan)]
    return found


def _outside(moment: Moment) -> dict[tuple[str, str, str], list[Entry]]:
    """Outside share and norm of the perturbation applied; nothing where there was none."""
    entries: list[Entry] = []
    shares, chances = _Sums(), []
    for layer, at in moment.layers.items():
        reachable = ReachableSet.of(_primary(at))
        squared = _squares_of(at, reachable)
        if squared is None:
            continue
        norm, outside = squared
        entries.append((layer, shares.add(outside, norm), reachable.chance, math.sqrt(norm)))
        chances.append(reachable.chance)
    if not entries:
        return {}
    norms = np.array(shares.below)
    chance = ratio(float(np.array(chances) @ norms), float(norms.sum()))
    entries.append(("", shares.total(), chance, math.sqrt(norms.sum())))
    return {("outside_share", "full", ""): entries}


def _squares_of(at: LayerMoment, reachable: ReachableSet) -> tuple[float, float] | None:
    """‖eps_W‖² and its part out of reach."""
    if at.noise is not None:
        return at.noise
    auxiliary = _auxiliary(at)
    if auxiliary is not None:
        eps = LowRank(auxiliary.scale * auxiliary.B.double(), auxiliary.A.double())
    elif at.eps_A is None and at.eps_B is None:
        return None
    else:
        eps_A = torch.zeros_like(at.A) if at.eps_A is None else at.eps_A
        eps_B = torch.zeros_like(at.B) if at.eps_B is None else at.eps_B
        eps = induced(_primary(at), eps_B, eps_A)
    return squared_norm(eps), squared_norm(reachable.outside(eps))


def _overlaps(moment: Moment) -> dict[tuple[str, str, str], list[Entry]]:
    """Overlap of primary and auxiliary subspaces, with its chance level."""
    found: dict[tuple[str, str, str], list[Entry]] = {}
    for layer, at in moment.layers.items():
        auxiliary = _auxiliary(at)
        if auxiliary is None:
            continue
        for kind, basis, mine, other in (
            ("column", column_basis, at.B, auxiliary.B),
            ("row", row_basis, at.A, auxiliary.A),
        ):
            U, V = basis(mine), basis(other)
            chance = max(U.shape[1], V.shape[1]) / U.shape[0]
            found.setdefault(("overlap", "lora", kind), []).append((layer, overlap(U, V), chance, math.nan))
    for entries in found.values():
        known = [(value, chance) for _, value, chance, _ in entries if not math.isnan(value)]
        value, chance = np.mean(known, axis=0).tolist() if known else (math.nan, math.nan)
        entries.append(("", value, chance, math.nan))
    return found


def _primary(at: LayerMoment) -> Factors:
    return Factors(at.B, at.A, at.scale)


def _auxiliary(at: LayerMoment) -> Factors | None:
    if at.auxiliary_A is None or at.auxiliary_B is None:
        return None
    return Factors(at.auxiliary_B, at.auxiliary_A, at.auxiliary_scale)


def _square(tensor: Tensor) -> float:
    return float(tensor.double().square().sum())


def _run(
    objective: Objective,
    space: WeightSpace,
    settings: MeasureSettings,
    trained: Trained | None,
    watch: Watch | None = None,
) -> Dynamics:
    if trained is None or trained.recording is None:
        raise UserError("measure dynamics needs a recorded run: train with --record N (in a study: record: N)")
    return run_dynamics(trained.recording)


MEASURE = Measure(
    name=NAME,
    summary="a recorded run over its steps: convergence, perturbations, their share outside LoRA-SAM's reach",
    spaces=("",),
    settings=MeasureSettings,
    run=_run,
)
