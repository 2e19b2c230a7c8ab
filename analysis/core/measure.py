"""What a registered measure is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pydantic

from analysis.core.objective import Objective
from analysis.core.result import Result
from analysis.core.space import WeightSpace
from analysis.core.trained import Trained


@dataclass(frozen=True)
class Measure:
    """A measure as the registry, the command line and a study know it."""

    name: str
    """Registry name, and the ``measure`` column of its rows."""
    summary: str
    """One line for the command line."""
    spaces: tuple[str, ...]
    """Names of the spaces it is defined in; ``("",)`` when it has none."""
    settings: type[pydantic.BaseModel]
    """Settings with defaults: frozen, unknown keys refused, bounds checked."""
    run: Callable[[Objective, WeightSpace, Any, Trained | None], Result]
    """``run(objective, space, settings, trained)``; ``trained`` gives auxiliary factors to measures that use them."""
