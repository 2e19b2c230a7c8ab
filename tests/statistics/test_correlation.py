"""Rank correlation of sharpness with the generalisation gap: planted, absent, and reversed within methods."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.correlation import COLUMNS as FOUND
from analysis.correlation import gap_correlations, tau
from tests.plausible_rows import plausible_rows
from tests.statistics.test_statistics import rows


def study(sharpness: dict[str, list[float]], gap: dict[str, list[float]]) -> pd.DataFrame:
    """Methods × seeds with a sharpness and a gap each."""
    quality = {"measure": "quality", "quantity": "loss", "space": "", "radius": np.nan}
    train = {method: [0.2] * len(values) for method, values in gap.items()}
    validation = {method: [0.2 + value for value in values] for method, values in gap.items()}
    return pd.concat([
        rows(sharpness, split="train"),
        rows(train, **quality, split="train"),
        rows(validation, **quality, split="validation"),
    ])  # fmt: skip


def test_tau_is_that_of_scipy():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=20), rng.normal(size=20)
    assert tau(first, second) == pytest.approx(stats.kendalltau(first, second).statistic)


def test_a_sharpness_that_follows_the_gap():
    gap = {"LoRA": [0.1, 0.4, 0.2, 0.5], "SAM": [0.3, 0.6, 0.35, 0.7]}
    (found,) = gap_correlations(study({m: [v**2 for v in values] for m, values in gap.items()}, gap)).to_dict("records")
    assert (found["tau"], found["low"], found["high"], found["tau_within"]) == pytest.approx((1, 1, 1, 1))
    assert (found["n_runs"], found["n_seeds"], found["split"]) == (8, 4, "train")


def test_methods_may_go_with_the_gap_where_the_runs_of_each_do_not():
    sharpness = {"LoRA": [1.0, 1.1, 1.2, 1.3], "SAM": [5.0, 5.1, 5.2, 5.3]}
    gap = {"LoRA": [0.14, 0.13, 0.12, 0.11], "SAM": [0.54, 0.53, 0.52, 0.51]}
    (found,) = gap_correlations(study(sharpness, gap)).to_dict("records")
    assert found["tau"] == pytest.approx((16 - 12) / 28)  # 16 pairs across methods agree, 12 within disagree
    assert found["tau_within"] == pytest.approx(-1)


def test_the_interval_covers_zero_where_there_is_nothing():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(60):
        made = [{m: list(rng.normal(size=8)) for m in ("LoRA", "SAM", "Bi-LoRA")} for _ in range(2)]
        (found,) = gap_correlations(study(*made), draws=200).to_dict("records")
        covered += found["low"] <= 0 <= found["high"]
    assert covered >= 50


def test_every_headline_of_a_study_and_none_without_both_splits():
    found = gap_correlations(plausible_rows(), draws=100)
    assert list(found.columns) == FOUND
    assert {"full", "lora"} <= set(found["space"])
    assert found["headline"].str.contains("worst-case").any()
    frame = plausible_rows()
    none = gap_correlations(frame[~((frame["measure"] == "quality") & (frame["split"] == "train"))])
    assert none.empty
    assert list(none.columns) == FOUND
    assert gap_correlations(study({"LoRA": [1.0, 2.0]}, {"LoRA": [0.1, 0.2]})).empty
