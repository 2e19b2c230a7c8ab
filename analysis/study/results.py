"""From finished cells to what the user opens: the tidy table, its provenance, figures and the page."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.study.engine import Failure
from analysis.study.files import read_json, replace_file
from analysis.study.inputs import library_versions
from analysis.study.latex import latex_table
from analysis.study.plan import Plan, canonical
from analysis.study.sources import presentation_code
from analysis.study.spec import StudySpec
from analysis.study.store import Store, file_digest, write_text
from analysis.study.table import markdown_table

TABLE, TEXT_TABLE, MARKDOWN, LATEX, PROVENANCE, FIGURES, PAGE = (
    "results.parquet",
    "results.csv",
    "table.md",
    "table.tex",
    "provenance.json",
    "figures",
    "report.html",
)


@dataclass(frozen=True)
class Results:
    """Where the results of a study lie.

    Attributes:
        folder: the study's output folder.
        frame: the rows of ``results.parquet``; empty if no measurement succeeded.
        drawn: whether files were written, rather than found up to date.
    """

    folder: Path
    frame: pd.DataFrame
    drawn: bool

    @property
    def table(self) -> Path:
        """The tidy table."""
        return self.folder / TABLE

    @property
    def figures(self) -> Path:
        """Folder of the figures."""
        return self.folder / FIGURES

    @property
    def page(self) -> Path:
        """The HTML report."""
        return self.folder / PAGE


def write_results(spec: StudySpec, plan: Plan, store: Store, failures: Sequence[Failure], command: str) -> Results:
    """Write table, figures, page and provenance from the finished cells; nothing if they are up to date.

    The table's content and order depend on the study and its cells alone, not on when or by whom they were computed.
    ``provenance.json`` comes last, so that a killed attempt is made again.

    Args:
        spec: the study.
        plan: its cells.
        store: where they lie.
        failures: cells without a result; named in the provenance.
        command: what the user typed.
    """
    folder = spec.folder
    inputs = _inputs(spec, plan, store, failures)
    known = read_json(folder / PROVENANCE)
    if known.get("inputs") == inputs and _intact(folder, known.get("outputs", {})):
        return Results(folder, pd.read_parquet(folder / TABLE), drawn=False)

    frame = collect_rows(spec, plan, store)
    if frame.empty:
        return Results(folder, frame, drawn=False)
    replace_file(folder / TABLE, lambda path: frame.to_parquet(path, index=False))
    replace_file(folder / TEXT_TABLE, lambda path: frame.to_csv(path, index=False, lineterminator="\n"))
    provenance = _provenance(spec, plan, store, failures, command)
    made_by = {key: provenance[key] for key in ("study", "command", "seeds", "code", "versions")}
    baseline = spec.baseline_label if spec.baseline_label in set(frame["method"]) else str(frame["method"].iloc[0])
    write_text(folder / MARKDOWN, markdown_table(frame, baseline))
    write_text(folder / LATEX, latex_table(frame, baseline))
    costs = _costs(plan, store)
    drawn = _present(spec, baseline, costs, frame, {**made_by, "rows_sha256": file_digest(folder / TEXT_TABLE)})
    written = [*(folder / name for name in (TABLE, TEXT_TABLE, MARKDOWN, LATEX)), *drawn]
    outputs = {path.relative_to(folder).as_posix(): file_digest(path) for path in written}
    for stale in known.get("outputs", {}).keys() - outputs.keys():
        (folder / stale).unlink(missing_ok=True)
    write_text(
        folder / PROVENANCE,
        json.dumps({**provenance, "inputs": inputs, "outputs": outputs}, indent=1, sort_keys=True) + "\n",
    )
    return Results(folder, frame, drawn=True)


def collect_rows(spec: StudySpec, plan: Plan, store: Store) -> pd.DataFrame:
    """The rows of every finished measurement, in the order of the study file: method, seed, measure, space."""
    parts = []
    for placement in plan.placements:
        if store.record(placement.cell.name) is None:
            continue
        rows = store.rows(placement.cell.name)
        rows.insert(0, "study", spec.name)
        rows.insert(1, "method", placement.method)
        rows.insert(2, "seed", placement.seed)
        rows["cell"] = placement.cell.address
        parts.append(rows)
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def _costs(plan: Plan, store: Store) -> dict[str, list[float]]:
    """Method → CPU seconds of its trainings."""
    pairs = {(p.method, p.cell.training.name) for p in plan.placements if p.cell.training is not None}
    found: dict[str, list[float]] = {}
    for method in dict.fromkeys(placement.method for placement in plan.placements):
        records = [store.record(name) for label, name in sorted(pairs) if label == method]
        seconds = [float(record["cpu_seconds"]) for record in records if record is not None]
        if seconds:
            found[method] = seconds
    return found


def _present(
    spec: StudySpec,
    baseline: str,
    costs: dict[str, list[float]],
    frame: pd.DataFrame,
    provenance: dict[str, Any],
) -> list[Path]:
    from analysis.plots import NothingToDraw, draw_all
    from analysis.report import write_report

    folder = spec.folder
    try:
        figures = draw_all(frame, folder / FIGURES, provenance, baseline=baseline)
    except NothingToDraw:
        figures = []
    page = write_report(
        frame,
        folder / PAGE,
        figures=folder / FIGURES,
        provenance=provenance,
        baseline=baseline,
        costs=costs,
    )
    return [*figures, page]


def _provenance(spec: StudySpec, plan: Plan, store: Store, failures: Sequence[Failure], command: str) -> dict[str, Any]:
    by_name = {cell.name: cell for cell in plan.cells}
    records = {name: store.record(name) for name in by_name}
    return {
        "study": spec.name,
        "command": command,
        "spec": _portable(spec.model_dump(mode="json", exclude={"output"})),
        "seeds": list(spec.seeds),
        "versions": library_versions(),
        "code": {name: cell.determinants["code"] for name, cell in by_name.items()},
        "presentation_code": presentation_code(),
        "cells": {
            name: {"label": cell.label, "address": cell.address, "seconds": (records[name] or {}).get("seconds")}
            for name, cell in by_name.items()
        },
        "failed": [{"label": failure.label, "reason": failure.reason} for failure in failures],
    }


def _inputs(spec: StudySpec, plan: Plan, store: Store, failures: Sequence[Failure]) -> str:
    """Digest of all that the written files depend on."""
    finished = [(cell.name, store.record(cell.name) is not None) for cell in plan.cells]
    content = {
        "spec": spec.model_dump(mode="json", exclude={"output"}),
        "placements": [(p.method, p.seed, p.cell.address) for p in plan.placements],
        "finished": finished,
        "failed": sorted((failure.label, failure.reason) for failure in failures),
        "presentation": presentation_code(),
        "versions": library_versions(),
    }
    return hashlib.sha256(canonical(content).encode()).hexdigest()


def _intact(folder: Path, outputs: dict[str, str]) -> bool:
    try:
        return bool(outputs) and all(file_digest(folder / name) == digest for name, digest in outputs.items())
    except OSError:
        return False


def _portable(value: Any) -> Any:
    """``value`` with absolute paths cut to their last part: results may be given away."""
    if isinstance(value, dict):
        return {key: _portable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_portable(item) for item in value]
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value
