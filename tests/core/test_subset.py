"""The error of a mean on some of the examples against all subsets there are, and losses of single examples."""

from itertools import combinations

import numpy as np
import pytest

from analysis import Objective, WeightSpace
from analysis.core.subset import example_losses, single_examples, subset_error
from tests.oracles import tiny


def test_the_squared_error_is_the_variance_over_all_subsets():
    """Of equal weights it is unbiased, exactly, for every size."""
    population = np.random.default_rng(0).normal(1.0, 2.0, 9)
    for n in range(2, 9):
        subsets = [population[list(chosen)] for chosen in combinations(range(9), n)]
        variance = np.mean([(subset.mean() - population.mean()) ** 2 for subset in subsets])
        squared = [subset_error(subset, np.ones(n), 9) ** 2 for subset in subsets]
        assert np.mean(squared) == pytest.approx(variance, rel=1e-12)


def test_examples_count_by_their_terms():
    """One of weight 3 is no three of weight 1: the error is that of the ratio, as by hand."""
    differences, terms = np.array([1.0, 2.0, 4.0]), np.array([1.0, 1.0, 4.0])
    mean = (1 + 2 + 16) / 6
    residuals = np.array([1 - mean, 2 - mean, 4 * (4 - mean)]) / 2
    expected = np.sqrt((1 - 3 / 30) * (residuals**2).sum() / (2 * 3))
    assert subset_error(differences, terms, 30) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize(("values", "available", "error"), [([1.0, 2.0], 2, 0.0), ([1.0], 5, np.nan)])
def test_ends_of_the_range(values, available, error):
    assert subset_error(np.array(values), np.ones(len(values)), available) == pytest.approx(error, nan_ok=True)


def test_an_infinite_difference_has_no_error():
    assert np.isnan(subset_error(np.array([1.0, np.inf, 2.0]), np.ones(3), 9))


@pytest.mark.parametrize("language", [False, True])
def test_losses_of_examples_make_up_the_mean_loss(language):
    examples = tiny.examples(vocabulary=30)
    model, collate = (tiny.gpt2(), tiny.language_batch) if language else (tiny.bert(), tiny.padded)
    batches = [collate(part) for part in tiny.split(examples)]
    objective, space = Objective(batches), WeightSpace.all(model)
    singles = single_examples(objective)
    losses = example_losses(singles, space)
    assert len(losses) == len(examples)
    rounding = 1e-6 if language else 1e-12  # transformers computes losses of language models in float32
    assert np.average(losses, weights=singles.weights) == pytest.approx(objective.loss(space), rel=rounding)
