"""Surfaces as an interactive page and as a mesh, read back."""

import base64
import html.parser
import itertools
import json
import re

import meshio
import numpy as np
import pandas as pd
import pytest

from analysis.plots import FIGURES, draw_all, interactive_surface, write_surface_html, write_surface_vtk
from analysis.plots.canvas import NothingToDraw
from analysis.plots.surface_data import scale_for, surface_table, surfaces
from bilora.errors import UserError
from tests.plausible_rows import COLUMNS, METHODS, plausible_rows

NASTY = "<b>x</b> & %{x} </script><script>alert('1')</script>"


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    rows = plausible_rows(directions=2)
    return rows[rows["measure"].isin(["surface", "quality"])]


@pytest.fixture(scope="module")
def broken(frame) -> pd.DataFrame:
    """LoRA's surface in full space has three points that are not finite."""
    rows = frame.copy()
    losses = rows.query(
        "quantity == 'loss' and kind == 'filter' and space == 'full' and method == 'LoRA' and seed == 0"
    )
    rows.loc[losses.index[[0, 1, -1]], "value"] = [np.nan, np.inf, -np.inf]
    return rows


def array(values) -> np.ndarray:
    """What plotly holds, whether as numbers or as bytes in base64."""
    if not isinstance(values, dict):
        return np.array(values, dtype=float)
    flat = np.frombuffer(base64.b64decode(values["bdata"]), dtype=values["dtype"])
    return flat.reshape([int(size) for size in values["shape"].split(",")]) if "shape" in values else flat


def sheets(figure):
    return [trace for trace in figure.to_dict()["data"] if trace["type"] == "surface"]


def test_every_scene_holds_the_losses_of_its_method_in_both_heights(broken):
    figure = interactive_surface(broken, "filter", "full")
    (group,) = surfaces(surface_table(broken, "filter", "full"))
    scale = scale_for(group)
    logarithmic, linear = sheets(figure)[: len(METHODS)], sheets(figure)[len(METHODS) :]
    assert [trace["visible"] for trace in logarithmic + linear] == [True] * len(METHODS) + [False] * len(METHODS)
    for position, surface in enumerate(group):
        told = array(logarithmic[position]["customdata"])
        np.testing.assert_allclose(told[..., 0], surface.loss, rtol=1e-6)
        np.testing.assert_allclose(told[..., 1], surface.excess, atol=1e-6)
        np.testing.assert_allclose(array(logarithmic[position]["z"]), scale.height(surface.excess), atol=1e-6)
        finite = np.where(np.isfinite(surface.excess), surface.excess, np.nan)
        np.testing.assert_allclose(array(linear[position]["z"]), finite, atol=1e-6)
        assert logarithmic[position]["meta"] == surface.method
    assert len({(trace["cmin"], trace["cmax"]) for trace in logarithmic}) == 1
    assert np.isnan(array(logarithmic[1]["z"])).sum() == 3
    assert all(trace["connectgaps"] is False for trace in logarithmic)
    assert "3 losses are not finite" in figure.to_dict()["layout"]["annotations"][-1]["text"].replace("<br>", " ")


def test_each_choice_shows_its_own_traces_in_scenes_that_exist(frame):
    figure = interactive_surface(frame).to_dict()
    buttons = figure["layout"]["updatemenus"][0]["buttons"]
    assert len(buttons) == 2 * 5
    shown = np.array([button["args"][0]["visible"] for button in buttons])
    assert (shown.sum(axis=0) == 1).all(), "every trace belongs to one choice"
    for button, visible in zip(buttons, shown, strict=True):
        scenes = {trace["scene"] for trace, on in zip(figure["data"], visible, strict=True) if on}
        assert scenes == {name for name in button["args"][1] if name.startswith("scene")}
        ranges = [button["args"][1][scene]["zaxis"]["range"] for scene in scenes]
        assert all(found == ranges[0] for found in ranges)
        assert all(np.isfinite(ranges[0]))


def test_scenes_of_one_choice_share_their_axes():
    wide = holed(set()).assign(method="Bi-LoRA")
    wide[["radius", "y"]] *= 2
    figure = interactive_surface(pd.concat([holed(set()), wide])).to_dict()
    for button in figure["layout"]["updatemenus"][0]["buttons"]:
        for axis in ("xaxis", "yaxis"):
            ranges = [button["args"][1][scene][axis]["range"] for scene in ("scene", "scene2")]
            assert ranges[0] == ranges[1]
            assert -2.3 < ranges[0][0] < -2 < 2 < ranges[0][1] < 2.3
    assert "beyond the edge of a method's window" in figure["layout"]["annotations"][-1]["text"].replace(
        "<br>", " "
    ).replace("&#x27;", "'")


def test_marks_stand_at_the_height_of_their_true_loss(frame):
    figure = interactive_surface(frame, "trajectory")
    (group,) = surfaces(surface_table(frame, "trajectory"))
    first = next(trace for trace in figure.to_dict()["data"] if trace["type"] == "scatter3d")
    assert first["mode"] == "lines+markers"
    np.testing.assert_allclose(array(first["x"]), group[0].marks["x"])
    np.testing.assert_allclose(array(first["z"]), scale_for(group).height(group[0].marks["excess"].to_numpy()))
    labels = [note["text"] for note in figure.to_dict()["layout"]["scene"]["annotations"]]
    assert labels == ["step 0", "step 100"]


class Page(html.parser.HTMLParser):
    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.title, self._inside = "", ""
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data):
        if self._inside == "title" and not self.title:
            self.title = data


def test_the_page_stands_alone_and_escapes_what_users_wrote(frame, tmp_path):
    nasty = frame[frame["kind"].isin(["adapters", ""])].replace({"method": {"LoRA": NASTY}, "label": {"seed 1": NASTY}})
    path = write_surface_html(interactive_surface(nasty), tmp_path / "new" / "s.html", title=f"a {NASTY}")
    source = path.read_text(encoding="utf-8")
    assert path.stat().st_size < 6e6
    page = Page(source)
    assert page.title == f"a {NASTY}"
    assert {tag for tag, _ in page.tags} <= {"html", "head", "title", "meta", "style", "body", "div", "script"}
    assert not [attrs for _, attrs in page.tags if "src" in attrs or "href" in attrs], "nothing is loaded"
    assert "<b>x</b>" not in source
    assert "alert('1')" not in source
    assert "%{x}" in source, "the template of x and y"
    figure = interactive_surface(nasty).to_dict()
    for trace in figure["data"]:
        assert not re.search(r"[<{]", str(trace.get("meta", "")))
    assert [p.name for p in path.parent.iterdir()] == ["s.html"]


def test_an_interrupted_page_leaves_the_old_one(frame, tmp_path, monkeypatch):
    path = tmp_path / "s.html"
    path.write_text("old")
    figure = interactive_surface(frame, "adapters")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    for write in (lambda: write_surface_html(figure, path), lambda: write_surface_vtk(frame, tmp_path / "s.vtu")):
        with pytest.raises(KeyboardInterrupt):
            write()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["s.html"]


def test_the_mesh_holds_every_surface_at_its_height(broken, tmp_path):
    mesh = meshio.read(write_surface_vtk(broken, tmp_path / "s.vtu"))
    data = mesh.point_data
    every = [(s, scale_for(group)) for group in surfaces(surface_table(broken)) for s in group]
    assert len(every) == 9 + 3 * 5
    for number, (surface, scale) in enumerate(every):
        mine, finite = data[surface.name] == 1, np.isfinite(surface.loss)
        np.testing.assert_array_equal(mine, data["surface"] == number)
        np.testing.assert_allclose(data["loss"][mine], surface.loss[finite])
        np.testing.assert_allclose(data["excess_loss"][mine], surface.excess[finite])
        np.testing.assert_allclose(mesh.points[mine, 2], scale.height(surface.excess)[finite])
        x, y = np.meshgrid(surface.x, surface.y)
        np.testing.assert_allclose(data["x"][mine], x[finite])
        np.testing.assert_allclose(mesh.points[mine, 1], y[finite])
    assert len(mesh.points) == sum(s.loss.size for s, _ in every) - 3


def holed(lost, points=5) -> pd.DataFrame:
    """A bowl on ``points``² points of which those in ``lost`` (row, column) are not finite."""
    at = np.linspace(-1, 1, points)
    fixed = {**COLUMNS, "method": "LoRA", "measure": "surface", "space": "full", "kind": "filter", "quantity": "loss"}
    return pd.DataFrame([
        {**fixed, "radius": x, "y": y, "index": n, "value": np.inf if divmod(n, points) in lost else 1 + x**2 + y**2}
        for n, (y, x) in enumerate((y, x) for y in at for x in at)
    ])  # fmt: skip


def test_a_point_that_is_not_finite_is_a_hole_in_the_mesh_and_no_point_of_it(tmp_path):
    mesh = meshio.read(write_surface_vtk(holed({(2, 3), (6, 6)}, points=7), tmp_path / "s.vtu"))
    assert np.isfinite(mesh.points).all()
    assert len(mesh.points) == 49 - 2
    assert [cells.type for cells in mesh.cells] == ["quad"]
    corners = {tuple(map(tuple, corners)) for corners in mesh.points[mesh.cells[0].data][..., :2] - (1, 0)}
    assert len(corners) == 36 - 4 - 1, "the four cells around the one and the cell at the corner"
    assert not any((x, y) in {(0.0, np.linspace(-1, 1, 7)[2]), (1.0, 1.0)} for cell in corners for x, y in cell)
    np.testing.assert_allclose(mesh.point_data["loss"], 1 + (mesh.point_data["x"] ** 2 + mesh.points[:, 1] ** 2))


def test_a_finite_point_among_others_that_are_not_stays_seen(tmp_path):
    lost = set(itertools.product(range(5), range(5))) - {(2, 2), (0, 4)}
    mesh = meshio.read(write_surface_vtk(holed(lost), tmp_path / "s.vtu"))
    assert [(cells.type, len(cells.data)) for cells in mesh.cells] == [("vertex", 2)]
    squares = [
        t for t in interactive_surface(holed(lost)).to_dict()["data"] if t.get("marker", {}).get("symbol") == "square"
    ]
    assert len(squares) == 2, "one of each height"
    assert set(zip(array(squares[0]["x"]), array(squares[0]["y"]), strict=True)) == {(0, 0), (1, -1)}
    with pytest.raises(NothingToDraw, match="no loss is finite"):
        write_surface_vtk(holed(lost | {(2, 2), (0, 4)}), tmp_path / "none.vtu")
    assert not (tmp_path / "none.vtu").exists()


def test_every_finite_loss_lies_within_the_height_of_its_scene():
    rows = holed(set(), points=21)
    rows["value"] = 1 + (rows["radius"] - 0.09) ** 2 + rows["y"] ** 2
    figure = interactive_surface(rows)
    buttons = figure.to_dict()["layout"]["updatemenus"][0]["buttons"]
    for sheet, button in zip(sheets(figure), buttons, strict=True):
        low, high = button["args"][1]["scene"]["zaxis"]["range"]
        height = array(sheet["z"])
        assert np.isfinite(height).all()
        assert low < height.min() < height.max() < high
        assert sheet["cmin"] == pytest.approx(height.min(), abs=1e-6)


def test_cells_tile_each_window_and_surfaces_do_not_touch(frame, tmp_path):
    mesh = meshio.read(write_surface_vtk(frame, tmp_path / "s.vtu", "filter"))
    (block,) = mesh.cells
    assert block.type == "quad"
    corners = mesh.points[block.data][:, :, :2]
    sides, back = corners[:, 1] - corners[:, 0], corners[:, 3] - corners[:, 0]
    area = sides[:, 0] * back[:, 1] - sides[:, 1] * back[:, 0]
    assert (area > 0).all(), "counter-clockwise"
    owner = mesh.point_data["surface"][block.data]
    assert (owner == owner[:, :1]).all()
    np.testing.assert_allclose([area[owner[:, 0] == n].sum() for n in range(9)], 4.0)
    ends = [(mesh.points[mesh.point_data["surface"] == n, 0]) for n in range(9)]
    assert all(left.max() < right.min() for left, right in itertools.pairwise(ends))


def test_another_suffix_is_refused(frame, tmp_path):
    with pytest.raises(UserError, match=r"no \.vtu file"):
        write_surface_vtk(frame, tmp_path / "s.obj")


def test_files_are_written_where_surfaces_were_measured_and_only_there(frame, tmp_path):
    some = frame[frame["kind"].isin(["adapters", ""])]
    written = [draw_all(some, tmp_path / name, {}) for name in ("a", "b")]
    assert [path.name for path in written[0]][-5:] == [
        f"surface.{kind}" for kind in ("html", "vtu", "csv", "parquet", "json")
    ]
    for one, other in zip(*written, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name
    only = draw_all(some, tmp_path / "c", {}, only=["surface.vtu"])
    assert [path.name for path in only] == [f"surface.{kind}" for kind in ("vtu", "csv", "parquet", "json")]
    made_by = json.loads((tmp_path / "c" / "surface.json").read_text())
    assert made_by["files"] == ["surface.vtu"]
    assert made_by["gauge"] == {"full": "none"}
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "c" / "surface.parquet"), surface_table(some))
    with pytest.raises(NothingToDraw, match="no surface to draw"):
        draw_all(some[some["measure"] == "quality"], tmp_path / "d", {}, only=["surface.html"])
    with pytest.raises(NothingToDraw, match="no loss_rise rows"):
        draw_all(some, tmp_path / "d", {}, only=["surface_adapters", "random"])
    with pytest.raises(UserError, match="no figure is called 'surfaces': choose one of differences"):
        draw_all(some, tmp_path / "d", {}, only=["surfaces"])
    assert not (tmp_path / "d").exists()
    assert {"surface_filter", "surface_trajectory", "connectivity", "worst_case"} <= {f.name for f in FIGURES}
