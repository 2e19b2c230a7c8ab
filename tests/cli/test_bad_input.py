"""Every bad input: exit code 2, one line on standard error, nothing written."""

import os
import subprocess
import sys

import pytest

from bilora.cli.app import main

ROWS = [("a good film", 1), ("a bad film", 0), ("a fine film", 1), ("a dull film", 0)]


def csv_of(folder, header="text,label", rows=ROWS):
    path = folder / "data.csv"
    path.write_text("\n".join([header, *(f"{text},{label}" for text, label in rows)]) + "\n")
    return str(path)


CASES = {
    "negative learning rate": (lambda d: ["--train", "learning_rate=-1"], "learning_rate=-1 is out of range"),
    "no steps": (lambda d: ["--train", "max_steps=0"], "it must be at least 1, or -1 to count epochs"),
    "no epochs": (lambda d: ["--train", "num_train_epochs=0"], "finite and above 0"),
    "no batch": (lambda d: ["--train", "per_device_train_batch_size=0"], "it must be at least 1"),
    "no accumulation": (lambda d: ["--train", "gradient_accumulation_steps=0"], "it must be at least 1"),
    "negative decay": (lambda d: ["--train", "weight_decay=-0.1"], "finite and at least 0"),
    "checkpoints without state": (lambda d: ["--train", "save_only_model=true"], "is set by the run"),
    "missing file": (lambda d: ["--data", f"{d}/nothing.csv"], "no data at"),
    "unknown built-in": (lambda d: ["--data", "rotten_potatoes"], "rotten_tomatoes"),
    "unknown format": (lambda d: ["--data", __file__], "no known format"),
    "wrong text column": (lambda d: ["--data", csv_of(d), "--text-column", "body"], "set text_column to one of text"),
    "wrong label column": (lambda d: ["--data", csv_of(d), "--label-column", "y"], "set label_column to one of text"),
    "empty data set": (lambda d: ["--data", csv_of(d, rows=[])], "data.csv is empty"),
    "empty folder": (lambda d: ["--data", str(d)], "no train file"),
    "missing label": (lambda d: ["--data", csv_of(d, rows=[*ROWS, ("no label", "")])], "row 5 has no label"),
    "labels out of range": (lambda d: ["--data", csv_of(d, rows=[*ROWS, ("x", 7)])], "out of range"),
    "one class": (lambda d: ["--data", csv_of(d, rows=ROWS[::2])], "has 1 class"),
    "too many examples": (lambda d: ["--train-examples", "9000"], "has 6824 to give"),
    "no examples": (lambda d: ["--train-examples", "0"], "task.train_examples"),
    "too long": (lambda d: ["--max-length", "513"], "choose at most 512"),
    "unknown kind": (lambda d: ["--kind", "regression"], "task.kind"),
    "unknown method": (lambda d: ["--method", "nope"], "unknown method 'nope': choose one of"),
    "unknown setting": (lambda d: ["--set", "radius=1"], "no setting 'radius'"),
    "setting out of range": (lambda d: ["--set", "rho=-1"], "rho"),
    "setting of wrong type": (lambda d: ["--set", "rho=big"], "rho"),
    "setting without value": (lambda d: ["--set", "rho"], "write --set name=value"),
    "setting twice": (lambda d: ["--set", "rho=1", "--set", "rho=2"], "given twice"),
    "unknown training key": (lambda d: ["--train", "learning_rat=1"], "unknown training argument 'learning_rat'"),
    "managed training key": (lambda d: ["--train", "output_dir=x"], "'output_dir' is set by the run"),
    "training value of wrong type": (lambda d: ["--train", "max_steps=many"], "max_steps='many'"),
    "unknown schedule": (lambda d: ["--train", "lr_scheduler_type=nope"], "nope is not a valid SchedulerType"),
    "unknown model folder": (lambda d: ["--model", "./no/model"], "no model folder at ./no/model"),
    "folder without a model": (lambda d: ["--model", str(d)], "not a base model"),
    "missing GGUF file": (lambda d: ["--model", f"{d}/x.gguf"], "no model file"),
    "model without the head": (lambda d: ["--model", "minilm", "--target-modules", "nope"], "target_modules"),
    "rank of zero": (lambda d: ["--rank", "0"], "lora.r"),
    "dropout of one": (lambda d: ["--dropout", "1"], "lora.lora_dropout"),
    "rank of letters": (lambda d: ["--rank", "x"], "--rank"),
    "negative seed": (lambda d: ["--seed", "-1"], "seed"),
    "unknown option": (lambda d: ["--colour", "red"], "--colour"),
    "output is a file": (lambda d: ["--output", csv_of(d)], "is a file"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_nothing_written(tmp_path, capsys, case):
    inputs, output = tmp_path / "inputs", tmp_path / "run"
    inputs.mkdir()
    arguments, message = CASES[case]
    given = arguments(inputs)
    before = sorted(tmp_path.rglob("*"))
    assert main(["train", *([] if "--output" in given else ["--output", str(output)]), *given]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert captured.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_output_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    small = ["--train-examples", "8", "--validation-examples", "8", "--train", "max_steps=1"]
    assert main(["train", "--output", str(tmp_path / "file" / "run"), *small]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "Not a directory" in line


def test_missing_option_and_unknown_command(capsys):
    assert main(["train"]) == 2
    assert "--output" in capsys.readouterr().err
    assert main(["trian"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert main([]) == 2


def test_unknown_hub_model_offline(tmp_path):
    """In a process of its own: the hub library reads its offline switch when it is imported."""
    done = subprocess.run(
        [sys.executable, "-m", "bilora", "train", "--model", "nobody/no-such-model", "-o", str(tmp_path / "run")],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: model 'nobody/no-such-model' is not built in (minilm or smollm2)")
    assert not (tmp_path / "run").exists()
