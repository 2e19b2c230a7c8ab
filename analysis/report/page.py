"""``report.html``: a study's answer, tables, figures and what made them, in one file that loads nothing else."""

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from analysis.correlation import gap_correlations
from analysis.headlines import headline_rows
from analysis.plots import FIGURES, NothingToDraw
from analysis.plots.save import describe, frame_hash, write_atomically
from analysis.plots.style import PAGE, styles_for
from analysis.power import power_hints
from analysis.report import tables
from analysis.report.headlines import FEW_SEEDS, SPACES, answer
from analysis.report.numbers import counted, enumerated
from analysis.report.tables import Table
from analysis.statistics import paired_differences, summarize
from bilora.errors import UserError

_MIME = {"svg": "image/svg+xml", "png": "image/png"}


@dataclass(frozen=True)
class Picture:
    """A figure on the page."""

    name: str
    title: str
    source: str  # data URI
    share: int  # of the width of a page's figure, in percent


@dataclass(frozen=True)
class Section:
    """A heading with words, tables and figures below it."""

    anchor: str
    title: str
    words: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()


def write_report(
    frame: pd.DataFrame,
    path: Path,
    *,
    figures: Path,
    provenance: Mapping[str, Any],
    baseline: str | None = None,
    confidence: float = 0.95,
    costs: Mapping[str, Sequence[float]] | None = None,
) -> Path:
    """Write the report of one study.

    Args:
        frame: the tidy rows of the study.
        path: the HTML file; replaced atomically.
        figures: folder that :func:`analysis.plots.draw_all` wrote for the same rows; their SVG (or PNG) is put inline.
        provenance: what made the rows, shown as given at the end (command, seeds, versions, hashes, …).
        baseline: label of the method that the others are compared with; default the first of the frame.
        confidence: level of all intervals, in (0, 1).
        costs: method → CPU seconds of each of its trainings, if they are known.

    Returns:
        ``path``.

    Raises:
        UserError: the frame is empty or lacks columns, or ``baseline`` is not in it.
    """
    if frame.empty:
        raise UserError("there are no rows to report: no measurement of the study succeeded")
    page = (
        _environment()
        .get_template("report.html.j2")
        .render(**_content(frame, figures, provenance, baseline, confidence, costs or {}))
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_atomically(path, page.encode())


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("analysis.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _content(
    frame: pd.DataFrame,
    figures: Path,
    provenance: Mapping[str, Any],
    baseline: str | None,
    confidence: float,
    costs: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    baseline = baseline or str(frame["method"].iloc[0])
    summary, differences = summarize(frame, confidence), paired_differences(frame, baseline, confidence)
    methods = list(styles_for(frame["method"]))
    headlines = headline_rows(differences)
    glance = (tables.verdict_table(headlines, methods, baseline),) if len(headlines) else ()
    study = str(frame["study"].iloc[0]) if "study" in frame else "study"
    seeds = int(frame["seed"].nunique())
    level = f"{100 * confidence:g} %"
    return {
        "study": study,
        "css": Markup(files("analysis.report").joinpath("report.css").read_text(encoding="utf-8")),
        "facts": f"{counted(len(methods), 'method')} · {counted(seeds, 'training seed')} · {level} intervals",
        "few": seeds < FEW_SEEDS,
        "seeds": counted(seeds, "training seed"),
        "answer": answer(differences, baseline, confidence),
        "glance": glance,
        "baseline": baseline,
        "confidence": level,
        "sections": _sections(frame, summary, differences, methods, figures, baseline, confidence, costs),
        "provenance": _told({"rows": len(frame), "rows_sha256": frame_hash(frame), **describe(frame), **provenance}),
    }


def _sections(
    frame: pd.DataFrame,
    summary: pd.DataFrame,
    differences: pd.DataFrame,
    methods: Sequence[str],
    figures: Path,
    baseline: str,
    confidence: float,
    costs: Mapping[str, Sequence[float]],
) -> list[Section]:
    pictures = _pictures(frame, figures)

    def shown(*names: str) -> tuple[Picture, ...]:
        return tuple(pictures[name] for name in names if name in pictures)

    sharpness = [
        tables.sharpness_table(summary, methods, measure, quantity, title)
        for measure, quantity, title in (
            ("random", "loss_rise", "Loss rise under random perturbations"),
            ("adversarial", "loss_rise", "Loss rise one gradient step away"),
            ("adversarial", "accuracy", "Accuracy one gradient step away"),
        )
    ]
    random_rows = summary[summary["measure"] == "random"]
    perturbed = "The loss rise when weights are perturbed, with the interval over training seeds."
    if len(random_rows):
        directions = counted(int(random_rows["n_directions"].max()), "direction")
        perturbed += f" Random directions are the same for every method; {directions} per seed are averaged first."
    correlations, hints = gap_correlations(frame, confidence), power_hints(differences, confidence)
    sections = [
        Section("setup", "Set-up", (_compared(frame),), (tables.setup_table(summary),)),
        Section("quality", "Quality", tables=(tables.quality_table(summary, methods),)),
        Section(
            "sharpness",
            "Sharpness in LoRA space and in full space",
            (perturbed,),
            tuple(sharpness),
            shown(
                "random",
                "random_induced",
                "adversarial",
                "adversarial_induced",
                "adversarial_accuracy",
                "adversarial_matthews",
                "worst_case",
                "m_sharpness",
                "read_noise",
                "quantisation",
                "ascent_gap",
            ),
        ),
        Section(
            "curvature",
            "Curvature",
            ("The Hessian of the mean loss. In LoRA space it also holds the curvature of the product B·A.",),
            (tables.eigenvalue_table(summary, methods), tables.moment_table(summary, methods)),
            shown("eigenvalues", "eigenvalue_ladder", "density", "layer_eigenvalues", "layer_traces"),
        ),
        Section(
            "landscapes",
            "Landscapes",
            pictures=shown(
                "landscape",
                "surface_filter",
                "surface_eigenvectors",
                "surface_adapters",
                "surface_trajectory",
                "connectivity",
            ),
        ),
        Section(
            "subspaces",
            "Subspaces",
            ("Which part of a perturbation lies where LoRA-SAM, perturbing the factors, cannot go.",),
            (tables.subspace_table(summary, methods),),
            shown(
                "overlap",
                "outside_share",
                "efficiency",
                "outside_share_steps",
                "convergence",
                "perturbation_parts",
                "update_spectrum",
            ),
        ),
        Section(
            "differences",
            "Paired differences",
            (
                f"Method minus {baseline} on the same seed, batches and directions. Intervals and p-values are "
                "corrected by Holm's procedure over the methods compared on one quantity, not over quantities and "
                "radii: of many lines some may stand out by chance.",
            ),
            tuple(tables.difference_tables(differences)),
            shown("differences"),
        ),
        Section("cost", "Cost", tables=(tables.cost_table(costs, baseline),)),
        Section(
            "statistics",
            "Statistics",
            (
                "Over all trained models of the study, does a sharper one generalise worse? The gap is validation loss "
                "minus training loss. Such correlations are weak and change sign between tasks, measures and ranges of "
                "hyper-parameters; within methods they often vanish. A high one here says that the two went together "
                "in this study, not that flatter models generalise better.",
            ),
            (tables.correlation_table(correlations), tables.power_table(hints)),
        ),
    ]
    filled = []
    for section in sections:
        present = tuple(table for table in section.tables if table.rows)
        if present or section.pictures:
            filled.append(Section(section.anchor, section.title, section.words, present, section.pictures))
    return filled


def _compared(frame: pd.DataFrame) -> str:
    methods = enumerated([str(method) for method in dict.fromkeys(frame["method"])])
    seeds = enumerated([str(seed) for seed in sorted(frame["seed"].unique().tolist())])
    return f"Methods: {methods}. Training seeds: {seeds}. LoRA space is {SPACES['lora']}, full space {SPACES['full']}."


def _pictures(frame: pd.DataFrame, folder: Path) -> dict[str, Picture]:
    """The figures of these rows that lie in ``folder``; one that other rows left there is not taken."""
    found = {}
    for family in FIGURES:
        try:
            family.table(frame)
        except NothingToDraw:
            continue
        for kind, mime in _MIME.items():
            file = folder / f"{family.name}.{kind}"
            if file.is_file():
                content = file.read_bytes()
                source = f"data:{mime};base64,{base64.b64encode(content).decode()}"
                found[family.name] = Picture(family.name, family.title, source, _share(content))
                break
    return found


def _share(picture: bytes) -> int:
    """How wide an SVG is drawn: one made for a text column stays narrower than one made for a page."""
    stated = re.search(rb'<svg[^>]*? width="([0-9.]+)pt"', picture)
    return min(100, round(100 * float(stated.group(1)) / (72 * PAGE))) if stated else 100


def _told(provenance: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    """Name, text, and whether the text is long: nested values as JSON."""
    told = []
    for name, value in provenance.items():
        if isinstance(value, (list, tuple)) and not any(isinstance(item, (dict, list)) for item in value):
            text = ", ".join(map(str, value))
        elif isinstance(value, (dict, list)):
            text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
        else:
            text = str(value)
        told.append((name.replace("_", " "), text, "\n" in text))
    return told
