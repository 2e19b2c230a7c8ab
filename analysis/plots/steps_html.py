"""Curves over training steps as an interactive figure: hover for values, click a method to hide it."""

import re
from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from analysis.plots.dynamics import Panel, dynamics_table, rows_of
from analysis.plots.style import MethodStyle, styles_for

COLUMNS = 3
"""Panels side by side at most."""
_TEX = {r"\Vert": "‖", r"\varepsilon": "ε", r"\,": "·"}


def interactive_steps(frame: pd.DataFrame, panels: Sequence[Panel], confidence: float = 0.95) -> go.Figure:
    """The panels of :func:`analysis.plots.dynamics.step_curves`, for a notebook or ``write_html``.

    Args:
        frame: rows of recorded runs.
        panels: what to draw; those without rows are left out.
        confidence: level of the bands, in (0, 1).

    Raises:
        NothingToDraw: no such row was recorded.
    """
    table = dynamics_table(frame, panels, confidence)
    here = [panel for panel in panels if not rows_of(table, panel).empty]
    columns = min(COLUMNS, len(here))
    rows = -(-len(here) // columns)
    titles = [_html(panel.title) for panel in here]
    figure = make_subplots(rows, columns, subplot_titles=titles, horizontal_spacing=0.08, vertical_spacing=0.3 / rows)
    named: set[str] = set()
    for place, panel in enumerate(here):
        at = {"row": place // columns + 1, "col": place % columns + 1}
        part = rows_of(table, panel)
        for method, look in styles_for(frame["method"]).items():
            curve = part[part["method"] == method].sort_values("index")
            if curve.empty:
                continue
            for trace in _traces(method, look, curve, legend=method not in named):
                figure.add_trace(trace, **at)
            named.add(method)
        chance = part[["index", "chance"]].dropna().groupby("index")["chance"].mean()
        if len(chance):
            line = go.Scatter(x=chance.index, y=chance, name="random", line={"color": "black", "dash": "dash"})
            figure.add_trace(line, **at)
        figure.update_xaxes(title_text="optimizer step", **at)
        figure.update_yaxes(title_text=_html(panel.label), **at)
    height = 60 + 300 * rows
    figure.update_layout(template="plotly_white", height=height, margin={"l": 60, "r": 20, "t": 60, "b": 50})
    return figure


def _html(text: str) -> str:
    """A label whose formulas are TeX, for a page that has no TeX."""

    def plain(formula: re.Match[str]) -> str:
        inside = formula.group(1)
        for tex, letter in _TEX.items():
            inside = inside.replace(tex, letter)
        return re.sub(r"_(\w)", r"<sub>\1</sub>", inside.replace("}", "").replace("{", "")).strip()

    return re.sub(r"\$(.*?)\$", plain, text)


def _traces(method: str, look: MethodStyle, curve: pd.DataFrame, *, legend: bool) -> list[go.Scatter]:
    colour = look.colour
    dash = "solid" if look.line == "-" else ",".join(f"{3 * length:g}px" for length in look.line[1])
    line = go.Scatter(
        x=curve["index"], y=curve["mean"], name=method, legendgroup=method, showlegend=legend,
        line={"color": colour, "dash": dash}, hovertemplate="step %{x}: %{y:.4g}",
    )  # fmt: skip
    known = curve.dropna(subset=["low", "high"])
    if known.empty:
        return [line]
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    band = go.Scatter(
        x=[*known["index"], *known["index"][::-1]], y=[*known["high"], *known["low"][::-1]], fill="toself",
        fillcolor=f"rgba({red},{green},{blue},0.15)", line={"width": 0}, hoverinfo="skip", showlegend=False,
        legendgroup=method,
    )  # fmt: skip
    return [band, line]
