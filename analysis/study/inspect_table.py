"""The table that ``bilora inspect`` prints: a line a quantity, a column a method."""

import math

import pandas as pd
from rich.table import Table

from analysis.statistics import summarize
from analysis.study.table import interval

LINES: tuple[tuple[str, str, str, str], ...] = (
    ("update", "update_norm", "", "‖s·B·A‖"),
    ("update", "effective_rank", "", "effective rank"),
    ("update", "stable_rank", "", "stable rank"),
    ("update", "balancedness", "", "balancedness ½(‖B‖² − ‖A‖²)"),
    ("update", "intruders", "", "intruder dimensions"),
    ("update", "intruder_energy", "", "their share of the energy"),
    ("update", "intruders_undecided", "", "directions not decided"),
    ("subspace", "overlap", "column", "overlap with the auxiliary, columns"),
    ("subspace", "overlap", "row", "overlap with the auxiliary, rows"),
    ("dynamics", "outside_share", "", "perturbation outside LoRA-SAM's reach"),
    ("dynamics", "second_order_ratio", "", "‖ε_B·ε_A‖ over the first order"),
    ("dynamics", "cosine", "primary_auxiliary", "cosine of primary and auxiliary"),
    ("dynamics", "loss_rise", "", "loss rise of the perturbation"),
    ("dynamics", "c_over_rho", "", "‖s₂·B₂·A₂‖ over ρ, before clipping"),
)
"""Measure, quantity, kind and words; of a run's dynamics the last step that has it."""


def inspect_table(frame: pd.DataFrame) -> Table:
    """Mean over training seeds ± half width of the 95 % interval, the level of chance beside it.

    Comparisons of adapters follow, a line a pair.
    """
    whole = frame[frame["layer"] == ""]
    methods = list(dict.fromkeys(frame["method"]))
    seeds = frame["seed"].nunique()
    spread = f"mean ± half width of the 95 % interval over {seeds} seeds" if seeds > 1 else "one seed, no interval"
    table = Table(title=f"{spread}; over steps: the last")
    table.add_column("quantity")
    for name in (*methods, "chance"):
        table.add_column(name, justify="right", no_wrap=True)
    for measure, quantity, kind, words in LINES:
        rows = whole[(whole["measure"] == measure) & (whole["quantity"] == quantity) & (whole["kind"] == kind)]
        rows = rows[rows["space"] != "lora"] if quantity == "cosine" else rows
        if not rows.empty:
            _add(table, words, _last(rows), methods)
    pairs = whole[(whole["measure"] == "compare") & whole["quantity"].isin(["cosine", "overlap"])]
    for key, rows in pairs.groupby(["quantity", "space", "kind", "label"], sort=False):
        name, space, side, pair = map(str, key)
        what = f"{name} {pair}, " + (f"{side}s" if side else f"{space} space")
        _add(table, what, rows, methods)
    return table


def _last(rows: pd.DataFrame) -> pd.DataFrame:
    """Of each run the last step."""
    at = rows.groupby(["method", "seed"])["index"].transform("max")
    return rows[rows["index"] == at].assign(index=-1)


def _add(table: Table, words: str, rows: pd.DataFrame, methods: list[str]) -> None:
    summary = summarize(rows)
    means = dict(zip(summary["method"], zip(summary["mean"], summary["half_width"], strict=True), strict=True))
    cells = [interval(*means[method]) if method in means else "" for method in methods]
    chance = float(summary["chance"].mean())
    table.add_row(words, *cells, "" if math.isnan(chance) else f"{chance:.3g}")
