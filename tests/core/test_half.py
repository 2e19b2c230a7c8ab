"""bfloat16 forwards from full-precision masters."""

import pytest
import torch

from analysis.core import Objective, WeightSpace
from analysis.core.directions import filter_normalized, gaussian
from analysis.core.half import HalfSpace
from analysis.core.vectors import norm, scaled, tensor_dot
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


def losses_along(objective, space, of, scale, count=8):
    """Losses of a space or its half space at the unperturbed weights, then along random directions of the space."""
    losses = []
    for index in range(-1, count):
        direction = {} if index < 0 else filter_normalized(space, gaussian(space, 0, index))
        with of.perturbed(direction, scale):
            losses.append(objective.loss(of))
    return torch.tensor(losses, dtype=torch.float64)


def test_rises_are_those_of_the_perturbed_masters(case):
    """Rises, since losses agree to a few percent also where a perturbation is lost."""
    space, objective = case
    before = flat(space.parameters).clone()
    expected, got = (losses_along(objective, space, of, 0.3) for of in (space, HalfSpace(space)))
    rises, found = expected[1:] - expected[0], got[1:] - got[0]
    assert (found - rises).norm() < 0.1 * rises.norm()
    assert (got != expected).all()
    assert got[0] == pytest.approx(float(expected[0]), rel=2**-8)
    assert torch.equal(flat(space.parameters), before)


@pytest.mark.parametrize("scale", [1e-3, 0.3])
def test_the_forward_pass_gets_the_rounded_sum_of_master_and_perturbation(case, scale):
    """Of a small perturbation of weights that are stored in bfloat16 most would be lost."""
    space, _ = case
    half = HalfSpace(space)
    direction = filter_normalized(space, gaussian(space, 0, 0))
    name_of = {parameter: name for name, parameter in space.parameters.items()}
    asked = kept = stored = 0.0
    with half.perturbed(direction, scale):
        for master, twin in zip(space.model.parameters(), half.model.parameters(), strict=True):
            if master not in name_of:
                assert torch.equal(twin, master.to(twin.dtype))
                continue
            step = direction[name_of[master]]
            assert torch.equal(twin, torch.add(master, step, alpha=scale).to(twin.dtype))
            if twin.dtype == torch.bfloat16:
                rounded, step = master.bfloat16(), scale * step
                asked += tensor_dot(step, step)
                kept += tensor_dot(step, twin.float() - rounded.float())
                stored += tensor_dot(step, (rounded + step.bfloat16()).float() - rounded.float())
    assert asked > 0
    assert kept / asked == pytest.approx(1, abs=0.15 if scale < 0.01 else 0.01)
    if scale < 0.01:
        assert stored / asked < 0.7


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
