"""Curvature layer by layer: the top eigenvalue and the trace of each layer's own block of the curvature, as heat maps.

``H_l = ∂²L/∂w_l²`` with all other layers fixed: the diagonal block of layer l, whose top eigenvalue bounds that of H
from below (Cauchy's interlacing theorem) and whose traces add up to that of H.
"""

import math
from collections.abc import Sequence
from typing import Literal

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LogNorm, Normalize, SymLogNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from analysis.layer_names import NO_NUMBER, split_layer
from analysis.plots import canvas
from analysis.plots.eigenvalues import DECADES, TOLERANCE, curvature_name, decade_labels, decade_ticks
from analysis.plots.style import PAGE, styles_for
from analysis.space_names import in_space_order
from analysis.statistics import summarize

LayerQuantity = Literal["eigenvalue", "trace"]

DOUBTFUL = "_doubtful"
"""Label of the strokes through cells that are not to be relied on."""

_PLACE = ["method", "space", "kind", "split", "layer"]
_SHORT = {
    "": "layer",
    "attention.self.query": "query", "attention.self.key": "key", "attention.self.value": "value",
    "attention.output.dense": "attention output", "intermediate.dense": "intermediate", "output.dense": "output",
}  # fmt: skip
_POSITIVE, _SIGNED = "cividis", "RdBu_r"
_MISSING = "0.85"
_LETTER = 0.062  # inches a character of a cell takes
_ABREAST = {1: 1, 2: 2, 3: 3, 5: 3, 6: 3}  # methods side by side, four for other numbers


def layer_table(frame: pd.DataFrame, quantity: LayerQuantity = "eigenvalue") -> pd.DataFrame:
    """What :func:`layer_heatmap` draws: one row per method, space, kind, split and layer, mean over seeds.

    Args:
        frame: the tidy rows of one study.
        quantity: ``"eigenvalue"`` (the top one of each layer) or ``"trace"``.

    Returns:
        The columns of :func:`analysis.statistics.summarize` with ``stack``, ``number`` and ``block`` read off the
        layer's name (:func:`split_layer`), and ``doubtful``: of an eigenvalue, that a seed's did not converge or that
        seeds differ in sign; of a trace, that 0 lies within two of its standard errors over probes.

    Raises:
        NothingToDraw: no layer was measured.
    """
    rows = canvas.chosen(frame, "layers", quantity)
    rows = rows[(rows["layer"] != "") & (rows["index"] <= 1)]
    if rows.empty:
        raise canvas.NothingToDraw(f"no {quantity} of a layer to draw: add layers to the study's measures")
    table = summarize(rows)
    names = [split_layer(layer) for layer in table["layer"]]
    table["stack"], table["number"], table["block"] = zip(*names, strict=True)
    doubtful = _unsettled_eigenvalues(frame, rows) if quantity == "eigenvalue" else _traces_near_zero(rows)
    table = table.merge(doubtful.rename("doubtful").reset_index(), on=_PLACE, how="left", validate="one_to_one")
    table["doubtful"] = table["doubtful"].eq(True)  # missing where no value is finite
    return table


@canvas.styled
def layer_heatmap(frame: pd.DataFrame, quantity: LayerQuantity = "eigenvalue") -> Figure:
    """Top eigenvalue or trace of every layer, layer number by block, a panel for each method.

    All methods of a space share one colour scale: logarithmic where the values span decades, diverging around white at
    0 where some are negative. A stroke through a cell marks what is not to be relied on.

    Args:
        frame: the tidy rows of one study.
        quantity: ``"eigenvalue"`` (the top one of each layer) or ``"trace"``.

    Raises:
        NothingToDraw: no layer was measured.
    """
    table = layer_table(frame, quantity)
    methods = [m for m in styles_for(frame["method"]) if m in set(table["method"])]
    groups = [
        (kind, split, space)
        for kind, split in canvas.variants(table, ["kind", "split"])
        for space in in_space_order(table["space"])
        if ((table["kind"] == kind) & (table["split"] == split) & (table["space"] == space)).any()
    ]
    blocks, lines = _blocks(table), _lines(table)
    abreast = _ABREAST.get(len(methods), 4)
    deep = math.ceil(len(methods) / abreast)
    cell = float(np.clip(2.6 / len(lines), 0.08, 0.21))
    size = ((PAGE - 1.7) / (abreast * len(blocks)), cell)
    names, turned = _block_labels(blocks, size[0])
    below = 0.2 + (_LETTER * max(map(len, names)) if turned else 0.12 * max(name.count("\n") for name in names))
    height = 0.5 + len(groups) * (0.3 + below + deep * (cell * len(lines) + 0.27))
    layout = ConstrainedLayoutEngine(w_pad=0.04, h_pad=0.04, wspace=0.02, hspace=0.02)
    figure = canvas.Drawing(figsize=(PAGE, height), layout=layout)
    for group, (kind, split, space) in zip(figure.subfigures(len(groups), 1, squeeze=False)[:, 0], groups, strict=True):
        cells = table[(table["kind"] == kind) & (table["split"] == split) & (table["space"] == space)]
        here = [m for m in methods if m in set(cells["method"])]
        group.suptitle(canvas.space_title(space), fontsize=8, fontweight="bold")
        grid = group.subplots(deep, abreast, squeeze=False)
        scale, colours = _colours(cells["mean"])
        for position, axes in enumerate(grid.flat):
            if position >= len(here):
                axes.set_visible(False)
                continue
            _draw_cells(axes, cells[cells["method"] == here[position]], lines, blocks, scale, colours, size)
            axes.set_title(here[position], pad=3)
            axes.set_xticks(range(len(blocks)), names, rotation=90 if turned else 0)
            _label(axes, lines, left=position % abreast == 0, bottom=position + abreast >= len(here))
        _draw_bar(group, grid, scale, colours, _bar_label(quantity, kind, split))
    canvas.caption(figure, _words(table, quantity), PAGE)
    return figure


def _unsettled_eigenvalues(frame: pd.DataFrame, rows: pd.DataFrame) -> "pd.Series[bool]":
    """By :data:`_PLACE`: a seed's eigenvalue did not converge, or seeds differ in sign."""
    said = frame[(frame["measure"] == "layers") & (frame["quantity"] == "converged") & (frame["index"] <= 1)]
    word = said[[*_PLACE, "seed", "value"]].rename(columns={"value": "converged"})
    merged = rows.merge(word, on=[*_PLACE, "seed"], how="left")
    loose = ~merged["converged"].fillna(merged["residual"] <= TOLERANCE).astype(bool)
    flags = merged.assign(loose=loose, positive=merged["value"] > 0, negative=merged["value"] < 0)
    found = flags.groupby(_PLACE, sort=False)[["loose", "positive", "negative"]].any()
    return found["loose"] | (found["positive"] & found["negative"])


def _traces_near_zero(rows: pd.DataFrame) -> "pd.Series[bool]":
    """By :data:`_PLACE`: 0 lies within two standard errors, over probes, of the mean of the seeds."""
    finite = rows[np.isfinite(rows["value"])].assign(variance=rows["standard_error"] ** 2)
    found = finite.groupby(_PLACE, sort=False).agg(
        value=("value", "mean"), variance=("variance", "sum"), seeds=("value", "size")
    )
    return found["value"].abs() < 2 * np.sqrt(found["variance"]) / found["seeds"]


def _blocks(table: pd.DataFrame) -> list[str]:
    """Blocks in the order of the model, those of unnumbered layers last.

    Methods may adapt different layers: the one that has most gives the order.
    """
    found = table.groupby("method", sort=False)["block"].agg(lambda blocks: list(dict.fromkeys(blocks)))
    order = dict.fromkeys(block for blocks in sorted(found, key=len, reverse=True) for block in blocks)
    alone = set(table.loc[table["number"] == NO_NUMBER, "block"])
    return [block for block in order if block not in alone] + [block for block in order if block in alone]


def _lines(table: pd.DataFrame) -> list[tuple[str, int]]:
    """(stack, number) of each row of a panel: stacks in the order of the model, unnumbered layers last."""
    stacks = list(dict.fromkeys(table.loc[table["number"] != NO_NUMBER, "stack"]))
    found = set(zip(table["stack"], table["number"], strict=True))
    numbered = sorted((line for line in found if line[1] != NO_NUMBER), key=lambda x: (stacks.index(x[0]), x[1]))
    return numbered + [line for line in found if line[1] == NO_NUMBER]


def _line_labels(lines: Sequence[tuple[str, int]]) -> list[str]:
    """The number, after the component in which stacks differ where there are several."""
    stacks = [stack.split(".") for stack in dict.fromkeys(stack for stack, number in lines if number != NO_NUMBER)]
    same = 0
    while len(stacks) > 1 and len({tuple(stack[: same + 1]) for stack in stacks}) == 1:
        same += 1
    labels = []
    for stack, number in lines:
        told = stack.split(".")[same : same + 1] if len(stacks) > 1 else []
        labels.append("no number" if number == NO_NUMBER else " ".join([*told, str(number)]))
    return labels


def _short(block: str, blocks: Sequence[str]) -> str:
    """A block's plain name, else as many of its last components as tell it from the others."""
    if block in _SHORT:
        return _SHORT[block]
    parts = block.split(".")
    for kept in range(1, len(parts)):
        tail = parts[-kept:]
        if tail != ["dense"] and sum(other.split(".")[-kept:] == tail for other in blocks) == 1:
            return ".".join(tail)
    return block


def _block_labels(blocks: Sequence[str], width: float) -> tuple[list[str], bool]:
    """Names below the columns of ``width`` inches, and whether they must be turned upright to fit."""
    names = [_short(block, blocks) for block in blocks]
    if _LETTER * max(len(word) for name in names for word in name.split()) + 0.05 <= width:
        return [name.replace(" ", "\n") for name in names], False
    return names, True


def _colours(values: pd.Series) -> tuple[Normalize, Colormap]:
    """Scale and colours for all methods of a space."""
    sizes = values.abs()
    sizes = sizes[np.isfinite(sizes) & (sizes > 0)]
    largest, smallest = (float(sizes.max()), float(sizes.min())) if len(sizes) else (1.0, 1.0)
    wide = largest / smallest > DECADES
    scale: Normalize
    if wide and values.min() > 0:
        scale = LogNorm(smallest, largest)
    elif wide:
        threshold = 10.0 ** math.floor(math.log10(max(smallest, 1e-4 * largest)))
        scale = SymLogNorm(threshold, vmin=-largest if values.min() < 0 else 0.0, vmax=largest)
    else:
        scale = Normalize(-largest if values.min() < 0 else 0.0, largest)
    return scale, mpl.colormaps[_SIGNED if values.min() < 0 else _POSITIVE]


def _draw_cells(
    axes: Axes,
    cells: pd.DataFrame,
    lines: Sequence[tuple[str, int]],
    blocks: Sequence[str],
    scale: Normalize,
    colours: Colormap,
    size: tuple[float, float],
) -> None:
    """One method's cells; numbers where every one of them fits its cell (``size`` in inches), else the sign alone."""
    values = np.full((len(lines), len(blocks)), np.nan)
    for stack, number, block, value in cells[["stack", "number", "block", "mean"]].itertuples(index=False, name=None):
        values[lines.index((stack, number)), blocks.index(block)] = value
    axes.grid(visible=False)
    axes.set_facecolor(_MISSING)
    axes.imshow(values, cmap=colours, norm=scale, aspect="auto", interpolation="nearest")
    texts = {place: _number(value) for place, value in np.ndenumerate(values) if np.isfinite(value)}
    room = size[1] >= 0.125 and _LETTER * max(map(len, texts.values()), default=0) + 0.05 <= size[0]
    for (y, x), text in texts.items():
        ink = _ink(colours(scale(values[y, x])))
        if room:
            axes.text(x, y, text, ha="center", va="center", fontsize=7, color=ink)
        elif values[y, x] < 0:
            axes.plot([x - 0.2, x + 0.2], [y, y], color=ink, linewidth=0.8)
    doubtful = cells.loc[cells["doubtful"], ["stack", "number", "block"]]
    for stack, number, block in doubtful.itertuples(index=False, name=None):
        y, x = lines.index((stack, number)), blocks.index(block)
        ink = _ink(colours(scale(values[y, x]))) if np.isfinite(values[y, x]) else "black"
        start = 0.27 if room else -0.46  # in the corner, beside the number
        axes.plot([x + start, x + 0.46], [y - start, y - 0.44], color=ink, linewidth=0.8, label=DOUBTFUL)
    axes.spines[:].set_visible(False)


def _number(value: float) -> str:
    """Two digits, and no more characters than they take."""
    size = abs(value)
    if size >= 999.5 or 0 < size < 0.01:
        mantissa, exponent = f"{size:.0e}".split("e")
        text = f"{mantissa}e{int(exponent)}"
    else:
        text = "0" if not size else f"{size:.0f}" if size >= 9.95 else f"{size:#.2g}".removeprefix("0")
    return (f"-{text}" if value < 0 else text).replace("-", "−")


def _ink(colour: tuple[float, float, float, float]) -> str:
    red, green, blue, _ = colour
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"


def _label(axes: Axes, lines: Sequence[tuple[str, int]], *, left: bool, bottom: bool) -> None:
    axes.tick_params(length=0, labelleft=left, labelbottom=bottom)
    step = 1 if len(lines) <= 16 else 5
    last = len(lines) - 1 - (lines[-1][1] == NO_NUMBER)
    shown = [at for at in range(last + 1) if lines[at][1] % step == 0 and (step == 1 or at < last)]
    shown += range(last + 1, len(lines))  # without a number
    labels = _line_labels(lines)
    axes.set_yticks(shown, [labels[at] for at in shown])
    if left:
        axes.set_ylabel("layer")


def _draw_bar(group: SubFigure, grid: np.ndarray, scale: Normalize, colours: Colormap, label: str) -> None:
    """The colour bar of a space, labelled at powers of ten where the scale is logarithmic."""
    bar = group.colorbar(ScalarMappable(scale, colours), ax=grid, aspect=16, pad=0.015, fraction=0.05)
    bar.set_label(label, fontsize=7.5)
    bar.ax.tick_params(labelsize=7, which="both")
    if type(scale) is Normalize:
        return
    low, high = float(scale.vmin or 0.0), float(scale.vmax or 0.0)
    if isinstance(scale, LogNorm) and high / low < 300:
        tens = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [n * 10.0**ten for ten in tens for n in (1, 2, 5) if low <= n * 10.0**ten <= high]
        labels = [f"{tick:g}" for tick in ticks]
    else:
        ticks = decade_ticks(low, high, scale.linthresh if isinstance(scale, SymLogNorm) else low)
        labels = decade_labels(ticks)
    bar.set_ticks(ticks, labels=labels)
    bar.minorticks_off()


def _bar_label(quantity: str, kind: str, split: str) -> str:
    what = "top eigenvalue λ₁" if quantity == "eigenvalue" else "trace"
    where = ", ".join(word for word in (curvature_name(kind), split) if word)
    return f"{what}\n({where})"


def _words(table: pd.DataFrame, quantity: str) -> str:
    seeds = int(table["n_seeds"].max())
    words = f"Cell: {'eigenvalue of largest magnitude' if quantity == 'eigenvalue' else 'trace'} of the layer's own "
    words += f"block of the curvature, {f'mean over {seeds} training seeds' if seeds > 1 else 'one seed'}. "
    words += "One colour scale for all methods"
    words += " of a space; the units of the spaces differ." if table["space"].nunique() > 1 else "."
    if (table["mean"] < 0).any():
        words += " Negative values are blue and carry a minus sign."
    places = len(_lines(table)) * len(_blocks(table))
    if (table.groupby(["method", "space", "kind", "split"]).size() < places).any():
        words += " Grey: no such layer."
    doubtful = int(table["doubtful"].sum())
    if doubtful and quantity == "eigenvalue":
        words += f" Stroke: not converged, or seeds differ in sign ({doubtful} cells)."
    elif doubtful:
        words += f" Stroke: 0 lies within two standard errors over probes ({doubtful} cells)."
    lost = int(table["n_non_finite"].sum())
    return words + (f" {lost} values are not finite and left out." if lost else "")
