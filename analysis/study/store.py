"""Finished cells on disk: a folder each, built beside its place and renamed when complete."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout

RECORD = "cell.json"
"""What a cell was computed from, how long it took, and the checksums of its files."""

ROWS = "rows.parquet"
ERROR = "error.txt"
DAMAGED = "damaged"


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` under a temporary name, then rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class Busy(Exception):
    """Another process is computing this cell."""


@dataclass(frozen=True)
class Store:
    """The cells of one output folder.

    ``<folder>/<name>/`` is a finished cell and never changes again; ``<folder>/<name>.partial/`` is one being built, or
    one that failed (``error.txt`` in it says why) or was killed; ``<folder>/.locks/`` keeps two processes apart.

    Attributes:
        folder: ``OUTPUT/cells``.
    """

    folder: Path

    def path(self, name: str) -> Path:
        """Where the finished cell ``name`` lies."""
        return self.folder / name

    def partial(self, name: str) -> Path:
        """Where the cell ``name`` is built."""
        return self.folder / f"{name}.partial"

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Hold the cell ``name``; the lock goes with the process, however it ends.

        Raises:
            Busy: another process holds it.
        """
        locks = self.folder / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(locks / f"{name}.lock", timeout=0):
                yield
        except Timeout as error:
            raise Busy(name) from error

    def record(self, name: str) -> dict[str, Any] | None:
        """The record of the finished cell ``name``, or None where there is none or one of its files is damaged."""
        folder = self.path(name)
        try:
            record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            intact = all(file_digest(folder / file) == digest for file, digest in record["files"].items())
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            return None
        return record if intact else None

    def error(self, name: str) -> str | None:
        """Why the cell ``name`` failed when it was last tried; None if it did not fail."""
        try:
            return (self.partial(name) / ERROR).read_text(encoding="utf-8")
        except OSError:
            return None

    def rows(self, name: str) -> pd.DataFrame:
        """The table of the finished measurement ``name``."""
        return pd.read_parquet(self.path(name) / ROWS)

    def begin(self, name: str, *, keep: bool) -> Path:
        """The folder to build the cell ``name`` in; what a killed attempt left there stays if ``keep``."""
        self._move_aside(name)
        partial = self.partial(name)
        if not keep:
            shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True, exist_ok=True)
        (partial / ERROR).unlink(missing_ok=True)
        return partial

    def fail(self, name: str, text: str) -> None:
        """Keep ``text`` as the reason why the cell ``name`` failed."""
        self.partial(name).mkdir(parents=True, exist_ok=True)
        write_text(self.partial(name) / ERROR, text)

    def finish(self, name: str, record: Mapping[str, Any]) -> None:
        """Complete the cell ``name``: checksums and ``record`` into its folder, then the rename that makes it count."""
        partial, final = self.partial(name), self.path(name)
        files = {
            str(file.relative_to(partial)): file_digest(file)
            for file in sorted(partial.rglob("*"))
            if file.is_file() and file.name != RECORD
        }
        write_text(partial / RECORD, json.dumps({**record, "files": files}, indent=1, sort_keys=True) + "\n")
        os.replace(partial, final)

    def damaged(self) -> tuple[Path, ...]:
        """Cells that were moved aside because one of their files was not what it had been."""
        return tuple(sorted(self.folder.glob(f"*.{DAMAGED}-*")))

    def _move_aside(self, name: str) -> None:
        """Make room for a cell; what is there is damaged, for an intact one is never recomputed."""
        if not self.path(name).exists():
            return
        number = 1
        while (aside := self.folder / f"{name}.{DAMAGED}-{number}").exists():
            number += 1
        os.replace(self.path(name), aside)
