"""How much of the best ascent in full space each method's perturbation attains."""

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.plots import canvas
from analysis.plots.overlap import kinds_in_order
from analysis.plots.style import PAGE, styles_for


def efficiency_table(frame: pd.DataFrame, confidence: float = 0.95) -> pd.DataFrame:
    """What :func:`efficiency_bars` draws: one row per method, perturbation, radius and seed, with the mean over seeds.

    Raises:
        NothingToDraw: no efficiency was measured.
    """
    rows = canvas.chosen(frame, "efficiency", "efficiency")
    table = canvas.seeds_and_means(rows, confidence).drop(columns="chance")
    return table.sort_values(["split", "radius", "kind", "method", "seed"], ignore_index=True)


@canvas.styled
def efficiency_bars(frame: pd.DataFrame, confidence: float = 0.95) -> Figure:
    """Loss rise of each perturbation over the best rise found at the same ‖eps_W‖, per method; a row a radius.

    Raises:
        NothingToDraw: no efficiency was measured.
    """
    styles = styles_for(frame["method"])
    table = efficiency_table(frame, confidence)
    panels = canvas.variants(table, ["split", "radius"])
    kinds = kinds_in_order(table)
    figure, grid = canvas.panels(len(panels), 1, PAGE, 0.85 + 1.9 * len(panels), sharey="all")
    for (split, radius), (axes,) in zip(panels, grid, strict=True):
        here = table[(table["split"] == split) & (table["radius"] == radius)]
        canvas.draw_kinds(axes, here, kinds, styles)
        axes.axhline(1, color="black", linewidth=1, linestyle="--")
        axes.axhline(0, color="0.3", linewidth=0.7)
        low, high = canvas.spread_limits(here)
        axes.set_ylim(min(low, -0.05), max(high, 1.08))
        axes.set_ylabel(f"share of the best rise\nat {canvas.EPS_W} = {radius:g}" + (f" ({split})" if split else ""))
    best = Line2D([], [], color="black", linestyle="--", linewidth=1, label="best found")
    canvas.legend(figure, [*canvas.bar_handles(styles, table["method"]), best], PAGE)
    words = (
        "Loss rise of perturbations of equal length in full space, over the best found by multi-step ascent, a lower "
        "bound of the maximum. Isotropic noise is the level of chance. Dots: training seeds. "
    )
    words += canvas.interval_words(table, "whiskers", confidence) + canvas.subset_words(frame, "efficiency")
    lost = int(table["n_non_finite"].sum())
    canvas.caption(figure, words + (f" {lost} values undefined." if lost else ""), PAGE)
    return figure
