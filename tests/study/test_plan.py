"""Addresses: equal for equal work, different for anything that could change a number."""

from collections.abc import Callable
from pathlib import Path

import pytest

from analysis.study import plan as planning
from analysis.study.plan import Cell, Plan, plan_study
from analysis.study.spec import read_study
from bilora.errors import UserError

Write = Callable[..., Path]


@pytest.fixture
def planned(study_file: Write) -> Callable[..., Plan]:
    def plan(replacements: dict[str, str] | None = None) -> Plan:
        return plan_study(read_study(study_file(replacements)))

    return plan


def cells(plan: Plan, kind: str) -> dict[str, Cell]:
    return {cell.label: cell for cell in plan.cells if cell.kind == kind}


def names(plan: Plan) -> dict[str, str]:
    return {cell.label: cell.name for cell in plan.cells}


def test_every_method_is_trained_and_measured_everywhere(planned: Callable[..., Plan]) -> None:
    plan = planned({"seeds: [0]": "seeds: [0, 1]"})
    assert list(cells(plan, "training")) == [
        f"{method}, seed {seed}: training" for method in ("LoRA", "Bi-LoRA") for seed in (0, 1)
    ]
    assert len(cells(plan, "measure")) == 4 * 3  # quality; random in two spaces
    assert [(p.method, p.seed) for p in plan.placements[::3]] == [
        ("LoRA", 0),
        ("LoRA", 1),
        ("Bi-LoRA", 0),
        ("Bi-LoRA", 1),
    ]
    assert len({cell.name for cell in plan.cells}) == len(plan.cells)


def test_the_same_work_has_the_same_address(planned: Callable[..., Plan]) -> None:
    plain = names(planned())
    spelled_out = {
        "rho: 0.05": "rho: 5.0e-2",  # another spelling
        "{method: lora}": "{method: lora, training: {max_steps: 4}}",  # the study's own value
        "directions: 2": "directions: 2, seed: 0, spaces: [lora, full]",  # defaults
        "name: tiny": "name: other",
    }
    assert names(planned(spelled_out)) == plain


def test_methods_share_their_draws_and_training_seeds_have_their_own(planned: Callable[..., Plan]) -> None:
    seeds: dict[int, set[int]] = {}
    for placement in planned({"seeds: [0]": "seeds: [0, 1]"}).placements:
        settings = placement.cell.determinants["settings"]
        if "seed" in settings:
            seeds.setdefault(placement.seed, set()).add(settings["seed"])
    assert len(seeds) > 1
    assert all(len(drawn) == 1 for drawn in seeds.values())
    assert len(set.union(*seeds.values())) == len(seeds)


def test_labels_may_share_a_training(planned: Callable[..., Plan]) -> None:
    plan = planned({"{method: lora}": "{method: lora}\n  again: {method: lora}"})
    assert len(cells(plan, "training")) == 2
    assert len(plan.placements) == 3 * 3


ALL, BILORA, RANDOM = {"training", "measure"}, {"Bi-LoRA"}, {"random"}


@pytest.mark.parametrize(
    ("replacements", "changed"),
    [
        ({"max_length: 16": "max_length: 15"}, ALL),
        ({"lora: {r: 4}": "lora: {r: 3}"}, ALL),
        ({"max_steps: 4": "max_steps: 5"}, ALL),
        ({"seeds: [0]": "seeds: [1]"}, ALL),
        ({"rho: 0.05": "rho: 0.06"}, BILORA),
        ({"radii: [0.2]": "radii: [0.3]"}, RANDOM),
        ({"examples: 4": "examples: 5"}, RANDOM),
        ({"kind: filter": "kind: filter, batch_size: 2"}, RANDOM),
    ],
)
def test_a_change_reaches_the_cells_it_can_change(
    planned: Callable[..., Plan], replacements: dict[str, str], changed: set[str]
) -> None:
    before, after = planned(), planned(replacements)
    pairs = zip(before.cells, after.cells, strict=True)
    different = [old.label for old, new in pairs if old.address != new.address]
    if changed == ALL:
        assert len(different) == len(before.cells)
    else:
        (word,) = changed
        assert different == [cell.label for cell in before.cells if word in cell.label]


def test_content_counts_and_place_does_not(planned: Callable[..., Plan], tmp_path: Path) -> None:
    def plan_with(file: Path) -> set[str]:
        return set(names(planned({"data: rotten_tomatoes": f"data: {file}"})).values())

    one, two = tmp_path / "one.csv", tmp_path / "two"
    two.mkdir()
    one.write_text("text,label\ngood,1\nbad,0\n")
    (two / "one.csv").write_text(one.read_text())
    first = plan_with(one)
    assert plan_with(two / "one.csv") == first
    one.write_text("text,label\ngood,1\nworse,0\n")
    assert not plan_with(one) & first


def test_code_versions_and_device_count(planned: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    before = planned()
    monkeypatch.setattr(planning, "measure_code", lambda module: "edited" if module.endswith("random") else "same")
    monkeypatch.setattr(planning, "_device_kind", lambda: "cpu")
    edited = planned()
    for old, new in zip(before.cells, edited.cells, strict=True):
        assert (old.address == new.address) == (old.kind == "training")
    monkeypatch.setattr(planning, "library_versions", lambda: {"torch": "0"})
    assert not set(names(planned()).values()) & set(names(edited).values())


def test_full_fine_tuning_has_no_lora_space(planned: Callable[..., Plan]) -> None:
    plan = planned({"{method: lora}": "{method: full}"})
    assert "LoRA, seed 0: random lora (validation)" not in cells(plan, "measure")
    assert "LoRA, seed 0: random full (validation)" in cells(plan, "measure")
    training = cells(plan, "training")["LoRA, seed 0: training"]
    assert "lora" not in training.determinants


def test_recorded_studies(planned: Callable[..., Plan], study_file: Write) -> None:
    """Recording is part of what a training is asked for; full fine-tuning has nothing to record and no adapter."""
    quality = "  - {measure: quality, examples: 8}"
    more = {quality: f"{quality}\n  - {{measure: dynamics}}\n  - {{measure: update}}"}
    with pytest.raises(UserError, match=r"measures\.1: dynamics needs recorded runs: set record"):
        read_study(study_file(more))
    both = {"LoRA: {method: lora}": "LoRA: {method: lora}\n  Full: {method: full}"}
    recorded = planned({**more, **both, "model: minilm": "model: minilm\nrecord: 2"})
    labels = set(cells(recorded, "measure"))
    assert {"LoRA, seed 0: dynamics (validation)", "LoRA, seed 0: update (validation)"} <= labels
    assert not any(label.startswith("Full") and ("dynamics" in label or "update" in label) for label in labels)
    plain = cells(planned(both), "training")
    again = cells(recorded, "training")
    assert plain["LoRA, seed 0: training"].name != again["LoRA, seed 0: training"].name
    assert plain["Full, seed 0: training"].name == again["Full, seed 0: training"].name
    assert again["LoRA, seed 0: training"].compute.record_every == 2
    assert again["Full, seed 0: training"].compute.record_every is None
