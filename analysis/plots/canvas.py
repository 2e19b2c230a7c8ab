"""What all figures share: choosing rows, laying panels side by side, legend and caption outside the data."""

import io
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from typing import Literal, ParamSpec

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from analysis.core.space import FACTORED
from analysis.plots.style import COLUMN, PAGE, RC, MethodStyle
from analysis.space_names import SPACE_TITLES
from analysis.statistics import KEYS, per_seed, summarize
from bilora.errors import UserError

Drawn = ParamSpec("Drawn")
Shared = Literal["none", "all", "row", "col"]


EPS_W = r"$\Vert\varepsilon_W\Vert$"
DECADES = 20.0
"""A range of values wider than this factor is drawn on a logarithmic axis."""

_DODGE = 0.035  # sideways shift between methods at one radius, in units of the spacing

_LEGEND_ENTRY, _LETTER = 0.52, 0.066  # inches: handle with the gaps around it, and a letter of the legend's size

NON_FINITE = "_non-finite"
"""Label of the marks at the top edge (the underscore keeps it out of legends)."""


class NothingToDraw(UserError):
    """The rows of a figure were not measured."""


def chosen(frame: pd.DataFrame, measure: str, quantity: str) -> pd.DataFrame:
    """The rows of one quantity.

    Raises:
        NothingToDraw: there are none.
    """
    rows = frame[(frame["measure"] == measure) & (frame["quantity"] == quantity)]
    if rows.empty:
        raise NothingToDraw(f"no {quantity} rows of measure {measure} to draw: add {measure} to the study's measures")
    return rows


class Drawing(Figure):
    """A figure that pyplot does not know of, so that none piles up in memory; a notebook shows it all the same."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        with mpl.rc_context(RC):
            self.savefig(buffer, format="png", dpi=130)
        return buffer.getvalue()


def styled(draw: Callable[Drawn, Figure]) -> Callable[Drawn, Figure]:
    """Draw in the project's style, whatever the caller's matplotlib settings, and leave those alone."""

    @wraps(draw)
    def drawn(*args: Drawn.args, **kwargs: Drawn.kwargs) -> Figure:
        with mpl.rc_context(RC):
            return draw(*args, **kwargs)

    return drawn


def panels(
    rows: int, columns: int, width: float, height: float, *, sharex: Shared = "none", sharey: Shared = "none"
) -> tuple[Figure, np.ndarray]:
    """A figure with a grid of axes, (rows, columns); sizes in inches."""
    layout = ConstrainedLayoutEngine(w_pad=0.05, h_pad=0.05, wspace=0.03, hspace=0.03)
    figure = Drawing(figsize=(width, height), layout=layout)
    return figure, figure.subplots(rows, columns, squeeze=False, sharex=sharex, sharey=sharey)


def width_for(columns: Sequence[object]) -> float:
    """Inches: a text column for one panel, a page for several side by side."""
    return COLUMN if len(columns) == 1 else PAGE


def height_for(rows: int, width: float, above: float = 0.75, row: float = 2.0) -> float:
    """Inches of ``rows`` of panels with legend and caption, which take more lines in a column than on a page."""
    return above + row * rows + (0.55 if width == COLUMN else 0.0)


def draw_bar(axes: Axes, x: float, bar: pd.Series, values: pd.Series, look: MethodStyle, width: float) -> None:
    """A mean (``mean``, ``low``, ``high`` of ``bar``) with its interval, and every seed's value as a dot."""
    axes.bar(x, bar["mean"], 0.9 * width, color=look.colour, alpha=0.55, linewidth=0)
    axes.plot([x, x], [bar["low"], bar["high"]], color="0.25", linewidth=0.8)
    (dots,) = axes.plot([x] * len(values), values, linestyle="none", marker=look.marker, markersize=2.8)
    dots.set(color=look.colour, markeredgecolor="white", markeredgewidth=0.3, zorder=3)


def seeds_and_means(rows: pd.DataFrame, confidence: float) -> pd.DataFrame:
    """One row per method, quantity and seed, with ``mean``, ``low``, ``high`` and ``n_seeds`` over seeds beside it."""
    keys = ["method", *KEYS]
    means = summarize(rows, confidence)[[*keys, "mean", "low", "high", "n_seeds"]]
    return per_seed(rows).drop(columns=["residual", "n_directions"]).merge(means, on=keys)


def draw_kinds(axes: Axes, table: pd.DataFrame, kinds: Mapping[str, str], styles: Mapping[str, MethodStyle]) -> None:
    """A group of bars, one a method, for each of ``kinds`` (→ its name), of a table of :func:`seeds_and_means`."""
    present = [method for method in styles if method in set(table["method"])]
    width = 0.8 / len(present)
    for at, kind in enumerate(kinds):
        group = table[table["kind"] == kind]
        # What only one method has stands in the middle of its place.
        here = [method for method in present if method in set(group["method"])]
        for position, method in enumerate(here):
            seeds = group[group["method"] == method]
            x = at + (position - (len(here) - 1) / 2) * width
            draw_bar(axes, x, seeds.iloc[0], seeds["value"], styles[method], width)
    axes.set_xticks(range(len(kinds)), list(kinds.values()))
    axes.tick_params(axis="x", length=0)
    axes.grid(visible=False, axis="x")


def line_handles(styles: Mapping[str, MethodStyle], drawn: Iterable[str], *, markers: bool) -> list[Line2D]:
    """Legend entries of methods drawn as lines."""
    here = set(drawn)
    return [
        Line2D([], [], color=s.colour, linestyle=s.line, marker=s.marker if markers else "", markeredgewidth=0, label=m)
        for m, s in styles.items()
        if m in here
    ]


def point_handles(styles: Mapping[str, MethodStyle], drawn: Iterable[str]) -> list[Line2D]:
    """Legend entries of methods drawn as single points."""
    here = set(drawn)
    return [
        Line2D([], [], color=s.colour, linestyle="none", marker=s.marker, markeredgewidth=0, label=m)
        for m, s in styles.items()
        if m in here
    ]


def bar_handles(styles: Mapping[str, MethodStyle], drawn: Iterable[str]) -> list[Patch]:
    """Legend entries of methods drawn as bars."""
    here = set(drawn)
    return [Patch(color=s.colour, alpha=0.55, linewidth=0, label=m) for m, s in styles.items() if m in here]


def legend(figure: Figure, handles: Sequence[Artist], width: float) -> None:
    """One legend for all panels, above them."""
    columns = min(len(handles), max(1, int(width / 1.05)))
    labels = [str(handle.get_label()) for handle in handles]
    while columns > 1 and _legend_width(labels, columns) > width:
        columns -= 1
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, handlelength=2.4, columnspacing=1.4)


def _legend_width(labels: Sequence[str], columns: int) -> float:
    """Inches that a legend takes: its columns are as wide as their longest label."""
    filled = np.array_split(np.array([len(label) for label in labels]), columns)
    return sum(_LEGEND_ENTRY + _LETTER * float(lengths.max()) for lengths in filled if len(lengths))


def caption(figure: Figure, text: str, width: float) -> None:
    """A line below the panels that explains bands, whiskers and marks."""
    wrapped = textwrap.fill(text, width=int(width * 18.6))
    figure.supxlabel(wrapped, fontsize=7, color="0.3", ha="left", x=0.01)


def interval_words(table: pd.DataFrame, what: str, confidence: float) -> str:
    """The sentence that says what the drawn spread is, for example "band: 95 % t-interval over 3 seeds"."""
    seeds = sorted({int(n) for n in table["n_seeds"]})
    if max(seeds, default=0) < 2:
        return f"One seed: no {what} can be drawn."
    counted = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]}–{seeds[-1]}"
    words = f"{what.capitalize()}: {100 * confidence:g} % t-interval over {counted} training seeds"
    return words + (" (few: intervals are wide)." if min(s for s in seeds if s > 1) <= 3 else ".")


def mark_non_finite(axes: Axes, table: pd.DataFrame, styles: Mapping[str, MethodStyle], x: str) -> int:
    """Put a method's hollow marker at the top edge wherever some of its values are not finite; returns their count."""
    for position, (method, look) in enumerate(styles.items()):
        lost = table[(table["method"] == method) & (table["n_non_finite"] > 0)]
        if lost.empty:
            continue
        at = lost[x].fillna(axes.get_xlim()[1])
        height = np.full(len(lost), 0.985 - 0.04 * position)
        (marks,) = axes.plot(at, height, linestyle="none", marker=look.marker, transform=axes.get_xaxis_transform())
        marks.set(markersize=5, markerfacecolor="white", markeredgecolor=look.colour, zorder=5, label=NON_FINITE)
        marks.set(clip_on=False, in_layout=False)
    return int(table["n_non_finite"].sum())


def non_finite_words(count: int) -> str:
    """What the markers at the top edge mean; empty without any."""
    if not count:
        return ""
    return f" Hollow markers at the top edge: {count} losses there are not finite and are left out of the means."


def subset_words(frame: pd.DataFrame, measure: str) -> str:
    """What a figure must say of a measurement on some of the examples; empty of one on all.

    ``subset_error`` is the standard error of a loss rise beside that on all examples (:mod:`analysis.study.subset`).
    """
    rows = frame[frame["measure"] == measure]
    found = {
        name: rows.loc[rows["quantity"] == name, "value"].dropna()
        for name in ("examples", "examples_available", "subset_error")
    }
    used, available, errors = (values.tolist() for values in found.values())
    sentence = subset_sentence("the loss rise is", used, available, errors)
    return f" {sentence}" if sentence else ""


def subset_sentence(what: str, used: Sequence[float], available: Sequence[float], errors: Sequence[float]) -> str:
    """How many examples were used of how many, and by how much ``what`` may be off for that; empty if not known."""
    if not used or not available:
        return ""
    counted = f"{min(used):g}" if min(used) == max(used) else f"{min(used):g}–{max(used):g}"
    words = f"On {counted} of {max(available):g} examples"
    return (
        f"{words}: beside all of them {what} off by up to {max(errors):.2g} (standard error)."
        if errors
        else f"{words}."
    )


def spread_limits(table: pd.DataFrame, low: str = "low", high: str = "high") -> tuple[float, float]:
    """Axis limits that hold all means, and intervals as far as they do not dwarf the means.

    With few seeds an interval can be many times wider than all means together; past one range of the means it is cut.
    """
    mean = table["mean"].dropna()
    if mean.empty:
        return 0.0, 1.0
    span = max(float(mean.max() - mean.min()), 1e-12 + 0.02 * float(mean.abs().max()))
    bottom = max(np.nanmin([*table[low], mean.min()]), mean.min() - span)
    top = min(np.nanmax([*table[high], mean.max()]), mean.max() + span)
    margin = 0.05 * (top - bottom)
    return float(bottom - margin), float(top + margin)


def spans(values: pd.Series, factor: float) -> bool:
    """Whether the finite ``values`` are positive and range over more than ``factor``: a logarithmic axis suits them."""
    finite = values[np.isfinite(values)]
    return bool(len(finite) and finite.min() > 0 and finite.max() / finite.min() > factor)


def log_limits(table: pd.DataFrame) -> tuple[float, float]:
    """Limits that hold all means; intervals that reach 0 run off the lower edge, very wide ones off the upper."""
    low, high = table["mean"].min(), table["mean"].max()
    return float(low / 2.5), float(max(high * 2, min(table["high"].max(), high * 5)))


def dodged(x: pd.Series, step: float, log: bool) -> pd.Series:
    """``x`` moved sideways by ``step`` small shifts, so that methods at one radius do not cover each other."""
    if len(x) < 2:
        return x
    shift = _DODGE * step * np.diff(np.log(x) if log else x).min()
    return x * np.exp(shift) if log else x + shift


def radius_label(space: str, scaling: str) -> str:
    """Label of an axis of radii of a worst case: what ρ bounds."""
    if scaling != "isotropic":
        return rf"radius $\rho=\Vert\delta\Vert$, relative to {'|w|' if scaling == 'elementwise' else 'row norms'}"
    return r"radius $\rho=\Vert(\varepsilon_A,\varepsilon_B)\Vert$" if space in FACTORED else rf"radius $\rho=${EPS_W}"


def space_title(space: str) -> str:
    """Panel title of a space."""
    return SPACE_TITLES.get(space, space or "no space")


def variants(table: pd.DataFrame, columns: Iterable[str]) -> list[tuple[str, ...]]:
    """The distinct combinations of ``columns``, sorted: one panel row each."""
    return sorted(set(table[list(columns)].itertuples(index=False, name=None)))
