"""From results to the tidy table that statistics, figures and the report read."""

from collections.abc import Iterable
from typing import Any

import pandas as pd

from analysis.core.result import COLUMNS, DEFAULTS, Result


def rows_frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Rows as a table with the columns of the contract in their order and types."""
    numbers = {name: type(default).__name__ for name, default in DEFAULTS.items() if not isinstance(default, str)}
    types = {"value": "float64", **{name: f"{kind}64" for name, kind in numbers.items()}}
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(types)


def to_frame(results: Result | Iterable[Result], *, method: str, seed: int = 0, study: str = "") -> pd.DataFrame:
    """The rows of ``results`` of one trained model, with the columns a study adds.

    Concatenate the frames of several methods and training seeds (``pandas.concat``) and give them to the functions of
    ``analysis.plots`` and ``analysis.statistics``.

    Args:
        results: what measures returned.
        method: label of the method, by which figures choose colours (``"LoRA"``, ``"Bi-LoRA"``, …).
        seed: training seed.
        study: a name for the comparison.

    Returns:
        One row per value: ``study``, ``method``, ``seed`` and the columns of :data:`analysis.core.result.COLUMNS`.
    """
    several = results if isinstance(results, Iterable) else [results]
    frame = rows_frame([row for result in several for row in result.rows()])
    return frame.assign(study=study, method=method, seed=seed)[["study", "method", "seed", *COLUMNS]]
