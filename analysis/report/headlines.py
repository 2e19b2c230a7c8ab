"""What the report answers first: the sentences that compare methods."""

import pandas as pd

from analysis.headlines import headline_rows
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
