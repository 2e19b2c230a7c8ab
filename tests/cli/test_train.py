"""`bilora train` on the real MiniLM and real sentences."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from analysis.core.trained import load_trained
from bilora import METHODS
from bilora.cli.app import main
from bilora.cli.errors import exit_code
from bilora.cli.options import parse_assignments
from bilora.errors import UserError
from bilora.tasks import LoraSpec, TaskSpec, base_fingerprint, load_model, load_task, load_tokenizer
from bilora.training.recording import FILE_NAME, read_recording
from bilora.training.run import train_run
from bilora.training.spec import TrainSpec

ROOT = Path(__file__).parents[2]
SMALL = "--train-examples 48 --validation-examples 20 --max-length 16 --rank 2 --train per_device_train_batch_size=8"
SMALL_TASK = TaskSpec(train_examples=48, validation_examples=20, max_length=16)


def command(output, *more):
    return ["train", "-o", str(output), *SMALL.split(), "--train", "max_steps=6", *more]


def small_spec(**changes):
    """The spec of :func:`command`."""
    training = {"per_device_train_batch_size": 8, "max_steps": 6, **changes.pop("training", {})}
    return TrainSpec(task=SMALL_TASK, lora=LoraSpec(r=2), training=training, **changes)


def contents(folder):
    """Every saved tensor as bytes (the order of a file's metadata is not fixed)."""
    return {
        f"{path.name}:{name}": tensor.numpy().tobytes()
        for path in Path(folder).glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


class InterruptAt(TrainerCallback):
    """What Ctrl-C during a step does."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An uninterrupted run, from the command line."""
    folder = tmp_path_factory.mktemp("runs") / "bilora"
    assert main([*command(folder), "--quiet"]) == 0
    return folder


def test_what_a_run_leaves_behind(trained, capsys):
    assert {path.name for path in trained.iterdir()} >= {
        "adapter_model.safetensors",
        "adapter_config.json",
        "bilora_method.safetensors",
        "train.json",
    }
    assert not [p for p in trained.rglob("*") if p.is_dir() or p.suffix in (".bin", ".pt", ".pth", ".pkl", ".tmp")]
    record = json.loads((trained / "train.json").read_text())
    assert record["steps"] == 6
    assert record["spec"]["method"] == "bilora"
    assert record["spec"]["settings"]["rho"] == 0.05
    assert record["versions"]["torch"] == torch.__version__
    assert set(record["validation"]) == set(record["train"]) == {"loss", "accuracy", "f1", "matthews"}


def test_a_second_call_returns_the_finished_run(trained, capsys):
    before = {path: path.stat().st_mtime_ns for path in trained.iterdir()}
    assert main(command(trained)) == 0
    assert {path: path.stat().st_mtime_ns for path in trained.iterdir()} == before
    shown = capsys.readouterr().out
    assert "6 steps" in shown
    assert "validation" in shown


def test_stock_peft_reloads_what_was_recorded(trained):
    record = json.loads((trained / "train.json").read_text())
    task = load_task(SMALL_TASK, load_tokenizer("minilm"))
    base = load_model("minilm", "classification", task.num_labels, seed=99)
    assert base_fingerprint(base) == record["base_fingerprint"]
    assert task.fingerprint == record["data_fingerprint"]
    model = PeftModel.from_pretrained(base, trained).eval()
    with torch.no_grad():
        for split, rows in (("validation", task.validation), ("train", task.train.select(range(20)))):
            found = model(**task.collate(list(rows)))
            assert found.loss.item() == pytest.approx(record[split]["loss"], abs=1e-6)
            right = found.logits.argmax(-1) == torch.tensor(list(rows["labels"]))
            assert right.float().mean().item() == pytest.approx(record[split]["accuracy"])


def test_same_seed_same_adapter(trained, tmp_path):
    torch.rand(3)
    unsaved = {"save_strategy": "no"}
    train_run(small_spec(training=unsaved), tmp_path / "again", progress=False)
    assert contents(tmp_path / "again") == contents(trained)
    train_run(small_spec(seed=1, training=unsaved), tmp_path / "other", progress=False)
    assert contents(tmp_path / "other") != contents(trained)


@pytest.mark.parametrize("at", [0, 4])
def test_interrupted_run_continues_to_the_same_adapter(trained, tmp_path, at, capsys):
    folder = tmp_path / "run"
    code = exit_code(lambda: train_run(small_spec(), folder, progress=False, callbacks=[InterruptAt(at)]))
    assert code == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted: give the same command again to continue"
    assert not (folder / "train.json").exists()
    assert sorted(p.name for p in folder.glob("checkpoints/*")) == ([f"checkpoint-{at}"] if at else [])
    half_written = folder / "checkpoints" / "checkpoint-5"
    half_written.mkdir(parents=True)
    (half_written / "adapter_model.safetensors").write_bytes(b"cut off")
    assert main([*command(folder), "--quiet"]) == 0
    assert contents(folder) == contents(trained)
    finished, uninterrupted = (json.loads((f / "train.json").read_text()) for f in (folder, trained))
    for key in ("spec", "train", "validation", "steps", "base_fingerprint", "data_fingerprint"):
        assert finished[key] == uninterrupted[key]


def test_a_recorded_run_is_the_same_run(trained, tmp_path, capsys):
    """Recording is no part of the spec, goes on by itself after an interruption, and leaves the adapter as it is."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main([*command(whole), "--record", "2", "--quiet"]) == 0
    with pytest.raises(KeyboardInterrupt):
        train_run(small_spec(), killed, progress=False, callbacks=[InterruptAt(4)], record_every=2)
    assert main([*command(killed), "--quiet"]) == 0
    named = {key: value for key, value in contents(whole).items() if not key.startswith(FILE_NAME)}
    assert named == contents(trained)
    assert read_recording(whole).steps == (0, 2, 4, 5, 6)
    assert contents(whole) == contents(killed)
    assert main([*command(trained), "--record", "2"]) == 2
    assert "is finished and was not recorded: name another output folder" in capsys.readouterr().err
    assert main([*command(tmp_path / "zero"), "--record", "0"]) == 2
    assert "every must be an integer of at least 1" in capsys.readouterr().err
    assert not (tmp_path / "zero").exists()


class InterruptEvaluation(TrainerCallback):
    """What Ctrl-C does after the last step, before the run is finished."""

    def on_evaluate(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


@pytest.mark.parametrize("saving", [{}, {"save_strategy": "no"}], ids=["checkpoints", "none"])
def test_a_recorded_run_interrupted_after_its_last_step_goes_on(tmp_path, saving):
    """The moments are one file by then; with and without a checkpoint the run ends as an undisturbed one."""
    spec = small_spec(training=saving)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train_run(spec, whole, progress=False, record_every=2)
    with pytest.raises(KeyboardInterrupt):
        train_run(spec, killed, progress=False, callbacks=[InterruptEvaluation()], record_every=2)
    assert (killed / FILE_NAME).exists()
    train_run(spec, killed, progress=False)
    assert contents(whole) == contents(killed)
    assert read_recording(killed).steps == (0, 2, 4, 5, 6)
    assert not (killed / "recording").exists()


@pytest.mark.parametrize("options", [["--method", "full"], ["--dora"]])
def test_what_cannot_be_recorded_is_refused_before_anything_is_written(tmp_path, options, capsys):
    assert main([*command(tmp_path / "run"), *options, "--record", "2"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "carries no LoRA adapter" in line or "recording is derived for W0 + s·B·A" in line
    assert not (tmp_path / "run").exists()


def test_another_spec_is_refused_and_nothing_changed(trained, tmp_path, capsys):
    before = contents(trained)
    assert main(command(trained, "--set", "rho=0.1")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "settings.rho is 0.05 there, 0.1 here" in line
    assert contents(trained) == before
    folder = tmp_path / "begun"
    with pytest.raises(KeyboardInterrupt):
        train_run(small_spec(), folder, progress=False, callbacks=[InterruptAt(0)])
    assert main(command(folder, "--seed", "5")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "interrupted run of another spec (seed is 0 there, 5 here)" in line


def test_a_model_of_another_origin_is_not_written_over(tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert main(command(tmp_path)) == 2
    assert "holds a model of another origin" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["adapter_config.json"]


def test_changed_data_is_not_continued_on(tmp_path):
    data = tmp_path / "data.csv"
    rows = "".join(f"sentence number {i},{i % 2}\n" for i in range(40))
    data.write_text("text,label\n" + rows)
    spec = TrainSpec(task=TaskSpec(data=str(data), max_length=16), training={"max_steps": 2})
    with pytest.raises(KeyboardInterrupt):
        train_run(spec, tmp_path / "run", progress=False, callbacks=[InterruptAt(1)])
    data.write_text("text,label\n" + rows.replace("sentence", "phrase"))
    with pytest.raises(UserError, match="the data of the interrupted run"):
        train_run(spec, tmp_path / "run", progress=False)


def test_full_fine_tuning_saves_a_model_that_loads_as_one(tmp_path):
    folder = tmp_path / "full"
    assert main([*command(folder), "--quiet", "--method", "full", "--train", "save_strategy=no"]) == 0
    assert not (folder / "adapter_config.json").exists()
    record = json.loads((folder / "train.json").read_text())
    task = load_task(SMALL_TASK, load_tokenizer(str(folder)))
    model = load_model(str(folder), "classification", task.num_labels)
    assert base_fingerprint(model) != record["base_fingerprint"]
    with torch.no_grad():
        loss = model(**task.collate(list(task.validation))).loss.item()
    assert loss == pytest.approx(record["validation"]["loss"], abs=1e-6)


def test_language_model_from_a_local_folder(tmp_path):
    tokenizer = load_tokenizer("minilm")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    task_spec = SMALL_TASK.model_copy(update={"kind": "causal_lm"})
    training = {"max_steps": 3, "per_device_eval_batch_size": 6}
    spec = TrainSpec(model=str(tmp_path / "llama"), task=task_spec, training=training)
    record = train_run(spec, tmp_path / "run", progress=False)
    task = load_task(task_spec, tokenizer)
    model = PeftModel.from_pretrained(load_model(spec.model, "causal_lm"), tmp_path / "run").eval()
    with torch.no_grad():
        loss = model(**task.collate(list(task.validation))).loss.item()
    assert record.validation["token_loss"] == pytest.approx(loss, rel=1e-6)


def test_checkpoints_asked_for_are_kept(tmp_path):
    train_run(small_spec(training={"save_steps": 3, "save_total_limit": None}), tmp_path / "run", progress=False)
    assert {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()} == {"checkpoint-3", "checkpoint-6"}


def test_loss_that_is_no_number(tmp_path, capsys):
    assert main(command(tmp_path / "run", "--train", "learning_rate=1e30", "--train", "max_grad_norm=0")) == 2
    assert "loss became nan" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run" / "train.json").exists()


def test_texts_of_arguments_are_converted():
    spec = TrainSpec(training={"learning_rate": "1e-3", "max_steps": "7", "bf16": "false"})
    assert spec.training == {"learning_rate": 1e-3, "max_steps": 7, "bf16": False}
    assert TrainSpec(training=yaml.safe_load("{save_strategy: no, bf16: no}")).training == {
        "save_strategy": "no",
        "bf16": False,
    }


def test_values_of_assignments():
    given = ["a=1e-3", "b=true", "c=no", "d=[1, 0.5]", "e=x=y", "f=None", "g=cosine", "h="]
    assert parse_assignments(given, "--set") == {
        "a": 1e-3,
        "b": True,
        "c": "no",
        "d": [1, 0.5],
        "e": "x=y",
        "f": None,
        "g": "cosine",
        "h": "",
    }


def test_methods_lists_them_all(capsys):
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(METHODS), "a line each"
    assert main(["methods", "bilora"]) == 0
    assert "rho=0.05" in capsys.readouterr().out


def test_version_and_help(capsys):
    assert main(["--version"]) == 0
    assert main(["--help"]) == 0
    assert main(["train", "--help"]) == 0
    assert "--output" in capsys.readouterr().out


def test_command_line_loads_no_heavy_library_before_it_must():
    code = (
        "import sys; from bilora.cli.app import main; assert main(['train', '--help']) == 0; "
        "loaded = {'torch', 'transformers', 'peft', 'datasets', 'pandas', 'matplotlib'} & set(sys.modules); "
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TERM": "dumb", "COLUMNS": "200"}


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_process_continues_to_the_same_adapter(trained, tmp_path, how):
    folder = tmp_path / "run"
    arguments = [sys.executable, "-m", "bilora", *command(folder)]
    # A shell's background jobs ignore SIGINT, and what they start inherits that.
    heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(arguments, env=environment(), stderr=subprocess.PIPE, text=True, preexec_fn=heeding)
    deadline = time.monotonic() + 120
    while not list(folder.glob("checkpoints/checkpoint-*/trainer_state.json")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(how)
    _, said = process.communicate(timeout=60)
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert said.splitlines()[-1] == "interrupted: give the same command again to continue"
    assert not (folder / "train.json").exists()
    subprocess.run(arguments, env=environment(), check=True, timeout=120)
    assert contents(folder) == contents(trained)


@pytest.mark.slow
def test_two_processes_train_one_adapter(trained, tmp_path):
    # accelerate starts several processes with torchrun only under --multi_gpu; the variable keeps them on the CPU.
    arguments = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--main_process_port", "0"]
    arguments += ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    arguments += ["-m", "bilora"]
    small = command(tmp_path / "run", "--dropout", "0")
    small[small.index("per_device_train_batch_size=8")] = "per_device_train_batch_size=4"
    done = subprocess.run(
        [*arguments, *small],
        env={**environment(), "ACCELERATE_USE_CPU": "true"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("saved in") == 1
    record, single = (json.loads((f / "train.json").read_text()) for f in (tmp_path / "run", trained))
    assert record["steps"] == 6
    # The model's own dropout differs between the processes, so that the two runs agree only roughly.
    assert record["validation"]["loss"] == pytest.approx(single["validation"]["loss"], abs=0.05)
    adapters = [load_file(f / "adapter_model.safetensors") for f in (tmp_path / "run", trained)]
    assert adapters[0].keys() == adapters[1].keys()

    wrong = subprocess.run(
        [*arguments, *command(tmp_path / "wrong", "--method", "nope")],
        env={**environment(), "ACCELERATE_USE_CPU": "true"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert wrong.stderr.count("error: unknown method 'nope'") == 1
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize(
    "options",
    ["--dora", "--init pissa", "--init lora_ga --rslora", "--init lora_ga --dora", "--loraplus-lr-ratio 16"],
)
def test_a_variant_of_lora_reloads_and_is_measured(tmp_path, options):
    if "lora_ga" in options and not hasattr(peft, "LoraGAConfig"):
        pytest.skip("this PEFT has no LoRA-GA")
    assert main([*command(tmp_path / "run", *options.split()), "--quiet"]) == 0
    spec = json.loads((tmp_path / "run" / "spec.json").read_text())["spec"]["lora"]
    assert spec["loraplus_lr_ratio"] == (16 if "loraplus" in options else None)
    model = load_model("minilm", "classification", 2, seed=0)
    loaded = load_trained(tmp_path / "run", model).model
    task = load_task(SMALL_TASK, load_tokenizer("minilm"))
    batch = task.collate(list(task.validation))
    with torch.no_grad():
        loss = float(loaded(**batch).loss)
    recorded = json.loads((tmp_path / "run" / "train.json").read_text())["validation"]["loss"]
    assert loss == pytest.approx(recorded, rel=1e-4)


@pytest.mark.parametrize("options", ["--init lora_ga", "--loraplus-lr-ratio 16"])
def test_a_variant_continues_after_an_interruption_bit_for_bit(tmp_path, options):
    if "lora_ga" in options and not hasattr(peft, "LoraGAConfig"):
        pytest.skip("this PEFT has no LoRA-GA")
    lora = {"init_lora_weights": "lora_ga"} if "lora_ga" in options else {"loraplus_lr_ratio": 16}
    spec = small_spec(training={"save_steps": 2}).model_copy(update={"lora": LoraSpec(r=2, **lora)})
    train_run(spec, tmp_path / "whole", progress=False)
    with pytest.raises(KeyboardInterrupt):
        train_run(spec, tmp_path / "cut", progress=False, callbacks=[InterruptAt(4)])
    train_run(spec, tmp_path / "cut", progress=False)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
