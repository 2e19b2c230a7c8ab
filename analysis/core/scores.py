"""How often predictions are right: accuracy, and for classes Matthews correlation (the metric of CoLA)."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bilora.tasks.metrics import IGNORED, confusion_matrix, matthews_correlation


class Scores:
    """Metrics over all examples, from their predictions batch by batch. Targets of :data:`IGNORED` do not count."""

    def __init__(self) -> None:
        self._predicted: list[Tensor] = []
        self._targets: list[Tensor] = []
        self._known = self._classes = True

    def add(self, logits: Tensor | None, targets: Tensor | None) -> None:
        """Keep the predictions of a batch; one without targets that fit leaves no metric of any.

        Args:
            logits: (…, classes), or None.
            targets: (…) integers, or None: one number an example are classes, more are tokens.
        """
        if logits is None or targets is None or not _fit(logits, targets):
            self._known = False
        else:
            self._predicted.append(logits.argmax(-1).flatten())
            self._targets.append(targets.flatten())
            self._classes &= targets.dim() == 1

    def metrics(self) -> dict[str, float]:
        """``accuracy``, for classes also ``matthews``; nothing where they are not defined."""
        if not self._known or not self._targets:
            return {}
        predicted, targets = _numbers(self._predicted), _numbers(self._targets)
        counted = targets != IGNORED
        predicted, targets = predicted[counted], targets[counted]
        found = {"accuracy": int((predicted == targets).sum()) / len(targets)}
        if self._classes:
            found["matthews"] = matthews_correlation(confusion_matrix(predicted, targets))
        return found


def _fit(logits: Tensor, targets: Tensor) -> bool:
    return not targets.is_floating_point() and logits.dim() == targets.dim() + 1 and logits.shape[-1] > 1


def _numbers(parts: list[Tensor]) -> npt.NDArray[np.int64]:
    return torch.cat(parts).cpu().numpy()
