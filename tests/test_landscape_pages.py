"""The examples of docs/sharpness.md and docs/landscapes.md run as they stand, and what the pages warn of holds."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import typer

from analysis import Objective, WeightSpace, random_sharpness
from analysis.plots import FIGURES, FILES
from analysis.registry import MEASURES
from analysis.study.landscapes import LandscapeSpec
from analysis.study.presets import preset_named
from bilora.cli import measure
from bilora.cli.app import app
from bilora.cli.options import parse_assignments
from tests.oracles import tiny

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [DOCS / "sharpness.md", DOCS / "landscapes.md"]


@pytest.fixture(scope="module")
def objective():
    return Objective([tiny.padded(part) for part in tiny.split(tiny.examples())])


def run_examples(page, names):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(compile(block, str(page), "exec"), names)
    return names


def test_the_examples_of_sharpness_run(objective):
    model = tiny.with_lora(tiny.bert())
    names = run_examples(PAGES[0], {"objective": objective, "model": model, "space": WeightSpace.full(model)})
    for point, step in zip(names["worst"].points, names["step"].points, strict=True):
        np.testing.assert_allclose(point.one_step, step.loss_rise, rtol=1e-6)
        assert point.lower_bound >= point.one_step
    noise = names["noise"]
    np.testing.assert_allclose(noise.standard_error / noise.mean, names["c"] / noise.rises.shape[1] ** 0.5)
    assert names["groups"].kind == "m=7"
    assert len(names["rounded"].results) == 3
    assert names["analogue"].kind == "base"


def test_the_examples_of_landscapes_run(objective, tmp_path):
    def trained(seed):
        return tiny.with_lora(tiny.bert(), seed=seed)

    for step, seed in ((8, 3), (16, 4), (100, 5)):
        trained(seed).save_pretrained(tmp_path / "run" / f"checkpoint-{step}")
    models = [trained(seed) for seed in (1, 2, 3)]
    names = run_examples(
        PAGES[1],
        {
            "objective": objective,
            "models": models,
            "space": WeightSpace.full(models[0]),
            "base_model": tiny.bert,
            "folder": tmp_path,
        },
    )
    drawn = {path.name for path in tmp_path.iterdir() if path.is_file() and path.stat().st_size > 5_000}
    assert drawn == {"lines.png", "surface.png", "surface.html", "plane.png", "line.png"}
    truth = [objective.loss(WeightSpace.full(model)) for model in models]
    np.testing.assert_allclose([mark.loss for mark in names["plane"].marks], truth, rtol=1e-6)
    np.testing.assert_allclose(names["line"].losses[[0, -1]], truth[:2], rtol=1e-6)
    assert names["run"].labels == ("step 8", "step 16", "step 100")
    np.testing.assert_allclose(sum(names["path"].explained), 1.0)  # two offsets from the last lie in one plane
    assert np.isfinite(names["road"].losses).all()
    assert np.isfinite(names["bowl"].losses).all()


def test_the_gauge_moves_factors_and_neither_balanced_factors_nor_full_space(objective):
    def rises(model):
        spaces = (WeightSpace.full(model), WeightSpace.lora(model), WeightSpace.lora(model, gauge="balanced"))
        settings = {"kind": "isotropic", "directions": 4, "seed": 0}
        return [float(random_sharpness(objective, space, [0.2], **settings).mean[0]) for space in spaces]

    model = tiny.with_lora(tiny.bert())
    full, lora, balanced = rises(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(4 if "lora_A" in name else 1 / 4 if "lora_B" in name else 1)
    again = rises(model)
    np.testing.assert_allclose([again[0], again[2]], [full, balanced], rtol=1e-6)
    assert abs(again[1] / lora - 1) > 0.5


def test_five_directions_at_the_coefficient_of_variation_named():
    text = PAGES[0].read_text(encoding="utf-8")
    variation, five, needed = re.search(
        r"At c = ([\d.]+) five directions give ±(\d+) %, and\s+10 % needs (\d+)", text
    ).groups()
    assert round(100 * float(variation) / 5**0.5) == int(five)
    assert round((float(variation) / 0.1) ** 2) == int(needed)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_the_commands_are_accepted(page):
    lines = re.findall(r"^bilora (measure|landscape|plot) (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert {command for command, _ in lines} >= {"measure", "plot"}
    commands = typer.main.get_command(app).commands
    for command, rest in lines:
        given = commands[command].make_context(command, shlex.split(rest)).params  # refuses what it does not know
        if command == "measure":
            published = given["preset"] and preset_named(given["preset"])
            wanted = (published.what if published else given["what"]).split(",")
            assigned = parse_assignments(given["settings"], "--set") | dict(published.settings if published else {})
            common = {"split": given["split"], "examples": given["examples"], "batch_size": given["batch_size"]}
            spaces = given["space"].split(",") if given["space"] else []
            assert [entry.measure for entry in measure._entries(wanted, spaces, common, assigned)] == wanted
        elif command == "landscape":
            names = ("kind", "space", "split", "examples", "batch_size", "points", "precision", "workers")
            LandscapeSpec(**{name: given[name] for name in names}).check_count(len(given["folders"]))
        if command != "plot":
            assert given["output"].suffix == ".parquet"


@pytest.mark.parametrize(
    "line",
    ["landscape adapters A B C", "measure A --whta random -o rows.parquet", "landscape connect A -o rows.parquet"],
)
def test_commands_that_are_wrong_would_be_noticed(line, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"bilora measure A --what random -o rows.parquet\nbilora {line}\nbilora plot rows.parquet\n")
    with pytest.raises(Exception, match=r"Missing|No such option|needs 2 adapters"):
        test_the_commands_are_accepted(page)


def test_measures_figures_and_linked_files_exist():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", text):
            assert (page.parent / target).exists(), target
        for name in re.findall(r"figures/(\w+)\.png", text):
            assert name in {family.name for family in FIGURES}, name
    for name in re.findall(r"^\| `(\w+)`, `\w+` \|", PAGES[0].read_text(encoding="utf-8"), flags=re.MULTILINE):
        assert name in MEASURES, name
    assert {"surface.html", "surface.vtu"} <= FILES.keys()
    assert {"landscape", "surface"} <= MEASURES.keys()
