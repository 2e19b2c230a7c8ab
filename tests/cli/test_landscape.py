"""``bilora landscape``, and ``bilora measure`` of several adapters: real PEFT folders on a small BERT."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from analysis import Objective
from bilora.cli.app import main
from bilora.cli.measuring_bar import MeasuringBar
from bilora.tasks import load_tokenizer
from tests.cli.small import DATA, save_adapter, save_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """``model``; adapters ``a``, ``b``, ``c`` and, of rank 3, ``other`` on it; ``run`` with four checkpoints, ``short``
    with two; ``elsewhere``, an adapter of ``model2``, which differs in the adapted layers alone."""
    root = tmp_path_factory.mktemp("landscapes")
    base = save_model(root / "model")
    with torch.no_grad():
        base.bert.encoder.layer[0].attention.self.query.weight.mul_(1.5)
    base.save_pretrained(root / "model2")
    load_tokenizer("minilm").save_pretrained(root / "model2")

    def save(place, seed, rank=2, model="model"):
        save_adapter(root / place, root / model, seed, rank)

    for seed, name in enumerate("abc"):
        save(name, seed)
    save("other", 3, rank=3)
    for step in (5, 10, 100, 20):
        save(f"run/checkpoints/checkpoint-{step}", step)
    for step in (5, 10):
        save(f"short/checkpoint-{step}", step)
    save("elsewhere", 4, model="model2")
    return root


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(kind, root, names, *more):
    folders = [str(root / name) for name in names]
    return ["landscape", kind, *folders, "--model", str(root / "model"), *DATA, "-o", "rows.parquet", *more]


def test_a_plane_through_three_adapters_is_drawn_from_its_rows(folders, here, capsys):
    arguments = command("adapters", folders, "abc", "--points", "7")
    assert main(arguments) == 0
    rows = pd.read_parquet("rows.parquet")
    assert set(rows["measure"]) == {"surface"}
    assert (rows["quantity"] == "loss").sum() == 49
    marks = rows[rows["quantity"] == "mark"]
    assert marks["label"].tolist() == ["a, seed 0", "b, seed 0", "c, seed 0"]
    assert np.isfinite(marks["value"]).all()
    assert not list(here.glob("*.points.jsonl"))
    written = (here / "rows.parquet").stat().st_mtime_ns
    assert main(arguments) == 0
    assert (here / "rows.parquet").stat().st_mtime_ns == written
    assert main(["plot", "rows.parquet", "-o", "figures"]) == 0
    assert {path.name for path in (here / "figures").iterdir()} >= {"surface_adapters.png", "surface.html"}


def test_a_trajectory_goes_through_its_checkpoints_in_order(folders, here):
    assert main(command("trajectory", folders, ["run"], "--points", "5", "--error", "0", "--space", "lora")) == 0
    rows = pd.read_parquet("rows.parquet")
    assert rows.loc[rows["quantity"] == "mark", "label"].tolist() == ["step 5", "step 10", "step 20", "step 100"]
    assert rows.loc[rows["quantity"] == "explained_variance", "value"].between(0, 1).all()
    assert json.loads((here / "rows.json").read_text())["label"] == "run"


def test_every_pair_is_connected(folders):
    assert main(command("connect", folders, "abc", "--points", "5")) == 0
    rows = pd.read_parquet("rows.parquet")
    assert rows.loc[rows["quantity"] == "barrier", "label"].tolist() == [
        "a, seed 0 – b, seed 0",
        "a, seed 0 – c, seed 0",
        "b, seed 0 – c, seed 0",
    ]
    losses = rows[rows["quantity"] == "loss"]
    ends = losses[losses["radius"].isin([0.0, 1.0])]
    by_adapter = {}
    for _, row in ends.iterrows():
        by_adapter.setdefault(row["label"].split(" – ")[int(row["radius"])], set()).add(row["value"])
    assert all(len(values) == 1 for values in by_adapter.values())


DIES = """
import os, signal, sys
from analysis.landscape.store import PointStore
from bilora.cli.app import main

add, added = PointStore.add, []

def dying(self, key, metrics):
    add(self, key, metrics)
    added.append(key)
    if len(added) == 30:
        os.kill(os.getpid(), signal.SIGKILL)

PointStore.add = dying
main(sys.argv[1:])
"""


def test_a_killed_plane_continues(folders, here):
    arguments = command("adapters", folders, "abc", "--points", "7", "--error", "0")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", DIES, *arguments], env=environment, cwd=here, timeout=300)
    assert done.returncode == -signal.SIGKILL
    store = here / "rows.points.jsonl"
    kept = store.read_bytes()
    assert kept.count(b"\n") == 1 + 30
    assert not (here / "rows.parquet").exists()
    assert main(arguments) == 0
    rows = pd.read_parquet("rows.parquet")
    losses = rows[rows["quantity"] == "loss"]
    final = {(x, y): value for x, y, value in losses[["radius", "y", "value"]].itertuples(index=False)}
    stored = [json.loads(line) for line in kept[: kept.rfind(b"\n")].splitlines()[1:]]
    for (_, x, y), metrics in stored:
        assert (x, y) == (0, 0) or final[x, y] == metrics["loss"]
    assert not store.exists()


def test_lines_between_adapters_are_kept_and_shared_by_workers(folders, here, monkeypatch):
    assert main(command("connect", folders, "abc", "--points", "5", "--error", "0")) == 0
    alone = pd.read_parquet("rows.parquet")
    kept = []

    def stop(self, name):
        def tell(done, most, note):
            kept.append(name)
            if len(kept) == 9:  # 0 to 5 points of the first line, then 0 to 2 of the second
                raise KeyboardInterrupt

        return tell

    with monkeypatch.context() as patch:
        patch.setattr(MeasuringBar, "watch", stop)
        assert main(command("connect", folders, "abc", "--points", "5", "--force")) == 130
    stored = {path.name: path.read_bytes().count(b"\n") - 1 for path in here.glob("*.jsonl")}
    assert stored == {"rows.1-2.points.jsonl": 5, "rows.1-3.points.jsonl": 2}
    evaluated = []
    evaluate = Objective.evaluate
    monkeypatch.setattr(Objective, "evaluate", lambda self, space: evaluated.append(1) or evaluate(self, space))
    assert main(command("connect", folders, "abc", "--points", "5", "--force")) == 0
    assert len(evaluated) == 15 - 7
    pd.testing.assert_frame_equal(pd.read_parquet("rows.parquet"), alone)
    assert not list(here.glob("*.jsonl"))


@pytest.mark.slow
def test_worker_processes_find_the_same_lines(folders):
    assert main(command("connect", folders, "ab", "--points", "5")) == 0
    alone = pd.read_parquet("rows.parquet")
    assert main(command("connect", folders, "ab", "--points", "5", "--workers", "2", "-o", "two.parquet")) == 0
    pd.testing.assert_frame_equal(pd.read_parquet("two.parquet"), alone)


@pytest.mark.parametrize("space", ["all", "lora_balanced"])
@pytest.mark.parametrize("kind", ["adapters", "trajectory", "connect"])
def test_every_space(folders, space, kind):
    names = ["run"] if kind == "trajectory" else "abc"
    assert main(command(kind, folders, names, "--points", "5", "--error", "0", "--space", space)) == 0
    rows = pd.read_parquet("rows.parquet")
    assert set(rows["space"]) == {space}
    assert main(command(kind, folders, names, "--points", "5", "--error", "0", "-o", "full.parquet")) == 0
    full = pd.read_parquet("full.parquet")
    if space == "all":  # what the adapters change is all that differs
        same = rows["quantity"].isin(["loss", "mark", "distance"])
    elif kind == "connect":
        same = (rows["quantity"] == "loss") & rows["radius"].isin([0.0, 1.0])
    else:
        same = rows["quantity"] == "mark"
    assert same.sum() >= 3
    np.testing.assert_allclose(rows.loc[same, "value"], full.loc[same, "value"], rtol=1e-4)


@pytest.mark.parametrize("kind", ["adapters", "connect"])
def test_a_landscape_of_some_examples_says_so_with_its_error(folders, kind):
    assert main(command(kind, folders, "abc", "--points", "5", "--examples", "8")) == 0
    rows = pd.read_parquet("rows.parquet")
    by_quantity = rows.set_index("quantity")["value"]
    assert (by_quantity["examples"], by_quantity["examples_available"]) == (8, 12)
    errors = rows[rows["quantity"] == "subset_error"]
    assert len(errors) == (4 if kind == "adapters" else 3)
    assert (errors["value"] > 0).all()


BAD = {
    "two for a plane": ("adapters", "ab", [], "needs 3 adapters"),
    "one for a line": ("connect", "a", [], "needs 2 adapters"),
    "two runs": ("trajectory", "ab", [], "one run at a time"),
    "no checkpoints": ("trajectory", "a", [], "no checkpoints"),
    "two checkpoints": ("trajectory", ["short"], [], "needs 3 checkpoints or more, not 2"),
    "twice the same": ("connect", "aa", [], "called a"),
    "another rank": ("connect", ["a", "other"], ["--space", "lora"], "differ"),
    "no adapter": ("connect", ["a", "model"], [], "no adapter"),
    "no folder": ("connect", ["a", "nowhere"], [], "holds neither"),
    "unknown kind": ("volume", "abc", [], "kind"),
    "even points": ("adapters", "abc", ["--points", "8"], "odd"),
    "too few points": ("adapters", "abc", ["--points", "3"], "points"),
    "unknown space": ("adapters", "abc", ["--space", "half"], "space"),
    "too many examples": ("adapters", "abc", ["--examples", "9999"], "ask for fewer"),
    "bad error": ("adapters", "abc", ["--error", "2"], "error"),
    "bad precision": ("adapters", "abc", ["--precision", "float8"], "precision"),
    "error of a line": ("connect", "ab", ["--error", "0.1"], "error is a setting of planes"),
    "precision of a line": ("connect", "ab", ["--precision", "bfloat16"], "precision is a setting of planes"),
    "no workers": ("adapters", "abc", ["--workers", "0"], "workers"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_line(folders, here, capsys, case):
    kind, names, more, said = BAD[case]
    assert main(command(kind, folders, names, *more)) == 2
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.strip().splitlines() if line.startswith("error")]
    assert said in line
    assert not (here / "rows.parquet").exists()


@pytest.mark.parametrize(("kind", "names"), [("connect", ["a", "elsewhere"]), ("adapters", ["a", "b", "elsewhere"])])
@pytest.mark.parametrize("space", ["full", "lora"])
def test_adapters_of_different_base_models_are_refused(folders, here, capsys, kind, names, space):
    places = [str(folders / name) for name in names]
    assert main(["landscape", kind, *places, *DATA, "--space", space, "-o", "rows.parquet"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: a, seed 0 and elsewhere, seed 0 were trained on different base models")
    assert not list(here.iterdir())


def test_several_adapters_are_measured_alike_and_told_apart(folders, here):
    arguments = ["measure", *(str(folders / name) for name in "ab"), "--model", str(folders / "model"), *DATA]
    settings = ["--set", "random.directions=3", "--set", "random.radii=[0.1]", "--set", "surface.points=5"]
    assert main([*arguments, "--what", "random,surface", *settings, "-o", "both.parquet", "--figures", "figures"]) == 0
    both = pd.read_parquet("both.parquet")
    assert both.groupby(["method", "seed"]).ngroups == 2
    assert both["method"].unique().tolist() == ["a", "b"]
    alone = ["measure", str(folders / "b"), "--model", str(folders / "model"), *DATA]
    assert main([*alone, "--what", "random,surface", *settings, "-o", "b.parquet"]) == 0
    single = pd.read_parquet("b.parquet")
    pd.testing.assert_frame_equal(
        both[both["method"] == "b"].drop(columns=["method", "seed"]).reset_index(drop=True), single
    )
    assert (here / "figures" / "surface_filter.png").exists()
    assert not list(here.glob("*.jsonl"))
    assert not list(here.glob("*.unfinished.json"))


def test_directions_are_added_until_the_standard_error_asked_for(folders, capsys):
    arguments = ["measure", str(folders / "a"), "--model", str(folders / "model"), *DATA, "--what", "random"]
    settings = ["--space", "full", "--set", "random.radii=[0.3]", "--set", "random.max_directions=24"]
    assert main([*arguments, *settings, "--se", "0.5", "-o", "rows.parquet"]) == 0
    rows = pd.read_parquet("rows.parquet").set_index("quantity")
    mean = rows.loc["loss_rise_mean"]
    reached = mean["standard_error"] <= 0.5 * abs(mean["value"])
    assert rows.loc["reached", "value"] == float(reached)
    assert rows.loc["directions", "value"] == len(rows.loc[["loss_rise"]])
    assert main([*arguments, *settings, "--se", "-1", "-o", "other.parquet"]) == 2
    assert "se" in capsys.readouterr().err
