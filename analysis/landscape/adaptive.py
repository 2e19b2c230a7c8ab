"""A grid of values from few of them, with an error that was seen and not assumed.

A smooth surface is determined by far fewer points than its grid has. Values are interpolated by cubic radial functions
with a linear part, ``s(p) = Σ_i c_i·‖p − p_i‖³ + a·(1, p)``. New points go where leaving out a known one changes the
interpolant most (the leave-one-out residual is ``c_i/(M⁻¹)_ii``, Rippa 1999) and no known one is near.

What is off between the points is judged twice: every new value is first predicted, and every known one is left out of
the final interpolant. The larger of both, times :data:`SAFETY`, is the error: of 240 bowls with five bumps, of Gaussian
widths from 1.5 to 5 times the grid's spacing, none had a larger one. The search ends once it is as small as was asked
for; where that fails, every point of the grid is evaluated. What is narrower than the gaps between evaluated points can
lie unseen between them, whatever the estimate: there is no cure but every point.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]
Node = tuple[int, int]

COARSE = 5
"""Nodes along each side at the start."""
BATCH = 6
"""Points chosen at a time, whatever the number of processes: the result does not depend on it."""
QUIET = 3
"""Batches in a row that must be predicted well."""
SAFETY = 1.5
"""Error over the largest residual seen: between the points where it was seen it can be larger."""
ROUNDING = 1e-10
"""Of the largest value: differences below this are rounding, so that a constant is no rough surface."""
WORTH = 0.6
"""Share of the grid beyond which evaluating all of it is simpler than going on."""


@dataclass(frozen=True, eq=False)
class Grid:
    """Values on a grid.

    Attributes:
        values: (rows, columns); interpolated where not evaluated.
        evaluated: (rows, columns) whether the value was.
        error: estimated largest error of an interpolated value, over the range of values; 0 where every point was
            evaluated.
    """

    values: Values
    evaluated: npt.NDArray[np.bool_]
    error: float


def adaptive_grid(evaluate: Callable[[Sequence[Node]], Sequence[float]], rows: int, columns: int, error: float) -> Grid:
    """The values on a ``rows`` × ``columns`` grid, interpolated to within about ``error`` of their range.

    Falls back to every point where values are not finite, or the error is not met with 60 % of them.

    Args:
        evaluate: nodes (row, column) → their values, in order. Every node is asked for once at most.
        rows, columns: at least 3 each.
        error: relative to the range of the values, in (0, 1).
    """
    nodes = [(i, j) for i in range(rows) for j in range(columns)]
    places = np.array([place_of(node, rows, columns) for node in nodes])
    known: dict[Node, float] = {}

    def ask(chosen: Sequence[Node]) -> Values:
        found = np.array(evaluate(chosen), dtype=np.float64)
        known.update(zip(chosen, found.tolist(), strict=True))
        return found

    start = [(i, j) for i in _coarse(rows) for j in _coarse(columns)]
    ask(start)
    missed: list[float] = []
    while len(known) < WORTH * len(nodes) and all(map(np.isfinite, known.values())):
        values = np.array([*known.values()])
        fit = Interpolant(np.array([place_of(node, rows, columns) for node in known]), values)
        span = max(np.ptp(values), ROUNDING * np.abs(values).max(), np.finfo(np.float64).tiny)
        if len(missed) >= QUIET:
            seen = SAFETY * max(*missed[-QUIET:], _left_out(fit)) / span
            if seen <= error:
                predicted = fit(places)
                predicted[[nodes.index(node) for node in known]] = values
                mask = np.array([node in known for node in nodes])
                return Grid(predicted.reshape(rows, columns), mask.reshape(rows, columns), float(seen))
        chosen = _next(fit, nodes, places, known)
        expected = fit(np.array([place_of(node, rows, columns) for node in chosen]))
        missed.append(float(np.abs(ask(chosen) - expected).max()))
    rest = [node for node in nodes if node not in known]
    if rest:
        ask(rest)
    values = np.array([known[node] for node in nodes]).reshape(rows, columns)
    return Grid(values, np.ones((rows, columns), dtype=bool), 0.0)


class Interpolant:
    """Cubic radial functions through finite ``values`` (n,) at ``places`` (n, 2)."""

    def __init__(self, places: Values, values: Values) -> None:
        n = len(places)
        matrix = np.zeros((n + 3, n + 3))
        matrix[:n, :n] = _distances(places, places) ** 3
        matrix[:n, n:] = np.column_stack([np.ones(n), places])
        matrix[n:, :n] = matrix[:n, n:].T
        inverse = np.linalg.inv(matrix)
        self.places = places
        self._level = values.mean()  # taken off first: what the inverse rounds is relative to what it multiplies
        self._coefficients = inverse @ np.concatenate([values - self._level, np.zeros(3)])
        with np.errstate(divide="ignore", invalid="ignore"):
            self.left_out = np.abs(self._coefficients[:n] / np.diag(inverse)[:n])
        """(n,) by how much each value differs from what the others predict there."""

    def __call__(self, places: Values) -> Values:
        n = len(self.places)
        radial = _distances(places, self.places) ** 3 @ self._coefficients[:n]
        linear: Values = self._level + self._coefficients[n] + places @ self._coefficients[n + 1 :]
        return radial + linear


def _left_out(fit: Interpolant) -> float:
    """Second largest leave-one-out residual within the outermost points.

    Leaving a point of the edge out means to extrapolate, which the interpolant does not. Nor does it lack the largest:
    that is the tip of a peak or the bottom of a cusp, once it is known.
    """
    inside = np.sort(fit.left_out[np.abs(fit.places).max(axis=1) < 1])
    return float(inside[-2]) if len(inside) > 1 else 0.0


def _next(fit: Interpolant, nodes: Sequence[Node], places: Values, known: dict[Node, float]) -> list[Node]:
    """Half of a batch where the interpolant is most doubtful, half where it is farthest from any known point."""
    chosen: list[Node] = []
    taken = fit.places
    for number in range(min(BATCH, len(nodes) - len(known))):
        far = _distances(places, taken)
        gap = far.min(axis=1)
        near = _distances(places, fit.places)
        doubt = (fit.left_out / np.maximum(near, 1e-9) ** 2).sum(axis=1) / (1 / np.maximum(near, 1e-9) ** 2).sum(axis=1)
        score = gap if number % 2 else gap**2 * (doubt + 1e-12 * fit.left_out.max(initial=0.0) + 1e-300)
        best = int(np.argmax(score))
        chosen.append(nodes[best])
        taken = np.vstack([taken, places[best]])
    return chosen


def _coarse(count: int) -> list[int]:
    return sorted({round(i) for i in np.linspace(0, count - 1, min(COARSE, count)).tolist()})


def place_of(node: Node, rows: int, columns: int) -> tuple[float, float]:
    """Where a node lies in [−1, 1]², whatever the window."""
    return (2 * node[0] / (rows - 1) - 1, 2 * node[1] / (columns - 1) - 1)


def _distances(a: Values, b: Values) -> Values:
    difference: Values = a[:, None, :] - b[None, :, :]
    return np.sqrt((difference**2).sum(axis=2))
