"""The loss of each example, and how far a mean over them is from that over the examples they were drawn from.

    d_i = l_i(W + eps) − l_i(W),     rise = Σ_i d_i / Σ_i c_i,     c_i the terms of example i: 1, or its tokens

    standard error = sqrt(n/(n−1)·Σ_i (d_i − rise·c_i)²) / Σ_i c_i         (of a mean, where all c_i are 1)

Both losses are of the same examples, so that what they have in common falls out. The perturbation is held fixed: that
it may have been chosen on these very examples is no part of this error.
"""

import math

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from bilora.tasks.metrics import IGNORED

Array = npt.NDArray[np.float64]


class ExampleLosses:
    """Losses of single examples of one evaluation, in the objective's order; from the logits of the same forward pass.

    Only a cross entropy of classes or tokens is known by example. Where its mean is not the model's own loss (weighted
    classes, smoothed labels, a penalty) or there are no logits, nothing is.

    Attributes:
        known: whether there are losses of all examples.
    """

    def __init__(self) -> None:
        self.known = True
        self._sums: list[Array] = []
        self._terms: list[Array] = []

    def add(self, loss: float, logits: Tensor | None, targets: Tensor | None) -> None:
        """Take the losses of a batch.

        Args:
            loss: the model's mean over its terms.
            logits: (examples, …, classes), or None.
            targets: (examples, …) integers, :data:`IGNORED` where there is no term, or None.
        """
        if logits is None or targets is None or targets.is_floating_point() or logits.shape[:-1] != targets.shape:
            self.known = False
        if not self.known:
            return
        assert logits is not None
        assert targets is not None
        if targets.dim() == 1:
            sums = _losses(logits, targets)
        else:  # one by one, since a copy of all the logits of a language model may not fit
            parts = zip(logits, targets, strict=True)
            sums = torch.stack([_losses(scores.flatten(0, -2), tokens.flatten()).sum() for scores, tokens in parts])
        terms = (targets != IGNORED).view(len(targets), -1).sum(1).double()
        self.known = bool(np.isclose(float(sums.sum() / terms.sum()), loss, rtol=1e-3, atol=1e-6, equal_nan=True))
        self._sums.append(sums.numpy(force=True))
        self._terms.append(terms.numpy(force=True))

    @property
    def sums(self) -> Array:
        """Summed loss of each example, (examples,)."""
        return np.concatenate(self._sums)

    @property
    def terms(self) -> Array:
        """Terms of each example, (examples,)."""
        return np.concatenate(self._terms)


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of each of ``targets`` (n,), 0 where it is ignored, float64."""
    exact = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(exact, targets, ignore_index=IGNORED, reduction="none").double()


def rise_error(before: ExampleLosses, after: ExampleLosses) -> float:
    """Standard error over examples of the loss rise from ``before`` to ``after``; NaN where it is not known."""
    if not (before.known and after.known):
        return math.nan
    with np.errstate(invalid="ignore"):
        return ratio_error(after.sums - before.sums, before.terms)


class MeanLosses:
    """Losses of single examples, averaged over evaluations: those of random directions, for example."""

    def __init__(self) -> None:
        self._total: Array | float = 0.0
        self._count = 0
        self._known = True

    def add(self, examples: ExampleLosses) -> None:
        """Take the losses of one evaluation."""
        self._known = self._known and examples.known
        if self._known:
            self._total = self._total + examples.sums
            self._count += 1

    def rise_error(self, before: ExampleLosses) -> float:
        """Standard error over examples of the mean rise above ``before``; NaN where it is not known."""
        if not (self._known and before.known and self._count):
            return math.nan
        with np.errstate(invalid="ignore"):
            return ratio_error(self._total / self._count - before.sums, before.terms)


def ratio_error(numerators: Array, denominators: Array) -> float:
    """Standard error of ``Σ numerators / Σ denominators`` over the examples they are of, the module's equation.

    NaN for a single example, a value that is not finite, or denominators that add up to 0.
    """
    count, total = len(numerators), float(denominators.sum())
    if count < 2 or not total or not np.isfinite(numerators).all() or not np.isfinite(denominators).all():
        return math.nan
    gaps = numerators - numerators.sum() / total * denominators
    return math.sqrt(float(gaps @ gaps) * count / (count - 1)) / abs(total)
