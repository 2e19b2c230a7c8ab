"""A study file is right, or one line says where it is wrong and what would be right."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from analysis import Objective, WeightSpace
from analysis.frame import rows_frame
from analysis.registry import MEASURES
from analysis.statistics import summarize
from analysis.study.plan import plan_study
from analysis.study.run import check_arguments, check_inputs
from analysis.study.spec import read_study
from analysis.study.subset import subset_rows
from bilora.errors import UserError
from tests.oracles import tiny

Write = Callable[..., Path]

BAD: dict[str, tuple[dict[str, str], list[str]]] = {
    "unknown key": ({"model: minilm": "modell: minilm"}, ["model", "is missing"]),
    "extra key": ({"model: minilm": "model: minilm\nextra: 1"}, ["extra", "unknown key", "baseline"]),
    "unknown key of the task": ({"max_length: 16": "max_len: 16"}, ["task.max_len", "unknown key", "max_length"]),
    "bad value in the task": ({"max_length: 16": "max_length: 0"}, ["task.max_length", "greater than or equal to 2"]),
    "unknown method": ({"{method: lora}": "{method: lorra}"}, ["methods.LoRA", "lorra", "lora_sam"]),
    "unknown method setting": ({"rho: 0.05": "rhoo: 0.05"}, ["methods.Bi-LoRA", "rhoo", "rho"]),
    "method setting out of range": ({"rho: 0.05": "rho: -1"}, ["methods.Bi-LoRA", "rho"]),
    "method setting of another type": ({"rho: 0.05": "rho: [1]"}, ["methods.Bi-LoRA", "rho"]),
    "no methods": (
        {"methods:\n  LoRA: {method: lora}\n  Bi-LoRA: {method: bilora, rho: 0.05}\n": "methods: {}\n"},
        ["methods", "at least 1"],
    ),
    "unknown measure": ({"measure: quality": "measure: qualty"}, ["measures.0", "qualty", "spectrum"]),
    "unknown measure setting": ({"directions: 2": "direction: 2"}, ["measures.1.direction", "unknown key", "radii"]),
    "measure setting out of range": ({"radii: [0.2]": "radii: [-0.2]"}, ["measures.1.radii.0", "greater than 0"]),
    "unknown space": ({"kind: filter": "kind: filter, spaces: [half]"}, ["measures.1.spaces", "half", "full, lora"]),
    "space for a measure without": (
        {"measure: quality": "measure: quality, spaces: [full]"},
        ["measures.0.spaces", "no spaces"],
    ),
    "space twice": ({"kind: filter": "kind: filter, spaces: [full, full]"}, ["measures.1.spaces", "twice"]),
    "unknown split": ({"measure: quality": "measure: quality, split: test"}, ["measures.0.split", "validation"]),
    "no examples": ({"examples: 8": "examples: 0"}, ["measures.0.examples", "greater than 0"]),
    "the same measure twice": (
        {"  - {measure: quality, examples: 8}": "  - {measure: quality, examples: 8}\n  - {measure: quality}"},
        ["measures.1", "measures.0"],
    ),
    "the same surface twice": (
        {"  - {measure: quality, examples: 8}": "  - {measure: surface, points: 5}\n  - {measure: surface, points: 7}"},
        ["measures.1", "measures.0"],
    ),
    "seed twice": ({"seeds: [0]": "seeds: [0, 1, 0]"}, ["seeds", "0 is given twice"]),
    "seed no integer": ({"seeds: [0]": "seeds: [0.5]"}, ["seeds.0", "integer"]),
    "no seeds": ({"seeds: [0]": "seeds: []"}, ["seeds", "at least 1"]),
    "unknown baseline": ({"seeds: [0]": "seeds: [0]\nbaseline: SAM"}, ["baseline", "SAM", "LoRA, Bi-LoRA"]),
    "name with a slash": ({"name: tiny": "name: a/b"}, ["name", "a/b"]),
    "no YAML": ({"name: tiny": "name: [tiny"}, ["line", "YAML"]),
    "key twice": ({"model: minilm": "model: minilm\nmodel: smollm2"}, ["line 4", "'model' is given twice"]),
    "no mapping": ({"name: tiny\n": "- 1\n"}, ["YAML"]),
}


@pytest.mark.parametrize("case", BAD)
def test_each_error_is_one_line_with_file_key_and_cure(case: str, study_file: Write) -> None:
    replacements, expected = BAD[case]
    path = study_file(replacements)
    with pytest.raises(UserError) as caught:
        read_study(path)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"{path}: ")
    for part in expected:
        assert part in line


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("", "not a mapping"),
        ("- a\n", "not a mapping"),
        ("1: a\n", "not a mapping"),
        ("a: !!python/name:os.system\n", "YAML"),
    ],
)
def test_files_that_are_no_study(content: str, part: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=part) as caught:
        read_study(path)
    assert "\n" not in str(caught.value)


def test_missing_file_and_binary_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_study(tmp_path / "none.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        read_study(tmp_path / "b.yaml")


def test_exponents_are_numbers(study_file: Write) -> None:
    spec = read_study(study_file({"rho: 0.05": "rho: 5e-2"}))
    assert spec.training["learning_rate"] == 1e-3
    assert spec.methods["Bi-LoRA"].all_settings()["rho"] == 0.05


def test_defaults_follow_from_the_file(study_file: Write) -> None:
    spec = read_study(study_file({"{method: lora}": "{method: lora, training: {max_steps: 2}}"}))
    assert spec.baseline_label == "LoRA"
    assert spec.folder == Path("runs/tiny")
    assert spec.measures[1].all_spaces() == ("full", "lora")
    assert spec.measures[0].all_spaces() == ("",)
    assert spec.training_of("LoRA")["max_steps"] == 2
    assert spec.training_of("Bi-LoRA")["max_steps"] == 4


VARIANTS = [
    ("surface", [{"plane": "filter"}, {"plane": "eigenvectors"}]),
    ("m_sharpness", [{"m": 7}, {"m": 3}, {"m": 7, "kind": "filter"}]),
    ("random", [{"kind": "filter"}, {"kind": "isotropic"}]),
]


@pytest.mark.parametrize(("measure", "variants"), VARIANTS)
def test_variants_of_a_measure_stand_in_one_study(
    measure: str, variants: list[dict[str, Any]], study_file: Write
) -> None:
    entries = [{"measure": measure, "spaces": ["full"], "examples": 4, **settings} for settings in variants]
    lines = "\n".join(f"  - {json.dumps(entry)}" for entry in entries)
    random = "  - {measure: random, kind: filter, radii: [0.2], directions: 2, examples: 4}"
    spec = read_study(study_file({random: lines}))
    labels = [cell.label for cell in plan_study(spec).cells if cell.kind == "measure"]
    assert len(set(labels)) == len(labels)

    space = WeightSpace.full(tiny.with_lora(tiny.bert()))
    objective = Objective([tiny.padded(part) for part in tiny.split(tiny.examples())])
    small = {"points": 5, "directions": 2}
    rows = []
    for settings in variants:
        known = MEASURES[measure].settings.model_fields
        chosen = MEASURES[measure].settings(**{k: v for k, v in small.items() if k in known}, **settings)
        result = MEASURES[measure].result(objective, space, chosen)
        rows += result.rows() + subset_rows(result.rows(), 4, 16, objective, space, result, chosen)
    table = summarize(rows_frame(rows).assign(method="LoRA", seed=0))
    assert table["kind"].nunique() == len(variants)


@pytest.mark.parametrize(
    ("replacements", "where"),
    [
        ({"max_steps: 4": "max_stepz: 4"}, "training: unknown training argument 'max_stepz'"),
        ({"max_steps: 4": "max_steps: many"}, "training: training argument max_steps='many'"),
        (
            {"{method: lora}": "{method: lora, training: {lr: 1}}"},
            "methods.LoRA.training: unknown training argument 'lr'",
        ),
    ],
)
def test_training_arguments_are_checked(replacements: dict[str, str], where: str, study_file: Write) -> None:
    with pytest.raises(UserError) as caught:
        check_arguments(read_study(study_file(replacements)))
    assert str(caught.value).startswith(where)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("replacements", "expected"),
    [
        ({"data: rotten_tomatoes": "data: nowhere.csv"}, "task: no data at nowhere.csv"),
        ({"data: rotten_tomatoes": "data: rotten_tomatoes, text_column: body"}, "task: .*no column 'body'"),
        ({"examples: 8": "examples: 17"}, "measures.0.examples: 17 asked for, but validation has 16"),
        ({"train_examples: 32": "train_examples: 99999"}, "task: train_examples is 99999"),
    ],
)
def test_inputs_are_checked_before_anything_runs(
    replacements: dict[str, str], expected: str, study_file: Write
) -> None:
    with pytest.raises(UserError, match=expected):
        check_inputs(read_study(study_file(replacements)))
