"""Tables of the report: strings in rows and columns, made from summaries and paired differences."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.headlines import headline_rows
from analysis.plots.overlap import PERTURBATIONS
from analysis.power import MOST
from analysis.report.numbers import number, p_value, spread
from analysis.space_names import in_space_order
from analysis.statistics import SUBSET, UNDECIDED

SPACE_NAMES = {"full": "full", "lora": "LoRA", "lora_balanced": "balanced LoRA", "": ""}


@dataclass(frozen=True)
class Cell:
    """One entry: its text, a smaller second line, and its look (a verdict, or ``none`` where nothing was measured)."""

    text: str
    note: str = ""
    look: str = ""


@dataclass(frozen=True)
class Table:
    """A table ready for the page; ``labels`` columns on the left are words, the others numbers."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    labels: int = 1
    note: str = ""
    open: bool = True


Line = tuple[Sequence[str], pd.DataFrame]


def lines_by(rows: pd.DataFrame, *columns: str) -> list[tuple[tuple[Any, ...], pd.DataFrame]]:
    """The rows of each distinct combination of ``columns``, in the order of first appearance."""
    return [(key, part) for key, part in rows.groupby(list(columns), sort=False, dropna=False)]


def by_space(rows: pd.DataFrame, *columns: str) -> list[tuple[tuple[Any, ...], pd.DataFrame]]:
    """The same with the space first: full space, then LoRA space, the rest in ascending order."""
    order = in_space_order(rows["space"])
    ranked = rows.assign(rank=[-order.index(space) for space in rows["space"]])
    return lines_by(ranked.sort_values(["rank", *columns], kind="stable"), "space", *columns)


def by_method(
    title: str,
    labels: Sequence[str],
    lines: Sequence[Line],
    methods: Sequence[str],
    *,
    show: Callable[[pd.Series], Cell] | None = None,
    note: str = "",
) -> Table:
    """A line per quantity, a column per method.

    Args:
        title: above the table.
        labels: heads of the left columns.
        lines: for each line its labels and the rows of a summary, at most one per method.
        methods: columns.
        show: from a summary row to an entry; default mean ± half width.
        note: below the table.
    """
    show = show or mean_cell
    rows = []
    for words, values in lines:
        cells = [Cell(word) for word in words]
        for method in methods:
            of_method = values[values["method"] == method]
            cells.append(show(of_method.iloc[0]) if len(of_method) else Cell("–", look="none"))
        rows.append(tuple(cells))
    return Table(title, (*labels, *methods), tuple(rows), len(labels), note)


def mean_cell(row: pd.Series) -> Cell:
    """Mean ± half width, with the realised ‖ε_W‖ where it is not the radius itself."""
    norm = row["induced_norm"]
    told = pd.isna(norm) or abs(norm - row["radius"]) <= 0.01 * abs(row["radius"])
    return Cell(spread(row["mean"], row["half_width"], row["n_non_finite"]), "" if told else f"‖ε_W‖ {number(norm)}")


def verdict_cell(row: pd.Series) -> Cell:
    """Verdict over the difference with its corrected interval."""
    half_width = row["corrected_high"] - row["difference"]
    return Cell(row["verdict"], spread(row["difference"], half_width, row["n_non_finite"]), row["verdict"])


def setup_table(summary: pd.DataFrame) -> Table:
    """What was measured where: a line per measure and space, with the radii of each kind."""
    rows = []
    for (measure, space), part in lines_by(summary, "measure", "space"):
        splits = [split for split in part["split"].unique() if split]
        words = (measure, SPACE_NAMES.get(space, space), ", ".join(splits), _kinds_with_radii(part, measure))
        rows.append(tuple(Cell(word or "–") for word in words))
    return Table("What was measured", ("measure", "space", "examples", "kinds and radii"), tuple(rows), labels=4)


def _kinds_with_radii(rows: pd.DataFrame, measure: str) -> str:
    told: dict[str, list[str]] = {}
    for kind in rows["kind"].unique():
        of_kind = rows[(rows["kind"] == kind) & (rows["measure"] != "density")]  # whose coordinate is an eigenvalue
        radii = sorted(radius for radius in of_kind["radius"].dropna().unique() if radius > 0)
        words = ", ".join(f"{radius:g}" for radius in radii)
        if measure == "landscape" and radii:
            words = f"−{radii[-1]:g} to {radii[-1]:g}"
        told.setdefault(words, []).append(kind.replace("_", " "))
    parts = [(", ".join(kind for kind in kinds if kind), words) for words, kinds in told.items()]
    return "; ".join(": ".join(word for word in part if word) for part in parts if any(part))


def quality_table(summary: pd.DataFrame, methods: Sequence[str]) -> Table:
    """Loss and accuracy per split."""
    rows = summary[(summary["measure"] == "quality") & ~summary["quantity"].isin(SUBSET)]
    return by_method("Loss and accuracy", ("examples", "quantity"), lines_by(rows, "split", "quantity"), methods)


def sharpness_table(summary: pd.DataFrame, methods: Sequence[str], measure: str, quantity: str, title: str) -> Table:
    """A perturbation measure: a line per space, kind, split and radius."""
    rows = summary[(summary["measure"] == measure) & (summary["quantity"] == quantity)]
    several = rows["split"].nunique() > 1
    lines: list[Line] = []
    for (space, kind, split, radius), part in by_space(rows, "kind", "split", "radius"):
        symbol = "σ" if kind == "filter" else "ρ"
        words = (
            SPACE_NAMES.get(space, space),
            f"{kind} ({split})" if several else kind,
            f"{symbol}\u00a0=\u00a0{radius:g}",
        )
        lines.append((words, part))
    note = "Below a value: the realised ‖ε_W‖ where it is not the radius. Compare spaces by ‖ε_W‖, not by radius."
    return by_method(title, ("space", "kind", "radius"), lines, methods, note=note)


def eigenvalue_table(summary: pd.DataFrame, methods: Sequence[str]) -> Table:
    """Eigenvalues by rank, with the worst relative residual over seeds."""
    rows = summary[
        (summary["measure"] == "spectrum") & (summary["quantity"] == "eigenvalue") & (summary["layer"] == "")
    ]
    lines: list[Line] = []
    for (space, kind, split, rank), part in by_space(rows, "kind", "split", "index"):
        lines.append(((SPACE_NAMES.get(space, space), split, kind or "by magnitude", f"λ{rank}"), part))

    def show(row: pd.Series) -> Cell:
        worst = f"residual ≤ {number(row['residual'], 2)}"
        return Cell(spread(row["mean"], row["half_width"], row["n_non_finite"]), worst)

    note = "Residual: the largest ‖Hv − λv‖/|λ| over seeds."
    return by_method(
        "Hessian eigenvalues", ("space", "examples", "ranked", "rank"), lines, methods, show=show, note=note
    )


def moment_table(summary: pd.DataFrame, methods: Sequence[str]) -> Table:
    """Trace, Frobenius norm, negative share and effective dimension, whichever were measured."""
    lines: list[Line] = []
    for (measure, quantity), name in _MOMENTS.items():
        rows = summary[(summary["measure"] == measure) & (summary["quantity"] == quantity) & (summary["layer"] == "")]
        for (space, kind, split, alpha), part in by_space(rows, "kind", "split", "radius"):
            at = f", α = {alpha:g}" if pd.notna(alpha) else ""
            lines.append(((SPACE_NAMES.get(space, space), split, " ".join(w for w in (name, kind) if w) + at), part))
    return by_method("Moments of the spectrum", ("space", "examples", "quantity"), lines, methods)


_MOMENTS = {
    ("trace", "trace"): "trace",
    ("density", "trace"): "trace (quadrature)",
    ("density", "frobenius_norm"): "Frobenius norm",
    ("density", "negative_share"): "negative share of Σ|λ|",
    ("density", "effective_dimension"): "effective dimension",
}


def subspace_table(summary: pd.DataFrame, methods: Sequence[str]) -> Table:
    """Overlap, outside share and alignment over all layers, with the level expected by chance."""
    rows = summary[(summary["measure"] == "subspace") & (summary["layer"] == "")]
    quantities = {"overlap": "overlap", "outside_share": "share outside LoRA-SAM's reach", "alignment": "cosine with G"}
    lines: list[Line] = []
    for quantity, name in quantities.items():
        for (kind,), part in lines_by(rows[rows["quantity"] == quantity], "kind"):
            words = (name, PERTURBATIONS.get(kind, kind).replace("\n", " "), number(part["chance"].mean(), 2))
            lines.append((words, part))

    def show(row: pd.Series) -> Cell:
        return Cell(spread(row["mean"], row["half_width"], row["n_non_finite"]))

    return by_method("All layers together", ("quantity", "of", "chance"), lines, methods, show=show)


def verdict_table(headlines: pd.DataFrame, methods: Sequence[str], baseline: str) -> Table:
    """The answer at a glance: a line per measure and space, a verdict per method."""
    lines = [
        ((SPACE_NAMES.get(space, space), name), part)
        for (space, name), part in lines_by(headlines, "space", "headline")
    ]
    others = [method for method in methods if method != baseline]
    return by_method(f"Sharpness minus that of {baseline}", ("space", "measure"), lines, others, show=verdict_cell)


def difference_tables(differences: pd.DataFrame) -> list[Table]:
    """Every paired difference of whole spaces, a table per measure; single landscape points are left out."""
    rows = differences[(differences["layer"] == "") & (differences["measure"] != "landscape")]
    rows = rows[~rows["quantity"].isin(["converged", "complete", "loss_rise_mean"])]
    head = (
        "method",
        "space",
        "quantity",
        "at",
        "difference",
        "corrected interval",
        "d_z",
        "p (Holm)",
        "seeds",
        "verdict",
    )
    tables = []
    for measure, part in rows.groupby("measure", sort=False):
        lines = tuple(_difference_line(row) for _, row in part.iterrows())
        tables.append(Table(f"{measure} ({len(lines)} comparisons)", head, lines, labels=4, open=False))
    return tables


def cost_table(costs: Mapping[str, Sequence[float]], baseline: str) -> Table:
    """CPU seconds of a training, and over the baseline's.

    Args:
        costs: method → seconds of each seed's training.
        baseline: the method that others are compared with.
    """
    rows = []
    base = float(np.mean(costs[baseline])) if costs.get(baseline) else math.nan
    for method, seconds in costs.items():
        mean = float(np.mean(seconds))
        spans = f"{number(min(seconds))} to {number(max(seconds))}" if len(seconds) > 1 else "–"
        cells = (method, number(mean), spans, number(mean / base, 3), str(len(seconds)))
        rows.append(tuple(Cell(text) for text in cells))
    note = (
        "CPU time of the process that trained, with loading and evaluation; of a training that was interrupted the "
        "last attempt alone. Runs beside other work on one machine may differ by more than methods do."
    )
    return Table(
        "What a training took", ("method", "CPU s", "seeds", f"over {baseline}", "runs"), tuple(rows), note=note
    )


def correlation_table(found: pd.DataFrame) -> Table:
    """Kendall's tau of each headline sharpness with the generalisation gap, over runs and within methods."""
    rows = []
    for r in found.to_dict("records"):
        interval = f"[{number(r['low'], 2)}, {number(r['high'], 2)}]" if pd.notna(r["low"]) else "–"
        within = number(r["tau_within"], 2) if pd.notna(r["tau_within"]) else "–"
        words = (SPACE_NAMES.get(r["space"], r["space"]), r["headline"], r["split"])
        numbers = (number(r["tau"], 2), interval, within, str(r["n_runs"]), str(r["n_seeds"]))
        rows.append(tuple(Cell(text) for text in (*words, *numbers)))
    head = ("space", "sharpness", "examples", "τ", "interval", "τ within methods", "runs", "seeds")
    note = "Kendall's τ-b. The interval is a bootstrap over training seeds; with few seeds it is too narrow."
    return Table("Rank correlation with the generalisation gap", head, tuple(rows), labels=3, note=note)


def power_table(hints: pd.DataFrame) -> Table:
    """How many seeds would settle each undecided headline comparison, if the effect seen were the true one."""
    rows = []
    for r in headline_rows(hints).to_dict("records"):
        needed = f"{r['seeds_needed']:.0f}" if pd.notna(r["seeds_needed"]) else f"more than {MOST}"
        words = (r["method"], SPACE_NAMES.get(r["space"], r["space"]), r["headline"])
        rows.append(tuple(Cell(text) for text in (*words, number(r["cohen_dz"], 2), str(r["n_seeds"]), needed)))
    head = ("method", "space", "sharpness", "d_z", "seeds", "seeds needed")
    note = (
        "Seeds at which a paired t-test, corrected over methods, would find the effect seen with probability 0.8. The "
        "effect is itself uncertain, and where there is none no number of seeds settles it: a hint for planning."
    )
    return Table("What would settle the undecided comparisons", head, tuple(rows), labels=3, note=note, open=False)


def _difference_line(row: pd.Series) -> tuple[Cell, ...]:
    words = [row["kind"].replace("_", " "), row["split"]]
    coordinate = "α =" if row["quantity"] == "effective_dimension" else "radius"
    words.append(f"{coordinate} {row['radius']:g}" if pd.notna(row["radius"]) else "")
    words.append(f"rank {row['index']}" if row["index"] >= 0 else "")
    left_out = {"not finite": row["n_non_finite"], "unmatched": row["n_unmatched"]}
    said = ", ".join(f"{count} {why}" for why, count in left_out.items() if count)
    seeds = f"{row['n_seeds']} ({said})" if said else str(row["n_seeds"])
    return (
        Cell(row["method"]),
        Cell(SPACE_NAMES.get(row["space"], row["space"])),
        Cell(row["quantity"].replace("_", " ")),
        Cell(", ".join(word for word in words if word)),
        Cell(number(row["difference"])),
        Cell(f"[{number(row['corrected_low'])}, {number(row['corrected_high'])}]"),
        Cell(number(row["cohen_dz"], 2)),
        Cell(p_value(row["p_holm"])),
        Cell(seeds),
        Cell(row["verdict"], look=row["verdict"] if row["verdict"] != UNDECIDED else ""),
    )
