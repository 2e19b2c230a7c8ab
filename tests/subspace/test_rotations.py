"""Outside share and alignment of randomly turned perturbations: exact moments, and p-values that are uniform."""

import math

import numpy as np
import pytest
import torch

from analysis.core import Factors
from analysis.subspace.lowrank import LowRank
from analysis.subspace.outside import reach_of
from analysis.subspace.perturbations import induced
from analysis.subspace.reachable import ReachableSet
from analysis.subspace.rotations import concentration, share_p_value, share_variance
from tests.sharpness.cases import normal

M, N, R = 24, 30, 3
DRAWS = 3000
SPECTRA = {
    "rank 1": (1.0,),
    "falling": (4.0, 2.0, 1.0, 0.5),
    "flat": (1.0,) * 12,
    "full": tuple(np.linspace(2, 0.1, M)),
}
f = Factors(normal(M, R, seed=1), normal(R, N, seed=2), 1.0)


def haar(rows, columns, generator):
    """Uniform orthonormal columns, by QR with the signs put right."""
    Q, upper = torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))
    return Q * upper.diagonal().sign()


def turned(spectrum, draws=DRAWS):
    generator = torch.Generator().manual_seed(5)
    sigma = torch.tensor(spectrum, dtype=torch.float64)
    for _ in range(draws):
        yield LowRank(haar(M, len(sigma), generator) * sigma, haar(N, len(sigma), generator).mT)


def levels(values):
    """Share of the p-values up to 0.05 and 0.5."""
    return float(np.mean(np.array(values) <= 0.05)), float(np.mean(np.array(values) <= 0.5))


@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
def test_moments_and_p_values_under_random_rotations(spectrum):
    sigma = np.array(spectrum)
    expected = float((sigma**4).sum() / (sigma**2).sum() ** 2)
    reachable = ReachableSet.of(f)
    gradient = {"a.weight": normal(M, 4, seed=3) @ normal(4, N, seed=4)}
    shares, cosines, of_shares, of_cosines = [], [], [], []
    for eps in turned(spectrum):
        reach = reach_of("auxiliary", {"a": eps}, {"a": f}, gradient)
        assert reach.concentrations[0] == pytest.approx(expected, rel=1e-10)
        shares.append(reach.share)
        cosines.append(reach.alignment)
        of_shares.append(reach.share_p_value)
        of_cosines.append(reach.alignment_p_value)
    variance = share_variance(expected, (M, N), (R, R))
    assert np.mean(shares) == pytest.approx(reachable.chance, abs=4 * math.sqrt(variance / DRAWS))
    assert np.var(shares) == pytest.approx(variance, rel=0.12)
    assert np.var(cosines) == pytest.approx(1 / (M * N), rel=0.12)
    for found in (of_shares, of_cosines):
        low, middle = levels(found)
        assert 0.03 < low < 0.07
        assert 0.45 < middle < 0.55


def test_several_layers_together():
    layers = {name: Factors(normal(M, R, seed=i), normal(R, N, seed=i + 9), 1.0) for i, name in enumerate("abc")}
    gradient = {f"{name}.weight": (i + 1) * normal(M, N, seed=20 + i) for i, name in enumerate("abc")}
    streams = [turned(spectrum, 1000) for spectrum in (SPECTRA["falling"], SPECTRA["rank 1"], SPECTRA["flat"])]
    generator = torch.Generator().manual_seed(8)
    found = []
    for first, second, third in zip(*streams, strict=True):
        # The streams share a seed: turn each once more, by itself.
        eps = {
            n: LowRank(haar(M, M, generator) @ e.left, e.right)
            for n, e in zip("abc", (first, second, third), strict=True)
        }
        reach = reach_of("auxiliary", eps, layers, gradient)
        found.append((reach.share_p_value, reach.alignment_p_value))
    for values in zip(*found, strict=True):
        low, middle = levels(values)
        assert 0.03 < low < 0.07
        assert 0.45 < middle < 0.55


def test_a_confined_and_an_aligned_perturbation_are_told_from_chance():
    eps = induced(f, 1e-3 * normal(M, R, seed=5), 1e-3 * normal(R, N, seed=6))
    G = normal(M, N, seed=7)
    reach = reach_of("lora_sam", {"a": eps}, {"a": f}, {"a.weight": G + 100 * eps.left @ eps.right})
    assert reach.share_p_value < 1e-12
    assert reach.alignment_p_value < 1e-8
    rows = {(r["quantity"], r["layer"]): r["value"] for r in reach.rows()}
    assert rows["outside_share_p_value", "a"] == rows["outside_share_p_value", ""] == reach.share_p_value
    assert rows["alignment_p_value", "a"] == pytest.approx(reach.alignment_p_value)


def test_a_layer_that_is_not_perturbed_changes_nothing():
    eps, G = next(turned(SPECTRA["falling"], 1)), normal(M, N, seed=7)
    alone = reach_of("auxiliary", {"a": eps}, {"a": f}, {"a.weight": G})
    still = LowRank(torch.zeros(M, 1, dtype=torch.float64), torch.zeros(1, N, dtype=torch.float64))
    both = reach_of("auxiliary", {"a": eps, "b": still}, {"a": f, "b": f}, {"a.weight": G, "b.weight": 0 * G})
    assert both.share_p_value == pytest.approx(alone.share_p_value)
    assert both.alignment_p_value == pytest.approx(alone.alignment_p_value)
    assert math.isnan(both.of_layer(1).alignment_p_value)
    assert math.isnan(both.of_layer(1).share_p_value)


def test_dense_and_factored_concentrations_agree():
    eps = LowRank(normal(M, 5, seed=8), normal(5, N, seed=9))
    dense = eps.left @ eps.right
    assert concentration(eps) == pytest.approx(concentration(dense), rel=1e-12)
    assert concentration(eps) == pytest.approx(concentration(dense.mT), rel=1e-12)
    assert concentration(dense[:, :1] @ dense[:1]) == pytest.approx(1, rel=1e-12)
    assert math.isnan(concentration(torch.zeros(2, 3)))


def test_where_everything_is_out_of_reach_nothing_is_confined():
    one, none = np.ones(1), np.zeros(1)
    assert share_p_value(1.0, one, none, one) == 1
    assert share_variance(1.0, (1, 1), (0, 0)) == 0
    assert math.isnan(share_p_value(math.nan, one, none, one))
