"""One window for the surfaces of several adapters, so that they can be laid side by side."""

from collections.abc import Sequence
from typing import Any

from analysis.core import WeightSpace
from analysis.landscape.random_plane import random_plane
from analysis.landscape.surface import SurfaceSettings, common_extent
from analysis.study.single import Subject, load_subject, spaces_of
from analysis.study.spec import MeasureEntry
from analysis.study.work import objective_for, task_for
from bilora.tasks import TaskSpec


def with_common_extents(
    subjects: Sequence[Subject], seeds: Sequence[int], task: TaskSpec, entries: Sequence[MeasureEntry]
) -> list[list[MeasureEntry]]:
    """``entries`` for each subject; surfaces that choose their window by ``target_rise`` have one extent for all.

    It is the largest of the subjects' own (:func:`analysis.landscape.surface.common_extent`), one for each space, on
    the planes that are measured. It depends on no earlier run, so that a resumed one finds the same. Planes of
    eigenvectors, which differ between models, keep their own.

    Args:
        subjects: those compared.
        seeds: their training seeds, by which planes are drawn (:meth:`MeasureEntry.settings_for`).
        task: the examples.
        entries: the measures asked for.

    Raises:
        UserError: as :func:`analysis.study.single.measure_subject`, or the rise is not reached.
    """
    found: list[list[MeasureEntry]] = [[] for _ in subjects]
    for entry in entries:
        settings = entry.all_settings() if entry.measure == "surface" else None
        if isinstance(settings, SurfaceSettings) and settings.target_rise is not None and settings.plane == "filter":
            extents = _extents(subjects, seeds, task, entry, settings.target_rise)
            for of_subject, subject in zip(found, subjects, strict=True):
                of_subject += [_with_extent(entry, name, extents[name]) for name in spaces_of(subject, entry)]
        else:
            for of_subject in found:
                of_subject.append(entry)
    return found


def _extents(
    subjects: Sequence[Subject], seeds: Sequence[int], task: TaskSpec, entry: MeasureEntry, target: float
) -> dict[str, float]:
    """The common extent in every space."""
    extents: dict[str, float] = {}
    for subject, seed in zip(subjects, seeds, strict=True):
        objective = objective_for(task, subject.base, entry)
        model, _ = load_subject(subject, task, task_for(task, subject.base))
        settings: Any = entry.settings_for(seed)
        for name in spaces_of(subject, entry):
            space: WeightSpace = getattr(WeightSpace, name)(model)
            own = common_extent(
                objective,
                [space],
                [random_plane(space, seed=settings.seed)],
                target,
                precision=settings.precision,
                workers=settings.workers,
            )
            extents[name] = max(own, extents.get(name, own))
    return extents


def _with_extent(entry: MeasureEntry, space: str, extent: float) -> MeasureEntry:
    kept = {key: value for key, value in entry.settings.items() if key != "target_rise"}
    return entry.model_copy(update={"spaces": (space,), "settings": {**kept, "extent": extent}})
