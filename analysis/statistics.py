"""From rows to claims: means over seeds with t-intervals, and paired differences between methods.

A training seed is the unit of replication. Random directions are averaged within a seed first, because directions of
one trained model say nothing about how another training run would have ended.

Values that are not finite (a loss that overflowed under a perturbation) never enter a mean and are never lost: every
table carries their count, and a comparison that rests on surviving values alone is not decided.
"""

import math
from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
from scipy import stats

from analysis.comparable import check_same_m
from bilora.errors import UserError

KEYS = ["measure", "space", "quantity", "kind", "split", "layer", "label", "radius", "y", "index"]
"""What identifies a quantity; two methods are compared only where all of these agree."""

DIRECTIONS = frozenset({("random", "loss_rise"), ("read_noise", "loss_rise"), ("landscape", "loss")})
"""``(measure, quantity)`` pairs whose ``index`` counts random directions: they are averaged within a seed."""

BOOKKEEPING = frozenset(
    {
        ("random", "directions"),
        ("random", "reached"),
        ("worst_case", "steps"),
        ("worst_case", "restarts"),
        ("worst_case", "late_gain"),
        ("m_sharpness", "groups"),
        ("m_sharpness", "steps"),
        ("m_sharpness", "restarts"),
        ("connectivity", "distance"),
        ("spectrum", "products"),
        ("trace", "products"),
        ("density", "products"),
        ("density", "runs"),
        *(("surface", name) for name in ("cosine", "axis", "evaluated", "interpolation_error")),
        *(("landscape", name) for name in ("precision_error", "precision_seen", "precision_checked")),
        *(("surface", name) for name in ("precision_error", "precision_seen", "precision_checked")),
        *(("surface", name) for name in ("precision_cosine", "explained_variance")),
        *(("subspace", f"{name}_p_value") for name in ("overlap", "outside_share", "alignment")),
    }
)
"""``(measure, quantity)`` pairs that say what a number cost or is worth."""

SUBSET = frozenset({"examples", "examples_available", "subset_error"})
"""Quantities of any measure that say what a number is worth that was taken on some of the examples."""

CURVES = frozenset(
    {
        ("density", "density"),
        ("worst_case", "best_rise"),
        ("worst_case", "start_rise"),
        *(("surface", name) for name in ("loss", "accuracy", "mark")),
        *(("connectivity", name) for name in ("loss", "accuracy")),
    }
)
"""``(measure, quantity)`` pairs that are points of one curve or surface: methods are not compared point by point."""

OVER_STEPS = frozenset({"dynamics"})
"""Measures whose every quantity is a curve over training steps."""

LOWER, HIGHER, UNDECIDED = "lower", "higher", "undecided"

_REQUIRED = ["method", "seed", *(key for key in KEYS if key not in ("label", "y")), "value"]
_LATER: Mapping[str, str | float] = {"label": "", "y": math.nan}
"""Columns that tables of older versions lack, with their defaults."""
_SPREAD_FREE = 1e-12  # a standard deviation below this share of the mean is rounding, not spread


def summarize(frame: pd.DataFrame, confidence: float = 0.95) -> pd.DataFrame:
    """Mean over seeds of every quantity, with its spread and a Student-t confidence interval.

    Args:
        frame: the tidy rows of one study (see ``docs/architecture.md``, "Rows").
        confidence: two-sided level of the interval, in (0, 1).

    Returns:
        One row per method and quantity, with the columns ``method``, those of :data:`KEYS` (``index`` is −1 where it
        counted directions) and

        ``mean``, ``standard_deviation`` (sample, over seeds), ``standard_error``, ``low``, ``high``, ``half_width``
            over the seeds' finite values; NaN where fewer than two seeds give one.
        ``n_seeds``, ``n_directions``, ``n_non_finite``
            seeds with a finite value, directions per seed, and rows left out because they are not finite.
        ``induced_norm``, ``chance``, ``residual``
            mean realised norm, mean chance level, and the worst residual.

    Raises:
        UserError: if a column is missing, ``confidence`` is not in (0, 1), or a seed holds the same quantity twice.
    """
    _check(frame, confidence)
    keys = ["method", *KEYS]
    groups = per_seed(frame).groupby(keys, dropna=False, sort=False)
    table = groups.agg(
        mean=("value", "mean"),
        standard_deviation=("value", "std"),
        n_seeds=("value", "count"),
        n_directions=("n_directions", "min"),
        n_non_finite=("n_non_finite", "sum"),
        induced_norm=("induced_norm", "mean"),
        chance=("chance", "mean"),
        residual=("residual", "max"),
    ).reset_index()
    table["standard_error"] = table["standard_deviation"] / np.sqrt(table["n_seeds"].clip(lower=1))
    table["half_width"] = _t_quantile(table["n_seeds"], 1 - confidence) * table["standard_error"]
    table["low"] = table["mean"] - table["half_width"]
    table["high"] = table["mean"] + table["half_width"]
    figures = ["mean", "standard_deviation", "standard_error", "low", "high", "half_width"]
    counts = ["n_seeds", "n_directions", "n_non_finite"]
    return table[[*keys, *figures, *counts, "induced_norm", "chance", "residual"]]


def paired_differences(
    frame: pd.DataFrame, baseline: str, confidence: float = 0.95, *, within_seed: bool = False
) -> pd.DataFrame:
    """Difference of every method to ``baseline``, paired by seed (and direction) on identical quantities.

    The methods compared on one quantity form a family; within it p-values and intervals are corrected by Holm's
    step-down procedure (Holm, 1979). There is no correction across quantities or radii, which are far from independent.

    Args:
        frame: the tidy rows of one study.
        baseline: label of the method that is subtracted.
        confidence: two-sided level of the family, in (0, 1).
        within_seed: where two methods share one training seed alone, take the interval over the random directions of
            that seed. It is about these two trained models, and says nothing about another training.

    Returns:
        One row per method and quantity, with ``method``, ``baseline``, those of :data:`KEYS` and

        ``difference``
            mean over seeds (each a mean over directions) of method − baseline.
        ``low``, ``high``
            t-interval at ``confidence``, uncorrected.
        ``corrected_low``, ``corrected_high``
            the interval at Holm's level for this row; it excludes 0 exactly where ``p_holm < 1 − confidence``.
        ``cohen_dz``
            mean over standard deviation of the per-seed differences.
        ``p_value``, ``p_holm``
            two-sided paired t-test, and the same after correction. NaN for one seed, or differences without any spread.
        ``over``
            what the interval is over: ``seeds``, or ``directions`` of one seed.
        ``n_seeds``, ``n_directions``, ``n_non_finite``, ``n_unmatched``
            seeds in the comparison, fewest pairs of directions in one, pairs left out because a value is not finite,
            and values left out because the other method has none of the same seed and direction.
        ``verdict``
            ``lower``, ``higher`` or ``undecided``, from the corrected interval. Always ``undecided`` where a pair was
            left out, and where an eigenvalue of largest magnitude did not converge or is negative: the order of such
            values says nothing about flatness.

    Raises:
        UserError: as :func:`summarize`, if ``baseline`` is not a method of the frame, or m-sharpness was measured with
            different m.
    """
    _check(frame, confidence)
    methods = list(dict.fromkeys(frame["method"]))
    if baseline not in methods:
        raise UserError(f"baseline {baseline!r} is not among the methods measured: name one of {', '.join(methods)}")
    check_same_m(frame)
    names = zip(frame["measure"], frame["quantity"], strict=True)
    compared = [
        name not in CURVES | BOOKKEEPING and name[0] not in OVER_STEPS and name[1] not in SUBSET for name in names
    ]
    rows = marked(frame[compared])
    pairs = _pairs(rows, baseline)
    keys = ["method", *KEYS]
    table = (
        _replicates(pairs, within_seed)
        .groupby(keys, dropna=False, sort=False)
        .agg(
            difference=("value", "mean"),
            deviation=("value", "std"),
            n=("value", "count"),
            over=("over", "first"),
            n_seeds=("finite_seed", "nunique"),
            n_directions=("n_directions", "min"),
            n_non_finite=("n_non_finite", "sum"),
        )
        .reset_index()
    )
    table["n_unmatched"] = _unmatched(table[keys], rows, pairs, baseline)
    spread = table["deviation"].where(table["deviation"] > _SPREAD_FREE * table["difference"].abs())
    error = spread / np.sqrt(table["n"].clip(lower=1))
    table["cohen_dz"] = table["difference"] / spread
    freedom = (table["n"] - 1).clip(lower=1)
    table["p_value"] = 2 * stats.t.sf((table["difference"] / error).abs(), freedom)

    alpha = 1 - confidence
    family = table.groupby(KEYS, dropna=False, sort=False)["p_value"]
    table["p_holm"] = family.transform(holm)
    level = family.transform(lambda p: holm_level(p, alpha))
    for prefix, significance in (("", alpha), ("corrected_", level)):
        half = _t_quantile(table["n"], significance) * error
        table[f"{prefix}low"], table[f"{prefix}high"] = table["difference"] - half, table["difference"] + half

    table["verdict"] = UNDECIDED
    complete = (table["n_non_finite"] == 0) & ~_unordered_eigenvalues(table, frame, baseline)
    table.loc[complete & (table["corrected_high"] < 0), "verdict"] = LOWER
    table.loc[complete & (table["corrected_low"] > 0), "verdict"] = HIGHER
    table["baseline"] = baseline
    figures = ["difference", "low", "high", "corrected_low", "corrected_high", "cohen_dz", "p_value", "p_holm"]
    counts = ["over", "n_seeds", "n_directions", "n_non_finite", "n_unmatched"]
    return table[["method", "baseline", *KEYS, *figures, *counts, "verdict"]]


def _unordered_eigenvalues(table: pd.DataFrame, frame: pd.DataFrame, baseline: str) -> "pd.Series[bool]":
    """Marks the rows of ``table`` that compare an eigenvalue which is unconverged or negative in either method."""
    spectrum = frame[frame["measure"] == "spectrum"]
    unconverged = (spectrum["quantity"] == "converged") & (spectrum["value"] == 0)
    negative = (spectrum["quantity"] == "eigenvalue") & (spectrum["kind"] == "") & (spectrum["value"] < 0)
    place = ["space", "kind", "split", "index"]
    doubtful = set(spectrum.loc[unconverged | negative, ["method", *place]].itertuples(index=False, name=None))
    marks = [
        quantity == "eigenvalue" and bool({(method, *where), (baseline, *where)} & doubtful)
        for method, quantity, *where in table[["method", "quantity", *place]].itertuples(index=False, name=None)
    ]
    return pd.Series(marks, index=table.index, dtype=bool)


def per_seed(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per method, seed and quantity: directions averaged over their finite values.

    Returns:
        Columns ``method``, ``seed``, those of :data:`KEYS`, ``value`` (NaN where no value is finite), ``n_directions``,
        ``n_non_finite``, ``induced_norm``, ``chance`` and ``residual``.

    Raises:
        UserError: if a column is missing or a seed holds the same quantity twice.
    """
    _check(frame)
    return _average_directions(marked(frame))


def holm(p_values: Iterable[float]) -> np.ndarray:
    """Holm-corrected p-values of one family; NaN entries (no test was possible) stay NaN and do not count."""
    p = np.asarray(list(p_values), dtype=float)
    corrected = np.full(p.shape, np.nan)
    order = _tested_in_order(p)
    factors = np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * factors), 1.0)
    return corrected


def holm_level(p_values: Iterable[float], alpha: float) -> np.ndarray:
    """Significance level at which each interval of a family is drawn so that it agrees with Holm's decision.

    The j-th smallest of m p-values is tested at ``alpha/(m−j+1)``. From the first that fails on, all keep the level at
    which the procedure stopped, so that none of their intervals excludes 0.
    """
    p = np.asarray(list(p_values), dtype=float)
    levels = np.full(p.shape, np.nan)
    order = _tested_in_order(p)
    steps = alpha / np.arange(len(order), 0, -1)
    failed = np.flatnonzero(p[order] >= steps)
    if len(failed):
        steps[failed[0] :] = steps[failed[0]]
    levels[order] = steps
    return levels


def _tested_in_order(p: np.ndarray) -> np.ndarray:
    order = np.argsort(p, kind="stable")
    return order[: np.count_nonzero(~np.isnan(p))]


def _t_quantile(n_seeds: pd.Series, significance: float | pd.Series) -> np.ndarray:
    """Two-sided Student-t quantile with ``n − 1`` degrees of freedom; NaN for fewer than two seeds."""
    freedom = (n_seeds - 1).where(n_seeds > 1).astype(float)
    return np.asarray(stats.t.ppf(1 - significance / 2, freedom))


def _pairs(rows: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Differences method − baseline, direction by direction."""
    on = ["seed", *KEYS, "direction"]
    reference = rows.loc[rows["method"] == baseline, [*on, "value"]]
    others = rows.loc[rows["method"] != baseline, ["method", *on, "value"]]
    pairs = others.merge(reference, on=on, suffixes=("", "_baseline"))
    pairs["value"] = pairs["value"] - pairs["value_baseline"]
    return pairs.drop(columns="value_baseline")


def _replicates(pairs: pd.DataFrame, within_seed: bool) -> pd.DataFrame:
    """What intervals are taken over: a row a seed; with ``within_seed`` a row a direction of a seed that is alone."""
    keys = ["method", *KEYS]
    found = _average_directions(pairs).assign(over="seeds")
    if within_seed:
        seeds = found.groupby(keys, dropna=False, sort=False)["seed"].transform("size")
        alone = (seeds == 1) & (found["n_directions"] > 1)
        place = found.assign(place=range(len(found)))
        inside = pairs.merge(place.loc[alone, [*keys, "n_directions", "place"]], on=keys)
        finite = np.isfinite(inside["value"])
        inside = inside.assign(value=inside["value"].where(finite), n_non_finite=1 - finite.astype(int))
        both = pd.concat([place[~alone], inside.assign(over="directions")], ignore_index=True)
        found = both.sort_values("place", kind="stable", ignore_index=True).drop(columns="place")
    return found.assign(finite_seed=found["seed"].where(found["value"].notna()))


def _unmatched(quantities: pd.DataFrame, rows: pd.DataFrame, pairs: pd.DataFrame, baseline: str) -> np.ndarray:
    """How many values of a method and of the baseline are in no pair, for each row (method, KEYS) of ``quantities``."""

    def counted(table: pd.DataFrame, keys: list[str]) -> np.ndarray:
        sizes = table.groupby(keys, dropna=False, sort=False).size().reset_index(name="count")
        return np.asarray(quantities.merge(sizes, on=keys, how="left")["count"])

    keys = ["method", *KEYS]
    reference = rows[rows["method"] == baseline]
    return counted(rows, keys) + counted(reference, KEYS) - 2 * counted(pairs, keys)


def marked(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows with direction numbers moved from ``index`` to ``direction``."""
    rows = frame.assign(**{name: value for name, value in _LATER.items() if name not in frame})
    is_direction = pd.Series(
        [pair in DIRECTIONS for pair in zip(rows["measure"], rows["quantity"], strict=True)],
        index=rows.index,
        dtype=bool,
    )
    rows["direction"] = rows["index"].where(is_direction, -1)
    rows["index"] = rows["index"].where(~is_direction, -1)
    keys = ["method", "seed", *KEYS, "direction"]
    repeated = rows.duplicated(keys)
    if repeated.any():
        first = rows.loc[repeated, keys].iloc[0]
        named = ", ".join(f"{name}={first[name]}" for name in keys if first[name] not in ("", -1))
        raise UserError(f"the rows hold the same quantity twice ({named}): keep one row of each")
    return rows


def _average_directions(rows: pd.DataFrame) -> pd.DataFrame:
    rows = rows.assign(finite=rows["value"].where(np.isfinite(rows["value"])))
    for column in ("induced_norm", "chance", "residual"):
        if column not in rows:
            rows[column] = np.nan
    groups = rows.groupby(["method", "seed", *KEYS], dropna=False, sort=False)
    table = groups.agg(
        value=("finite", "mean"),
        n_directions=("finite", "size"),
        n_finite=("finite", "count"),
        induced_norm=("induced_norm", "mean"),
        chance=("chance", "mean"),
        residual=("residual", "max"),
    ).reset_index()
    table["n_non_finite"] = table["n_directions"] - table["n_finite"]
    return table.drop(columns="n_finite")


def _check(frame: pd.DataFrame, confidence: float = 0.95) -> None:
    missing = [name for name in _REQUIRED if name not in frame]
    if missing:
        raise UserError(f"the table lacks the columns {', '.join(missing)}: pass the rows of a study (results.parquet)")
    if not 0 < confidence < 1:
        raise UserError(f"confidence must lie between 0 and 1, not {confidence}")
