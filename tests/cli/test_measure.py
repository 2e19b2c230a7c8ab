"""``bilora measure`` on adapters this project did not train, on plain models, and with bad input."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from bilora.cli.app import main
from bilora.cli.measuring_bar import MeasuringBar
from bilora.tasks import load_model, load_tokenizer

ROOT = Path(__file__).parents[2]
COMMON = ["--validation-examples", "16", "--train-examples", "16", "--examples", "8", "--max-length", "24"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``adapter``: LoRA of another hand on MiniLM; ``other``: one of a tiny BERT; ``model``: that BERT, whole."""
    root = tmp_path_factory.mktemp("subjects")
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS", init_lora_weights=False)
    get_peft_model(load_model("minilm", "classification", 2), config).save_pretrained(root / "adapter")
    tokenizer = load_tokenizer("minilm")
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    tiny = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **size))
    tiny.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    get_peft_model(tiny, config).save_pretrained(root / "other")
    return root


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["measure", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.strip().splitlines()
    return line


def test_foreign_adapter_is_measured_once(folders: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(folders / "adapter"), "--model", "minilm", *COMMON, "--what", "quality,random"]
    arguments += ["--set", "random.radii=[0.1, 1]", "--set", "directions=2", "--output", "out/rows.parquet"]
    assert main(["measure", *arguments]) == 0
    assert "rows in out/rows.parquet" in capsys.readouterr().out
    rows = pd.read_parquet("out/rows.parquet")
    assert set(rows["measure"]) == {"quality", "random"}
    assert set(rows.loc[rows["measure"] == "random", "space"]) == {"full", "lora"}
    assert sorted(rows["radius"].dropna().unique()) == [0.1, 1.0]
    assert (rows[rows["quantity"] == "loss_rise"].groupby(["space", "radius"]).size() == 2).all()
    record = (here / "out" / "rows.json").read_text()
    assert str(folders) not in record
    assert json.loads(record)["determinants"]["measures"][1]["settings"]["directions"] == 2

    written = (here / "out" / "rows.parquet").stat().st_mtime_ns
    assert main(["measure", *arguments]) == 0  # the same again: read
    assert (here / "out" / "rows.parquet").stat().st_mtime_ns == written

    other = [*arguments, "--set", "seed=1"]
    assert "holds something else" in refused(other, capsys)
    assert main(["measure", *other, "--force"]) == 0
    assert not pd.read_parquet("out/rows.parquet").equals(rows)


def test_an_adapter_of_another_kind_is_measured_in_full_space(folders: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = IA3Config(target_modules=["key", "value", "dense"], feedforward_modules=["dense"], task_type="SEQ_CLS")
    model = get_peft_model(load_model("minilm", "classification", 2), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ia3" in name:
                parameter.mul_(1.1)
    model.save_pretrained(tmp_path / "ia3")
    arguments = [str(tmp_path / "ia3"), "--model", "minilm", *COMMON, "--set", "random.directions=2"]
    assert main(["measure", *arguments, "--output", "a.parquet"]) == 0
    rows = pd.read_parquet("a.parquet")
    assert set(rows["measure"]) == {"quality", "random", "adversarial"}
    assert set(rows["space"]) == {"", "full"}
    assert rows.loc[rows["quantity"] == "loss_rise", "value"].notna().all()


def test_one_space_alone(folders: Path) -> None:
    arguments = [str(folders / "adapter"), "--model", "minilm", *COMMON, "--what", "adversarial", "--space", "lora"]
    assert main(["measure", *arguments, "--set", "radii=[0.01]", "--output", "a.parquet"]) == 0
    rows = pd.read_parquet("a.parquet")
    assert set(rows["space"]) == {"lora"}
    assert set(rows["radius"].dropna()) == {0.0, 0.01}


def test_plain_model(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(folders / "model"), *COMMON, "--what", "random,quality", "--output", "m.parquet"]
    assert main(["measure", *arguments]) == 0
    assert set(pd.read_parquet("m.parquet")["space"]) == {"full", ""}
    arguments[arguments.index("random,quality")] = "subspace"
    assert "no plain LoRA adapter and so no LoRA space" in refused(arguments, capsys)


BAD = {
    "adapter of another base model": ("other", ["--model", "minilm"], "base"),
    "no adapter and no model": (".", [], "holds neither"),
    "unknown measure": ("adapter", ["--what", "flatness"], "unknown measure 'flatness'"),
    "measure twice": ("adapter", ["--what", "random,random"], "not a list of different names"),
    "unknown space": ("adapter", ["--what", "random", "--space", "half"], "random has no space half"),
    "unknown setting": ("adapter", ["--what", "random", "--set", "steps=3"], "--set steps is no setting of random"),
    "setting out of range": ("adapter", ["--what", "random", "--set", "radii=[-1]"], "radii.0"),
    "unknown split": ("adapter", ["--split", "test"], "split"),
    "too many examples": ("adapter", ["--model", "minilm", "--examples", "17"], "validation has 16"),
    "unknown model": ("adapter", ["--model", "./none"], "no model folder"),
    "wrong file name": ("adapter", ["--output", "out.csv"], "is no .parquet file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case: str, folders: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, options, expected = BAD[case]
    subject = str(here if folder == "." else folders / folder)
    assert expected in refused([subject, *COMMON, "--output", "out.parquet", *options], capsys)
    assert not list(here.iterdir())


def test_output_among_the_measured_files_is_refused(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        str(folders / "adapter"),
        *COMMON,
        "--model",
        "minilm",
        "--output",
        str(folders / "adapter" / "rows.parquet"),
    ]
    assert "choose a place outside" in refused(arguments, capsys)


def test_an_interrupted_measure_keeps_what_it_found_and_goes_on(
    folders: Path, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [str(folders / "model"), *COMMON, "--what", "quality,trace,spectrum", "--output", "rows.parquet"]
    arguments += ["--set", "trace.max_products=16", "--set", "spectrum.k=2", "--set", "spectrum.tolerance=1e-4"]
    told: list[str] = []

    def interrupting(self: object, name: str) -> Callable[[int, int, str], None]:
        def tell(done: int, most: int, note: str) -> None:
            told.append(f"{name}: {note}")
            if name.startswith("spectrum") and done == 3:
                raise KeyboardInterrupt

        return tell

    with monkeypatch.context() as patch:
        patch.setattr(MeasuringBar, "watch", interrupting)
        assert main(["measure", *arguments]) == 130
    assert not Path("rows.parquet").exists()
    assert "same command again" in capsys.readouterr().err
    assert any(line.startswith("spectrum, full space: residual") for line in told)
    stopped = pd.read_parquet("rows.stopped.parquet")
    assert set(stopped["measure"]) == {"spectrum"}
    assert not stopped.loc[stopped["quantity"] == "converged", "value"].all()

    counted: list[str] = []

    def counting(self: object, name: str) -> Callable[[int, int, str], None]:
        return lambda done, most, note: counted.append(name)

    with monkeypatch.context() as patch:
        patch.setattr(MeasuringBar, "watch", counting)
        assert main(["measure", *arguments]) == 0
    assert set(counted) == {"spectrum, full space"}, "what was finished is not computed again"
    assert set(pd.read_parquet("rows.parquet")["measure"]) == {"quality", "trace", "spectrum"}
    assert sorted(path.name for path in here.iterdir()) == ["rows.json", "rows.parquet"]


def test_density_and_layers_of_an_adapter(folders: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(folders / "other"), "--model", str(folders / "model"), *COMMON, "--what", "density,layers"]
    arguments += ["--set", "density.runs=2", "--set", "density.steps=4", "--set", "layers.max_products=12"]
    assert main(["measure", *arguments, "--output", "rows.parquet", "--figures", "figures"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for quantity in ("density trace", "density negative share", "layers eigenvalue", "layers trace"):
        assert quantity in printed, quantity
    rows = pd.read_parquet("rows.parquet")
    assert set(rows["measure"]) == {"density", "layers"}
    for measure in ("density", "layers"):
        assert set(rows.loc[rows["measure"] == measure, "space"]) == {"full", "lora"}
    layers = rows[(rows["measure"] == "layers") & (rows["quantity"] == "eigenvalue") & (rows["space"] == "full")]
    assert len(layers) == 2  # query and value of the one layer
    assert layers["value"].notna().all()
    drawn = {path.stem for path in (here / "figures").glob("*.png")}
    assert drawn == {"density", "layer_eigenvalues", "layer_traces"}


def products_shown(bar: Path) -> int:
    """The number of products that a progress bar, written to a file, has last told of; 0 before."""
    told = re.findall(r"(\d+)/900", bar.read_text())
    return int(told[-1]) if told else 0


@pytest.mark.slow
def test_ctrl_c_ends_a_spectrum_with_what_it_found(folders: Path, here: Path) -> None:
    arguments = [str(folders / "adapter"), "--model", "minilm", *COMMON, "--what", "quality,spectrum"]
    arguments += ["--space", "full", "--set", "spectrum.k=99", "--set", "tolerance=1e-2", "--set", "max_products=900"]
    heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a background job's children ignore SIGINT
    bar = here / "bar.txt"
    with bar.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "bilora", "measure", *arguments, "--output", "rows.parquet"],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "FORCE_COLOR": "1", "TERM": "xterm"},
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            preexec_fn=heeding,
        )
    deadline = time.monotonic() + 120
    while products_shown(bar) < 10 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    said = bar.read_text()
    assert process.returncode == 130, said
    assert "same command again" in said
    assert "Traceback" not in said
    assert not Path("rows.parquet").exists()
    stopped = pd.read_parquet("rows.stopped.parquet").set_index("index")
    values = stopped[stopped["quantity"] == "eigenvalue"]
    assert 10 <= len(values) <= 99
    converged = stopped.loc[stopped["quantity"] == "converged", "value"] == 1
    assert converged.any()
    assert not converged.all()
    assert (converged == (values["residual"] <= 1e-2)).all()
    assert stopped.loc[stopped["quantity"] == "products", "value"].item() >= 10


def test_what_was_found_is_not_written_over_a_file_of_the_users(
    folders: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("rows.stopped.parquet").write_text("mine")

    def interrupt(self: object, name: str) -> Callable[[int, int, str], None]:
        def tell(done: int, most: int, note: str) -> None:
            raise KeyboardInterrupt

        return tell

    monkeypatch.setattr(MeasuringBar, "watch", interrupt)
    assert "in the way" in refused(
        [str(folders / "model"), *COMMON, "--what", "spectrum", "--output", "rows.parquet"], capsys
    )
    assert Path("rows.stopped.parquet").read_text() == "mine"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["spectrum.differences=one-sided", "spectrum.curvature=ggn"], "leave out"),
        (["spectrum.backend=scipy", "spectrum.which=both", "spectrum.k=1"], "2 or more"),
        (["spectrum.backend=pyhessian", "spectrum.which=smallest"], "largest magnitude alone"),
        (["trace.tolerance=2"], "trace"),
        (["density.runs=0"], "density"),
        (["layers.by=("], "regular expression"),
    ],
)
def test_settings_of_curvature_out_of_range(
    folders: Path, settings: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(folders / "model"), *COMMON, "--what", settings[0].split(".")[0], "--output", "rows.parquet"]
    for setting in settings:
        arguments += ["--set", setting]
    assert message in refused(arguments, capsys)
    assert not Path("rows.parquet").exists()
