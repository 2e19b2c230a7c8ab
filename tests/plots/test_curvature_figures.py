"""Figures of curvature: densities, eigenvalue ladders and layers, against closed forms and the rows drawn."""

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize, SymLogNorm
from matplotlib.figure import Figure
from scipy import stats

from analysis.layer_names import NO_NUMBER, split_layer
from analysis.plots import density_curves, eigenvalue_bars, eigenvalue_ladder, layer_heatmap
from analysis.plots.canvas import NothingToDraw
from analysis.plots.density import density_table
from analysis.plots.eigenvalues import UNCONVERGED, curvature_name, decade_labels, decade_ticks
from analysis.plots.layers import DOUBTFUL, layer_table
from tests.plausible_rows import COLUMNS, METHODS, plausible_rows

EIGHT = [*METHODS, "Bi-LoRA, no clipping", "GSAM", "SL-SAM"]
BERT = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
BERT += ["intermediate.dense", "output.dense"]


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    return plausible_rows()


def words(figure: Figure) -> str:
    return " ".join(figure.get_supxlabel().split())


def density_rows(at, values, *, seed=0, method="LoRA", error=np.nan) -> list[dict[str, object]]:
    fixed = {**COLUMNS, "method": method, "seed": seed, "measure": "density", "space": "full", "quantity": "density"}
    return [
        {**fixed, "index": index, "radius": radius, "value": value, "standard_error": error * value}
        for index, (radius, value) in enumerate(zip(at, values, strict=True))
    ]


def eigenvalue_rows(values, *, seed=0, residual=1e-3, kind="", method="LoRA") -> list[dict[str, object]]:
    fixed = {**COLUMNS, "method": method, "seed": seed, "measure": "spectrum", "space": "full", "kind": kind}
    return [
        {**fixed, "quantity": "eigenvalue", "index": rank, "value": value, "residual": residual}
        for rank, value in enumerate(values, start=1)
    ]


def layer_rows(values, *, seed=0, method="LoRA", quantity="eigenvalue", converged=(), error=np.nan, space="full"):
    fixed = {**COLUMNS, "method": method, "seed": seed, "measure": "layers", "space": space}
    index = 1 if quantity == "eigenvalue" else -1
    rows = []
    for layer, value in values.items():
        place = {**fixed, "layer": layer, "index": index}
        rows.append({**place, "quantity": quantity, "value": value, "residual": 1e-3, "standard_error": error})
        if quantity == "eigenvalue":
            rows.append({**place, "quantity": "converged", "value": float(layer not in converged)})
    return rows


def bert_layers(depth: int) -> list[str]:
    return [f"bert.encoder.layer.{number}.{block}" for number in range(depth) for block in BERT]


def test_the_mean_density_is_the_mean_of_the_seeds_wherever_their_grids_lie():
    # Laplace densities: the logarithm is linear between the grid points, so that interpolation is exact.
    wide, narrow = np.array([-8.0, -3.3, 0.0, 1.7, 8.0]), np.array([-4.0, 0.0, 0.4, 4.0])
    rows = density_rows(wide, 0.5 * np.exp(-abs(wide)))
    rows += density_rows(narrow, np.exp(-2 * abs(narrow)), seed=1)
    table = density_table(pd.DataFrame(rows))
    at = table["radius"].to_numpy()
    second = np.where(abs(at) <= 4, np.exp(-2 * abs(at)), 0)
    both = np.stack([0.5 * np.exp(-abs(at)), second])
    np.testing.assert_allclose(table["mean"], both.mean(axis=0), rtol=1e-9)
    relative = stats.t.ppf(0.975, 1) * both.std(axis=0, ddof=1) / np.sqrt(2) / both.mean(axis=0)
    np.testing.assert_allclose(table["high"], both.mean(axis=0) * np.exp(relative), rtol=1e-9)
    np.testing.assert_allclose(table["low"], both.mean(axis=0) * np.exp(-relative), rtol=1e-9)
    assert set(table["band"]) == {"seeds"}
    assert at.min() == pytest.approx(-8)
    assert at.max() == pytest.approx(8)


def test_no_seeds_peak_falls_between_the_points():
    peaks = (613.7, 614.9, 700.2)
    rows = []
    for seed, peak in enumerate(peaks):
        at = np.sort([-1.0, -0.01, 0.0, 0.01, 1.0, peak - 1e-3, peak, peak + 1e-3, 800.0])
        rows += density_rows(at, np.where(at == peak, 5.0, np.where(abs(at) < 0.1, 9.0, 1e-6)), seed=seed)
    table = density_table(pd.DataFrame(rows)).set_index("radius")["mean"]
    for peak in peaks:
        assert table[peak] == pytest.approx((5.0 + 2e-6) / 3)


def test_the_mean_of_densities_has_the_area_of_one():
    rows = []
    for seed, centre in enumerate((0.0, 0.5, 2.0)):
        at = np.linspace(-8, 9, 2001 + 10 * seed)
        rows += density_rows(at, np.exp(-0.5 * (at - centre) ** 2) / np.sqrt(2 * np.pi), seed=seed)
    table = density_table(pd.DataFrame(rows))
    assert np.trapezoid(table["mean"], table["radius"]) == pytest.approx(1, abs=1e-3)


def test_one_seed_shows_the_measures_own_error_and_says_so():
    at = np.linspace(-2, 2, 41)
    frame = pd.DataFrame(density_rows(at, np.exp(-(at**2)), error=0.25))
    table = density_table(frame)
    assert set(table["band"]) == {"runs"}
    inside = table[table["radius"].isin(at)]
    assert len(inside) > 0
    np.testing.assert_allclose(inside["high"], inside["mean"] * np.exp(0.25), rtol=1e-12)
    assert "one standard error over the measure's own runs" in words(density_curves(frame))
    assert "t-interval" not in words(density_curves(frame))
    bare = density_curves(frame.assign(standard_error=np.nan))
    assert "no band can be drawn" in words(bare)


def test_the_caption_tells_seeds_from_runs_where_both_are_drawn():
    at = np.linspace(-2, 2, 41)
    rows = [row for seed in range(2) for row in density_rows(at, (1 + seed) * np.exp(-(at**2)), seed=seed)]
    rows += density_rows(at, np.exp(-(at**2)), method="Bi-LoRA", error=0.1)
    said = words(density_curves(pd.DataFrame(rows)))
    assert "95 % t-interval over 2 training seeds" in said
    assert "Band of Bi-LoRA, one seed: one standard error" in said


def test_density_panels_stand_side_by_side_with_a_line_for_each_method(frame):
    figure = density_curves(frame)
    lora, full = figure.axes
    assert [a.get_title() for a in (lora, full)] == ["LoRA space (A, B as trained)", "full space (merged W)"]
    assert {a.get_xscale() for a in (lora, full)} == {"symlog"}
    assert {a.get_yscale() for a in (lora, full)} == {"log"}
    assert len([line for line in full.lines if len(line.get_xdata())]) == len(METHODS)
    assert "95 % t-interval over 3 training seeds" in words(figure)


def test_a_single_eigenvalue_is_seen_and_rounding_is_not():
    at = np.linspace(-20, 20, 4001)
    bulk = np.exp(-0.5 * (at / 0.3) ** 2)
    alone = 1e-8 * np.exp(-0.5 * ((at - 15) / 0.1) ** 2)
    rounding = 1e-17 * np.exp(-0.5 * ((at + 18) / 0.1) ** 2)
    (axes,) = density_curves(pd.DataFrame(density_rows(at, bulk + alone + rounding))).axes
    assert 1e-13 < axes.get_ylim()[0] < 1e-8
    low, high = axes.get_xlim()
    assert high > 15
    assert -18 < low < -0.5


def test_densities_that_are_not_finite_are_left_out_and_counted():
    at = np.linspace(-2, 2, 41)
    values = np.exp(-(at**2))
    values[5] = np.nan
    frame = pd.DataFrame(density_rows(at, values))
    assert set(density_table(frame)["n_non_finite"]) == {1}
    assert np.isfinite(density_table(frame)["mean"]).all()
    assert "1 values are not finite" in words(density_curves(frame))
    with pytest.raises(NothingToDraw, match="no finite density"):
        density_table(frame.assign(value=np.nan))


def test_a_dot_is_an_eigenvalue_and_its_whisker_the_residual():
    frame = pd.DataFrame([*eigenvalue_rows([9.0, -4.0], residual=0.1), *eigenvalue_rows([7.0, -2.0], seed=1)])
    (axes,) = eigenvalue_ladder(frame).axes
    dots = sorted(y for line in axes.lines if line.get_label() == "_seed" for y in line.get_ydata())
    assert dots == [-4.0, -2.0, 7.0, 9.0]
    whiskers, rungs = [], []
    for lines in axes.collections:
        for (x0, y0), (x1, y1) in lines.get_segments():
            (whiskers if x0 == x1 else rungs).append((y0, y1))
    expected = [(-4.4, -3.6), (-2.002, -1.998), (6.993, 7.007), (8.1, 9.9)]
    np.testing.assert_allclose(sorted(whiskers), expected, rtol=1e-12)
    assert sorted(rungs) == [(-3.0, -3.0), (8.0, 8.0)]


def test_a_rank_of_differing_sign_has_no_rung():
    frame = pd.DataFrame([*eigenvalue_rows([9.0, -4.0]), *eigenvalue_rows([7.0, 3.9], seed=1)])
    (axes,) = eigenvalue_ladder(frame).axes
    rungs = [s[0, 1] for lines in axes.collections for s in lines.get_segments() if s[0, 0] != s[1, 0]]
    assert rungs == [8.0]


def test_the_ladder_crosses_what_has_not_converged():
    figure = eigenvalue_ladder(pd.DataFrame([*eigenvalue_rows([9.0]), *eigenvalue_rows([8.0], seed=1, residual=0.3)]))
    crosses = [y for line in figure.axes[0].lines if line.get_label() == UNCONVERGED for y in line.get_ydata()]
    assert crosses == [8.0]
    assert "1 eigenvalues not converged, relative residual up to 0.3" in words(figure)


def test_eigenvalues_over_decades_stand_on_a_symmetric_log_axis():
    assert eigenvalue_ladder(pd.DataFrame(eigenvalue_rows([9.0, 5.0, -2.0]))).axes[0].get_yscale() == "linear"
    (axes,) = eigenvalue_ladder(pd.DataFrame(eigenvalue_rows([900.0, 5.0, -0.02]))).axes
    assert axes.get_yscale() == "symlog"
    low, high = axes.get_ylim()
    assert low < -0.02
    assert high > 900


def test_both_ends_of_a_spectrum_and_gauss_newton_are_named():
    figure = eigenvalue_ladder(pd.DataFrame(eigenvalue_rows([9.0, -4.0], kind="both")))
    assert "both ends" in figure.axes[0].get_xlabel()
    under = [curvature_name(kind) for kind in ("bfloat16 autocast", "ggn float16 autocast", "bfloat16 autocast both")]
    assert under == ["Hessian under bfloat16", "Gauss–Newton under float16", "Hessian under bfloat16"]
    assert [curvature_name(kind) for kind in ("", "both", "ggn", "central differences")] == [
        "Hessian", "Hessian", "Gauss–Newton", "Hessian by differences"
    ]  # fmt: skip


@pytest.mark.parametrize("draw", [eigenvalue_ladder, eigenvalue_bars])
@pytest.mark.parametrize(
    ("kind", "on_y", "on_x"),
    [
        ("", "Hessian eigenvalue λ", "(by magnitude)"),
        ("ggn smallest", "Gauss–Newton eigenvalue λ", "(smallest)"),
        ("bfloat16 autocast", "Hessian under bfloat16 eigenvalue λ", "(by magnitude, bfloat16 autocast)"),
        ("one-sided differences both", "Hessian by differences eigenvalue λ", "(both ends, one-sided differences)"),
    ],
)
def test_axes_say_what_the_eigenvalues_are_of_and_how_they_are_ranked(draw, kind, on_y, on_x):
    rows = pd.DataFrame(eigenvalue_rows([9.0, -4.0], kind=kind))
    figure = draw(pd.concat([rows, rows.assign(space="lora")], ignore_index=True))
    left, right = figure.axes
    assert left.get_ylabel().startswith(on_y)
    assert left.get_xlabel().endswith(on_x)
    figure.draw_without_rendering()
    boxes = [axes.xaxis.label.get_window_extent() for axes in (left, right)]
    assert boxes[0].x1 < boxes[1].x0
    assert boxes[1].x1 <= figure.bbox.x1


def test_products_under_autocast_are_named_by_every_figure():
    kind = "bfloat16 autocast"
    density = pd.DataFrame(density_rows(np.linspace(-1, 1, 5), np.ones(5))).assign(kind=kind)
    assert density_curves(density).axes[0].get_xlabel() == "Hessian under bfloat16 eigenvalue λ"
    layers = pd.DataFrame(layer_rows(dict.fromkeys(bert_layers(1), 2.0))).assign(kind=kind)
    labels = [axes.get_ylabel() for axes in layer_heatmap(layers).axes]
    assert any("(Hessian under bfloat16" in label for label in labels), labels


def test_ticks_of_a_symmetric_log_axis_are_few_and_signed():
    assert decade_ticks(-15.0, 200.0, 0.1) == pytest.approx([-10, -1, -0.1, 0, 0.1, 1, 10, 100])
    assert decade_ticks(0.02, 200.0, 0.02) == pytest.approx([0.1, 1, 10, 100])
    assert len(decade_ticks(-1e8, 1e8, 1e-8)) <= 9
    assert decade_labels([-10.0, 0.0, 0.1]) == ["−10", "0", "0.1"]
    assert decade_labels([-1e-5, 0.0]) == ["$-10^{-5}$", "0"]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("bert.encoder.layer.0.attention.self.query", ("bert.encoder.layer", 0, "attention.self.query")),
        ("model.layers.31.mlp.gate_proj", ("model.layers", 31, "mlp.gate_proj")),
        ("encoder.block.2.layer.0.SelfAttention.q", ("encoder.block", 2, "layer.0.SelfAttention.q")),
        ("layer1.0.conv1", ("layer1", 0, "conv1")),
        ("2", ("", 2, "")),
        ("bert.pooler.dense", ("", NO_NUMBER, "bert.pooler.dense")),
    ],
)
def test_a_layers_name_is_split_at_its_first_integer(name, parts):
    assert split_layer(name) == parts


def panel(figure: Figure, method: str):
    return next(axes for axes in figure.axes if axes.get_title() == method)


def strokes(figure: Figure) -> list[tuple[int, int]]:
    drawn = [line for axes in figure.axes for line in axes.lines if line.get_label() == DOUBTFUL]
    return sorted((round(np.mean(line.get_xdata())), round(np.mean(line.get_ydata()))) for line in drawn)


def test_a_cell_is_the_mean_over_seeds_at_its_layer_and_block():
    layers = bert_layers(3)
    rows = []
    for seed in range(2):
        for method, factor in (("LoRA", 1.0), ("Bi-LoRA", 0.5)):
            values = {layer: factor * (1 + at + seed) for at, layer in enumerate(layers)}
            rows += layer_rows(values, seed=seed, method=method)
    figure = layer_heatmap(pd.DataFrame(rows))
    mean = 1.5 + np.arange(18.0).reshape(3, 6)
    for method, factor in (("LoRA", 1.0), ("Bi-LoRA", 0.5)):
        np.testing.assert_allclose(panel(figure, method).images[0].get_array(), factor * mean)
    assert panel(figure, "LoRA").images[0].norm is panel(figure, "Bi-LoRA").images[0].norm
    labels = [tick.get_text().replace("\n", " ") for tick in panel(figure, "LoRA").get_xticklabels()]
    assert labels == ["query", "key", "value", "attention output", "intermediate", "output"]
    assert [tick.get_text() for tick in panel(figure, "LoRA").get_yticklabels()] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("values", "scale", "diverging"),
    [
        ([1.0, 2.0, 3.0], Normalize, False),
        ([0.01, 2.0, 300.0], LogNorm, False),
        ([0.0, 0.01, 300.0], SymLogNorm, False),
        ([-1.0, 2.0, 3.0], Normalize, True),
        ([-0.01, 2.0, 300.0], SymLogNorm, True),
    ],
)
def test_the_colour_scale_follows_decades_and_signs(values, scale, diverging):
    layers = dict(zip(bert_layers(1)[:3], values, strict=True))
    figure = layer_heatmap(pd.DataFrame(layer_rows(layers)))
    image = panel(figure, "LoRA").images[0]
    assert type(image.norm) is scale
    assert (image.cmap.name == "RdBu_r") is diverging
    if diverging:
        assert image.norm(0.0) == pytest.approx(0.5)
        assert "Negative values are blue and carry a minus sign" in words(figure)


def test_a_negative_value_carries_its_sign_in_large_cells_and_small():
    few = layer_heatmap(pd.DataFrame(layer_rows({"layer.0.a": -2.0, "layer.0.b": 3.0})))
    assert "−2.0" in [text.get_text() for text in panel(few, "LoRA").texts]
    names = bert_layers(30)
    values = {layer: -2.0 if at == 8 else 3.0 for at, layer in enumerate(names)}
    many = pd.DataFrame([row for method in EIGHT for row in layer_rows(values, method=method)])
    axes = panel(layer_heatmap(many), "LoRA")
    assert not axes.texts
    assert [(np.mean(line.get_xdata()), np.mean(line.get_ydata())) for line in axes.lines] == [(2.0, 1.0)]


def test_a_stroke_marks_what_has_not_converged_or_changes_sign():
    a, b, c = "layer.0.a", "layer.0.b", "layer.1.a"
    rows = layer_rows({a: 1.0, b: 2.0, c: 3.0}, converged=(b,)) + layer_rows({a: 1.0, b: 2.0, c: -3.1}, seed=1)
    figure = layer_heatmap(pd.DataFrame(rows))
    assert strokes(figure) == [(0, 1), (1, 0)]
    assert "not converged, or seeds differ in sign (2 cells)" in words(figure)
    unsaid = pd.DataFrame(rows).query("quantity == 'eigenvalue'").assign(residual=1e-3)
    unsaid.loc[unsaid["layer"] == a, "residual"] = 0.5
    assert strokes(layer_heatmap(unsaid)) == [(0, 0), (0, 1)]


def test_a_trace_within_two_standard_errors_of_zero_is_marked():
    # Two seeds: the standard error of the mean is that of one over √2.
    rows = []
    for seed in range(2):
        rows += layer_rows({"layer.0.a": 1.42, "layer.0.b": 1.41}, seed=seed, quantity="trace", error=np.sqrt(0.5))
    table = layer_table(pd.DataFrame(rows), "trace").set_index("block")
    assert not table.loc["a", "doubtful"]
    assert not table.loc["b", "doubtful"]
    wider = pd.DataFrame(rows).assign(standard_error=1.0)
    table = layer_table(wider, "trace").set_index("block")
    assert not table.loc["a", "doubtful"]
    assert table.loc["b", "doubtful"]
    assert "0 lies within two standard errors over probes (1 cells)" in words(layer_heatmap(wider, "trace"))


def test_layers_without_a_number_form_a_row_of_their_own():
    values = {**dict.fromkeys(bert_layers(2), 1.0), "bert.pooler.dense": 5.0}
    figure = layer_heatmap(pd.DataFrame(layer_rows(values)))
    shown = panel(figure, "LoRA").images[0].get_array()
    assert shown.shape == (3, 7)
    assert shown[2, 6] == 5.0
    assert np.isnan(np.ma.filled(shown, np.nan)[2, :6]).all()
    assert [t.get_text() for t in panel(figure, "LoRA").get_yticklabels()] == ["0", "1", "no number"]
    assert panel(figure, "LoRA").get_xticklabels()[6].get_text() == "pooler.dense"
    assert "Grey: no such layer" in words(figure)


def test_layers_of_two_stacks_do_not_hide_one_another():
    values = {f"model.{stack}.layers.{n}.fc": n + 1.0 for stack in ("encoder", "decoder") for n in range(2)}
    axes = panel(layer_heatmap(pd.DataFrame(layer_rows(values))), "LoRA")
    np.testing.assert_array_equal(axes.images[0].get_array(), [[1], [2], [1], [2]])
    assert [t.get_text() for t in axes.get_yticklabels()] == ["encoder 0", "encoder 1", "decoder 0", "decoder 1"]


def test_the_method_with_most_layers_gives_the_order_of_the_blocks():
    few = [layer for layer in bert_layers(1) if layer.endswith(("query", "value"))]
    rows = layer_rows(dict.fromkeys(few, 1.0)) + layer_rows(dict.fromkeys(bert_layers(1), 1.0), method="Bi-LoRA")
    labels = panel(layer_heatmap(pd.DataFrame(rows)), "Bi-LoRA").get_xticklabels()
    assert [t.get_text() for t in labels][:3] == ["query", "key", "value"]


@pytest.mark.parametrize(("methods", "depth"), [(1, 2), (3, 12), (8, 31)])
def test_heat_maps_of_small_and_large_studies_have_no_overlapping_words(methods, depth):
    rng = np.random.default_rng(0)
    rows = []
    for method in EIGHT[:methods]:
        for space in ("lora", "full"):
            values = {layer: 10 ** rng.uniform(-2, 2) for layer in [*bert_layers(depth), "bert.pooler.dense"]}
            rows += layer_rows(values, method=method, space=space)
    assert_no_overlap(layer_heatmap(pd.DataFrame(rows)))


@pytest.mark.parametrize("draw", [density_curves, eigenvalue_ladder])
@pytest.mark.parametrize("methods", [1, 3, 8])
def test_curvature_figures_of_few_and_many_methods_have_no_overlapping_words(draw, methods):
    assert_no_overlap(draw(plausible_rows(EIGHT[:methods] if methods > 1 else ["LoRA"])))


def assert_no_overlap(figure: Figure) -> None:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = []
    for text in figure.findobj(mpl.text.Text):
        box = text.get_window_extent(canvas.get_renderer())
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        if text.get_visible() and text.get_text().strip() and box.width > 0 and _is_drawn(text, figure):
            assert inside, text.get_text()
            boxes.append((text.get_text(), box))
    for at, (one, first) in enumerate(boxes):
        for other, second in boxes[at + 1 :]:
            wide = min(first.x1, second.x1) - max(first.x0, second.x0)
            high = min(first.y1, second.y1) - max(first.y0, second.y0)
            assert wide <= 1 or high <= 1, f"{one!r} lies over {other!r}"


def _is_drawn(text, figure: Figure) -> bool:
    """Tick labels exist beyond the limits and on hidden sides as well."""
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if text in (tick.label1, tick.label2):
                    low, high = sorted(axis.get_view_interval())
                    return axes.get_visible() and low <= tick.get_loc() <= high
        if text in (axes.title, axes.xaxis.label, axes.yaxis.label):
            return axes.get_visible()
    return True


def test_curvature_that_was_not_measured_is_one_clear_line(frame):
    quality = frame[frame["measure"] == "quality"]
    for draw in (density_curves, eigenvalue_ladder, layer_heatmap):
        with pytest.raises(NothingToDraw, match="to draw: add") as caught:
            draw(quality)
        assert "\n" not in str(caught.value)
