"""Two processes of ``accelerate launch`` share the points of a landscape, and write what one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from bilora.cli.app import main
from tests.cli.small import DATA, save_adapter, save_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("processes")
    save_model(root / "model")
    for seed, name in enumerate("abc"):
        save_adapter(root / name, root / "model", seed)
    return root


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def by_two(module, arguments):
    launch = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no", "--main_process_port", "0"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *launch, "-m", module, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": path},
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adapters", "connect"])
def test_points_of_a_landscape_are_shared(folders, here, kind):
    places = [str(folders / name) for name in "abc"]
    arguments = ["landscape", kind, *places, *DATA, "--points", "7", "--error", "0"]
    if kind == "connect":
        arguments = arguments[:-2]
    done = by_two("tests.cli.counted_run", [*arguments, "-o", "two.parquet"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("rows in two.parquet") == 1
    first, second = (int((here / f"evaluated-{rank}").read_text()) for rank in range(2))
    if kind == "adapters":  # three marks, by both; the centre; and the grid, which it is no point of
        assert (first, second) == (3 + 1 + 25, 3 + 24)
    else:
        assert (first, second) == (3 * 4, 3 * 3)
    assert main([*arguments, "-o", "one.parquet"]) == 0
    pd.testing.assert_frame_equal(pd.read_parquet("two.parquet"), pd.read_parquet("one.parquet"))
    assert json.loads(Path("two.json").read_text()) == json.loads(Path("one.json").read_text())
    assert not list(here.glob("*.jsonl"))


@pytest.mark.slow
def test_measures_and_refusals_are_those_of_one_process(folders, here):
    arguments = ["measure", str(folders / "a"), str(folders / "b"), *DATA, "--what", "random,surface,trace"]
    arguments += ["--set", "directions=2", "--set", "random.radii=[0.3]", "--set", "surface.points=5"]
    arguments += ["--set", "trace.max_products=4", "--space", "full"]
    done = by_two("bilora", [*arguments, "-o", "two.parquet"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("rows in two.parquet") == done.stdout.count("differences to a") == 1
    assert main([*arguments, "-o", "one.parquet"]) == 0
    two, one = pd.read_parquet("two.parquet"), pd.read_parquet("one.parquet")
    shared = two["measure"] == "trace"  # whose processes sum their batches in another order
    pd.testing.assert_frame_equal(two[~shared], one[~shared])
    pd.testing.assert_frame_equal(two[shared], one[shared], rtol=1e-5)
    files = sorted(path.name for path in here.iterdir() if path.name.startswith("two"))
    assert files == ["two.differences.parquet", "two.json", "two.parquet"]

    refused = by_two("bilora", [*arguments, "--set", "seed=1", "-o", "two.parquet"])
    assert refused.returncode != 0
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("error")]
    assert "holds something else" in line
    pd.testing.assert_frame_equal(pd.read_parquet("two.parquet"), two)
