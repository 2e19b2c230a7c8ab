"""The spread that is drawn: over training seeds, or where there is one seed over its directions or examples."""

import numpy as np
import pandas as pd
from scipy import stats

from analysis.core.result import DEFAULTS
from analysis.statistics import KEYS, summarize

SEEDS, DIRECTIONS, GROUPS, EXAMPLES, NONE = "training seeds", "random directions", "groups", "examples", ""
_COUNTS = {SEEDS: "n_seeds", DIRECTIONS: "n_directions", GROUPS: "groups"}


def spread_table(rows: pd.DataFrame, confidence: float) -> pd.DataFrame:
    """:func:`analysis.statistics.summarize`, with another interval where only one training seed is known.

    That is a Student-t interval over random directions where there are several, else a normal one from the row's own
    standard error over examples. The added column ``over`` says what ``low``, ``high`` and ``half_width`` are about:
    :data:`SEEDS`, :data:`DIRECTIONS` or :data:`EXAMPLES`; :data:`NONE` where there is no interval.
    """
    rows = rows.assign(**{name: default for name, default in DEFAULTS.items() if name not in rows})  # of older tables
    table = summarize(rows, confidence)
    keys = ["method", *(key for key in KEYS if key != "index")]
    finite = rows[np.isfinite(rows["value"])].groupby(keys, dropna=False)["value"].agg(["std", "count"]).reset_index()
    errors = rows.groupby(keys, dropna=False)["standard_error"].first().reset_index()
    within = table[keys].merge(finite, on=keys, how="left").merge(errors, on=keys, how="left")
    count = within["count"].where(within["count"] > 1)
    directions = stats.t.ppf((1 + confidence) / 2, count - 1) * within["std"] / np.sqrt(count)
    examples = stats.norm.ppf((1 + confidence) / 2) * within["standard_error"]
    one_seed, several = table["n_seeds"] == 1, table["n_directions"] > 1
    by_directions, by_examples = one_seed & several & directions.notna(), one_seed & ~several & examples.notna()
    table["half_width"] = table["half_width"].mask(by_directions, directions).mask(by_examples, examples)
    table["low"], table["high"] = table["mean"] - table["half_width"], table["mean"] + table["half_width"]
    conditions = [by_directions, by_examples, table["n_seeds"] > 1]
    table["over"] = np.select(conditions, [DIRECTIONS, EXAMPLES, SEEDS], NONE)
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
    if (table["over"] == EXAMPLES).any():
        words.append(
            f"{100 * confidence:g} % interval of the mean over examples, at one perturbation of one training seed"
        )
    if not words:
        return f"One seed: no {what} can be drawn."
    return f"{what.capitalize()}: {', or '.join(words)}."
