import datasets
import pytest

from bilora.errors import UserError
from bilora.tasks import TaskSpec
from bilora.tasks.labels import encode_labels
from bilora.tasks.sources import Table, read_splits


def table(labels, names=None):
    return Table("file", [str(i) for i in range(len(labels))], labels, names)


@pytest.mark.parametrize(
    ("labels", "ids", "names"),
    [
        ([1, 0, 2, 1], [1, 0, 2, 1], ("0", "1", "2")),
        ([True, False], [1, 0], ("0", "1")),
        ([1.0, 0.0], [1, 0], ("0", "1")),
        (["pos", "neg", "pos"], [1, 0, 1], ("neg", "pos")),
        (["10", "9"], [0, 1], ("10", "9")),
    ],
)
def test_ids_and_names(labels, ids, names):
    assert encode_labels({"train": table(labels)}, "label") == ({"train": ids}, names)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 2, 7], r"out of range: 3 classes must be numbered 0 to 2, found 0, 2, 7"),
        ([1, 2], r"out of range: 2 classes must be numbered 0 to 1, found 1, 2"),
        ([-1, 0, 1], r"out of range"),
        ([0.5, 0.25], r"holds 0.5"),
        ([[0], [1]], r"holds \[0\]"),
        ([0, "1"], "mixes numbers and strings"),
        ([1, 1, 1], "has 1 class"),
        (["x", "x"], "has 1 class"),
    ],
)
def test_bad_labels(labels, message):
    with pytest.raises(UserError, match=message):
        encode_labels({"train": table(labels)}, "label")


def test_class_that_train_lacks():
    with pytest.raises(UserError, match="row 2 has the label 2, which file does not have"):
        encode_labels({"train": table([0, 1]), "validation": table([0, 2])}, "label")


def test_names_declared_by_the_file(tmp_path):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "so so", "good"])}
    )
    rows = {"text": ["a", "b", "c"], "label": [0, 2, 0]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data.parquet")
    tables = read_splits(TaskSpec(data=str(tmp_path / "data.parquet")))
    assert encode_labels(tables, "label") == ({"train": [0, 2, 0]}, ("bad", "so so", "good"))
    with pytest.raises(UserError, match="out of range: 2 classes must be numbered 0 to 1, found -1, 0"):
        encode_labels({"train": table([-1, 0], ("bad", "good"))}, "label")
