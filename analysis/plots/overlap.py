"""Subspaces: overlap of Bi-LoRA's two pairs layer by layer, and what LoRA-SAM could not reach."""

import re

import numpy as np
import pandas as pd
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.plots import canvas
from analysis.plots.style import PAGE, styles_for
from analysis.statistics import summarize

SIDES = {"column": "columns: Col(B₁) with Col(B₂)", "row": "rows: Row(A₁) with Row(A₂)"}
PERTURBATIONS = {
    "applied": "as applied\n(recorded)",
    "lora_sam": "LoRA-SAM",
    "auxiliary": "auxiliary\ns₂·B₂A₂",
    "gradient_rank_r": "gradient,\nrank r",
    "gradient": "gradient\n(SAM in W)",
    "filter_noise": "filter noise\n(Flat-LoRA)",
    "isotropic": "isotropic\nnoise",
}

_BLOCK = re.compile(r"^(?P<stem>.*?)\.(?P<block>\d+)\.(?P<module>.+)$")
_COLOURS = "cividis"

NO_BLOCK = -1
"""``block`` of a layer outside the numbered blocks."""


def overlap_table(frame: pd.DataFrame, confidence: float = 0.95) -> pd.DataFrame:
    """Overlap per method, layer and side, mean over seeds, with ``block`` and ``module`` read off the layer's name.

    Raises:
        NothingToDraw: no overlap was measured.
    """
    rows = canvas.chosen(frame, "subspace", "overlap")
    table = summarize(rows[rows["layer"] != ""], confidence)
    if table.empty:
        raise canvas.NothingToDraw("no overlap by layer to draw: measure subspace on an adapter trained with bilora")
    parts = table["layer"].map(_BLOCK.match)
    table["block"] = [int(part["block"]) if part else NO_BLOCK for part in parts]
    table["module"] = [part["module"] if part else layer for part, layer in zip(parts, table["layer"], strict=True)]
    return table


@canvas.styled
def overlap_heatmap(frame: pd.DataFrame) -> Figure:
    """Overlap of primary and auxiliary subspaces, module by block, columns of B beside rows of A.

    The colour bar is marked at the mean overlap of random subspaces.

    Raises:
        NothingToDraw: no overlap was measured.
    """
    table = overlap_table(frame)
    methods = [m for m in styles_for(frame["method"]) if m in set(table["method"])]
    sides = [side for side in SIDES if side in set(table["kind"])]
    modules = list(dict.fromkeys(table["module"]))
    blocks = sorted(table["block"].unique(), key=lambda block: (block == NO_BLOCK, block))
    height = 0.95 + len(methods) * (0.6 + 0.24 * len(modules))
    figure, grid = canvas.panels(len(methods), len(sides), PAGE, height, sharey="all")
    scale = Normalize(0, max(float(table["mean"].max()), 2 * float(table["chance"].max()), 1e-6))
    for method, line in zip(methods, grid, strict=True):
        for side, axes in zip(sides, line, strict=True):
            cells = table[(table["method"] == method) & (table["kind"] == side)]
            values = cells.pivot(index="module", columns="block", values="mean").reindex(index=modules, columns=blocks)
            axes.grid(visible=False)
            axes.imshow(values, cmap=_COLOURS, norm=scale, aspect="auto")
            axes.set_facecolor("0.93")
            for module, block, value in cells[["module", "block", "mean"]].itertuples(index=False, name=None):
                x, y = blocks.index(block), modules.index(module)
                text = "–" if np.isnan(value) else f"{value:.2f}".removeprefix("0")
                dark = not np.isnan(value) and scale(value) < 0.55
                axes.text(x, y, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
            axes.set_xticks(range(len(blocks)), ["none" if block == NO_BLOCK else str(block) for block in blocks])
            axes.set_yticks(range(len(modules)), modules)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
            axes.set_title(f"{method}\n{SIDES[side]}" if len(methods) > 1 else SIDES[side])
            axes.set_xlabel("block")
    bar = figure.colorbar(ScalarMappable(scale, _COLOURS), ax=grid, aspect=18, pad=0.02)
    bar.set_label("overlap (0 orthogonal, 1 equal)", fontsize=7.5)
    bar.ax.tick_params(labelsize=7)
    low, high = float(table["chance"].min()), float(table["chance"].max())
    bar.ax.axhline((low + high) / 2, color="white", linewidth=1.6)
    seeds = int(table["n_seeds"].max())
    chance = f"{low:.3f}" if np.isclose(low, high) else f"{low:.3f} to {high:.3f}"
    words = (
        f"Cell: ‖UᵀV‖²/r of trained and auxiliary pair, mean over {seeds} training seed{'s' * (seeds != 1)}. "
        f"White line on the colour bar: expected of random subspaces ({chance}, by layer)."
    )
    lost = int(table["n_non_finite"].sum())
    canvas.caption(figure, words + (f" {lost} values undefined (zero factor) and left out." if lost else ""), PAGE)
    return figure


def kinds_in_order(table: pd.DataFrame) -> dict[str, str]:
    """The kinds of perturbation in ``table`` → their names on an axis, those of :data:`PERTURBATIONS` first."""
    here = set(table["kind"])
    order = [*(kind for kind in PERTURBATIONS if kind in here), *sorted(here - set(PERTURBATIONS))]
    return {kind: PERTURBATIONS.get(kind, kind) for kind in order}


def outside_share_table(frame: pd.DataFrame, confidence: float = 0.95) -> pd.DataFrame:
    """What :func:`outside_share_bars` draws: one row per method, perturbation and seed, with the mean over seeds.

    Raises:
        NothingToDraw: no outside share was measured.
    """
    rows = canvas.chosen(frame, "subspace", "outside_share")
    table = canvas.seeds_and_means(rows[rows["layer"] == ""], confidence)
    return table.sort_values(["split", "kind", "method", "seed"], ignore_index=True)


@canvas.styled
def outside_share_bars(frame: pd.DataFrame, confidence: float = 0.95) -> Figure:
    """Share of each perturbation's squared norm that LoRA-SAM cannot reach, per method, with the chance level.

    Raises:
        NothingToDraw: no outside share was measured.
    """
    styles = styles_for(frame["method"])
    table = outside_share_table(frame, confidence)
    splits = canvas.variants(table, ["split"])
    kinds = kinds_in_order(table)
    figure, grid = canvas.panels(len(splits), 1, PAGE, 0.75 + 1.9 * len(splits))
    for (split,), (axes,) in zip(splits, grid, strict=True):
        here = table[table["split"] == split]
        canvas.draw_kinds(axes, here, kinds, styles)
        for at, kind in enumerate(kinds):
            chance = here.loc[here["kind"] == kind, "chance"].mean()
            axes.hlines(chance, at - 0.45, at + 0.45, color="black", linewidth=1, linestyle="--")
        axes.set_ylim(0, 1.04)
        axes.set_ylabel("share outside\nLoRA-SAM's reach" + (f" ({split})" if split else ""))
    random = Line2D([], [], color="black", linestyle="--", linewidth=1, label="random perturbation")
    canvas.legend(figure, [*canvas.bar_handles(styles, table["method"]), random], PAGE)
    lost = int(table["n_non_finite"].sum())
    words = "Dots: training seeds. " + canvas.interval_words(table, "whiskers", confidence)
    canvas.caption(figure, words + (f" {lost} values undefined (zero perturbation)." if lost else ""), PAGE)
    return figure
