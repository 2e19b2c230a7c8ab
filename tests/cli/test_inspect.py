"""``bilora inspect`` of recorded runs and of adapters trained elsewhere."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from bilora.cli.app import main
from bilora.training.recording import read_recording
from tests.cli.small import save_adapter, save_model

SMALL = "--train-examples 16 --validation-examples 8 --max-length 16 --rank 2 --train per_device_train_batch_size=4"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """``bilora``, ``lora_sam``: recorded runs on a BERT of 16 × 1; ``foreign``: an adapter of it without a record."""
    root = tmp_path_factory.mktemp("inspect")
    save_model(root / "model")
    for method in ("bilora", "lora_sam"):
        arguments = ["train", "-o", str(root / method), "--model", str(root / "model"), "--method", method]
        assert main([*arguments, *SMALL.split(), "--train", "max_steps=4", "--record", "2", "--quiet"]) == 0
    save_adapter(root / "foreign", root / "model", 3)
    return root


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_recorded_runs_side_by_side(folders, here, capsys):
    assert main(["inspect", str(folders / "bilora"), str(folders / "lora_sam")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for words in ("effective rank", "intruder dimensions", "perturbation outside LoRA-SAM's reach", "cosine with"):
        assert words in printed, words
    rows = pd.read_parquet("inspect.parquet")
    assert set(rows["method"]) == {"bilora", "lora_sam"}
    assert set(rows["measure"]) == {"update", "subspace", "dynamics", "compare"}
    outside = rows[(rows["quantity"] == "outside_share") & (rows["layer"] == "")].set_index(["method", "index"])[
        "value"
    ]
    assert outside["lora_sam", 3] < 0.05 < outside["bilora", 3]
    assert set(rows.loc[rows["measure"] == "dynamics", "index"]) == {0, 2, 3, 4}
    drawn = {path.stem for path in (here / "inspect").glob("*.png")}
    assert {"outside_share_steps", "convergence", "perturbation_parts", "update_spectrum", "overlap"} <= drawn


def test_an_adapter_of_another_hand(folders, here, capsys):
    arguments = ["inspect", str(folders / "foreign"), "--model", str(folders / "model"), "-o", "f.parquet"]
    assert main(arguments) == 0
    assert "no run was recorded" in capsys.readouterr().err
    rows = pd.read_parquet("f.parquet")
    assert set(rows["measure"]) == {"update"}
    assert (rows["quantity"] == "intruders").any()
    assert main(arguments) == 0  # looked at again
    other = ["inspect", str(folders / "bilora"), "-o", "f.parquet"]
    assert main(other) == 2
    assert "holds something else" in capsys.readouterr().err
    assert main([*other, "--force"]) == 0


def test_adapters_of_different_base_models_are_refused(folders, here, capsys):
    """Of one shape, and of layers of the same names: by what the runs recorded, and by the base that is given."""
    other = save_model(here / "other")
    with torch.no_grad():
        other.bert.encoder.layer[0].attention.self.query.weight.add_(1)
    other.save_pretrained(here / "other")
    arguments = ["train", "-o", "apart", "--model", "other", "--method", "lora", *SMALL.split()]
    assert main([*arguments, "--train", "max_steps=1", "--quiet"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(folders / "bilora"), "apart"]) == 2
    assert "were trained on different base models: inspect them apart" in capsys.readouterr().err
    assert main(["inspect", str(folders / "bilora"), "--model", "other"]) == 2
    assert "was trained on another base model" in capsys.readouterr().err
    assert not (here / "inspect.parquet").exists()


def test_without_the_base_model_intruders_are_left_out(folders, here, capsys):
    config = json.loads((folders / "foreign" / "adapter_config.json").read_text())
    copy = here / "copy"
    copy.mkdir()
    (copy / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "someone/model"}))
    (copy / "adapter_model.safetensors").write_bytes((folders / "foreign" / "adapter_model.safetensors").read_bytes())
    assert main(["inspect", "copy", "-o", "c.parquet"]) == 0
    assert "intruder dimensions are left out" in capsys.readouterr().err
    assert not (pd.read_parquet("c.parquet")["quantity"] == "intruders").any()


def test_bad_input_is_one_line_and_nothing_is_written(folders, here, capsys):
    (here / "empty").mkdir()
    Path("mine.parquet").write_text("mine")
    lora = str(folders / "foreign")
    cases = {
        "holds neither an adapter nor a recording": ["empty"],
        "is no folder": ["none"],
        "is no .parquet file": [lora, "-o", "out.csv"],
        "holds something else": [lora, "-o", "mine.parquet"],
        "choose a place outside": [lora, "-o", str(folders / "foreign" / "x.parquet")],
        "no model folder": [lora, "--model", "./none"],
    }
    for message, arguments in cases.items():
        capsys.readouterr()
        assert main(["inspect", *arguments]) == 2, message
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert message in line
    assert Path("mine.parquet").read_text() == "mine"
    assert sorted(path.name for path in here.iterdir()) == ["empty", "mine.parquet"]


def test_measures_of_a_recorded_run(folders):
    """The same rows through `bilora measure`, as a study takes them."""
    data = ["--train-examples", "16", "--validation-examples", "8", "--max-length", "16"]
    base = ["--model", str(folders / "model")]
    arguments = ["measure", str(folders / "bilora"), *base, *data, "--what", "dynamics,update,efficiency"]
    arguments += ["--set", "efficiency.steps=2", "--set", "efficiency.draws=2", "-o", "m.parquet"]
    assert main(arguments) == 0
    rows = pd.read_parquet("m.parquet")
    assert set(rows["measure"]) == {"dynamics", "update", "efficiency"}
    assert set(rows.loc[rows["measure"] == "dynamics", "index"]) == set(read_recording(folders / "bilora").steps)
    foreign = ["measure", str(folders / "foreign"), *base, *data, "--what", "dynamics", "-o", "n.parquet"]
    assert main(foreign) == 2
