"""Loss and accuracy of the unperturbed model: what every flatness is to be read beside."""

from dataclasses import dataclass
from typing import Any

from analysis.core.measure import Measure, Watch
from analysis.core.objective import Objective
from analysis.core.result import row
from analysis.core.space import WeightSpace
from analysis.core.trained import Trained
from analysis.settings import MeasureSettings


@dataclass(frozen=True)
class Quality:
    """Mean loss and, where there are classes or tokens to get right, accuracy; of classes Matthews correlation too."""

    loss: float
    accuracy: float | None
    split: str
    matthews: float | None = None

    def rows(self) -> list[dict[str, Any]]:
        """``loss`` and, if known, ``accuracy`` and ``matthews``."""
        values = {"loss": self.loss, "accuracy": self.accuracy, "matthews": self.matthews}
        return [row("quality", name, value, split=self.split) for name, value in values.items() if value is not None]


def quality(objective: Objective, space: WeightSpace) -> Quality:
    """Loss and metrics at the space's weights; the same in every space of a model.

    Raises:
        UserError: the model returns no loss.
    """
    values = objective.evaluate(space)
    return Quality(values["loss"], values.get("accuracy"), objective.name, values.get("matthews"))


class QualitySettings(MeasureSettings):
    """The measure ``quality`` has no settings."""


def _run(
    objective: Objective,
    space: WeightSpace,
    settings: QualitySettings,
    trained: Trained | None,
    watch: Watch | None = None,
) -> Quality:
    return quality(objective, space)


MEASURE = Measure(
    name="quality",
    summary="loss and accuracy of the unperturbed model",
    spaces=("",),
    settings=QualitySettings,
    run=_run,
)
