"""What a ``bilora measure`` that was stopped had finished: a JSON beside the output that is to come."""

import json
from copy import copy
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.landscape.store import PointStore
from analysis.study.files import read_json, replace_file
from analysis.study.store import write_text
from bilora.errors import UserError


class Unfinished:
    """Rows by measure and space, on disk after each measurement.

    Args:
        output: the Parquet file that is to come; the others lie beside it.
        determinants: everything the rows depend on, as JSON. What was made from others counts as nothing.

    Attributes:
        stopped: Parquet file of what an interrupted measurement had found.
    """

    def __init__(self, output: Path, determinants: Any) -> None:
        self.stopped = output.with_suffix(".stopped.parquet")
        self._path = output.with_suffix(".unfinished.json")
        self._determinants = determinants
        stored = read_json(self._path)
        same = stored.get("determinants") == determinants
        self._finished: dict[str, list[dict[str, Any]]] = stored.get("finished", {}) if same else {}
        self._wrote_stopped = bool(stored.get("stopped"))
        self._name = ""
        self._writes = True

    def reading(self) -> "Unfinished":
        """The same for another process of the same work: it knows what is finished, and leaves the files alone."""
        reader = copy(self)
        reader._writes = False
        return reader

    def of(self, name: str) -> "Unfinished":
        """The part of one of several subjects; it is kept with the others."""
        part = copy(self)
        part._name = f"{name}/"
        return part

    def rows(self, measure: str, space: str) -> list[dict[str, Any]] | None:
        """The rows of a finished measurement, or None."""
        return self._finished.get(self._address(measure, space))

    def add(self, measure: str, space: str, rows: list[dict[str, Any]]) -> None:
        """Keep the rows of a finished measurement."""
        self._finished[self._address(measure, space)] = rows
        if not self._writes:
            return
        self._forget_stopped()
        self._save()
        self.points(measure, space).remove()

    def points(self, measure: str, space: str) -> PointStore:
        """Where a measurement under way keeps its points; they are gone once it is finished."""
        return PointStore(self._path.with_suffix(f".{measure}-{space}.points.jsonl"))

    def stop(self, rows: pd.DataFrame) -> None:
        """Keep what an interrupted measurement had found, for the reader alone.

        Raises:
            UserError: the file is there and not ours.
        """
        if self.stopped.exists() and not self._wrote_stopped:
            raise UserError(f"{self.stopped} is in the way of what the interrupted measurement found: rename it")
        replace_file(self.stopped, lambda path: rows.to_parquet(path, index=False))
        self._wrote_stopped = True
        self._save()

    def clear(self) -> None:
        """Forget all, once the output holds it."""
        self._forget_stopped()
        self._path.unlink(missing_ok=True)

    def _forget_stopped(self) -> None:
        if self._wrote_stopped:
            self.stopped.unlink(missing_ok=True)
            self._wrote_stopped = False

    def _save(self) -> None:
        content = {"determinants": self._determinants, "finished": self._finished, "stopped": self._wrote_stopped}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self._path, json.dumps(content) + "\n")

    def _address(self, measure: str, space: str) -> str:
        return f"{self._name}{measure}/{space}"
