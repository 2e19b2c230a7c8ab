"""Figures, each a function from tidy rows to a matplotlib ``Figure``, and all of them on disk by :func:`draw_all`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from analysis.plots.canvas import NothingToDraw
from analysis.plots.density import density_curves, density_table
from analysis.plots.eigenvalues import eigenvalue_bars, eigenvalue_ladder, eigenvalue_table
from analysis.plots.landscape import landscape_lines, landscape_table
from analysis.plots.layers import LayerQuantity, layer_heatmap, layer_table
from analysis.plots.overlap import outside_share_bars, outside_share_table, overlap_heatmap, overlap_table
from analysis.plots.perturbation import perturbation_curves, perturbation_table
from analysis.plots.save import save_figure

__all__ = [
    "FIGURES",
    "FigureFamily",
    "NothingToDraw",
    "density_curves",
    "draw_all",
    "eigenvalue_bars",
    "eigenvalue_ladder",
    "landscape_lines",
    "layer_heatmap",
    "outside_share_bars",
    "overlap_heatmap",
    "perturbation_curves",
]


@dataclass(frozen=True)
class FigureFamily:
    """One figure of every study: its file stem, title, the data it draws and the drawing."""

    name: str
    title: str
    table: Callable[[pd.DataFrame], pd.DataFrame]
    draw: Callable[[pd.DataFrame], Figure]


def _curves(name: str, title: str, measure: str, quantity: str, **options: Any) -> FigureFamily:
    table = partial(perturbation_table, measure=measure, quantity=quantity)
    return FigureFamily(name, title, table, partial(perturbation_curves, measure=measure, quantity=quantity, **options))


def _layers(name: str, title: str, quantity: LayerQuantity) -> FigureFamily:
    table, draw = partial(layer_table, quantity=quantity), partial(layer_heatmap, quantity=quantity)
    return FigureFamily(name, title, table, draw)


FIGURES: tuple[FigureFamily, ...] = (
    FigureFamily("landscape", "Loss along filter-normalised random lines", landscape_table, landscape_lines),
    _curves("random", "Loss rise under random perturbations", "random", "loss_rise"),
    _curves("random_induced", "The same over the induced ‖ε_W‖", "random", "loss_rise", x="induced_norm"),
    _curves("adversarial", "Loss rise one gradient step away", "adversarial", "loss_rise"),
    _curves("adversarial_induced", "The same over the induced ‖ε_W‖", "adversarial", "loss_rise", x="induced_norm"),
    _curves("adversarial_accuracy", "Accuracy one gradient step away", "adversarial", "accuracy"),
    FigureFamily("eigenvalues", "Largest Hessian eigenvalues", eigenvalue_table, eigenvalue_bars),
    FigureFamily("eigenvalue_ladder", "Every eigenvalue with its residual", eigenvalue_table, eigenvalue_ladder),
    FigureFamily("density", "Spectral density of the curvature", density_table, density_curves),
    _layers("layer_eigenvalues", "Top eigenvalue of every layer", "eigenvalue"),
    _layers("layer_traces", "Trace of the curvature of every layer", "trace"),
    FigureFamily("overlap", "Overlap of primary and auxiliary subspaces", overlap_table, overlap_heatmap),
    FigureFamily("outside_share", "What LoRA-SAM cannot reach", outside_share_table, outside_share_bars),
)


def draw_all(frame: pd.DataFrame, folder: Path, provenance: Mapping[str, Any]) -> list[Path]:
    """Draw every figure whose rows were measured, each as PNG, PDF, SVG with its tidy CSV and a JSON of what made it.

    Args:
        frame: the tidy rows of one study.
        folder: made if missing.
        provenance: copied into every JSON (study, command, hash of the rows, …).

    Returns:
        The paths written.

    Raises:
        NothingToDraw: not one figure has rows.
    """
    written: list[Path] = []
    for family in FIGURES:
        try:
            table = family.table(frame)
        except NothingToDraw:
            continue
        written += save_figure(family.draw(frame), family.name, folder, table, {"title": family.title, **provenance})
    if not written:
        raise NothingToDraw(
            "no figure has rows: add one of landscape, random, adversarial, spectrum, density, layers, subspace"
        )
    return written
