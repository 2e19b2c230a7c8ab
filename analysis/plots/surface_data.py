"""Loss surfaces read from tidy rows, and the one scale on which pictures of all kinds show them.

The excess loss is ``e = L(x, y) − L(0, 0)``. It spans decades and may be negative, so that its height is

    h(e) = sign(e)·log10(1 + |e|/ε),

linear for |e| ≪ ε and logarithmic beyond; ε is a power of ten below nearly all |e| of the surfaces compared.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.interpolate import RegularGridInterpolator

from analysis.plots import canvas
from analysis.plots.eigenvalues import decade_labels, decade_ticks
from analysis.plots.style import styles_for
from analysis.space_names import in_space_order
from analysis.statistics import SUBSET
from bilora.errors import UserError

Array = NDArray[np.float64]

KINDS = {
    "filter": "random filter-normalised plane",
    "eigenvectors": "plane of two Hessian eigenvectors",
    "adapters": "plane through adapters",
    "trajectory": "plane of the training trajectory",
}
"""What a plane is, for titles, in drawing order."""

PLACE = ["kind", "split", "space"]
"""Surfaces that agree in these share one scale."""

_ROUNDING = 1e-6  # of the centre's loss: smaller differences are float32
_DEEPEST = 1e-6  # of the largest excess
_FEW = 300.0  # ranges narrower than this factor get ticks at 1, 2 and 5
_SURFACE = ["method", *PLACE]


@dataclass(frozen=True)
class Scale:
    """Heights of the surfaces of one space and kind."""

    threshold: float  # ε, a power of ten
    low: float  # smallest excess, at most 0
    high: float  # largest excess, above 0

    def height(self, excess: Array) -> Array:
        """h(e), elementwise; NaN where ``excess`` is not finite."""
        finite = np.where(np.isfinite(excess), excess, np.nan)
        return np.asarray(np.sign(finite) * np.log10(1 + np.abs(finite) / self.threshold))

    @property
    def ends(self) -> tuple[float, float]:
        """Heights of ``low`` and ``high``."""
        low, high = self.height(np.array([self.low, self.high]))
        return float(low), float(high)

    @property
    def ticks(self) -> tuple[list[float], list[str]]:
        """Excess losses to label, and their labels."""
        if max(self.high, -self.low) / self.threshold >= _FEW:
            ticks = decade_ticks(self.low, self.high, self.threshold, most=6)
            return ticks, decade_labels(ticks)
        tens = range(round(math.log10(self.threshold)), math.ceil(math.log10(max(self.high, -self.low))) + 1)
        sizes = [round(m * 10.0**ten, 12 - ten) for ten in tens for m in (1, 2, 5)]
        ticks = sorted({0.0, *(e for size in sizes for e in (-size, size) if self.low <= e <= self.high)})
        return ticks, [f"{tick:g}".replace("-", "−") for tick in ticks]

    def ticks_apart(self, share: float) -> tuple[list[float], list[str]]:
        """Those of :attr:`ticks` whose labels do not touch: none nearer to another than ``share`` of the range.

        0 stays, then powers of ten before others, the largest before smaller ones.
        """
        ticks, labels = self.ticks
        low, high = self.ends
        at = self.height(np.array(ticks))
        rank = sorted(range(len(ticks)), key=lambda i: (ticks[i] != 0, not _is_power_of_ten(ticks[i]), -abs(ticks[i])))
        kept: list[int] = []
        for i in rank:
            if all(abs(at[i] - at[j]) >= share * (high - low) for j in kept):
                kept.append(i)
        return [ticks[i] for i in sorted(kept)], [labels[i] for i in sorted(kept)]


@dataclass(frozen=True, eq=False)
class Surface:
    """One measured surface. Losses that are not finite stay."""

    method: str
    seed: int
    kind: str
    split: str
    space: str
    x: Array  # (columns,)
    y: Array  # (rows,)
    loss: Array  # (rows, columns)
    excess: Array  # (rows, columns)
    accuracy: Array  # (rows, columns), NaN where it is not known
    error: Array  # (rows, columns), estimated of an interpolated loss; NaN where it was evaluated
    marks: pd.DataFrame  # label, x, y, value (true loss), excess, off_plane; in the order of a path
    labels: tuple[str, str]  # of the axes
    explained: tuple[float, float] | None  # share of the marks' variance along each axis
    worth: dict[str, float]  # evaluated, interpolation_error, precision_error, cosine, examples, examples_available,
    # and the largest subset_error; absent where not measured
    centre: float  # loss that the excess is over
    reference: str  # which loss that is, where not the one at the centre
    n_seeds: int  # measured, of which this is one

    @property
    def name(self) -> str:
        """Tells it from every other surface of a table."""
        parts = (self.method, f"seed {self.seed}", self.space and f"{self.space} space", self.kind, self.split)
        return ", ".join(part for part in parts if part)

    @property
    def interpolated(self) -> NDArray[np.bool_]:
        """Which losses were not evaluated, (rows, columns)."""
        return np.isfinite(self.error)

    def alone(self, corners: int) -> NDArray[np.bool_]:
        """Which finite losses belong to no cell of the grid with ``corners`` finite ones, (rows, columns).

        Such a point would not be seen in a drawing that fills those cells only.
        """
        finite = np.isfinite(self.loss)
        cells = np.sum([finite[:-1, :-1], finite[:-1, 1:], finite[1:, :-1], finite[1:, 1:]], axis=0)
        filled = np.pad(cells >= corners, 1)
        return finite & ~(filled[:-1, :-1] | filled[:-1, 1:] | filled[1:, :-1] | filled[1:, 1:])

    @property
    def mismatch(self) -> Array:
        """True loss minus the surface at each mark, (marks,); NaN where either is not known or not finite."""
        inside = RegularGridInterpolator((self.y, self.x), self.loss, bounds_error=False)
        with np.errstate(invalid="ignore"):
            difference = self.marks["value"].to_numpy(float) - inside(self.marks[["y", "x"]].to_numpy(float))
        return np.where(np.isfinite(difference), difference, np.nan)


def surface_table(
    frame: pd.DataFrame, kind: str | None = None, space: str | None = None, seed: int | None = None
) -> pd.DataFrame:
    """The rows of the surfaces that are drawn, with the excess loss.

    Args:
        frame: the tidy rows of one study.
        kind: ``filter``, ``eigenvectors``, ``adapters`` or ``trajectory``; None: all that were measured.
        space: ``full``, ``lora`` or another; None: all that were measured.
        seed: the training seed; None: the first one of each method.

    Returns:
        The columns ``method``, ``seed``, ``kind``, ``split``, ``space``, ``quantity``, ``label``, ``x``, ``y``,
        ``index``, ``value``, ``excess`` (of ``loss`` and ``mark``: over the loss at x = y = 0; where that is not known
        or not finite, over the lowest finite loss), ``centre`` (that loss), ``reference`` (which: empty or words),
        ``interpolation_error`` (of a ``loss``: estimated largest where it was interpolated, else NaN), ``off_plane``
        (of a ``mark``) and ``n_seeds`` (training seeds measured).

    Raises:
        NothingToDraw: no such surface was measured.
        UserError: a surface holds the same point twice, or its points are no grid.
    """
    rows = frame[frame["measure"] == "surface"]
    for column, wanted in (("kind", kind), ("space", space)):
        rows = rows if wanted is None else rows[rows[column] == wanted]
    rows = rows.assign(n_seeds=rows.groupby(_SURFACE)["seed"].transform("nunique"))
    first = rows.groupby(_SURFACE)["seed"].transform("min") if seed is None else seed
    rows = rows[rows["seed"] == first]
    if not (rows["quantity"] == "loss").any():
        asked = {"kind": kind, "space": space, "seed": seed}
        named = " ".join(f"{name} {value}" for name, value in asked.items() if value is not None)
        raise canvas.NothingToDraw(f"no surface {named} to draw".replace("  ", " ") + ": measure surface first")
    left = {"off_plane": rows["residual"].where(rows["quantity"] == "mark")}
    left["interpolation_error"] = rows["residual"].where(rows["quantity"] == "loss")
    rows = rows.rename(columns={"radius": "x"}).assign(**left)
    parts = [_with_excess(part) for _, part in rows.groupby([*_SURFACE, "seed"], sort=False)]
    columns = ["method", "seed", *PLACE, "quantity", "label", "x", "y", "index", "value", "excess", "centre"]
    table = pd.concat(parts)[[*columns, "reference", "interpolation_error", "off_plane", "n_seeds"]]
    return table.sort_values([*PLACE, "method", "quantity", "index"], ignore_index=True, kind="stable")


def surfaces(table: pd.DataFrame) -> list[list[Surface]]:
    """The surfaces of a :func:`surface_table`, grouped by what shares a scale, the methods in their order."""
    known = list(KINDS)
    order = sorted(
        canvas.variants(table, PLACE),
        key=lambda place: (known.index(place[0]) if place[0] in known else len(known), place[0], place[1]),
    )
    places = {(kind, split) for kind, split, _ in order}
    spaces, methods = in_space_order(table["space"]), list(styles_for(table["method"]))
    groups = []
    for kind, split in sorted(places, key=[place[:2] for place in order].index):
        for space in spaces:
            rows = table[(table["kind"] == kind) & (table["split"] == split) & (table["space"] == space)]
            here = [rows[rows["method"] == method] for method in methods]
            group = [_surface(part) for part in here if (part["quantity"] == "loss").any()]
            groups += [group] if group else []
    return groups


def scale_for(group: Sequence[Surface]) -> Scale:
    """The scale that a group of surfaces shares."""
    excess = np.concatenate([surface.excess[np.isfinite(surface.excess)] for surface in group])
    sizes = np.abs(excess[excess != 0])
    if not len(sizes):
        return Scale(1e-3, 0.0, 1.0)
    centre = max(abs(surface.centre) for surface in group)
    small = max(float(np.quantile(sizes, 0.05)), _DEEPEST * float(sizes.max()), _ROUNDING * centre)
    threshold = 10.0 ** math.floor(math.log10(small))
    return Scale(threshold, min(float(excess.min()), 0.0), max(float(excess.max()), threshold))


def window_for(group: Sequence[Surface]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Ends of x and of y that hold every surface of a group: its panels have the same axes."""
    left, bottom = (min(float(at[0]) for at in ends) for ends in ([s.x for s in group], [s.y for s in group]))
    right, top = (max(float(at[-1]) for at in ends) for ends in ([s.x for s in group], [s.y for s in group]))
    return (left, right), (bottom, top)


def space_and_kind(surface: Surface) -> str:
    """Title of a group."""
    return f"{canvas.space_title(surface.space)}: {KINDS.get(surface.kind, surface.kind)}"


def axis_label(surface: Surface, axis: int) -> str:
    """Label of axis 0 or 1, with its share of the path."""
    if surface.explained is None:
        return surface.labels[axis]
    share = f"{100 * surface.explained[axis]:.3g}\u00a0%"
    return f"{surface.labels[axis]} ({share} of the checkpoints' variance)"


def _is_power_of_ten(value: float) -> bool:
    return value != 0 and math.isclose(math.log10(abs(value)), round(math.log10(abs(value))), abs_tol=1e-9)


def _with_excess(rows: pd.DataFrame) -> pd.DataFrame:
    losses = rows[rows["quantity"] == "loss"]
    if losses.empty:
        return rows.assign(excess=np.nan, centre=np.nan, reference="")
    centre, reference = _centre(rows, losses)
    shown = rows["quantity"].isin(["loss", "mark"])
    return rows.assign(excess=(rows["value"] - centre).where(shown), centre=centre, reference=reference)


def _centre(rows: pd.DataFrame, losses: pd.DataFrame) -> tuple[float, str]:
    """Loss at the origin from the grid, else from a mark that lies there; else the lowest loss, and words for it."""
    near = 1e-5 * float(np.abs(losses[["x", "y"]].to_numpy(float)).max())  # marks lie where float32 weights put them
    marks = rows[(rows["quantity"] == "mark") & ~(rows["off_plane"].abs() > near)]
    for points in (losses, marks):
        there = points.loc[(points["x"].abs() <= near) & (points["y"].abs() <= near), "value"]
        if len(there) and np.isfinite(there.iloc[0]):
            return float(there.iloc[0]), ""
    finite = losses.loc[np.isfinite(losses["value"]), "value"]
    if finite.empty:
        return math.nan, "nothing: no loss is finite"
    return float(finite.min()), "the lowest loss, as that at the centre is not known or not finite"


def _surface(rows: pd.DataFrame) -> Surface:
    first = rows.iloc[0]
    by = {name: part.sort_values("index") for name, part in rows.groupby("quantity", sort=False)}
    losses, none = by["loss"], rows.iloc[:0]
    if losses.duplicated(["x", "y"]).any():
        raise UserError(f"the surface of {first['method']} holds a point twice: keep the rows of one measurement")
    x, y = np.unique(losses["x"]), np.unique(losses["y"])
    if len(x) * len(y) != len(losses) or len(x) < 2 or len(y) < 2:
        raise UserError(f"the surface of {first['method']} is no grid of x by y: keep all rows of its measurement")

    def on_grid(points: pd.DataFrame, column: str) -> Array:
        return points.pivot(index="y", columns="x", values=column).reindex(index=y, columns=x).to_numpy(float)

    shares, axes = by.get("explained_variance", none), by.get("axis", none).set_index("index")["label"]
    worth = {
        name: float(by[name]["value"].max())
        for name in ("evaluated", "interpolation_error", "precision_error", "cosine", *SUBSET)
        if name in by
    }
    return Surface(
        method=str(first["method"]), seed=int(first["seed"]), kind=first["kind"], split=first["split"],
        space=first["space"], x=x, y=y, loss=on_grid(losses, "value"), excess=on_grid(losses, "excess"),
        accuracy=on_grid(by["accuracy"], "value") if "accuracy" in by else np.full((len(y), len(x)), np.nan),
        error=on_grid(losses, "interpolation_error"),
        marks=by.get("mark", none)[["label", "x", "y", "value", "excess", "off_plane"]].reset_index(drop=True),
        labels=(str(axes.get(1, "x")), str(axes.get(2, "y"))),
        explained=(float(shares["value"].iloc[0]), float(shares["value"].iloc[1])) if len(shares) == 2 else None,
        worth=worth,
        centre=float(losses["centre"].iloc[0]), reference=str(losses["reference"].iloc[0]),
        n_seeds=int(first["n_seeds"]),
    )  # fmt: skip
