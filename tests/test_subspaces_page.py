"""The examples of docs/subspaces.md run as they stand, and its commands and quantities are those there are."""

import re
from pathlib import Path

import pandas as pd

from analysis import Objective, WeightSpace
from analysis.registry import MEASURES
from tests.oracles import tiny

PAGE = Path(__file__).parents[1] / "docs" / "subspaces.md"


def test_its_examples_run():
    objective = Objective([tiny.padded(part) for part in tiny.split(tiny.examples())])
    names = {"objective": objective, "space": WeightSpace.full(tiny.with_lora(tiny.bert()))}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    mean, chance = names["found"].mean("column")
    assert 0 < chance < 1
    assert 0 <= mean <= 1


def test_its_table_names_measures_there_are():
    lines = re.findall(r"^\| `(.*?)\|$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(lines) > 5
    named = {name for line in lines for name in re.findall(r"`(\w+)`", line.split(" | ")[1])}
    assert named <= {*MEASURES, "compare"}
    assert {"dynamics", "update", "efficiency", "subspace"} <= named


def test_the_claims_have_a_number_for_every_method_of_their_study():
    """Of the quantities that all have; ascent efficiency may be of some."""
    table = pd.read_csv(PAGE.with_name("claims.csv"))
    study = (PAGE.parents[1] / "studies" / "claims.yaml").read_text(encoding="utf-8")
    methods = set(re.findall(r"^  (\S.*?): \{method:", study, flags=re.MULTILINE))
    for quantity in ("accuracy, validation", "random rise, full space, σ = 0.3", "outside share of LoRA-SAM's step"):
        here = table[table["quantity"] == quantity]
        assert set(here["method"]) == methods
        assert (here["n_seeds"] == 5).all()
        assert here["half_width"].gt(0).all()
