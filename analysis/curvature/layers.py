"""Top eigenvalue and trace of each layer's diagonal block of the Hessian."""

from dataclasses import dataclass
from typing import Any

import pydantic
import torch

from analysis.core.measure import Interrupted, Measure, Watch
from analysis.core.objective import Objective
from analysis.core.result import row
from analysis.core.space import WeightSpace
from analysis.core.trained import Trained
from analysis.curvature.blocks import blocks_of
from analysis.curvature.eigen import Spectrum, top_eigenvalues
from analysis.curvature.factory import Curvature
from analysis.curvature.graphs import Graphs
from analysis.curvature.settings import CurvatureSettings
from analysis.curvature.trace import Trace, trace


@dataclass(frozen=True, eq=False)
class LayerCurvature:
    """Block name → its top eigenvalue and trace, in the order of the space."""

    blocks: dict[str, tuple[Spectrum, Trace]]

    def rows(self) -> list[dict[str, Any]]:
        """``eigenvalue`` with its residual and ``converged`` (1 or 0), ``trace`` with its standard error and
        ``trace_converged``, by layer."""
        rows = []
        for name, (spectrum, found) in self.blocks.items():
            common = {"space": spectrum.space, "split": spectrum.split, "kind": spectrum.label, "layer": name}
            residual = float(spectrum.residuals[0])
            rows += [
                row("layers", "eigenvalue", spectrum.values[0], index=1, residual=residual, **common),
                row("layers", "converged", float(spectrum.converged[0]), index=1, **common),
                row("layers", "trace", found.value, standard_error=found.standard_error, **common),
                row("layers", "trace_converged", float(found.converged), **common),
            ]
        return rows


def layer_curvature(
    objective: Objective,
    space: WeightSpace,
    *,
    by: str = "layer",
    tolerance: float = 1e-2,
    trace_tolerance: float = 0.1,
    max_products: int = 60,
    seed: int = 0,
    curvature: Curvature = "hessian",
    graphs: Graphs = "auto",
    autocast: torch.dtype | None = None,
    watch: Watch | None = None,
) -> LayerCurvature:
    """Top eigenvalue by magnitude, and trace, of the diagonal block that belongs to each layer.

    Args:
        objective: the mean loss.
        space: where, and with respect to which weights.
        by: what the blocks are (:func:`analysis.curvature.blocks.blocks_of`).
        tolerance: relative residual of a converged eigenpair.
        trace_tolerance: standard error of the trace at which to stop, relative to it.
        max_products: for each eigenvalue, and for each trace.
        seed: of probes and restarts.
        curvature: ``"hessian"`` or ``"ggn"``.
        graphs, autocast: as in :func:`~analysis.curvature.eigen.top_eigenvalues`.
        watch: told of (blocks done, blocks, the present one with its products and residual or error).

    Raises:
        UserError: a setting out of range, or a loss that is not finite or does not depend on a block.
        Interrupted: ``KeyboardInterrupt`` after the first block; its ``result`` holds the blocks finished.
    """
    blocks = blocks_of(space, by)
    common: dict[str, Any] = {
        "max_products": max_products,
        "seed": seed,
        "curvature": curvature,
        "graphs": graphs,
        "autocast": autocast,
    }
    found: dict[str, tuple[Spectrum, Trace]] = {}
    try:
        for name, part in blocks.items():
            common["watch"] = _inside(watch, len(found), len(blocks), name)
            top = top_eigenvalues(objective, part, 1, tolerance=tolerance, **common)
            found[name] = top, trace(objective, part, tolerance=trace_tolerance, **common)
    except KeyboardInterrupt as interrupt:
        if not found:  # what a block had found would pass for the whole space
            raise KeyboardInterrupt from None
        raise Interrupted(LayerCurvature(found)) from interrupt
    return LayerCurvature(found)


def _inside(watch: Watch | None, done: int, blocks: int, name: str) -> Watch | None:
    """Progress of one block, told as part of the whole."""
    if watch is None:
        return None

    def tell(products: int, most: int, note: str) -> None:
        watch(done, blocks, f"{name}: {products} products, {note}")

    return tell


class LayersSettings(CurvatureSettings):
    """Settings of the measure ``layers``."""

    by: str = pydantic.Field(default="layer", description="layer, number, kind or a regular expression")
    tolerance: float = pydantic.Field(default=1e-2, gt=0, lt=1, description="relative residual of a converged pair")
    trace_tolerance: float = pydantic.Field(default=0.1, gt=0, lt=1, description="relative standard error of a trace")
    max_products: int = pydantic.Field(default=60, ge=12, description="for each eigenvalue, and for each trace")


def _run(
    objective: Objective,
    space: WeightSpace,
    settings: LayersSettings,
    trained: Trained | None,
    watch: Watch | None = None,
) -> LayerCurvature:
    return layer_curvature(objective, space, **settings.arguments(), watch=watch)


MEASURE = Measure(
    name="layers",
    summary="top Hessian eigenvalue and trace of each layer's block",
    spaces=("full", "lora"),
    settings=LayersSettings,
    run=_run,
)
