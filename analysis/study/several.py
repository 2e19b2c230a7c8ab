"""Measuring several adapters in one go, on the same examples and along the same directions."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.core.measure import Watch
from analysis.study.extents import with_common_extents
from analysis.study.single import Subject, determinants, measure_subject
from analysis.study.spec import MeasureEntry
from analysis.study.unfinished import Unfinished
from bilora.errors import UserError
from bilora.tasks import TaskSpec
from bilora.training.record import RECORD_FILE


def named(folders: Sequence[Path]) -> list[tuple[str, int]]:
    """Method and training seed of each adapter: what its own record says, or the folder's name and 0.

    Adapters that would be called alike are called by their folders, and keep their seeds.

    Raises:
        UserError: a folder is given twice, or two folders have one name.
    """
    recorded = [_recorded(folder) for folder in folders]
    often = Counter(recorded)
    names = []
    for name, folder in zip(recorded, folders, strict=True):
        own = folder.resolve().name
        names.append((own, 0) if name is None else name if often[name] == 1 else (own, name[1]))
    (label, _), count = Counter(names).most_common(1)[0]
    if count > 1:
        raise UserError(f"two of the adapters are called {label}: give each once, or rename a folder")
    return names


def determinants_of(
    subjects: Sequence[Subject], task: TaskSpec, entries: Sequence[MeasureEntry]
) -> dict[str, Any] | list[dict[str, Any]]:
    """:func:`~analysis.study.single.determinants` of one subject, or with its name of each of several."""
    names = named([subject.folder for subject in subjects])
    if len(subjects) == 1:
        return determinants(subjects[0], task, entries, names[0][1])
    return [
        {"method": method, "seed": seed, **determinants(subject, task, entries, seed)}
        for (method, seed), subject in zip(names, subjects, strict=True)
    ]


def measure_subjects(
    subjects: Sequence[Subject],
    task: TaskSpec,
    entries: Sequence[MeasureEntry],
    unfinished: Unfinished,
    watch: Callable[[str], Watch] | None = None,
) -> pd.DataFrame:
    """The rows of one subject, or those of several with the columns ``method`` and ``seed``.

    Directions are drawn as in a study: anew for each training seed, and the same for all methods at one.

    Args, raises: as :func:`~analysis.study.single.measure_subject`.
    """
    names = named([subject.folder for subject in subjects])
    if len(subjects) == 1:
        return measure_subject(subjects[0], task, entries, unfinished, watch, seed=names[0][1])
    own = with_common_extents(subjects, [seed for _, seed in names], task, entries)
    frames = []
    for (method, seed), subject, asked in zip(names, subjects, own, strict=True):
        name = f"{method}, seed {seed}"
        seen = _under(name, watch) if watch is not None else None
        frame = measure_subject(subject, task, asked, unfinished.of(name), seen, seed=seed)
        frame.insert(0, "method", method)
        frame.insert(1, "seed", seed)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def _under(name: str, watch: Callable[[str], Watch]) -> Callable[[str], Watch]:
    return lambda measurement: watch(f"{name}: {measurement}")


def _recorded(folder: Path) -> tuple[str, int] | None:
    try:
        spec = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))["spec"]
        return str(spec["method"]), int(spec["seed"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
