"""How several measured adapters differ: paired differences beside the rows they are made from."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from analysis.statistics import paired_differences
from analysis.study.files import replace_file
from bilora.errors import UserError

PLAIN = "lora"
"""Registry name of what other methods are compared with."""


def differences_path(output: Path) -> Path:
    """Where the differences of the rows in ``output`` lie."""
    return output.with_suffix(".differences.parquet")


def check_free(output: Path, *, force: bool) -> None:
    """Refuse to write differences over a file that does not belong to ``output``.

    Raises:
        UserError: such a file is there, and ``force`` is not set.
    """
    path = differences_path(output)
    if path.exists() and not output.exists() and not force:
        raise UserError(f"{path} is in the way of the differences: rename it, or replace it with --force")


def baseline_of(methods: Sequence[str]) -> str:
    """Plain LoRA where it is one of ``methods``, in whatever letters, else the first."""
    return next((method for method in methods if method.lower() == PLAIN), methods[0])


def measured_differences(frame: pd.DataFrame) -> pd.DataFrame:
    """Differences of every method to :func:`baseline_of`, over shared seeds, or over the directions of the only one.

    Args:
        frame: rows of several subjects, with ``method`` and ``seed``.

    Returns:
        As :func:`analysis.statistics.paired_differences`; empty where no two methods share a seed.

    Raises:
        UserError: as that function.
    """
    return paired_differences(frame, baseline_of(frame["method"].unique().tolist()), within_seed=True)


def write_differences(output: Path, differences: pd.DataFrame) -> Path:
    """Write the differences beside ``output``, atomically, and return where."""
    path = differences_path(output)
    replace_file(path, lambda temporary: differences.to_parquet(temporary, index=False))
    return path
