"""Reading text and labels from files and built-ins, through ``datasets``."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import pyarrow
from pyarrow import parquet

from bilora.errors import UserError
from bilora.tasks.packages import ROTTEN_TOMATOES
from bilora.tasks.spec import TaskSpec

BUILT_IN_DATA = ("rotten_tomatoes",)
SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Table:
    """One split as it was read.

    Attributes:
        source: name of the file, for messages.
        texts: one string an example.
        labels: one value an example as the file has it; empty for causal language modelling.
        class_names: names of the classes where the file itself declares them.
    """

    source: str
    texts: list[str]
    labels: list[Any]
    class_names: tuple[str, ...] | None = None


def read_splits(spec: TaskSpec) -> dict[str, Table]:
    """The splits of ``spec.data``: always ``train``, and ``validation`` and ``test`` where there are files of them.

    Raises:
        UserError: a missing file, an unknown format, a wrong column, an empty data set, a missing text or label.
    """
    if spec.data == "rotten_tomatoes":
        return {"train": _rotten_tomatoes(spec)}
    path = Path(spec.data)
    if path.is_dir():
        return {split: _read(file, spec) for split, file in _split_files(path).items()}
    if not path.is_file():
        raise UserError(
            f"no data at {spec.data}: name a {', '.join(SUFFIXES)} file, a folder with train.* in it, "
            f"or {' or '.join(BUILT_IN_DATA)}"
        )
    return {"train": _read(path, spec)}


def _split_files(folder: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for split in SPLITS:
        found = sorted(p for p in folder.iterdir() if p.stem == split and p.suffix.lower() in SUFFIXES)
        if len(found) > 1:
            raise UserError(f"folder {folder} has {' and '.join(p.name for p in found)}: keep one file a split")
        if found:
            files[split] = found[0]
    if "train" not in files:
        raise UserError(f"folder {folder} has no train file: add train.csv (or {', '.join(SUFFIXES[1:])})")
    return files


def _rotten_tomatoes(spec: TaskSpec) -> Table:
    """The 8,530 sentences of Pang and Lee (2005), half of them positive (label 1)."""
    reviews = _load(ROTTEN_TOMATOES.path(), spec)
    kept = [i for i, source in enumerate(reviews["source"][:]) if source == "rotten_tomatoes"]
    table = _table(reviews.select(kept), "rotten_tomatoes", spec)
    return replace(table, class_names=("negative", "positive")) if spec.label_column == "label" else table


def _read(path: Path, spec: TaskSpec) -> Table:
    return _table(_load(path, spec), path.name, spec)


def _load(path: Path, spec: TaskSpec) -> Any:
    """The file as a ``datasets.Dataset`` in memory; the library's copy on disk is dropped, not kept in a cache."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{path.name} has no known format: use one of {', '.join(SUFFIXES)}")
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with TemporaryDirectory() as cache:
            common: dict[str, Any] = {"cache_dir": cache, "keep_in_memory": True}
            if suffix in (".csv", ".tsv"):
                # By default the words "null", "None" and "NA" would be read as missing text.
                missing = {spec.text_column: [""], spec.label_column: ["", "nan", "NaN"]}
                common |= {"sep": "\t" if suffix == ".tsv" else ",", "keep_default_na": False, "na_values": missing}
                return datasets.Dataset.from_csv(str(path), **common)
            if suffix == ".parquet":
                return datasets.Dataset.from_parquet(str(path), **common)
            return datasets.Dataset.from_json(str(path), **common)
    except Exception as error:  # the readers under `datasets` raise errors of a dozen libraries
        if _has_no_rows(path):
            raise UserError(f"{path.name} is empty: it needs rows of text") from error
        cause = error.__cause__ or error
        detail = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        raise UserError(f"{path.name} cannot be read as {suffix[1:]} ({detail}): check the file") from error
    finally:
        if not bars:
            datasets.enable_progress_bars()


def _has_no_rows(path: Path) -> bool:
    """Whether a file that ``datasets`` refused is merely empty: it reports that in a different way for each format."""
    if path.suffix.lower() == ".parquet":
        try:
            return bool(parquet.read_metadata(path).num_rows == 0)
        except (pyarrow.ArrowException, OSError):
            return path.stat().st_size == 0
    lines = (line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines())
    filled = [line for line in lines if line]
    if path.suffix.lower() in (".csv", ".tsv"):
        return len(filled) < 2  # the first line is the header
    return "".join(filled) in ("", "[]")


def _table(rows: Any, source: str, spec: TaskSpec) -> Table:
    labelled = spec.kind == "classification"
    for option, column in [("text_column", spec.text_column)] + [("label_column", spec.label_column)] * labelled:
        if column not in rows.column_names:
            raise UserError(
                f"{source} has no column {column!r}: set {option} to one of {', '.join(rows.column_names) or 'none'}"
            )
    if len(rows) == 0:
        raise UserError(f"{source} is empty: it needs rows of text")
    texts = rows[spec.text_column][:]
    for number, text in enumerate(texts, start=1):
        if text is None or (isinstance(text, str) and not text.strip()):
            raise UserError(f"{source}: row {number} has no {spec.text_column}: fill it in or remove the row")
        if not isinstance(text, str):
            raise UserError(f"{source}: column {spec.text_column!r} holds {type(text).__name__}, not text")
    if not labelled:
        return Table(source, texts, [])
    labels = rows[spec.label_column][:]
    for number, label in enumerate(labels, start=1):
        if label is None or (isinstance(label, float) and math.isnan(label)) or label == "":
            raise UserError(f"{source}: row {number} has no {spec.label_column}: fill it in or remove the row")
    names = getattr(rows.features[spec.label_column], "names", None)
    return Table(source, texts, labels, tuple(names) if names else None)
