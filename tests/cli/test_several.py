"""``bilora measure`` of several methods and training seeds: directions, pairs and intervals."""

import json
from pathlib import Path

import pandas as pd
import pytest
from scipy import stats

from analysis import Objective, WeightSpace, random_sharpness
from analysis.core import load_trained
from bilora.cli.app import main
from bilora.cli.measuring_bar import MeasuringBar
from bilora.tasks import TaskSpec, load_model, load_task, load_tokenizer
from tests.cli.small import DATA, save_adapter, save_model

RANDOM = ["--what", "random", "--space", "full", "--set", "random.directions=4", "--set", "random.radii=[0.3]"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One adapter under the methods lora and bilora and the seeds 0 and 1; ``other`` and ``later`` are another."""
    root = tmp_path_factory.mktemp("several")
    save_model(root / "model")
    for method in ("lora", "bilora"):
        for seed in (0, 1):
            save_adapter(root / f"{method}{seed}", root / "model", 3, record=(method, seed))
    save_adapter(root / "other", root / "model", 4, record=("bilora", 0))
    save_adapter(root / "later", root / "model", 4, record=("bilora", 7))
    save_adapter(root / "foreign", root / "model", 5)
    return root


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def measured(folders, names, *more, output="rows.parquet"):
    assert main(["measure", *(str(folders / name) for name in names), *DATA, *RANDOM, *more, "-o", output]) == 0
    return pd.read_parquet(output)


def rises(rows, method, seed):
    chosen = rows[(rows["quantity"] == "loss_rise") & (rows["method"] == method) & (rows["seed"] == seed)]
    return chosen.sort_values("index")["value"].tolist()


def test_every_training_seed_has_directions_of_its_own_and_methods_share_them(folders):
    rows = measured(folders, ["lora0", "lora1", "bilora0", "bilora1"])
    for seed in (0, 1):
        assert rises(rows, "lora", seed) == rises(rows, "bilora", seed)
    assert not set(rises(rows, "lora", 0)) & set(rises(rows, "lora", 1))

    base = load_model(str(folders / "model"), "classification", 2)
    tokenizer = load_tokenizer(str(folders / "model"))
    task = load_task(
        TaskSpec(data="rotten_tomatoes", train_examples=12, validation_examples=12, max_length=16), tokenizer
    )
    objective = Objective.from_dataset(task.validation, task.collate, batch_size=4)
    space = WeightSpace.full(load_trained(folders / "lora1", base).model)
    drawn = random_sharpness(objective, space, [0.3], kind="filter", directions=4, seed=1)
    assert rises(rows, "lora", 1) == drawn.rises[0].tolist()


def test_one_of_several_seeds_is_measured_as_among_them(folders):
    together = measured(folders, ["lora0", "lora1"])
    alone = measured(folders, ["lora1"], output="alone.parquet")
    second = together[together["seed"] == 1].drop(columns=["method", "seed"]).reset_index(drop=True)
    pd.testing.assert_frame_equal(second, alone)
    assert json.loads(Path("alone.json").read_text())["determinants"]["measures"][0]["settings"]["seed"] == 1


SURFACE = ["--what", "surface", "--set", "target_rise=0.02", "--set", "points=5", "--set", "error=null", *DATA]


def surfaces(folders, names, *more, output="surfaces.parquet"):
    """The losses of a measurement of surfaces, each adapter's with its extent."""
    assert main(["measure", *(str(folders / name) for name in names), *SURFACE, *more, "-o", output]) == 0
    rows = pd.read_parquet(output)
    return rows[rows["quantity"] == "loss"].reset_index(drop=True)


def test_surfaces_of_several_adapters_share_the_window_of_the_widest(folders):
    """Each alone reaches the rise in a window of its own; together they take the larger."""
    alone = {
        name: surfaces(folders, [name], "--space", "full", output=f"{name}.parquet")["radius"].max()
        for name in ("lora0", "other")
    }
    assert alone["lora0"] != alone["other"]
    together = surfaces(folders, ["lora0", "other"], "--space", "full")
    assert set(together.groupby("method")["radius"].max()) == {max(alone.values())}


def test_the_common_window_is_that_of_the_planes_measured(folders):
    """Planes of training seed 1, on which the rise is reached elsewhere than on those of seed 0."""
    first, second = (
        surfaces(folders, [name], "--space", "lora", output=f"{name}.parquet") for name in ("lora0", "lora1")
    )
    together = surfaces(folders, ["lora1", "bilora1"], "--space", "lora")
    assert first["radius"].max() != second["radius"].max()
    assert set(together.groupby("method")["radius"].max()) == {second["radius"].max()}


def test_a_model_without_lora_space_shares_the_window_in_full_space(folders, here):
    base = load_model(str(folders / "model"), "classification", 2)
    load_trained(folders / "other", base).model.merge_and_unload().save_pretrained(here / "whole")
    load_tokenizer(str(folders / "model")).save_pretrained(here / "whole")
    found = surfaces(folders, ["lora0", here / "whole"])
    spaces = {method: set(rows["space"]) for method, rows in found.groupby("method")}
    assert spaces == {"lora": {"full", "lora"}, "whole": {"full"}}
    assert found[found["space"] == "full"].groupby("method")["radius"].max().nunique() == 1


@pytest.mark.slow
def test_the_common_window_is_the_same_with_workers_and_when_resumed(folders, here, monkeypatch):
    names = ["other", "lora0"]
    once = surfaces(folders, names)
    by_workers = surfaces(folders, names, "--set", "workers=2", output="workers.parquet")
    pd.testing.assert_frame_equal(by_workers, once)

    kept = []

    def stop(self, name):
        def tell(done, most, note):
            kept.append(name)
            if name.startswith("lora, seed 0") and done > 5:
                raise KeyboardInterrupt

        return tell

    subjects = [str(folders / name) for name in names]
    with monkeypatch.context() as patch:
        patch.setattr(MeasuringBar, "watch", stop)
        assert main(["measure", *subjects, *SURFACE, "-o", "stopped.parquet"]) == 130
    assert kept[0].startswith("bilora, seed 0")
    assert list(here.glob("stopped*.points.jsonl"))
    pd.testing.assert_frame_equal(surfaces(folders, names, output="stopped.parquet"), once)
    assert not list(here.glob("*.jsonl"))


def test_adapters_called_by_their_folders_keep_their_seeds(folders):
    rows = measured(folders, ["bilora0", "other", "bilora1", "foreign"])
    names = rows[["method", "seed"]].drop_duplicates().itertuples(index=False, name=None)
    assert list(names) == [("bilora0", 0), ("other", 0), ("bilora", 1), ("foreign", 0)]


def test_differences_of_one_seed_are_over_its_directions_and_say_so(folders, here, capsys):
    rows = measured(folders, ["other", "lora0"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "differences to lora" in printed
    assert "4 directions" in printed
    assert "over directions: of these trained models alone" in printed
    differences = pd.read_parquet("rows.differences.parquet")
    row = differences[differences["quantity"] == "loss_rise"].iloc[0]
    expected = stats.ttest_rel(rises(rows, "bilora", 0), rises(rows, "lora", 0))
    assert (row["method"], row["baseline"], row["over"]) == ("bilora", "lora", "directions")
    interval = expected.confidence_interval(0.95)
    assert (row["low"], row["high"]) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert row["p_value"] == pytest.approx(expected.pvalue)
    written = (here / "rows.differences.parquet").read_bytes()
    measured(folders, ["other", "lora0"])
    assert (here / "rows.differences.parquet").read_bytes() == written


def test_differences_of_several_seeds_are_over_seeds(folders, capsys):
    measured(folders, ["lora0", "lora1", "other", "bilora1"])
    row = pd.read_parquet("rows.differences.parquet").set_index("quantity").loc["loss_rise"]
    assert (row["over"], row["n_seeds"], row["n_directions"]) == ("seeds", 2, 4)
    assert "2 seeds" in " ".join(capsys.readouterr().out.split())


def test_no_differences_without_a_shared_seed_or_of_one_method(folders, here, capsys):
    measured(folders, ["lora0", "later"])
    assert "no two methods share a training seed" in " ".join(capsys.readouterr().out.split())
    measured(folders, ["lora0", "lora1"], output="one.parquet")
    assert not list(here.glob("*.differences.parquet"))


def test_a_file_in_the_way_of_differences_is_not_written_over(folders, here, capsys):
    (here / "rows.differences.parquet").write_text("mine")
    places = [str(folders / name) for name in ("lora0", "bilora0")]
    assert main(["measure", *places, *DATA, *RANDOM, "-o", "rows.parquet"]) == 2
    assert "in the way of the differences" in capsys.readouterr().err
    assert [path.name for path in here.iterdir()] == ["rows.differences.parquet"]
    assert (here / "rows.differences.parquet").read_text() == "mine"


def test_the_space_of_all_parameters(folders):
    assert set(measured(folders, ["lora0"], "--space", "all")["space"]) == {"all"}


@pytest.mark.parametrize(("preset", "figure"), [("figure4", "landscape"), ("table-a6", "adversarial_accuracy")])
def test_a_published_result_is_one_command(folders, here, preset, figure):
    places = [str(folders / name) for name in ("lora0", "bilora0")]
    fewer = ["--set", "points=5", "--set", "directions=2"] if preset == "figure4" else []
    command = ["measure", *places, *DATA, "--preset", preset, *fewer, "-o", "rows.parquet", "--figures", "figures"]
    assert main(command) == 0
    rows = pd.read_parquet("rows.parquet")
    assert set(rows["space"]) == {"full", "lora"}
    if preset == "figure4":
        assert sorted(rows.loc[rows["quantity"] == "loss", "radius"].unique()) == [-1.0, -0.5, 0.0, 0.5, 1.0]
    else:
        accuracy = rows[rows["quantity"] == "accuracy"]
        assert sorted(accuracy["radius"].unique()) == [0.0, 0.5, 1.0, 2.5, 4.0, 5.0]
    drawn = {path.name for path in (here / "figures").iterdir()}
    assert drawn == {f"{figure}.{ending}" for ending in ("png", "pdf", "svg", "csv", "json", "parquet")}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--preset", "figure5"], "choose one of figure4, table-a6"),
        (["--preset", "figure4", "--what", "random"], "--what"),
    ],
)
def test_bad_presets_are_refused(folders, here, capsys, more, said):
    assert main(["measure", str(folders / "lora0"), *DATA, *more, "-o", "rows.parquet"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line
    assert not list(here.iterdir())
