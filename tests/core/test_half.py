"""bfloat16 forwards from full-precision masters."""

import pytest
import torch

from analysis.core import Objective, WeightSpace
from analysis.core.directions import filter_normalized, gaussian
from analysis.core.half import HalfSpace
from analysis.core.vectors import norm, scaled
from tests.oracles import tiny
from tests.sharpness.cases import flat


def classification():
    return Objective([tiny.padded(part) for part in tiny.split(tiny.examples())])


def language():
    return Objective([tiny.language_batch(part) for part in tiny.split(tiny.examples(vocabulary=30))])


CASES = {
    "bert, all": (lambda: WeightSpace.all(tiny.bert(torch.float32, hidden=16)), classification),
    "bert, full": (lambda: WeightSpace.full(tiny.with_lora(tiny.bert(torch.float32, hidden=16))), classification),
    "bert, lora": (lambda: WeightSpace.lora(tiny.with_lora(tiny.bert(torch.float32, hidden=16))), classification),
    "llama": (lambda: WeightSpace.full(tiny.llama()), language),
    "llama, all, tied": (lambda: WeightSpace.all(tiny.llama()), language),
}


@pytest.fixture(params=CASES)
def case(request):
    space, objective = CASES[request.param]
    return space(), objective()


def test_losses_are_those_of_the_perturbed_masters(case):
    space, objective = case
    half = HalfSpace(space)
    before = flat(space.parameters).clone()
    for index in range(3):
        direction = filter_normalized(space, gaussian(space, 0, index))
        with space.perturbed(direction, 0.3):
            expected = objective.evaluate(space)["loss"]
        with half.perturbed(direction, 0.3):
            got = objective.evaluate(half)["loss"]
        assert got == pytest.approx(expected, rel=0.03)
        assert got != expected
    with half.perturbed({}, 0.0):
        assert objective.loss(half) == pytest.approx(objective.loss(space), rel=0.02)
    assert torch.equal(flat(space.parameters), before)


def test_a_perturbation_of_some_parameters_leaves_the_others_at_the_masters():
    space = WeightSpace.full(tiny.with_lora(tiny.bert(torch.float32)))
    objective, half = classification(), HalfSpace(space)
    with half.perturbed({}, 0.0):
        base = objective.loss(half)
    everything = gaussian(space, 0, 0)
    one = {name: everything[name] for name in list(everything)[:1]}
    with half.perturbed(everything, 0.5):
        pass
    with half.perturbed(one, 0.5):
        alone = objective.loss(half)
    fresh = HalfSpace(space)
    with fresh.perturbed(one, 0.5):
        assert objective.loss(fresh) == alone != base
    with half.perturbed({}, 0.0):
        assert objective.loss(half) == base


def test_small_perturbations_are_known_to_drown_in_rounding():
    """Added to bfloat16 weights a perturbation of 1e-3 of their size is lost; here its share and cosine are told."""
    space = WeightSpace.full(tiny.with_lora(tiny.bert(torch.float32, hidden=16)))
    half = HalfSpace(space)
    direction = filter_normalized(space, gaussian(space, 0, 0))
    assert half.realised(direction, 0.5)[1] > 0.999
    assert half.realised(direction, 1e-4)[1] < 0.6
    length, cosine = half.realised(direction, 0.5)
    change = torch.cat(
        [
            ((p + 0.5 * d).bfloat16().double() - p.bfloat16().double()).flatten()
            for p, d in zip(space.parameters.values(), direction.values(), strict=True)
        ]
    )
    wanted = flat(scaled(direction, 0.5)).double()
    assert length == pytest.approx(float(change.norm() / wanted.norm()), rel=1e-6)
    assert cosine == pytest.approx(float(change @ wanted / (change.norm() * wanted.norm())), rel=1e-6)
    assert half.realised(scaled(direction, 0.0))[0] == 0
    assert norm(direction) > 0


def test_the_head_and_the_loss_are_in_full_precision():
    space = WeightSpace.all(tiny.bert(torch.float32))
    half = HalfSpace(space)
    batch = classification().batches[0]
    with half.perturbed({}, 0.0):
        output = half.model(**batch)
    assert output.logits.dtype == output.loss.dtype == torch.float32
    assert half.model.classifier.weight.dtype == torch.float32
    assert half.model.bert.encoder.layer[0].intermediate.dense.weight.dtype == torch.bfloat16
    assert torch.equal(half.model.classifier.weight, space.model.classifier.weight)
