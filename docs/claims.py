"""Write docs/claims.csv, the numbers of docs/claims.md, and its figures, from the finished study of the paper's claims.

bilora compare studies/claims.yaml
python docs/claims.py runs/claims/results.parquet
python docs/make.py
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from analysis.plots import efficiency_bars, step_curves
from analysis.plots.dynamics import CONVERGENCE, OUTSIDE
from analysis.statistics import paired_differences, summarize

TARGET = Path(__file__).with_name("claims.csv")
LINES: tuple[tuple[str, dict[str, object]], ...] = (
    ("accuracy, validation", {"measure": "quality", "quantity": "accuracy", "split": "validation"}),
    ("accuracy, training examples", {"measure": "quality", "quantity": "accuracy", "split": "train"}),
    ("loss, validation", {"measure": "quality", "quantity": "loss", "split": "validation"}),
    *(
        (
            f"random rise, {space} space, σ = {radius:g}",
            {"measure": "random", "quantity": "loss_rise", "space": space, "radius": radius},
        )
        for space, radius in (("full", 0.1), ("full", 0.3), ("lora", 0.3), ("lora", 1.0))
    ),
    *(
        (
            f"one-step rise, {space} space, ρ = {radius:g}",
            {"measure": "adversarial", "quantity": "loss_rise", "space": space, "radius": radius},
        )
        for space in ("full", "lora")
        for radius in (0.03, 0.1)
    ),
    *(
        (f"outside share of {name}", {"measure": "subspace", "quantity": "outside_share", "kind": kind})
        for kind, name in (
            ("lora_sam", "LoRA-SAM's step"),
            ("auxiliary", "the auxiliary"),
            ("gradient_rank_r", "G_r"),
            ("gradient", "G"),
        )
    ),
    *(
        (f"cosine of {name} with G", {"measure": "subspace", "quantity": "alignment", "kind": kind})
        for kind, name in (("lora_sam", "LoRA-SAM's step"), ("auxiliary", "the auxiliary"))
    ),
    *(
        (f"overlap of primary and auxiliary, {side}s", {"measure": "subspace", "quantity": "overlap", "kind": side})
        for side in ("column", "row")
    ),
    *(
        (
            f"largest p-value of the {words} of {name}",
            {"measure": "subspace", "quantity": f"{quantity}_p_value", "kind": kind},
        )
        for quantity, words in (("outside_share", "outside share"), ("alignment", "cosine"))
        for kind, name in (("lora_sam", "LoRA-SAM's step"), ("auxiliary", "the auxiliary"))
    ),
    *(
        (f"share of the best rise: {name}", {"measure": "efficiency", "quantity": "efficiency", "kind": kind})
        for kind, name in (
            ("applied", "what the last recorded step applied"),
            ("lora_sam", "LoRA-SAM's step"),
            ("auxiliary", "the auxiliary"),
            ("gradient_rank_r", "G_r"),
            ("gradient", "G"),
            ("filter_noise", "filter noise"),
        )
    ),
    *(
        (f"{name}, share of the best of rank r", {"measure": "efficiency", "quantity": "rank_r_share", "kind": kind})
        for kind, name in (("lora_sam", "LoRA-SAM's step"), ("auxiliary", "the auxiliary"))
    ),
    ("effective rank of the update", {"measure": "update", "quantity": "effective_rank"}),
    ("intruder dimensions", {"measure": "update", "quantity": "intruders"}),
)
"""Words, and the rows they are of: values of whole adapters."""
STEPS: tuple[tuple[str, dict[str, object], tuple[float, ...]], ...] = (
    ("outside share of the perturbation applied", {"quantity": "outside_share"}, (0.2, 0.5, 0.8, 0.95)),
    (
        "cosine of the primary to its end",
        {"quantity": "cosine_to_end", "space": "full", "kind": "primary"},
        (0.2, 0.5, 0.8),
    ),
    (
        "cosine of the auxiliary to its end",
        {"quantity": "cosine_to_end", "space": "full", "kind": "auxiliary"},
        (0.2, 0.5, 0.8),
    ),
    ("cosine of primary and auxiliary", {"quantity": "cosine", "space": "full", "kind": "primary_auxiliary"}, (0.95,)),
    ("second over first order of LoRA-SAM's step", {"quantity": "second_order_ratio"}, (0.5, 0.95)),
    ("loss rise of the perturbation applied", {"quantity": "loss_rise"}, (0.5, 0.75)),
    ("norm of the auxiliary over ρ, before clipping", {"quantity": "c_over_rho"}, (0.5, 0.95)),
)
"""Words, rows of ``dynamics``, and at which shares of the steps."""


def chosen(frame: pd.DataFrame, where: dict[str, object]) -> pd.DataFrame:
    rows = frame[frame["layer"] == ""]
    for column, value in where.items():
        rows = rows[rows[column] == value]
    return rows


def lines(frame: pd.DataFrame, baseline: str) -> Iterator[pd.DataFrame]:
    for words, where in LINES:
        rows = chosen(frame, where)
        if not rows.empty:
            yield table(rows, words, baseline)
    last = int(frame.loc[frame["measure"] == "dynamics", "index"].max())
    for words, where, shares in STEPS:
        rows = chosen(frame, {"measure": "dynamics", **where})
        for share in shares:
            here = rows[rows["index"] == 5 * round(share * last / 5)]
            if not here.empty:
                yield table(here, f"{words}, at {100 * share:g} % of the steps", baseline)


def table(rows: pd.DataFrame, words: str, baseline: str) -> pd.DataFrame:
    found = summarize(rows)[["method", "mean", "half_width", "n_seeds", "chance"]]
    if rows["quantity"].str.endswith("p_value").all():
        largest = rows.groupby("method")["value"].max()
        found = found.assign(mean=[largest[method] for method in found["method"]], half_width=math.nan)
    verdicts: dict[str, str] = {}
    judged = (rows["measure"] != "dynamics").all() and found["half_width"].notna().any()
    if baseline in set(rows["method"]) and rows["method"].nunique() > 1 and judged:
        compared = paired_differences(rows, baseline)
        verdicts = dict(zip(compared["method"], compared["verdict"], strict=True))
    verdict = [verdicts.get(method, "") for method in found["method"]]
    return found.assign(quantity=words, verdict=verdict)[
        ["quantity", "method", "mean", "half_width", "n_seeds", "chance", "verdict"]
    ]


def figures(frame: pd.DataFrame) -> Iterator[tuple[str, Figure]]:
    """Name and figure; methods that a figure would crowd are left out of it."""
    ablations = {"Bi-LoRA, not clipped", "Bi-LoRA, clipped by layer"}
    yield "outside_share_steps", step_curves(frame[~frame["method"].isin(ablations)], OUTSIDE, 2)
    paired = frame[frame["method"].isin(["LoRA", "LoRA-SAM", "Bi-LoRA", "Dual-LoRA"])]
    yield "convergence", step_curves(paired, CONVERGENCE[:3], 3)
    yield "efficiency", efficiency_bars(paired[paired["method"] != "Dual-LoRA"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="results.parquet of the study")
    parser.add_argument("--baseline", default="LoRA")
    options = parser.parse_args()
    frame = pd.read_parquet(options.results)
    whole = pd.concat(lines(frame, options.baseline), ignore_index=True)
    temporary = TARGET.with_suffix(".tmp")
    whole.to_csv(temporary, index=False, float_format="%.5g", lineterminator="\n")
    temporary.replace(TARGET)
    for name, figure in figures(frame):
        figure.savefig(TARGET.with_name(f"claims_{name}.png"), dpi=150)


if __name__ == "__main__":
    main()
