"""What rows say of a measurement on some of the examples."""

from itertools import combinations

import numpy as np
import pytest
import torch

from analysis import Objective, WeightSpace, loss_lines
from analysis.core.directions import filter_normalized, gaussian
from analysis.core.example_losses import ratio_error
from analysis.landscape.adapter_plane import adapter_plane
from analysis.landscape.connect import connectivity
from analysis.landscape.lines import LandscapeSettings
from analysis.landscape.surface import loss_surface
from analysis.sharpness.ascent_gap import AscentGap
from analysis.sharpness.random import RandomSettings, filter_noise, random_sharpness
from analysis.study.subset import _unseen, barrier_error, subset_rows
from tests.oracles import tiny

USED, AVAILABLE = len(tiny.examples()), 100


@pytest.fixture(scope="module")
def objective():
    return Objective([tiny.padded(part) for part in tiny.split(tiny.examples())])


def spaces(count):
    return [WeightSpace.full(tiny.with_lora(tiny.bert(), seed=seed)) for seed in range(1, count + 1)]


def rises_by_hand(space, point, origin=None):
    """Loss of each sentence on its own with weights W + point, minus that with W + origin."""

    def losses(step):
        with torch.no_grad():
            for name, tensor in step.items():
                space.parameters[name].add_(tensor)
            found = [float(space.model(**tiny.padded([example])).loss) for example in tiny.examples()]
            for name, tensor in step.items():
                space.parameters[name].sub_(tensor)
        return np.array(found)

    return losses(point) - losses(origin or {})


def error_by_hand(rises):
    return np.sqrt((1 - USED / AVAILABLE) * rises.var(ddof=1) / USED)


def test_lines_have_an_error_at_both_ends(objective):
    (space,) = spaces(1)
    settings = LandscapeSettings(points=3, directions=2, extent=0.5, seed=3)
    lines = loss_lines(objective, space, **settings.model_dump())
    added = subset_rows(lines.rows(), USED, AVAILABLE, objective, space, lines, settings)
    assert {row["kind"] for row in added} == {"filter"}
    counts = {row["quantity"]: row["value"] for row in added if row["quantity"] != "subset_error"}
    assert counts == {"examples": USED, "examples_available": AVAILABLE}
    errors = [row for row in added if row["quantity"] == "subset_error"]
    assert [(row["index"], row["radius"]) for row in errors] == [(0, -0.5), (0, 0.5), (1, -0.5), (1, 0.5)]
    direction = filter_normalized(space, gaussian(space, 3, 1))
    rises = rises_by_hand(space, {name: 0.5 * step for name, step in direction.items()})
    assert errors[-1]["value"] == pytest.approx(error_by_hand(rises), rel=1e-6)
    assert rises.mean() == pytest.approx(lines.losses[1, -1] - lines.losses[1, 1], rel=1e-6)


def test_random_perturbations_have_the_error_of_their_mean_over_directions(objective):
    (space,) = spaces(1)
    settings = RandomSettings(radii=(0.1, 0.4), directions=3, seed=2)
    sharpness = random_sharpness(objective, space, **settings.model_dump())
    added = subset_rows(sharpness.rows(), USED, AVAILABLE, objective, space, sharpness, settings)
    errors = {row["radius"]: row["value"] for row in added if row["quantity"] == "subset_error"}
    assert [*errors] == [0.1, 0.4]
    noises = [filter_noise(space, 2, j) for j in range(3)]
    rises = [rises_by_hand(space, {name: 0.4 * step for name, step in noise.items()}) for noise in noises]
    assert errors[0.4] == pytest.approx(error_by_hand(np.mean(rises, axis=0)), rel=1e-6)
    assert np.mean(rises) == pytest.approx(sharpness.mean[1], rel=1e-6)


def test_a_surface_has_an_error_at_its_corners_from_its_own_centre(objective):
    several = spaces(4)
    plane = adapter_plane(several)
    assert plane.origin is not None
    surface = loss_surface(objective, several[0], plane, points=5, error=None)
    added = subset_rows(surface.rows(), USED, AVAILABLE, objective, several[0], surface, None)
    errors = [row for row in added if row["quantity"] == "subset_error"]
    assert len({(row["radius"], row["y"]) for row in errors}) == 4
    x, y = errors[0]["radius"], errors[0]["y"]
    rises = rises_by_hand(several[0], plane.at(x, y), plane.at(0.0, 0.0))
    assert errors[0]["value"] == pytest.approx(error_by_hand(rises), rel=1e-6)


def test_a_barrier_has_the_error_of_its_excess_over_the_chord(objective):
    one, two = spaces(2)
    line = connectivity(objective, one, two, points=5)
    found = barrier_error(objective, one, two, line, USED, AVAILABLE)
    t = line.barrier_at
    step = {name: two.parameters[name].detach() - p.detach() for name, p in one.parameters.items()}
    at = rises_by_hand(one, {name: t * part for name, part in step.items()})
    excess = at - t * rises_by_hand(one, step)
    assert excess.mean() == pytest.approx(line.barrier, rel=1e-6)
    assert found["value"] == pytest.approx(error_by_hand(excess), rel=1e-6)
    assert (found["radius"], found["label"]) == (t, "A – B")


def test_the_squared_error_is_the_variance_over_all_subsets():
    """Unbiased, exactly, for every size."""
    population = np.random.default_rng(0).normal(1.0, 2.0, 9)
    for n in range(2, 9):
        subsets = [population[list(chosen)] for chosen in combinations(range(9), n)]
        variance = np.mean([(subset.mean() - population.mean()) ** 2 for subset in subsets])
        squared = [(_unseen(n, 9) * ratio_error(subset, np.ones(n))) ** 2 for subset in subsets]
        assert np.mean(squared) == pytest.approx(variance, rel=1e-12)


def test_nothing_is_added_where_all_examples_were_used(objective):
    (space,) = spaces(1)
    lines = loss_lines(objective, space, points=3, directions=1)
    assert subset_rows(lines.rows(), USED, USED, objective, space, lines, None) == []


def test_nothing_is_added_to_a_measure_that_does_not_apply(objective):
    (space,) = spaces(1)
    none = AscentGap("validation", ())
    assert subset_rows(none.rows(), USED, AVAILABLE, objective, space, none, None) == []
