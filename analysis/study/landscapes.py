"""Landscapes between several sets of weights: planes of adapters, paths of trainings, lines between adapters."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, model_validator

from analysis.core import Objective, WeightSpace, load_trained
from analysis.core.measure import Watch
from analysis.frame import rows_frame
from analysis.landscape import adapter_plane, connect, surface, trajectory
from analysis.landscape.plane import Plane
from analysis.landscape.points import Precision
from analysis.landscape.store import PointStore
from analysis.study.inputs import content_digest, data_identity, library_versions, model_identity
from analysis.study.several import named
from analysis.study.single import ADAPTER, Subject, find_subject
from analysis.study.sources import measure_code, source_digest
from analysis.study.subset import barrier_error, subset_counts, subset_rows
from analysis.study.work import device, task_for
from bilora.errors import UserError
from bilora.tasks import TaskSpec, base_fingerprint, load_model
from bilora.training.run import CHECKPOINTS

Kind = Literal["adapters", "trajectory", "connect"]
FEWEST = {"adapters": 3, "trajectory": 1, "connect": 2}
MOST = {"trajectory": 1}


class LandscapeSpec(BaseModel):
    """What is drawn, on which examples, and how exactly."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Kind
    space: Literal["full", "lora", "lora_balanced", "all"] = "full"
    split: Literal["train", "validation"] = "validation"
    examples: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=32, ge=1)
    points: int = Field(default=21, ge=5)
    error: float | None = Field(default=0.02, gt=0, lt=1)
    precision: Precision = "full"
    workers: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _middle(self) -> "LandscapeSpec":
        if self.kind != "connect" and self.points % 2 == 0:
            raise ValueError("points must be odd, so that the middle of the plane is one")
        return self

    @model_validator(mode="after")
    def _of_planes(self) -> "LandscapeSpec":
        if self.kind == "connect":
            for name, value in (("error", self.error), ("precision", self.precision)):
                if name in self.model_fields_set and value not in (None, "full"):
                    raise ValueError(f"{name} is a setting of planes: a line is evaluated at every point as it is")
        return self

    def check_count(self, count: int) -> None:
        """Whether ``count`` folders are right for the kind.

        Raises:
            UserError: too few or too many.
        """
        if count < FEWEST[self.kind]:
            cure = ": for two, take connect" if self.kind == "adapters" else ""
            raise UserError(f"{self.kind} needs {FEWEST[self.kind]} adapters or more, not {count}{cure}")
        if count > MOST.get(self.kind, count):
            raise UserError(f"{self.kind} takes one run at a time, not {count}: name the folder of one")


def find_adapters(folders: Sequence[Path], base: str | None, kind: Kind) -> list[Subject]:
    """The adapters in ``folders``; a run whose checkpoints are wanted needs none besides these.

    Raises:
        UserError: no adapter there, or no base model known.
    """
    found = []
    for folder in folders:
        inside = _checkpoints(folder) if kind == "trajectory" and not (folder / ADAPTER).is_file() else []
        subject = find_subject(inside[0] if inside else folder, base)
        if not subject.is_adapter:
            raise UserError(f"{folder} holds no adapter: name folders of PEFT adapters")
        found.append(Subject(folder, subject.base))
    return found


def landscape_determinants(subjects: Sequence[Subject], task: TaskSpec, spec: LandscapeSpec) -> dict[str, Any]:
    """Everything that the rows depend on, as JSON values.

    Raises:
        UserError: a model or data file that is not there.
    """
    return {
        "subjects": [content_digest(_files(subject.folder)) for subject in subjects],
        "names": [list(name) for name in named([subject.folder for subject in subjects])],
        "base": [model_identity(subject.base) for subject in subjects],
        "task": data_identity(task),
        "landscape": spec.model_dump(mode="json", exclude={"workers"}),
        "code": [
            *(measure_code(module.__name__) for module in (surface, adapter_plane, trajectory, connect)),
            source_digest([__name__]),
        ],
        "versions": library_versions(),
        "device": device(),
    }


def point_stores(output: Path, spec: LandscapeSpec, count: int) -> list[PointStore]:
    """Where a landscape of ``count`` subjects under way keeps its points: one store, or one for each line."""
    if spec.kind != "connect":
        return [PointStore(output.with_suffix(".points.jsonl"))]
    pairs = combinations(range(1, count + 1), 2)
    return [PointStore(output.with_suffix(f".{i}-{j}.points.jsonl")) for i, j in pairs]


def landscape_rows(
    subjects: Sequence[Subject],
    task: TaskSpec,
    spec: LandscapeSpec,
    stores: Sequence[PointStore],
    watch: Watch | None = None,
) -> pd.DataFrame:
    """The rows of one landscape.

    Args:
        subjects: adapters of one base model; of a ``trajectory`` the one run whose checkpoints are there.
        task: the examples.
        spec: what is drawn.
        stores: keep the points as they come, as by :func:`point_stores`.
        watch: told of progress.

    Raises:
        UserError: bad data, adapters that do not fit together, too few checkpoints or examples.
    """
    loaded = task_for(task, subjects[0].base)
    chosen = getattr(loaded, spec.split)
    available = len(chosen)
    if spec.examples is not None:
        if spec.examples > available:
            raise UserError(f"{spec.examples} examples asked for, but {spec.split} has {available}: ask for fewer")
        chosen = chosen.select(range(spec.examples))
    objective = Objective.from_dataset(chosen, loaded.collate, batch_size=spec.batch_size, name=spec.split)

    def fresh(base: str = subjects[0].base) -> Any:
        return load_model(base, task.kind, loaded.num_labels, tokenizer=loaded.tokenizer).to(device())

    form = getattr(WeightSpace, spec.space)
    used = len(chosen)
    labels = [f"{method}, seed {seed}" for method, seed in named([subject.folder for subject in subjects])]
    plane: Plane
    if spec.kind == "trajectory":
        found = trajectory.load_checkpoints(subjects[0].folder, fresh, form=form)
        space = found.space
        plane = trajectory.trajectory_plane(space, found.weights, found.labels, objective=objective)
    else:
        models = [load_trained(subject.folder, fresh(subject.base)).model for subject in subjects]
        _check_one_base(models, labels)
        spaces = [adapter_plane.trained_space(model, form) for model in models]
        if spec.kind == "connect":
            return rows_frame(_connections(objective, spaces, labels, spec, stores, (used, available), watch))
        space = spaces[0]
        plane = adapter_plane.adapter_plane(spaces, labels, objective=objective)
    settings = spec.model_dump(include={"points", "error", "precision", "workers"})
    result = surface.loss_surface(objective, space, plane, store=stores[0], watch=watch, **settings)
    rows = result.rows()
    return rows_frame(rows + subset_rows(rows, used, available, objective, space, result, settings))


def _check_one_base(models: Sequence[Any], labels: Sequence[str]) -> None:
    """Weights that the adapters change may be all that differs between two base models: a space would not notice."""
    first, *others = (base_fingerprint(model) for model in models)
    for label, other in zip(labels[1:], others, strict=True):
        if other != first:
            raise UserError(
                f"{labels[0]} and {label} were trained on different base models: give adapters of one, or name it "
                "with --model if they only record it differently"
            )


def _connections(
    objective: Objective,
    spaces: Sequence[WeightSpace],
    labels: Sequence[str],
    spec: LandscapeSpec,
    stores: Sequence[PointStore],
    examples: tuple[int, int],
    watch: Watch | None,
) -> list[dict[str, Any]]:
    """Every pair; ``examples`` says how many of how many the objective has."""
    used, available = examples
    rows = subset_counts("connectivity", used, available, space=spec.space, split=spec.split)
    pairs = combinations(range(len(spaces)), 2)
    settings = spec.model_dump(include={"points", "workers"})
    for (i, j), store in zip(pairs, stores, strict=True):
        ends = (labels[i], labels[j])
        line = connect.connectivity(objective, spaces[i], spaces[j], labels=ends, store=store, watch=watch, **settings)
        rows += line.rows()
        if used < available:
            rows.append(barrier_error(objective, spaces[i], spaces[j], line, used, available))
    return rows


def _checkpoints(folder: Path) -> list[Path]:
    return [*sorted(folder.glob("checkpoint-*")), *sorted((folder / CHECKPOINTS).glob("checkpoint-*"))]


def _files(folder: Path) -> list[Path]:
    """What an adapter is made of, those of its checkpoints included."""
    places = [folder, *_checkpoints(folder)]
    return [file for place in places for file in place.iterdir() if file.is_file() and file.name.startswith("adapter_")]
