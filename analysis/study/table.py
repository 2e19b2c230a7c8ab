"""The result table of the terminal: a line a quantity, a column a method."""

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from rich.table import Table

from analysis.statistics import CURVES, DIRECTIONS, OVER_STEPS, UNDECIDED, paired_differences, summarize

KEY_QUANTITIES: dict[str, tuple[str, ...]] = {
    "quality": ("accuracy", "loss"),
    "random": ("loss_rise",),
    "adversarial": ("loss_rise",),
    "spectrum": ("eigenvalue",),
    "trace": ("trace",),
    "density": ("effective_dimension", "negative_share"),
    "subspace": ("outside_share", "overlap"),
}
"""What stands in the table: of every measure the quantities a reader asks for first."""

_COSTS = ("products", "runs")
_CHECKS = ("converged", "complete")
"""Quantities of curvature that are 1 where it came out as asked for, 0 where it did not."""
_AT_ALPHA = ("effective_dimension",)
"""Quantities whose ``radius`` is an alpha."""
_NUMBERS = {
    "value": "value",
    "standard error": "standard_error",
    "residual": "residual",
    "‖ε_W‖": "induced_norm",
    "chance": "chance",
}
"""Head of a column of numbers → the column of the rows."""

_LINE = ["measure", "space", "quantity", "kind", "split", "radius", "index"]


def result_table(frame: pd.DataFrame, baseline: str, width: int = 120) -> Table:
    """Mean over seeds ± half width of the 95 % interval; ``*`` where the difference to ``baseline`` is decided.

    Of several radii the middle one is shown, of several eigenvalues the largest in magnitude. Where ``width`` columns
    are too few for all methods side by side, the half width stands below its mean.
    """
    content = table_content(frame, baseline)
    table = Table(title=f"{frame['study'].iloc[0]}: {content.spread}", caption=content.caption)
    table.add_column("quantity", min_width=24)
    separator = " " if 45 + 19 * len(content.methods) <= width else "\n"
    for method in content.methods:
        table.add_column(method, justify="right", no_wrap=True)
    for title, cells in content.lines:
        table.add_row(title, *(cell.replace(" ", separator, 1) for cell in cells))
    return table


def markdown_table(frame: pd.DataFrame, baseline: str) -> str:
    """:func:`result_table` in Markdown."""
    content = table_content(frame, baseline)
    rows = [[content.spread, *content.methods], ["---"] * (1 + len(content.methods))]
    rows += [[title, *cells] for title, cells in content.lines]
    text = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    if content.caption:
        text += f"\n{content.caption}\n"
    return text.replace("*", r"\*")


@dataclass(frozen=True)
class TableContent:
    """What the table says in any format: ``lines`` are titles with a cell a method."""

    methods: list[str]
    spread: str
    lines: list[tuple[str, list[str]]]
    caption: str | None


def table_content(frame: pd.DataFrame, baseline: str) -> TableContent:
    """The key quantities of every method, as text."""
    summary = _whole_space(summarize(frame))
    methods = list(dict.fromkeys(frame["method"]))
    seeds = frame["seed"].nunique()
    decided = _decided(frame, baseline) if len(methods) > 1 and seeds > 1 else set()
    spread = "mean ± half width of the 95 % interval" if seeds > 1 else "one seed, no interval"
    shown = []
    for key, lines in _shown(summary):
        values = {
            m: (mean, half) for m, mean, half in zip(lines["method"], lines["mean"], lines["half_width"], strict=True)
        }
        cells = []
        for method in methods:
            star = "*" if (method, *key) in decided else ""
            cells.append(interval(*values[method]) + star if method in values else "")
        shown.append((_title(key), cells))
    caption = f"* differs from {baseline}: paired by seed, 5 %, Holm-corrected over methods (not over the lines)"
    starred = any(cell.endswith("*") for _, cells in shown for cell in cells)
    return TableContent(methods, f"{spread} over {seeds} seed{'s' * (seeds > 1)}", shown, caption if starred else None)


def rows_table(frame: pd.DataFrame) -> Table:
    """The rows of measured adapters that belong to whole spaces: a line a value, without directions and curves.

    Of the measure ``layers`` the largest layer. What curvature cost is left out, and that it converged: what did not
    has a line that says so. Columns in which nothing stands are left out as well.
    """
    pairs = list(zip(frame["measure"], frame["quantity"], strict=True))
    single = pd.Series(
        [pair in CURVES or pair in DIRECTIONS or pair[0] in OVER_STEPS for pair in pairs], index=frame.index, dtype=bool
    )
    passed = frame["quantity"].isin(_CHECKS) & (frame["value"] == 1)
    rows = frame[(frame["layer"] == "") & ~(single & (frame["index"] >= 0)) & ~passed]
    rows = pd.concat([rows[~rows["quantity"].isin(_COSTS)], _largest_layers(frame)])
    several = {name: rows[name].astype(str).tolist() for name in ("method", "seed") if name in frame}
    columns = {**several, **_columns(rows.to_dict("records"))}
    table = Table()
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    for name in shown:
        table.add_column(name, justify="left" if name in ("quantity", "method") else "right")
    for cells in zip(*shown.values(), strict=True):
        table.add_row(*cells)
    return table


def _columns(rows: list[dict[Hashable, Any]]) -> dict[str, list[str]]:
    """Head → the cell of each row; an alpha stands with its quantity, a layer too."""
    columns: dict[str, list[str]] = {name: [] for name in ("quantity", "radius", "index", *_NUMBERS)}
    for row in rows:
        key = tuple(row[name] for name in ("measure", "space", "quantity", "kind", "split"))
        alpha = row["quantity"] in _AT_ALPHA
        title = _title((*key, row["radius"] if alpha else None, None))
        columns["quantity"].append(title + (f", largest: {row['layer']}" if row["layer"] else ""))
        columns["radius"].append("" if alpha else _number(row["radius"]))
        columns["index"].append(str(row["index"]) if row["index"] >= 0 else "")
        for head, name in _NUMBERS.items():
            columns[head].append(_number(row[name]))
    return columns


def _largest_layers(frame: pd.DataFrame) -> pd.DataFrame:
    """Of the measure ``layers`` the layer with the largest eigenvalue and trace in magnitude, by subject and space."""
    rows = frame[(frame["measure"] == "layers") & frame["quantity"].isin(["eigenvalue", "trace"])]
    rows = rows[np.isfinite(rows["value"])]
    keys = [name for name in ("method", "seed", "space", "quantity", "kind", "split") if name in rows]
    return rows.loc[rows["value"].abs().groupby([rows[key] for key in keys], sort=False).idxmax()]


def differences_table(differences: pd.DataFrame) -> Table:
    """Paired differences of whole spaces, a line a method and quantity, without points of lines and repeated means.

    The interval is uncorrected; a verdict is that of the interval corrected over methods.
    """
    rows = differences[(differences["layer"] == "") & (differences["measure"] != "landscape")]
    rows = rows[~rows["quantity"].isin([*_CHECKS, "loss_rise_mean"])]
    inside = bool((rows["over"] == "directions").any())
    caption = "over directions: of these trained models alone; another training may differ the other way"
    table = Table(
        title=f"differences to {differences['baseline'].iloc[0]}, 95 % intervals", caption=caption if inside else None
    )
    for name in ("method", "quantity", "difference", "interval", "over", "verdict"):
        table.add_column(name, justify="right" if name in ("difference", "interval") else "left")
    for row in rows.to_dict("records"):
        title = _title(tuple(_hashable(row[name]) for name in _LINE))
        title += f", {row['index']}" if row["index"] >= 0 else ""
        known = math.isfinite(row["low"])
        interval = f"[{_number(row['low'])}, {_number(row['high'])}]" if known else ""
        count = row["n_directions"] if row["over"] == "directions" else row["n_seeds"]
        over = f"{count} {row['over']}" if count > 1 else "1 seed"
        lost = {"not finite": row["n_non_finite"], "unmatched": row["n_unmatched"]}
        over = ", ".join([over, *(f"{number} {why}" for why, number in lost.items() if number)])
        verdict = row["verdict"] if known else ""
        table.add_row(row["method"], title, _number(row["difference"]), interval, over, verdict)
    return table


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4g}"


def _whole_space(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["layer"] == ""]


def _decided(frame: pd.DataFrame, baseline: str) -> set[tuple[object, ...]]:
    differences = _whole_space(paired_differences(frame, baseline))
    clear = differences[differences["verdict"] != UNDECIDED]
    return {(row["method"], *(_hashable(row[name]) for name in _LINE)) for _, row in clear.iterrows()}


def _shown(summary: pd.DataFrame) -> Iterator[tuple[tuple[object, ...], pd.DataFrame]]:
    """The chosen quantities, each with one row a method."""
    for measure, quantities in KEY_QUANTITIES.items():
        for quantity in quantities:
            rows = summary[(summary["measure"] == measure) & (summary["quantity"] == quantity)]
            for _, group in rows.groupby(["space", "kind", "split"], sort=False):
                chosen = group[group["index"] == group["index"].min()]
                radii = sorted(radius for radius in chosen["radius"].dropna().unique() if radius > 0)
                if radii:
                    chosen = chosen[chosen["radius"] == radii[len(radii) // 2]]
                first = chosen.iloc[0]
                yield tuple(_hashable(first[name]) for name in _LINE), chosen


def _hashable(value: object) -> object:
    """NaN is not equal to itself: in keys it is None."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _title(key: tuple[object, ...]) -> str:
    measure, space, quantity, kind, split, radius, _ = key
    name = str(quantity) if measure in ("quality", quantity) else f"{measure} {str(quantity).replace('_', ' ')}"
    details = [str(kind).replace("_", " ") if kind else "", f"{space} space" if space else "", str(split or "")]
    if radius is not None:
        details.append(f"{'alpha' if quantity in _AT_ALPHA else 'radius'} {radius:g}")
    return ", ".join([name, *(detail for detail in details if detail)])


def interval(mean: float, half_width: float) -> str:
    """The mean to the digits its interval leaves meaningful."""
    if not math.isfinite(mean):
        return "not finite"
    if not math.isfinite(half_width):
        return f"{mean:.4g}"
    leading = max(abs(mean) / 100, half_width)
    if 0 < leading < 1e-3 and abs(mean) < 1e-2:
        return f"{mean:.1e} ± {half_width:.0e}"
    digits = 2 if leading == 0 else max(0, 1 - math.floor(math.log10(leading)))
    return f"{mean:.{digits}f} ± {half_width:.{digits}f}"
