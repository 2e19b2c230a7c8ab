"""What made a table of rows, read from the JSON beside it: for the figures drawn from it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analysis.study.files import read_json
from analysis.study.store import file_digest

_STUDY = ("command", "spec", "seeds", "versions", "failed")
PROVENANCE = "provenance.json"


def origins(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Of each table, its name, sha256 and what made it.

    That is all that the JSON beside a table of ``bilora measure`` or ``bilora landscape`` holds (content hashes of
    adapters, base model and data, settings with the directions' seeds, versions, device), or of a study its file,
    versions and the addresses of its cells. Nothing where there is no such JSON, or where it is of another table.
    """
    return [_origin(file) for file in files]


def _origin(file: Path) -> dict[str, Any]:
    digest = file_digest(file)
    found: dict[str, Any] = {"file": file.name, "sha256": digest}
    record = read_json(file.with_suffix(".json"))
    if record.get("sha256") == digest:
        return {**record, **found}
    study = read_json(file.with_name(PROVENANCE))
    if study.get("outputs", {}).get(file.name) == digest:
        cells = {cell["label"]: cell["address"] for cell in study.get("cells", {}).values()}
        return {**found, **{key: study[key] for key in _STUDY if key in study}, "cells": cells}
    return found
