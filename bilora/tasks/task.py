"""A task made ready: tokenized examples, collation and metrics."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

from bilora.errors import UserError
from bilora.tasks.labels import encode_labels
from bilora.tasks.metrics import IGNORED, classification_metrics, language_metrics, next_token_losses
from bilora.tasks.sources import read_splits
from bilora.tasks.spec import TaskKind, TaskSpec
from bilora.tasks.splits import stratified_order, unseen

HELD_OUT = 0.2
"""Share of the examples held out where the data has no validation file and no number is asked for."""


@dataclass(frozen=True)
class Task:
    """What a model is trained and judged on.

    Attributes:
        name: ``data`` of the spec.
        kind: ``classification`` or ``causal_lm``.
        train: ``datasets.Dataset`` with ``input_ids``, ``attention_mask``, ``labels`` and, if the tokenizer makes them,
            ``token_type_ids``: lists without padding.
        validation: the same for the held-out examples.
        tokenizer: the tokenizer that made them.
        collate: list of examples → dict of padded tensors; ``labels`` are -100 on padding.
        label_names: names of the classes in the order of their ids; empty for ``causal_lm``.
        compute_metrics: as ``transformers.Trainer`` takes it.
        preprocess_logits_for_metrics: as ``transformers.Trainer`` takes it, or None.
    """

    name: str
    kind: TaskKind
    train: Any
    validation: Any
    tokenizer: Any
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    label_names: tuple[str, ...]
    compute_metrics: Callable[[Any], dict[str, float]]
    preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None

    @property
    def num_labels(self) -> int | None:
        """Number of classes; None for ``causal_lm``."""
        return len(self.label_names) or None

    @property
    def fingerprint(self) -> str:
        """SHA-256 of every token and label of both splits: equal where the model sees the same examples."""
        digest = hashlib.sha256()
        for split in (self.train, self.validation):
            for row in zip(split["input_ids"][:], split["labels"][:], strict=True):
                digest.update(json.dumps(row).encode())
            digest.update(b"\n")
        return digest.hexdigest()

    def trainer_arguments(self) -> dict[str, Any]:
        """The keyword arguments of ``Trainer`` that belong to the task."""
        return {
            "train_dataset": self.train,
            "eval_dataset": self.validation,
            "data_collator": self.collate,
            "processing_class": self.tokenizer,
            "compute_metrics": self.compute_metrics,
            "preprocess_logits_for_metrics": self.preprocess_logits_for_metrics,
        }


def load_task(spec: TaskSpec, tokenizer: Any) -> Task:
    """Read, check, split and tokenize the data of ``spec``.

    Repeated texts (but for case and spacing) are dropped from the training examples, and so is every text that is in
    the validation or test file: nothing that is trained on is validated on. The split and the choice of examples
    depend on ``spec.seed`` alone, and are stratified by class.

    Args:
        spec: the task.
        tokenizer: a ``transformers`` tokenizer with a padding token (:func:`bilora.tasks.load_tokenizer`).

    Raises:
        UserError: see :func:`read_splits` and :func:`encode_labels`; more examples asked for than there are;
            ``max_length`` beyond what the model can take.
    """
    longest = tokenizer.model_max_length
    if spec.max_length > longest:
        raise UserError(f"max_length {spec.max_length} is more than the model takes: choose at most {longest}")
    tables = read_splits(spec)
    if spec.kind == "classification":
        labels, names = encode_labels(tables, spec.label_column)
    else:
        labels, names = {split: [0] * len(table.texts) for split, table in tables.items()}, ()

    held_out_files = [text for split, table in tables.items() if split != "train" for text in table.texts]
    pool = unseen(tables["train"].texts, held_out_files)
    if not pool:
        raise UserError(f"every text of {tables['train'].source} is also in the validation or test file")
    order = [pool[i] for i in stratified_order([labels["train"][i] for i in pool], spec.seed, "train")]
    if "validation" in tables:
        held_out_from = "validation"
        held_out_order = stratified_order(labels["validation"], spec.seed, "validation")
        held_out = held_out_order[: _count(spec, "validation_examples", len(held_out_order), len(held_out_order))]
    else:
        held_out_from = "train"
        if len(order) < 2:
            raise UserError(f"{tables['train'].source} has one text, which leaves none for validation: add more")
        wanted = _count(spec, "validation_examples", len(order) - 1, max(1, round(HELD_OUT * len(order))))
        held_out, order = order[:wanted], order[wanted:]
    chosen = order[: _count(spec, "train_examples", len(order), len(order))]

    def examples(split: str, indices: Sequence[int]) -> Any:
        texts, ids = tables[split].texts, labels[split]
        return _tokenized(spec, tokenizer, [texts[i] for i in indices], [ids[i] for i in indices])

    classification = spec.kind == "classification"
    return Task(
        name=spec.data,
        kind=spec.kind,
        train=examples("train", chosen),
        validation=examples(held_out_from, held_out),
        tokenizer=tokenizer,
        collate=DataCollatorWithPadding(tokenizer)
        if classification
        else DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED),
        label_names=names,
        compute_metrics=classification_metrics if classification else language_metrics,
        preprocess_logits_for_metrics=None if classification else next_token_losses,
    )


def _count(spec: TaskSpec, field: str, available: int, default: int) -> int:
    """How many examples to take: ``spec.<field>`` of ``available``, or ``default`` where it is None."""
    wanted: int | None = getattr(spec, field)
    if wanted is not None and wanted > available:
        raise UserError(f"{field} is {wanted}, but {spec.data} has {available} to give: ask for fewer")
    return default if wanted is None else wanted


def _tokenized(spec: TaskSpec, tokenizer: Any, texts: list[str], labels: list[int]) -> Any:
    if spec.kind == "causal_lm":
        end = tokenizer.eos_token or ""
        columns = dict(tokenizer([text + end for text in texts], truncation=True, max_length=spec.max_length))
        short = next((text for text, ids in zip(texts, columns["input_ids"], strict=True) if len(ids) < 2), None)
        if short is not None:
            raise UserError(f"the text {short[:40]!r} is a single token, which leaves none to predict: remove it")
        columns["labels"] = [list(ids) for ids in columns["input_ids"]]
    else:
        columns = dict(tokenizer(texts, truncation=True, max_length=spec.max_length))
        columns["labels"] = labels
    return datasets.Dataset.from_dict(columns)
