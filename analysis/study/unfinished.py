"""What a ``bilora measure`` that was stopped had finished: a JSON beside the output that is to come."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from analysis.study.files import read_json
from analysis.study.store import write_text


class Unfinished:
    """Rows by measure and space, on disk after each measurement.

    Args:
        path: the file; one that was made from other ``determinants`` counts as empty.
        determinants: everything the rows depend on.
    """

    def __init__(self, path: Path, determinants: Mapping[str, Any]) -> None:
        self._path = path
        self._determinants = determinants
        stored = read_json(path)
        same = stored.get("determinants") == determinants
        self._finished: dict[str, list[dict[str, Any]]] = stored.get("finished", {}) if same else {}

    def rows(self, measure: str, space: str) -> list[dict[str, Any]] | None:
        """The rows of a finished measurement, or None."""
        return self._finished.get(_address(measure, space))

    def add(self, measure: str, space: str, rows: list[dict[str, Any]]) -> None:
        """Keep the rows of a finished measurement."""
        self._finished[_address(measure, space)] = rows
        content = {"determinants": self._determinants, "finished": self._finished}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self._path, json.dumps(content) + "\n")

    def clear(self) -> None:
        """Forget all, once the output holds it."""
        self._path.unlink(missing_ok=True)


def _address(measure: str, space: str) -> str:
    return f"{measure}/{space}"
