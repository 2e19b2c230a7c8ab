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
    """``accuracy``, ``f1`` (macro, over the classes that occur) and ``matthews`` of a ``transformers.EvalPrediction``.

    Matthews correlation for any number of classes: Gorodkin, Comput. Biol. Chem. 28 (2004); 0 where it is undefined.
    """
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    predicted, labels = np.asarray(logits).argmax(-1), np.asarray(prediction.label_ids)
    classes = int(max(np.asarray(logits).shape[-1], labels.max() + 1))
    confusion = np.zeros((classes, classes))  # rows: true class, columns: predicted class
    np.add.at(confusion, (labels, predicted), 1.0)
    right, truly, chosen, total = np.diag(confusion), confusion.sum(1), confusion.sum(0), confusion.sum()
    occurs = truly + chosen > 0
    f1 = 2 * right[occurs] / (truly + chosen)[occurs]
    spread = (total**2 - chosen @ chosen) * (total**2 - truly @ truly)
    matthews = (right.sum() * total - chosen @ truly) / math.sqrt(spread) if spread > 0 else 0.0
    return {"accuracy": float(right.sum() / total), "f1": float(f1.mean()), "matthews": float(matthews)}


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
