"""Does a sharpness go with the generalisation gap? Kendall's rank correlation over the runs of a study.

    gap   loss(validation) − loss(train), of each trained model, as ``quality`` measures them
    tau   Kendall's tau-b of a sharpness and the gap, over all runs
    tau_within   the mean over methods of tau over that method's runs: what is left once methods are told apart

Such correlations are weak and change sign with the task, the measure and the range of hyper-parameters (Jiang et al.,
ICLR 2020; Andriushchenko et al., ICML 2023): a high one within a study says that the two went together there, and not
that a flatter model generalises better.
"""

from collections.abc import Iterable

import numpy as np
import pandas as pd
from scipy import stats

from analysis.headlines import headline_rows
from analysis.statistics import per_seed
from bilora.seeds import generator_for

DRAWS = 1000
COLUMNS = ["headline", "space", "split", "n_runs", "n_seeds", "tau", "low", "high", "tau_within"]
FEWEST = 4
"""Runs below which no correlation is given."""


def gap_correlations(frame: pd.DataFrame, confidence: float = 0.95, draws: int = DRAWS, seed: int = 0) -> pd.DataFrame:
    """The correlation of each headline sharpness with the gap.

    Args:
        frame: the tidy rows of one study with ``quality`` on both splits.
        confidence: of the interval, in (0, 1).
        draws: of its bootstrap, which draws training seeds with all methods' runs of each.
        seed: of the draws.

    Returns:
        One row per sharpness: :data:`COLUMNS`, ``low`` and ``high`` NaN for fewer than three seeds. Empty where the gap
        or every sharpness is missing, or there are fewer than four runs.
    """
    values = per_seed(frame)
    gap = _gap(values)
    found = []
    if len(gap) >= FEWEST:
        headlines = headline_rows(values)
        for (headline, space, split), rows in headlines.groupby(["headline", "space", "split"], sort=False):
            runs = rows.set_index(["method", "seed"])["value"].to_frame("sharpness").join(gap.rename("gap"))
            runs = runs[np.isfinite(runs).all(axis=1)].reset_index()
            if len(runs) >= FEWEST:
                found.append(
                    {"headline": headline, "space": space, "split": split, **_row(runs, confidence, draws, seed)}
                )
    return pd.DataFrame(found, columns=COLUMNS)


def _gap(values: pd.DataFrame) -> "pd.Series[float]":
    """Of each method and seed."""
    loss = values[(values["measure"] == "quality") & (values["quantity"] == "loss")]
    by_split = loss.pivot_table(index=["method", "seed"], columns="split", values="value")
    if not {"train", "validation"} <= set(by_split.columns):
        return pd.Series(dtype=float)
    return (by_split["validation"] - by_split["train"]).dropna()


def _row(runs: pd.DataFrame, confidence: float, draws: int, seed: int) -> dict[str, float]:
    by_seed = [part[["sharpness", "gap"]].to_numpy() for _, part in runs.groupby("seed")]
    within = [tau(part["sharpness"], part["gap"]) for _, part in runs.groupby("method") if len(part) >= FEWEST - 1]
    defined = [value for value in within if not np.isnan(value)]
    low = high = np.nan
    if len(by_seed) >= FEWEST - 1:
        rng = np.random.default_rng(generator_for("correlation", seed).initial_seed())
        chosen = rng.integers(len(by_seed), size=(draws, len(by_seed)))
        drawn = [tau(*np.concatenate([by_seed[i] for i in row]).T) for row in chosen]
        low, high = np.nanquantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return {
        "n_runs": len(runs),
        "n_seeds": len(by_seed),
        "tau": tau(runs["sharpness"], runs["gap"]),
        "low": float(low),
        "high": float(high),
        "tau_within": float(np.mean(defined)) if defined else np.nan,
    }


def tau(first: Iterable[float], second: Iterable[float]) -> float:
    """Kendall's tau-b; NaN where either is constant."""
    return float(stats.kendalltau(np.asarray(list(first)), np.asarray(list(second))).statistic)
