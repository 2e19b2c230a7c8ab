"""Loss rise of fixed perturbations as bars: rounding the weights, and Bi-LoRA's own auxiliary beside the gradient."""

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure

from analysis.plots import canvas
from analysis.plots.style import PAGE, styles_for

QUANTISED = {
    "int8": "int8",
    "nf4": "nf4",
    "int8 base": "int8 base,\nexact adapter",
    "nf4 base": "nf4 base,\nexact adapter",
}
ASCENTS = {"auxiliary": "auxiliary\ns₂·B₂A₂", "gradient": "gradient step\nof its length"}
KINDS: Mapping[str, Mapping[str, str]] = {"quantisation": QUANTISED, "ascent_gap": ASCENTS}
"""Measure → kind → its name on the axis."""
LABELS = {"quantisation": "loss rise of\nrounded weights", "ascent_gap": "loss rise"}


def rise_table(frame: pd.DataFrame, measure: str = "quantisation", confidence: float = 0.95) -> pd.DataFrame:
    """What :func:`rise_bars` draws: one row per method, kind, split and seed, with the mean over seeds.

    Raises:
        NothingToDraw: the measure was not taken.
    """
    table = canvas.seeds_and_means(canvas.chosen(frame, measure, "loss_rise"), confidence).drop(columns="chance")
    return table.sort_values(["split", "kind", "method", "seed"], ignore_index=True)


@canvas.styled
def rise_bars(frame: pd.DataFrame, measure: str = "quantisation", confidence: float = 0.95) -> Figure:
    """Loss rise of each kind of perturbation, per method; a row a split.

    Args:
        frame: the tidy rows of one study.
        measure: ``"quantisation"`` or ``"ascent_gap"``.
        confidence: level of the whiskers, in (0, 1).

    Raises:
        NothingToDraw: the measure was not taken.
    """
    styles = styles_for(frame["method"])
    table = rise_table(frame, measure, confidence)
    splits = canvas.variants(table, ["split"])
    known = KINDS[measure]
    kinds = {kind: name for kind, name in known.items() if kind in set(table["kind"])}
    figure, grid = canvas.panels(len(splits), 1, PAGE, 0.8 + 1.9 * len(splits))
    for (split,), (axes,) in zip(splits, grid, strict=True):
        here = table[table["split"] == split]
        canvas.draw_kinds(axes, here, kinds, styles)
        axes.axhline(0, color="0.3", linewidth=0.7)
        low, high = canvas.spread_limits(here)
        axes.set_ylim(min(low, 0), high)
        axes.set_ylabel(LABELS[measure] + (f" ({split})" if split else ""))
    canvas.legend(figure, canvas.bar_handles(styles, table["method"]), PAGE)
    words = "Dots: training seeds. " + canvas.interval_words(table, "whiskers", confidence)
    words += canvas.subset_words(frame, measure)
    lost = int(table["n_non_finite"].sum())
    canvas.caption(figure, words + (f" {lost} values undefined." if lost else ""), PAGE)
    return figure
