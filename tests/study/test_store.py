"""Cells on disk: complete or not there."""

import json
import threading
from pathlib import Path

import pandas as pd
import pytest

from analysis.study.store import Busy, Store
from analysis.study.worker import BUSY, COMPUTED, FAILED, FOUND, attempt

NAME = "measure-0123456789abcdef"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cells")


def write_rows(folder: Path, store: Store) -> dict[str, object]:
    pd.DataFrame({"value": [1.5]}).to_parquet(folder / "rows.parquet", index=False)
    return {"steps": 3}


def test_a_cell_appears_only_when_complete(store: Store) -> None:
    def compute(folder: Path, _: Store) -> dict[str, object]:
        assert folder == store.partial(NAME)
        assert not store.path(NAME).exists()
        return write_rows(folder, store)

    assert attempt(store, NAME, {"a": 1}, compute, keep=False).status == COMPUTED
    assert not store.partial(NAME).exists()
    record = store.record(NAME)
    assert record is not None
    assert (record["determinants"], record["steps"]) == ({"a": 1}, 3)
    assert list(record["files"]) == ["rows.parquet"]
    assert store.rows(NAME)["value"].tolist() == [1.5]


def test_a_finished_cell_is_never_recomputed(store: Store) -> None:
    def never(folder: Path, _: Store) -> dict[str, object]:
        raise AssertionError("computed again")

    attempt(store, NAME, {}, write_rows, keep=False)
    assert attempt(store, NAME, {}, never, keep=False).status == FOUND


@pytest.mark.parametrize("damage", ["rows", "record", "missing"])
def test_a_damaged_cell_counts_as_missing_and_is_moved_aside(store: Store, damage: str) -> None:
    attempt(store, NAME, {}, write_rows, keep=False)
    if damage == "rows":
        (store.path(NAME) / "rows.parquet").write_bytes(b"PAR1")
    elif damage == "record":
        (store.path(NAME) / "cell.json").write_text("{")
    else:
        (store.path(NAME) / "rows.parquet").unlink()
    assert store.record(NAME) is None
    assert store.damaged() == ()
    assert attempt(store, NAME, {}, write_rows, keep=False).status == COMPUTED
    assert store.record(NAME) is not None
    (aside,) = store.damaged()
    assert aside.name == f"{NAME}.damaged-1"
    assert (aside / "cell.json").is_file()
    (store.path(NAME) / "rows.parquet").unlink()
    attempt(store, NAME, {}, write_rows, keep=False)
    assert [path.name for path in store.damaged()] == [f"{NAME}.damaged-1", f"{NAME}.damaged-2"]


def test_a_failure_keeps_its_text_and_is_retried(store: Store) -> None:
    def fail(folder: Path, _: Store) -> dict[str, object]:
        (folder / "checkpoint").write_text("half")
        raise ValueError("first line\nsecond line")

    outcome = attempt(store, NAME, {}, fail, keep=True)
    assert (outcome.status, outcome.note) == (FAILED, "first line")
    assert "second line" in (store.error(NAME) or "")
    assert store.record(NAME) is None

    def resume(folder: Path, _: Store) -> dict[str, object]:
        assert (folder / "checkpoint").read_text() == "half"
        assert not (folder / "error.txt").exists()
        return {}

    assert attempt(store, NAME, {}, resume, keep=True).status == COMPUTED
    assert store.error(NAME) is None


def test_leftovers_of_a_killed_measurement_are_dropped(store: Store) -> None:
    store.begin(NAME, keep=False).joinpath("old.txt").write_text("half")
    attempt(store, NAME, {}, write_rows, keep=False)
    record = store.record(NAME)
    assert record is not None
    assert list(record["files"]) == ["rows.parquet"]


def test_a_held_cell_is_busy_for_others(store: Store) -> None:
    statuses: list[str] = []
    with store.locked(NAME):
        other = threading.Thread(
            target=lambda: statuses.append(attempt(store, NAME, {}, write_rows, keep=False).status)
        )
        other.start()
        other.join()
    assert statuses == [BUSY]
    with store.locked(NAME), pytest.raises(Busy), Store(store.folder).locked(NAME):
        pass
    assert attempt(store, NAME, {}, write_rows, keep=False).status == COMPUTED


def test_records_are_plain_json_without_machine_paths(store: Store, tmp_path: Path) -> None:
    attempt(store, NAME, {}, write_rows, keep=False)
    text = (store.path(NAME) / "cell.json").read_text()
    assert str(tmp_path) not in text
    assert set(json.loads(text)) == {"determinants", "seconds", "cpu_seconds", "steps", "files"}
