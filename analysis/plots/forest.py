"""Forest plot: every method's difference to the baseline, in each headline quantity."""

import math
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.headlines import headline_rows
from analysis.plots import canvas
from analysis.plots.style import PAGE, MethodStyle, styles_for
from analysis.space_names import SPACE_TITLES
from analysis.statistics import KEYS, UNDECIDED, paired_differences, summarize

COLUMNS = ["headline", "space", "split", "method", "baseline", "mean", "difference", "relative", "low", "high"]
COLUMNS += ["cohen_dz", "p_holm", "n_seeds", "verdict"]


def forest_table(frame: pd.DataFrame, baseline: str | None = None, confidence: float = 0.95) -> pd.DataFrame:
    """What :func:`forest_plot` draws: one row per headline quantity and method.

    Args:
        frame: the tidy rows of one study.
        baseline: label of the method that is subtracted; default the first.
        confidence: level of the intervals, corrected over methods.

    Returns:
        ``mean`` of the baseline, ``difference`` to it, and ``relative``, ``low``, ``high``: difference and corrected
        interval in percent of the magnitude of that mean.

    Raises:
        NothingToDraw: no two methods were measured on the same seeds.
    """
    baseline = baseline or str(frame["method"].iloc[0])
    differences = paired_differences(frame, baseline, confidence)
    quality = differences[(differences["measure"] == "quality") & (differences["split"] == "validation")]
    quality = quality[quality["quantity"].isin(["accuracy", "loss"])]
    quality = quality.assign(headline=["validation " + quantity for quantity in quality["quantity"]])
    rows = pd.concat([quality, headline_rows(differences)], ignore_index=True)
    rows = rows[rows["n_seeds"] > 1]
    if rows.empty:
        raise canvas.NothingToDraw("no differences to draw: compare two methods on at least two seeds")
    means = summarize(frame[frame["method"] == baseline], confidence)[[*KEYS, "mean"]]
    table = rows.merge(means, on=KEYS, how="left")
    scale = 100 / table["mean"].abs().replace(0, math.nan)
    table["relative"] = table["difference"] * scale
    table["low"], table["high"] = table["corrected_low"] * scale, table["corrected_high"] * scale
    return table[COLUMNS]


@canvas.styled
def forest_plot(frame: pd.DataFrame, baseline: str | None = None, confidence: float = 0.95) -> Figure:
    """Differences to the baseline in percent of its mean, with corrected intervals; filled where they exclude 0.

    Raises:
        NothingToDraw: no two methods were measured on the same seeds.
    """
    table = forest_table(frame, baseline, confidence)
    styles = styles_for(frame["method"])
    against = str(table["baseline"].iloc[0])
    groups = [(key, part) for key, part in table.groupby(["headline", "space"], sort=False, dropna=False)]
    methods = [method for method in styles if method in set(table["method"])]
    lines = sum(len(part) for _, part in groups) + 0.8 * len(groups)
    figure, ((axes,),) = canvas.panels(1, 1, PAGE, 1.1 + 0.155 * lines)
    reach = _reach(table)
    y, ticks, names = 0.0, [], []
    for (headline, space), part in groups:
        where = f"\n{SPACE_TITLES.get(str(space), space)}" if space else ""
        ticks.append(y + (len(part) - 1) / 2)
        names.append(f"{headline}{where}")
        for method in methods:
            for row in part[part["method"] == method].to_dict("records"):
                _draw(axes, y, row, styles[method], reach)
                y += 1
        axes.axhline(y - 0.1, color="0.9", linewidth=0.6)
        y += 0.8
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlim(-reach, reach)
    axes.set_ylim(y - 0.8, -0.9)
    axes.set_yticks(ticks, names)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(f"difference to {against}, % of its mean")
    beyond = Line2D([], [], color="0.4", linestyle="none", marker=">", markersize=4, label="goes on")
    canvas.legend(figure, [*canvas.point_handles(styles, table["method"]), beyond], PAGE)
    seeds = sorted(table["n_seeds"].unique())
    words = (
        f"Mean over {seeds[0]}{f' to {seeds[-1]}' if len(seeds) > 1 else ''} training seeds, paired by seed, with "
        f"{100 * confidence:g} % intervals corrected by Holm's procedure over methods, not over lines. Filled: the "
        "interval excludes 0. Sharpness to the left of 0 is flatter."
    )
    lost = int(table["relative"].isna().sum())
    canvas.caption(figure, words + (f" {lost} differences undefined." if lost else ""), PAGE)
    return figure


def _reach(table: pd.DataFrame) -> float:
    """Half the width of the axis: all means, and intervals but the widest."""
    ends = table[["low", "high"]].abs().max(axis=1).dropna()
    centre = float(table["relative"].abs().max())
    wide = float(np.quantile(ends, 0.8)) if len(ends) else 0.0
    return 1.15 * max(centre, wide, 1.0)


def _draw(axes: Axes, y: float, row: Mapping[Hashable, Any], look: MethodStyle, reach: float) -> None:
    middle, low, high = (float(row[name]) for name in ("relative", "low", "high"))
    if math.isnan(middle):
        return
    if not math.isnan(low):
        axes.plot([max(low, -reach), min(high, reach)], [y, y], color=look.colour, linewidth=1.1)
        for end, marker in ((low, "<"), (high, ">")):
            if abs(end) > reach:
                edge = math.copysign(reach, end)
                axes.plot([edge], [y], marker=marker, markersize=3.5, color=look.colour, clip_on=False)
    filled = look.colour if row["verdict"] != UNDECIDED else "white"
    axes.plot([middle], [y], marker=look.marker, markersize=4.5, color=look.colour, markerfacecolor=filled, zorder=3)
