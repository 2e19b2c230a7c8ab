"""The plane through several adapters of one base model (Garipov et al. 2018, arXiv 1802.10026).

    u = (w_2 − w_1)/‖w_2 − w_1‖,     v = part of w_3 − w_1 orthogonal to u, of norm 1
    w(x, y) = w_1 + x·u + y·v

More than three points lie in no plane: theirs passes through their mean along the two principal axes, so that
Σ distance² is least, and each point says how far off it lies.

In the full space w are merged weights, and the plane is the same in whatever gauge the adapters are. In the LoRA space
w are the factors as trained: the plane depends on the gauge, and two adapters of equal function may lie far apart.
"""

from collections.abc import Callable, Sequence
from itertools import chain

import torch
from peft import PeftModel
from torch import Tensor, nn

from analysis.core.objective import Objective
from analysis.core.space import WeightSpace
from analysis.core.vectors import Vector, norm, scaled
from analysis.landscape.plane import (
    Mark,
    Plane,
    coordinates,
    cosine,
    difference,
    like,
    orthogonal_part,
    principal_axes,
    refuse_non_finite,
    rounding_length,
    weights_of,
    window_around,
)
from bilora.adapters.layers import active_adapter
from bilora.errors import UserError

PREFIX = "base_model.model."


def trained_space(model: PeftModel, form: Callable[[nn.Module], WeightSpace] = WeightSpace.full) -> WeightSpace:
    """All that the training of an adapter changed: the weights of ``form``, and modules that PEFT saved along.

    A classifier's head is trained along with its adapter. Where points of one surface come from several trainings, it
    must move with them, or the surface at a point is not the loss of the model that was trained.

    Args:
        model: an adapted model; unchanged.
        form: ``WeightSpace.full`` or ``WeightSpace.lora``.

    Returns:
        The space of ``form``, of the same name, with the parameters of those modules under their names in the base
        model. Without such modules it is ``form(model)``.

    Raises:
        UserError: as ``form``.
    """
    space = form(model)
    wrapped = f".modules_to_save.{active_adapter(model)}."
    own, found = set(space.parameters.values()), dict(space.model.named_parameters())
    along: dict[str, nn.Parameter] = {}
    for path, _ in model.named_parameters():
        if wrapped not in path:
            continue
        name = path.removeprefix(PREFIX).replace(wrapped, ".")
        parameter = found[path if path in found else name]
        if parameter not in own:
            along[name] = parameter
    return WeightSpace(space.name, space.model, {**space.parameters, **along}, space.factors) if along else space


def adapter_plane(
    spaces: Sequence[WeightSpace], labels: Sequence[str] | None = None, *, objective: Objective | None = None
) -> Plane:
    """The plane through three adapters, or the nearest one to more than three.

    Evaluate it in ``spaces[0]``. Three adapters: it is the origin, and the marks lie in the plane to rounding. More:
    the origin is the mean of all.

    Args:
        spaces: one for each adapter, of the same names, equal in all other weights: :func:`trained_space` of each.
            Their weights are bit-identical afterwards.
        labels: names of the adapters; by default ``adapter 1``, ``adapter 2``, …
        objective: the loss of each adapter is evaluated and put into its mark. Without it that is NaN.

    Returns:
        A :class:`Plane` of kind ``adapters``; coordinates are distances in weight space.

    Raises:
        UserError: fewer than three adapters; they differ in layers, shapes, dtype or weights outside the space; two are
            equal or all lie on one line; weights are not finite.
    """
    if len(spaces) < 3:
        raise UserError(f"a plane needs three adapters, not {len(spaces)}: for two, measure their connectivity")
    names = tuple(labels) if labels is not None else tuple(f"adapter {i + 1}" for i in range(len(spaces)))
    if len(names) != len(spaces):
        raise UserError(f"{len(names)} labels do not fit {len(spaces)} adapters: give one for each")
    check_comparable(spaces, names)
    home = spaces[0]
    points = [{n: t.to(home.parameters[n].device) for n, t in weights_of(space).items()} for space in spaces]
    refuse_non_finite(points, names)
    if len(spaces) == 3:
        exact, centre, origin = _through_three(points, names), points[0], None
        axis_labels = f"distance towards {names[1]}", f"orthogonal distance towards {names[2]}"
    else:
        centre = _mean(points)
        exact, _ = principal_axes(points, centre, "adapters")
        origin = like(home, difference(centre, points[0]))
        axis_labels = "distance, principal axis 1", "distance, principal axis 2"
    u, v = like(home, exact[0]), like(home, exact[1])
    marks = tuple(
        Mark(name, *coordinates(difference(point, centre), (u, v)), _loss(objective, space))
        for name, point, space in zip(names, points, spaces, strict=True)
    )
    return Plane("adapters", (u, v), origin, axis_labels, cosine(u, v), window_around(marks), marks)


def check_comparable(spaces: Sequence[WeightSpace], labels: Sequence[str]) -> None:
    """Whether weights between those of the spaces are models of the same kind.

    Raises:
        UserError: names, shapes, dtypes, or weights outside the spaces differ; the line names the first that does.
    """
    first = spaces[0]
    for space, label in zip(spaces[1:], labels[1:], strict=True):
        both = f"{labels[0]} and {label}"
        different = first.parameters.keys() ^ space.parameters.keys()
        if different:
            raise UserError(
                f"{both} adapt different layers, such as {min(different)}: compare adapters of equal layers"
            )
        for name, parameter in first.parameters.items():
            there = space.parameters[name]
            if (parameter.shape, parameter.dtype) != (there.shape, there.dtype):
                raise UserError(
                    f"{both} differ in {name}: {tuple(parameter.shape)} {parameter.dtype} and "
                    f"{tuple(there.shape)} {there.dtype}; compare adapters of one base model and one rank in one dtype"
                )
        here, other = _rest(first), _rest(space)
        for name in sorted(here.keys() | other.keys()):
            if name not in here or name not in other or not _equal(here[name], other[name]):
                raise UserError(
                    f"{both} differ in {name}, outside the {first.name} space: they have different base models, or it "
                    "was trained along (then use trained_space, or WeightSpace.all)"
                )


def _rest(space: WeightSpace) -> dict[str, Tensor]:
    """What of the model takes part in its function but not in the space."""
    own = set(space.parameters.values())
    return {
        name: tensor
        for name, tensor in chain(space.model.named_parameters(), space.model.named_buffers())
        if tensor not in own and ".original_module." not in name
    }


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.detach(), other.detach().to(one.device))


def _through_three(points: Sequence[Vector], names: Sequence[str]) -> tuple[Vector, Vector]:
    """Orthonormal axes in float64, from the first point."""
    second, third = difference(points[1], points[0]), difference(points[2], points[0])
    noise = rounding_length(points)
    for step, name in ((second, names[1]), (third, names[2])):
        if norm(step) <= noise:
            raise UserError(f"{names[0]} and {name} have equal weights (parallel axes): take different adapters")
    u = scaled(second, 1 / norm(second))
    v = orthogonal_part(third, u)
    if norm(v) <= noise:
        raise UserError(
            f"{names[0]}, {names[1]} and {names[2]} lie on one line (parallel axes): measure connectivity instead"
        )
    return u, scaled(v, 1 / norm(v))


def _mean(points: Sequence[Vector]) -> Vector:
    total = {name: tensor.double() for name, tensor in points[0].items()}
    for point in points[1:]:
        total = {name: tensor + point[name].double() for name, tensor in total.items()}
    return scaled(total, 1 / len(points))


def _loss(objective: Objective | None, space: WeightSpace) -> float:
    return float("nan") if objective is None else objective.loss(space)
