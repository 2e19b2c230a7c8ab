"""The loss on the straight path between two solutions.

``L((1−t)·w_A + t·w_B)`` for t in [0, 1], with its barrier ``max_t [L(t) − ((1−t)·L(0) + t·L(1))]`` (Frankle et al.,
2020, arXiv:1912.05671).
"""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.plots import canvas
from analysis.plots.style import COLUMN, PAGE, MethodStyle, spare_styles, styles_for
from analysis.space_names import in_space_order
from analysis.statistics import summarize

BARRIER = "_barrier"
"""Label of the lines from the chord up to a curve."""

_PLACE = ["space", "split", "method", "label"]


def connectivity_table(frame: pd.DataFrame, confidence: float = 0.95, quantity: str = "loss") -> pd.DataFrame:
    """What :func:`connectivity_curves` draws: the mean and interval at each t (``radius``) of every method and pair.

    ``pair`` names the line: the label of the two ends, after the method's where several methods have the same label.
    Rows of quantity ``barrier`` hold the mean barrier of each pair.

    Raises:
        NothingToDraw: the path was not measured.
    """
    rows = canvas.chosen(frame, "connectivity", quantity).assign(index=-1)
    barriers = frame[(frame["measure"] == "connectivity") & (frame["quantity"] == "barrier")]
    if quantity == "loss" and len(barriers):
        rows = pd.concat([rows, barriers.assign(index=-1, radius=np.nan)])  # each seed has its barrier elsewhere
    table = summarize(rows, confidence)
    shared = table.groupby("label")["method"].transform("nunique") > 1
    table["pair"] = table["label"].where(~shared & (table["label"] != ""), table["method"] + ": " + table["label"])
    table["pair"] = table["pair"].str.removesuffix(": ")
    return table.sort_values(["split", "space", "method", "label", "quantity", "radius"], ignore_index=True)


@canvas.styled
def connectivity_curves(frame: pd.DataFrame, confidence: float = 0.95, quantity: str = "loss") -> Figure:
    """The loss along the path between two solutions, a line a pair, with the band over seeds and the barrier.

    Args:
        frame: the tidy rows of one study.
        confidence: level of the band, in (0, 1).
        quantity: ``loss`` or ``accuracy``.

    Raises:
        NothingToDraw: the path was not measured.
    """
    table = connectivity_table(frame, confidence, quantity)
    curves = table[table["quantity"] == quantity]
    spaces, splits = in_space_order(curves["space"]), canvas.variants(curves, ["split"])
    width = COLUMN if len(spaces) * len(splits) == 1 else PAGE
    looks = _looks(curves)
    entries = max(curves.groupby(["space", "split"])["pair"].nunique())
    height = 0.7 + len(splits) * (2.2 + 0.15 * entries)
    figure, grid = canvas.panels(len(splits), len(spaces), width, height)
    lost = 0
    for (split,), line in zip(splits, grid, strict=True):
        for space, axes in zip(spaces, line, strict=True):
            panel = table[(table["space"] == space) & (table["split"] == split)]
            axes.set_title(canvas.space_title(space))
            if panel.empty:
                axes.set_axis_off()
                continue
            lost += _draw_panel(axes, panel, looks, quantity)
            axes.set_xlabel("t, from the first to the second")
            axes.set_xlim(0, 1)
            axes.set_ylim(*canvas.spread_limits(panel[panel["quantity"] == quantity]))
        line[0].set_ylabel(quantity + (f" ({split})" if split else ""))
    words = "Line: mean over seeds. " if curves["n_seeds"].max() > 1 else ""
    words += canvas.interval_words(curves, "band", confidence)
    if (table["quantity"] == "barrier").any():
        words += " Barrier: largest excess over the chord between the ends (dotted where the mean curve has it)"
        words += f", ± half its {100 * confidence:g} % interval." if table["n_seeds"].max() > 1 else "."
        words += " It is negative where the path lies below the chord."
    words += " The paths of the two spaces differ." if len(spaces) > 1 else ""
    words += canvas.subset_words(frame, "connectivity")
    if lost:
        words += f" Hollow markers at the top edge: {lost} values there are not finite and are left out of the means."
    canvas.caption(figure, words, width)
    return figure


def _looks(curves: pd.DataFrame) -> dict[str, MethodStyle]:
    """A look for every pair: that of its method where each method has one pair."""
    pairs = curves[["method", "pair"]].drop_duplicates()
    if pairs["method"].is_unique:
        styles = styles_for(pairs["method"])
        return {pairs.loc[pairs["method"] == m, "pair"].iloc[0]: look for m, look in styles.items()}
    return spare_styles(pairs["pair"])


def _draw_panel(axes: Axes, panel: pd.DataFrame, looks: dict[str, MethodStyle], quantity: str) -> int:
    """Curves, bands, barriers and the legend below; returns how many values are not finite."""
    handles, lost = [], 0
    for position, (pair, look) in enumerate(looks.items()):
        curve = panel[(panel["pair"] == pair) & (panel["quantity"] == quantity)]
        if curve.empty:
            continue
        axes.plot(curve["radius"], curve["mean"], color=look.colour, linestyle=look.line, zorder=3)
        band = axes.fill_between(curve["radius"], curve["low"], curve["high"])
        band.set(color=look.colour, alpha=0.13, linewidth=0)
        name = pair
        barrier = panel[(panel["pair"] == pair) & (panel["quantity"] == "barrier")]
        if len(barrier):
            name += f": barrier {_number(barrier['mean'].iloc[0], barrier['half_width'].iloc[0])}"
            _draw_barrier(axes, curve, look)
        broken = curve[curve["n_non_finite"] > 0]
        height = np.full(len(broken), 0.985 - 0.04 * position)
        (marks,) = axes.plot(broken["radius"], height, linestyle="none", transform=axes.get_xaxis_transform())
        marks.set(marker=look.marker, markersize=5, markerfacecolor="white", markeredgecolor=look.colour)
        marks.set(zorder=5, label=canvas.NON_FINITE, clip_on=False, in_layout=False)
        lost += int(curve["n_non_finite"].sum())
        handles.append(Line2D([], [], color=look.colour, linestyle=look.line, label=name))
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(0, -0.24), borderaxespad=0, fontsize=7)
    return lost


def _draw_barrier(axes: Axes, curve: pd.DataFrame, look: MethodStyle) -> None:
    """From the chord to the mean curve, where they are farthest apart."""
    t, mean = curve["radius"].to_numpy(float), curve["mean"].to_numpy(float)
    if not np.isfinite(mean[[0, -1]]).all() or len(t) < 3:
        return
    chord = mean[0] + (mean[-1] - mean[0]) * (t - t[0]) / (t[-1] - t[0])
    at = 1 + int(np.nanargmax((mean - chord)[1:-1])) if np.isfinite(mean[1:-1]).any() else 0
    if at:
        axes.plot([t[at]] * 2, [chord[at], mean[at]], color=look.colour, linestyle=":", linewidth=1, label=BARRIER)
        axes.plot([t[0], t[-1]], [mean[0], mean[-1]], color=look.colour, linewidth=0.5, alpha=0.5, label="_chord")
        axes.plot(t[at], mean[at], color=look.colour, marker=look.marker, markersize=4, label="_top", zorder=4)


def _number(value: float, half: float) -> str:
    if not np.isfinite(value):
        return "not finite"
    text = f"{value:.3g}" + (f" ± {half:.2g}" if np.isfinite(half) else "")
    return text.replace("-", "−")
