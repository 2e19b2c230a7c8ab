"""Every figure drawn from rows: what is in it, what lies beside it, and nothing lost on the way."""

import hashlib
import json
from functools import partial

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import stats

from analysis.plots import (
    FIGURES,
    FILES,
    connectivity_curves,
    draw_all,
    eigenvalue_bars,
    landscape_lines,
    outside_share_bars,
    overlap_heatmap,
    perturbation_curves,
    surface_contours,
    worst_case_curves,
)
from analysis.plots.canvas import NON_FINITE
from analysis.plots.eigenvalues import UNCONVERGED, eigenvalue_table
from analysis.plots.perturbation import perturbation_table
from analysis.plots.save import describe
from analysis.plots.spread import DIRECTIONS, EXAMPLES, SEEDS
from analysis.plots.style import styles_for
from bilora.errors import UserError
from tests.plausible_rows import COLUMNS, METHODS, plausible_rows


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    return plausible_rows()


def words(figure: Figure) -> str:
    return " ".join(figure.get_supxlabel().split())


def legend_labels(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_every_figure_is_saved_with_its_data_and_what_made_it(frame, tmp_path):
    paths = draw_all(frame, tmp_path / "figures", {"study": "invented"})
    assert {p.name for p in paths} == {p.name for p in (tmp_path / "figures").iterdir()}
    assert len(paths) == 6 * len(FIGURES) + len(FILES) + 3
    for family in FIGURES:
        stem = tmp_path / "figures" / family.name
        assert stem.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        assert stem.with_suffix(".png").stat().st_size < 200_000
        assert stem.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
        assert "<svg" in stem.with_suffix(".svg").read_text()
        data = pd.read_csv(stem.with_suffix(".csv"))
        made_by = json.loads(stem.with_suffix(".json").read_text())
        assert made_by["study"] == "invented"
        spaces = data["space"].dropna().unique() if "space" in data else []
        assert made_by["gauge"] == {space: "as trained" if space == "lora" else "none" for space in spaces}
        kept = pd.read_parquet(stem.with_suffix(".parquet"))
        pd.testing.assert_frame_equal(kept, family.table(frame).reset_index(drop=True), check_dtype=False)
        assert made_by["csv_sha256"] == hashlib.sha256(stem.with_suffix(".csv").read_bytes()).hexdigest()
        assert made_by["methods"] == sorted(data["method"].unique())
        assert {"python", "matplotlib", "pandas"} <= set(made_by["versions"])


def test_the_gauge_is_that_of_each_space(frame):
    rows = frame.query("measure == 'random'")
    balanced = rows[rows["space"] == "lora"].assign(space="lora_balanced")
    assert describe(pd.concat([rows, balanced]))["gauge"] == {
        "full": "none", "lora": "as trained", "lora_balanced": "balanced by the SVD of B·A"
    }  # fmt: skip
    assert describe(frame.query("measure == 'quality'"))["gauge"] == {}


def test_a_figure_names_the_seeds_of_its_directions(frame, tmp_path):
    rows = frame.query("measure in ['random', 'spectrum']").assign(direction_seed=-1)
    rows.loc[(rows["measure"] == "random") & (rows["quantity"] == "loss_rise"), "direction_seed"] = rows["seed"] + 7
    draw_all(rows, tmp_path, {}, only=["random", "eigenvalues"])
    read = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("random", "eigenvalues")}
    assert read["random"]["direction_seeds"] == [7, 8, 9]
    assert read["eigenvalues"]["direction_seeds"] == []
    assert read["random"]["seeds"] == [0, 1, 2]


def test_drawing_the_same_rows_again_changes_no_byte(frame, tmp_path):
    only = frame[frame["measure"] == "spectrum"]
    first, second = (draw_all(only, tmp_path / name, {}) for name in ("a", "b"))
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name


def test_pdf_text_is_embedded_as_truetype(frame, tmp_path):
    paths = draw_all(frame[frame["measure"] == "spectrum"], tmp_path, {})
    pdf = next(p for p in paths if p.suffix == ".pdf").read_bytes()
    assert b"/Type /Font" in pdf
    assert b"/Type3" not in pdf


def test_drawing_leaves_the_callers_settings_alone(frame):
    before = dict(mpl.rcParams)
    landscape_lines(frame)
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize("family", FIGURES, ids=lambda family: family.name)
def test_text_is_readable_and_lies_inside_the_figure(frame, family):
    figure = family.draw(frame)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    texts = [t for t in figure.findobj(mpl.text.Text) if t.get_text().strip() and t.get_visible()]
    assert min(t.get_fontsize() for t in texts) >= 7
    for text in texts:
        box = text.get_window_extent(renderer)
        if any(text in (*axis.get_ticklabels(which="both"),) for a in figure.axes for axis in (a.xaxis, a.yaxis)):
            continue  # ticks beyond the limits exist but are not drawn
        assert box.x0 >= 0, text.get_text()
        assert box.x1 <= figure.bbox.x1, text.get_text()
        assert box.y0 >= 0, text.get_text()
        assert box.y1 <= figure.bbox.y1, text.get_text()


def test_landscape_draws_the_mean_and_the_band_of_the_summary(frame):
    figure = landscape_lines(frame)
    lora, full = figure.axes
    assert [a.get_title() for a in (lora, full)] == ["LoRA space (A, B as trained)", "full space (merged W)"]
    assert lora.get_ylim() == full.get_ylim()
    assert len(lora.lines) == len(METHODS)
    rows = frame.query("measure == 'landscape' and space == 'full' and method == 'Bi-LoRA'")
    by_seed = rows.pivot_table(index="radius", columns="seed", values="value").to_numpy()
    line = full.lines[list(styles_for(METHODS)).index("Bi-LoRA")]
    np.testing.assert_allclose(line.get_ydata(), (by_seed - by_seed[10]).mean(axis=1), atol=1e-12)
    absolute = landscape_lines(frame, rise=False).axes[1].lines[list(styles_for(METHODS)).index("Bi-LoRA")]
    np.testing.assert_allclose(absolute.get_ydata(), by_seed.mean(axis=1))
    assert "95 % t-interval of the mean over 3 training seeds" in words(figure)
    assert "5 random directions" in words(figure)


def test_one_seed_has_the_band_of_its_directions():
    rows = plausible_rows(methods=["LoRA"], seeds=1, directions=4).query("measure == 'landscape' and space == 'full'")
    figure = landscape_lines(rows)
    by_line = rows.pivot(index="radius", columns="index", values="value").to_numpy()
    rise = by_line - by_line[10]
    half = stats.t.ppf(0.975, 3) * stats.sem(rise, axis=1)
    (band,) = figure.axes[0].collections
    corners = band.get_paths()[0].vertices
    for alpha, mean, reach in zip(sorted(rows["radius"].unique()), rise.mean(axis=1), half, strict=True):
        heights = corners[np.isclose(corners[:, 0], alpha), 1]
        np.testing.assert_allclose([heights.min(), heights.max()], [mean - reach, mean + reach], atol=1e-12)
    assert "Line: mean over 4 random directions." in words(figure)
    assert "95 % t-interval of the mean over 4 random directions of one training seed" in words(figure)
    noise = perturbation_curves(plausible_rows(methods=["LoRA"], seeds=1, directions=4))
    assert "Whiskers: 95 % t-interval of the mean over 4 random directions" in words(noise)


def test_a_band_over_directions_leaves_out_what_is_not_finite_and_a_lone_direction_has_none():
    rows = plausible_rows(methods=["LoRA"], seeds=1, directions=3).query("measure == 'random' and space == 'full'")
    rises = rows.query("quantity == 'loss_rise' and kind == 'filter' and radius == 0.5")["value"]
    broken = rows.copy()
    broken.loc[rises.index[0], "value"] = np.inf
    table = perturbation_table(broken).query("kind == 'filter' and radius == 0.5")
    assert table["half_width"].item() == pytest.approx(stats.t.ppf(0.975, 1) * stats.sem(rises.iloc[1:]))
    assert table["over"].item() == DIRECTIONS
    alone = perturbation_table(rows[rows["index"] < 1])
    assert alone["half_width"].isna().all()
    assert set(alone["over"]) == {""}
    assert "One seed: no whiskers" in words(perturbation_curves(rows[rows["index"] < 1]))


def test_one_seed_and_one_perturbation_have_whiskers_over_examples(frame):
    rows = frame.query("measure in ['adversarial', 'worst_case'] and seed == 0 and quantity == 'loss_rise'")
    rows = rows.assign(standard_error=0.1 * rows["value"])
    table = perturbation_table(rows, "adversarial")
    assert set(table["over"]) == {EXAMPLES}
    np.testing.assert_allclose(table["high"] - table["mean"], 0.1 * stats.norm.ppf(0.975) * table["mean"])
    for figure in (perturbation_curves(rows, "adversarial"), worst_case_curves(rows)):
        assert "over examples, at one perturbation of one training seed" in words(figure)
    several = frame.query("measure == 'adversarial'").assign(standard_error=1.0)
    assert set(perturbation_table(several, "adversarial")["over"]) == {SEEDS}, "seeds come first"


def test_rows_of_older_tables_are_drawn(frame):
    old = frame.query("measure == 'random'").drop(columns=["label", "y", "standard_error"])
    new = perturbation_table(frame)
    pd.testing.assert_frame_equal(perturbation_table(old)[["mean", "low", "over"]], new[["mean", "low", "over"]])


def test_bands_over_seeds_and_over_directions_are_both_explained(frame):
    some = frame[(frame["method"] != "LoRA") | (frame["seed"] == 0)]
    said = words(landscape_lines(some))
    assert "over 3 training seeds (few: intervals are wide), or 95 % t-interval" in said
    assert "over 5 random directions of one training seed, which says nothing of other seeds" in said


def test_a_loss_that_is_not_finite_is_marked_at_the_top_edge(frame):
    broken = frame.copy()
    hit = broken.query("measure == 'landscape' and space == 'full' and method == 'LoRA' and radius == 1.0").index[:2]
    broken.loc[hit, "value"] = np.inf
    figure = landscape_lines(broken)
    marks = [line for axes in figure.axes for line in axes.lines if line.get_label() == NON_FINITE]
    assert len(marks) == 1
    np.testing.assert_array_equal(marks[0].get_xdata(), [1.0])
    assert marks[0].get_ydata()[0] > 0.8
    assert "2 losses there are not finite" in words(figure)


def test_a_method_without_any_finite_loss_is_still_marked(frame):
    broken = frame.query("measure == 'random'").copy()
    broken.loc[broken["method"] == "LoRA", "value"] = np.nan
    figure = perturbation_curves(broken)
    marks = [line for axes in figure.axes for line in axes.lines if line.get_label() == NON_FINITE]
    assert len(marks) == 4


def test_a_notebook_shows_the_figure_without_pyplot(frame):
    assert overlap_heatmap(frame)._repr_png_().startswith(b"\x89PNG")


def test_curves_over_the_induced_norm_share_their_axis(frame):
    figure = perturbation_curves(frame, x="induced_norm")
    top = figure.axes[:2]
    assert top[0].get_xlim() == top[1].get_xlim()
    assert top[0].get_ylim() == top[1].get_ylim()
    assert "compared across" in words(figure)


def test_small_and_large_rises_are_told_apart_on_a_log_axis(frame):
    assert {axes.get_yscale() for axes in perturbation_curves(frame).axes} == {"log"}
    negative = frame.copy()
    negative.loc[(negative["measure"] == "random") & (negative["radius"] == 0.05), "value"] *= -1
    assert {axes.get_yscale() for axes in perturbation_curves(negative).axes} == {"linear"}


def test_accuracy_under_attack_starts_at_radius_zero(frame):
    figure = perturbation_curves(frame, "adversarial", quantity="accuracy")
    assert figure.axes[0].get_xlim()[0] < 0.01


def test_an_eigenvalue_that_has_not_converged_is_crossed(frame):
    broken = frame.copy()
    hit = broken.query("quantity == 'eigenvalue' and method == 'LoRA' and space == 'full' and index == 3").index[:1]
    broken.loc[hit, "residual"] = 0.2
    figure = eigenvalue_bars(broken)
    crosses = [line for axes in figure.axes for line in axes.lines if line.get_label() == UNCONVERGED]
    assert sum(len(line.get_xdata()) for line in crosses) == 1
    assert "1 eigenvalues not converged, relative residual up to 0.2" in words(figure)


def test_the_solvers_word_on_convergence_counts(frame):
    spectrum = frame.query("quantity == 'eigenvalue' and method == 'LoRA'")
    said = spectrum.assign(quantity="converged", value=(spectrum["index"] != 2).astype(float), residual=np.nan)
    table = eigenvalue_table(pd.concat([spectrum, said]))
    assert (table["converged"] == (table["index"] != 2)).all()


def test_bars_are_means_and_dots_are_seeds(frame):
    figure = eigenvalue_bars(frame)
    full = figure.axes[1]
    rows = frame.query("quantity == 'eigenvalue' and space == 'full'")
    heights = sorted(bar.get_height() for bar in full.patches)
    np.testing.assert_allclose(heights, sorted(rows.groupby(["method", "index"])["value"].mean()))
    dots = [y for line in full.lines if line.get_linestyle() == "None" for y in line.get_ydata()]
    assert set(rows["value"]) <= set(dots)


def test_heat_map_shows_the_mean_overlap_of_every_layer(frame):
    figure = overlap_heatmap(frame)
    columns = figure.axes[0]
    layers = frame.query("quantity == 'overlap' and kind == 'column' and layer == 'encoder.layer.2.intermediate.dense'")
    shown = columns.images[0].get_array()
    row = [t.get_text() for t in columns.get_yticklabels()].index("intermediate.dense")
    assert shown[row, 2] == pytest.approx(layers["value"].mean())
    assert "0.021" in words(figure)


def test_layers_without_block_numbers_still_have_a_cell(frame):
    flat = frame.query("quantity == 'overlap' and layer != ''").copy()
    flat["layer"] = "head"
    flat = flat.drop_duplicates(["seed", "kind"])
    assert overlap_heatmap(flat).axes[0].images[0].get_array().shape == (1, 1)


def test_outside_share_names_chance(frame):
    figure = outside_share_bars(frame)
    assert "random perturbation" in legend_labels(figure)
    assert len(figure.axes[0].collections) == 5


def test_what_was_not_measured_is_one_clear_line(frame, tmp_path):
    quality = frame[frame["measure"] == "quality"]
    for draw in (landscape_lines, perturbation_curves, eigenvalue_bars, overlap_heatmap, outside_share_bars):
        with pytest.raises(UserError, match="to draw") as caught:
            draw(quality)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no figure has rows"):
        draw_all(quality[quality["method"] == "LoRA"], tmp_path, {})


def test_an_interrupted_save_leaves_the_old_file(frame, tmp_path, monkeypatch):
    only = frame[frame["measure"] == "landscape"]
    draw_all(only, tmp_path, {})
    before = (tmp_path / "landscape.png").read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        draw_all(only.iloc[:200], tmp_path, {})
    assert (tmp_path / "landscape.png").read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_figures_say_on_how_many_of_the_examples(frame: pd.DataFrame) -> None:
    """And how far they may be off: a subset is another loss. Nothing is said of a measurement on all examples."""
    fixed = {**COLUMNS, "method": "LoRA", "seed": 0, "space": "full"}
    counts = {"examples": 24.0, "examples_available": 200.0, "subset_error": 0.125}
    drawn = {
        "landscape": landscape_lines,
        "random": perturbation_curves,
        "surface": partial(surface_contours, kind="filter"),
        "connectivity": connectivity_curves,
    }
    for measure, draw in drawn.items():
        where = {**fixed, "measure": measure}
        if measure == "surface":
            split = frame.loc[frame["measure"] == "surface", "split"].iloc[0]
            where |= {"kind": "filter", "split": split}
        rows = [{**where, "quantity": name, "value": value} for name, value in counts.items()]
        assert "examples" not in words(draw(frame)), measure
        said = words(draw(pd.concat([frame, pd.DataFrame(rows)], ignore_index=True)))
        assert "On 24 of 200 examples: beside all of them" in said, measure
        assert "off by up to 0.12 (standard error)" in said, measure
