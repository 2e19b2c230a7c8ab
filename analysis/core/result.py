"""Rows: the one shape in which every measure reports."""

import math
from collections.abc import Mapping
from typing import Any, Protocol

DEFAULTS: Mapping[str, Any] = {
    "space": "",
    "kind": "",
    "split": "",
    "layer": "",
    "label": "",
    "radius": math.nan,
    "y": math.nan,
    "index": -1,
    "direction_seed": -1,
    "standard_error": math.nan,
    "induced_norm": math.nan,
    "residual": math.nan,
    "chance": math.nan,
}

COLUMNS: tuple[str, ...] = (
    "measure",
    "space",
    "quantity",
    "kind",
    "split",
    "layer",
    "label",
    "radius",
    "y",
    "index",
    "direction_seed",
    "value",
    "standard_error",
    "induced_norm",
    "residual",
    "chance",
)
"""Column names in table order; their meaning is in ``docs/architecture.md``."""


class Result(Protocol):
    """What a measure returns: a frozen dataclass that can become table rows."""

    def rows(self) -> list[dict[str, Any]]:
        """One dict per value, with every key of :data:`COLUMNS`."""
        ...


def row(measure: str, quantity: str, value: float, **columns: Any) -> dict[str, Any]:
    """One row with every key of :data:`COLUMNS`, in that order.

    Raises:
        ValueError: a column that rows do not have.
    """
    unknown = columns.keys() - DEFAULTS.keys()
    if unknown:
        raise ValueError(f"rows have no column {sorted(unknown)[0]!r}: choose among {', '.join(DEFAULTS)}")
    filled = {"measure": measure, "quantity": quantity, "value": float(value), **DEFAULTS, **columns}
    return {name: filled[name] for name in COLUMNS}
