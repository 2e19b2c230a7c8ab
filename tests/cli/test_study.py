"""``bilora study``: a file begun, checked and followed; and failed cells tried again only when asked."""

import json
import threading
from pathlib import Path

import jsonschema
import pytest
from transformers import Trainer, TrainingArguments

from analysis.study.estimate import described, steps_of
from analysis.study.plan import plan_study
from analysis.study.schema import study_schema
from analysis.study.spec import read_study
from analysis.study.store import Store
from analysis.study.yaml_file import read_yaml
from bilora.cli.app import main
from bilora.tasks import TaskSpec
from bilora.training.spec import TrainSpec
from tests.study.conftest import TINY
from tests.training.tiny import pad, ragged_data, tiny_bert, with_lora

STUDIES = sorted(Path("studies").resolve().glob("*.yaml"))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path


def test_the_example_is_a_valid_study_and_is_not_written_over(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "init", "mine.yaml"]) == 0
    spec = read_study(here / "mine.yaml")
    assert (spec.name, spec.baseline, len(spec.seeds)) == ("my-study", "LoRA", 5)
    jsonschema.validate(_as_json(here / "mine.yaml"), study_schema())
    text = (here / "mine.yaml").read_text()
    assert main(["study", "init", "mine.yaml"]) == 2
    assert main(["study", "init", "nowhere/mine.yaml"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert [line.split(": ")[0] for line in lines] == ["error", "error"]
    assert (here / "mine.yaml").read_text() == text


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_schema_takes_every_study_of_the_project(path: Path) -> None:
    jsonschema.Draft202012Validator.check_schema(study_schema())
    jsonschema.validate(_as_json(path), study_schema())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("rho: 0.05", "roh: 0.05"),
        ("measure: quality", "measure: qualty"),
        ("directions: 2", "directions: many"),
        ("seeds: [0]", "seeds: zero"),
        ("name: tiny", "names: tiny"),
    ],
)
def test_the_schema_refuses_what_the_study_would(here: Path, old: str, new: str) -> None:
    (here / "bad.yaml").write_text(TINY.replace(old, new))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(_as_json(here / "bad.yaml"), study_schema())
    assert main(["study", "check", "bad.yaml"]) == 2


def test_the_schema_is_printed_or_written(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "schema"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == study_schema()
    assert main(["study", "schema", "-o", "study.json"]) == 0
    assert json.loads((here / "study.json").read_text()) == printed
    assert main(["study", "schema", "-o", "nowhere/study.json"]) == 2


def test_check_prints_the_cells_and_writes_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(here.rglob("*"))
    assert main(["study", "check", "tiny.yaml", "--no-estimate"]) == 0
    text = capsys.readouterr().out
    assert "8 cells, 0 of them finished" in text
    assert "train Bi-LoRA" in text
    assert "takes" not in text
    assert sorted(here.rglob("*")) == before


@pytest.mark.slow
def test_check_tells_time_and_memory(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the first method has no adapter, and where two labels share their trainings."""
    others = "methods:\n  Full: {method: full}\n  Again: {method: lora}\n"
    (here / "tiny.yaml").write_text(TINY.replace("methods:\n", others))
    assert main(["study", "check", "tiny.yaml", "--workers", "2"]) == 0
    text = capsys.readouterr().out
    assert "one takes, at most" in text
    assert "in 2 processes" in text
    assert "GB of memory a process" in text
    assert sorted(path.name for path in here.iterdir()) == ["tiny.yaml"]


def test_status_tells_done_running_failed_and_begun(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = read_study(here / "tiny.yaml")
    first, second, third, fourth, *rest = plan_study(spec).cells
    store = Store(spec.folder / "cells")
    store.begin(first.name, keep=True)
    store.finish(first.name, {})
    store.begin(second.name, keep=True)
    store.fail(second.name, "Traceback …\nValueError: no room left\n")
    store.begin(third.name, keep=True)
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with store.locked(fourth.name):
            held.set()
            release.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        assert main(["study", "status", "tiny.yaml"]) == 0
    finally:
        release.set()
        thread.join()
    text = capsys.readouterr().out
    totals = [cell.strip() for cell in next(line for line in text.splitlines() if " all " in line).split("│")[1:-1]]
    assert totals == ["all", "1", "1", "1", "1", str(len(rest))]
    assert f"running  {fourth.label}" in text
    assert f"failed   {second.label}: ValueError: no room left" in text
    assert "error.txt" in text


def test_status_before_anything_ran_makes_no_folder(here: Path) -> None:
    assert main(["study", "status", "tiny.yaml"]) == 0
    assert not (here / "runs").exists()


def test_bad_input_is_one_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (
        ["check", "none.yaml"], ["status", "none.yaml"], ["check", "tiny.yaml", "--workers", "0"],
    ):  # fmt: skip
        assert main(["study", *command]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: ")


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_steps": 7, "num_train_epochs": 2},
        {"num_train_epochs": 2, "per_device_train_batch_size": 3},
        {"num_train_epochs": 1.5, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
    ],
)
def test_steps_are_those_of_the_trainer(tmp_path: Path, arguments: dict[str, float]) -> None:
    data = ragged_data(copies=2)
    model = with_lora(tiny_bert())
    run = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, **arguments)
    trainer = Trainer(model=model, args=run, train_dataset=data, data_collator=pad)
    trainer.train()
    spec = TrainSpec(model="minilm", task=TaskSpec(data="rotten_tomatoes"), training=arguments)
    assert steps_of(spec, len(data)) == trainer.state.max_steps


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.31, "0.3 s"), (42.0, "42 s"), (600.0, "10 min"), (3 * 3600.0, "3.0 h")]
)
def test_times_in_words(seconds: float, words: str) -> None:
    assert described(seconds) == words


def _as_json(path: Path) -> object:
    """As an editor sees it: plain JSON values."""
    return json.loads(json.dumps(read_yaml(path)))
