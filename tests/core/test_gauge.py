"""The balanced gauge against dense decompositions, and what it leaves alone."""

import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from analysis.core import Factors, Objective, WeightSpace, gaussian
from analysis.core.gauge import balanced
from analysis.registry import MEASURES
from analysis.sharpness.adversarial import adversarial_sharpness
from analysis.sharpness.random import random_sharpness
from analysis.study.spec import MeasureEntry
from bilora.cli.app import main
from bilora.errors import UserError
from bilora.tasks import load_tokenizer
from tests.oracles import tiny
from tests.sharpness.cases import assert_same_bits, change_gauge, normal, state

BATCHES = [tiny.padded(part) for part in tiny.split(tiny.examples())]
SHAPES = {
    "tall": (9, 6, 2),
    "wide": (5, 11, 3),
    "r over out": (2, 7, 4),
    "r over in": (7, 2, 4),
    "r over both": (3, 2, 5),
}


def drawn(m, n, r, scale=0.7, seed=1):
    return Factors(normal(m, r, seed=seed), normal(r, n, seed=seed + 1), scale)


@pytest.mark.parametrize(("m", "n", "r"), SHAPES.values(), ids=SHAPES)
def test_balanced_factors_share_the_singular_values_of_the_product(m, n, r):
    factors = drawn(m, n, r)
    pair = balanced(factors)
    product = factors.B @ factors.A
    torch.testing.assert_close(pair.B @ pair.A, product, rtol=0, atol=1e-13)
    singular = torch.linalg.svdvals(product)
    expected = torch.zeros(r, dtype=torch.float64)
    expected[: min(r, len(singular))] = singular[:r]
    torch.testing.assert_close(pair.B.T @ pair.B, expected.diag(), rtol=0, atol=1e-13)
    torch.testing.assert_close(pair.A @ pair.A.T, expected.diag(), rtol=0, atol=1e-13)
    assert (pair.B.shape, pair.A.shape, pair.scale) == ((m, r), (r, n), 0.7)
    squares = float(pair.A.square().sum() + pair.B.square().sum())
    assert squares == pytest.approx(
        2 * float(singular.sum()), rel=1e-13
    )  # the smallest there is: twice the nuclear norm
    assert squares < float(factors.A.square().sum() + factors.B.square().sum())


def test_every_pair_of_one_product_has_the_same_balanced_pair():
    factors = drawn(9, 6, 3)
    expected = balanced(factors)
    for seed in range(5):
        M = normal(3, 3, seed=10 + seed)
        pair = balanced(Factors(factors.B @ M, torch.linalg.solve(M, factors.A), -2.0))
        torch.testing.assert_close(pair.B, expected.B, rtol=0, atol=1e-10)
        torch.testing.assert_close(pair.A, expected.A, rtol=0, atol=1e-10)
    peaks = expected.B.gather(0, expected.B.abs().argmax(dim=0, keepdim=True))
    assert (peaks > 0).all()


def test_a_product_of_lower_rank_leaves_zero_columns_and_rows():
    B, A = normal(8, 1, seed=1) @ normal(1, 4, seed=2), normal(4, 6, seed=3)
    pair = balanced(Factors(B, A, 1.0))
    torch.testing.assert_close(pair.B @ pair.A, B @ A, rtol=0, atol=1e-13)
    assert torch.count_nonzero(pair.B[:, 1:]) == 0
    assert torch.count_nonzero(pair.A[1:]) == 0
    fresh = balanced(Factors(torch.zeros(8, 4), normal(4, 6, seed=3).float(), 1.0))
    assert torch.count_nonzero(fresh.B) == torch.count_nonzero(fresh.A) == 0
    assert fresh.A.dtype == fresh.B.dtype == torch.float32


def test_nothing_of_the_callers_is_written():
    factors = drawn(5, 4, 2)
    before = factors.B.clone(), factors.A.clone()
    balanced(factors)
    assert torch.equal(factors.B, before[0])
    assert torch.equal(factors.A, before[1])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_the_space_computes_the_users_function(dtype, tolerance, untouched):
    model = tiny.with_lora(tiny.bert(dtype)).eval()
    change_gauge(model, 3.0)
    unchanged = untouched(model)
    space = WeightSpace.lora(model, gauge="balanced")
    batch = {key: value for key, value in BATCHES[0].items() if key != "labels"}
    with torch.no_grad():
        expected = model(**batch).logits
        got = space.model(**batch).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * float(expected.abs().max()))
    merged = WeightSpace.full(model)
    for layer, f in space.factors.items():
        own = merged.factors[layer]
        torch.testing.assert_close(f.B @ f.A, own.B @ own.A, rtol=0, atol=tolerance)
        assert not torch.allclose(f.B, own.B, rtol=0.1, atol=0.0)
        torch.testing.assert_close(f.B.T @ f.B, f.A @ f.A.T, rtol=0, atol=10 * tolerance)
    weights = WeightSpace.full(space.model)  # the copy, merged by PEFT
    for name, weight in merged.parameters.items():
        torch.testing.assert_close(weights.parameters[name], weight, rtol=0, atol=tolerance)
    unchanged()


def test_the_balanced_space_is_a_lora_space_by_another_name():
    model = tiny.with_lora(tiny.bert())
    trained, space = WeightSpace.lora(model), WeightSpace.lora_balanced(model)
    assert (trained.name, space.name) == ("lora", "lora_balanced")
    assert list(space.parameters) == list(trained.parameters)
    assert space.factored
    assert trained.factored
    assert not WeightSpace.full(model).factored
    for layer, f in space.factors.items():
        assert f.B is space.parameters[f"{layer}.B"]
        assert f.A is space.parameters[f"{layer}.A"]


def test_the_induced_norm_in_the_balanced_gauge_against_dense_products():
    space = WeightSpace.lora_balanced(tiny.with_lora(tiny.bert()))
    direction = gaussian(space, 0, 0)
    squares = 0.0
    for layer, pair in space.factors.items():
        f = Factors(pair.B.detach(), pair.A.detach(), pair.scale)
        moved = (f.B + 0.3 * direction[f"{layer}.B"]) @ (f.A + 0.3 * direction[f"{layer}.A"])
        squares += float((f.scale * (moved - f.B @ f.A)).square().sum())
    assert space.induced_norm(direction, 0.3) == pytest.approx(math.sqrt(squares), rel=1e-10)


def test_sharpness_depends_on_the_gauge_as_trained_and_not_on_the_balanced_one():
    model, other = tiny.with_lora(tiny.bert()), tiny.with_lora(tiny.bert())
    change_gauge(other, 4.0)
    objective = Objective(BATCHES)

    def rises(build, **kind):
        settings = {"directions": 8, "antithetic": True, **kind}
        return [random_sharpness(objective, build(m), [0.1], **settings) for m in (model, other)]

    trained = rises(WeightSpace.lora, kind="isotropic")
    assert trained[1].mean[0] > 1.5 * trained[0].mean[0] > 0
    for kind in ("isotropic", "filter"):
        for build in (WeightSpace.lora_balanced, WeightSpace.full):
            first, second = rises(build, kind=kind)
            np.testing.assert_allclose(second.rises, first.rises, rtol=1e-4)
            np.testing.assert_allclose(second.induced_norms, first.induced_norms, rtol=1e-4)
    step = [adversarial_sharpness(objective, WeightSpace.lora_balanced(m), [0.1]) for m in (model, other)]
    assert step[1].gradient_norm == pytest.approx(step[0].gradient_norm, rel=1e-8)
    assert math.isnan(step[0].points[0].first_order_rank_r)


def test_a_general_change_of_gauge_leaves_the_balanced_space():
    """Not a power of two, so that nothing is the same bit for bit."""
    objective = Objective(BATCHES)
    results = []
    for c in (1.0, 3.7):
        model = tiny.with_lora(tiny.bert())
        change_gauge(model, c)
        results.append(random_sharpness(objective, WeightSpace.lora_balanced(model), [0.2], directions=2))
    np.testing.assert_allclose(results[1].rises, results[0].rises, rtol=1e-8)


def test_measures_restore_the_balanced_space_and_leave_the_users_model(untouched):
    model = tiny.with_lora(tiny.bert())
    unchanged = untouched(model)
    space = WeightSpace.lora_balanced(model)
    before = state(space.model)
    random_sharpness(Objective(BATCHES), space, [0.2], directions=2)
    with pytest.raises(KeyboardInterrupt), space.perturbed(gaussian(space, 0, 0)):
        raise KeyboardInterrupt
    assert_same_bits(space.model, before)
    unchanged()


def test_errors_are_one_line():
    model = tiny.with_lora(tiny.bert())
    with pytest.raises(UserError, match="choose trained or balanced"):
        WeightSpace.lora(model, gauge="even")
    with pytest.raises(UserError, match="full space"):
        WeightSpace.lora_balanced(tiny.bert())
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name)[0, 0] = math.inf
    with pytest.raises(UserError, match="not finite") as error:
        WeightSpace.lora_balanced(model)
    assert "\n" not in str(error.value)


def test_measures_offer_the_balanced_space_and_take_it_when_asked():
    assert MEASURES["random"].spaces == ("full", "lora")
    assert MeasureEntry(measure="random").all_spaces() == ("full", "lora")
    assert MeasureEntry(measure="random", spaces=["lora_balanced"]).all_spaces() == ("lora_balanced",)
    asked = MeasureEntry(measure="spectrum", spaces=["lora_balanced", "full"]).all_spaces()
    assert asked == ("full", "lora_balanced")
    assert MEASURES["subspace"].offered == ("lora",)
    assert MEASURES["quality"].offered == ("",)
    for measure in MEASURES.values():
        assert all(hasattr(WeightSpace, space) for space in measure.offered if space)


def test_the_command_measures_in_the_balanced_space(tmp_path, capsys):
    import pandas as pd

    torch.manual_seed(0)
    tokenizer = load_tokenizer("minilm")
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    base = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **size))
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    common = ["--validation-examples", "8", "--train-examples", "8", "--max-length", "16", "--set", "directions=2"]
    output = tmp_path / "rows.parquet"
    arguments = ["measure", str(tmp_path / "adapter"), "--model", str(tmp_path / "base"), *common]
    assert main([*arguments, "--what", "random", "--space", "lora,lora_balanced", "-o", str(output)]) == 0
    rows = pd.read_parquet(output)
    assert set(rows["space"]) == {"lora", "lora_balanced"}
    means = rows[rows["quantity"] == "loss_rise_mean"].pivot(index="radius", columns="space", values="value")
    assert (means["lora"] != means["lora_balanced"]).all()
    plain = ["measure", str(tmp_path / "base"), *common, "--what", "random", "--space", "lora_balanced"]
    assert main([*plain, "-o", str(tmp_path / "other.parquet")]) == 2
    assert "no LoRA space" in capsys.readouterr().err
