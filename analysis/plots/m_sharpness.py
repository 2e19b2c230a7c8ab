"""m-sharpness, a block for each m: values of different m are different quantities and are never joined."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from analysis.plots import canvas
from analysis.plots.spread import GROUPS, spread_table, spread_words
from analysis.plots.style import MethodStyle, styles_for
from analysis.space_names import in_space_order

BLOCK = "m block"
"""``get_gid()`` of the words over a block."""

_ABREAST = 0.7  # of the place of one radius, taken by the methods side by side
_APART = 0.6  # between two blocks


def m_sharpness_table(frame: pd.DataFrame, confidence: float = 0.95) -> pd.DataFrame:
    """What :func:`m_sharpness_points` draws: one row per method, space, split, scaling, m and radius.

    ``m`` and ``scaling`` are taken from ``kind``. With one training seed the interval is over the groups of m examples.
    ``steps`` are those of the search in each group.

    Raises:
        NothingToDraw: the m-sharpness was not measured.
    """
    rows = canvas.chosen(frame, "m_sharpness", "loss_rise")
    table = spread_table(rows, confidence)
    place = ["method", "space", "kind", "split"]
    whole = frame[frame["measure"] == "m_sharpness"]
    for quantity in ("groups", "steps"):
        found = whole[whole["quantity"] == quantity].groupby(place)["value"].max().rename(quantity).reset_index()
        table = table.merge(found, on=place, how="left")
    errors = rows.groupby([*place, "radius"])["standard_error"].first().rename("error").reset_index()
    table = table.merge(errors, on=[*place, "radius"], how="left")
    count = table["groups"].where(table["groups"] > 1)
    half = stats.t.ppf((1 + confidence) / 2, count - 1) * table.pop("error")
    alone = (table["n_seeds"] == 1) & half.notna()
    table["half_width"] = table["half_width"].mask(alone, half)
    table["low"], table["high"] = table["mean"] - table["half_width"], table["mean"] + table["half_width"]
    table["over"] = table["over"].mask(alone, GROUPS)
    words = table["kind"].str.split(n=1)
    table["m"] = words.str[0].str.removeprefix("m=").astype(int)
    table["scaling"] = words.str[1].fillna("isotropic")
    return table.sort_values(["split", "space", "scaling", "method", "m", "radius"], ignore_index=True)


@canvas.styled
def m_sharpness_points(frame: pd.DataFrame, confidence: float = 0.95) -> Figure:
    """The mean worst rise of groups of m examples: a block for each m, in it a place for each radius, methods abreast.

    Args:
        frame: the tidy rows of one study.
        confidence: level of the whiskers, in (0, 1).

    Raises:
        NothingToDraw: the m-sharpness was not measured.
    """
    styles = styles_for(frame["method"])
    table = m_sharpness_table(frame, confidence)
    spaces, kinds = in_space_order(table["space"]), canvas.variants(table, ["scaling", "split"])
    width = canvas.width_for(spaces)
    figure, grid = canvas.panels(
        len(kinds), len(spaces), width, canvas.height_for(len(kinds), width, 0.9), sharey="row"
    )
    lost, reaches_zero = 0, False
    for (scaling, split), line in zip(kinds, grid, strict=True):
        of_kind = table[(table["scaling"] == scaling) & (table["split"] == split)]
        logarithmic = canvas.spans(of_kind["mean"], canvas.DECADES)
        for space, axes in zip(spaces, line, strict=True):
            panel = of_kind[of_kind["space"] == space]
            axes.set_title(canvas.space_title(space), pad=14)
            if panel.empty:
                axes.set_axis_off()
                continue
            if logarithmic:
                axes.set_yscale("log")
                axes.set_ylim(*canvas.log_limits(of_kind))
                reaches_zero |= bool((panel["low"] <= 0).any())
            else:
                axes.set_ylim(*canvas.spread_limits(of_kind))
            placed = _draw_blocks(axes, panel, {m: look for m, look in styles.items() if m in set(table["method"])})
            axes.set_xlabel(canvas.radius_label(space, scaling))
            lost += canvas.mark_non_finite(axes, placed, styles, "at")
        line[0].set_ylabel("mean worst loss rise\n(" + ", ".join(word for word in (scaling, split) if word) + ")")
    canvas.legend(figure, canvas.point_handles(styles, table["method"]), width)
    words = "The mean over groups of m examples of the highest rise found for each group, "
    words += "after one gradient step" if table["steps"].max() == 1 else "a lower bound of its worst case"
    words += ". Compare methods within one m: values of different m are different quantities. "
    words += spread_words(table, "whiskers", confidence)
    words += " Whiskers that meet the lower edge reach 0 or below." if reaches_zero else ""
    words += " Radii of the two spaces are not comparable." if len(spaces) > 1 else ""
    words += canvas.subset_words(frame, "m_sharpness")
    canvas.caption(figure, words + canvas.non_finite_words(lost), width)
    return figure


def _draw_blocks(axes: Axes, panel: pd.DataFrame, styles: dict[str, MethodStyle]) -> pd.DataFrame:
    """Points and whiskers, a block for each m; returns ``panel`` with the place of each point, ``at``."""
    ticks: list[float] = []
    labels: list[str] = []
    places: dict[tuple[int, float], float] = {}
    end = 0.0
    for m in sorted(panel["m"].unique()):
        radii = sorted(panel.loc[panel["m"] == m, "radius"].unique())
        if ticks:
            axes.axvline(end - (1 + _APART) / 2, color="0.6", linewidth=0.6)
        middle = end + (len(radii) - 1) / 2
        axes.text(middle, 1.02, f"m = {m}", transform=axes.get_xaxis_transform(), ha="center", gid=BLOCK)
        for radius in radii:
            places[m, radius] = end
            ticks.append(end)
            labels.append(f"{radius:g}")
            end += 1
        end += _APART
    axes.set_xticks(ticks, labels)
    axes.set_xlim(-0.6, end - _APART - 0.4)
    axes.grid(visible=False, axis="x")
    step = _ABREAST / max(len(styles), 1)
    order = {method: number - (len(styles) - 1) / 2 for number, method in enumerate(styles)}
    at = [
        places[m, radius] + step * order[method]
        for m, radius, method in zip(panel["m"], panel["radius"], panel["method"], strict=True)
    ]
    placed = panel.assign(at=at)
    for method, look in styles.items():
        mine = placed[placed["method"] == method]
        whiskers = np.stack([mine["mean"] - mine["low"], mine["high"] - mine["mean"]])
        bars = axes.errorbar(mine["at"], mine["mean"], whiskers, fmt=look.marker, elinewidth=0.8, color=look.colour)
        bars.lines[0].set(markeredgewidth=0)
    return placed
