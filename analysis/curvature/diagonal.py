"""The diagonal of the curvature, with its standard error, from products alone.

    d = mean over samples of v ⊙ H·v,   v of random signs          (Bekas, Kokiopoulou, Saad 2007)

Entry i is ``H_ii + Σ_{j≠i} H_ij·v_i·v_j``: unbiased, with variance ``Σ_{j≠i} H_ij²`` of one sample, so exact where H is
diagonal. Summed over entries that is half the variance of Hutchinson's trace, but each entry is a small part of the
trace: single entries stay uncertain long after their sum is known.
"""

from dataclasses import dataclass

import pydantic
import torch
from torch import Tensor

from analysis.core.measure import Watch
from analysis.core.objective import Objective
from analysis.core.space import WeightSpace
from analysis.core.vectors import Vector
from analysis.curvature.factory import Curvature, curvature_operator
from analysis.curvature.graphs import Graphs
from analysis.curvature.operator import SymmetricOperator
from analysis.curvature.probes import PROBES, rademacher
from analysis.settings import MeasureSettings


class DiagonalSettings(MeasureSettings):
    """Bounds of what :func:`diagonal` takes."""

    samples: int = pydantic.Field(ge=2)
    seed: int = pydantic.Field(ge=0)


@dataclass(frozen=True, eq=False)
class Diagonal:
    """The diagonal of the curvature of the mean loss in one space."""

    values: Vector
    standard_error: Vector  # of each entry, from the spread of the samples
    products: int
    space: str
    split: str
    label: str  # the operator's: "" for the exact Hessian
    part: str = ""  # which block of the space


def diagonal(
    objective: Objective,
    space: WeightSpace,
    *,
    samples: int = 32,
    seed: int = 0,
    curvature: Curvature = "hessian",
    graphs: Graphs = "auto",
    autocast: torch.dtype | None = None,
    watch: Watch | None = None,
) -> Diagonal:
    """The diagonal of the Hessian (or Gauss–Newton matrix) of the mean loss at the space's weights.

    Memory: O(n), about ten vectors in float64.

    Args:
        objective: the mean loss.
        space: where, and with respect to which weights.
        samples: products, at least 2.
        seed: of the random signs.
        curvature: the Hessian or the Gauss–Newton matrix.
        graphs, autocast: as of the operator.
        watch: called with (products so far, ``samples``, "") after each block of samples.

    Raises:
        UserError: a setting out of range, or a loss or product that is not finite.
    """
    DiagonalSettings.checked(samples=samples, seed=seed)
    with curvature_operator(objective, space, curvature, graphs=graphs, autocast=autocast) as operator:
        mean, error = rademacher_diagonal(operator, samples=samples, seed=seed, watch=watch)
        return Diagonal(
            values=space.named_vector(mean.to(operator.dtype)),
            standard_error=space.named_vector(error.to(operator.dtype)),
            products=operator.products,
            space=space.name,
            part=space.part,
            split=objective.name,
            label=operator.label,
        )


def rademacher_diagonal(
    operator: SymmetricOperator, *, samples: int = 32, seed: int = 0, watch: Watch | None = None
) -> tuple[Tensor, Tensor]:
    """Diagonal of any symmetric operator and its standard error, (n,) each, float64.

    Raises:
        UserError: a setting out of range.
    """
    DiagonalSettings.checked(samples=samples, seed=seed)
    mean = torch.zeros(operator.size, dtype=torch.float64, device=operator.device)
    squares = torch.zeros_like(mean)  # Σ (sample − mean)², updated as by Welford 1962
    done = 0
    while done < samples:
        block = range(done, min(done + PROBES, samples))
        signs = torch.stack([rademacher(operator, "diagonal", seed, i) for i in block])
        for v, product in zip(signs, operator.matmat(signs), strict=True):
            done += 1
            # v·H·v of signs is exact in any precision: only the sums need float64.
            away = (v * product).double() - mean
            mean += away / done
            squares += away.square_().mul_((done - 1) / done)
        if watch is not None:
            watch(done, samples, "")
    return mean, squares.div_((samples - 1) * samples).sqrt_()
