"""The result table of a study in LaTeX, for a paper that loads ``booktabs``."""

import pandas as pd

from analysis.study.table import table_content

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "‖": r"$\Vert$",
    "ε": r"$\varepsilon$",
    "σ": r"$\sigma$",
    "ρ": r"$\rho$",
    "–": "--",
}


def latex_table(frame: pd.DataFrame, baseline: str) -> str:
    """:func:`analysis.study.table.result_table` as a ``table`` environment; user's words are escaped.

    Args:
        frame: the tidy rows of one study.
        baseline: label of the method that the others are compared with.
    """
    content = table_content(frame, baseline)
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escaped(content.spread)}.{escaped(f' {content.caption}.') if content.caption else ''}}}",
        rf"\begin{{tabular}}{{l{'r' * len(content.methods)}}}",
        r"\toprule",
        " & ".join(["", *map(escaped, content.methods)]) + r" \\",
        r"\midrule",
        *(" & ".join(map(escaped, [title, *cells])) + r" \\" for title, cells in content.lines),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """``text`` as LaTeX sets it; negative numbers get a minus sign."""
    made = "".join(_SPECIAL.get(character, character) for character in text)
    return f"${made.split(' ')[0]}${made[len(made.split(' ')[0]) :]}" if _negative(made) else made


def _negative(text: str) -> bool:
    first = text.split(" ")[0]
    return first.startswith("-") and first[1:2].isdigit()
