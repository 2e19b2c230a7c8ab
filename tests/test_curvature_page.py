"""The examples of docs/curvature.md work as they stand there, one after the other."""

import re
from pathlib import Path

import numpy as np

from analysis import Objective, WeightSpace
from tests.oracles import tiny

PAGE = Path(__file__).parents[1] / "docs" / "curvature.md"


def test_the_examples_run_and_their_cross_check_agrees():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    objective = Objective([tiny.padded(part) for part in tiny.split(tiny.examples())])
    names = {"objective": objective, "space": WeightSpace.full(tiny.with_lora(tiny.bert()))}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    np.testing.assert_allclose(names["found"].values[0], names["spectrum"].values[0], rtol=1e-2)
    assert names["spectrum"].converged.all()
    assert names["again"].products < names["near"].products


def test_linked_files_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", PAGE.read_text(encoding="utf-8")):
        assert (PAGE.parent / target).exists(), target
