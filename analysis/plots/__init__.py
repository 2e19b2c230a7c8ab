"""Figures, each a function from tidy rows to a matplotlib ``Figure``, and all of them on disk by :func:`draw_all`.

Surfaces are also written as an interactive page and as a mesh.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from analysis.plots.canvas import NothingToDraw
from analysis.plots.connectivity import connectivity_curves, connectivity_table
from analysis.plots.density import density_curves, density_table
from analysis.plots.dynamics import CONVERGENCE, OUTSIDE, PARTS, Panel, dynamics_table, step_curves
from analysis.plots.efficiency import efficiency_bars, efficiency_table
from analysis.plots.eigenvalues import eigenvalue_bars, eigenvalue_ladder, eigenvalue_table
from analysis.plots.forest import forest_plot, forest_table
from analysis.plots.landscape import landscape_lines, landscape_table
from analysis.plots.layers import LayerQuantity, layer_heatmap, layer_table
from analysis.plots.m_sharpness import m_sharpness_points, m_sharpness_table
from analysis.plots.overlap import outside_share_bars, outside_share_table, overlap_heatmap, overlap_table
from analysis.plots.perturbation import perturbation_curves, perturbation_table
from analysis.plots.robustness import rise_bars, rise_table
from analysis.plots.save import direction_seeds, save_data, save_figure
from analysis.plots.steps_html import interactive_steps
from analysis.plots.surface import surface_contours
from analysis.plots.surface_data import KINDS, surface_table
from analysis.plots.surface_html import interactive_surface, write_surface_html
from analysis.plots.surface_vtk import write_surface_vtk
from analysis.plots.update_spectrum import update_spectrum, update_spectrum_table
from analysis.plots.worst_case import worst_case_curves, worst_case_table
from bilora.errors import UserError

__all__ = [
    "FIGURES",
    "FILES",
    "FigureFamily",
    "NothingToDraw",
    "connectivity_curves",
    "density_curves",
    "draw_all",
    "efficiency_bars",
    "eigenvalue_bars",
    "eigenvalue_ladder",
    "forest_plot",
    "interactive_steps",
    "interactive_surface",
    "landscape_lines",
    "layer_heatmap",
    "m_sharpness_points",
    "outside_share_bars",
    "overlap_heatmap",
    "perturbation_curves",
    "rise_bars",
    "step_curves",
    "surface_contours",
    "update_spectrum",
    "worst_case_curves",
    "write_surface_html",
    "write_surface_vtk",
]


@dataclass(frozen=True)
class FigureFamily:
    """One figure of every study: its file stem, title, measure, the data it draws and the drawing."""

    name: str
    title: str
    measure: str
    table: Callable[..., pd.DataFrame]
    draw: Callable[..., Figure]
    compares: bool = False
    """Whether ``table`` and ``draw`` take the label of a ``baseline``, by default the first method."""

    def against(self, baseline: str | None) -> "FigureFamily":
        """The same with a given baseline."""
        if not self.compares or baseline is None:
            return self
        return replace(self, table=partial(self.table, baseline=baseline), draw=partial(self.draw, baseline=baseline))

    def about(self, frame: pd.DataFrame) -> dict[str, Any]:
        """What the figure's JSON says of the rows it is drawn from, beside what made them."""
        rows = frame[frame["measure"] == self.measure] if self.measure else frame
        seeds = rows["seed"].unique().tolist()
        return {"title": self.title, "seeds": sorted(seeds), "direction_seeds": direction_seeds(frame, self.measure)}


def _curves(name: str, title: str, measure: str, quantity: str, **options: Any) -> FigureFamily:
    table = partial(perturbation_table, measure=measure, quantity=quantity)
    return FigureFamily(
        name, title, measure, table, partial(perturbation_curves, measure=measure, quantity=quantity, **options)
    )


def _rises(measure: str, title: str) -> FigureFamily:
    table, draw = partial(rise_table, measure=measure), partial(rise_bars, measure=measure)
    return FigureFamily(measure, title, measure, table, draw)


def _layers(name: str, title: str, quantity: LayerQuantity) -> FigureFamily:
    table, draw = partial(layer_table, quantity=quantity), partial(layer_heatmap, quantity=quantity)
    return FigureFamily(name, title, "layers", table, draw)


def _over_steps(name: str, title: str, panels: tuple[Panel, ...], columns: int) -> FigureFamily:
    table = partial(dynamics_table, panels=panels)
    return FigureFamily(name, title, "dynamics", table, partial(step_curves, panels=panels, columns=columns))


def _surfaces(kind: str) -> FigureFamily:
    table, draw = partial(surface_table, kind=kind), partial(surface_contours, kind=kind)
    return FigureFamily(f"surface_{kind}", f"Loss on the {KINDS[kind]}", "surface", table, draw)


FIGURES: tuple[FigureFamily, ...] = (
    FigureFamily("differences", "Differences to the baseline", "", forest_table, forest_plot, compares=True),
    FigureFamily(
        "landscape", "Loss along filter-normalised random lines", "landscape", landscape_table, landscape_lines
    ),
    *(_surfaces(kind) for kind in KINDS),
    FigureFamily(
        "connectivity",
        "Loss on the path between two solutions",
        "connectivity",
        connectivity_table,
        connectivity_curves,
    ),
    _curves("random", "Loss rise under random perturbations", "random", "loss_rise"),
    _curves("random_induced", "The same over the induced ‖ε_W‖", "random", "loss_rise", x="induced_norm"),
    _curves("adversarial", "Loss rise one gradient step away", "adversarial", "loss_rise"),
    _curves("adversarial_induced", "The same over the induced ‖ε_W‖", "adversarial", "loss_rise", x="induced_norm"),
    _curves("adversarial_accuracy", "Accuracy one gradient step away", "adversarial", "accuracy"),
    _curves("adversarial_matthews", "Matthews correlation one gradient step away", "adversarial", "matthews"),
    FigureFamily(
        "worst_case", "Worst-case loss rise, a lower bound", "worst_case", worst_case_table, worst_case_curves
    ),
    _curves("read_noise", "Loss rise under read noise on the weights", "read_noise", "loss_rise"),
    _rises("quantisation", "Loss rise of rounded weights"),
    _rises("ascent_gap", "Loss rise by Bi-LoRA's own auxiliary"),
    FigureFamily("m_sharpness", "m-sharpness, each m for itself", "m_sharpness", m_sharpness_table, m_sharpness_points),
    FigureFamily("eigenvalues", "Largest Hessian eigenvalues", "spectrum", eigenvalue_table, eigenvalue_bars),
    FigureFamily(
        "eigenvalue_ladder", "Every eigenvalue with its residual", "spectrum", eigenvalue_table, eigenvalue_ladder
    ),
    FigureFamily("density", "Spectral density of the curvature", "density", density_table, density_curves),
    _layers("layer_eigenvalues", "Top eigenvalue of every layer", "eigenvalue"),
    _layers("layer_traces", "Trace of the curvature of every layer", "trace"),
    FigureFamily("overlap", "Overlap of primary and auxiliary subspaces", "subspace", overlap_table, overlap_heatmap),
    FigureFamily("outside_share", "What LoRA-SAM cannot reach", "subspace", outside_share_table, outside_share_bars),
    FigureFamily("update_spectrum", "Singular values of the updates", "update", update_spectrum_table, update_spectrum),
    FigureFamily(
        "efficiency", "Share of the best ascent in full space", "efficiency", efficiency_table, efficiency_bars
    ),
    _over_steps("outside_share_steps", "What LoRA-SAM cannot reach, over training", OUTSIDE, 2),
    _over_steps("convergence", "How primary and auxiliary settle", CONVERGENCE, 3),
    _over_steps("perturbation_parts", "Parts of the perturbation of the factors", PARTS, 2),
)


FILES: dict[str, Callable[[pd.DataFrame, Path], Path]] = {
    "surface.html": lambda frame, path: write_surface_html(interactive_surface(frame), path),
    "surface.vtu": write_surface_vtk,
}
"""Files that are written beside the figures where surfaces were measured, by name; their rows are ``surface.csv``."""


def draw_all(
    frame: pd.DataFrame,
    folder: Path,
    provenance: Mapping[str, Any],
    only: Collection[str] | None = None,
    baseline: str | None = None,
) -> list[Path]:
    """Draw every figure whose rows were measured, each as PNG, PDF, SVG with its rows as CSV and Parquet and a JSON.

    Args:
        frame: the tidy rows of one study.
        folder: made if missing.
        provenance: copied into every JSON (study, command, hash of the rows, …).
        only: names of :data:`FIGURES` and :data:`FILES`; each of them must have rows. None: all that have.
        baseline: label of the method that others are compared with; default the first.

    Returns:
        The paths written.

    Raises:
        NothingToDraw: not one figure has rows, or one of ``only`` has none.
        UserError: a name in ``only`` is unknown.
    """
    known = [*(family.name for family in FIGURES), *FILES]
    for name in only or ():
        if name not in known:
            raise UserError(f"no figure is called {name!r}: choose one of {', '.join(known)}")
    tables: dict[str, pd.DataFrame] = {}
    families = [family.against(baseline) for family in FIGURES]
    for family in families:
        if only is not None and family.name not in only:
            continue
        try:
            tables[family.name] = family.table(frame)
        except NothingToDraw:
            if only is not None:
                raise
    files = [name for name in FILES if name in only] if only is not None else [*FILES]
    if only is None and not any(name.startswith("surface_") for name in tables):
        files = []
    if files:
        surface_table(frame)
    if not tables and not files:
        raise NothingToDraw(
            "no figure has rows: add one of landscape, surface, random, adversarial, worst_case, m_sharpness, "
            "spectrum, density, layers, subspace"
        )
    written: list[Path] = []
    for family in families:
        if family.name in tables:
            made_by = {**family.about(frame), **provenance}
            written += save_figure(family.draw(frame), family.name, folder, tables[family.name], made_by)
    written += [FILES[name](frame, folder / name) for name in files]
    if files:
        seeds = direction_seeds(frame, "surface")
        made_by = {"title": "Loss surfaces", "files": files, "direction_seeds": seeds, **provenance}
        written += save_data("surface", folder, surface_table(frame), made_by)
    return written
