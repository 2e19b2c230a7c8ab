"""Published figures and tables as sets of measures: ``bilora measure --preset NAME``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bilora.errors import UserError


@dataclass(frozen=True)
class Preset:
    """What is measured and drawn.

    Attributes:
        what: measures, separated by commas.
        settings: ``measure.setting`` → value.
        figure: the one that is drawn.
    """

    what: str
    settings: Mapping[str, Any]
    figure: str


PRESETS: Mapping[str, Preset] = {
    "figure4": Preset("landscape", {"landscape.extent": 1.0, "landscape.points": 21}, "landscape"),
    "table-a6": Preset("adversarial", {"adversarial.radii": [0.5, 1.0, 2.5, 4.0, 5.0]}, "adversarial_accuracy"),
}
"""Of the Bi-LoRA paper (arXiv 2508.19564): the loss along filter-normalised lines (Figure 4), and the task metric after
one ascent step of growing strength (Table A6; strength 0 comes by itself), each in LoRA space beside full space."""


def preset_named(name: str) -> Preset:
    """The preset called ``name``.

    Raises:
        UserError: no such preset.
    """
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
