"""One measurement on disk: a Parquet file, and beside it a JSON of what it was computed from."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.study.store import file_digest, write_text
from bilora.errors import UserError


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make the file under a temporary name beside ``path``, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; empty where there is none or it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_measured(path: Path, determinants: Any, *, force: bool) -> pd.DataFrame | None:
    """The rows in ``path`` if they were computed from ``determinants``; None where there is nothing (to keep).

    Raises:
        UserError: ``path`` holds something else, and ``force`` is not set.
    """
    if not path.exists():
        return None
    record = read_json(path.with_suffix(".json"))
    if path.is_file() and record.get("determinants") == determinants and record.get("sha256") == file_digest(path):
        return pd.read_parquet(path)
    if path.is_file() and force:
        return None
    raise UserError(f"{path} holds something else: name another output, or replace it with --force")


def write_measured(path: Path, frame: pd.DataFrame, determinants: Any, names: Sequence[tuple[str, int]]) -> None:
    """Write the rows to ``path`` and what made them beside it, each atomically.

    Args:
        path: the Parquet file.
        frame: the rows.
        determinants: everything they depend on, as JSON.
        names: (method, training seed) of what was measured; of one subject, figures take its name from there.
    """
    replace_file(path, lambda temporary: frame.to_parquet(temporary, index=False))
    record: dict[str, Any] = {"determinants": determinants, "sha256": file_digest(path)}
    if len(names) == 1:
        record |= {"label": names[0][0], "seed": names[0][1]}
    write_text(path.with_suffix(".json"), json.dumps(record, indent=1, sort_keys=True) + "\n")
