"""After any measure, and after an error in the middle of one, every weight has the bits it had before."""

import pytest
import torch

from analysis.core import Objective, Trained, WeightSpace
from analysis.landscape.lines import loss_lines
from analysis.sharpness.adversarial import adversarial_sharpness
from analysis.sharpness.random import random_sharpness
from analysis.subspace.measure import MEASURE
from analysis.subspace.outside import outside_shares
from tests.sharpness.cases import (
    Fault,
    assert_same_bits,
    bert_objective,
    fail_at,
    minilm,
    state,
    tiny_bert,
    with_lora,
)

MEASURES = {
    "filter": lambda objective, space: random_sharpness(objective, space, [0.1, 0.3], directions=2),
    "isotropic": lambda objective, space: random_sharpness(
        objective, space, [0.1, 0.3], kind="isotropic", directions=2, antithetic=True
    ),
    "adversarial": lambda objective, space: adversarial_sharpness(objective, space, [0.05, 0.1]),
    "lines": lambda objective, space: loss_lines(objective, space, points=5, directions=2),
}
SPACES = {"full": WeightSpace.full, "lora": WeightSpace.lora, "all": WeightSpace.all}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("space_name", SPACES)
@pytest.mark.parametrize("measure", MEASURES)
def test_weights_keep_their_bits(measure, space_name, dtype):
    model = with_lora(tiny_bert(dtype))
    space = SPACES[space_name](model)
    users, copies = state(model), state(space.model)
    MEASURES[measure](bert_objective(), space)
    assert_same_bits(model, users)
    assert_same_bits(space.model, copies)


@pytest.mark.parametrize("space_name", ["full", "lora"])
@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("call", [5, 7, 10])
def test_weights_keep_their_bits_after_an_error(measure, space_name, call):
    """Two calls find out what the head reads; then, of three batches a loss, 5 is the last of the first."""
    model = with_lora(tiny_bert(torch.float32))
    space = SPACES[space_name](model)
    users, copies = state(model), state(space.model)
    hook = fail_at(space.model, call)
    with pytest.raises(Fault):
        MEASURES[measure](bert_objective(), space)
    hook.remove()
    assert_same_bits(model, users)
    assert_same_bits(space.model, copies)


@pytest.mark.parametrize("failing", [None, "full", "lora"])
def test_subspaces_keep_the_bits(failing):
    model = with_lora(tiny_bert(torch.float32))
    spaces = {"full": WeightSpace.full(model), "lora": WeightSpace.lora(model)}
    users, copies = state(model), {name: state(space.model) for name, space in spaces.items()}
    if failing:
        fail_at(spaces[failing].model, 4)
        with pytest.raises(Fault):
            outside_shares(bert_objective(), spaces["full"], spaces["lora"])
    else:
        outside_shares(bert_objective(), spaces["full"], spaces["lora"])
    assert_same_bits(model, users)
    for name, space in spaces.items():
        assert_same_bits(space.model, copies[name])


@pytest.fixture(scope="module")
def real() -> tuple[torch.nn.Module, Objective]:
    return minilm()


def test_minilm_through_every_measure(real):
    model, objective = real
    users = state(model)
    for make in (WeightSpace.full, WeightSpace.lora):
        space = make(model)
        copies = state(space.model)
        sharp = adversarial_sharpness(objective, space, [1e-3])
        assert sharp.points[0].loss_rise == pytest.approx(sharp.points[0].first_order, rel=0.2)
        noisy = random_sharpness(objective, space, [0.05], directions=2)
        assert noisy.induced_norms.min() > 0
        lines = loss_lines(objective, space, points=3, directions=1)
        assert lines.losses[0, 1] == noisy.base_loss == sharp.base_metrics["loss"]
        assert_same_bits(space.model, copies)
    assert_same_bits(model, users)


def test_minilm_subspaces(real):
    model, objective = real
    users, space = state(model), WeightSpace.lora(model)
    result = MEASURE.run(objective, space, MEASURE.settings(rho=1e-3), Trained(model, space.factors))
    reach = {r.kind: r for r in result.reaches}
    assert result.overlap is not None
    assert result.overlap.mean("column")[0] == pytest.approx(1)
    assert reach["lora_sam"].share < 1e-3
    assert reach["auxiliary"].share < 1e-12
    assert reach["gradient"].alignment == pytest.approx(1, rel=1e-9)
    assert reach["gradient_rank_r"].alignment > reach["lora_sam"].alignment > 0
    assert reach["filter_noise"].share == pytest.approx(reach["filter_noise"].chance, abs=0.02)
    assert_same_bits(model, users)
