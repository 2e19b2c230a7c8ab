"""How many seeds would settle a comparison that is undecided.

For paired differences of mean d and standard deviation s, Student's t of n seeds is noncentral with parameter
``√n·d/s``. The number given is the smallest n at which a two-sided test at the corrected level would reject with the
power asked for, *if the effect were the one seen*. From few seeds that effect is itself uncertain, and where it is
small because there is none, no number of seeds settles it: a hint for planning, not a promise.
"""

import math

import numpy as np
import pandas as pd
from scipy import stats

from analysis.statistics import KEYS, UNDECIDED

MOST = 1000
"""Seeds beyond which a number is no plan."""


def seeds_needed(effect: float, level: float = 0.05, power: float = 0.8, most: int = MOST) -> int | None:
    """The fewest seeds at which a paired t-test would find a standardised effect.

    Args:
        effect: mean over standard deviation of the differences (``cohen_dz``).
        level: of the two-sided test.
        power: probability of rejecting, on the side of the effect.
        most: None is returned where more are needed.
    """
    if not math.isfinite(effect) or not effect or _power(most, effect, level) < power:
        return None
    low, high = 1, most  # the power grows with n
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _power(middle, effect, level) >= power else (middle, high)
    return high


def power_hints(differences: pd.DataFrame, confidence: float = 0.95, power: float = 0.8) -> pd.DataFrame:
    """The undecided rows of paired differences, with the seeds that would settle each.

    Args:
        differences: of :func:`analysis.statistics.paired_differences`.
        confidence: the level they were made at; the test is at Bonferroni's over the methods compared on a quantity,
            which Holm's is at worst.
        power: see :func:`seeds_needed`.

    Returns:
        ``method``, ``baseline``, those of :data:`analysis.statistics.KEYS`, ``cohen_dz``, ``n_seeds`` and
        ``seeds_needed`` (NaN: more than :data:`MOST`, or no effect seen).
    """
    family = differences.groupby(KEYS, dropna=False, sort=False)["method"].transform("size")
    rows = differences.assign(level=(1 - confidence) / family)
    rows = rows[(rows["verdict"] == UNDECIDED) & (rows["n_seeds"] > 1) & (rows["n_non_finite"] == 0)]
    pairs = zip(rows["cohen_dz"], rows["level"], strict=True)
    needed = [seeds_needed(effect, level, power) for effect, level in pairs]
    values = [np.nan if n is None else float(n) for n in needed]
    return rows[["method", "baseline", *KEYS, "cohen_dz", "n_seeds"]].assign(seeds_needed=values)


def _power(n: int, effect: float, level: float) -> float:
    if n < 2:
        return 0.0
    critical = stats.t.ppf(1 - level / 2, n - 1)
    return float(stats.nct.sf(critical, n - 1, math.sqrt(n) * abs(effect)))
