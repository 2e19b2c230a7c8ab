"""The loss on planes through weight space, a panel of contours for each method.

Colour and contour lines show the excess ``e = L(x, y) − L(0, 0)`` by its height ``sign(e)·log10(1 + |e|/ε)``
(:class:`analysis.plots.surface_data.Scale`), on one scale for all methods of a space and kind of plane.
"""

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.patheffects as effects
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from analysis.plots import canvas
from analysis.plots.mark_labels import place_labels, settle_numbers
from analysis.plots.style import COLUMN, PAGE
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

NOT_FINITE = "_not finite"
"""Label of the crosses on points whose loss is not finite."""
ALONE = "_alone"
"""Label of the squares on finite losses that lie among others too few to fill a cell between."""
FILL, OPEN = "_fill", "_open"
"""Labels of the coloured contours, and of the hatching below that is seen where there is none."""
NOT_SAMPLED = "not sampled"
"""``get_gid()`` of the words in the blank part of a panel."""
MARKS = "_marks"
"""Label of the marked points."""

_COLOURS = "cividis"
_BANDS = 48  # of colour
_LINES = 7  # contour lines at most
_STEPS = ((1, 2, 5), (1, 3), (1,))  # of contour lines within a decade, the finest that gives no more
_ABREAST = {1: 1, 2: 2, 4: 2}  # panels side by side, three for other numbers
_LARGEST = 2.2  # inches a panel
_LONG = 3.0  # windows longer than this are not drawn in equal units
_LETTER = 0.063  # inches a character of a label takes
_WORD = 0.14  # inches that a line of words is high
_TICK = 0.14  # inches between two labels of a colour bar


@canvas.styled
def surface_contours(
    frame: pd.DataFrame, kind: str | None = None, space: str | None = None, seed: int | None = None
) -> Figure:
    """Filled contours of the excess loss on each method's plane, with marked points and paths.

    A column wide where there is one panel, else a page. Points that are not finite are left open over hatching. Marks
    are filled with the colour of the true loss at their weights, which may lie off the plane.

    Args:
        frame: the tidy rows of one study.
        kind: ``filter``, ``eigenvectors``, ``adapters`` or ``trajectory``; None: all that were measured.
        space: ``full``, ``lora`` or another; None: all that were measured.
        seed: the training seed; None: the first one of each method, since surfaces of several cannot be averaged.

    Raises:
        NothingToDraw: no such surface was measured.
        UserError: a surface holds the same point twice, or its points are no grid.
    """
    groups = surfaces(surface_table(frame, kind, space, seed))
    alone = len(groups) == 1 and len(groups[0]) == 1
    width = COLUMN if alone else PAGE
    abreast = _ABREAST.get(max(len(group) for group in groups), 3)
    side = min(_LARGEST, (width - 1.1) / abreast - 0.48)
    heights = [_height(group, abreast, side) for group in groups]
    words = surface_caption(groups)
    lines = len(words) / (18.6 * width) + 1
    layout = ConstrainedLayoutEngine(w_pad=0.04, h_pad=0.04, wspace=0.02, hspace=0.02)
    figure = canvas.Drawing(figsize=(width, sum(heights) + 0.12 * lines), layout=layout)
    parts = figure.subfigures(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    drawn = []
    for part, group in zip(parts, groups, strict=True):
        title = textwrap.fill(space_and_kind(group[0]), width=int(width / 0.077))
        part.suptitle(title, fontsize=8, fontweight="bold")
        drawn += _draw_group(part, group, abreast, side)
    canvas.caption(figure, words, width)
    figure.draw_without_rendering()
    unlabelled = sum(_label(*panel) for panel in drawn)
    if unlabelled:
        some = "One mark has" if unlabelled == 1 else f"{unlabelled} marks have"
        canvas.caption(figure, f"{words} {some} no label for want of room.", width)
    return figure


def _height(group: Sequence[Surface], abreast: int, side: float) -> float:
    deep = math.ceil(len(group) / abreast)
    tall = _tall(group, side)
    if _alike(group):
        return 0.6 + deep * (tall + 0.42)
    return 0.4 + deep * (tall + 0.48 + 0.13 * max(_label_lines(surface, side) for surface in group))


def _tall(group: Sequence[Surface], side: float) -> float:
    """Inches of a panel's height."""
    return min(side * _aspect(group), _LARGEST)


def _alike(group: Sequence[Surface]) -> bool:
    """Whether several panels all have the same labels."""
    return len(group) > 1 and len({(axis_label(surface, 0), axis_label(surface, 1)) for surface in group}) == 1


def _aspect(group: Sequence[Surface]) -> float:
    """Height over width of a panel."""
    ratio = _ratio(group)
    return ratio if 1 / _LONG <= ratio <= _LONG else 1.0


def _ratio(group: Sequence[Surface]) -> float:
    """Height over width of the window."""
    (left, right), (bottom, top) = window_for(group)
    return (top - bottom) / (right - left)


def _wrapped(text: str, side: float) -> str:
    return textwrap.fill(text, width=max(int(side / _LETTER), 12), break_on_hyphens=False)


def _label_lines(surface: Surface, side: float) -> int:
    return _wrapped(axis_label(surface, 0), side).count("\n") + 1


def _draw_group(
    part: SubFigure, group: Sequence[Surface], abreast: int, side: float
) -> list[tuple[Axes, Surface, ContourSet, list[str]]]:
    """The panels of one scale with their colour bar."""
    grid = part.subplots(math.ceil(len(group) / abreast), abreast, squeeze=False)
    scale = scale_for(group)
    alike = _alike(group)
    if alike:
        part.supxlabel(axis_label(group[0], 0), fontsize=8)
        part.supylabel(_wrapped(axis_label(group[0], 1), len(grid) * _tall(group, side)), fontsize=8)
    drawn = []
    for position, axes in enumerate(grid.flat):
        if position >= len(group):
            axes.set_visible(False)
            continue
        surface = group[position]
        drawn.append((axes, surface, *_draw_surface(axes, surface, scale)))
        _set_window(axes, surface, group, side)
        axes.set_title(surface.method, pad=3)
        if not alike:
            axes.set_xlabel(_wrapped(axis_label(surface, 0), side))
            axes.set_ylabel(_wrapped(axis_label(surface, 1), _tall(group, side)))
    colours = ScalarMappable(Normalize(*scale.ends), mpl.colormaps[_COLOURS])
    bar = part.colorbar(colours, ax=grid, aspect=18 if len(group) > 1 else 14, pad=0.02, fraction=0.05)
    at, labels = scale.ticks_apart(_TICK / (len(grid) * _tall(group, side)))
    bar.set_ticks(scale.height(np.array(at)).tolist(), labels=labels)
    bar.minorticks_off()
    bar.ax.tick_params(labelsize=7)
    bar.set_label("excess loss" + (f" ({group[0].split})" if group[0].split else ""), fontsize=7.5)
    return drawn


def _draw_surface(axes: Axes, surface: Surface, scale: Scale) -> tuple[ContourSet, list[str]]:
    """Fill, lines, centre, marks and what is not finite; returns the contour lines and their numbers."""
    heights = np.ma.masked_invalid(scale.height(surface.excess))
    low, high = scale.ends
    axes.grid(visible=False)
    axes.spines[:].set_visible(True)
    below = axes.fill_between(surface.x[[0, -1]], surface.y[0], surface.y[-1], facecolor="0.93", edgecolor="0.6")
    below.set(hatch="////", linewidth=0, zorder=0, label=OPEN)
    # Extended, so that rounding at the ends of the scale leaves no finite loss unfilled.
    fill = axes.contourf(
        surface.x, surface.y, heights, np.linspace(low, high, _BANDS + 1), cmap=_COLOURS, vmin=low, vmax=high,
        extend="both", zorder=1,
    )  # fmt: skip
    fill.set(edgecolor="face", linewidth=0.2, label=FILL)  # no hairlines between the bands of a PDF
    levels, names = _levels(surface, scale)
    lines = axes.contour(surface.x, surface.y, heights, levels, colors="white", linewidths=0.6, zorder=2)
    lines.set(linestyle=["--" if level < 0 else "-" for level in levels])
    for text in axes.clabel(lines, fmt=dict(zip(levels, names, strict=True)), fontsize=7, inline=False):
        text.set_path_effects([])
        text.set(color="white", bbox={"facecolor": "0.15", "alpha": 0.55, "pad": 0.6, "linewidth": 0}, zorder=3)
        text.set_clip_on(True)
        text.set_in_layout(False)
    across, up = np.meshgrid(surface.x, surface.y)
    lost, alone = ~np.isfinite(surface.loss), surface.alone(3)
    colour: dict[str, Any] = {"c": heights[alone], "cmap": _COLOURS, "vmin": low, "vmax": high}
    axes.scatter(across[alone], up[alone], s=14, marker="s", linewidths=0, zorder=1, label=ALONE, **colour)
    (crosses,) = axes.plot(across[lost], up[lost], linestyle="none", marker="x", color="black", markersize=2.5)
    crosses.set(markeredgewidth=0.6, label=NOT_FINITE)
    if surface.kind == "trajectory":
        axes.plot(surface.marks["x"], surface.marks["y"], color="white", linewidth=2.2, zorder=4, label="_path")
        axes.plot(surface.marks["x"], surface.marks["y"], color="black", linewidth=1.0, zorder=4, label="_path")
    axes.plot(0, 0, marker="+", color="white", markersize=9, markeredgewidth=2.4, zorder=5)
    axes.plot(0, 0, marker="+", color="black", markersize=8, markeredgewidth=1.0, zorder=5)
    filled = scale.height(surface.marks["excess"].to_numpy(float))
    dots = axes.scatter(surface.marks["x"], surface.marks["y"], s=24, zorder=6, label=MARKS, linewidths=0.4)
    dots.set(edgecolor="white", path_effects=[effects.withStroke(linewidth=1.6, foreground="black")])
    dots.set_facecolor([
        "white" if np.isnan(at) else mpl.colormaps[_COLOURS](Normalize(low, high)(at)) for at in filled
    ])  # fmt: skip
    return lines, names


def _set_window(axes: Axes, surface: Surface, group: Sequence[Surface], side: float) -> None:
    """The axes that all panels of the group share, and a word in the widest part that this surface does not reach."""
    window = window_for(group)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    axes.set_xlim(*window[0])
    axes.set_ylim(*window[1])
    if math.isclose(_aspect(group), _ratio(group)):
        axes.set_aspect("equal")
    empty = []
    for which, at in enumerate((surface.x, surface.y)):
        low, high = window[which]
        inches = (side if which == 0 else _tall(group, side)) / (high - low)
        empty += [
            ((at[0] - low) * inches, which, (low + at[0]) / 2),
            ((high - at[-1]) * inches, which, (at[-1] + high) / 2),
        ]
    room, which, place = max(empty)
    if room < _WORD:
        return
    middle = sum(window[1 - which]) / 2
    x, y = (place, middle) if which == 0 else (middle, place)
    text = axes.text(x, y, "not sampled", fontsize=7, color="0.4", ha="center", va="center", gid=NOT_SAMPLED)
    text.set(rotation=90 if which == 0 else 0, in_layout=False)


def _levels(surface: Surface, scale: Scale) -> tuple[list[float], list[str]]:
    """Heights of the contour lines within the surface, and their labels in units of the loss."""
    excess = surface.excess[np.isfinite(surface.excess)]
    low, high = (float(excess.min()), float(excess.max())) if len(excess) else (0.0, 0.0)
    largest = max(high, -low)
    first = round(math.log10(scale.threshold))
    tens = range(first, math.ceil(math.log10(max(largest, scale.threshold))) + 1)
    zero = [0.0] if low < -scale.threshold else []
    levels: list[float] = zero
    for steps in _STEPS:
        sizes = [step * 10.0**ten for ten in tens for step in steps]
        levels = sorted([*zero, *(e for size in sizes for e in (-size, size) if low < e < high)])
        if len(levels) <= _LINES:
            break
    else:
        levels = levels[:: -math.ceil(len(levels) / _LINES)][::-1]
    return scale.height(np.array(levels)).tolist(), [_number(level) for level in levels]


def _number(value: float) -> str:
    """A plain number where it is short, else a multiple of a power of ten."""
    size = abs(value)
    if size == 0 or 0.9e-3 < size < 9e3:
        return f"{value:.6g}".replace("-", "−")
    mantissa, exponent = f"{size:.0e}".split("e")
    factor = "" if mantissa == "1" else mantissa + r"\cdot "
    return f"${'-' * (value < 0)}{factor}10^{{{int(exponent)}}}$"


def _label(axes: Axes, surface: Surface, lines: ContourSet, names: list[str]) -> int:
    """Labels of the marks, the ends of a path first, and no number that covers one; returns how many found no place."""
    order = list(range(len(surface.marks)))
    if surface.kind == "trajectory":
        order = sorted(order, key=lambda number: number not in (0, len(order) - 1))
    marks = surface.marks.iloc[order]
    points = list(zip(marks["x"], marks["y"], strict=True))
    lost = place_labels(axes, points, marks["label"].tolist())
    settle_numbers(axes, lines, names, [*points, (0.0, 0.0)])
    return lost
