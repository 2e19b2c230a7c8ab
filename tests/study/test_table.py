"""The result table of the terminal."""

import io

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from analysis.core import row
from analysis.statistics import paired_differences
from analysis.study.table import interval, result_table, rows_table


def study_rows() -> pd.DataFrame:
    """Two methods × three seeds; B's eigenvalue is lower by 10 in every seed, its accuracy the same."""
    rows = []
    for method, shift in (("A", 0.0), ("B", -10.0)):
        for seed in range(3):
            found = [
                row("quality", "accuracy", 0.8 + 0.01 * seed, split="validation"),
                row("spectrum", "eigenvalue", 100 + seed + shift * (1 + 0.01 * seed), space="full", index=1),
                row("spectrum", "eigenvalue", -7.0, space="full", index=2),
            ]
            for radius in (0.1, 0.2, 0.3):
                for index in range(2):
                    found.append(
                        row("random", "loss_rise", radius, space="full", kind="filter", radius=radius, index=index)
                    )
            rows += [{"study": "toy", "method": method, "seed": seed, **one, "cell": ""} for one in found]
    return pd.DataFrame(rows)


def shown(table: object, width: int = 140) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


def test_a_line_a_quantity_a_column_a_method() -> None:
    text = shown(result_table(study_rows(), "A"))
    (eigenvalue,) = [line for line in text.splitlines() if "eigenvalue" in line]  # the largest alone
    assert "101.0 ± 2.5" in eigenvalue
    assert "90.9 ± 2.2*" in eigenvalue
    (rise,) = [line for line in text.splitlines() if "random loss rise" in line]  # the middle radius alone
    assert "radius 0.2" in rise
    (accuracy,) = [line for line in text.splitlines() if "accuracy" in line]
    assert accuracy.count("0.810 ± 0.025") == 2
    assert "*" not in accuracy
    assert "over 3 seeds" in text
    assert "* differs from A" in text


def test_without_a_star_nothing_explains_one() -> None:
    frame = study_rows()
    layer = frame[frame["measure"] == "spectrum"].assign(layer="encoder.0")  # decided, but not in the table
    rest = frame[frame["measure"] != "spectrum"]
    assert "differs from A" not in shown(result_table(pd.concat([rest, layer]), "A"))
    p_values = frame[frame["quantity"] == "eigenvalue"].assign(measure="subspace", quantity="alignment_p_value")
    assert paired_differences(pd.concat([rest, p_values]), "A")["quantity"].isin(["accuracy", "loss_rise"]).all()


def test_a_narrow_terminal_loses_nothing() -> None:
    frame = study_rows()
    more = [frame, *(frame[frame["method"] == "A"].assign(method=name) for name in ("LoRA-SAM", "Flat-LoRA"))]
    text = shown(result_table(pd.concat(more), "A", width=80), width=80)
    for part in ("accuracy, validation", "0.810", "± 0.025", "± 2.2*"):
        assert part in text
    assert "…" not in text


def test_one_seed_has_nointerval() -> None:
    frame = study_rows()
    text = shown(result_table(frame[frame["seed"] == 0], "A"))
    assert "±" not in text.replace("mean ±", "")
    assert "one seed, no interval" in text


@pytest.mark.parametrize(
    ("mean", "half_width", "text"),
    [
        (0.8123, 0.0249, "0.812 ± 0.025"),
        (162.66, 31.2, "163 ± 31"),
        (-0.00123, 0.00045, "-1.2e-03 ± 4e-04"),
        (0.0123, 0.00045, "0.01230 ± 0.00045"),
        (2.0, 0.0, "2.000 ± 0.000"),
        (1.5, np.nan, "1.5"),
        (np.inf, np.nan, "not finite"),
    ],
)
def test_digits_follow_theinterval(mean: float, half_width: float, text: str) -> None:
    assert interval(mean, half_width) == text


def test_curvature_beside_its_eigenvalues() -> None:
    """Trace and density are shown in a study's table; of an adapter's layers the largest stands in its own."""
    rows = [
        row("trace", "trace", 42.0, space="full", standard_error=1.5),
        row("density", "effective_dimension", 7.0, space="full", radius=0.1),
        row("density", "negative_share", 0.25, space="full"),
        row("layers", "eigenvalue", 3.0, space="full", layer="first", index=1),
        row("layers", "eigenvalue", -5.0, space="full", layer="second", index=1),
        row("layers", "trace", 9.0, space="full", layer="first"),
        row("layers", "trace", np.nan, space="full", layer="second"),
    ]
    text = shown(rows_table(pd.DataFrame(rows)))
    assert "layers eigenvalue, full space, largest: second" in text
    assert "layers trace, full space, largest: first" in text
    assert "3" not in next(line for line in text.splitlines() if "largest: second" in line)
    (line,) = [line for line in text.splitlines() if "│ trace, full space" in line]
    assert "42" in line
    assert "1.5" in line
    assert "density effective dimension, full space, alpha 0.1 " in text
    study = pd.DataFrame([{"study": "toy", "method": m, "seed": 0, **one, "cell": ""} for m in "AB" for one in rows])
    text = shown(result_table(study, "A"))
    for quantity in ("│ trace, full space", "density effective dimension", "density negative share"):
        assert quantity in text


def test_what_did_not_converge_has_a_line_and_what_did_has_none() -> None:
    rows = [
        row("spectrum", "eigenvalue", 5.0, space="full", index=1, residual=0.0012),
        row("spectrum", "converged", 1.0, space="full", index=1),
        row("spectrum", "eigenvalue", 4.0, space="full", index=2, residual=0.34),
        row("spectrum", "converged", 0.0, space="full", index=2),
        row("spectrum", "products", 30, space="full"),
        row("trace", "trace", 9.0, space="full", standard_error=0.5),
        row("trace", "converged", 1.0, space="full"),
        row("density", "runs", 3, space="full"),
        row("density", "complete", 0.0, space="full"),
    ]
    lines = [line for line in shown(rows_table(pd.DataFrame(rows))).splitlines() if line.startswith("│")]
    names = [line.split("│")[1].strip() for line in lines]
    assert names == [
        "spectrum eigenvalue, full space",
        "spectrum eigenvalue, full space",
        "spectrum converged, full space",
        "trace, full space",
        "density complete, full space",
    ]
    assert "0.0012" in lines[0]
    assert "0.34" in lines[1]


def test_a_column_in_which_nothing_stands_is_left_out() -> None:
    loss = row("random", "loss_rise_mean", 1.0, space="full", radius=0.1, induced_norm=2.0)
    heads = [column.header for column in rows_table(pd.DataFrame([row("quality", "loss", 0.0), loss])).columns]
    assert heads == ["quantity", "radius", "value", "‖ε_W‖"]


def test_rows_of_one_adapter_without_single_directions() -> None:
    frame = study_rows()
    text = shown(rows_table(frame[(frame["method"] == "A") & (frame["seed"] == 0)]))
    assert "eigenvalue" in text
    assert "loss rise" not in text
