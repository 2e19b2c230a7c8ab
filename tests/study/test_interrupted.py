"""A study killed, terminated, run twice at once or partly failing ends with the table of an undisturbed one."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

pytestmark = pytest.mark.slow

Write = Callable[..., Path]
LIMIT = 600.0


def start(study: Path, output: Path, workers: int = 2) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "import sys; from bilora.cli.app import main; sys.exit(main())"]
    command += ["compare", study.name, "--output", str(output), "--workers", str(workers)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        command, cwd=study.parent, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def wait_for(what: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + LIMIT
    while not what():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def finished(output: Path) -> set[str]:
    return {path.parent.name for path in output.glob("cells/*/cell.json") if not path.parent.name.endswith(".partial")}


def workers_of(pid: int) -> set[int]:
    found = set()
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.add(int(status.parent.name))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(pids: set[int]) -> None:
    deadline = time.monotonic() + 30
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "workers outlived the study"
        time.sleep(0.1)


def test_killed_and_terminated_study_ends_with_the_same_table(study_file: Write, tmp_path: Path) -> None:
    study = study_file()
    calm, troubled = tmp_path / "calm", tmp_path / "troubled"

    # Two runners on one folder: each cell is computed once, and both end well.
    pair = [start(study, calm, workers=1), start(study, calm, workers=1)]
    outputs = [process.communicate(timeout=LIMIT) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    computed = sum(err.count(": computed in") for _, err in outputs)
    assert computed == len(finished(calm)) == 8

    # Killed without warning while a training is under way, and again after the first measurement.
    process = start(study, troubled)
    wait_for(
        lambda: any(troubled.glob("cells/training-*.partial/checkpoints/checkpoint-*/trainer_state.json")), process
    )
    children = workers_of(process.pid)
    process.kill()
    process.communicate()
    wait_until_gone(children)
    assert not (troubled / "results.parquet").exists()

    process = start(study, troubled)
    wait_for(lambda: any(name.startswith("measure") for name in finished(troubled)), process)
    children = workers_of(process.pid)
    process.kill()
    process.communicate()
    wait_until_gone(children)
    kept = {name: (troubled / "cells" / name).stat().st_mtime_ns for name in finished(troubled)}
    assert kept

    # Told to end: workers are gone, the exit code is that of an interruption.
    process = start(study, troubled)
    wait_for(lambda: bool(workers_of(process.pid)), process)
    children = workers_of(process.pid)
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.strip().splitlines()[-1] == "interrupted: give the same command again to continue"
    wait_until_gone(children)

    process = start(study, troubled)
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, err
    assert {name: (troubled / "cells" / name).stat().st_mtime_ns for name in kept} == kept
    assert (troubled / "results.csv").read_bytes() == (calm / "results.csv").read_bytes()
    pd.testing.assert_frame_equal(
        pd.read_parquet(troubled / "results.parquet"), pd.read_parquet(calm / "results.parquet"), check_exact=True
    )
    for name in ("results.parquet", "report.html", "figures"):
        assert (troubled / name).exists()
        assert name in out
    assert not list(troubled.glob("cells/*/checkpoints"))

    # Once more: nothing is computed, nothing is written.
    before = {
        path: path.stat().st_mtime_ns for path in troubled.rglob("*") if path.is_file() and "lock" not in path.name
    }
    process = start(study, troubled)
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, err
    assert "8 cells: 0 computed, 8 kept from before, 0 failed" in out
    assert {path: path.stat().st_mtime_ns for path in before} == before

    provenance = (troubled / "provenance.json").read_text()
    assert str(tmp_path) not in provenance
    assert json.loads(provenance)["command"] == "bilora compare study.yaml"


def test_a_failed_cell_is_named_and_the_rest_is_there(study_file: Write, tmp_path: Path) -> None:
    study = study_file({"{method: bilora, rho: 0.05}": "{method: bilora, rho: 0.05, training: {learning_rate: 1e30}}"})
    output = tmp_path / "out"
    process = start(study, output)
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 1, err
    assert "failed   Bi-LoRA, seed 0: training" in out
    assert "Traceback" not in err
    table = pd.read_parquet(output / "results.parquet")
    assert table["method"].unique().tolist() == ["LoRA"]
    errors = list(output.glob("cells/training-*.partial/error.txt"))
    assert len(errors) == 1
    assert "Traceback" in errors[0].read_text()
