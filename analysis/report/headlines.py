"""What the report answers first: one sharpness value per measure and space, and the sentences that compare methods."""

import pandas as pd

from analysis.plots.style import in_space_order
from analysis.report.numbers import counted, enumerated
from analysis.report.tables import SPACE_NAMES
from analysis.statistics import HIGHER, LOWER, UNDECIDED

SPACES = {
    "full": "the merged weights that inference uses",
    "lora": "the factors as trained",
    "lora_balanced": "the factors in their balanced gauge",
    "all": "every parameter of the merged model",
}
FEW_SEEDS = 5

_SHARPNESS = {
    ("random", "loss_rise"): "loss rise under random noise",
    ("adversarial", "loss_rise"): "loss rise one gradient step away",
    ("spectrum", "eigenvalue"): "largest Hessian eigenvalue",
    ("trace", "trace"): "trace of the Hessian",
}


def headline_rows(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of a summary or of paired differences that stand for a measure, with their name in ``headline``.

    Sharpness of the whole space on one split (training examples where measured): of several radii the middle one, of
    several eigenvalues the largest in magnitude. Full space comes first.
    """
    parts = []
    whole = table[(table["layer"] == "") & (table["radius"].isna() | (table["radius"] > 0))]
    for space in reversed(in_space_order(whole["space"])):
        for (measure, quantity), name in _SHARPNESS.items():
            rows = whole[(whole["measure"] == measure) & (whole["quantity"] == quantity) & (whole["space"] == space)]
            for kind in sorted(rows["kind"].unique()):
                part = rows[rows["kind"] == kind]
                part = part[(part["split"] == part["split"].min()) & (part["index"] == part["index"].min())]
                radii = sorted(part["radius"].dropna().unique())
                at = ""
                if radii:
                    middle = radii[len(radii) // 2]
                    part = part[part["radius"] == middle]
                    at = f", {'σ' if kind == 'filter' else 'ρ'}\u00a0=\u00a0{middle:g}"
                parts.append(part.assign(headline=name + _kind_words(measure, kind) + at))
    return pd.concat(parts, ignore_index=True) if parts else whole.iloc[:0].assign(headline="")


def _kind_words(measure: str, kind: str) -> str:
    if measure == "adversarial" or not kind:
        return ""
    return ", filter-scaled" if kind == "filter" else f", {kind.replace('_', ' ')}"


def answer(differences: pd.DataFrame, baseline: str, confidence: float) -> list[str]:
    """The study's answer in sentences, each claim no stronger than its corrected interval.

    Args:
        differences: of :func:`analysis.statistics.paired_differences`, all rows.
        baseline: what the others are compared with.
        confidence: level the verdicts were made at.
    """
    rows = headline_rows(differences)
    if rows.empty:
        return ["No sharpness was measured for two methods on the same seeds, so that nothing can be compared."]
    seeds = int(rows["n_seeds"].min())
    if seeds < 2:
        return ["One training seed decides nothing: a difference between methods cannot be told from chance."]
    sentences = [_in_space(rows[rows["space"] == space], space, baseline) for space in rows["space"].unique()]
    sentences += _carried_over(rows, baseline)
    sentences += _quality(differences, baseline)
    sentences.append(
        f"{counted(len(rows), 'comparison')} stand behind these sentences; each quantity is corrected for its number "
        "of methods, not for the number of quantities."
    )
    if seeds < FEW_SEEDS:
        sentences.append(
            f"{counted(seeds, 'seed')} are few: the {100 * confidence:g} % intervals are wide, and “undecided” "
            "means that the study cannot tell, not that the methods are equal."
        )
    return sentences


def _in_space(rows: pd.DataFrame, space: str, baseline: str) -> str:
    where = f"In {SPACE_NAMES.get(space, space)} space ({SPACES[space]})" if space in SPACES else f"In {space} space"
    seeds = counted(int(rows["n_seeds"].min()), "seed")
    measures = rows["headline"].nunique()
    by_any = "by the one measure" if measures == 1 else f"by any of the {measures} measures"
    phrases, silent = [], []
    for method in rows["method"].unique():
        of_method = rows[rows["method"] == method]
        said = [
            f"{word} by {enumerated(of_method.loc[of_method['verdict'] == verdict, 'headline'].tolist())}"
            for verdict, word in ((LOWER, "flatter"), (HIGHER, "sharper"))
            if (of_method["verdict"] == verdict).any()
        ]
        if not said:
            silent.append(method)
            continue
        rest = int((of_method["verdict"] == UNDECIDED).sum())
        phrases.append(f"{method} is {' and '.join(said)}" + (f", undecided by {rest} more" if rest else ""))
    if silent:
        phrases.append(f"{enumerated(silent)} cannot be told from {baseline} at {seeds} {by_any}")
    comparison = f", compared with {baseline}: " if len(silent) < rows["method"].nunique() else ", "
    return where + comparison + "; ".join(phrases) + "."


def _carried_over(rows: pd.DataFrame, baseline: str) -> list[str]:
    """Names methods that are flatter in LoRA space by a measure that does not confirm it in full space."""
    keys = ["method", "measure", "kind"]
    both = rows[rows["space"] == "lora"].merge(rows[rows["space"] == "full"], on=keys, suffixes=("", "_full"))
    apart = both[(both["verdict"] == LOWER) & (both["verdict_full"] != LOWER)]
    methods = list(dict.fromkeys(apart["method"]))
    if not methods:
        return []
    verb = "is" if len(methods) == 1 else "are"
    return [
        f"{enumerated(methods)} {verb} flatter than {baseline} in LoRA space by a measure that does not show it in "
        "full space: flatness of the factors is not flatness of the weights."
    ]


def _quality(differences: pd.DataFrame, baseline: str) -> list[str]:
    rows = differences[(differences["measure"] == "quality") & (differences["split"] == "validation")]
    name = "accuracy" if "accuracy" in set(rows["quantity"]) else "loss"
    rows = rows[rows["quantity"] == name]
    if rows.empty:
        return []
    clear = [f"{row.method} {row.verdict}" for row in rows.itertuples() if row.verdict != UNDECIDED]
    if clear:
        return [f"Validation {name} against {baseline}: {enumerated(clear)}; the others undecided."]
    seeds = counted(int(rows["n_seeds"].min()), "seed")
    return [f"Validation {name} does not separate any method from {baseline} at {seeds}."]
