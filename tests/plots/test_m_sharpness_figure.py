"""The figure of m-sharpness against the rows drawn."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from scipy import stats

from analysis.plots import m_sharpness_points
from analysis.plots.canvas import NON_FINITE, NothingToDraw
from analysis.plots.m_sharpness import BLOCK, m_sharpness_table
from analysis.plots.spread import GROUPS
from analysis.plots.style import COLUMN
from tests.plausible_rows import METHODS, RADII, plausible_rows


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    rows = plausible_rows(directions=2)
    return rows[rows["measure"].isin(["m_sharpness", "quality"])]


def words(figure: Figure) -> str:
    return " ".join(figure.get_supxlabel().split())


def points(axes) -> list[np.ndarray]:
    """x and y of the points of every method, (radii · m, 2)."""
    return [bars.lines[0].get_xydata() for bars in axes.containers]


def test_every_point_is_the_mean_over_seeds_at_its_m_and_radius(frame):
    _, full = m_sharpness_points(frame).axes
    rows = frame.query("measure == 'm_sharpness' and quantity == 'loss_rise' and space == 'full'")
    assert len(points(full)) == len(METHODS)
    for method, drawn in zip(METHODS, points(full), strict=True):
        mine = rows[rows["method"] == method].assign(m=lambda r: r["kind"].str[2:].astype(int))
        np.testing.assert_allclose(drawn[:, 1], mine.groupby(["m", "radius"])["value"].mean())


def test_no_line_joins_two_values(frame):
    for axes in m_sharpness_points(frame).axes:
        assert {bars.lines[0].get_linestyle() for bars in axes.containers} == {"None"}


def test_blocks_of_different_m_do_not_meet_and_are_named(frame):
    _, full = m_sharpness_points(frame).axes
    assert [t.get_text() for t in full.texts if t.get_gid() == BLOCK] == ["m = 8", "m = 32", "m = 128"]
    assert [t.get_text() for t in full.get_xticklabels()] == [f"{radius:g}" for radius in RADII[:3]] * 3
    walls = sorted(
        line.get_xdata()[0] for line in full.lines if np.ptp(line.get_xdata()) == 0 and len(line.get_xdata()) == 2
    )
    assert len(walls) == 2
    for drawn in points(full):
        inside = np.digitize(drawn[:, 0], walls)
        assert inside.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    every = np.concatenate([drawn[:, 0] for drawn in points(full)])
    assert len(np.unique(every.round(6))) == len(every), "methods stand side by side"


def test_with_one_seed_the_whiskers_are_over_groups(frame):
    one = frame[(frame["seed"] == 0) & (frame["method"] == "LoRA") & (frame["space"].isin(["full", ""]))]
    table = m_sharpness_table(one).query("m == 32 and radius == 0.1")
    row = one.query("kind == 'm=32' and radius == 0.1 and quantity == 'loss_rise'")
    assert table["over"].item() == GROUPS
    assert table["half_width"].item() == pytest.approx(stats.t.ppf(0.975, 7) * row["standard_error"].item())
    assert table["high"].item() == pytest.approx(row["value"].item() + table["half_width"].item())
    figure = m_sharpness_points(one)
    assert figure.get_figwidth() == COLUMN
    assert "over 2–32 groups of one training seed" in words(figure)
    assert "after one gradient step" in words(figure)
    assert "over 3 training seeds" in words(m_sharpness_points(frame))


def test_scalings_have_rows_of_their_own_and_longer_searches_are_lower_bounds(frame):
    rows = frame[frame["measure"] == "m_sharpness"].copy()
    rows.loc[rows["quantity"] == "steps", "value"] = 5
    both = pd.concat([rows, rows.assign(kind=rows["kind"] + " elementwise")])
    figure = m_sharpness_points(both)
    assert len(figure.axes) == 4
    assert {"isotropic", "elementwise"} == set(m_sharpness_table(both)["scaling"])
    assert "relative to |w|" in figure.axes[0].get_xlabel()
    assert "a lower bound of its worst case" in words(figure)


def test_a_rise_that_is_not_finite_is_marked_in_its_block(frame):
    broken = frame.copy()
    hit = broken.query(
        "kind == 'm=8' and radius == 0.2 and quantity == 'loss_rise' and space == 'full' and method == 'LoRA'"
    )
    broken.loc[hit.index, "value"] = np.inf
    _, full = m_sharpness_points(broken).axes
    (marks,) = [line for line in full.lines if line.get_label() == NON_FINITE]
    expected = points(m_sharpness_points(frame).axes[1])[METHODS.index("LoRA")][2, 0]
    np.testing.assert_allclose(marks.get_xdata(), [expected])


def test_what_was_not_measured_is_named(frame):
    with pytest.raises(NothingToDraw, match="no loss_rise rows of measure m_sharpness"):
        m_sharpness_points(frame[frame["measure"] == "quality"])
