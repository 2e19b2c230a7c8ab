"""Singular values of the trained updates s·B·A, over all layers."""

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.plots import canvas
from analysis.plots.style import COLUMN, styles_for


def update_spectrum_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Median, lower and upper quartile over layers and training seeds of every singular value, by method and rank.

    Raises:
        NothingToDraw: no update was inspected.
    """
    rows = canvas.chosen(frame, "update", "singular_value")
    table = rows.groupby(["method", "index"], sort=False).agg(
        median=("value", "median"),
        low=("value", lambda values: values.quantile(0.25)),
        high=("value", lambda values: values.quantile(0.75)),
        layers=("layer", "nunique"),
        n_seeds=("seed", "nunique"),
    )
    return table.reset_index().sort_values(["method", "index"], ignore_index=True)


@canvas.styled
def update_spectrum(frame: pd.DataFrame) -> Figure:
    """Singular values of s·B·A by rank, a line a method: medians over layers and seeds, with the middle half as a band.

    Raises:
        NothingToDraw: no update was inspected.
    """
    table = update_spectrum_table(frame)
    styles = styles_for(frame["method"])
    figure, grid = canvas.panels(1, 1, COLUMN, canvas.height_for(1, COLUMN))
    axes = grid[0, 0]
    for method, look in styles.items():
        curve = table[table["method"] == method]
        axes.plot(curve["index"], curve["median"], color=look.colour, linestyle=look.line, marker=look.marker)
        axes.fill_between(curve["index"], curve["low"], curve["high"], color=look.colour, alpha=0.13, linewidth=0)
    positive = table["median"][table["median"] > 0]
    if canvas.spans(positive, canvas.DECADES):
        axes.set_yscale("log")
    axes.set_xlabel("rank i")
    axes.set_ylabel(r"singular value $\sigma_i$ of $s\,B\,A$")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    canvas.legend(figure, canvas.line_handles(styles, table["method"], markers=True), COLUMN)
    layers, seeds = int(table["layers"].max()), int(table["n_seeds"].max())
    many = f"{layers} layers and {seeds} training seed{'s' * (seeds != 1)}"
    words = f"Line: median over {many}. Band: the middle half of them."
    canvas.caption(figure, words, COLUMN)
    return figure
