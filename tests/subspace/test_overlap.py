"""Overlap of two adapters, layer by layer."""

import math

import pytest
import torch

from analysis.core import COLUMNS, Factors, Trained, WeightSpace
from analysis.subspace.overlap import subspace_overlap
from analysis.subspace.perturbations import induced
from bilora.errors import UserError
from tests.sharpness.cases import change_gauge, normal, randomise_factors, tiny_bert, with_lora


def factors(m, n, r, seed, scale=2.0):
    return Factors(normal(m, r, seed=seed), normal(r, n, seed=seed + 1), scale)


def test_planted_overlap_layer_by_layer_and_mean():
    """One of two directions shared in columns, all in rows; then nothing shared."""
    basis = torch.linalg.qr(normal(12, 12, seed=0)).Q
    mix = normal(2, 2, seed=1)
    first = {
        "a": Factors(basis[:, :2] @ mix, basis[:2], 1.0),
        "b": Factors(basis[:, :2], basis[:2], 1.0),
    }
    second = {
        "a": Factors(basis[:, 1:3], mix @ basis[:2], 3.0),
        "b": Factors(basis[:, 4:6] @ mix, basis[7:9], 3.0),
    }
    result = subspace_overlap(first, second)
    found = {(x.layer, x.side): x for x in result.layers}
    assert found["a", "column"].overlap == pytest.approx(0.5, abs=1e-12)
    assert found["a", "row"].overlap == pytest.approx(1.0, abs=1e-12)
    assert found["b", "column"].overlap == pytest.approx(0.0, abs=1e-12)
    assert found["a", "column"].angles == pytest.approx((0, math.pi / 2), abs=1e-10)
    assert found["a", "row"].angles == pytest.approx((0, 0), abs=1e-10)
    assert {x.chance for x in result.layers} == {2 / 12}
    assert result.mean("column") == pytest.approx((0.25, 2 / 12), abs=1e-12)
    assert result.mean("row") == pytest.approx((0.5, 2 / 12), abs=1e-12)


def test_chance_takes_the_larger_dimension_and_each_side_its_own_width():
    result = subspace_overlap({"a": factors(20, 50, 3, 2)}, {"a": factors(20, 50, 5, 4)})
    assert {x.side: x.chance for x in result.layers} == {"column": 5 / 20, "row": 5 / 50}


def test_mean_overlap_of_random_adapters_is_chance():
    layers = [f"layer.{i}" for i in range(200)]
    first = {x: factors(24, 16, 2, 10 * i) for i, x in enumerate(layers)}
    second = {x: factors(24, 16, 4, 10 * i + 5) for i, x in enumerate(layers)}
    result = subspace_overlap(first, second)
    for side in ("column", "row"):
        mean, chance = result.mean(side)
        spread = torch.tensor([x.overlap for x in result.layers if x.side == side]).std() / math.sqrt(200)
        assert abs(mean - chance) < 4 * spread
        assert spread < 0.02


def test_an_untrained_factor_has_no_overlap_but_a_chance():
    zero = Factors(torch.zeros(20, 3), normal(3, 50, seed=3).float(), 1.0)
    result = subspace_overlap({"a": zero, "b": factors(20, 50, 3, 6)}, {"a": factors(20, 50, 3, 8), "b": zero})
    for x in result.layers:
        assert math.isnan(x.overlap) == (x.side == "column")
        assert x.chance == pytest.approx(3 / 20 if x.side == "column" else 3 / 50)
    assert all(math.isnan(value) for value in result.mean("column"))


def test_mean_leaves_out_undefined_layers():
    zero = Factors(torch.zeros(20, 3), normal(3, 50, seed=3), 1.0)
    one, other = factors(20, 50, 3, 6), factors(20, 50, 3, 8)
    result = subspace_overlap({"a": zero, "b": one}, {"a": other, "b": other})
    defined = next(x for x in result.layers if x.layer == "b" and x.side == "column")
    assert result.mean("column") == (defined.overlap, defined.chance)


def test_a_bert_adapter_with_its_auxiliary_from_trained_or_space():
    model, other = with_lora(tiny_bert(), seed=5), with_lora(tiny_bert(), seed=6)
    auxiliary = WeightSpace.lora(other).factors
    results = [
        subspace_overlap(Trained(model, auxiliary)),
        subspace_overlap(WeightSpace.lora(model), auxiliary),
        subspace_overlap(WeightSpace.full(model), auxiliary),
        subspace_overlap(WeightSpace.lora(model).factors, auxiliary),
    ]
    assert all(r == results[0] for r in results)
    assert len(results[0].layers) == 2 * len(auxiliary)
    change_gauge(model, 4.0)
    regauged = subspace_overlap(WeightSpace.lora(model), auxiliary)
    assert regauged.mean("row") == pytest.approx(results[0].mean("row"), rel=1e-12)
    randomise_factors(model, seed=7)
    retrained = subspace_overlap(WeightSpace.lora(model), auxiliary)
    assert retrained.mean("row") != pytest.approx(results[0].mean("row"), rel=1e-3)


def test_rows():
    result = subspace_overlap({"a": factors(20, 50, 3, 2)}, {"a": factors(20, 50, 5, 4)})
    rows = result.rows()
    assert all(tuple(r) == COLUMNS for r in rows)
    named = {(r["quantity"], r["kind"], r["layer"]): r for r in rows}
    angles = {(r["kind"], r["index"]): r["value"] for r in rows if r["quantity"] == "principal_angle"}
    for x in result.layers:
        assert tuple(angles[x.side, i] for i in (1, 2, 3)) == x.angles
        assert named["overlap", x.side, "a"]["value"] == named["overlap", x.side, ""]["value"] == x.overlap
        assert named["overlap", x.side, ""]["chance"] == x.chance
        assert named["overlap_p_value", x.side, "a"]["value"] == x.p_value
        assert named["above_chance", x.side, ""]["value"] == float(x.p_value <= 0.05)
    assert len(rows) == 14
    assert {(r["measure"], r["space"]) for r in rows} == {("subspace", "lora")}


@pytest.mark.parametrize(
    ("first", "second", "word"),
    [
        ({"a": factors(5, 6, 2, 1)}, None, "auxiliary"),
        ({"a": factors(5, 6, 2, 1)}, {}, "auxiliary"),
        ({}, {"a": factors(5, 6, 2, 1)}, "LoRA"),
        ({"a": factors(5, 6, 2, 1)}, {"b": factors(5, 6, 2, 1)}, "different layers"),
        ({"a": factors(5, 6, 2, 1)}, {"a": factors(5, 7, 2, 1)}, "another shape"),
    ],
)
def test_bad_input_is_one_line(first, second, word):
    with pytest.raises(UserError, match=word) as error:
        subspace_overlap(first, second)
    assert "\n" not in str(error.value)


def test_the_space_of_a_perturbation_is_compared_like_a_pair():
    """LoRA-SAM's [B, eps_B] holds Col(B), and its rows hold eps_A and A + eps_A, hence Row(A)."""
    primary = factors(40, 50, 3, 2)
    eps = induced(primary, normal(40, 3, seed=7), normal(3, 50, seed=8))
    found = subspace_overlap({"a": primary}, {"a": Factors(eps.left, eps.right, 1.0)})
    for x in found.layers:
        assert x.overlap == pytest.approx(1, abs=1e-9)
        assert x.p_value == 1 / 1000
        assert x.angles == pytest.approx((0, 0, 0), abs=1e-6)
