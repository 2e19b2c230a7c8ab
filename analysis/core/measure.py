"""What a registered measure is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import pydantic

from analysis.core.objective import Objective
from analysis.core.result import Result
from analysis.core.space import WeightSpace
from analysis.core.trained import Trained

Watch = Callable[[int, int, str], None]
"""Progress of long work: ``watch(done, most, note)``, for example ``(12, 100, "residual 3e-3")``."""


class Interrupted(KeyboardInterrupt):
    """``KeyboardInterrupt`` of a measure that had found something by then.

    Attributes:
        result: what it had found; its rows say what has converged.
    """

    def __init__(self, result: Result) -> None:
        super().__init__("interrupted")
        self.result = result


class Run(Protocol):
    """``trained`` gives auxiliary factors to measures that use them; ``watch`` is told of progress."""

    def __call__(
        self,
        objective: Objective,
        space: WeightSpace,
        settings: Any,
        trained: Trained | None,
        watch: Watch | None = None,
        /,
    ) -> Result: ...


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
    run: Run
    """What measures."""
