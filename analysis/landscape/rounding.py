"""How far losses in bfloat16 are off, from a few of them evaluated in full precision as well.

Half of the points checked are those whose loss fits the others least, left out of their interpolant: rounding shows as
roughness. The other half lies as far from these and from each other as can be, for errors that are smooth.

The largest difference seen at n of N points is below the largest there is. Of differences with exponential tails, as
those of bfloat16 have (Gaussian ones are lighter), the largest of the other N − n is at most c times it with
probability

    P(c) = ∫₀¹ [1 − (1 − u^{1/n})^c]^{N−n} du,      u = (1 − e^{−m})^n the distribution function of the largest seen

whatever their scale. The surface is said to be off by c times the largest difference seen, where P(c) = 95 %.
"""

from collections.abc import Sequence

import numpy as np

from analysis.landscape.adaptive import Interpolant, Node, Values, place_of

FEWEST = 8
"""Points checked at least."""
SHARE = 0.05
"""Of the points, checked where these are more."""
CONFIDENCE = 0.95


def nodes_to_check(nodes: Sequence[Node], values: Sequence[float], rows: int, columns: int) -> list[Node]:
    """Which of the ``nodes`` of a grid of ``rows`` × ``columns`` to evaluate in full precision too.

    Args:
        nodes: those evaluated.
        values: their losses in bfloat16.
        rows, columns: of the grid.
    """
    count = min(len(nodes), max(FEWEST, round(SHARE * len(nodes))))
    places = np.array([place_of(node, rows, columns) for node in nodes])
    chosen: list[int] = []
    if np.isfinite(values).all():
        rough = Interpolant(places, np.array(values)).left_out
        chosen = [int(i) for i in np.argsort(-rough, kind="stable")[: count // 2]]
    while len(chosen) < count:
        distances = np.linalg.norm(places[:, None] - places[None, chosen or [0]], axis=2)
        distances[chosen] = -1
        chosen.append(int(np.argmax(distances.min(axis=1))))
    return [nodes[i] for i in chosen]


def factor(checked: int, points: int, confidence: float = CONFIDENCE) -> float:
    """The c of P(c) = ``confidence``: what the largest of ``points`` differences is over the largest of ``checked``.

    At least 1, which it is where all are checked.
    """
    u = (np.arange(20000) + 0.5) / 20000
    tails: Values = 1 - u ** (1 / checked)
    low, high = 1.0, 1e3
    for _ in range(60):
        middle = (low + high) / 2
        covered = np.mean((1 - tails**middle) ** (points - checked))
        low, high = (middle, high) if covered < confidence else (low, middle)
    return high if points > checked else 1.0
