"""Bootstrap intervals of means over training seeds, with random directions nested in them.

A draw takes as many seeds as there are, with replacement, and from each seed it takes as many of its directions, with
replacement: the two levels at which a study is random. All methods and quantities share the draws, since they share
seeds and directions. Percentiles of the drawn means are the interval.

With fewer than about ten seeds it is too narrow (of three seeds, a draw in nine holds one seed alone): the t-interval
of :func:`analysis.statistics.summarize` is the one that verdicts rest on.
"""

from collections import defaultdict

import numpy as np
import pandas as pd

from analysis.statistics import KEYS, marked
from bilora.errors import UserError
from bilora.seeds import generator_for

DRAWS = 2000


def bootstrap_intervals(
    frame: pd.DataFrame, confidence: float = 0.95, draws: int = DRAWS, seed: int = 0
) -> pd.DataFrame:
    """Percentile intervals of every quantity's mean over seeds.

    Args:
        frame: the tidy rows of one study.
        confidence: two-sided level, in (0, 1).
        draws: how many.
        seed: of the draws.

    Returns:
        One row per method and quantity: ``method``, those of :data:`analysis.statistics.KEYS`, ``bootstrap_low`` and
        ``bootstrap_high``; NaN for fewer than two seeds, for a value that is not finite, and where seeds have unequal
        numbers of directions.

    Raises:
        UserError: a missing column, a level that is none, or fewer than 100 draws.
    """
    if draws < 100:
        raise UserError(f"draws is {draws}: percentiles need at least 100")
    if not 0 < confidence < 1:
        raise UserError(f"confidence must lie between 0 and 1, not {confidence}")
    keys = ["method", *KEYS]
    found: list[dict[str, object]] = []
    alike: dict[tuple[int, int], list[tuple[int, np.ndarray]]] = defaultdict(list)
    for key, rows in marked(frame).groupby(keys, dropna=False, sort=False):
        of_seeds = [part["value"].to_numpy(dtype=float) for _, part in rows.sort_values("direction").groupby("seed")]
        shape = len(of_seeds), len(of_seeds[0])
        if shape[0] > 1 and all(len(values) == shape[1] for values in of_seeds):
            alike[shape].append((len(found), np.stack(of_seeds)))
        found.append({**dict(zip(keys, key, strict=True)), "bootstrap_low": np.nan, "bootstrap_high": np.nan})
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    for (seeds, directions), entries in alike.items():
        weights = _weights(seeds, directions, draws, seed)
        for place, values in entries:
            if np.isfinite(values).all():
                low, high = np.quantile(weights @ values.reshape(-1), tails)
                found[place] |= {"bootstrap_low": float(low), "bootstrap_high": float(high)}
    return pd.DataFrame(found)


def _weights(seeds: int, directions: int, draws: int, seed: int) -> np.ndarray:
    """(draws, seeds·directions): how much each value counts in the mean of each draw."""
    rng = np.random.default_rng(generator_for("bootstrap", seed).initial_seed())
    chosen = rng.integers(seeds, size=(draws, seeds))
    within = rng.integers(directions, size=(draws, seeds, directions))
    flat = (chosen[:, :, None] * directions + within).reshape(draws, -1)
    weights = np.zeros((draws, seeds * directions))
    np.add.at(weights, (np.arange(draws)[:, None], flat), 1 / (seeds * directions))
    return weights
