"""The exact mean loss on fixed examples, with its metric, gradient and Hessian–vector product."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from analysis.core.bucketing import LAUNCHES, OVERHEAD, buckets
from analysis.core.example_losses import ExampleLosses
from analysis.core.needed import run_model
from analysis.core.scores import Scores
from analysis.core.space import WeightSpace
from analysis.core.vectors import Vector
from bilora.errors import UserError

IGNORED = -100
"""Label that takes no part in the loss."""
UNSHIFTED = ("ForMaskedLM", "ForTokenClassification")
"""Losses of transformers that compare each position with its own label."""


class Objective:
    """The mean loss on fixed examples, of whichever model a :class:`WeightSpace` holds.

    ``L = Σ_b w_b·L_b / Σ_b w_b`` over batches, where ``L_b = model(**batch).loss`` is a mean and ``w_b`` its number of
    terms: examples where labels are one number an example, counted tokens where they are one an input token. So the
    value does not depend on how the examples are batched.

    Args:
        batches: keyword arguments of the model's forward, tensors with the examples along dimension 0. Kept on the
            CPU and moved to the model's device one at a time.
        name: what the examples are: the ``split`` of rows.
        shifted: with token labels, whether the model's loss compares position t with label t+1, as causal language
            models do (masked language models, taggers and encoder–decoders do not; where transformers tells, a model
            that does not fit is refused).

    Attributes:
        name, shifted: as given.
        batches: those with at least one term in the loss.
        weights: number of terms of each batch.
        weight: number of terms in all.
        digest: sha256 of the batches' contents, for provenance.

    Raises:
        UserError: no batch has a term in the loss.
    """

    def __init__(
        self, batches: Sequence[Mapping[str, Tensor]], *, name: str = "validation", shifted: bool = True
    ) -> None:
        self.name = name
        self.shifted = shifted
        on_cpu = [{key: tensor.detach().cpu() for key, tensor in batch.items()} for batch in batches]
        weights = [self._terms(batch) for batch in on_cpu]
        self.batches = tuple(batch for batch, weight in zip(on_cpu, weights, strict=True) if weight)
        self.weights = tuple(weight for weight in weights if weight)
        self.weight = float(sum(self.weights))
        if not self.batches:
            raise UserError(f"the {name} examples have nothing to compute a loss from: they are empty or all masked")
        self.digest = _digest(self.batches)

    @classmethod
    def from_dataset(
        cls,
        dataset: datasets.Dataset,
        collate: Callable[[list[dict[str, Any]]], Mapping[str, Tensor]],
        *,
        batch_size: int = 32,
        name: str = "validation",
        shifted: bool = True,
    ) -> "Objective":
        """All examples of a tokenised dataset, batched with neighbours in length so that little is padding.

        Args:
            dataset: columns as ``collate`` takes them; examples are sorted by the length of ``input_ids`` (stable,
                longest first) where there is such a column.
            collate: list of examples → batch.
            batch_size: examples a batch at most: where lengths differ a batch may end early
                (:func:`~analysis.core.bucketing.buckets`).
            name, shifted: as the class.

        Raises:
            UserError: an empty dataset, or a batch size below 1.
        """
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}: it must be at least 1")
        if len(dataset) == 0:
            raise UserError(f"the {name} dataset is empty: give it at least one example")
        lengths = (
            [len(ids) for ids in dataset["input_ids"]] if "input_ids" in dataset.column_names else [1] * len(dataset)
        )
        order = sorted(range(len(dataset)), key=lambda i: -lengths[i])
        overhead = LAUNCHES if torch.cuda.is_available() else OVERHEAD
        cuts = buckets([lengths[i] for i in order], batch_size, overhead)
        batches = [collate([dataset[i] for i in order[cut]]) for cut in cuts]
        return cls(batches, name=name, shifted=shifted)

    def loss(self, space: WeightSpace) -> float:
        """The mean loss at the space's current weights. NaN or infinite where the model's loss is."""
        return self.evaluate(space)["loss"]

    @torch.no_grad()
    def evaluate(self, space: WeightSpace, examples: ExampleLosses | None = None) -> dict[str, float]:
        """``loss``, and over the same terms ``accuracy`` where labels are classes or tokens and there are logits.

        For classes also ``matthews``, Matthews correlation over all examples.

        Args:
            space: the weights.
            examples: takes the losses of single examples.

        Raises:
            UserError: the model returns no loss.
        """
        losses: list[float] = []
        scores = Scores()
        for batch, weight in zip(self.batches, self.weights, strict=True):
            moved = self._inputs(batch, space)
            output = run_model(space.model, moved)
            loss, predictions = float(_loss_of(output).double()), self._predictions(output, moved)
            losses.append(weight * loss)
            scores.add(*predictions)
            if examples is not None:
                examples.add(loss, *predictions)
        values = {"loss": math.fsum(losses) / self.weight if all(map(math.isfinite, losses)) else sum(losses)}
        return values | scores.metrics()

    def gradient(self, space: WeightSpace) -> Vector:
        """∇L with respect to the space's parameters, summed over batches in float64, in the parameters' dtype.

        Raises:
            UserError: the loss is not finite, or depends on no parameter of the space.
        """
        total = Sum(space)
        for index, weight in enumerate(self.weights):
            total.add(self.batch_gradient(space, index), weight / self.weight)
        return total.vector("the gradient")

    def batch_gradient(self, space: WeightSpace, index: int) -> tuple[Tensor, ...]:
        """Gradient of the mean loss of batch ``index``: one tensor per parameter, in order.

        Raises:
            UserError: as :meth:`gradient`.
        """
        loss = self.batch_loss(space, index)
        return torch.autograd.grad(loss, list(space.parameters.values()), allow_unused=True, materialize_grads=True)

    def hvp(self, space: WeightSpace, vector: Vector) -> Vector:
        """∇²L·vector by reverse-over-reverse differentiation, batch by batch; entries not named count as zero.

        Forward-mode differentiation is avoided: it is silently wrong through ``layer_norm`` (pytorch#198017).

        Raises:
            UserError: the loss is not finite, or depends on no parameter of the space.
            ValueError: the vector does not fit the space.
        """
        total = Sum(space)
        for index in range(len(self.batches)):
            gradients = self.gradient_graph(space, index)
            total.add(product(gradients, space, vector), self.weights[index] / self.weight)
        return total.vector("the Hessian–vector product")

    def gradient_graph(self, space: WeightSpace, index: int) -> tuple[Tensor, ...]:
        """Gradient of the mean loss of batch ``index``, itself differentiable: one tensor per parameter, in order.

        Raises:
            UserError: as :meth:`gradient`.
        """
        # The fused attention kernels have no second derivative (pytorch#116350); the decomposed one is exact.
        with sdpa_kernel(SDPBackend.MATH):
            loss = self.batch_loss(space, index)
            return torch.autograd.grad(
                loss,
                list(space.parameters.values()),
                create_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )

    def batch_loss(self, space: WeightSpace, index: int) -> Tensor:
        """The mean loss of batch ``index``, to be differentiated.

        Raises:
            UserError: it is not finite, or depends on no parameter of the space.
        """
        return self.batch_output(space, index)[0]

    def batch_output(self, space: WeightSpace, index: int) -> tuple[Tensor, Tensor | None]:
        """The mean loss of batch ``index``, to be differentiated, and the logits it is computed from, if there are any.

        Raises:
            UserError: the loss is no single number, is not finite, or depends on no parameter of the space.
        """
        output = run_model(space.model, self._inputs(self.batches[index], space))
        loss = _loss_of(output)
        if loss.numel() != 1:
            raise UserError(f"the model's loss has shape {tuple(loss.shape)}: it must be one number, the batch's mean")
        if not loss.requires_grad:
            raise UserError(f"the loss does not depend on the {space.name} weights: choose others")
        if not bool(loss.isfinite()):
            raise UserError(f"the loss on the {self.name} examples is {loss.item()}: derivatives need a finite one")
        return loss, _logits_of(output)

    @torch.no_grad()
    def batch_value(self, space: WeightSpace, index: int) -> float:
        """The mean loss of batch ``index``. NaN or infinite where the model's loss is."""
        return float(_loss_of(run_model(space.model, self._inputs(self.batches[index], space))).double().mean())

    def _inputs(self, batch: Mapping[str, Tensor], space: WeightSpace) -> dict[str, Tensor]:
        labels = _labels(batch)
        if self.shifted and labels is not None and labels.dim() > 1 and not labels.is_floating_point():
            _check_shifted(space.model)
        return {key: tensor.to(space.device) for key, tensor in batch.items()}

    def _terms(self, batch: Mapping[str, Tensor]) -> int:
        """How many numbers the loss of ``batch`` is the mean of."""
        labels = _labels(batch)
        if labels is None:
            return len(next(iter(batch.values())))
        if labels.is_floating_point():
            return len(labels)
        return int((self._targets(labels) != IGNORED).sum())

    def _targets(self, labels: Tensor) -> Tensor:
        return labels[:, 1:] if self.shifted and labels.dim() > 1 else labels

    def _predictions(self, output: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """Logits, and the targets that stand at their places."""
        labels, logits = _labels(batch), _logits_of(output)
        if labels is None or logits is None:
            return None, None
        return logits[:, :-1] if self.shifted and labels.dim() > 1 else logits, self._targets(labels)


class Sum:
    """Σ weight·tensors over batches, one float64 tensor per parameter of a space."""

    def __init__(self, space: WeightSpace) -> None:
        self._space = space
        self._totals = [torch.zeros_like(p, dtype=torch.float64) for p in space.parameters.values()]

    def add(self, tensors: Sequence[Tensor], weight: float) -> None:
        """Add ``weight·tensors``, given in the order of the space's parameters."""
        for total, tensor in zip(self._totals, tensors, strict=True):
            total.add_(tensor.detach(), alpha=weight)

    def vector(self, what: str) -> Vector:
        """The sum in the parameters' dtype.

        Raises:
            UserError: ``what`` is not finite.
        """
        named = zip(self._space.parameters.items(), self._totals, strict=True)
        result = {name: total.to(parameter.dtype) for (name, parameter), total in named}
        for name, tensor in result.items():
            if not bool(tensor.isfinite().all()):
                raise UserError(f"{what} is not finite at {name}: the weights are too large for {tensor.dtype}")
        return result


def product(
    gradients: Sequence[Tensor], space: WeightSpace, vector: Vector, *, retain_graph: bool = False
) -> tuple[Tensor, ...]:
    """Second backward: derivative of ``⟨gradients, vector⟩`` with respect to the space's parameters, in their order.

    Raises:
        ValueError: the vector does not fit the space.
    """
    aligned = space.aligned(vector)
    parameters = space.parameters
    pairs = [(g, aligned[n]) for g, n in zip(gradients, parameters, strict=True) if n in aligned and g.requires_grad]
    if not pairs:  # the gradient is constant along the vector
        return tuple(torch.zeros_like(p) for p in parameters.values())
    return torch.autograd.grad(
        [gradient for gradient, _ in pairs],
        list(parameters.values()),
        [part for _, part in pairs],
        retain_graph=retain_graph,
        allow_unused=True,
        materialize_grads=True,
    )


def _check_shifted(model: nn.Module) -> None:
    """Refuse a model of transformers whose loss does not compare position t with label t+1."""
    kind = getattr(model, "loss_type", None)
    two_parts = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if kind in UNSHIFTED or two_parts:
        raise UserError(
            f"the loss of {'an encoder-decoder' if two_parts else kind} counts the first label of each example: "
            "make the objective with shifted=False"
        )


def _labels(batch: Mapping[str, Tensor]) -> Tensor | None:
    return batch.get("labels", batch.get("label"))


def _loss_of(output: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise UserError("the model returns no loss: its batches need labels, and its forward must return .loss")
    return loss


def _logits_of(output: Any) -> Tensor | None:
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else None


def _digest(batches: Sequence[Mapping[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for key in sorted(batch):
            tensor = batch[key].contiguous()
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
