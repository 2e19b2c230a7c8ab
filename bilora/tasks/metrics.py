"""Metrics that ``Trainer`` computes on the validation examples."""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
"""Label of a token that is not predicted (PyTorch's default ``ignore_index``)."""


def classification_metrics(prediction: Any) -> dict[str, float]:
    """``accuracy``, ``f1`` (macro over classes that occur) and ``matthews`` of a ``transformers.EvalPrediction``."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    confusion = confusion_matrix(np.asarray(logits).argmax(-1), np.asarray(prediction.label_ids))
    right, occurring = np.diag(confusion), confusion.sum(1) + confusion.sum(0)
    f1 = 2 * right[occurring > 0] / occurring[occurring > 0]
    matthews = matthews_correlation(confusion)
    return {"accuracy": float(right.sum() / confusion.sum()), "f1": float(f1.mean()), "matthews": matthews}


def confusion_matrix(predicted: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Counts of (true class, predicted class), float64, from two integer arrays of one length, at least 1."""
    classes = int(max(predicted.max(), labels.max())) + 1
    confusion = np.zeros((classes, classes))
    np.add.at(confusion, (labels, predicted), 1.0)
    return confusion


def matthews_correlation(confusion: np.ndarray) -> float:
    """Matthews correlation of any number of classes from their counts (true, predicted); 0 where it is undefined.

    Gorodkin, Comput. Biol. Chem. 28 (2004).
    """
    right, truly, chosen, total = np.diag(confusion), confusion.sum(1), confusion.sum(0), confusion.sum()
    spread = (total**2 - chosen @ chosen) * (total**2 - truly @ truly)
    return float((right.sum() * total - chosen @ truly) / math.sqrt(spread)) if spread > 0 else 0.0


def next_token_losses(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Summed next-token loss and number of predicted tokens of each example, so that no logits are kept.

    Args:
        logits: (batch, length, vocabulary), or a tuple that starts with it.
        labels: (batch, length), :data:`IGNORED` where nothing is predicted.

    Returns:
        (batch, 2), float32.
    """
    scores = (logits[0] if isinstance(logits, tuple) else logits)[:, :-1].float()
    targets = labels[:, 1:]
    # Flat, because over a strided vocabulary axis PyTorch sums naively: 1e-4 off for 49,152 tokens in float32.
    flat = F.cross_entropy(scores.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    losses = flat.view(targets.shape)
    return torch.stack([losses.sum(-1), (targets != IGNORED).sum(-1).to(losses.dtype)], dim=-1)


def language_metrics(prediction: Any) -> dict[str, float]:
    """``token_loss`` (mean over all predicted tokens) and ``perplexity`` from what :func:`next_token_losses` gave."""
    sums = np.asarray(prediction.predictions, dtype=np.float64).sum(0)
    loss = float(sums[0] / sums[1])
    return {"token_loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}
