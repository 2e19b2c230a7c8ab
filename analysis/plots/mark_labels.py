"""Labels in a panel, put where they cover neither each other nor marks; the figure must be laid out.

Of the places around a mark the first free one is taken, mark by mark; a label without a free place is left out and
counted, so that the caption can say so.
"""

import math
from collections.abc import Sequence

import matplotlib.patheffects as effects
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.contour import ContourSet
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

PLACED = "mark label"
"""``get_gid()`` of a label that was placed."""

_NEAR, _FAR = 6.0, 12.0  # points from the mark to its label
_MARK = 4.0  # points that a mark reaches to each side
_TRIES = 60  # places along a contour line
_PLACES = [
    (distance * math.cos(math.radians(angle)), distance * math.sin(math.radians(angle)))
    for distance in (_NEAR, _FAR)
    for angle in (0, 90, 180, 270, 45, 135, 225, 315)
]


def place_labels(axes: Axes, points: Sequence[tuple[float, float]], labels: Sequence[str]) -> int:
    """Write ``labels`` beside ``points`` (data coordinates), the most important first; empty ones are skipped.

    Returns:
        How many labels found no place.
    """
    renderer = _renderer(axes)
    panel, taken = axes.get_window_extent(renderer), _marks(axes, points)
    lost = 0
    for point, label in zip(points, labels, strict=True):
        if not label:
            continue
        text = axes.annotate(label, point, (0, 0), textcoords="offset points", fontsize=7, color="black", zorder=7)
        text.set_path_effects([effects.withStroke(linewidth=2, foreground="white")])
        text.set(gid=PLACED, in_layout=False, parse_math=False)
        box = _first_free(text, panel, taken, renderer)
        if box is None:
            text.remove()
            lost += 1
        else:
            taken.append(box)
    return lost


def settle_numbers(axes: Axes, lines: ContourSet, names: Sequence[str], points: Sequence[tuple[float, float]]) -> None:
    """Move the numbers on contour ``lines`` along them to where they cover nothing; those without such a place go.

    ``names`` are the numbers of the levels of ``lines``, each different.
    What they keep off: one another, ``points`` (data coordinates), their labels, and the edge of the panel.
    """
    renderer = _renderer(axes)
    panel, taken = axes.get_window_extent(renderer), _marks(axes, points)
    taken += [text.get_window_extent(renderer) for text in axes.texts if text.get_gid() == PLACED]
    paths = dict(zip(names, lines.get_paths(), strict=True))
    for text in reversed(lines.labelTexts):
        along = np.asarray(paths[text.get_text()].vertices)
        step = -(-len(along) // _TRIES)
        for x, y in [text.get_position(), *along[::step]]:
            if text.get_position() != (x, y):
                text.set(position=(x, y), rotation=0)
            box = text.get_window_extent(renderer).padded(0.5)
            if _inside(box, panel) and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
        else:
            text.remove()


def _renderer(axes: Axes) -> RendererAgg:
    figure = axes.get_figure(root=True)
    assert figure is not None
    return FigureCanvasAgg(figure).get_renderer()


def _marks(axes: Axes, points: Sequence[tuple[float, float]]) -> list[Bbox]:
    figure = axes.get_figure(root=True)
    assert figure is not None
    reach = _MARK * figure.dpi / 72
    at = [axes.transData.transform(point) for point in points]
    return [Bbox.from_extents(x - reach, y - reach, x + reach, y + reach) for x, y in at]


def _inside(box: Bbox, panel: Bbox) -> bool:
    return bool(panel.x0 <= box.x0 and box.x1 <= panel.x1 and panel.y0 <= box.y0 and box.y1 <= panel.y1)


def _first_free(text: Annotation, panel: Bbox, taken: Sequence[Bbox], renderer: RendererAgg) -> Bbox | None:
    for right, up in _PLACES:
        text.set_position((right, up))
        text.set(ha="center" if abs(right) < 1 else "left" if right > 0 else "right")
        text.set(va="center" if abs(up) < 1 else "bottom" if up > 0 else "top")
        box = text.get_window_extent(renderer)
        if _inside(box, panel) and not any(box.overlaps(other) for other in taken):
            return box
    return None
