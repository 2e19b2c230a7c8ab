"""The loss along filter-normalised random lines, LoRA space beside full space."""

import pandas as pd
from matplotlib.figure import Figure

from analysis.core.space import FACTORED
from analysis.plots import canvas
from analysis.plots.spread import spread_table, spread_words
from analysis.plots.style import styles_for
from analysis.space_names import in_space_order


def landscape_table(frame: pd.DataFrame, confidence: float = 0.95, *, rise: bool = True) -> pd.DataFrame:
    """The means and intervals that :func:`landscape_lines` draws: one row per method, space, split and coordinate.

    With ``rise`` each line's own loss at α = 0 is subtracted before anything is averaged.

    Raises:
        NothingToDraw: the landscape was not measured.
    """
    rows = canvas.chosen(frame, "landscape", "loss")
    if rise:
        line = ["method", "seed", "space", "kind", "split", "index"]
        centre = rows.loc[rows["radius"] == 0, [*line, "value"]].rename(columns={"value": "centre"})
        rows = rows.merge(centre, on=line, how="left")
        rows["value"] = rows["value"] - rows["centre"]
    return spread_table(rows, confidence).sort_values(["split", "space", "method", "radius"], ignore_index=True)


@canvas.styled
def landscape_lines(frame: pd.DataFrame, confidence: float = 0.95, *, rise: bool = True) -> Figure:
    """Mean loss over the filter-normalised distance α, with its interval; all panels share the loss axis.

    The interval is over training seeds, or over directions where there is one seed. Directions are averaged within a
    training seed before seeds are compared. Training seeds end at different losses, by more than the lines bend; the
    rise over the loss at α = 0 shows the shape, which is what flatness is about.

    Args:
        frame: the tidy rows of one study.
        confidence: level of the band, in (0, 1).
        rise: draw the rise over each line's loss at α = 0; False draws the loss itself.

    Raises:
        NothingToDraw: the landscape was not measured.
    """
    styles = styles_for(frame["method"])
    table = landscape_table(frame, confidence, rise=rise)
    spaces, splits = in_space_order(table["space"]), canvas.variants(table, ["split"])
    width = canvas.width_for(spaces)
    figure, grid = canvas.panels(
        len(splits), len(spaces), width, canvas.height_for(len(splits), width, row=2.1), sharey="all"
    )
    lost = 0
    for (split,), line in zip(splits, grid, strict=True):
        for space, axes in zip(spaces, line, strict=True):
            panel = table[(table["space"] == space) & (table["split"] == split)]
            for method, look in styles.items():
                curve = panel[panel["method"] == method]
                axes.plot(curve["radius"], curve["mean"], color=look.colour, linestyle=look.line)
                band = axes.fill_between(curve["radius"], curve["low"], curve["high"])
                band.set(color=look.colour, alpha=0.13, linewidth=0)
            axes.set_ylim(*canvas.spread_limits(table))
            axes.set_title(canvas.space_title(space))
            axes.set_xlabel(f"filter-normalised distance α in {'(A, B)' if space in FACTORED else 'W'}")
            axes.margins(x=0)
            lost += canvas.mark_non_finite(axes, panel, styles, "radius")
        what = "loss rise over α = 0" if rise else "loss"
        line[0].set_ylabel(what + (f"\n({split})" if split else ""))
    canvas.legend(figure, canvas.line_handles(styles, table["method"], markers=False), width)
    directions = int(table["n_directions"].min())
    each = f"{directions} random direction{'s' * (directions != 1)}"
    words = f"Line: mean over seeds of {each} each. " if table["n_seeds"].max() > 1 else f"Line: mean over {each}. "
    words += spread_words(table, "band", confidence)
    words += " The two α are not the same distance in W." if len(spaces) > 1 else ""
    words += canvas.subset_words(frame, "landscape")
    canvas.caption(figure, words + canvas.non_finite_words(lost), width)
    return figure
