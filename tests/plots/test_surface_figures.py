"""Figures of surfaces, paths and worst cases, against the rows drawn and closed forms."""

import io

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from analysis.plots import connectivity_curves, surface_contours, worst_case_curves
from analysis.plots.canvas import NON_FINITE, NothingToDraw
from analysis.plots.connectivity import BARRIER, connectivity_table
from analysis.plots.mark_labels import PLACED
from analysis.plots.style import COLUMN, PAGE
from analysis.plots.surface import ALONE, FILL, MARKS, NOT_FINITE, NOT_SAMPLED, OPEN
from analysis.plots.surface_data import Scale, scale_for, surface_table, surfaces
from analysis.plots.worst_case import ONE_STEP, worst_case_table
from bilora.errors import UserError
from tests.plausible_rows import COLUMNS, METHODS, plausible_rows


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    rows = plausible_rows(directions=2)
    return rows[rows["measure"].isin(["surface", "connectivity", "worst_case", "quality"])]


def words(figure: Figure) -> str:
    return " ".join(figure.get_supxlabel().split())


def surface_rows(loss, at=(-1.0, -0.5, 0.0, 0.5, 1.0), *, method="LoRA", seed=0, kind="filter", marks=(), worth=None):
    fixed = {**COLUMNS, "method": method, "seed": seed, "measure": "surface", "space": "full", "kind": kind}
    rows = [
        {**fixed, "quantity": "loss", "index": n, "radius": x, "y": y, "value": loss(x, y)}
        for n, (y, x) in enumerate((y, x) for y in at for x in at)
    ]
    for n, (label, x, y, value, off) in enumerate(marks):
        place = {"label": label, "radius": x, "y": y, "index": n, "residual": off}
        rows.append({**fixed, **place, "quantity": "mark", "value": value})
    rows += [{**fixed, "quantity": name, "value": value} for name, value in (worth or {}).items()]
    return rows


def panels_of(figure: Figure):
    return [axes for axes in figure.axes if axes.get_visible() and axes.get_label() != "<colorbar>"]


def test_the_excess_is_over_the_centre_of_the_same_method_and_seed():
    rows = surface_rows(lambda x, y: 0.3 + x**2 + 2 * y**2)
    rows += surface_rows(lambda x, y: 7 + 3 * x**2, method="Bi-LoRA", seed=4)
    table = surface_table(pd.DataFrame(rows))
    expected = np.where(table["method"] == "LoRA", table["x"] ** 2 + 2 * table["y"] ** 2, 3 * table["x"] ** 2)
    np.testing.assert_allclose(table["excess"], expected, atol=1e-12)
    assert set(table["seed"]) == {0, 4}, "the first seed of each method"


def test_a_centre_between_grid_points_is_taken_from_the_mark_there():
    at = (-0.7, 0.3, 1.3)
    rows = surface_rows(lambda x, y: 1 + x + y**2, at, kind="adapters", marks=[("seed 0", 0.0, 0.0, 1.0, 1e-8)])
    table = surface_table(pd.DataFrame(rows)).query("quantity == 'loss'")
    np.testing.assert_allclose(table["excess"], table["x"] + table["y"] ** 2, atol=1e-12)
    off = surface_rows(lambda x, y: 1 + x + y**2, at, kind="adapters", marks=[("seed 0", 0.0, 0.0, 9.0, 0.5)])
    table = surface_table(pd.DataFrame(off)).query("quantity == 'loss'")
    assert table["excess"].min() == 0, "a mark off the plane is not the centre of the plane"
    assert "excess over the lowest loss" in words(surface_contours(pd.DataFrame(off)))


def test_a_centre_that_is_not_finite_is_said():
    rows = surface_rows(lambda x, y: np.inf if x == y == 0 else 1 + x**2)
    assert "excess over the lowest loss" in words(surface_contours(pd.DataFrame(rows)))
    nothing = surface_contours(pd.DataFrame(surface_rows(lambda x, y: np.nan)))
    assert "25 losses are not finite" in words(nothing)


def test_height_is_signed_monotone_and_logarithmic_beyond_the_threshold():
    scale = Scale(1e-3, -2.0, 1e4)
    excess = np.array([-2.0, -1e-9, 0.0, 1e-9, 1e-3, 1.0, 1e4])
    height = scale.height(excess)
    assert (np.diff(height) > 0).all()
    np.testing.assert_allclose(height[2:5], [0, 1e-6 / np.log(10), np.log10(2)], rtol=1e-6)
    assert height[-1] == pytest.approx(7, abs=1e-6)
    np.testing.assert_allclose(scale.height(-excess), -height)
    assert np.isnan(scale.height(np.array([np.inf, -np.inf, np.nan]))).all()


def test_ticks_lie_on_the_scale_whatever_its_range():
    for threshold, low, high in ((1e-3, 0.0, 0.2), (1e-2, -5.0, 3e7), (1e-9, 0.0, 2e-9), (1.0, -3.0, 1.0)):
        ticks, labels = Scale(threshold, low, high).ticks
        assert len(ticks) == len(labels) >= 2
        assert len(ticks) <= 14
        assert all(low <= tick <= high for tick in ticks)


def test_methods_of_a_space_share_their_scale_and_panels_show_the_rows(frame):
    figure = surface_contours(frame, "filter", "full")
    panels = panels_of(figure)
    assert [axes.get_title() for axes in panels] == METHODS
    groups = surfaces(surface_table(frame, "filter", "full"))
    low, high = scale_for(groups[0]).ends
    excess = surface_table(frame, "filter", "full")["excess"]
    assert scale_for(groups[0]).high == pytest.approx(excess.max())
    for axes, surface in zip(panels, groups[0], strict=True):
        fill = next(c for c in axes.collections if c.get_label() == FILL)
        assert fill.get_clim() == (low, high)
        loss = frame.query("measure == 'surface' and quantity == 'loss' and kind == 'filter' and space == 'full'")
        one = loss[(loss["method"] == surface.method) & (loss["seed"] == 0)]
        grid = one.pivot(index="y", columns="radius", values="value")
        np.testing.assert_allclose(surface.loss, grid)
        np.testing.assert_allclose(surface.excess, grid - grid.loc[0.0, 0.0], atol=1e-12)


def test_contour_lines_lie_where_the_loss_has_their_value():
    at = tuple(np.linspace(-1, 1, 81))
    figure = surface_contours(pd.DataFrame(surface_rows(lambda x, y: 0.4 + x**2 + 4 * y**2, at)))
    (axes,) = panels_of(figure)
    lines = next(c for c in axes.collections if isinstance(c, mpl.contour.QuadContourSet) and not c.filled)
    (group,) = surfaces(surface_table(pd.DataFrame(surface_rows(lambda x, y: 0.4 + x**2 + 4 * y**2, at))))
    scale = scale_for(group)
    assert len(lines.levels) >= 4
    for level, path in zip(lines.levels, lines.get_paths(), strict=True):
        x, y = path.vertices.T
        np.testing.assert_allclose(scale.height(x**2 + 4 * y**2), level, atol=0.02)


def test_a_saddle_keeps_its_sign():
    figure = surface_contours(pd.DataFrame(surface_rows(lambda x, y: 1 + x**2 - y**2, tuple(np.linspace(-1, 1, 21)))))
    (axes,) = panels_of(figure)
    low, high = next(c for c in axes.collections if c.get_label() == FILL).get_clim()
    assert low == pytest.approx(-high)


def picture_of(figure: Figure, dpi: int = 100) -> np.ndarray:
    figure.set_layout_engine("none")
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dpi)
    return mpl.image.imread(io.BytesIO(buffer.getvalue()))[..., :3]


def colours_at(figure: Figure, axes, points) -> np.ndarray:
    """RGB of the picture at ``points`` (data coordinates), (points, 3)."""
    picture = picture_of(figure, dpi=300)
    x, y = (axes.transData.transform(points) * 300 / figure.dpi).T
    return picture[(picture.shape[0] - y).astype(int), x.astype(int)]


def is_hatched(colours: np.ndarray) -> np.ndarray:
    """Grey, which the scale is only halfway up."""
    return np.ptp(colours, axis=1) < 0.04


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, y: 1 + (x - 0.09) ** 2 + y**2,
        lambda x, y: 1 + 1e-3 * ((x - 0.09) ** 2 + y**2),
        lambda x, y: 1 + x**2 - 0.3 * y**2,
        lambda x, y: 1 - x**2 - y**2,
        lambda x, y: 1 + x,
        lambda x, y: 1.0,
        lambda x, y: 1 + np.float32(1e-7) * x,
    ],
    ids=["minimum beside the centre", "the same, flat", "saddle", "maximum", "slope", "constant", "rounding"],
)
def test_every_finite_loss_is_filled(loss):
    at = np.linspace(-1, 1, 21)
    figure = surface_contours(pd.DataFrame(surface_rows(loss, tuple(at))))
    (axes,) = panels_of(figure)
    low, high = next(c for c in axes.collections if c.get_label() == FILL).get_clim()
    (group,) = surfaces(surface_table(pd.DataFrame(surface_rows(loss, tuple(at)))))
    height = scale_for(group).height(group[0].excess)
    assert low <= height.min()
    assert height.max() <= high
    for artist in [*axes.lines, *axes.texts, *(c for c in axes.collections if c.get_label() not in (FILL, OPEN))]:
        artist.set_visible(False)
    x, y = np.meshgrid(at[1:-1], at[1:-1])
    drawn = colours_at(figure, axes, np.stack([x.ravel(), y.ravel()], axis=1))
    expected = mpl.colormaps["cividis"](mpl.colors.Normalize(low, high)(height[1:-1, 1:-1].ravel()))[:, :3]
    np.testing.assert_allclose(drawn, expected, atol=0.05)


def test_rounding_changes_no_picture():
    exact = surface_contours(pd.DataFrame(surface_rows(lambda x, y: 1 + x**2 + y**2)))
    noise = surface_contours(pd.DataFrame(surface_rows(lambda x, y: 1 + x**2 + y**2 - 1e-8 * (x == 0.5))))
    assert np.abs(picture_of(exact) - picture_of(noise)).max() < 0.02
    lines = [c for c in panels_of(noise)[0].collections if isinstance(c, mpl.contour.QuadContourSet) and not c.filled]
    assert (lines[0].levels > 0).all(), "no line for a rise below 0"


def test_a_finite_loss_among_others_that_are_not_is_seen():
    alone = {(0.0, 0.0), (1.0, -1.0)}
    rows = surface_rows(lambda x, y: 1 + x if (x, y) in alone else np.nan)
    figure = surface_contours(pd.DataFrame(rows))
    (axes,) = panels_of(figure)
    (squares,) = [c for c in axes.collections if c.get_label() == ALONE]
    assert {tuple(at) for at in squares.get_offsets()} == alone
    squares_only = next(line for line in axes.lines if line.get_label() == NOT_FINITE)
    assert not alone & set(zip(*squares_only.get_data(), strict=True))
    corner = surface_rows(lambda x, y: np.nan if (x, y) == (-1, -1) else 1 + x**2)
    (squares,) = [c for c in panels_of(surface_contours(pd.DataFrame(corner)))[0].collections if c.get_label() == ALONE]
    assert not len(squares.get_offsets()), "the triangle of the other corners is filled"


def test_losses_that_are_not_finite_stay_open_and_are_counted():
    rows = surface_rows(lambda x, y: np.inf if x + y > 1.4 else (np.nan if x < -0.9 and y < -0.9 else x**2 + y**2))
    figure = surface_contours(pd.DataFrame(rows))
    (axes,) = panels_of(figure)
    (crosses,) = [line for line in axes.lines if line.get_label() == NOT_FINITE]
    assert {(x, y) for x, y in zip(*crosses.get_data(), strict=True)} == {(1, 1), (0.5, 1), (1, 0.5), (-1, -1)}
    assert "4 losses are not finite" in words(figure)
    assert is_hatched(colours_at(figure, axes, [(0.97, 0.97)])).all(), "grey, not a colour of the scale"


def test_marks_lie_at_their_coordinates_with_their_labels(frame):
    marks = [("LoRA seed 0", 0.0, 0.0, 0.0, 0.0), ("LoRA seed 1", 0.5, 0.5, 0.9, 0.0), ("$off$", -0.5, 0.5, 0.7, 0.3)]
    figure = surface_contours(pd.DataFrame(surface_rows(lambda x, y: x**2 + y**2, kind="adapters", marks=marks)))
    (axes,) = panels_of(figure)
    (dots,) = [c for c in axes.collections if c.get_label() == MARKS]
    np.testing.assert_allclose(dots.get_offsets(), [mark[1:3] for mark in marks])
    assert [t.get_text() for t in axes.texts if t.get_gid() == PLACED] == [mark[0] for mark in marks]
    assert "projected onto the plane from up to 0.3 away" in words(figure)
    assert "differs from the surface by up to 0.4" in words(figure), "0.9 at (0.5, 0.5), where the surface is 0.5"


def test_a_path_is_drawn_in_order_with_the_variance_it_explains(frame):
    figure = surface_contours(frame, "trajectory")
    axes = panels_of(figure)[0]
    marks = frame.query("kind == 'trajectory' and quantity == 'mark' and seed == 0 and method == 'Full FT'")
    paths = [line for line in axes.lines if line.get_label() == "_path"]
    np.testing.assert_allclose(paths[0].get_xdata(), marks.sort_values("index")["radius"])
    said = " ".join(" ".join(t.get_text().split()) for t in figure.findobj(mpl.text.Text))
    assert "86 % of the checkpoints' variance" in said
    assert "9 % of the checkpoints' variance" in said
    adapters = panels_of(surface_contours(frame, "adapters"))[0]
    assert not [line for line in adapters.lines if line.get_label() == "_path"]


def test_the_caption_says_what_the_surface_is_worth(frame):
    said = words(surface_contours(frame, "filter"))
    assert "Training seed 0 of 3 measured" in said
    assert "41 of 121 points were evaluated" in said
    assert "at most 1 % of the range at points held out" in said
    assert "bfloat16" not in said
    every = surface_rows(lambda x, y: x**2, worth={"precision_error": 0.004, "cosine": -0.2, "evaluated": 25})
    said = words(surface_contours(pd.DataFrame(every)))
    assert "All 25 points of a surface were evaluated" in said
    assert "bfloat16 were off by 0.4 % of the range" in said
    assert "cosine up to 0.2" in said


def test_one_panel_takes_a_column_and_several_a_page(frame):
    one = frame[frame["method"] == "LoRA"]
    assert surface_contours(one, "trajectory").get_figwidth() == COLUMN
    assert surface_contours(frame, "trajectory").get_figwidth() == PAGE


def test_compared_panels_share_their_axes_and_what_was_not_sampled_stays_blank():
    bowl = lambda x, y: np.inf if (x, y) == (1, 1) else x**2 + y**2  # noqa: E731
    rows = surface_rows(bowl)
    rows += surface_rows(bowl, (-2.0, -1.0, 0.0, 1.0, 2.0), method="Bi-LoRA")
    figure = surface_contours(pd.DataFrame(rows))
    small, wide = panels_of(figure)
    assert small.get_xlim() == wide.get_xlim() == small.get_ylim() == wide.get_ylim() == (-2, 2)
    figure.draw_without_rendering()
    assert small.get_window_extent().width == pytest.approx(wide.get_window_extent().width)
    assert [[t.get_text() for t in axes.texts if t.get_gid() == NOT_SAMPLED] for axes in (small, wide)] == [
        ["not sampled"], []
    ]  # fmt: skip
    assert "in the blank beside a method's window nothing was sampled" in words(figure)
    outside = colours_at(figure, small, [(-1.9, 1.9), (1.9, -1.9), (1.9, 0.3)])
    np.testing.assert_allclose(outside, 1.0, err_msg="blank, not hatched")
    hatched = colours_at(figure, small, [(0.9, 0.96)])
    assert is_hatched(hatched).all()
    assert (hatched < 0.99).all()


def label_boxes(figure: Figure, axes):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return [t.get_window_extent(canvas.get_renderer()) for t in axes.texts if t.get_visible()]


@pytest.mark.parametrize("kind", ["filter", "adapters", "trajectory", "eigenvectors"])
@pytest.mark.parametrize("methods", [1, 5])
def test_labels_in_a_panel_do_not_overlap(frame, kind, methods):
    figure = surface_contours(frame[frame["method"].isin(METHODS[-methods:])], kind, "full")
    for axes in panels_of(figure):
        boxes = [box.padded(-0.5) for box in label_boxes(figure, axes)]
        for number, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[:number])


def test_labels_without_room_are_counted_not_piled_up():
    marks = [(f"a long name of adapter {n}", 0.02 * (n % 5), 0.02 * (n // 5), 0.0, 0.0) for n in range(25)]
    figure = surface_contours(pd.DataFrame(surface_rows(lambda x, y: x**2 + y**2, kind="adapters", marks=marks)))
    (axes,) = panels_of(figure)
    placed = len([t for t in axes.texts if t.get_gid() == PLACED])
    assert 1 <= placed < 25
    assert f"{25 - placed} marks have no label for want of room" in words(figure)


def test_what_is_no_surface_is_one_clear_line(frame):
    with pytest.raises(NothingToDraw, match="no surface kind filter seed 9 to draw"):
        surface_contours(frame, "filter", seed=9)
    rows = surface_rows(lambda x, y: x)
    with pytest.raises(UserError, match="holds a point twice"):
        surface_contours(pd.DataFrame([*rows, rows[3]]))
    with pytest.raises(UserError, match="is no grid"):
        surface_contours(pd.DataFrame(rows[1:]))


def test_another_seed_can_be_asked_for(frame):
    table = surface_table(frame, "filter", seed=2)
    assert set(table["seed"]) == {2}
    first = surface_table(frame, "filter")
    assert not np.allclose(table["excess"].dropna(), first["excess"].dropna())


def path_rows(values, *, seed=0, label="A – B", method="LoRA", barrier=None, at=0.5):
    fixed = {**COLUMNS, "method": method, "seed": seed, "measure": "connectivity", "space": "full", "label": label}
    rows = [
        {**fixed, "quantity": "loss", "radius": n / (len(values) - 1), "value": value, "index": n}
        for n, value in enumerate(values)
    ]
    return rows + ([] if barrier is None else [{**fixed, "quantity": "barrier", "radius": at, "value": barrier}])


def test_a_barrier_reaches_from_the_chord_to_the_mean_curve():
    rows = path_rows([1.0, 1.5, 3.0, 2.5, 2.0], barrier=1.5)
    rows += path_rows([1.0, 1.5, 3.2, 2.5, 2.0], seed=1, barrier=1.7, at=0.25)
    figure = connectivity_curves(pd.DataFrame(rows))
    (axes,) = figure.axes
    (stem,) = [line for line in axes.lines if line.get_label() == BARRIER]
    np.testing.assert_allclose(stem.get_xdata(), [0.5, 0.5])
    np.testing.assert_allclose(stem.get_ydata(), [1.5, 3.1])
    (text,) = [text.get_text() for text in axes.get_legend().get_texts()]
    assert text.startswith("A – B: barrier 1.6 ± ")
    table = connectivity_table(pd.DataFrame(rows))
    assert table.query("quantity == 'barrier'")["n_seeds"].tolist() == [2]


def test_a_negative_barrier_and_one_that_is_not_finite_are_told():
    rows = path_rows([1.0, 0.2, 1.0], barrier=-0.8) + path_rows([1.0, np.inf, 1.0], label="A – C", barrier=np.nan)
    figure = connectivity_curves(pd.DataFrame(rows))
    (axes,) = figure.axes
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["A – B: barrier −0.8", "A – C: barrier not finite"]
    marks = [line for line in axes.lines if line.get_label() == NON_FINITE and len(line.get_xdata())]
    assert [line.get_xdata().tolist() for line in marks] == [[0.5]]
    assert "1 values there are not finite" in words(figure)


def test_pairs_of_one_name_are_told_apart_by_their_method():
    rows = [row for method in ("LoRA", "Bi-LoRA") for row in path_rows([1.0, 2.0, 1.0], method=method)]
    assert set(connectivity_table(pd.DataFrame(rows))["pair"]) == {"LoRA: A – B", "Bi-LoRA: A – B"}


def test_worst_case_curves_show_the_bound_both_searches_and_their_progress(frame):
    figure = worst_case_curves(frame)
    bound, _, progress, _ = figure.axes
    one = worst_case_table(frame).query("space == 'lora' and method == 'LoRA'")
    rises = frame.query("measure == 'worst_case' and space == 'lora' and method == 'LoRA' and quantity == 'loss_rise'")
    expected = rises.groupby("radius")["value"].mean()
    np.testing.assert_allclose(one[one["quantity"] == "loss_rise"]["mean"], expected)
    drawn = [line.get_ydata() for line in bound.lines if len(line.get_ydata()) == len(expected)]
    for quantity in ("loss_rise", "loss_rise_pga", "loss_rise_apgd", "loss_rise_one_step"):
        assert any(np.allclose(line, one[one["quantity"] == quantity]["mean"]) for line in drawn), quantity
    assert len([line for line in bound.lines if line.get_label() == ONE_STEP]) == 4
    for line in progress.lines:
        assert line.get_ydata()[-1] == pytest.approx(1)
    assert "a lower bound of the worst case" in words(figure)
    assert "ρ = 0.5" in progress.get_xlabel()


def test_an_unbounded_worst_case_is_marked(frame):
    broken = frame.copy()
    worst = broken.query("measure == 'worst_case' and quantity == 'loss_rise' and method == 'LoRA'")
    broken.loc[worst[worst["radius"] == 0.5].index, "value"] = np.inf
    figure = worst_case_curves(broken)
    marks = [line for axes in figure.axes for line in axes.lines if line.get_label() == NON_FINITE]
    assert len(marks) == 2
    assert "6 losses there are not finite" in words(figure)


def test_what_was_not_measured_is_named(frame):
    quality = frame[frame["measure"] == "quality"]
    for draw in (surface_contours, connectivity_curves, worst_case_curves):
        with pytest.raises(NothingToDraw, match="to draw"):
            draw(quality)
