"""Losses of points of a landscape on disk, one line each as they come, so that a killed run continues."""

import glob
import json
import os
from collections.abc import Mapping
from pathlib import Path

from bilora.errors import UserError

Key = tuple[float, ...]
Metrics = Mapping[str, float]


class PointStore:
    """Key → metrics, appended to a JSON-lines file.

    The first line says of what the points are; a file about something else is replaced once a point is added. A last
    line that was cut by a kill is dropped.

    Args:
        path: the file; made with the first point.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._found: dict[Key, dict[str, float]] = {}
        self._identity = ""
        self._ours = False

    def open(self, identity: str) -> None:
        """Read what is there of ``identity``, which names everything that the losses depend on.

        Raises:
            UserError: the file is no store of points.
        """
        self._identity, self._found, self._ours = identity, {}, False
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return
        whole = content[: content.rfind(b"\n") + 1].splitlines()
        try:
            if not whole:
                return
            if json.loads(whole[0])["points_of"] != identity:
                return
            for line in whole[1:]:
                key, metrics = json.loads(line)
                self._found[tuple(key)] = metrics
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path} is no file of landscape points ({error}): rename or remove it") from error
        if len(content) > len(b"\n".join([*whole, b""])):
            os.truncate(self.path, content.rfind(b"\n") + 1)
        self._ours = True

    def get(self, key: Key) -> dict[str, float] | None:
        """The metrics of a point, if they are known."""
        return self._found.get(key)

    def add(self, key: Key, metrics: Metrics) -> None:
        """Keep the metrics of a point; they are on disk when this returns."""
        self._found[key] = dict(metrics)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a" if self._ours else "w", encoding="utf-8") as file:
            if not self._ours:
                file.write(json.dumps({"points_of": self._identity}) + "\n")
            file.write(json.dumps([list(key), dict(metrics)]) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._ours = True

    def beside(self, name: str) -> Path:
        """A file that belongs to the points: kept as long as they are."""
        return self.path.with_name(f"{self.path.name}.{name}")

    def remove(self) -> None:
        """Delete the file, and those beside it."""
        self.path.unlink(missing_ok=True)
        for file in self.path.parent.glob(f"{glob.escape(self.path.name)}.*"):
            file.unlink(missing_ok=True)
