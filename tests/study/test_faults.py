"""Cells through kills at random moments, full disks, damaged files and clocks that run backwards."""

import errno
import random
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from killed_run import cells

from analysis.study.store import ERROR, Store
from analysis.study.worker import COMPUTED, FAILED, FOUND, attempt

RUN = Path(__file__).with_name("killed_run.py")
NAME = "measure-0123456789abcdef"


@pytest.mark.slow
def test_sigkill_at_ten_random_moments_loses_nothing(tmp_path: Path) -> None:
    """What was finished before a kill is not computed again; in the end every cell is there, each intact."""
    draw = random.Random(0)
    store = Store(tmp_path / "cells")
    known = {cell.name for cell in cells(tmp_path)}
    kept: dict[str, int] = {}
    for _ in range(10):
        process = subprocess.Popen([sys.executable, str(RUN), str(tmp_path)], cwd=Path(__file__).parents[2])
        try:
            process.wait(timeout=draw.uniform(1.0, 9.0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        time.sleep(1.0)  # its workers notice that they are alone
        now = {name: (store.path(name) / "cell.json").stat().st_mtime_ns for name in known if store.record(name)}
        assert kept.items() <= now.items()
        kept = now
    subprocess.run([sys.executable, str(RUN), str(tmp_path)], cwd=Path(__file__).parents[2], check=True, timeout=120)
    assert {name for name in known if store.record(name)} == known
    assert store.damaged() == ()


def test_a_full_disk_fails_the_cell_and_leaves_no_half_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, frame = Store(tmp_path / "cells"), pd.DataFrame({"value": [1.0]})

    def write(folder: Path, _: Store) -> dict[str, object]:
        frame.to_parquet(folder / "rows.parquet", index=False)
        return {}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr("analysis.study.store.write_text", full)  # the record, which comes last
        outcome = attempt(store, NAME, {}, write, keep=False)
        assert outcome.status == FAILED
        assert "No space left" in outcome.note  # though it cannot be kept
    assert store.record(NAME) is None
    assert not store.path(NAME).exists()
    assert attempt(store, NAME, {}, write, keep=False).status == COMPUTED
    assert store.rows(NAME)["value"].tolist() == [1.0]


def test_a_disk_that_is_full_for_the_rows_alone_is_told(tmp_path: Path) -> None:
    store = Store(tmp_path / "cells")

    def full(folder: Path, _: Store) -> dict[str, object]:
        raise OSError(errno.ENOSPC, "No space left on device")

    outcome = attempt(store, NAME, {}, full, keep=False)
    assert outcome.status == FAILED
    assert "No space left" in outcome.note
    assert (store.partial(NAME) / ERROR).is_file()


def test_a_clock_that_runs_backwards_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, now = Store(tmp_path / "cells"), [1e9]

    def backwards() -> float:
        now[0] -= 3600
        return now[0]

    monkeypatch.setattr(time, "time", backwards)
    assert attempt(store, NAME, {}, lambda folder, _: {}, keep=False).status == COMPUTED
    record = store.record(NAME)
    assert record is not None
    assert record["seconds"] >= 0
    assert attempt(store, NAME, {}, lambda folder, _: {}, keep=False).status == FOUND
