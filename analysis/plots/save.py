"""A figure on disk: PNG, PDF and SVG, beside them the tidy data that was drawn and a JSON of what made it."""

import hashlib
import io
import json
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from analysis.core.result import DEFAULTS
from analysis.plots.style import RC

FORMATS = ("png", "pdf", "svg")
DOTS_PER_INCH = 200

# Dates are left out of the files, so that drawing the same rows again changes nothing on disk.
_UNDATED: dict[str, dict[str, None]] = {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}
_GAUGES = {"lora": "as trained", "lora_balanced": "balanced by the SVD of B·A"}  # weights of other spaces have none
_PACKAGES = ("bilora", "torch", "transformers", "peft", "numpy", "pandas", "scipy", "matplotlib", "plotly", "meshio")


def save_figure(
    figure: Figure,
    name: str,
    folder: Path,
    data: pd.DataFrame,
    provenance: Mapping[str, Any],
    formats: tuple[str, ...] = FORMATS,
) -> list[Path]:
    """Write ``name.png``, ``.pdf``, ``.svg`` and those of :func:`save_data` into ``folder``, each atomically.

    Args:
        figure: the drawing.
        name: file stem.
        folder: made if missing.
        data: the tidy rows drawn.
        provenance: what made the rows (command, study, …), copied into the JSON.
        formats: image formats to write.

    Returns:
        The paths written, images first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    images = {}
    layout = figure.get_layout_engine()
    with mpl.rc_context(RC):  # fonttype and hashsalt are read while saving
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once, the same in every format
        for kind in formats:
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=DOTS_PER_INCH, metadata=_UNDATED[kind])
            images[kind] = _in_a_palette(buffer) if kind == "png" else buffer.getvalue()
    figure.set_layout_engine(layout)
    written = [write_atomically(folder / f"{name}.{kind}", image) for kind, image in images.items()]
    return [*written, *save_data(name, folder, data, provenance)]


def save_data(name: str, folder: Path, data: pd.DataFrame, provenance: Mapping[str, Any]) -> list[Path]:
    """Write the tidy rows that ``name`` draws and what made them, each atomically.

    Returns:
        The paths of ``name.csv`` and ``name.parquet``, both with the rows in full precision, and of ``name.json``: the
        CSV's hash, :func:`describe` and ``provenance``.
    """
    text, binary = data.to_csv(index=False, lineterminator="\n").encode(), io.BytesIO()
    data.to_parquet(binary, index=False)
    made_by = {"figure": name, "csv_sha256": hashlib.sha256(text).hexdigest(), **describe(data), **provenance}
    about = json.dumps(made_by, indent=2, ensure_ascii=False, default=str) + "\n"
    contents = {"csv": text, "parquet": binary.getvalue(), "json": about.encode()}
    return [write_atomically(folder / f"{name}.{kind}", content) for kind, content in contents.items()]


def _in_a_palette(png: io.BytesIO) -> bytes:
    """The same picture in 256 colours: line art loses nothing and takes a third of the bytes."""
    small = io.BytesIO()
    picture = Image.open(png).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    picture.save(small, "png", optimize=True, dpi=(DOTS_PER_INCH, DOTS_PER_INCH))
    return small.getvalue()


def describe(frame: pd.DataFrame) -> dict[str, Any]:
    """What rows are about: methods, seeds, spaces, splits, the gauge in each space, and the versions that read them."""
    about: dict[str, Any] = {}
    for key, column in (("methods", "method"), ("seeds", "seed"), ("spaces", "space"), ("splits", "split")):
        if column in frame:
            about[key] = sorted(value for value in frame[column].unique().tolist() if value != "")
    about["gauge"] = {space: _GAUGES.get(space, "none") for space in about.get("spaces", [])}
    about["versions"] = versions()
    return about


def direction_seeds(frame: pd.DataFrame, measure: str) -> list[int]:
    """Seeds of the random directions, starts or groups behind the rows of ``measure``; empty where there are none."""
    if "direction_seed" not in frame:
        return []
    found = frame.loc[frame["measure"] == measure, "direction_seed"]
    return sorted(int(seed) for seed in found.unique() if seed != DEFAULTS["direction_seed"])


def frame_hash(frame: pd.DataFrame) -> str:
    """SHA-256 of the rows as CSV, whatever file they were read from."""
    return hashlib.sha256(frame.to_csv(index=False, lineterminator="\n").encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages a result depends on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_atomically(path: Path, content: bytes) -> Path:
    """Write to a temporary name in the same folder, then rename: readers see the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
