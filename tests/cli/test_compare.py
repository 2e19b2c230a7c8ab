"""``bilora compare`` with bad input: one line and exit code 2, before anything is written."""

from pathlib import Path

import pytest

from bilora.cli.app import main

STUDY = """\
name: tiny
task: {data: rotten_tomatoes, train_examples: 32, validation_examples: 16}
model: minilm
training: {max_steps: 4}
methods: {LoRA: {method: lora}}
seeds: [0]
measures: [{measure: quality}]
"""

BAD = {
    "unknown method": ({"method: lora": "method: loar"}, [], "methods.LoRA: unknown method 'loar': choose one of"),
    "unknown measure": ({"measure: quality": "measure: qual"}, [], "measures.0: unknown measure 'qual'"),
    "unknown model": ({"model: minilm": "model: ./nowhere"}, [], "study.yaml: model: no model folder at"),
    "adapter as model": ({"model: minilm": "model: ./adapter"}, [], "holds an adapter, not a base model"),
    "missing data": ({"rotten_tomatoes": "nowhere.csv"}, [], "task: no data at nowhere.csv"),
    "wrong column": ({"data: rotten_tomatoes": "data: data.csv, text_column: body"}, [], "no column 'body'"),
    "empty data": ({"data: rotten_tomatoes": "data: empty.csv"}, [], "empty.csv is empty"),
    "labels out of range": ({"data: rotten_tomatoes": "data: gaps.csv"}, [], "gaps.csv"),
    "training argument": ({"max_steps: 4": "max_stepz: 4"}, [], "training: unknown training argument 'max_stepz'"),
    "no workers": ({}, ["--workers", "0"], "workers is 0"),
    "output is a file": ({}, ["--output", "data.csv"], "data.csv is a file"),
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "data.csv").write_text("text,label\n" + "".join(f"word {i},{i % 2}\n" for i in range(60)))
    (tmp_path / "gaps.csv").write_text("text,label\n" + "".join(f"word {i},{i % 2 * 7}\n" for i in range(60)))
    (tmp_path / "empty.csv").write_text("text,label\n")
    return tmp_path


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replacements, options, expected = BAD[case]
    text = STUDY
    for old, new in replacements.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    (here / "study.yaml").write_text(text)
    before = sorted(here.rglob("*"))
    assert main(["compare", "study.yaml", *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("error: ")
    assert expected in line
    assert sorted(here.rglob("*")) == before


def test_missing_study_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "none.yaml"]) == 2
    assert "none.yaml: cannot be read" in capsys.readouterr().err
