"""Loss surfaces to turn and zoom in a browser: one HTML file that loads nothing else."""

import html
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.plots.canvas import space_title
from analysis.plots.save import write_atomically
from analysis.plots.surface_data import (
    Scale,
    Surface,
    axis_label,
    scale_for,
    space_and_kind,
    surface_table,
    surfaces,
    window_for,
)
from analysis.plots.surface_words import surface_caption

if TYPE_CHECKING:
    import plotly.graph_objects as go

TITLE = "Loss surfaces"

_COLOURS = "Cividis"
_SCENES = 12  # browsers draw no more at a time
_TOP = 118  # pixels above the scenes: title, menu, names
_LINE = 17  # pixels of a line of words below
_ABREAST = {  # scenes side by side: share of the width, pixels of height, distance of the eye, letters a line of words
    1: (0.82, 310, 1.2, 52),
    2: (0.88, 380, 1.1, 100),
    3: (0.92, 400, 1.0, 150),
}
_NARROWEST = 330  # pixels of a scene
_APART = 0.15  # between two ticks of height, of the range
_BAR_PLACE = {"x": 1, "xanchor": "right", "y": 1, "yanchor": "top", "lenmode": "pixels", "len": 260, "thickness": 16}
_LABELS = 8  # of marks in a scene; the others tell theirs to the pointer
_EYE = {"x": 1.35, "y": -1.65, "z": 1.0}
_MARGIN = 0.06  # of a range, so that ticks of two axes do not meet in a corner
_SHORT = {"filter": "random plane", "eigenvectors": "eigenvectors", "adapters": "adapters", "trajectory": "trajectory"}
# Turning one scene turns all: methods are compared from one side. Narrow windows get fewer scenes side by side.
_SCRIPT = """
var figure = document.getElementById('{plot_id}'), busy = false;
figure.on('plotly_relayout', function (change) {
  var key = Object.keys(change).find(function (name) { return /^scene[0-9]*[.]camera$/.test(name); });
  if (busy || !key) return;
  var update = {};
  Object.keys(figure._fullLayout).forEach(function (name) {
    if (/^scene[0-9]*$/.test(name)) update[name + '.camera'] = change[key];
  });
  busy = true;
  Plotly.relayout(figure, update).then(function () { busy = false; });
});
var abreast = 3;
function fit() {
  var wanted = Math.max(1, Math.min(3, Math.floor(figure.clientWidth / NARROWEST)));
  if (wanted === 3 && abreast === 3) return;
  abreast = wanted;
  var layouts = figure.layout.meta[figure.layout.updatemenus[0].active || 0];
  Plotly.relayout(figure, JSON.parse(JSON.stringify(layouts[wanted - 1])));
}
figure.on('plotly_buttonclicked', function () { setTimeout(fit, 0); });
window.addEventListener('resize', fit);
fit();
""".replace("NARROWEST", str(_NARROWEST))


def interactive_surface(
    frame: pd.DataFrame, kind: str | None = None, space: str | None = None, seed: int | None = None
) -> "go.Figure":
    """Surfaces in three dimensions, a scene for each method; a menu chooses plane, space and a log or linear height.

    All scenes of a choice share height, colours and camera. Points that are not finite are gaps.

    Args:
        frame: the tidy rows of one study.
        kind: ``filter``, ``eigenvectors``, ``adapters`` or ``trajectory``; None: all that were measured.
        space: ``full``, ``lora`` or another; None: all that were measured.
        seed: the training seed; None: the first one of each method.

    Returns:
        A plotly figure; of more than twelve methods the first twelve.

    Raises:
        NothingToDraw: no such surface was measured.
        UserError: a surface holds the same point twice, or its points are no grid.
    """
    import plotly.graph_objects as go

    groups = [group[:_SCENES] for group in surfaces(surface_table(frame, kind, space, seed))]
    choices = [_Choice(group, scale_for(group), logarithmic) for group in groups for logarithmic in (True, False)]
    traces: list[Any] = []
    owners: list[int] = []
    for number, choice in enumerate(choices):
        for position, surface in enumerate(choice.group):
            new = [_sheet(choice, surface, position), *_alone(choice, surface, position)]
            new += _marks(choice, surface, position)
            traces += new
            owners += [number] * len(new)
    buttons = []
    for number, choice in enumerate(choices):
        visible = [owner == number for owner in owners]
        buttons.append({"label": choice.title, "method": "update", "args": [{"visible": visible}, choice.layout()]})
    for trace, owner in zip(traces, owners, strict=True):
        trace.visible = owner == 0
    menu = {"buttons": buttons, "x": 0, "y": 1, "xanchor": "left", "yanchor": "bottom", "pad": {"b": 26}}
    menu["font"] = {"size": 11}
    narrower = [[choice.layout(columns) for columns in _ABREAST] for choice in choices]
    figure = go.Figure(data=traces)
    figure.update_layout(
        {**choices[0].layout(), "updatemenus": [menu], "uirevision": "camera", "meta": narrower},
        title={"text": TITLE, "x": 0.01, "y": 1, "yref": "container", "yanchor": "top", "pad": {"t": 14}},
        paper_bgcolor="white",
        font={"family": "DejaVu Sans, Verdana, sans-serif", "size": 12},
        showlegend=False,
    )
    return figure


def write_surface_html(figure: "go.Figure", path: Path, title: str = TITLE) -> Path:
    """Write ``figure`` as a page that needs no network (4.9 MB, nearly all of it plotly.js), atomically.

    Args:
        figure: of :func:`interactive_surface`.
        path: the file; its folder is made if missing.
        title: of the page, as plain text.

    Returns:
        ``path``.
    """
    page: str = figure.to_html(
        full_html=True,
        include_plotlyjs=True,
        div_id="surface",
        post_script=_SCRIPT,
        config={"displaylogo": False, "responsive": True},
    )
    head = f'<title>{html.escape(title)}</title><meta name="viewport" content="width=device-width, initial-scale=1">'
    page = page.replace("<head>", f"<head>{head}", 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_atomically(path, page.encode())


@dataclass(frozen=True, eq=False)
class _Choice:
    """One entry of the menu."""

    group: Sequence[Surface]
    scale: Scale
    logarithmic: bool

    @property
    def title(self) -> str:
        first = self.group[0]
        words = (space_title(first.space), _SHORT.get(first.kind, first.kind), first.split)
        return _safe(", ".join(word for word in (*words, "log" if self.logarithmic else "linear") if word))

    @property
    def ends(self) -> tuple[float, float]:
        return self.scale.ends if self.logarithmic else (self.scale.low, self.scale.high)

    @property
    def axis(self) -> dict[str, Any]:
        """Ticks of height and colour bar."""
        if not self.logarithmic:
            return {"tickmode": "auto", "tickvals": None, "ticktext": None}
        at, labels = self.scale.ticks_apart(_APART)
        texts = [_plain_power(label) for label in labels]
        return {"tickmode": "array", "tickvals": self.scale.height(np.array(at)).tolist(), "ticktext": texts}

    def height(self, excess: np.ndarray) -> np.ndarray:
        return self.scale.height(excess) if self.logarithmic else np.where(np.isfinite(excess), excess, np.nan)

    def layout(self, abreast: int = max(_ABREAST)) -> dict[str, Any]:
        """Scenes, their titles and the words below, with at most ``abreast`` scenes side by side."""
        wide, tall, away, letters = _ABREAST[abreast]
        columns = 2 if len(self.group) == 4 and abreast > 1 else min(len(self.group), abreast)
        rows = -(-len(self.group) // columns)
        across, up = map(_with_margin, window_for(self.group))
        camera = {"eye": {axis: away * at for axis, at in _EYE.items()}, "center": {"x": 0, "y": 0, "z": -0.12}}
        lines = [
            f"{space_and_kind(self.group[0])}.",
            *_axes(self.group),
            surface_caption([self.group], relief=True, linear=not self.logarithmic),
        ]
        lines = [part for line in lines for part in textwrap.wrap(line, letters)]
        bottom = 40 + _LINE * len(lines)
        found: dict[str, Any] = {
            "height": _TOP + tall * rows + bottom,
            "margin": {"l": 10, "r": 10, "t": _TOP, "b": bottom},
        }
        notes = []
        for position, surface in enumerate(self.group):
            row, column = divmod(position, columns)
            x = (wide * column / columns, wide * (column + 1) / columns - 0.01)
            y = (1 - (row + 1) / rows, 1 - row / rows - 0.07 / rows)
            name = "excess loss" if columns < abreast == max(_ABREAST) else ""  # where there is room
            height = {**self.axis, "title": {"text": name}, "range": _with_margin(self.ends)}
            found[_scene(position)] = {
                "domain": {"x": x, "y": y}, "camera": camera, "aspectmode": "manual",
                "aspectratio": {"x": 1, "y": 1, "z": 0.75},
                "xaxis": {"title": {"text": "x"}, "range": across, "nticks": 5},
                "yaxis": {"title": {"text": "y"}, "range": up, "nticks": 5},
                "zaxis": height, "annotations": _labels(self, surface),
            }  # fmt: skip
            place = {"x": sum(x) / 2, "y": y[1], "xanchor": "center", "yanchor": "bottom"}
            notes.append(_note(f"<b>{_safe(surface.method)}</b>, seed {surface.seed}", **place))
        below = "<br>".join(_safe(line) for line in lines)
        notes.append(_note(below, x=0, y=0, yshift=-12, yanchor="top", xanchor="left", align="left"))
        return {**found, "annotations": notes}


def _sheet(choice: _Choice, surface: Surface, position: int) -> "go.Surface":
    import plotly.graph_objects as go

    low, high = choice.ends
    known = np.isfinite(surface.accuracy)
    lines = ["<b>%{meta}</b>", "x = %{x:.4g}, y = %{y:.4g}", "loss %{customdata[0]:.5g}", "excess %{customdata[1]:.4g}"]
    lines += ["accuracy %{customdata[2]:.4g}"] if known.any() else []
    lines += ["error by interpolation %{customdata[3]:.2g}"] if surface.interpolated.any() else []
    told = np.dstack([surface.loss, surface.excess, surface.accuracy, np.nan_to_num(surface.error)])
    return go.Surface(
        x=surface.x, y=surface.y, z=choice.height(surface.excess).astype("float32"),
        scene=_scene(position), meta=_safe(surface.method),
        customdata=told.astype("float32"),
        hovertemplate="<br>".join(lines) + "<extra></extra>", cmin=low, cmax=high, colorscale=_COLOURS,
        showscale=position == 0, connectgaps=False, name=_safe(surface.method),
        colorbar={**choice.axis, "title": {"text": "excess<br>loss"}, **_BAR_PLACE},
        contours={"z": {"show": True, "usecolormap": False, "color": "rgba(255,255,255,0.5)", "width": 1}},
    )  # fmt: skip


def _alone(choice: _Choice, surface: Surface, position: int) -> list["go.Scatter3d"]:
    """Finite losses among others that are not: the sheet fills only cells with four finite corners."""
    import plotly.graph_objects as go

    alone = surface.alone(4)
    if not alone.any():
        return []
    x, y = np.meshgrid(surface.x, surface.y)
    height = choice.height(surface.excess)[alone]
    low, high = choice.ends
    look = {"symbol": "square", "size": 4, "color": height, "colorscale": _COLOURS, "cmin": low, "cmax": high}
    told = [
        f"loss {loss:.5g}<br>excess {excess:.4g}"
        for loss, excess in zip(surface.loss[alone], surface.excess[alone], strict=True)
    ]
    return [
        go.Scatter3d(
            x=x[alone], y=y[alone], z=height, mode="markers", marker=look, hovertext=told, scene=_scene(position),
            hovertemplate="<b>%{meta}</b><br>x = %{x:.4g}, y = %{y:.4g}<br>%{hovertext}<extra></extra>",
            meta=_safe(surface.method), name=_safe(surface.method),
        )
    ]  # fmt: skip


def _marks(choice: _Choice, surface: Surface, position: int) -> list["go.Scatter3d"]:
    """Centre and marked points, at the height of the true loss there; at the lower end where that is not known."""
    import plotly.graph_objects as go

    low, _ = choice.ends
    common = {"scene": _scene(position), "meta": _safe(surface.method), "name": _safe(surface.method)}
    if surface.marks.empty:
        at = choice.height(np.array([0.0]))
        cross = {"symbol": "cross", "size": 4, "color": "black"}
        words = "<b>%{meta}</b><br>centre<extra></extra>"
        return [go.Scatter3d(x=[0], y=[0], z=at, mode="markers", marker=cross, hovertemplate=words, **common)]
    marks = surface.marks
    height = choice.height(marks["excess"].to_numpy(float))
    path = surface.kind == "trajectory"
    labels = [_safe(label) for label in marks["label"]]
    told = [
        f"{label}<br>true loss {value:.5g}<br>{off:.3g} off the plane"
        for label, value, off in zip(labels, marks["value"], marks["off_plane"], strict=True)
    ]
    return [
        go.Scatter3d(
            x=marks["x"], y=marks["y"], z=np.where(np.isnan(height), low, height), hovertext=told,
            mode="lines+markers" if path else "markers",
            hovertemplate="<b>%{meta}</b><br>%{hovertext}<extra></extra>", line={"color": "black", "width": 4},
            marker={"size": 4, "color": "white", "line": {"color": "black", "width": 2}}, **common,
        )
    ]  # fmt: skip


def _labels(choice: _Choice, surface: Surface) -> list[dict[str, Any]]:
    """Labels that stay readable over any colour: of a path only its ends."""
    marks = surface.marks
    shown = {0, len(marks) - 1} if surface.kind == "trajectory" else set(range(min(len(marks), _LABELS)))
    height = np.nan_to_num(choice.height(marks["excess"].to_numpy(float)), nan=choice.ends[0])
    look = {"ax": 0, "ay": -22, "bgcolor": "rgba(255,255,255,0.8)", "font": {"size": 11}, "arrowhead": 0}
    return [
        {"x": x, "y": y, "z": float(z), "text": _safe(label), **look}
        for number, (x, y, z, label) in enumerate(zip(marks["x"], marks["y"], height, marks["label"], strict=True))
        if number in shown and label
    ]


def _axes(group: Sequence[Surface]) -> list[str]:
    """What x and y are, for each method where that differs."""
    words = {surface.method: f"{axis_label(surface, 0)}; {axis_label(surface, 1)}" for surface in group}
    if len(set(words.values())) == 1:
        return [f"Axes x and y: {next(iter(words.values()))}."]
    return [f"Axes x and y of {method}: {text}." for method, text in words.items()]


def _with_margin(ends: tuple[float, float]) -> list[float]:
    room = _MARGIN * (ends[1] - ends[0])
    return [ends[0] - room, ends[1] + room]


def _scene(position: int) -> str:
    return f"scene{position + 1}" if position else "scene"


def _note(text: str, **place: Any) -> Mapping[str, Any]:
    return {"text": text, "showarrow": False, "xref": "paper", "yref": "paper", **place}


def _plain_power(label: str) -> str:
    """``$10^{4}$`` in plotly's markup."""
    return re.sub(r"^\$(-?)(.*)\^\{(.*)\}\$$", r"\1\2<sup>\3</sup>", label).replace("-", "−")


def _safe(text: str) -> str:
    """A user's words in plotly's markup, where ``<`` opens a tag and ``%{`` a template."""
    return html.escape(text).replace("{", "&#123;")
