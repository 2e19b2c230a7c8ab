"""Loss rise over perturbation radius, random and adversarial, both spaces side by side."""

from typing import Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

from analysis.plots import canvas
from analysis.plots.spread import spread_table, spread_words
from analysis.plots.style import styles_for
from analysis.space_names import in_space_order

X = Literal["radius", "induced_norm"]


def perturbation_table(
    frame: pd.DataFrame, measure: str = "random", quantity: str = "loss_rise", confidence: float = 0.95
) -> pd.DataFrame:
    """The means and intervals that :func:`perturbation_curves` draws: one row per method, space, kind, split, radius.

    Raises:
        NothingToDraw: the quantity was not measured.
    """
    return spread_table(canvas.chosen(frame, measure, quantity), confidence).sort_values(
        ["kind", "split", "space", "method", "radius"], ignore_index=True
    )


@canvas.styled
def perturbation_curves(
    frame: pd.DataFrame,
    measure: str = "random",
    *,
    quantity: str = "loss_rise",
    x: X = "radius",
    confidence: float = 0.95,
) -> Figure:
    """A quantity over the radius of a perturbation; one panel per space, one row per kind and split.

    Args:
        frame: the tidy rows of one study.
        measure: ``"random"``, ``"adversarial"`` or ``"read_noise"``.
        quantity: ``loss_rise``, or ``loss``, ``accuracy`` where measured.
        x: ``"radius"``, whose unit differs between spaces and kinds, or ``"induced_norm"``, the realised ‖eps_W‖, which
            makes the spaces comparable.
        confidence: level of the whiskers, in (0, 1).

    Raises:
        NothingToDraw: the quantity was not measured.
    """
    styles = styles_for(frame["method"])
    table = perturbation_table(frame, measure, quantity, confidence)
    spaces, kinds = in_space_order(table["space"]), canvas.variants(table, ["kind", "split"])
    shared = x == "induced_norm"
    width = canvas.width_for(spaces)
    figure, grid = canvas.panels(
        len(kinds), len(spaces), width, canvas.height_for(len(kinds), width),
        sharex="row" if shared else "none", sharey="row",
    )  # fmt: skip
    lost, reaches_zero = 0, False
    for (kind, split), line in zip(kinds, grid, strict=True):
        of_kind = table[(table["kind"] == kind) & (table["split"] == split)]
        log_y = quantity == "loss_rise" and canvas.spans(of_kind["mean"], canvas.DECADES)
        for space, axes in zip(spaces, line, strict=True):
            panel = of_kind[of_kind["space"] == space]
            log_x = canvas.spans(of_kind[x] if shared else panel[x], 5)
            for position, (method, look) in enumerate(styles.items()):
                curve = panel[panel["method"] == method]
                at = curve[x] if shared else canvas.dodged(curve[x], position - (len(styles) - 1) / 2, log_x)
                whiskers = np.stack([curve["mean"] - curve["low"], curve["high"] - curve["mean"]])
                bars = axes.errorbar(at, curve["mean"], whiskers, elinewidth=0.8, color=look.colour, marker=look.marker)
                bars.lines[0].set(linestyle=look.line, markeredgewidth=0)
            _x_ticks(axes, panel[x], log=log_x, at_values=not shared)
            if log_y:
                axes.set_yscale("log")
                axes.set_ylim(*canvas.log_limits(of_kind))
                reaches_zero |= bool((panel["low"] <= 0).any())
            else:
                axes.set_ylim(*canvas.spread_limits(of_kind))
            axes.set_title(canvas.space_title(space))
            axes.set_xlabel(_x_label(x, space, "read" if measure == "read_noise" else kind))
            lost += canvas.mark_non_finite(axes, panel, styles, x)
        line[0].set_ylabel(_y_label(quantity, measure, kind, split))
    canvas.legend(figure, canvas.line_handles(styles, table["method"], markers=True), width)
    words = spread_words(table, "whiskers", confidence)
    if measure in ("random", "read_noise"):
        each = " per seed" if table["n_seeds"].max() > 1 else ""
        words = f"Mean over {int(table['n_directions'].min())} directions{each}. {words}"
    if reaches_zero:
        words += " Whiskers that meet the lower edge reach 0 or below."
    words += (
        rf" Equal {canvas.EPS_W} can be compared across panels."
        if shared
        else " Points of one radius are set side by side."
    )
    words += " Radii of the two spaces are not comparable." if not shared and len(spaces) > 1 else ""
    words += canvas.subset_words(frame, measure)
    canvas.caption(figure, words + canvas.non_finite_words(lost), width)
    return figure


def _x_ticks(axes: Axes, values: pd.Series, *, log: bool, at_values: bool) -> None:
    """Plain numbers; on a log axis at the measured radii where those are few."""
    if not log:
        axes.xaxis.set_major_locator(MaxNLocator(5))
        return
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    measured = sorted(values.unique())
    if at_values and len(measured) <= 6:
        axes.set_xticks(measured)
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
        axes.xaxis.set_minor_formatter(NullFormatter())


def _x_label(x: X, space: str, kind: str) -> str:
    if x == "induced_norm":
        return f"induced {canvas.EPS_W}"
    if kind == "filter":
        return r"noise strength $\sigma$, relative to row norms"
    if kind == "read":
        return r"read noise $\sigma$, relative to each weight"
    return canvas.radius_label(space, "isotropic")


def _y_label(quantity: str, measure: str, kind: str, split: str) -> str:
    what = {"loss_rise": "loss rise", "matthews": "Matthews correlation"}.get(quantity, quantity)
    named = {"adversarial": "gradient step", "read_noise": f"read noise on {kind} weights"}
    direction = named.get(measure, f"{kind} noise" if kind else measure)
    return f"{what}, {direction}" + (f"\n({split})" if split else "")
