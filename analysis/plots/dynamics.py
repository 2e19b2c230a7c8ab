"""Curves over training steps of recorded runs: the Bi-LoRA paper's Figures 2 and 3, and where perturbations lie."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.plots import canvas
from analysis.plots.spread import spread_table, spread_words
from analysis.plots.style import PAGE, MethodStyle, styles_for

MEASURE = "dynamics"


@dataclass(frozen=True)
class Panel:
    """One panel: which rows it draws, and how its axis is called."""

    quantity: str
    space: str
    kind: str
    title: str
    label: str
    limits: tuple[float, float] | None = None


CONVERGENCE = (
    Panel("cosine_to_end", "full", "primary", "primary update to its end", "cosine"),
    Panel("cosine_to_end", "full", "auxiliary", "auxiliary s₂·B₂A₂ to its end", "cosine"),
    Panel("cosine", "full", "primary_auxiliary", "primary with auxiliary", "cosine"),
    Panel("cosine_to_end", "lora", "primary", "primary factors to their end", "cosine"),
    Panel("cosine_to_end", "lora", "auxiliary", "auxiliary factors to their end", "cosine"),
    Panel("cosine", "lora", "primary_auxiliary", "factors, primary with auxiliary", "cosine"),
)
PARTS = (
    Panel("perturbation_part", "full", "B_eps_A", r"$s\,B\,\varepsilon_A$", "norm"),
    Panel("perturbation_part", "full", "eps_B_A", r"$s\,\varepsilon_B\,A$", "norm"),
    Panel("perturbation_part", "full", "eps_B_eps_A", r"$s\,\varepsilon_B\,\varepsilon_A$", "norm"),
    Panel("second_order_ratio", "full", "", "second over first order", "ratio of norms"),
)
OUTSIDE = (
    Panel("outside_share", "full", "", "share outside LoRA-SAM's reach", f"share of {canvas.EPS_W}²", (-0.03, 1.03)),
    Panel("loss_rise", "", "", "loss rise of the perturbation applied", "loss with − without"),
)


def dynamics_table(frame: pd.DataFrame, panels: Sequence[Panel], confidence: float = 0.95) -> pd.DataFrame:
    """Means over seeds of what ``panels`` draw, of all layers together: one row a method, quantity and step.

    Raises:
        NothingToDraw: no such row was recorded.
    """
    rows = frame[(frame["measure"] == MEASURE) & (frame["layer"] == "")]
    wanted = pd.Series(False, index=rows.index)
    for panel in panels:
        wanted |= _of(rows, panel)
    if not wanted.any():
        raise canvas.NothingToDraw(
            f"no {panels[0].quantity} over steps to draw: train with --record N and give the runs to `bilora inspect`"
        )
    return spread_table(rows[wanted], confidence).sort_values(
        ["quantity", "space", "kind", "method", "index"], ignore_index=True
    )


@canvas.styled
def step_curves(frame: pd.DataFrame, panels: Sequence[Panel], columns: int, confidence: float = 0.95) -> Figure:
    """One panel a quantity over optimizer steps, a line a method, with a band over seeds and dots of chance levels.

    Panels without rows are left out. Values that are nowhere negative and range over a factor of 30 stand on a
    logarithmic axis, common to the panels of one unit.

    Raises:
        NothingToDraw: no such row was recorded.
    """
    table = dynamics_table(frame, panels, confidence)
    styles = styles_for(frame["method"])
    here = [panel for panel in panels if not rows_of(table, panel).empty]
    columns = min(columns, len(here))
    lines = -(-len(here) // columns)
    figure, grid = canvas.panels(lines, columns, PAGE, canvas.height_for(lines, PAGE, row=1.75), sharex="all")
    chance = False
    for number, (panel, axes) in enumerate(zip(here, grid.flat, strict=False)):
        part = rows_of(table, panel)
        alike = pd.concat([rows_of(table, other) for other in here if other.label == panel.label])
        floor = _scale(axes, panel, alike)
        for method, look in styles.items():
            curve = part[part["method"] == method].sort_values("index")
            if not curve.empty:
                _draw(axes, curve, look, floor)
        known = part[["index", "chance"]].dropna().groupby("index")["chance"].mean()
        if len(known):
            axes.plot(known.index, known, color="black", linestyle="--", linewidth=1)
            chance = True
        axes.set_title(panel.title)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if number % columns == 0 or panel.label != here[number - 1].label:
            axes.set_ylabel(panel.label)
        if number >= len(here) - columns:
            axes.set_xlabel("optimizer step")
    for axes in list(grid.flat)[len(here) :]:
        axes.set_visible(False)
    canvas.legend(figure, canvas.line_handles(styles, table["method"], markers=False), PAGE)
    words = spread_words(table.assign(n_directions=1), "bands", confidence)
    words += " All adapted layers together."
    words += " Dashed black: mean of random perturbations of these shapes." if chance else ""
    canvas.caption(figure, words, PAGE)
    return figure


def _draw(axes: Axes, curve: pd.DataFrame, look: MethodStyle, floor: float) -> None:
    mean = curve["mean"].where(curve["mean"] > floor)
    axes.plot(curve["index"], mean, color=look.colour, linestyle=look.line)
    low = curve["low"].clip(lower=floor)
    axes.fill_between(curve["index"], low, curve["high"], color=look.colour, alpha=0.18, linewidth=0)


def _scale(axes: Axes, panel: Panel, alike: pd.DataFrame) -> float:
    """Limits for all panels of one unit; returns below what nothing is drawn: a zero has no place on a log axis."""
    positive = alike["mean"][alike["mean"] > 0]
    if panel.limits is not None:
        axes.set_ylim(*panel.limits)
    elif panel.label == "cosine":
        axes.set_ylim(min(-0.05, float(np.nanmin(alike["mean"])) - 0.1), 1.05)
    elif canvas.spans(positive, 30) and not (alike["mean"] < 0).any():
        axes.set_yscale("log")
        axes.set_ylim(float(positive.min()) / 2, float(positive.max()) * 2)
        return float(positive.min()) / 2
    else:
        low, high = canvas.spread_limits(alike)
        room = 0.0 if high > low else 0.1 * abs(high) or 1.0  # of a constant
        axes.set_ylim(low - room, high + room)
    return -np.inf


def rows_of(table: pd.DataFrame, panel: Panel) -> pd.DataFrame:
    """The rows that a panel draws."""
    return table[_of(table, panel)]


def _of(rows: pd.DataFrame, panel: Panel) -> "pd.Series[bool]":
    return (rows["quantity"] == panel.quantity) & (rows["space"] == panel.space) & (rows["kind"] == panel.kind)
