"""Spectral density of the curvature of each method, LoRA space beside full space.

``ρ(λ) = 1/n·Σ_i g(λ − λ_i)`` with a narrow kernel g of area 1, estimated by stochastic Lanczos quadrature (Lin, Saad
and Yang, 2016; Ghorbani, Krishnan and Xiao, 2019, arXiv:1901.10159). Where it is far below its peak, single
eigenvalues stand out: an isolated one has the area 1/n.
"""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from numpy.typing import NDArray
from scipy import stats

from analysis.plots import canvas
from analysis.plots.eigenvalues import UNITS_DIFFER, curvature_name, eigenvalue_axis
from analysis.plots.style import PAGE, styles_for
from analysis.space_names import in_space_order

Curve = NDArray[np.float64]

POINTS = 400
"""Points of the common grid, besides the peaks of every seed."""

_BULK = 0.9  # share of the eigenvalues within the linear part of the axis
_DEPTH = 1e-12  # densities below this share of the peak are rounding
_SMALLEST = 1e-300  # log of a density that underflowed


def density_table(frame: pd.DataFrame, confidence: float = 0.95) -> pd.DataFrame:
    """The means and bands that :func:`density_curves` draws: one row per method, space, kind, split and eigenvalue.

    Seeds are measured on grids of their own. Each seed's log density is interpolated linearly on a grid that holds the
    peaks of all seeds of the method, and is zero beyond the seed's own grid; the densities, not their logarithms, are
    averaged, so that the mean is a density again. The band is ``mean·exp(±half width/mean)``: the interval of the
    logarithm of the mean to first order, since that of the mean itself may reach below zero.

    Args:
        frame: the tidy rows of one study.
        confidence: level of the interval over seeds, in (0, 1).

    Returns:
        ``method``, ``space``, ``kind``, ``split``, ``radius`` (the eigenvalue λ), ``mean``, ``low``, ``high``,
        ``lowest`` (of the seeds), ``n_seeds``, ``n_non_finite`` (values left out), ``band`` (``seeds``; ``runs``: one
        standard error over the runs of the only seed; or empty) and ``linear_range`` (9/10 of the eigenvalues of the
        panel lie within ± this power of ten).

    Raises:
        NothingToDraw: the density was not measured.
    """
    rows = canvas.chosen(frame, "density", "density")
    rows = rows[rows["layer"] == ""]
    parts = []
    for kind, split, space in canvas.variants(rows, ["kind", "split", "space"]):
        part = rows[(rows["kind"] == kind) & (rows["split"] == split) & (rows["space"] == space)]
        finite = part[np.isfinite(part["value"]) & np.isfinite(part["radius"])]
        if finite.empty:
            continue
        bulk = _linear_range([seed for _, seed in finite.groupby(["method", "seed"])])
        low, high = float(finite["radius"].min()), float(finite["radius"].max())
        even = np.linspace(np.arcsinh(low / bulk), np.arcsinh(high / bulk), POINTS)
        shared = np.clip(bulk * np.sinh(even), low, high)
        for method, of_method in finite.groupby("method"):
            curve = _mean_curve([seed for _, seed in of_method.groupby("seed")], shared, confidence)
            lost = int((part["method"] == method).sum()) - len(of_method)
            place = {"method": str(method), "kind": kind, "split": split, "space": space}
            parts.append(curve.assign(**place, n_non_finite=lost, linear_range=bulk))
    if not parts:
        raise canvas.NothingToDraw("no finite density to draw: the measure density found only values that are not")
    columns = ["method", "space", "kind", "split", "radius", "mean", "low", "high", "lowest", "n_seeds"]
    return pd.concat(parts, ignore_index=True)[[*columns, "n_non_finite", "band", "linear_range"]]


@canvas.styled
def density_curves(frame: pd.DataFrame, confidence: float = 0.95) -> Figure:
    """Mean spectral density of each method over the eigenvalue, with the interval over seeds; log over symmetric log.

    Args:
        frame: the tidy rows of one study.
        confidence: level of the band, in (0, 1).

    Raises:
        NothingToDraw: the density was not measured.
    """
    styles = styles_for(frame["method"])
    table = density_table(frame, confidence)
    spaces, kinds = in_space_order(table["space"]), canvas.variants(table, ["kind", "split"])
    figure, grid = canvas.panels(len(kinds), len(spaces), PAGE, 0.75 + 2.5 * len(kinds))
    for (kind, split), line in zip(kinds, grid, strict=True):
        for space, axes in zip(spaces, line, strict=True):
            axes.set_title(canvas.space_title(space))
            axes.set_xlabel(f"{curvature_name(kind)} eigenvalue λ")
            panel = table[(table["space"] == space) & (table["kind"] == kind) & (table["split"] == split)]
            if panel.empty:
                axes.set_axis_off()
                continue
            floor, seen = _floor(panel), panel["mean"].max()
            for method, look in styles.items():
                curve = panel[panel["method"] == method]
                # Below the floor a line runs out of the panel; a logarithmic axis has no place for 0.
                drawn = curve[["mean", "low", "high"]].clip(lower=floor * 1e-3)
                axes.plot(curve["radius"], drawn["mean"], color=look.colour, linestyle=look.line, linewidth=1.1)
                # Isolated eigenvalues of the seeds lie side by side; there no interval at one λ means anything.
                everywhere = curve["lowest"] > floor
                band = axes.fill_between(curve["radius"], drawn["low"], drawn["high"], where=everywhere)
                band.set(color=look.colour, alpha=0.13, linewidth=0)
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(numticks=7))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.set_ylim(floor, 4 * seen)
            _fit(axes, panel[panel["mean"] > floor])
        line[0].set_ylabel("density, per unit of λ" + (f" ({split})" if split else ""))
    canvas.legend(figure, canvas.line_handles(styles, table["method"], markers=False), PAGE)
    lost = int(table.drop_duplicates(["method", "space", "kind", "split"])["n_non_finite"].sum())
    bulks = [bulk for space in spaces for bulk in table.loc[table["space"] == space, "linear_range"].unique()]
    ranges = " and ".join(f"±{bulk:g}" for bulk in dict.fromkeys(bulks))
    words = _band_words(table, confidence) + (
        " Each seed's log density is interpolated between its grid points, and the density taken as 0 beyond them."
        f" λ is linear where 9/10 of the eigenvalues lie (within {ranges}), logarithmic beyond."
    )
    words += UNITS_DIFFER if len(spaces) > 1 else ""
    canvas.caption(figure, words + (f" {lost} values are not finite and left out." if lost else ""), PAGE)
    return figure


def _mean_curve(seeds: Sequence[pd.DataFrame], shared: Curve, confidence: float) -> pd.DataFrame:
    """Mean and band of one method's densities, on ``shared`` and the peaks of all seeds."""
    curves = [seed.sort_values("radius") for seed in seeds]
    grid = np.union1d(shared, np.concatenate([_peaks(c["radius"].to_numpy(), c["value"].to_numpy()) for c in curves]))
    densities = np.stack([_on_grid(grid, curve) for curve in curves])
    mean = densities.mean(axis=0)
    band, relative = "", np.full_like(mean, np.nan)
    if len(curves) > 1:
        error = densities.std(axis=0, ddof=1) / np.sqrt(len(curves))
        half = error * stats.t.ppf((1 + confidence) / 2, len(curves) - 1)
        band, relative = "seeds", np.divide(half, mean, out=np.zeros_like(mean), where=mean > 0)
    elif curves[0]["standard_error"].notna().any():
        error = curves[0]["standard_error"] / curves[0]["value"].clip(lower=_SMALLEST)
        band, relative = "runs", np.interp(grid, curves[0]["radius"], error)
    return pd.DataFrame({
        "radius": grid, "mean": mean, "low": mean * np.exp(-relative), "high": mean * np.exp(relative),
        "lowest": densities.min(axis=0), "n_seeds": len(curves), "band": band,
    })  # fmt: skip


def _on_grid(grid: Curve, curve: pd.DataFrame) -> Curve:
    logs = np.log(curve["value"].clip(lower=_SMALLEST))
    return np.exp(np.interp(grid, curve["radius"], logs, left=-np.inf, right=-np.inf))


def _peaks(at: Curve, values: Curve) -> Curve:
    """Where ``values`` has a local maximum."""
    padded = np.concatenate([[-np.inf], values, [-np.inf]])
    return at[(padded[1:-1] > padded[:-2]) & (padded[1:-1] >= padded[2:])]


def _linear_range(curves: Sequence[pd.DataFrame]) -> float:
    """The power of ten nearest to the |λ| below which 9/10 of the eigenvalues lie, the median over ``curves``."""
    within = []
    for curve in curves:
        ordered = curve.sort_values("radius")
        at = ordered["radius"].to_numpy()
        mass = ordered["value"].to_numpy() * (np.gradient(at) if len(at) > 1 else 1.0)
        outward = np.argsort(np.abs(at))
        share = np.cumsum(mass[outward]) / max(mass.sum(), _SMALLEST)
        within.append(np.abs(at[outward])[min(np.searchsorted(share, _BULK), len(at) - 1)])
    return 10.0 ** round(math.log10(max(float(np.median(within)), 1e-12)))


def _floor(panel: pd.DataFrame) -> float:
    """Lower end of the density axis: a decade below the lowest peak of a mean, two below the highest at least."""
    highest = max(float(panel["mean"].max()), _SMALLEST)
    heights = []
    for _, curve in panel.groupby("method"):
        mean = curve.sort_values("radius")["mean"].to_numpy()
        heights += _peaks(mean, mean).tolist()
    lowest = min(height for height in [highest, *heights] if height >= _DEPTH * highest)
    return min(lowest / 10, highest / 100)


def _band_words(table: pd.DataFrame, confidence: float) -> str:
    """What line and band are, seed interval or standard error over runs."""
    words = "Line: density" if table["n_seeds"].max() < 2 else "Line: mean of the seeds' densities"
    words += " (its area is 1 over λ, not over the axis drawn). "
    by_seeds, by_runs = table[table["band"] == "seeds"], table[table["band"] == "runs"]
    if len(by_seeds):
        words += canvas.interval_words(by_seeds, "band", confidence).rstrip(".") + ", of the logarithm,"
        words += " drawn where every seed lies above the lower edge."
    if len(by_runs):
        methods = ", ".join(sorted(by_runs["method"].unique()))
        words += f" Band of {methods}, one seed:" if len(by_seeds) else "One seed; band:"
        words += " one standard error over the measure's own runs, not over seeds."
    if not len(by_seeds) and not len(by_runs):
        words += "One seed and one run: no band can be drawn."
    return words


def _fit(axes: Axes, seen: pd.DataFrame) -> None:
    """Limits of the λ axis: what lies above the floor, and a little room."""
    bulk = float(seen["linear_range"].iloc[0])
    ends = np.arcsinh(np.array([min(seen["radius"].min(), 0.0), max(seen["radius"].max(), 0.0)]) / bulk)
    room = 0.04 * (ends[1] - ends[0]) + 1e-3
    low, high = bulk * np.sinh(ends + np.array([-room, room]))
    eigenvalue_axis(axes, "x", float(low), float(high), bulk)
