"""Largest Hessian eigenvalues of each method, LoRA space beside full space."""

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.plots import canvas
from analysis.plots.style import PAGE, in_space_order, styles_for
from analysis.statistics import KEYS, per_seed, summarize

UNCONVERGED = "_unconverged"
"""Label of the crosses."""

TOLERANCE = 1e-2
"""Relative residual above which an eigenvalue counts as not converged, where the rows do not say."""


def eigenvalue_table(frame: pd.DataFrame, confidence: float = 0.95) -> pd.DataFrame:
    """What :func:`eigenvalue_bars` draws: one row per method, space, rank and seed, with the mean over seeds beside it.

    ``converged`` is the solver's own word where there is one, else whether ``residual`` is at most :data:`TOLERANCE`.

    Raises:
        NothingToDraw: the spectrum was not measured.
    """
    rows = canvas.chosen(frame, "spectrum", "eigenvalue")
    rows = rows[rows["layer"] == ""]
    keys = ["method", *KEYS]
    means = summarize(rows, confidence)[[*keys, "mean", "low", "high", "n_seeds"]]
    table = per_seed(rows).drop(columns=["induced_norm", "chance", "n_directions"]).merge(means, on=keys)
    found = frame[(frame["measure"] == "spectrum") & (frame["quantity"] == "converged")]
    pair = ["method", "seed", "space", "kind", "split", "layer", "index"]
    table = table.merge(found[[*pair, "value"]].rename(columns={"value": "converged"}), on=pair, how="left")
    table["converged"] = table["converged"].fillna(table["residual"] <= TOLERANCE).astype(bool)
    return table.sort_values(["kind", "split", "space", "method", "index", "seed"], ignore_index=True)


@canvas.styled
def eigenvalue_bars(frame: pd.DataFrame, confidence: float = 0.95) -> Figure:
    """Mean eigenvalue per rank and method as a bar, its interval as a whisker, every seed as a dot.

    Eigenvalues that have not converged get a cross.

    Args:
        frame: the tidy rows of one study.
        confidence: level of the whiskers, in (0, 1).

    Raises:
        NothingToDraw: the spectrum was not measured.
    """
    styles = styles_for(frame["method"])
    table = eigenvalue_table(frame, confidence)
    spaces, kinds = in_space_order(table["space"]), canvas.variants(table, ["kind", "split"])
    figure, grid = canvas.panels(len(kinds), len(spaces), PAGE, 0.75 + 2.1 * len(kinds))
    unconverged = 0
    for (kind, split), line in zip(kinds, grid, strict=True):
        for space, axes in zip(spaces, line, strict=True):
            panel = table[(table["space"] == space) & (table["kind"] == kind) & (table["split"] == split)]
            present = [m for m in styles if m in set(panel["method"])]
            width = 0.82 / max(len(present), 1)
            for position, method in enumerate(present):
                look = styles[method]
                seeds = panel[panel["method"] == method]
                shift = (position - (len(present) - 1) / 2) * width
                for rank in seeds["index"].unique():
                    values = seeds[seeds["index"] == rank]
                    canvas.draw_bar(axes, rank + shift, values.iloc[0], values["value"], look, width)
                loose = seeds[~seeds["converged"]]
                (crosses,) = axes.plot(
                    loose["index"] + shift, loose["value"], linestyle="none", marker="x", color="black"
                )
                crosses.set(markersize=6, zorder=4, label=UNCONVERGED)
                unconverged += len(loose)
            axes.axhline(0, color="0.25", linewidth=0.7)
            low, high = canvas.spread_limits(panel.assign(mean=panel["value"]))
            axes.set_ylim(min(low, 0), max(high, 0))
            ranks = sorted(panel["index"].unique())
            axes.set_xticks(ranks)
            if len(ranks) < 3:  # two or three methods would be walls
                axes.set_xlim(ranks[0] - 1.2, ranks[-1] + 1.2)
            axes.tick_params(axis="x", length=0)
            axes.grid(visible=False, axis="x")
            axes.set_title(canvas.space_title(space))
            axes.set_xlabel(f"rank ({kind or 'by magnitude'})")
        line[0].set_ylabel("Hessian eigenvalue λ" + (f" ({split})" if split else ""))
    dot = Line2D([], [], marker="o", markersize=3, color="0.4", linestyle="none", label="one seed")
    canvas.legend(figure, [*canvas.bar_handles(styles, table["method"]), dot], PAGE)
    words = canvas.interval_words(table, "whiskers", confidence)
    words += " The axes differ: factor curvature and curvature in W have different units."
    if unconverged:
        worst = float(table.loc[~table["converged"], "residual"].max())
        words += f" Crosses: {unconverged} eigenvalues not converged, relative residual up to {worst:.1g}."
    lost = int((table["n_non_finite"] > 0).sum())
    canvas.caption(figure, words + (f" {lost} eigenvalues are not finite and not drawn." if lost else ""), PAGE)
    return figure
