"""Metrics against definitions written out another way."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bilora.tasks.metrics import IGNORED, classification_metrics, language_metrics, next_token_losses


@pytest.mark.parametrize(("classes", "seed"), [(2, 0), (3, 1), (5, 2)])
def test_classification_metrics_follow_their_definitions(classes, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, 50)
    logits = rng.normal(size=(50, classes)) + 1.5 * np.eye(classes)[labels]
    predicted = logits.argmax(1)
    f1 = []
    for c in range(classes):
        hit = sum((predicted == c) & (labels == c))
        precision, recall = hit / sum(predicted == c), hit / sum(labels == c)
        f1.append(2 * precision * recall / (precision + recall))
    x, y = np.eye(classes)[predicted], np.eye(classes)[labels]

    def covariance(u, v):
        return ((u - u.mean(0)) * (v - v.mean(0))).sum()

    matthews = covariance(x, y) / math.sqrt(covariance(x, x) * covariance(y, y))
    found = classification_metrics(SimpleNamespace(predictions=logits, label_ids=labels))
    assert found == pytest.approx({"accuracy": (predicted == labels).mean(), "f1": np.mean(f1), "matthews": matthews})
    if classes == 2:
        assert found["matthews"] == pytest.approx(np.corrcoef(predicted, labels)[0, 1])


def test_matthews_of_a_constant_answer_is_zero():
    logits = np.tile([1.0, 0.0], (4, 1))
    found = classification_metrics(SimpleNamespace(predictions=(logits, None), label_ids=np.array([0, 1, 0, 0])))
    assert found == pytest.approx({"accuracy": 0.75, "f1": (2 * 3 / 7 + 0) / 2, "matthews": 0.0})


def test_token_loss_is_the_mean_over_all_tokens_of_all_batches():
    torch.manual_seed(0)
    batches, total, count = [], 0.0, 0
    for size, length in [(3, 7), (2, 4)]:  # ragged batches: a mean of batch means would differ
        logits, labels = torch.randn(size, length, 5000), torch.randint(0, 5000, (size, length))
        labels[0, length // 2 :] = IGNORED
        batches.append(next_token_losses((logits, None), labels))
        for row in range(size):
            for position in range(1, length):
                if labels[row, position] != IGNORED:
                    scores = logits[row, position - 1].double()
                    total += float(scores.logsumexp(0) - scores[labels[row, position]])
                    count += 1
    found = language_metrics(SimpleNamespace(predictions=torch.cat(batches).numpy()))
    assert found["token_loss"] == pytest.approx(total / count, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
