"""The two kinds of work behind a cell: training an adapter, and measuring one."""

import copy
import shutil
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from analysis.core import Objective, Trained, WeightSpace, load_trained
from analysis.core.measure import Watch
from analysis.frame import rows_frame
from analysis.landscape.store import PointStore
from analysis.registry import MEASURES
from analysis.study.spec import MeasureEntry
from analysis.study.store import ROWS, Store
from analysis.study.subset import subset_rows
from bilora.methods import method_class
from bilora.tasks import Task, TaskKind, TaskSpec, load_model, load_task, load_tokenizer
from bilora.training.run import CHECKPOINTS, train_run
from bilora.training.spec import TrainSpec

POINTS = "points.jsonl"
"""In a cell under way: the points of a landscape by now."""


@dataclass(frozen=True)
class Training:
    """Trains one adapter into the cell's folder; continues from the last checkpoint of a killed attempt.

    Attributes:
        spec: the run.
        record_every: steps between recorded moments; None: it is not recorded.
    """

    spec: TrainSpec
    record_every: int | None = None

    def __call__(self, folder: Path, store: Store) -> dict[str, Any]:
        record = train_run(self.spec, folder, progress=False, record_every=self.record_every)
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        return {"steps": record.steps, "train": record.train, "validation": record.validation}


@dataclass(frozen=True)
class Measuring:
    """Measures the adapter of a finished training cell.

    Attributes:
        spec: how it was trained.
        trained: name of its cell.
        entry: what to measure.
        space: in which of the entry's spaces; ``""`` for a measure without one.
    """

    spec: TrainSpec
    trained: str
    entry: MeasureEntry
    space: str

    @property
    def keeps_points(self) -> bool:
        """Whether a killed attempt leaves something of use."""
        return MEASURES[self.entry.measure].keeps_points

    def __call__(self, folder: Path, store: Store) -> dict[str, Any]:
        points = PointStore(folder / POINTS) if self.keeps_points else None
        rows, digest = self.measured(store.path(self.trained), points)
        rows_frame(rows).to_parquet(folder / ROWS, index=False)
        if points is not None:
            points.remove()
        return {"examples": digest}

    def measured(
        self, source: Path, points: PointStore | None = None, watch: Watch | None = None
    ) -> tuple[list[dict[str, Any]], str]:
        """The rows of the run in ``source``, and the digest of the examples they were measured on."""
        objective = objective_for(self.spec.task, self.spec.model, self.entry)
        space, trained = _space(source, self.spec, self.space or "full")
        settings = self.entry.settings_for(self.spec.seed)
        result = MEASURES[self.entry.measure].result(objective, space, settings, trained, watch, points)
        rows = result.rows()
        available = len(getattr(task_for(self.spec.task, self.spec.model), self.entry.split))
        used = self.entry.examples or available
        rows += subset_rows(rows, used, available, objective, space, result, settings)
        return rows, objective.digest


# A worker gets many measurements of few adapters one after the other: it keeps what the next one is likely to need.
# Measures leave the weights of a space bit-identical, so that a kept space is as good as a new one.


@lru_cache(maxsize=1)
def task_for(task: TaskSpec, model: str) -> Task:
    """The task, tokenized for ``model``.

    Raises:
        UserError: as :func:`bilora.tasks.load_task`.
    """
    return load_task(task, load_tokenizer(model))


def objective_for(task: TaskSpec, model: str, entry: MeasureEntry) -> Objective:
    """The examples that ``entry`` measures on: the first ones of the task's stratified order.

    Raises:
        UserError: as :func:`bilora.tasks.load_task`.
    """
    return _objective(task, model, entry.split, entry.examples, entry.batch_size)


@lru_cache(maxsize=8)
def _objective(task: TaskSpec, model: str, split: str, examples: int | None, batch_size: int) -> Objective:
    loaded = task_for(task, model)
    chosen = getattr(loaded, split)
    if examples is not None:
        chosen = chosen.select(range(min(examples, len(chosen))))
    return Objective.from_dataset(chosen, loaded.collate, batch_size=batch_size, name=split)


@lru_cache(maxsize=1)
def _base(model: str, kind: TaskKind, num_labels: int | None) -> Any:
    return load_model(model, kind, num_labels).to(device())


def device() -> str:
    """Where measures run: a CUDA device if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


_KEPT: dict[str, Any] = {}


def _space(folder: Path, spec: TrainSpec, name: str) -> tuple[WeightSpace, Trained | None]:
    """The space ``name`` of what was trained in ``folder``, with the adapter (None for a fully trained model)."""
    if _KEPT.get("folder") != folder:
        _KEPT.clear()
        model, trained = _load(folder, spec)
        _KEPT.update(folder=folder, model=model, trained=trained)
    if name not in _KEPT:
        _KEPT[name] = getattr(WeightSpace, name)(_KEPT["model"])
    return _KEPT[name], _KEPT["trained"]


def _load(folder: Path, spec: TrainSpec) -> tuple[Any, Trained | None]:
    num_labels = task_for(spec.task, spec.model).num_labels
    if not method_class(spec.method).needs_lora:
        return load_model(str(folder), spec.task.kind, num_labels).to(device()), None
    trained = load_trained(folder, copy.deepcopy(_base(spec.model, spec.task.kind, num_labels)))
    return trained.model, trained
