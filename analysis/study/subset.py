"""How many of the examples a measurement used, and the error of a landscape that used some of them.

    SE² = (1 − n/N)·se²

se is the standard error over examples of a loss rise (:mod:`analysis.core.example_losses`), n of N examples were drawn
without replacement: SE is the error of the rise beside its value on all N (Cochran 1977, section 2.5). Examples drawn
in classes of fixed sizes, as those of a task are, have an error no larger, to first order.
"""

import math
from collections.abc import Iterator
from typing import Any

from analysis.core import Objective, WeightSpace
from analysis.core.directions import filter_normalized, gaussian
from analysis.core.example_losses import ExampleLosses, ratio_error, rise_error
from analysis.core.result import Result, row
from analysis.core.vectors import Vector
from analysis.landscape.connect import Connectivity
from analysis.landscape.lines import LossLines
from analysis.landscape.plane import difference, weights_of
from analysis.landscape.surface import InPlane, LossSurface
from analysis.sharpness.random import RandomSharpness


def subset_rows(
    rows: list[dict[str, Any]],
    used: int,
    available: int,
    objective: Objective,
    space: WeightSpace,
    result: Result,
    settings: Any,
) -> list[dict[str, Any]]:
    """What to add to the ``rows`` of a measurement on ``used`` of ``available`` examples; nothing if on all.

    ``examples`` and ``examples_available``; of lines and surfaces also ``subset_error`` where they are farthest from
    their centre: the standard error of the loss rise there beside that on all examples, at the price of a loss. Of
    random perturbations it is that of the mean over directions at each radius. NaN where losses of single examples are
    not known.

    Args:
        rows: of the measurement; none where it does not apply.
        used, available: numbers of examples.
        objective, space, result, settings: of the measurement.
    """
    if used >= available or not rows:
        return []
    kinds = {found["kind"] for found in rows}
    where = {**{name: rows[0][name] for name in ("space", "split")}, "kind": kinds.pop() if len(kinds) == 1 else ""}
    measure = rows[0]["measure"]
    added = subset_counts(measure, used, available, **where)
    if isinstance(result, RandomSharpness):
        for radius, error in zip(result.radii, result.example_errors, strict=True):
            error *= _unseen(used, available)
            added.append(row(measure, "subset_error", error, radius=radius, **where))
    places = list(_farthest(result, space, settings))
    if places:
        centre = _losses_at(objective, space, _centre(result), 1.0)
        for at, direction, scale in places:
            error = rise_error(centre, _losses_at(objective, space, direction, scale))
            added.append(row(measure, "subset_error", _unseen(used, available) * error, **at, **where))
    return added


def subset_counts(measure: str, used: int, available: int, **where: Any) -> list[dict[str, Any]]:
    """``examples`` and ``examples_available`` of a measurement at ``where``, unless on all examples."""
    if used >= available:
        return []
    return [row(measure, "examples", used, **where), row(measure, "examples_available", available, **where)]


def barrier_error(
    objective: Objective, start: WeightSpace, end: WeightSpace, line: Connectivity, used: int, available: int
) -> dict[str, Any]:
    """The row ``subset_error`` of a barrier that was measured on ``used`` of the ``available`` examples.

    The standard error of the excess over the chord at the t where it is largest: the choice of t is not in it.
    """
    t = line.barrier_at
    error = math.nan
    if math.isfinite(t):
        step = difference(weights_of(end), weights_of(start))
        first, last = (_losses_at(objective, space, {}, 1.0) for space in (start, end))
        between = _losses_at(objective, start, step, t)
        if first.known and last.known and between.known:
            excess = between.sums - (1 - t) * first.sums - t * last.sums
            error = _unseen(used, available) * ratio_error(excess, first.terms)
    where = {"space": line.space, "split": line.split, "label": line.pair}
    return row("connectivity", "subset_error", error, radius=t, **where)


def _unseen(used: int, available: int) -> float:
    return math.sqrt(1 - used / available)


def _losses_at(objective: Objective, space: WeightSpace, direction: Vector, scale: float) -> ExampleLosses:
    examples = ExampleLosses()
    with space.perturbed(direction, scale):
        objective.evaluate(space, examples)
    return examples


def _centre(result: Result) -> Vector:
    return result.plane.at(0.0, 0.0) if isinstance(result, LossSurface) and result.plane.origin is not None else {}


def _farthest(result: Result, space: WeightSpace, settings: Any) -> Iterator[tuple[dict[str, Any], Vector, float]]:
    """Coordinates, direction and scale of both ends of every line, or of the corners of a surface."""
    if isinstance(result, LossLines):
        for i in range(len(result.losses)):
            direction = filter_normalized(space, gaussian(space, settings.seed, i))
            for t in (float(result.coordinates[0]), float(result.coordinates[-1])):
                yield {"radius": t, "index": i}, direction, t
    elif isinstance(result, LossSurface):
        for x in (float(result.x[0]), float(result.x[-1])):
            for y in (float(result.y[0]), float(result.y[-1])):
                place = InPlane(result.plane)(space, (x, y))
                assert place is not None  # a corner is not the centre
                yield {"radius": x, "y": y}, *place
