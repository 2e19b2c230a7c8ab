"""Worst-case loss rise over the radius, and how the search for it converged.

``max_{‖δ‖ ≤ ρ} L(W + T∘δ) − L(W)`` is not known: what gradient steps find is a lower bound of it. The larger of two
searches is drawn, with each search and the first gradient step beside it.
"""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

from analysis.plots import canvas
from analysis.plots.spread import spread_table, spread_words
from analysis.plots.style import MethodStyle, styles_for
from analysis.space_names import in_space_order

ONE_STEP = "_one step"
"""Label of the dashes."""

_SEARCHES = {"loss_rise_pga": "^", "loss_rise_apgd": "v"}
_QUANTITIES = ["loss_rise", *_SEARCHES, "loss_rise_one_step"]
_LONE = 5.0  # radii wider apart than this factor are drawn on a logarithmic axis


def worst_case_table(frame: pd.DataFrame, confidence: float = 0.95) -> pd.DataFrame:
    """What :func:`worst_case_curves` draws: means and intervals of the lower bound, the searches, and their progress.

    Of quantity ``share_found``, at each step (``index``): the best rise so far over the final one of the same seed, at
    the largest radius of the space, where the search is hardest.

    Raises:
        NothingToDraw: the worst case was not measured.
    """
    canvas.chosen(frame, "worst_case", "loss_rise")
    rows = frame[(frame["measure"] == "worst_case") & frame["quantity"].isin(_QUANTITIES)]
    place = ["space", "kind", "split"]
    steps = frame[(frame["measure"] == "worst_case") & (frame["quantity"] == "best_rise")]
    steps = steps[steps["radius"] == steps.groupby(place)["radius"].transform("max")]
    last = steps.sort_values("index").groupby(["method", "seed", *place])["value"].transform("last")
    steps = steps.assign(quantity="share_found", value=(steps["value"] / last).where(last != 0, 1.0))
    return spread_table(pd.concat([rows, steps]), confidence).sort_values(
        [*place, "quantity", "method", "radius", "index"], ignore_index=True
    )


@canvas.styled
def worst_case_curves(frame: pd.DataFrame, confidence: float = 0.95) -> Figure:
    """The lower bound over the radius with what single searches found, and below it the progress of the search.

    Args:
        frame: the tidy rows of one study.
        confidence: level of the whiskers, in (0, 1).

    Raises:
        NothingToDraw: the worst case was not measured.
    """
    styles = styles_for(frame["method"])
    table = worst_case_table(frame, confidence)
    spaces, kinds = in_space_order(table["space"]), canvas.variants(table, ["kind", "split"])
    deep = [2 if _progress(table, kind, split) else 1 for kind, split in kinds]
    width = canvas.width_for(spaces)
    figure, grid = canvas.panels(sum(deep), len(spaces), width, canvas.height_for(sum(deep), width, 1.0), sharey="row")
    lines, lost, reaches_zero = iter(grid), 0, False
    for (kind, split), panels in zip(kinds, deep, strict=True):
        of_kind = table[(table["kind"] == kind) & (table["split"] == split)]
        line = next(lines)
        bounds = of_kind[of_kind["quantity"] == "loss_rise"]
        logarithmic = canvas.spans(bounds["mean"], canvas.DECADES)
        low, high = canvas.spread_limits(bounds)
        if logarithmic:
            drawn = of_kind.loc[of_kind["quantity"].isin(_QUANTITIES) & (of_kind["mean"] > 0), "mean"]
            low, high = float(drawn.min()) / 2, 2 * float(bounds["mean"].max())
            reaches_zero |= bool((bounds["low"] <= 0).any())
        for space, axes in zip(spaces, line, strict=True):
            panel = of_kind[of_kind["space"] == space]
            axes.set_title(canvas.space_title(space))
            if panel.empty:
                axes.set_axis_off()
                continue
            wide = canvas.spans(panel["radius"], _LONE)
            _draw_bounds(axes, panel, styles, wide)
            _at_radii(axes, panel["radius"].dropna(), wide)
            here = panel[panel["quantity"] == "loss_rise"]
            if logarithmic:
                axes.set_yscale("log")
            axes.set_ylim(low, high)
            axes.set_xlabel(canvas.radius_label(space, kind))
            lost += canvas.mark_non_finite(axes, here, styles, "radius")
        line[0].set_ylabel("worst loss rise, lower bound\n(" + ", ".join(word for word in (kind, split) if word) + ")")
        if panels == 2:
            _draw_progress(next(lines), of_kind, spaces, styles)
    canvas.legend(figure, [*canvas.line_handles(styles, table["method"], markers=False), *_kinds_of_line()], width)
    words = "Line: the larger of two searches, a lower bound of the worst case"
    words += ", mean over seeds. " if table["n_seeds"].max() > 1 else ". "
    words += spread_words(table[table["quantity"] == "loss_rise"], "whiskers", confidence)
    words += " Points of one radius are set side by side."
    words += " Whiskers that meet the lower edge reach 0 or below." if reaches_zero else ""
    if max(deep) == 2:
        words += " Lower panels: best rise by the step of the search over the last, at the largest radius; a curve that"
        words += " still climbs at its end has not converged."
    words += " Radii of the two spaces are not comparable." if len(spaces) > 1 else ""
    words += canvas.subset_words(frame, "worst_case")
    canvas.caption(figure, words + canvas.non_finite_words(lost), width)
    return figure


def _draw_bounds(axes: Axes, panel: pd.DataFrame, styles: dict[str, MethodStyle], wide: bool) -> None:
    for position, (method, look) in enumerate(styles.items()):
        mine = panel[panel["method"] == method]
        by = {
            name: found.assign(at=canvas.dodged(found["radius"], position - (len(styles) - 1) / 2, wide))
            for name, found in mine.groupby("quantity")
        }
        if "loss_rise" not in by:
            continue
        bound = by["loss_rise"]
        whiskers = np.stack([bound["mean"] - bound["low"], bound["high"] - bound["mean"]])
        bars = axes.errorbar(bound["at"], bound["mean"], whiskers, elinewidth=0.8, color=look.colour)
        bars.lines[0].set(linestyle=look.line)
        for quantity, marker in _SEARCHES.items():
            if quantity in by:
                (found,) = axes.plot(by[quantity]["at"], by[quantity]["mean"], linestyle="none", marker=marker)
                found.set(color=look.colour, markersize=4, markerfacecolor="white", markeredgewidth=0.8, zorder=3)
        if "loss_rise_one_step" in by:
            step = by["loss_rise_one_step"]
            (ticks,) = axes.plot(step["at"], step["mean"], linestyle="none", marker="_", label=ONE_STEP)
            ticks.set(color=look.colour, markersize=7, markeredgewidth=1.4)


def _at_radii(axes: Axes, radii: pd.Series, wide: bool) -> None:
    """Plain numbers, at the measured radii where those are few and far apart."""
    if not wide:
        axes.xaxis.set_major_locator(MaxNLocator(5))
        return
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    measured = sorted(radii.unique())
    axes.set_xticks(measured[:: -(-len(measured) // 6)])
    axes.xaxis.set_minor_locator(NullLocator())


def _draw_progress(line: np.ndarray, of_kind: pd.DataFrame, spaces: list[str], styles: dict[str, MethodStyle]) -> None:
    progress = of_kind[of_kind["quantity"] == "share_found"]
    for space, axes in zip(spaces, line, strict=True):
        panel = progress[progress["space"] == space]
        if panel.empty:
            axes.set_axis_off()
            continue
        for method, look in styles.items():
            curve = panel[panel["method"] == method]
            if curve.empty:
                continue
            axes.plot(curve["index"], curve["mean"], color=look.colour, linestyle=look.line)
        axes.set_xlabel(f"step of the search at ρ = {panel['radius'].max():g}")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.margins(x=0.02)
    line[0].set_ylabel("best rise over the last")


def _progress(table: pd.DataFrame, kind: str, split: str) -> bool:
    of_kind = table[(table["kind"] == kind) & (table["split"] == split)]
    return bool((of_kind["quantity"] == "share_found").any())


def _kinds_of_line() -> list[Line2D]:
    names = {"loss_rise_pga": "projected ascent", "loss_rise_apgd": "APGD"}
    searches = [
        Line2D(
            [], [], color="0.3", linestyle="none", marker=marker, markersize=4, markerfacecolor="white", label=names[q]
        )
        for q, marker in _SEARCHES.items()
    ]
    step = Line2D(
        [], [], color="0.3", linestyle="none", marker="_", markersize=7, markeredgewidth=1.4, label="one step"
    )
    return [step, *searches]
