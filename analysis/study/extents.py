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
    subjects: Sequence[Subject], task: TaskSpec, entries: Sequence[MeasureEntry]
) -> list[MeasureEntry]:
    """``entries``, in which surfaces that choose their window by ``target_rise`` have the common one of all subjects.

    It is the largest of the subjects' own (:func:`analysis.landscape.surface.common_extent`), one for each space. The
    planes are those of the entry's own seed. Planes of eigenvectors, which differ between models, keep their own.

    Args:
        subjects: those compared.
        task: the examples.
        entries: the measures asked for.

    Raises:
        UserError: as :func:`analysis.study.single.measure_subject`, or the rise is not reached.
    """
    found: list[MeasureEntry] = []
    for entry in entries:
        settings = entry.all_settings() if entry.measure == "surface" else None
        if isinstance(settings, SurfaceSettings) and settings.target_rise is not None and settings.plane == "filter":
            found += _with_extents(subjects, task, entry, settings, settings.target_rise)
        else:
            found.append(entry)
    return found


def _with_extents(
    subjects: Sequence[Subject], task: TaskSpec, entry: MeasureEntry, settings: SurfaceSettings, target: float
) -> list[MeasureEntry]:
    """One entry a space, each with its extent."""
    extents: dict[str, float] = {}
    for subject in subjects:
        objective = objective_for(task, subject.base, entry)
        model, _ = load_subject(subject, task, task_for(task, subject.base))
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
    kept: dict[str, Any] = {key: value for key, value in entry.settings.items() if key != "target_rise"}
    return [
        entry.model_copy(update={"spaces": (name,), "settings": {**kept, "extent": extent}})
        for name, extent in extents.items()
    ]
