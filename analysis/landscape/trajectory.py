"""The plane that a training run moved in: principal axes of its checkpoints (Li et al. 2018, section 7.2).

    M = [w_0 − w_T; …; w_{T−1} − w_T],     M·Mᵀ = Q·diag(σ²)·Qᵀ,     u, v = Mᵀ·q_1/σ_1, Mᵀ·q_2/σ_2
    explained along u: Σ_t (x_t − mean x)²/Σ_t ‖w_t − mean w‖²

The final weights w_T are the origin and lie in the plane. M is not centred at its mean, unlike in Li et al.'s code: of
all planes through w_T, this one has the least Σ distance² to the checkpoints. The share explained is that of the
variance, as in theirs, and a little below the largest that two axes can have. Only the T×T Gram matrix M·Mᵀ is
decomposed, in float64.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from analysis.core.measure import Watch
from analysis.core.objective import Objective
from analysis.core.space import WeightSpace
from analysis.core.trained import ADAPTER_FILE, load_trained
from analysis.core.vectors import Vector
from analysis.landscape.adapter_plane import trained_space
from analysis.landscape.plane import (
    Mark,
    Plane,
    coordinates,
    cosine,
    difference,
    fitting,
    like,
    principal_axes,
    refuse_non_finite,
    weights_of,
    window_around,
)
from bilora.adapters.layers import active_adapter
from bilora.adapters.swap import swapped
from bilora.errors import UserError
from bilora.training.run import CHECKPOINTS

FEWEST = 3
"""Two points make a line."""


@dataclass(frozen=True, eq=False)
class Checkpoints:
    """The weights of a run along its training."""

    space: WeightSpace  # of the last one
    labels: tuple[str, ...]  # (T,): "step 40", …, "final"
    weights: tuple[Vector, ...]  # (T,) in the order of training; the last are the space's own


def trajectory_plane(
    space: WeightSpace,
    weights: Sequence[Vector],
    labels: Sequence[str] | None = None,
    *,
    objective: Objective | None = None,
    watch: Watch | None = None,
) -> Plane:
    """The plane through the final weights of a run in which most of its motion lies, with its path projected.

    Args:
        space: where the surface will be evaluated; its weights are bit-identical afterwards. Where they are not the
            final ones of the run, the plane's ``origin`` is the difference.
        weights: those of T checkpoints in the order of training, naming every parameter of the space. In the LoRA
            space, whose gauge drifts in training, part of the motion leaves the model alone: prefer the full space.
        labels: names of the checkpoints; by default ``checkpoint 1``, ``checkpoint 2``, …
        objective: the true loss at every checkpoint is evaluated and put into its mark. Without it that is NaN.
        watch: called with (losses evaluated, losses in all).

    Returns:
        A :class:`Plane` of kind ``trajectory``: coordinates are distances in weight space, ``explained`` the share of
        the checkpoints' variance along each axis, and ``marks`` the path, each with its distance from the plane.

    Raises:
        UserError: fewer than three checkpoints, all of them equal or on one line, weights that are not finite or do
            not fit the space.
    """
    if len(weights) < FEWEST:
        raise UserError(
            f"a trajectory plane needs {FEWEST} checkpoints or more, not {len(weights)}: "
            "train with save_total_limit null and a smaller save_steps"
        )
    names = tuple(labels) if labels is not None else tuple(f"checkpoint {i + 1}" for i in range(len(weights)))
    if len(names) != len(weights):
        raise UserError(f"{len(names)} labels do not fit {len(weights)} checkpoints: give one for each")
    points = [fitting(space, point, name) for point, name in zip(weights, names, strict=True)]
    refuse_non_finite(points, names)
    final, home = points[-1], weights_of(space)
    exact, explained = principal_axes(points, final, "checkpoints")
    u, v = like(space, exact[0]), like(space, exact[1])
    marks = []
    for i, (name, point) in enumerate(zip(names, points, strict=True)):
        loss = math.nan if objective is None else _loss_at(objective, space, point)
        marks.append(Mark(name, *coordinates(difference(point, final), (u, v)), loss))
        if watch is not None and objective is not None:
            watch(i + 1, len(points), "losses")
    at_final = all(torch.equal(final[name], tensor) for name, tensor in home.items())
    return Plane(
        kind="trajectory",
        axes=(u, v),
        origin=None if at_final else like(space, difference(final, home)),
        axis_labels=("distance, principal axis 1", "distance, principal axis 2"),
        cosine=cosine(u, v),
        window=window_around(marks),
        marks=tuple(marks),
        explained=explained,
        path=True,
    )


def load_checkpoints(
    folder: Path,
    make_base_model: Callable[[], PreTrainedModel],
    *,
    form: Callable[[nn.Module], WeightSpace] = WeightSpace.full,
    watch: Watch | None = None,
) -> Checkpoints:
    """The weights at every ``checkpoint-<step>`` of a run, by step, and at its end.

    One model is held at a time, and T copies of the space's weights. A classifier's head that was trained along is
    part of the space.

    Args:
        folder: of a run of ``bilora train`` (its ``checkpoints`` folder is entered), or any folder of checkpoints with
            a PEFT adapter each. An adapter in ``folder`` itself is the last one, ``final``, unless its weights are
            those of the last checkpoint.
        make_base_model: a fresh base model at each call, since an adapter is put onto it in place.
        form: ``WeightSpace.full`` or ``WeightSpace.lora``.
        watch: called with (checkpoints loaded, checkpoints in all).

    Raises:
        UserError: no checkpoint there, or one that is damaged, of another base model, or of a run that started by
            LoRA-GA, whose factors fit its own changed base until the end of the run.
    """
    folder = Path(folder)
    found = _checkpoint_folders(folder)
    if not found:
        raise UserError(f"{folder} holds no checkpoints: train with save_total_limit null, which keeps them")
    if (folder / ADAPTER_FILE).is_file():
        found.append(("final", folder))
    labels: list[str] = []
    weights: list[Vector] = []
    for i, (label, place) in enumerate(found):
        model = load_trained(place, make_base_model()).model
        _refuse_moved_base(model, label)
        space = trained_space(model, form)
        point = weights_of(space)
        if weights:
            _check_same_run(weights[-1], point, label)
        if label != "final" or not _equal(weights[-1], point):
            labels.append(label)
            weights.append(point)
        if watch is not None:
            watch(i + 1, len(found), "checkpoints")
    return Checkpoints(space, tuple(labels), tuple(weights))


def _checkpoint_folders(folder: Path) -> list[tuple[str, Path]]:
    """Label and folder of every checkpoint, by number and not by name: ``checkpoint-90`` comes before -100."""
    inside = folder / CHECKPOINTS if (folder / CHECKPOINTS).is_dir() else folder
    numbered = [(int(match[1]), path) for path in inside.glob("*") if (match := _NUMBERED.fullmatch(path.name))]
    return [(f"step {step}", path) for step, path in sorted(numbered)]


_NUMBERED = re.compile(r"checkpoint-(\d+)")


def _refuse_moved_base(model: PeftModel, label: str) -> None:
    """Onto the stock base such factors would be s·B0·A0 off: see :mod:`bilora.adapters.initial`."""
    if getattr(model.peft_config[active_adapter(model)], "init_lora_weights", None) == "lora_ga":
        raise UserError(f"{label} started by LoRA-GA and does not fit the stock base model: train from another start")


def _check_same_run(before: Vector, after: Vector, label: str) -> None:
    for name in sorted(before.keys() | after.keys()):
        if name not in before or name not in after or before[name].shape != after[name].shape:
            raise UserError(f"{label} differs from the checkpoint before it in {name}: give checkpoints of one run")


def _equal(one: Vector, other: Vector) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def _loss_at(objective: Objective, space: WeightSpace, point: Vector) -> float:
    with swapped({parameter: point[name] for name, parameter in space.parameters.items()}):
        return objective.loss(space)
