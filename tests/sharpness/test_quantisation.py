"""Quantised weights against hand computations, bitsandbytes and weights replaced by hand."""

import copy
import math

import pytest
import torch
from torch import nn

from analysis.core import COLUMNS, Objective, WeightSpace
from analysis.sharpness.quantisation import BLOCK, MEASURE, NF4_LEVELS, base_weights, int8, nf4, quantisation
from bilora.adapters.layers import adapted_layers
from bilora.errors import UserError
from tests.oracles import tiny
from tests.sharpness.cases import (
    Fault,
    Quadratic,
    assert_same_bits,
    bert_objective,
    fail_at,
    flat,
    loss_by_sentence,
    losses_by_sentence,
    normal,
    quadratic_objective,
    state,
    tiny_bert,
    with_lora,
)


def by_hand_nf4(weight):
    """Every entry on its own: the nearest of 16 levels in its block."""
    values = weight.flatten().tolist()
    out = []
    for start in range(0, len(values), 64):
        block = values[start : start + 64]
        largest = max(map(abs, block))
        out += [largest * min(NF4_LEVELS, key=lambda c: abs(c - v / largest)) if largest else 0.0 for v in block]
    return torch.tensor(out, dtype=weight.dtype).view_as(weight)


def test_int8_by_hand():
    weight = torch.tensor([[127.0, -63.4, 0.6, 0.0], [0.0, 0.0, 0.0, 0.0], [-2.54, 1.0, 0.009, -0.011]])
    expected = torch.tensor([[127.0, -63.0, 1.0, 0.0], [0.0] * 4, [-2.54, 1.0, 0.0, -0.02]])
    torch.testing.assert_close(int8(weight), expected, rtol=1e-6, atol=0)
    shifted = int8(weight.view(3, 2, 2))
    assert torch.equal(shifted.view(3, 4), int8(weight))


def test_int8_is_off_by_half_a_step_at_most():
    weight = normal(20, 300, seed=1)
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    error = (int8(weight) - weight).abs()
    assert (error <= 0.5 * step * (1 + 1e-12)).all()
    assert float((error / step).square().mean()) == pytest.approx(1 / 12, rel=0.05)  # uniform rounding error
    assert torch.allclose(int8(int8(weight)), int8(weight), rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", [(3, 4), (8, 8), (5, 31), (7, 3, 9)])
def test_nf4_by_hand(shape):
    weight = normal(*shape, seed=2)
    torch.testing.assert_close(nf4(weight), by_hand_nf4(weight), rtol=1e-15, atol=0)


def test_the_levels_of_nf4_are_quantiles_of_the_normal_distribution():
    """Appendix E: quantiles of N(0, 1) at even steps up to an offset, 8 positive and 7 negative ones beside zero."""
    offset = 0.9677083
    quantile = torch.distributions.Normal(0.0, 1.0).icdf
    positive = quantile(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -quantile(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([positive, torch.zeros(1, dtype=torch.float64), negative]).sort().values
    expected = torch.tensor(NF4_LEVELS, dtype=torch.float64)
    torch.testing.assert_close(levels / levels.max(), expected, rtol=0, atol=1e-6)


def test_zero_blocks_stay_zero():
    weight = torch.cat([torch.zeros(2, 32), torch.ones(2, 32)])
    assert torch.equal(nf4(weight), weight)
    assert torch.equal(int8(weight), weight)


@pytest.mark.parametrize("shape", [(48, 64), (30, 50)])  # whole blocks, and a short last one
def test_nf4_is_that_of_bitsandbytes(shape):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = normal(*shape, seed=3).float()
    try:
        packed, how = functional.quantize_4bit(weight, quant_type="nf4", blocksize=BLOCK)
        expected = functional.dequantize_4bit(packed, how)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"bitsandbytes has no 4-bit kernel here: {error}")
    torch.testing.assert_close(nf4(weight), expected, rtol=1e-6, atol=0)


def test_int8_is_that_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = normal(40, 70, seed=4).half()
    try:
        codes, largest, _ = functional.int8_vectorwise_quant(weight)
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        pytest.skip(f"bitsandbytes has no int8 kernel here: {error}")
    expected = codes.double() * largest.double()[:, None] / 127
    torch.testing.assert_close(int8(weight.double()), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("kind", "convert"), [("int8", int8), ("nf4", nf4)])
def test_the_rise_on_a_quadratic_is_exact(kind, convert):
    model = Quadratic()
    objective, x = quadratic_objective()
    result = quantisation(objective, WeightSpace.all(model), kinds=[kind])
    theta = model.theta().detach()
    eps = torch.cat([(convert(model.layer.weight.detach()) - model.layer.weight.detach()).flatten(), torch.zeros(3)])
    g = model.H @ (theta - x.mean(0))
    (found,) = result.results
    assert found.loss_rise == pytest.approx(float(g @ eps + 0.5 * eps @ model.H @ eps), rel=1e-9)
    assert found.norm == pytest.approx(float(eps.norm()), rel=1e-12)
    assert found.norm > 0


def test_merged_and_base_on_a_padded_bert_against_weights_replaced_by_hand():
    model = with_lora(tiny_bert())
    objective, space = bert_objective(), WeightSpace.full(model)
    result = quantisation(objective, space, kinds=["int8", "nf4", "int8 base", "nf4 base"])
    assert [found.kind for found in result.results] == ["int8", "nf4", "int8 base", "nf4 base"]
    merged = copy.deepcopy(model).merge_and_unload()
    exact = float(loss_by_sentence(merged).detach())
    assert result.base_metrics["loss"] == pytest.approx(exact, rel=1e-12)
    for found in result.results:
        convert = int8 if found.kind.startswith("int8") else nf4
        if found.kind.endswith("base"):  # the deployed form: a quantised base model that carries its adapter
            moved, squares = copy.deepcopy(model), 0.0
            with torch.no_grad():
                for layer in adapted_layers(moved).values():
                    rounded = convert(layer.base_weight.detach())
                    squares += float((rounded - layer.base_weight).square().sum())
                    layer.base_weight.copy_(rounded)
        else:
            moved, squares = copy.deepcopy(merged), 0.0
            with torch.no_grad():
                for name in space.parameters:
                    weight = moved.get_parameter(name)
                    rounded = convert(weight.detach())
                    squares += float((rounded - weight).square().sum())
                    weight.copy_(rounded)
        assert found.loss_rise == pytest.approx(float(loss_by_sentence(moved).detach()) - exact, rel=1e-7)
        assert found.norm == pytest.approx(math.sqrt(squares), rel=1e-8)
        assert 0 <= found.metrics["accuracy"] <= 1
    assert result.results[1].norm > 5 * result.results[0].norm  # 16 levels against 255


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_base_weights_are_those_below_the_adapter(dtype):
    model = tiny.with_lora(tiny.bert(dtype))
    bases = base_weights(WeightSpace.full(model))
    layers = adapted_layers(model)
    assert bases.keys() == {f"{name}.weight" for name in layers}
    for name, layer in layers.items():
        got, expected = bases[f"{name}.weight"], layer.base_weight.detach()
        torch.testing.assert_close(got, expected, rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_without_factors_there_is_the_merged_form_alone():
    objective = bert_objective()
    for model in (tiny_bert(), tiny.with_lora(tiny_bert(), use_dora=True)):
        space = WeightSpace.full(model)
        assert base_weights(space) is None
        result = quantisation(objective, space)
        assert [found.kind for found in result.results] == ["int8", "nf4"]
        assert quantisation(objective, space, kinds=["nf4 base"]).rows() == []


def test_the_error_of_a_rise_is_over_sentences():
    model = tiny_bert()
    space = WeightSpace.full(model)
    result = quantisation(bert_objective(), space, kinds=["int8"])
    alone = losses_by_sentence(model)
    with torch.no_grad():
        for name in space.parameters:
            weight = model.get_parameter(name)
            weight.copy_(int8(weight))
    rises = (losses_by_sentence(model) - alone).detach()
    found = result.results[0]
    assert found.loss_rise == pytest.approx(float(rises.mean()), rel=1e-6)
    assert found.standard_error == pytest.approx(float(rises.std() / 7**0.5), rel=1e-6)
    assert result.rows()[-1]["standard_error"] == found.standard_error


def test_rows():
    model, seen = with_lora(tiny_bert()), []
    space = WeightSpace.full(model)
    settings = MEASURE.settings()
    result = MEASURE.run(bert_objective(), space, settings, None, lambda *progress: seen.append(progress))
    rows = result.rows()
    assert all(tuple(r) == COLUMNS for r in rows)
    assert [(r["kind"], r["quantity"]) for r in rows] == [
        (kind, quantity)
        for kind in ("int8", "nf4", "nf4 base")
        for quantity in ("loss", "accuracy", "matthews", "loss_rise")
    ]
    assert {(r["measure"], r["space"], r["split"]) for r in rows} == {("quantisation", "full", "validation")}
    for found in result.results:
        of_kind = {r["quantity"]: r for r in rows if r["kind"] == found.kind}
        assert of_kind["loss"]["value"] == found.metrics["loss"]
        assert of_kind["loss_rise"]["value"] == found.metrics["loss"] - result.base_metrics["loss"]
        assert of_kind["loss"]["induced_norm"] == found.norm
    assert seen == [(i, 4, "losses") for i in range(1, 5)]
    assert quantisation(bert_objective(), space).rows() == rows


@pytest.mark.parametrize("call", [1, 2, 4, 8])
def test_weights_come_back_bit_for_bit(call):
    model = with_lora(tiny_bert(torch.float32))
    theirs, space, objective = state(model), WeightSpace.full(model), bert_objective()
    before = state(space.model)
    quantisation(objective, space)
    assert_same_bits(space.model, before)
    hook = fail_at(space.model, call)
    with pytest.raises(Fault):
        quantisation(objective, space)
    hook.remove()
    assert_same_bits(space.model, before)
    assert_same_bits(model, theirs)


class Logarithm(nn.Module):
    """A loss that is not finite where a weight is rounded to zero."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            self.layer.weight.copy_(torch.tensor([[1.0, 1e-4]]))

    def forward(self, x):
        return {"loss": -self.layer.weight.log().sum() + 0 * x.mean()}


def test_an_infinite_loss_stays_visible():
    result = quantisation(Objective([{"x": torch.zeros(2, 1)}]), WeightSpace.full(Logarithm()), kinds=["int8"])
    assert result.results[0].loss_rise == math.inf
    assert [r["value"] for r in result.rows()] == [math.inf, math.inf]


def test_errors_are_one_line():
    model, (objective, _) = with_lora(tiny_bert()), quadratic_objective()
    for build, settings, word in (
        (lambda: WeightSpace.full(model), {"kinds": ["int4"]}, "kinds.0"),
        (lambda: WeightSpace.full(model), {"kinds": []}, "kinds"),
        (lambda: WeightSpace.lora(model), {}, "full space"),
        (lambda: WeightSpace.lora_balanced(model), {}, "full space"),
        (lambda: WeightSpace.named(Quadratic(), r".*bias"), {}, "nothing to quantise"),
    ):
        with pytest.raises(UserError, match=word) as error:
            quantisation(objective, build(), **settings)
        assert "\n" not in str(error.value)


def test_parameters_of_one_dimension_stay_exact():
    model = Quadratic()
    space = WeightSpace.all(model)
    bias, seen = model.layer.bias.detach().clone(), []
    space.model.register_forward_pre_hook(lambda module, arguments: seen.append(module.layer.bias.detach().clone()))
    quantisation(quadratic_objective()[0], space, kinds=["nf4"])
    assert len(seen) == 4
    assert all(torch.equal(found, bias) for found in seen)
    assert flat(dict(space.parameters)).shape == (15,)
