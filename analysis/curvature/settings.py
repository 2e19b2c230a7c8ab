"""Settings that all measures of curvature share."""

from collections.abc import Collection
from typing import Any, Literal

import pydantic
import torch

from analysis.curvature.factory import Curvature
from analysis.curvature.graphs import Graphs
from analysis.settings import MeasureSettings


class CurvatureSettings(MeasureSettings):
    """The operator, as at :func:`~analysis.curvature.factory.curvature_operator`, and the seed."""

    seed: int = pydantic.Field(default=0, ge=0, description="of random starts and probes")
    curvature: Curvature = pydantic.Field(default="hessian", description="hessian or ggn")
    graphs: Graphs = pydantic.Field(default="auto", description="kept between products: auto, retain or rebuild")
    autocast: Literal["bfloat16", "float16"] | None = pydantic.Field(
        default=None, description="run the model in bfloat16 or float16, with the float32 weights as masters"
    )

    def arguments(self, exclude: Collection[str] = ()) -> dict[str, Any]:
        """All settings but ``exclude`` as keyword arguments of the function that computes the measure."""
        given = self.model_dump(exclude=set(exclude))
        if self.autocast is not None:
            given["autocast"] = getattr(torch, self.autocast)
        return given
