"""Measuring one adapter or model that lies in a folder, whoever trained it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.core import Trained, WeightSpace, load_trained
from analysis.core.measure import Watch
from analysis.core.space import FACTORED
from analysis.frame import rows_frame
from analysis.registry import MEASURES
from analysis.study.inputs import content_digest, data_identity, library_versions, model_identity
from analysis.study.sources import measure_code
from analysis.study.spec import MeasureEntry
from analysis.study.subset import subset_rows
from analysis.study.unfinished import Unfinished
from analysis.study.work import device, objective_for, task_for
from bilora.errors import UserError
from bilora.tasks import Task, TaskSpec, load_model

ADAPTER, MODEL = "adapter_config.json", "config.json"


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        folder: an adapter's folder (PEFT), or a model's.
        base: the base model; for a model's folder, where its tokenizer is taken from.
    """

    folder: Path
    base: str

    @property
    def is_adapter(self) -> bool:
        """Whether the folder holds an adapter rather than a model."""
        return (self.folder / ADAPTER).is_file()

    @property
    def has_lora_space(self) -> bool:
        """Whether its merged weights are W0 + s·B·A, by what the adapter says of itself."""
        if not self.is_adapter:
            return False
        config = _config(self.folder)
        return config.get("peft_type") == "LORA" and not config.get("use_dora")


def find_subject(folder: Path, base: str | None) -> Subject:
    """What lies in ``folder``; without ``base`` an adapter's own record of its base model is believed.

    Raises:
        UserError: neither an adapter nor a model, or no base model known.
    """
    if (folder / ADAPTER).is_file():
        return Subject(folder, base or _recorded_base(folder))
    if (folder / MODEL).is_file():
        return Subject(folder, base or str(folder))
    raise UserError(f"{folder} holds neither {ADAPTER} nor {MODEL}: give the folder of a PEFT adapter or of a model")


def determinants(subject: Subject, task: TaskSpec, entries: Sequence[MeasureEntry], seed: int = 0) -> dict[str, Any]:
    """Everything the rows of :func:`measure_subject` depend on, as JSON values.

    Raises:
        UserError: a model or data file that is not there.
    """
    files = [file for file in subject.folder.iterdir() if file.is_file() and file.suffix in (".json", ".safetensors")]
    return {
        "subject": content_digest(files),
        "base": model_identity(subject.base),
        "task": data_identity(task),
        "measures": [
            {
                "measure": entry.measure,
                "spaces": list(spaces_of(subject, entry)),
                "split": entry.split,
                "examples": entry.examples,
                "batch_size": entry.batch_size,
                "settings": entry.settings_for(seed).model_dump(mode="json"),
                "code": measure_code(MEASURES[entry.measure].run.__module__),
            }
            for entry in entries
        ],
        "versions": library_versions(),
        "device": device(),
    }


def spaces_of(subject: Subject, entry: MeasureEntry) -> tuple[str, ...]:
    """The spaces in which ``entry`` can be measured on ``subject``.

    Raises:
        UserError: only the LoRA space was asked for, or is all the measure has, and there is no adapter.
    """
    spaces = tuple(s for s in entry.all_spaces() if s not in FACTORED or subject.has_lora_space)
    if not spaces:
        raise UserError(
            f"{subject.folder} holds no plain LoRA adapter and so no LoRA space: measure {entry.measure} needs one"
        )
    return spaces


def measure_subject(
    subject: Subject,
    task: TaskSpec,
    entries: Sequence[MeasureEntry],
    unfinished: Unfinished,
    watch: Callable[[str], Watch] | None = None,
    *,
    seed: int = 0,
) -> pd.DataFrame:
    """The rows of every measure in every space asked for.

    Args:
        subject: what is measured.
        task: the examples.
        entries: the measures.
        unfinished: what an interrupted call has finished, which is not computed again; what this call finishes goes in.
        watch: name of a measurement → what is told of its progress.
        seed: training seed of the subject, by which directions are drawn (:meth:`MeasureEntry.settings_for`).

    Raises:
        UserError: bad data, an adapter of another base model, too few examples.
        Interrupted: as a measure raises it.
    """
    loaded = task_for(task, subject.base)
    for entry in entries:
        available = len(getattr(loaded, entry.split))
        if entry.examples is not None and entry.examples > available:
            raise UserError(f"{entry.examples} examples asked for, but {entry.split} has {available}: ask for fewer")
    model, trained = load_subject(subject, task, loaded)
    spaces: dict[str, WeightSpace] = {}
    rows: list[dict[str, Any]] = []
    for entry in entries:
        objective = objective_for(task, subject.base, entry)
        for name in spaces_of(subject, entry):
            kind = name or "full"
            if kind not in spaces:
                spaces[kind] = getattr(WeightSpace, kind)(model)
            found = unfinished.rows(entry.measure, name)
            if found is None:
                seen = watch(f"{entry.measure}, {name} space" if name else entry.measure) if watch else None
                measure = MEASURES[entry.measure]
                store = unfinished.points(entry.measure, name) if measure.keeps_points else None
                settings = entry.settings_for(seed)
                result = measure.result(objective, spaces[kind], settings, trained, seen, store)
                found = result.rows()
                available = len(getattr(loaded, entry.split))
                used = entry.examples or available
                found += subset_rows(found, used, available, objective, spaces[kind], result, settings)
                unfinished.add(entry.measure, name, found)
            rows += found
    return rows_frame(rows)


def load_subject(subject: Subject, task: TaskSpec, loaded: Task) -> tuple[Any, Trained | None]:
    """The model to measure, and the adapter on it if there is one.

    Raises:
        UserError: an adapter of another base model, or a damaged file.
    """
    if not subject.is_adapter:
        folder = str(subject.folder)
        return load_model(folder, task.kind, loaded.num_labels, tokenizer=loaded.tokenizer).to(device()), None
    base = load_model(subject.base, task.kind, loaded.num_labels, tokenizer=loaded.tokenizer).to(device())
    trained = load_trained(subject.folder, base)
    return trained.model, trained


def _recorded_base(folder: Path) -> str:
    name = _config(folder).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UserError(f"{folder / ADAPTER} names no base model: give it with --model")
    return name


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / ADAPTER} is damaged ({error}): save the adapter again") from error
    if not isinstance(config, dict):
        raise UserError(f"{folder / ADAPTER} is damaged: save the adapter again")
    return config
