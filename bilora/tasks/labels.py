"""Classes as they stand in files → ids 0..n-1."""

from collections.abc import Mapping
from typing import Any

from bilora.errors import UserError
from bilora.tasks.sources import Table


def encode_labels(tables: Mapping[str, Table], column: str) -> tuple[dict[str, list[int]], tuple[str, ...]]:
    """Ids of the labels of every split, and the names of the classes in the order of their ids.

    Strings get ids in alphabetical order. Integers must be 0..n-1 already: any other set of integers is more often
    a rating, an index or a mark for "unlabelled" than a class.

    Args:
        tables: the splits; the classes are those of ``train``.
        column: name of the label column, for messages.

    Raises:
        UserError: labels out of range or not classes, fewer than two classes, a class that ``train`` lacks.
    """
    train = tables["train"]
    values = {split: [_plain(label, column, table) for label in table.labels] for split, table in tables.items()}
    seen = set(values["train"])
    kinds = {type(value) for value in seen}
    if len(kinds) > 1:
        raise UserError(f"{train.source}: column {column!r} mixes numbers and strings: use one of them")
    if len(seen) < 2:
        raise UserError(f"{train.source}: column {column!r} has {len(seen)} class, a classification needs two or more")
    if train.class_names is not None:
        classes: list[Any] = list(range(len(train.class_names)))
        names = train.class_names
    else:
        classes = sorted(seen)
        names = tuple(str(value) for value in classes)
    if kinds == {int} and not seen <= set(range(len(classes))):
        shown = ", ".join(str(value) for value in sorted(seen)[:10])
        raise UserError(
            f"{train.source}: labels in column {column!r} are out of range: {len(classes)} classes must be numbered "
            f"0 to {len(classes) - 1}, found {shown}"
        )
    ids = {value: i for i, value in enumerate(classes)}
    for split, labels in values.items():
        for number, label in enumerate(labels, start=1):
            if label not in ids:
                raise UserError(
                    f"{tables[split].source}: row {number} has the label {label!r}, which {train.source} does not have"
                )
    return {split: [ids[label] for label in labels] for split, labels in values.items()}, names


def _plain(label: Any, column: str, table: Table) -> str | int:
    if isinstance(label, str):
        return label
    if isinstance(label, bool | int) or (isinstance(label, float) and label.is_integer()):
        return int(label)
    raise UserError(f"{table.source}: column {column!r} holds {label!r}: a class is a string or an integer 0..n-1")
