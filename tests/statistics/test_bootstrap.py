"""Bootstrap intervals against their closed-form spread, and their coverage with many seeds."""

import numpy as np
import pandas as pd
import pytest

from analysis.bootstrap import bootstrap_intervals
from analysis.statistics import summarize
from bilora.errors import UserError
from tests.statistics.test_statistics import repeated, rows


def nested(values: np.ndarray) -> pd.DataFrame:
    """values (seeds, directions) of random perturbations."""
    named = {"measure": "random", "kind": "isotropic"}
    return pd.concat(rows({"LoRA": list(column)}, **named, index=i) for i, column in enumerate(values.T))


def test_spread_is_that_of_seeds_and_of_directions_within_them():
    """Var of a drawn mean = Var_seeds/S + mean within-seed variance/(S·D), population variances."""
    values = np.random.default_rng(3).normal(size=(12, 6)) + np.linspace(0, 3, 12)[:, None]
    found = bootstrap_intervals(nested(values), confidence=0.6827, draws=20000).iloc[0]
    expected = np.sqrt(values.mean(1).var() / 12 + values.var(1).mean() / 72)
    half = (found["bootstrap_high"] - found["bootstrap_low"]) / 2
    assert half == pytest.approx(expected, rel=0.05)
    middle = (found["bootstrap_high"] + found["bootstrap_low"]) / 2
    assert middle == pytest.approx(values.mean(), abs=0.1 * expected)


def test_covers_the_mean_as_often_as_it_says_with_many_seeds():
    samples = np.random.default_rng(0).normal(2.0, 1.0, size=(400, 1, 40))
    found = bootstrap_intervals(repeated(samples, ["LoRA"]), confidence=0.9)
    covered = ((found["bootstrap_low"] <= 2) & (found["bootstrap_high"] >= 2)).mean()
    assert 0.84 < covered < 0.94


def test_rows_are_those_of_the_summary_and_draws_are_the_same_every_time():
    frame = pd.concat([rows({"LoRA": [1.0, 2.0, 4.0], "SAM": [2.0, 3.0, 5.0]}), rows({"LoRA": [7.0]}, radius=0.2)])
    found, summary = bootstrap_intervals(frame), summarize(frame)
    keys = ["method", "radius"]
    assert found[keys].equals(summary[keys])
    pd.testing.assert_frame_equal(found, bootstrap_intervals(frame))
    lora, sam, alone = found[["bootstrap_low", "bootstrap_high"]].to_numpy()
    assert sam == pytest.approx(lora + 1)  # methods share the draws
    assert np.isnan(alone).all()


def test_what_is_not_finite_has_no_interval():
    assert bootstrap_intervals(rows({"LoRA": [1.0, np.inf, 2.0]}))["bootstrap_low"].isna().all()


def test_bad_settings_are_one_line():
    frame = rows({"LoRA": [1.0, 2.0]})
    with pytest.raises(UserError, match="at least 100"):
        bootstrap_intervals(frame, draws=5)
    with pytest.raises(UserError, match="between 0 and 1"):
        bootstrap_intervals(frame, confidence=95)
