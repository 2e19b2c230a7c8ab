"""The error that a mean loss has for being taken on some of the examples.

    D = Σ_i w_i·d_i / Σ_i w_i,     e_i = w_i·(d_i − D)/w̄,     SE² = (1 − n/N)·Σ_i e_i²/((n − 1)·n)

d_i are differences of the loss of example i between two places, w_i the number of its terms (1, or its counted tokens),
n of N examples drawn without replacement: the error of D beside its value on all N (Cochran 1977, sections 2.5, 6.3).
Examples that were drawn in classes of fixed sizes, as those of a task are, have an error no larger, to first order.
"""

import math

import numpy as np
import numpy.typing as npt

from analysis.core.objective import Objective
from analysis.core.space import WeightSpace

Array = npt.NDArray[np.float64]


def single_examples(objective: Objective) -> Objective:
    """The same examples in batches of one; those without a term in the loss are left out."""
    batches = [
        {key: tensor[i : i + 1] for key, tensor in batch.items()}
        for batch in objective.batches
        for i in range(len(next(iter(batch.values()))))
    ]
    return Objective(batches, name=objective.name, shifted=objective.shifted)


def example_losses(singles: Objective, space: WeightSpace) -> Array:
    """The loss of each example at the space's current weights, (n,). NaN or infinite where the model's is.

    Args:
        singles: of :func:`single_examples`.
        space: the model.
    """
    return np.array([singles.batch_value(space, i) for i in range(len(singles.batches))])


def subset_error(differences: Array, terms: Array, available: int) -> float:
    """Standard error of the mean difference on n examples beside that on all there are.

    Args:
        differences: of the losses of n examples between two places, (n,).
        terms: numbers that each example's loss is the mean of, (n,).
        available: N, how many examples there are.

    Returns:
        0 where all are used; NaN for a single one, and where a difference is not finite.
    """
    n = len(differences)
    if n >= available:
        return 0.0
    if n < 2 or not np.isfinite(differences).all():
        return math.nan
    share = terms / terms.mean()
    residuals = share * (differences - np.average(differences, weights=terms))
    return math.sqrt((1 - n / available) * float(residuals @ residuals) / ((n - 1) * n))
