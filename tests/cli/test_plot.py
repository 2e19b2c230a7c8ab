"""``bilora plot``: figures from files of rows, and bad input in one line."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.study.files import write_measured
from analysis.study.origin import origins
from analysis.study.store import file_digest
from bilora.cli.app import main
from bilora.cli.plot import read_rows
from bilora.errors import UserError
from tests.plausible_rows import plausible_rows

STUDY_COLUMNS = ["study", "method", "seed", "cell"]


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    rows = plausible_rows(methods=["LoRA", "Bi-LoRA"], seeds=2, directions=2)
    return rows[rows["measure"].isin(["spectrum", "connectivity", "quality"])]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def measured(frame: pd.DataFrame, method: str, path: Path, seed: int = 0) -> Path:
    """A file as `bilora measure` writes it."""
    own = frame[(frame["method"] == method) & (frame["seed"] == seed)].drop(columns=STUDY_COLUMNS)
    path.parent.mkdir(exist_ok=True)
    own.to_parquet(path, index=False)
    return path


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["plot", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.strip().splitlines()
    return line


def test_a_study_is_redrawn_from_its_folder(frame, here, capsys):
    (here / "study").mkdir()
    frame.to_parquet(here / "study" / "results.parquet", index=False)
    assert main(["plot", "study", "-o", "out", "--figure", "eigenvalues"]) == 0
    printed = capsys.readouterr().out.split()
    assert printed == [f"out/eigenvalues.{kind}" for kind in ("png", "pdf", "svg", "csv", "parquet", "json")]
    assert all(Path(path).is_file() for path in printed)
    assert {path.name for path in here.joinpath("out").iterdir()} == {Path(path).name for path in printed}
    made_by = json.loads((here / "out" / "eigenvalues.json").read_text())
    assert made_by["command"] == "bilora plot study"
    assert made_by["study"] == ["invented"]
    assert made_by["rows"] == len(frame)
    assert str(here) not in (here / "out" / "eigenvalues.json").read_text()


def test_a_figure_knows_what_its_rows_were_measured_from(frame, here):
    digests = {"subject": "a" * 64, "measures": [{"settings": {"seed": 7}}], "versions": {"torch": "1"}}
    own = frame[(frame["method"] == "LoRA") & (frame["seed"] == 0)].drop(columns=STUDY_COLUMNS)
    write_measured(here / "one.parquet", own, digests, [("LoRA", 0)])
    measured(frame, "Bi-LoRA", here / "two.parquet")
    (here / "two.json").write_text(json.dumps({"determinants": "of another table", "sha256": "b" * 64}))
    assert main(["plot", "one.parquet", "two.parquet", "-o", "out", "--figure", "eigenvalues"]) == 0
    one, two = json.loads((here / "out" / "eigenvalues.json").read_text())["data"]
    assert (one["file"], one["sha256"]) == ("one.parquet", file_digest(here / "one.parquet"))
    assert one["determinants"] == digests
    assert two == {"file": "two.parquet", "sha256": file_digest(here / "two.parquet")}


def test_a_figure_of_a_study_names_its_cells(frame, here):
    (here / "study").mkdir()
    frame.to_parquet(here / "study" / "results.parquet", index=False)
    known = {"command": "bilora compare s.yaml", "seeds": [0, 1], "presentation_code": "x"}
    known |= {"cells": {"train-1": {"label": "LoRA, seed 0", "address": "c0ffee", "seconds": 1.0}}}
    digest = file_digest(here / "study" / "results.parquet")
    for outputs, expected in (({"results.parquet": digest}, {"LoRA, seed 0": "c0ffee"}), ({}, None)):
        (here / "study" / "provenance.json").write_text(json.dumps({**known, "outputs": outputs}))
        (found,) = origins([here / "study" / "results.parquet"])
        assert found.get("cells") == expected
        assert "presentation_code" not in found


def test_measured_files_are_drawn_together_under_their_names(frame, here, capsys):
    one = measured(frame, "LoRA", here / "LoRA.parquet")
    two = measured(frame, "Bi-LoRA", here / "b.parquet", seed=1)
    two.with_suffix(".json").write_text(json.dumps({"label": "Bi-LoRA", "seed": 1}))
    assert main(["plot", str(one), str(two), "--figure", "eigenvalues", "--figure", "connectivity"]) == 0
    drawn = pd.read_csv(here / "figures" / "eigenvalues.csv")
    assert set(zip(drawn["method"], drawn["seed"], strict=True)) == {("LoRA", 0), ("Bi-LoRA", 1)}
    assert (here / "figures" / "connectivity.png").is_file()


def test_files_of_one_name_are_told_apart_by_their_folders(frame, here):
    files = [measured(frame, method, here / method / "rows.parquet") for method in ("LoRA", "Bi-LoRA")]
    assert set(read_rows(files)["method"]) == {"LoRA/rows", "Bi-LoRA/rows"}


def test_csv_and_parquet_give_the_same_rows(frame, here):
    odd = frame.copy()
    odd.loc[odd.index[:3], "value"] = [np.inf, -np.inf, np.nan]
    odd.loc[odd["measure"] == "connectivity", "label"] = "NA"
    odd.to_parquet(here / "a.parquet", index=False)
    odd.to_csv(here / "a.csv", index=False)
    same = read_rows([here / "a.parquet"])
    pd.testing.assert_frame_equal(read_rows([here / "a.csv"]), same, check_dtype=False)
    assert (same["label"] == "NA").any()


def test_rows_of_an_older_version_get_the_later_columns(frame, here):
    frame[frame["measure"] == "spectrum"].drop(columns=["label", "y"]).to_parquet(here / "old.parquet")
    rows = read_rows([here / "old.parquet"])
    assert (rows["label"] == "").all()
    assert rows["y"].isna().all()


def test_bad_input_is_one_line_and_writes_nothing(frame, here, capsys):
    frame.to_parquet(here / "rows.parquet")
    frame[(frame["measure"] == "quality") & (frame["method"] == "LoRA")].to_parquet(here / "quality.parquet")
    frame.iloc[:0].to_parquet(here / "empty.parquet")
    frame.drop(columns=["value", "seed"]).to_parquet(here / "columns.parquet")
    (here / "damaged.parquet").write_bytes(b"PAR1 and no more")
    (here / "data.json").write_text("{}")
    (here / "words.csv").write_text("measure,quantity,value\nquality,loss,much\n")
    (here / "other.csv").write_text("a,b\n1,2\n")
    (here / "folder").mkdir()
    (here / "done").mkdir()
    (here / "done" / "provenance.json").write_text("{}")
    before = sorted(here.rglob("*"))
    cases = {
        "none.parquet": "none.parquet does not exist: give the rows",
        "folder": "folder/results.parquet does not exist",
        "empty.parquet": "empty.parquet holds no rows",
        "columns.parquet": "columns.parquet lacks the columns value, seed",
        "damaged.parquet": "damaged.parquet cannot be read",
        "words.csv": "words.csv holds words in the column value",
        "other.csv": "other.csv lacks the columns measure, quantity, value",
        "data.json": "data.json is neither .parquet nor .csv",
        "quality.parquet": "no figure has rows",
        "rows.parquet rows.parquet": "is there twice: give each file once",
        "rows.parquet --figure pie": "no figure is called 'pie': choose one of differences",
        "rows.parquet --baseline Nobody": "baseline 'Nobody' is not among the methods measured",
        "rows.parquet --figure density": "no density rows",
        "rows.parquet -o data.json": "--output data.json is a file",
        "rows.parquet -o done/figures": "holds the figures of a study",
    }
    for arguments, expected in cases.items():
        assert expected in refused(arguments.split(), capsys), arguments
        assert sorted(here.rglob("*")) == before, arguments


def test_a_seed_without_a_method_is_refused(frame, here):
    frame.drop(columns="method").to_parquet(here / "rows.parquet")
    with pytest.raises(UserError, match="lacks the columns method"):
        read_rows([here / "rows.parquet"])
