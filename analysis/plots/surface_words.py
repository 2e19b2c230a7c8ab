"""What must be said of drawn surfaces: reference, seeds, evaluated points and their error, off-plane marks."""

from collections.abc import Iterable, Sequence

import numpy as np

from analysis.plots.canvas import subset_sentence
from analysis.plots.surface_data import Surface, scale_for


def surface_caption(groups: Sequence[Sequence[Surface]], *, relief: bool = False, linear: bool = False) -> str:
    """The sentences below a figure of surfaces in their groups (:func:`analysis.plots.surface_data.surfaces`).

    ``relief`` is for surfaces in three dimensions, False for contours; ``linear`` for a scale that is.
    """
    every = [surface for group in groups for surface in group]
    thresholds = " and ".join(dict.fromkeys(f"{scale_for(group).threshold:g}" for group in groups))
    shown = "Height and colour" if relief else "Colour and lines"
    scale = "" if linear else f", linear up to about {thresholds} and logarithmic beyond"
    words = [
        f"{shown}: loss minus loss at the centre (+){scale}; one scale for all methods of a space and plane.",
        *_references(every),
        *_seeds(every),
        _evaluated(every),
        *_subset(every),
        *_windows(groups, "beyond the edge of" if relief else "in the blank beside"),
        *_marks(every, "at the height of" if relief else "filled with"),
        *_not_finite(every, "Gaps" if relief else "Hatched, crosses"),
    ]
    return " ".join(words)


def _references(every: Sequence[Surface]) -> Iterable[str]:
    for surface in every:
        if surface.reference:
            yield f"{surface.method}: excess over {surface.reference}."


def _seeds(every: Sequence[Surface]) -> Iterable[str]:
    seeds = sorted({surface.seed for surface in every})
    measured = _range([surface.n_seeds for surface in every], "{:g}")
    if max(surface.n_seeds for surface in every) > 1 or len(seeds) > 1:
        yield f"Training seed {', '.join(map(str, seeds))} of {measured} measured."


def _evaluated(every: Sequence[Surface]) -> str:
    points = _range([surface.loss.size for surface in every], "{:g}")
    counted = _known(every, "evaluated")
    if not any(surface.interpolated.any() for surface in every):
        words = f"All {points} points of a surface were evaluated."
    else:
        words = f"{_range(counted, '{:g}') if counted else 'Some'} of {points} points were evaluated, the others "
        words += "interpolated"
        errors = [error for error in _known(every, "interpolation_error") if error > 0]
        words += f", off by an estimated {_percent(errors)} of the range at most." if errors else "."
    halved = [error for error in _known(every, "precision_error") if error > 0]
    if halved:
        words += f" The forward passes in bfloat16 were off by an estimated {_percent(halved)} of the range at most."
    cosine = max((abs(cosine) for cosine in _known(every, "cosine")), default=0.0)
    if cosine >= 5e-4:
        words += f" The axes are not quite orthogonal: cosine up to {cosine:.2g}."
    return words


def _subset(every: Sequence[Surface]) -> Iterable[str]:
    used, available, errors = (_known(every, name) for name in ("examples", "examples_available", "subset_error"))
    sentence = subset_sentence("a corner is", used, available, errors)
    if sentence:
        yield sentence


def _windows(groups: Sequence[Sequence[Surface]], beyond: str) -> Iterable[str]:
    if any(len({(s.x[0], s.x[-1], s.y[0], s.y[-1]) for s in group}) > 1 for group in groups):
        yield f"All methods of a space share the axes; {beyond} a method's window nothing was sampled."


def _marks(every: Sequence[Surface], shown: str) -> Iterable[str]:
    marked = [surface for surface in every if len(surface.marks)]
    if not marked:
        return
    what = "the path of training" if all(s.kind == "trajectory" for s in marked) else "marked points"
    values = np.concatenate([surface.marks["value"].to_numpy(float) for surface in marked])
    words = f"Dots: {what}, {shown} the true loss there" if not np.isnan(values).all() else f"Dots: {what}"
    words += " (where it is known)" if np.isnan(values).any() and not np.isnan(values).all() else ""
    off = max((float(s.marks["off_plane"].abs().max()) for s in marked), default=0.0)
    extent = max(float(np.hypot(s.marks["x"], s.marks["y"]).max()) for s in marked)
    if off > 1e-5 * extent:
        words += f"; they are projected onto the plane from up to {off:.2g} away"
        mismatch = np.concatenate([surface.mismatch for surface in marked])
        if np.isfinite(mismatch).any():
            words += f", where the loss differs from the surface by up to {np.nanmax(np.abs(mismatch)):.2g}"
    yield words + "."


def _not_finite(every: Sequence[Surface], shown: str) -> Iterable[str]:
    lost = sum(int((~np.isfinite(surface.loss)).sum()) for surface in every)
    if lost:
        yield f"{shown}: {lost} losses are not finite."


def _known(every: Sequence[Surface], name: str) -> list[float]:
    return [surface.worth[name] for surface in every if np.isfinite(surface.worth.get(name, np.nan))]


def _range(values: Sequence[float], form: str) -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low}–{high}"


def _percent(shares: Sequence[float]) -> str:
    return f"{100 * max(shares):.2g} %"
