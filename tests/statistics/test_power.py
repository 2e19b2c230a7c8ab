"""Seeds needed, against simulation and against what is known."""

import numpy as np
import pytest
from scipy import stats

from analysis.power import power_hints, seeds_needed
from analysis.statistics import paired_differences
from tests.statistics.test_statistics import rows


def test_the_textbook_number():
    """A paired t-test at 5 % finds half a standard deviation with power 0.8 from 34 pairs (Cohen 1988)."""
    assert seeds_needed(0.5) == seeds_needed(-0.5) == 34


@pytest.mark.parametrize(("effect", "level"), [(1.5, 0.05), (0.8, 0.05 / 3)])
def test_the_power_is_reached_there_and_not_one_seed_earlier(effect, level):
    n = seeds_needed(effect, level)
    rng = np.random.default_rng(1)
    for seeds, above in ((n, True), (n - 1, False)):
        p = stats.ttest_1samp(rng.normal(effect, 1, size=(40000, seeds)), 0, axis=1).pvalue
        rejected = (p < level).mean()
        error = np.sqrt(0.8 * 0.2 / 40000)
        assert rejected > 0.8 - 3 * error if above else rejected < 0.8 + 3 * error


def test_no_effect_is_never_settled():
    assert seeds_needed(0.0) is None
    assert seeds_needed(float("nan")) is None
    assert seeds_needed(0.01) is None


def test_hints_are_for_undecided_rows_at_the_level_of_their_family():
    base = [1.0, 2.0, 3.0, 4.0]
    frame = rows({
        "LoRA": base,
        "clear": [x - 5 - 0.01 * i for i, x in enumerate(base)],
        "open": [x + d for x, d in zip(base, (0.9, -0.4, 0.5, 0.2), strict=True)],
    })  # fmt: skip
    differences = paired_differences(frame, "LoRA")
    hints = power_hints(differences)
    assert hints["method"].tolist() == ["open"]
    effect = float(differences.set_index("method").loc["open", "cohen_dz"])
    assert hints["seeds_needed"].iloc[0] == seeds_needed(effect, 0.05 / 2) > 4
