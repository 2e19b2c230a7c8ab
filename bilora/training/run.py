"""From a spec to a trained adapter in a folder; killed at any moment, it continues where it was."""

import json
import math
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments

from bilora.adapters.initial import initial_factors, subtract_initial
from bilora.errors import UserError
from bilora.methods import Method, build_method
from bilora.methods.custom import file_digest, is_custom
from bilora.tasks import Task, add_lora, base_fingerprint, load_model, load_task, load_tokenizer
from bilora.training.record import SPEC_FILE, TrainRecord, as_json, read_record, write_json, write_record
from bilora.training.recorder import Recorder
from bilora.training.recording import is_recorded, read_recording, reopen
from bilora.training.spec import TrainSpec
from bilora.training.trainer import BiLoraTrainer

DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "num_train_epochs": 3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,  # below 1: a share of all steps
    "logging_steps": 10,
    "save_strategy": "steps",
    "save_steps": 0.1,  # below 1: a share of all steps
    "save_total_limit": 1,
    "report_to": "none",
    "remove_unused_columns": False,
    "label_names": ["labels"],
}
"""``TrainingArguments`` of a run that does not set them (batch size, schedule, warm-up: the Bi-LoRA paper's)."""

LORA_LEARNING_RATE = 5e-4
"""The Bi-LoRA paper's; methods that train every weight keep the Trainer's own 5e-5."""

LORA_GA_EXAMPLES, LORA_GA_BATCH = 64, 8
"""Training examples that the gradient of a LoRA-GA start is taken over, and how many at a time."""

CHECKPOINTS = "checkpoints"
_PICKLED = "training_args.bin"


def train_run(
    spec: TrainSpec,
    output_dir: str | Path,
    *,
    progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
    record_every: int | None = None,
) -> TrainRecord:
    """Train as ``spec`` says and leave the adapter (or, for ``full``, the model) and ``train.json`` in a folder.

    A finished run of the same spec is returned as it is. An interrupted one continues from its last complete
    checkpoint. The same spec gives the same result on the same machine, interrupted or not.

    Args:
        spec: the run.
        output_dir: its folder; made only once every input has been checked.
        progress: show the Trainer's progress bar.
        callbacks: further ``transformers.TrainerCallback``.
        record_every: record factors and perturbations every so many steps (:class:`bilora.training.Recorder`). A run
            that was interrupted goes on as it began.

    Raises:
        UserError: bad input; the folder holds another run; the loss stopped being a number.
    """
    folder = Path(output_dir)
    finished = _finished(folder, spec)
    if finished is not None:
        if record_every is not None and not is_recorded(folder):
            raise UserError(f"the run in {folder} is finished and was not recorded: name another output folder")
        return finished
    if record_every is None and is_recorded(folder):
        record_every = read_recording(folder).about.every
    recorders = () if record_every is None else (Recorder(folder, every=record_every),)
    method = build_method(spec.method, spec.settings)
    arguments = _training_arguments(spec, method, folder, progress)
    tokenizer = load_tokenizer(spec.model)
    task = load_task(spec.task, tokenizer)
    model = load_model(spec.model, task.kind, task.num_labels, spec.seed, tokenizer=tokenizer)
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and spec.task.max_length > longest:
        raise UserError(f"max_length {spec.task.max_length} is more than {spec.model} takes: choose at most {longest}")
    fingerprints = {"base": base_fingerprint(model), "data": task.fingerprint}
    if is_custom(spec.method):
        fingerprints["method"] = file_digest(spec.method)
    if method.needs_lora:
        batches = _first_batches(task) if spec.lora.init_lora_weights == "lora_ga" else ()
        model = add_lora(model, spec.lora, task.kind, spec.seed, batches=batches)
    # Only the factors of a LoRA-GA start are needed at the end: PEFT finds those of the others again.
    initial = initial_factors(model) if method.needs_lora and spec.lora.init_lora_weights == "lora_ga" else None
    for recorder in recorders:
        recorder.check(model)  # the Trainer would, but it makes its folder first
    trainer = BiLoraTrainer(
        model=model,
        method=method,
        max_skipped_steps=spec.max_skipped_steps,
        loraplus_lr_ratio=spec.lora.loraplus_lr_ratio if method.needs_lora else None,
        args=arguments,
        callbacks=[*callbacks, *recorders],
        **task.trainer_arguments(),
    )
    trainer.remove_callback(PrinterCallback)
    if not progress:
        trainer.remove_callback(ProgressCallback)

    writes = trainer.is_world_process_zero()
    checkpoint = _last_checkpoint(folder)
    _refuse_changed_inputs(folder, fingerprints)
    if writes:
        _begin(folder, spec, fingerprints)
    outcome = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    validation = _without_prefix(trainer.evaluate(), "eval_")
    # Stratified, as every prefix of the training examples is. The Trainer's own mean loss would miss what came
    # before a resume.
    sample = task.train.select(range(min(len(task.train), len(task.validation))))
    train = _without_prefix(trainer.evaluate(sample, metric_key_prefix="train"), "train_")
    measured = (("validation", validation), ("train", train))
    # The last steps may have ruined the weights without so many in a row that training would have stopped.
    broken = next((f"{split} loss is {m['loss']}" for split, m in measured if not math.isfinite(m["loss"])), None)
    if broken is not None:
        raise UserError(f"the trained model's {broken}: lower learning_rate or the perturbation radius")
    partial = folder / "saving"
    trainer.save_model(str(partial))
    record = TrainRecord(
        output=folder,
        steps=trainer.state.global_step,
        seconds=float(outcome.metrics.get("train_runtime", 0.0)),
        train=train,
        validation=validation,
        log_history=list(trainer.state.log_history),
        base_fingerprint=fingerprints["base"],
        data_fingerprint=fingerprints["data"],
        skipped_steps=trainer.skipped_steps,
    )
    trainer.accelerator.wait_for_everyone()
    if writes:
        if initial is not None:
            subtract_initial(partial, initial)
        _move_into_place(partial, folder)
        write_record(record, spec, _versions())
        if not any(name.startswith("save_") for name in spec.training):
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    return record


def _first_batches(task: Task) -> Iterator[dict[str, Any]]:
    """The first training examples (stratified, as every prefix is), collated."""
    rows = list(task.train.select(range(min(len(task.train), LORA_GA_EXAMPLES))))
    for begin in range(0, len(rows), LORA_GA_BATCH):
        yield task.collate(rows[begin : begin + LORA_GA_BATCH])


def _finished(folder: Path, spec: TrainSpec) -> TrainRecord | None:
    """The finished run of ``spec`` in ``folder``, if there is one.

    Raises:
        UserError: the folder belongs to something else.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: name another output folder")
    found = read_record(folder)
    if found is not None:
        record, stored = found
        difference = _difference(stored, as_json(spec))
        if difference:
            raise UserError(f"{folder} holds a finished run of another spec ({difference}): name another output folder")
        _refuse_changed_method(folder, spec)
        return record
    begun = folder / SPEC_FILE
    if begun.exists():
        try:
            stored = json.loads(begun.read_text(encoding="utf-8"))["spec"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{begun} is damaged: delete the folder or name another") from error
        difference = _difference(stored, as_json(spec))
        if difference:
            raise UserError(
                f"{folder} holds an interrupted run of another spec ({difference}): delete it or name another folder"
            )
    elif any((folder / name).exists() for name in ("adapter_config.json", "config.json")):
        raise UserError(f"{folder} holds a model of another origin: name another output folder")
    return None


def _difference(stored: dict[str, Any], wanted: dict[str, Any], path: str = "") -> str:
    """The first value in which two specs differ, in words; empty if they are equal."""
    for key in sorted({*stored, *wanted}):
        old, new = stored.get(key), wanted.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            inner = _difference(old, new, f"{path}{key}.")
            if inner:
                return inner
        elif old != new:
            return f"{path}{key} is {old!r} there, {new!r} here"
    return ""


def _training_arguments(spec: TrainSpec, method: Method, folder: Path, progress: bool) -> TrainingArguments:
    values = DEFAULTS | ({"learning_rate": LORA_LEARNING_RATE} if method.needs_lora else {}) | spec.training
    values.setdefault("use_cpu", not torch.accelerator.is_available())
    values.setdefault("dataloader_pin_memory", torch.accelerator.is_available())
    try:
        return TrainingArguments(
            output_dir=str(folder / CHECKPOINTS), seed=spec.seed, disable_tqdm=not progress, **values
        )
    except (ValueError, TypeError, ImportError) as error:
        detail = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"the training arguments do not fit together: {detail}") from error


def _refuse_changed_inputs(folder: Path, fingerprints: dict[str, str]) -> None:
    begun = folder / SPEC_FILE
    if begun.exists() and json.loads(begun.read_text(encoding="utf-8")).get("fingerprints") != fingerprints:
        raise UserError(
            f"the model, the method or the data of the interrupted run in {folder} has changed since: delete the folder"
        )


def _refuse_changed_method(folder: Path, spec: TrainSpec) -> None:
    if not is_custom(spec.method):
        return
    begun = folder / SPEC_FILE
    stored = json.loads(begun.read_text(encoding="utf-8")) if begun.exists() else {}
    if stored.get("fingerprints", {}).get("method") != file_digest(spec.method):
        raise UserError(f"{spec.method} has changed since the run in {folder}: name another output folder")


def _begin(folder: Path, spec: TrainSpec, fingerprints: dict[str, str]) -> None:
    """Mark the folder as this run's, and clear what a killed run left half written."""
    if not (folder / SPEC_FILE).exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / SPEC_FILE, {"spec": as_json(spec), "fingerprints": fingerprints})
    for path in (folder / CHECKPOINTS).glob("checkpoint-*"):
        if not _complete(path):
            shutil.rmtree(path)
    reopen(folder)  # killed between the last step and the record


def _last_checkpoint(folder: Path) -> Path | None:
    complete = [p for p in (folder / CHECKPOINTS).glob("checkpoint-*") if _complete(p)]
    return max(complete, key=lambda p: int(p.name.rpartition("-")[2]), default=None)


def _complete(checkpoint: Path) -> bool:
    """Whether the Trainer finished writing a checkpoint: its state file comes last, and must be whole."""
    try:
        return "global_step" in json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def _move_into_place(partial: Path, folder: Path) -> None:
    (partial / _PICKLED).unlink(missing_ok=True)
    for path in sorted(partial.iterdir()):
        os.replace(path, folder / path.name)
    partial.rmdir()


def _without_prefix(metrics: dict[str, Any], prefix: str) -> dict[str, float]:
    """Metrics by their plain names, without speed and operation counts, which ``seconds`` and ``steps`` cover."""
    kept = {name.removeprefix(prefix): float(value) for name, value in metrics.items() if name != "epoch"}
    return {
        name: value
        for name, value in kept.items()
        if not name.endswith(("runtime", "per_second")) and name not in ("total_flos", "model_preparation_time")
    }


def _versions() -> dict[str, str]:
    names = ("bilora", "torch", "transformers", "peft", "accelerate", "datasets")
    return {"python": platform.python_version()} | {name: version(name) for name in names}
