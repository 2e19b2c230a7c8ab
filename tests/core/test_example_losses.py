"""Losses of single examples against sentences run alone, and their standard error against fresh draws."""

import math

import numpy as np
import pytest
import torch

from analysis.core import Objective, WeightSpace, gaussian
from analysis.core.example_losses import ExampleLosses, ratio_error, rise_error
from tests.oracles import tiny
from tests.sharpness.cases import LENGTHS, Quadratic, bert_objective, quadratic_objective, sentences, tiny_bert


def losses_of(objective, space):
    found = ExampleLosses()
    metrics = objective.evaluate(space, found)
    return found, metrics


def test_each_sentence_of_padded_batches_has_its_own_loss():
    model = tiny_bert()
    found, metrics = losses_of(bert_objective(), WeightSpace.all(model))
    alone = [
        float(model(input_ids=row[None], labels=torch.tensor([n % 3])).loss.detach())
        for row, n in zip(sentences(), LENGTHS, strict=True)
    ]
    assert found.known
    np.testing.assert_allclose(found.sums, alone, rtol=1e-12)
    assert found.terms.tolist() == [1] * 7
    assert metrics["loss"] == pytest.approx(found.sums.mean(), rel=1e-12)


def test_tokens_are_summed_by_sentence():
    chosen = tiny.examples((2, 9, 5), vocabulary=30)
    model = tiny.llama().eval()
    objective = Objective([tiny.language_batch(chosen[:1]), tiny.language_batch(chosen[1:])])
    found, _ = losses_of(objective, WeightSpace.full(model))
    alone = [float(model(**tiny.language_batch([one])).loss.detach()) for one in chosen]
    assert found.terms.tolist() == [1, 8, 4]
    np.testing.assert_allclose(found.sums, np.multiply(alone, [1, 8, 4]), rtol=1e-5)


def test_the_error_of_a_rise_is_that_of_its_paired_mean():
    model = tiny_bert()
    objective, space = bert_objective(), WeightSpace.all(model)
    before, base = losses_of(objective, space)
    with space.perturbed(gaussian(space, 0, 0), 0.05):
        after, moved = losses_of(objective, space)
    rises = after.sums - before.sums
    assert rises.mean() == pytest.approx(moved["loss"] - base["loss"], rel=1e-9)
    assert rise_error(before, after) == pytest.approx(rises.std(ddof=1) / math.sqrt(7), rel=1e-12)


def test_the_error_is_the_spread_over_fresh_examples():
    """Ratios of sums, as of tokens in sentences of unequal lengths, drawn anew."""
    rng = np.random.default_rng(0)
    ratios, variances = [], []
    for _ in range(1000):
        lengths = rng.integers(1, 30, 60).astype(float)
        values = lengths * (1 + rng.standard_normal(60)) + 0.2 * lengths**1.5
        ratios.append(values.sum() / lengths.sum())
        variances.append(ratio_error(values, lengths) ** 2)
    assert np.mean(variances) == pytest.approx(np.var(ratios, ddof=1), rel=0.12)


def test_what_is_no_plain_cross_entropy_has_no_losses_of_examples():
    class Smoothed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny_bert()
            self.config = self.inner.config

        def forward(self, labels, **batch):
            logits = self.inner(**batch).logits
            loss = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.3)
            return {"loss": loss, "logits": logits}

    found, _ = losses_of(bert_objective(), WeightSpace.all(Smoothed()))
    assert not found.known
    assert math.isnan(rise_error(found, found))
    model, (objective, _) = tiny_bert(), quadratic_objective()
    assert not losses_of(objective, WeightSpace.all(Quadratic()))[0].known
    model.config.problem_type = "regression"
    batch = {**tiny.padded(tiny.examples()), "labels": torch.zeros(21, 3, dtype=torch.float64)}
    assert not losses_of(Objective([batch]), WeightSpace.all(model))[0].known


@pytest.mark.parametrize(
    ("numerators", "denominators"),
    [([1.0], [1.0]), ([1.0, math.inf], [1.0, 1.0]), ([1.0, 2.0], [1.0, -1.0]), ([1.0, 2.0], [1.0, math.nan])],
)
def test_no_error_without_two_numbers_and_a_mean(numerators, denominators):
    assert math.isnan(ratio_error(np.array(numerators), np.array(denominators)))
