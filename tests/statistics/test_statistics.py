"""Means, intervals and paired differences against scipy and by simulation."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.statistics import KEYS, holm, holm_level, paired_differences, summarize
from bilora.errors import UserError
from tests.plausible_rows import COLUMNS, plausible_rows


def rows(values: dict[str, list[float]], **common: object) -> pd.DataFrame:
    """One quantity: method → value of seed 0, 1, …"""
    fixed = {**COLUMNS, "measure": "adversarial", "space": "full", "quantity": "loss_rise", "radius": 0.1, **common}
    return pd.DataFrame(
        [
            {**fixed, "method": m, "seed": s, "value": v}
            for m, of_seeds in values.items()
            for s, v in enumerate(of_seeds)
        ]
    )


def repeated(samples: np.ndarray, methods: list[str]) -> pd.DataFrame:
    """Many independent studies of one quantity, told apart by ``layer``; samples (studies, methods, seeds)."""
    study, method, seed = (axis.ravel() for axis in np.indices(samples.shape))
    fixed = {**COLUMNS, "measure": "adversarial", "quantity": "loss_rise"}
    own = {"layer": study.astype(str), "method": np.array(methods)[method], "seed": seed, "value": samples.ravel()}
    return pd.DataFrame({**fixed, **own})


def test_summary_is_the_t_interval_of_scipy():
    values = [0.31, 0.27, 0.44, 0.35]
    row = summarize(rows({"LoRA": values}), confidence=0.9).iloc[0]
    low, high = stats.t.interval(0.9, 3, loc=np.mean(values), scale=stats.sem(values))
    assert row["mean"] == pytest.approx(np.mean(values))
    assert row["standard_deviation"] == pytest.approx(np.std(values, ddof=1))
    assert row["standard_error"] == pytest.approx(stats.sem(values))
    assert (row["low"], row["high"]) == (pytest.approx(low), pytest.approx(high))
    assert (row["n_seeds"], row["n_directions"], row["n_non_finite"]) == (4, 1, 0)


def test_directions_are_averaged_within_a_seed_before_seeds_are_counted():
    directions = pd.concat(
        rows({"LoRA": [1.0 + d, 2.0 + 3 * d]}, measure="random", kind="isotropic", index=d) for d in range(4)
    )
    row = summarize(directions)
    assert len(row) == 1
    assert row.iloc[0]["mean"] == pytest.approx((2.5 + 6.5) / 2)
    assert row.iloc[0]["standard_deviation"] == pytest.approx(np.std([2.5, 6.5], ddof=1))
    assert (row.iloc[0]["n_seeds"], row.iloc[0]["n_directions"], row.iloc[0]["index"]) == (2, 4, -1)


def test_rank_of_an_eigenvalue_is_not_a_direction():
    named = {"measure": "spectrum", "quantity": "eigenvalue"}
    spectrum = pd.concat(rows({"LoRA": [5.0 / k, 6.0 / k]}, **named, index=k) for k in (1, 2))
    table = summarize(spectrum).set_index("index")
    assert table.loc[1, "mean"] == pytest.approx(5.5)
    assert table.loc[2, "mean"] == pytest.approx(2.75)


def test_non_finite_values_are_counted_and_leave_the_mean():
    row = summarize(rows({"LoRA": [1.0, np.inf, 3.0, np.nan]})).iloc[0]
    assert row["mean"] == pytest.approx(2.0)
    assert (row["n_seeds"], row["n_non_finite"]) == (2, 2)


def test_a_quantity_without_any_finite_value_keeps_its_row():
    row = summarize(rows({"LoRA": [np.inf, np.nan]})).iloc[0]
    assert np.isnan(row["mean"])
    assert (row["n_seeds"], row["n_non_finite"]) == (0, 2)


def test_one_seed_has_no_interval():
    row = summarize(rows({"LoRA": [1.0]})).iloc[0]
    assert row["mean"] == 1.0
    assert np.isnan(row["low"])
    assert np.isnan(row["standard_error"])


def test_the_interval_covers_the_true_mean_as_often_as_it_says():
    rng = np.random.default_rng(7)
    studies = repeated(rng.normal(1.0, 2.0, (2000, 1, 3)), ["LoRA"])
    table = summarize(studies, confidence=0.9)
    coverage = ((table["low"] < 1.0) & (table["high"] > 1.0)).mean()
    assert coverage == pytest.approx(0.9, abs=3 * np.sqrt(0.09 / 2000))


def test_paired_difference_is_the_paired_t_test_of_scipy():
    lora, bilora = [1.0, 1.4, 1.1, 1.6], [0.8, 1.3, 0.7, 1.2]
    row = paired_differences(rows({"LoRA": lora, "Bi-LoRA": bilora}), "LoRA").iloc[0]
    expected = stats.ttest_rel(bilora, lora)
    interval = expected.confidence_interval(0.95)
    difference = np.subtract(bilora, lora)
    assert row["difference"] == pytest.approx(difference.mean())
    assert row["p_value"] == pytest.approx(expected.pvalue)
    assert (row["low"], row["high"]) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert (row["corrected_low"], row["p_holm"]) == (pytest.approx(interval.low), pytest.approx(expected.pvalue))
    assert row["cohen_dz"] == pytest.approx(difference.mean() / difference.std(ddof=1))
    assert (row["verdict"], row["n_seeds"]) == ("lower", 4)


def test_pairs_are_formed_by_seed_not_by_position():
    frame = rows({"LoRA": [1.0, 2.0, 4.0], "Bi-LoRA": [0.9, 1.8, 3.7]})
    shuffled = frame.sample(frac=1, random_state=1)
    pd.testing.assert_frame_equal(
        paired_differences(frame, "LoRA").drop(columns="method"),
        paired_differences(shuffled, "LoRA").drop(columns="method"),
    )


def test_only_shared_seeds_directions_and_radii_are_compared():
    frame = pd.concat(
        [
            rows({"LoRA": [1.0, 1.0], "Bi-LoRA": [0.5, 0.7, 9.0]}, measure="random", index=0),
            rows({"LoRA": [50.0, 50.0]}, measure="random", index=1),
            rows({"Bi-LoRA": [0.1, 0.1]}, measure="random", index=0, radius=0.2),
        ]
    )
    table = paired_differences(frame, "LoRA")
    assert len(table) == 1
    row = table.iloc[0]
    assert row["difference"] == pytest.approx(-0.4)
    assert (row["n_seeds"], row["n_directions"], row["over"]) == (2, 1, "seeds")
    assert row["n_unmatched"] == 1 + 2  # a seed of Bi-LoRA, and a direction of LoRA at two seeds


def directions(values: dict[str, list[float]], seed: int = 0) -> pd.DataFrame:
    """Rises of one seed: method → value of direction 0, 1, …"""
    frame = rows(values, measure="random", kind="filter")
    return frame.assign(index=frame["seed"], seed=seed)


def test_with_one_seed_the_interval_is_over_its_directions_if_asked_for():
    lora, bilora = [1.0, 1.4, 1.1, 1.6, 1.2], [0.8, 1.3, 0.7, 1.2]
    frame = directions({"LoRA": lora, "Bi-LoRA": bilora})
    row = paired_differences(frame, "LoRA", within_seed=True).iloc[0]
    expected = stats.ttest_rel(bilora, lora[:4])
    interval = expected.confidence_interval(0.95)
    assert (row["low"], row["high"]) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert row["p_value"] == pytest.approx(expected.pvalue)
    assert (row["over"], row["n_seeds"], row["n_directions"], row["n_unmatched"]) == ("directions", 1, 4, 1)
    assert row["verdict"] == "lower"
    assert paired_differences(frame, "LoRA").iloc[0]["verdict"] == "undecided"


def test_the_order_of_quantities_is_that_of_the_rows():
    values = {"LoRA": [1.0, 1.4, 1.1], "Bi-LoRA": [0.8, 1.3, 0.7]}
    frame = pd.concat(
        [directions(values), rows({"LoRA": [1.0], "Bi-LoRA": [2.0]}), directions(values).assign(radius=9)]
    )
    inside, across = (paired_differences(frame, "LoRA", within_seed=within) for within in (True, False))
    pd.testing.assert_frame_equal(inside[["method", *KEYS, "difference"]], across[["method", *KEYS, "difference"]])
    assert inside["over"].tolist() == ["directions", "seeds", "directions"]


def test_with_several_seeds_directions_are_nested_in_them():
    values = [({"LoRA": [1.0, 1.2], "Bi-LoRA": [0.5, 0.9]}, 0), ({"LoRA": [2.0, 2.4], "Bi-LoRA": [1.8, 1.7]}, 1)]
    frame = pd.concat([directions(*part) for part in values])
    inside, across = (paired_differences(frame, "LoRA", within_seed=within) for within in (True, False))
    pd.testing.assert_frame_equal(inside, across)
    expected = stats.ttest_1samp([-0.4, -0.45], 0).confidence_interval(0.95)
    assert (inside.iloc[0]["low"], inside.iloc[0]["over"]) == (pytest.approx(expected.low), "seeds")


def test_a_direction_that_is_not_finite_is_counted_and_leaves_the_verdict_open():
    frame = directions({"LoRA": [1.0, 1.1, 1.05, np.inf], "Bi-LoRA": [0.10, 0.21, 0.14, 0.1]})
    row = paired_differences(frame, "LoRA", within_seed=True).iloc[0]
    assert (row["n_non_finite"], row["n_directions"], row["verdict"]) == (1, 4, "undecided")
    assert row["high"] < 0


def test_holm_matches_the_procedure_done_by_hand():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.02, np.nan, 0.01]), [0.02, np.nan, 0.02])
    np.testing.assert_allclose(holm([0.9, 0.8]), [1.0, 1.0])
    np.testing.assert_allclose(holm_level([0.001, 0.4, 0.03], 0.05), [0.05 / 3, 0.025, 0.025])


def test_corrected_interval_and_corrected_p_value_always_agree():
    rng = np.random.default_rng(3)
    shifts = np.array([0, -1, 0.6, 0])[:, None]
    frame = repeated(rng.normal(shifts, 0.5, (200, 4, 5)), ["LoRA", "a", "b", "c"])
    table = paired_differences(frame, "LoRA")
    excludes_zero = (table["corrected_low"] > 0) | (table["corrected_high"] < 0)
    assert excludes_zero.equals(table["p_holm"] < 0.05)
    assert excludes_zero.equals(table["verdict"] != "undecided")
    assert set(table["verdict"]) == {"lower", "higher", "undecided"}


def test_family_wise_error_stays_below_its_level_when_nothing_differs():
    rng = np.random.default_rng(5)
    families = 600
    frame = repeated(rng.normal(size=(families, 3, 4)), ["LoRA", "a", "b"])
    table = paired_differences(frame, "LoRA")
    wrong = (table["verdict"] != "undecided").groupby(table["layer"]).any().mean()
    assert wrong < 0.05 + 3 * np.sqrt(0.05 * 0.95 / families)
    assert wrong > 0.01


def test_a_pair_with_a_non_finite_value_is_counted_and_leaves_the_verdict_open():
    frame = rows({"LoRA": [1.0, 1.1, 1.05, np.inf], "Bi-LoRA": [0.10, 0.21, 0.14, 0.1]})
    row = paired_differences(frame, "LoRA").iloc[0]
    assert (row["n_seeds"], row["n_non_finite"]) == (3, 1)
    assert row["corrected_high"] < 0
    assert row["verdict"] == "undecided"


@pytest.mark.parametrize("values", [[1.0, 2.0, 3.0], [0.5, 1.5, 2.5]])
def test_differences_without_spread_decide_nothing(values):
    row = paired_differences(rows({"LoRA": [1.0, 2.0, 3.0], "Bi-LoRA": values}), "LoRA").iloc[0]
    assert np.isnan(row["p_value"])
    assert np.isnan(row["cohen_dz"])
    assert row["verdict"] == "undecided"


@pytest.mark.parametrize("spoilt", ["unconverged", "negative", "none"])
def test_an_eigenvalue_that_cannot_be_ordered_decides_nothing(spoilt):
    where = {"measure": "spectrum", "index": 1, "kind": "", "space": "full"}
    values = {"LoRA": [90.0, 91.0, 92.0], "Bi-LoRA": [10.0, 11.5, 12.0]}
    if spoilt == "negative":
        values["Bi-LoRA"][0] = -10.0
    converged = {"LoRA": [1.0, 1.0, 1.0], "Bi-LoRA": [1.0, 1.0, 0.0 if spoilt == "unconverged" else 1.0]}
    frame = pd.concat(
        [rows(values, quantity="eigenvalue", **where), rows(converged, quantity="converged", **where)],
        ignore_index=True,
    )
    table = paired_differences(frame, "LoRA")
    (verdict,) = table.loc[table["quantity"] == "eigenvalue", "verdict"]
    assert verdict == ("lower" if spoilt == "none" else "undecided")


def test_one_seed_decides_nothing():
    row = paired_differences(rows({"LoRA": [1.0], "Bi-LoRA": [0.1]}), "LoRA").iloc[0]
    assert (row["n_seeds"], row["verdict"]) == (1, "undecided")


def test_a_whole_study_goes_through():
    frame = plausible_rows()
    table = summarize(frame)
    assert table["n_seeds"].eq(3).all()
    assert not table.duplicated(["method", *KEYS]).any()
    differences = paired_differences(frame, "LoRA")
    assert "LoRA" not in set(differences["method"])
    assert not differences.query("method == 'Full FT'")["space"].eq("lora").any()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda f: paired_differences(f, "SAM"), "baseline 'SAM' is not among"),
        (lambda f: summarize(f, confidence=95), "confidence must lie between 0 and 1"),
        (lambda f: summarize(f.drop(columns="radius")), "lacks the columns radius"),
        (lambda f: summarize(pd.concat([f, f])), "the same quantity twice"),
    ],
)
def test_bad_input_is_one_line(call, says):
    with pytest.raises(UserError, match=says) as caught:
        call(rows({"LoRA": [1.0, 2.0]}))
    assert "\n" not in str(caught.value)
