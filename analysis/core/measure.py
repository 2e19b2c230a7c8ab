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
    """Names of the spaces it is taken in unless others are asked for; ``("",)`` when it has none."""
    settings: type[pydantic.BaseModel]
    """Settings with defaults: frozen, unknown keys refused, bounds checked."""
    run: Run
    """What measures."""
    keeps_points: bool = False
    """Whether ``run`` takes a last argument ``store``, a :class:`analysis.landscape.store.PointStore`."""

    needs_adapter: bool = False
    """Whether there is nothing to measure on a model without adapter, whatever the space."""

    @property
    def offered(self) -> tuple[str, ...]:
        """The spaces it can be asked for, defaults first.

        A measure of any vector of weights, of W and of the factors, can be taken in the factors' balanced gauge and in
        all parameters of the merged model too.
        """
        return (*self.spaces, "lora_balanced", "all") if {"full", "lora"} <= set(self.spaces) else self.spaces

    def result(
        self,
        objective: Objective,
        space: WeightSpace,
        settings: Any,
        trained: Trained | None = None,
        watch: Watch | None = None,
        store: Any = None,
    ) -> Result:
        """:attr:`run`, given ``store`` where it takes one."""
        if not self.keeps_points:
            return self.run(objective, space, settings, trained, watch)
        run: Any = self.run
        result: Result = run(objective, space, settings, trained, watch, store)
        return result
