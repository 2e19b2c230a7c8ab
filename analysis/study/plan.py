"""From a study to its cells: what is to be trained and measured, each addressed by everything that determines it."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from analysis.core.space import FACTORED
from analysis.registry import MEASURES
from analysis.study.inputs import data_identity, library_versions, model_identity
from analysis.study.sources import measure_code, training_code
from analysis.study.spec import VARIANTS, MeasureEntry, StudySpec
from analysis.study.work import Measuring, Training
from analysis.study.worker import Compute
from bilora.errors import UserError
from bilora.methods import METHODS, method_class
from bilora.methods.custom import file_digest, is_custom
from bilora.training.record import as_json
from bilora.training.spec import TrainSpec


def canonical(value: Any) -> str:
    """``value`` as JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


@dataclass(frozen=True, eq=False)
class Cell:
    """One training or one measurement.

    Attributes:
        kind: ``training`` or ``measure``.
        label: what the progress shows, for example ``Bi-LoRA, seed 0: spectrum full``. Not part of the address.
        title: the same for every seed of it: ``train Bi-LoRA``, or for every adapter: ``spectrum full (validation)``.
        determinants: everything the result depends on, as JSON values.
        compute: the work, picklable; see :data:`analysis.study.worker.Compute`.
        cost: estimated relative cost of a training, by which the longest is started first.
        training: the training cell a measurement belongs to; None for a training.
    """

    kind: str
    label: str
    determinants: Mapping[str, Any]
    compute: Compute
    cost: float = 0.0
    training: "Cell | None" = None
    title: str = ""

    @cached_property
    def address(self) -> str:
        """sha256 of the canonical determinants, 64 hexadecimal digits."""
        return hashlib.sha256(canonical({"kind": self.kind, **self.determinants}).encode()).hexdigest()

    @property
    def name(self) -> str:
        """Name of the cell's folder."""
        return f"{self.kind}-{self.address[:16]}"


@dataclass(frozen=True)
class Placement:
    """Where a measurement stands in the table: under which label and seed. Two labels may share a cell."""

    method: str
    seed: int
    cell: Cell


@dataclass(frozen=True)
class Plan:
    """All cells of a study, each once, and where their rows go, in table order."""

    cells: tuple[Cell, ...]
    placements: tuple[Placement, ...]


def plan_study(spec: StudySpec) -> Plan:
    """The cells of ``spec``: trainings (method × seed), then each one's measurements.

    Raises:
        UserError: a model or a data package that is not there.
    """
    with _named("model"):
        model = model_identity(spec.model)
    with _named("task"):
        task = data_identity(spec.task)
    outside = {
        "model": model,
        "task": task,
        "versions": library_versions(),
        "device": _device_kind(),
    }
    trainings: dict[str, Cell] = {}
    measurements: dict[str, Cell] = {}
    placements: list[Placement] = []
    for label in spec.methods:
        for seed in spec.seeds:
            training = _training_cell(spec, label, seed, outside)
            training = trainings.setdefault(training.name, training)
            for entry in spec.measures:
                for space in entry.all_spaces():
                    adapted = space in FACTORED or MEASURES[entry.measure].needs_adapter
                    if adapted and not method_class(spec.methods[label].method).needs_lora:
                        continue
                    cell = _measure_cell(entry, space, training, f"{label}, seed {seed}")
                    placements.append(Placement(label, seed, measurements.setdefault(cell.name, cell)))
    return Plan((*trainings.values(), *measurements.values()), tuple(placements))


def train_spec(spec: StudySpec, label: str, seed: int) -> TrainSpec:
    """How the study trains the method ``label`` with ``seed``.

    Raises:
        pydantic.ValidationError: a training argument that is not one.
    """
    method = spec.methods[label]
    return TrainSpec(
        model=spec.model,
        task=spec.task,
        lora=spec.lora,
        method=method.method,
        settings=method.settings,
        training=spec.training_of(label),
        seed=seed,
    )


def _training_cell(spec: StudySpec, label: str, seed: int, outside: Mapping[str, Any]) -> Cell:
    run = train_spec(spec, label, seed)
    method = method_class(run.method)
    determinants = {**as_json(run), **outside, "code": _training_code(run.method)}
    record = spec.record if method.needs_lora else None
    if not method.needs_lora:
        del determinants["lora"]
    if record is not None:
        determinants["record"] = record
    steps = run.training.get("max_steps") or run.training.get("num_train_epochs", 3)
    cost = method.passes * steps
    name = f"{label}, seed {seed}: training"
    return Cell("training", name, determinants, Training(run, record), cost, title=f"train {label}")


def _training_code(name: str) -> str:
    registered = [cls.__module__ for cls in METHODS.values()]
    if is_custom(name):
        return f"{training_code('bilora.methods.base', registered)}+{file_digest(name)}"
    return training_code(method_class(name).__module__, registered)


def _measure_cell(entry: MeasureEntry, space: str, training: Cell, owner: str) -> Cell:
    assert isinstance(training.compute, Training)
    determinants = {
        "training": training.address,
        "measure": entry.measure,
        "settings": entry.settings_for(training.compute.spec.seed).model_dump(mode="json"),
        "space": space,
        "split": entry.split,
        "examples": entry.examples,
        "batch_size": entry.batch_size,
        "code": measure_code(MEASURES[entry.measure].run.__module__),
    }
    defaults = MEASURES[entry.measure].settings.model_fields
    given = {name: entry.settings[name] for name in VARIANTS if name in entry.settings}
    variant = [f"{name}={value}" for name, value in given.items() if value != defaults[name].default]
    what = " ".join(part for part in (entry.measure, *variant, space, f"({entry.split})") if part)
    compute = Measuring(training.compute.spec, training.name, entry, space)
    return Cell("measure", f"{owner}: {what}", determinants, compute, training=training, title=what)


@contextmanager
def _named(key: str) -> Iterator[None]:
    """Name the ``key`` of the study file that an error is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}: {error}") from error


def _device_kind() -> str:
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator else "cpu"
