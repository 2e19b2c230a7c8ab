"""The result table for a paper."""

import re

import pytest

from analysis.study.latex import escaped, latex_table
from tests.study.test_table import study_rows


def test_every_line_has_a_cell_for_every_method_and_nothing_is_left_to_escape() -> None:
    frame = study_rows().replace({"method": {"B": "Bi-LoRA_50% {x}"}})
    text = latex_table(frame, "A")
    head, *body = [line for line in text.splitlines() if line.endswith(r" \\")]
    assert head == r" & A & Bi-LoRA\_50\% \{x\} \\"
    assert len(body) == 3
    assert all(len(re.findall(r"(?<!\\)&", line)) == 2 for line in (head, *body))
    assert r"101.0 $\pm$ 2.5 & 90.9 $\pm$ 2.2*" in text
    assert r"\begin{tabular}{lrr}" in text
    assert r"mean $\pm$ half width of the 95 \% interval over 3 seeds. * differs from A" in text
    assert text.isascii()


@pytest.mark.parametrize(
    ("text", "set_as"),
    [("-1.5 ± 0.2", r"$-1.5$ $\pm$ 0.2"), ("a & b", r"a \& b"), ("\\x^2", r"\textbackslash{}x\textasciicircum{}2")],
)
def test_what_latex_would_read_is_escaped(text: str, set_as: str) -> None:
    assert escaped(text) == set_as
