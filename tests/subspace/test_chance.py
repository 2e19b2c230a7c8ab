"""The law of random overlaps against subspaces drawn in full, and against closed forms."""

import math

import numpy as np
import pytest
from scipy import stats

from analysis.subspace.chance import DRAWS, _overlaps, overlap_p_value


@pytest.mark.parametrize(("p", "q", "m"), [(2, 3, 20), (4, 4, 12), (1, 5, 9), (5, 6, 8), (3, 8, 8), (2, 7, 8)])
def test_overlaps_have_the_law_of_random_subspaces(p, q, m):
    rng = np.random.default_rng(1)
    direct = []
    for _ in range(1500):
        U, V = (np.linalg.qr(rng.standard_normal((m, k)))[0] for k in (p, q))
        direct.append(np.square(U.T @ V).sum() / p)
    drawn = _overlaps(p, q, m)
    assert len(drawn) == DRAWS
    assert drawn.mean() == pytest.approx(q / m, abs=4 * drawn.std() / math.sqrt(DRAWS) + 1e-12)
    if np.std(direct) > 1e-12:
        assert stats.ks_2samp(drawn, direct).pvalue > 1e-3
    else:
        np.testing.assert_allclose(drawn, 1.0, rtol=1e-12)


def test_of_two_lines_the_law_is_a_beta():
    """cos² of two random lines in R^m is Beta(1/2, (m − 1)/2)."""
    m = 30
    law = stats.beta(0.5, (m - 1) / 2)
    for overlap in (0.001, 0.01, 0.05, 0.15):
        p = law.sf(overlap)
        assert overlap_p_value(overlap, 1, 1, m) == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / DRAWS) + 1e-3)


def test_bounds_and_undefined():
    assert overlap_p_value(1.0, 3, 5, 50) == 1 / (1 + DRAWS)
    assert overlap_p_value(0.0, 3, 5, 50) == 1.0
    assert overlap_p_value(1.0, 3, 5, 5) == 1.0  # one lies in the other whatever they are
    assert math.isnan(overlap_p_value(math.nan, 3, 5, 50))
    assert math.isnan(overlap_p_value(0.3, 0, 5, 50))
    assert overlap_p_value(0.2, 3, 5, 50) == overlap_p_value(0.2, 5, 3, 50)


def test_planted_overlap_is_found_and_random_ones_are_uniform():
    rng = np.random.default_rng(2)
    m, p, q = 64, 4, 8
    V = np.linalg.qr(rng.standard_normal((m, q)))[0]
    half = V[:, :2] @ np.eye(2)
    planted = np.linalg.qr(np.hstack([half, rng.standard_normal((m, 2))]))[0]
    assert overlap_p_value(float(np.square(planted.T @ V).sum() / p), p, q, m) == 1 / (1 + DRAWS)
    values = []
    for _ in range(400):
        U = np.linalg.qr(rng.standard_normal((m, p)))[0]
        values.append(overlap_p_value(float(np.square(U.T @ V).sum() / p), p, q, m))
    assert stats.kstest(values, "uniform").pvalue > 1e-3
