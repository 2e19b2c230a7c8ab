"""The sharpness values that stand for a study: one per measure and space."""

import pandas as pd

from analysis.space_names import in_space_order

_SHARPNESS = {
    ("random", "loss_rise"): "loss rise under random noise",
    ("adversarial", "loss_rise"): "loss rise one gradient step away",
    ("worst_case", "loss_rise"): "worst-case loss rise found",
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
