"""Interpolated grids against the functions that made them."""

import numpy as np
import pytest

from analysis.landscape.adaptive import adaptive_grid

SMOOTH = {
    "quadratic": lambda x, y: x**2 + 0.3 * y**2 + 0.2 * x * y,
    "saddle": lambda x, y: x**2 - y**2,
    "steep": lambda x, y: np.exp(2 * x**2 + y**2 + x * y),
    "bowl with a plateau": lambda x, y: np.log1p(20 * (x**2 + 0.5 * y**2)),
    "ridge": lambda x, y: np.tanh(4 * (x + 0.3 * y)) + 0.5 * y**2,
    "cone with waves": lambda x, y: np.sqrt(0.01 + x**2 + y**2) + 0.2 * np.sin(5 * x + 2),
}


def grid_of(function, rows=21, columns=21):
    y, x = np.meshgrid(np.linspace(-1, 1, rows), np.linspace(-1, 1, columns), indexing="ij")
    return function(x, y)


class Table:
    """Looks values up and remembers what was asked."""

    def __init__(self, values):
        self.values, self.asked = values, []

    def __call__(self, nodes):
        self.asked += nodes
        return [self.values[node] for node in nodes]


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize(("error", "most"), [(0.01, 165), (0.02, 105), (0.05, 80)])
def test_smooth_surfaces_need_few_points_and_keep_the_error(name, error, most):
    table = Table(grid_of(SMOOTH[name]))
    grid = adaptive_grid(table, 21, 21, error)
    wrong = np.abs(grid.values - table.values) / np.ptp(table.values)
    assert wrong.max() <= grid.error <= error
    assert grid.evaluated.sum() <= most
    assert np.all(wrong[grid.evaluated] == 0)


@pytest.mark.parametrize("name", ["quadratic", "saddle", "bowl with a plateau"])
def test_bowls_need_a_seventh_of_the_points(name):
    assert adaptive_grid(Table(grid_of(SMOOTH[name])), 21, 21, 0.02).evaluated.sum() <= 63


def bumpy_bowl(generator, width):
    """A bowl with five bumps of either sign; the spacing of 21 points is 0.1."""
    a, b = generator.uniform(0.3, 1.5, 2)
    middle, places = generator.uniform(-0.2, 0.2, 2), generator.uniform(-1, 1, (5, 2))
    heights = generator.uniform(-0.3, 0.3, 5)

    def function(x, y):
        squares = [(x - p) ** 2 + (y - q) ** 2 for p, q in places]
        bumps = sum(h * np.exp(-s / (2 * width**2)) for h, s in zip(heights, squares, strict=True))
        return a * (x - middle[0]) ** 2 + b * (y - middle[1]) ** 2 + bumps

    return function


@pytest.mark.parametrize("width", [0.15, 0.2, 0.3])
def test_the_reported_error_covers_the_largest_true_one(width):
    """Features of 1.5 spacings and more: at most one of 16 surfaces is farther off than it says."""
    generator = np.random.default_rng(0)
    shares = []
    for _ in range(16):
        values = grid_of(bumpy_bowl(generator, width))
        grid = adaptive_grid(Table(values), 21, 21, 0.02)
        shares.append(np.abs(grid.values - values).max() / np.ptp(values) / grid.error)
    assert sum(share > 1 for share in shares) <= 1
    assert np.median(shares) > 0.25  # nor is it far too large


def test_every_node_is_asked_for_once():
    table = Table(grid_of(SMOOTH["ridge"], 15, 25))
    grid = adaptive_grid(table, 15, 25, 0.02)
    assert len(table.asked) == len(set(table.asked)) == grid.evaluated.sum()
    assert grid.values.shape == (15, 25)


def test_what_cannot_be_interpolated_is_evaluated():
    rough = Table(np.random.default_rng(0).random((21, 21)))
    grid = adaptive_grid(rough, 21, 21, 0.02)
    assert grid.evaluated.all()
    assert grid.error == 0
    assert np.array_equal(grid.values, rough.values)


@pytest.mark.parametrize("value", [np.inf, np.nan])
@pytest.mark.parametrize("node", [(0, 0), (10, 15)])
def test_a_value_that_is_not_finite_ends_the_interpolation(value, node):
    values = grid_of(SMOOTH["quadratic"])
    values[node] = value
    grid = adaptive_grid(Table(values), 21, 21, 0.02)
    assert np.array_equal(grid.values, values, equal_nan=True)
    assert grid.evaluated.all()


def test_small_and_constant_grids():
    for value in (3.0, 0.0):
        flat = adaptive_grid(Table(np.full((21, 21), value)), 21, 21, 0.02)
        np.testing.assert_allclose(flat.values, value, rtol=1e-12)
        assert flat.evaluated.sum() < 50
    tiny = Table(grid_of(SMOOTH["saddle"], 5, 5))
    assert adaptive_grid(tiny, 5, 5, 0.02).evaluated.all()
