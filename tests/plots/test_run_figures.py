"""Figures of recorded runs, updates and ascent efficiency: the rows drawn, and nothing without rows."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from analysis.plots import FIGURES, efficiency_bars, interactive_steps, step_curves, update_spectrum
from analysis.plots.canvas import NothingToDraw
from analysis.plots.dynamics import CONVERGENCE, OUTSIDE, PARTS, dynamics_table
from analysis.plots.style import style_of
from analysis.plots.update_spectrum import update_spectrum_table
from tests.plausible_rows import COLUMNS, plausible_rows


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    return plausible_rows()


def words(figure: Figure) -> str:
    return " ".join(figure.get_supxlabel().split())


def steps(quantity, values, *, method="LoRA-SAM", kind="", space="full", seed=0, chance=np.nan):
    fixed = {**COLUMNS, "measure": "dynamics", "method": method, "seed": seed, "space": space, "kind": kind}
    return [{**fixed, "quantity": quantity, "index": i, "value": v, "chance": chance} for i, v in enumerate(values)]


def line_of(axes, method):
    colour = style_of(method).colour
    return next(line for line in axes.lines if line.get_color() == colour)


def test_curves_are_means_over_seeds_at_every_step(frame):
    figure = step_curves(frame, OUTSIDE, 2)
    (axes,) = [a for a in figure.axes if a.get_visible()]  # no loss rise was recorded
    rows = frame[(frame["measure"] == "dynamics") & (frame["quantity"] == "outside_share")]
    for method in ("LoRA-SAM", "Flat-LoRA", "Bi-LoRA"):
        expected = rows[rows["method"] == method].groupby("index")["value"].mean()
        line = line_of(axes, method)
        assert list(line.get_xdata()) == list(expected.index)
        np.testing.assert_allclose(line.get_ydata(), expected)
    dashed = [line for line in axes.lines if line.get_linestyle() == "--" and line.get_color() == "black"]
    np.testing.assert_allclose(dashed[0].get_ydata(), 0.97)
    assert "3 training seeds" in words(figure)
    assert "Dashed black: mean of random perturbations" in words(figure)


def test_panels_without_rows_are_left_out_and_cosines_share_their_axis(frame):
    figure = step_curves(frame, CONVERGENCE, 3)
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in shown] == [panel.title for panel in CONVERGENCE[:3]]
    assert len({axes.get_ylim() for axes in shown}) == 1


def test_zeros_have_no_place_on_a_logarithmic_axis_and_do_not_break_it():
    rows = steps("perturbation_part", [0.0, 1e-3, 1e-1], kind="B_eps_A")
    rows += steps("perturbation_part", [1e-5, 1e-4, 1e-5], kind="eps_B_eps_A")
    figure = step_curves(pd.DataFrame(rows), PARTS, 2)
    first, second = (axes for axes in figure.axes if axes.get_visible())
    assert first.get_yscale() == second.get_yscale() == "log"
    assert first.get_ylim() == second.get_ylim()
    drawn = line_of(first, "LoRA-SAM").get_ydata()
    assert np.isnan(drawn[0])
    np.testing.assert_allclose(drawn[1:], [1e-3, 1e-1])


def test_negative_values_are_drawn():
    """A perturbation that lowers the loss is a finding, whatever the range of the others."""
    rows = steps("loss_rise", [1e-3, 1e-1], space="") + steps("loss_rise", [1e-4, -2e-2], space="", method="Bi-LoRA")
    axes = step_curves(pd.DataFrame(rows), OUTSIDE, 2).axes[0]
    assert axes.get_yscale() == "linear"
    np.testing.assert_allclose(line_of(axes, "Bi-LoRA").get_ydata(), [1e-4, -2e-2])
    low, high = axes.get_ylim()
    assert low < -2e-2 < 1e-1 < high


def test_a_constant_is_drawn():
    figure = step_curves(pd.DataFrame(steps("second_order_ratio", [0.01, 0.01])), PARTS, 2)
    low, high = figure.axes[0].get_ylim()
    assert low < 0.01 < high


def test_nothing_recorded_is_nothing_to_draw(frame):
    rest = frame[frame["measure"] == "random"]
    for draw in (lambda: dynamics_table(rest, OUTSIDE), lambda: update_spectrum(rest), lambda: efficiency_bars(rest)):
        with pytest.raises(NothingToDraw):
            draw()


def test_efficiency_has_a_bar_a_method_and_kind(frame):
    figure = efficiency_bars(frame)
    (axes,) = figure.axes
    rows = frame[(frame["measure"] == "efficiency") & (frame["method"] != "Full FT")]
    heights = sorted(patch.get_height() for patch in axes.patches)
    expected = sorted(rows.groupby(["method", "kind"])["value"].mean())
    np.testing.assert_allclose(heights, expected)
    assert len(heights) == 4 * 5 + 1  # the auxiliary is Bi-LoRA's alone
    assert any(np.allclose(line.get_ydata(), 1) and line.get_linestyle() == "--" for line in axes.lines)
    low, high = axes.get_ylim()
    assert low < 0 < 1 < high
    assert "a lower bound of the maximum" in words(figure)


def test_singular_values_are_medians_over_layers_and_seeds(frame):
    table = update_spectrum_table(frame)
    rows = frame[(frame["measure"] == "update") & (frame["method"] == "LoRA") & (frame["index"] == 3)]
    (line,) = table[(table["method"] == "LoRA") & (table["index"] == 3)].to_dict("records")
    assert line["median"] == rows["value"].median()
    assert line["low"] == rows["value"].quantile(0.25)
    assert (line["layers"], line["n_seeds"]) == (rows["layer"].nunique(), 3)
    assert "3 training seeds" in words(update_spectrum(frame))


def test_the_interactive_curves_hold_the_same_numbers(frame):
    figure = interactive_steps(frame, OUTSIDE)
    rows = frame[(frame["measure"] == "dynamics") & (frame["quantity"] == "outside_share")]
    lines = {trace.name: trace for trace in figure.data if trace.name}
    assert lines.keys() == {"LoRA-SAM", "Flat-LoRA", "Bi-LoRA", "random"}
    for method in ("LoRA-SAM", "Bi-LoRA"):
        expected = rows[rows["method"] == method].groupby("index")["value"].mean()
        np.testing.assert_allclose(lines[method].y, expected)
        assert lines[method].line.color == style_of(method).colour
    assert figure.layout.xaxis.title.text == "optimizer step"


def test_interactive_panels_stand_in_rows_of_three_without_tex(frame):
    figure = interactive_steps(frame, PARTS)
    titles = [annotation.text for annotation in figure.layout.annotations]
    assert titles[0] == "s·B·ε<sub>A</sub>"
    assert not any("$" in text or "\\" in text for text in titles)
    assert interactive_steps(frame, OUTSIDE).layout.yaxis.title.text == "share of ‖ε<sub>W</sub>‖²"
    panels = interactive_steps(frame, CONVERGENCE).layout
    assert {name for name in panels if name.startswith("xaxis")} == {"xaxis", "xaxis2", "xaxis3"}


def test_every_family_of_runs_is_drawn_with_the_others():
    names = {family.name for family in FIGURES}
    assert {"efficiency", "update_spectrum", "outside_share_steps", "convergence", "perturbation_parts"} <= names
