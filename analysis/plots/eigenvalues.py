"""Largest eigenvalues of the curvature of each method, LoRA space beside full space.

Bars compare methods rank by rank over training seeds; the ladder shows where each seed's eigenvalues lie, and how far
each may be off: with ``r = ‖Hv − λv‖/|λ|`` and ‖v‖ = 1 an eigenvalue of H lies within ``r·|λ|`` of λ (Parlett, The
Symmetric Eigenvalue Problem, theorem 4.5.1).
"""

import math
from collections.abc import Iterable
from typing import Literal

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter, NullLocator, SymmetricalLogLocator

from analysis.plots import canvas
from analysis.plots.style import PAGE, MethodStyle, styles_for
from analysis.space_names import in_space_order
from analysis.statistics import KEYS, per_seed, summarize

UNCONVERGED = "_unconverged"
"""Label of the crosses."""

TOLERANCE = 1e-2
"""Relative residual above which an eigenvalue counts as not converged, where the rows do not say."""

UNITS_DIFFER = " The axes differ: factor curvature and curvature in W have different units."
"""End of the caption where spaces stand side by side."""

DECADES = 20.0
"""Values of one sign wider apart than this factor are drawn on a logarithmic scale."""

_RANKED = {"": "by magnitude", "largest": "largest", "smallest": "smallest", "both": "both ends"}
_WHISKER = "0.25"  # grey of a whisker
_RUNG = 0.42  # half the width of a rung; methods stand 1 apart
_TICKS = 7  # labelled powers of ten at most


def curvature_name(kind: str) -> str:
    """What the eigenvalues are of, for axis labels: ``kind`` of the rows names the operator."""
    name = "Gauss–Newton" if "ggn" in kind else "Hessian by differences" if "differences" in kind else "Hessian"
    precision = next((word for word in ("bfloat16", "float16") if word in kind.split()), "")
    return f"{name} under {precision}" if precision else name


def decade_ticks(low: float, high: float, threshold: float, most: int = _TICKS) -> list[float]:
    """0 and signed powers of ten from ``threshold`` on for an axis from ``low`` to ``high``, at most ``most`` or so."""
    first = math.ceil(math.log10(threshold) - 1e-9)
    sides = [(sign, math.floor(math.log10(end) + 1e-9)) for sign, end in ((-1, -low), (1, high)) if end >= threshold]
    step = math.ceil(sum(last - first + 1 for _, last in sides) / most) or 1
    # Wider steps begin later, so that the ticks beside 0 keep their distance from it as well.
    ticks = [sign * 10.0**exponent for sign, last in sides for exponent in range(first + step - 1, last + 1, step)]
    return sorted([*ticks, 0.0] if low <= 0 <= high else ticks)


def decade_labels(ticks: Iterable[float]) -> list[str]:
    """Plain numbers where all are short, powers of ten otherwise."""
    values = list(ticks)
    if all(value == 0 or 1e-2 <= abs(value) <= 1e3 for value in values):
        return [f"{value:g}".replace("-", "−") for value in values]
    return ["0" if value == 0 else f"${'-' * (value < 0)}10^{{{round(math.log10(abs(value)))}}}$" for value in values]


def eigenvalue_axis(axes: Axes, which: Literal["x", "y"], low: float, high: float, threshold: float) -> None:
    """Make one axis symmetric-logarithmic from ``low`` to ``high``: linear within ±``threshold``, a power of ten."""
    set_scale, axis = (axes.set_xscale, axes.xaxis) if which == "x" else (axes.set_yscale, axes.yaxis)
    set_scale("symlog", linthresh=threshold)
    ticks = decade_ticks(low, high, threshold)
    axis.set_ticks(ticks, decade_labels(ticks))
    if len(ticks) == len(decade_ticks(low, high, threshold, most=len(ticks) * 100)):
        axis.set_minor_locator(SymmetricalLogLocator(base=10, linthresh=threshold, subs=range(2, 10)))
        axis.set_minor_formatter(NullFormatter())
    else:  # several decades between two ticks
        axis.set_minor_locator(NullLocator())
    (axes.set_xlim if which == "x" else axes.set_ylim)(low, high)


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
            axes.axhline(0, color="0.25", linewidth=0.7)
            low, high = canvas.spread_limits(panel.assign(mean=panel["value"]))
            axes.set_ylim(min(low, 0), max(high, 0))
            ranks = sorted(panel["index"].unique())
            axes.set_xticks(ranks)
            if len(ranks) > 12:
                axes.set_xticks([rank for rank in ranks if rank == 1 or rank % 5 == 0])
            if len(ranks) < 3:  # two or three methods would be walls
                axes.set_xlim(ranks[0] - 1.2, ranks[-1] + 1.2)
            axes.tick_params(axis="x", length=0)
            axes.grid(visible=False, axis="x")
            axes.set_title(canvas.space_title(space))
            axes.set_xlabel(f"rank ({_ranking(kind)})")
        line[0].set_ylabel(_y_label(kind, split))
    dot = Line2D([], [], marker="o", markersize=3, color="0.4", linestyle="none", label="one seed")
    canvas.legend(figure, [*canvas.bar_handles(styles, table["method"]), dot], PAGE)
    words = canvas.interval_words(table, "whiskers", confidence)
    canvas.caption(figure, words + _doubt_words(table), PAGE)
    return figure


@canvas.styled
def eigenvalue_ladder(frame: pd.DataFrame) -> Figure:
    """Every eigenvalue of every seed at its value, methods side by side, with the residual as a whisker.

    A rung is the mean of one rank over seeds. Ranked by magnitude, one rank can be positive in one seed and negative in
    another; such a rank has no rung. Eigenvalues that have not converged get a cross.

    Args:
        frame: the tidy rows of one study.

    Raises:
        NothingToDraw: the spectrum was not measured.
    """
    styles = styles_for(frame["method"])
    table = eigenvalue_table(frame)
    spaces, kinds = in_space_order(table["space"]), canvas.variants(table, ["kind", "split"])
    present = [m for m in styles if m in set(table["method"])]
    figure, grid = canvas.panels(len(kinds), len(spaces), PAGE, 0.75 + 2.6 * len(kinds))
    for (kind, split), line in zip(kinds, grid, strict=True):
        for space, axes in zip(spaces, line, strict=True):
            panel = table[(table["space"] == space) & (table["kind"] == kind) & (table["split"] == split)]
            here = [m for m in present if m in set(panel["method"])]
            for column, method in enumerate(here):
                _draw_ladder(axes, column, panel[panel["method"] == method], styles[method])
            axes.axhline(0, color="0.25", linewidth=0.7)
            _fit(axes, panel)
            axes.set_xlim(-0.75, max(len(here), 3) - 0.25)
            axes.set_xticks([])
            axes.set_title(canvas.space_title(space))
            axes.set_xlabel(f"methods ({_ranking(kind)})")
        line[0].set_ylabel(_y_label(kind, split))
    dots = [
        Line2D([], [], color=s.colour, marker=s.marker, markersize=3.5, markeredgewidth=0, linewidth=1.2, label=m)
        for m, s in styles.items()
        if m in present
    ]
    canvas.legend(figure, dots, PAGE)
    seeds = int(table["n_seeds"].max())
    words = "Dot: an eigenvalue of one seed; whisker: its residual ‖Hv − λv‖, within which an eigenvalue lies"
    words += " (hidden by the dot where shorter). "
    if seeds > 1:
        words += f"Seeds stand side by side; rung: mean of one rank over {seeds} seeds, where all agree in sign."
    else:
        words += "One seed: the rung is its eigenvalue."
    canvas.caption(figure, words + _doubt_words(table), PAGE)
    return figure


def _draw_ladder(axes: Axes, column: int, method: pd.DataFrame, look: MethodStyle) -> None:
    """One method's eigenvalues around x = ``column``: rungs, and each seed's dots and whiskers on a line of its own."""
    for _, rank in method.groupby("index"):
        values = rank["value"].dropna()
        if len(values) and ((values > 0).all() or (values < 0).all()):
            axes.hlines(values.mean(), column - _RUNG, column + _RUNG, color=look.colour, linewidth=1.1, alpha=0.6)
    seeds = sorted(method["seed"].unique())
    spacing = 1.3 * _RUNG / len(seeds)
    for position, seed in enumerate(seeds):
        x = column + (position - (len(seeds) - 1) / 2) * spacing
        own = method[method["seed"] == seed]
        reach = own["residual"] * own["value"].abs()
        axes.vlines([x] * len(own), own["value"] - reach, own["value"] + reach, color=_WHISKER, linewidth=0.8)
        (dots,) = axes.plot([x] * len(own), own["value"], linestyle="none", marker=look.marker, markersize=2.6)
        dots.set(color=look.colour, markeredgecolor="white", markeredgewidth=0.3, zorder=3, label="_seed")
        loose = own[~own["converged"]]
        (crosses,) = axes.plot([x] * len(loose), loose["value"], linestyle="none", marker="x", color="black")
        crosses.set(markersize=4.5, markeredgewidth=0.8, zorder=4, label=UNCONVERGED)


def _fit(axes: Axes, panel: pd.DataFrame) -> None:
    """Limits that hold every eigenvalue and 0; logarithmic where their sizes span decades."""
    values = panel["value"].dropna()
    sizes = values[values != 0].abs()
    low, high = float(min([*values, 0])), float(max([*values, 0]))
    if len(sizes) and sizes.max() / sizes.min() > DECADES:
        threshold = 10.0 ** math.floor(math.log10(max(sizes.min(), 1e-6 * sizes.max())))
        eigenvalue_axis(axes, "y", min(2.5 * low, -0.5 * threshold), max(2.5 * high, 0.5 * threshold), threshold)
        return
    reach = panel["residual"] * panel["value"].abs()
    spread = panel.assign(mean=panel["value"], low=panel["value"] - reach, high=panel["value"] + reach)
    bottom, top = canvas.spread_limits(spread)
    margin = 0.05 * (high - low)
    axes.set_ylim(min(bottom, -margin), max(top, margin))


def _ranking(kind: str) -> str:
    """How the eigenvalues are ranked, and in full what :func:`curvature_name` shortens."""
    words = kind.split()
    which = words.pop() if words and words[-1] in _RANKED else ""
    return ", ".join([_RANKED[which], *filter(None, [" ".join(word for word in words if word != "ggn")])])


def _y_label(kind: str, split: str) -> str:
    return f"{curvature_name(kind)} eigenvalue λ" + (f" ({split})" if split else "")


def _doubt_words(table: pd.DataFrame) -> str:
    """What holds for every figure of eigenvalues: units, crosses, and values that are not drawn."""
    words = UNITS_DIFFER if table["space"].nunique() > 1 else ""
    unconverged = int((~table["converged"]).sum())
    if unconverged:
        worst = float(table.loc[~table["converged"], "residual"].max())
        words += f" Crosses: {unconverged} eigenvalues not converged, relative residual up to {worst:.1g}."
    lost = int((table["n_non_finite"] > 0).sum())
    return words + (f" {lost} eigenvalues are not finite and not drawn." if lost else "")
