"""The spread that is drawn: over training seeds, or where there is one seed over its random directions."""

import numpy as np
import pandas as pd
from scipy import stats

from analysis.statistics import KEYS, summarize

SEEDS, DIRECTIONS, GROUPS, NONE = "training seeds", "random directions", "groups", ""
_COUNTS = {SEEDS: "n_seeds", DIRECTIONS: "n_directions", GROUPS: "groups"}


def spread_table(rows: pd.DataFrame, confidence: float) -> pd.DataFrame:
    """:func:`analysis.statistics.summarize`, with an interval over directions where only one training seed is known.

    Adds the column ``over``: :data:`SEEDS` or :data:`DIRECTIONS`, what ``low``, ``high`` and ``half_width`` are a
    Student-t interval of the mean over; :data:`NONE` where there is neither.
    """
    table = summarize(rows, confidence)
    keys = ["method", *(key for key in KEYS if key != "index")]
    finite = rows[np.isfinite(rows["value"])].groupby(keys, dropna=False)["value"].agg(["std", "count"]).reset_index()
    within = table[keys].merge(finite, on=keys, how="left")
    count = within["count"].where(within["count"] > 1)
    half = stats.t.ppf((1 + confidence) / 2, count - 1) * within["std"] / np.sqrt(count)
    alone = (table["n_seeds"] < 2) & (table["n_directions"] > 1) & half.notna()
    table["half_width"] = table["half_width"].mask(alone, half)
    table["low"], table["high"] = table["mean"] - table["half_width"], table["mean"] + table["half_width"]
    table["over"] = np.select([alone, table["n_seeds"] > 1], [DIRECTIONS, SEEDS], NONE)
    return table


def spread_words(table: pd.DataFrame, what: str, confidence: float) -> str:
    """What the drawn ``what`` (bands, whiskers) of a :func:`spread_table` are, in a sentence or two."""
    words = []
    level = f"{100 * confidence:g} % t-interval of the mean over"
    for over, column in _COUNTS.items():
        here = table["over"] == over
        if here.any():
            counts = sorted({int(n) for n in table.loc[here, column]})
            counted = str(counts[0]) if len(counts) == 1 else f"{counts[0]}–{counts[-1]}"
            words.append(f"{level} {counted} {over}")
            words[-1] += " (few: intervals are wide)" if over == SEEDS and counts[0] <= 3 else ""
            words[-1] += " of one training seed, which says nothing of other seeds" if over != SEEDS else ""
    if not words:
        return f"One seed: no {what} can be drawn."
    return f"{what.capitalize()}: {', or '.join(words)}."
