"""The rescaled variable against T written out by hand."""

import pytest
import torch
from torch import nn

from analysis.core import WeightSpace
from analysis.sharpness.scaling import scaling_of
from bilora.errors import UserError
from tests.sharpness.cases import assert_same_bits, flat, normal, state, tiny_bert, with_lora


def ones(space):
    return {name: torch.ones_like(p) for name, p in space.parameters.items()}


class Mixed(nn.Module):
    """A matrix, a convolution and their biases; some weights are exactly 0."""

    def __init__(self):
        super().__init__()
        self.linear, self.conv = nn.Linear(4, 3).double(), nn.Conv2d(2, 5, 3).double()
        with torch.no_grad():
            self.linear.weight.copy_(normal(3, 4, seed=1))
            self.linear.weight[1] = 0
            self.linear.weight[0, 2] = 0
            self.linear.bias.copy_(normal(3, seed=2))


def test_isotropic_leaves_vectors_alone():
    space = WeightSpace.all(Mixed())
    scaling = scaling_of(space, "isotropic")
    vector = ones(space)
    assert torch.equal(flat(scaling.applied(vector)), flat(vector))
    assert torch.equal(flat(scaling.movable(vector)), flat(vector))


def test_elementwise_is_the_size_of_each_weight_biases_included():
    model = Mixed()
    space = WeightSpace.all(model)
    applied = scaling_of(space, "elementwise").applied(ones(space))
    for name, parameter in model.named_parameters():
        assert torch.equal(applied[name], parameter.detach().abs()), name


def test_filter_is_the_norm_of_each_row_and_leaves_one_dimensional_parameters():
    model = Mixed()
    space = WeightSpace.all(model)
    applied = scaling_of(space, "filter").applied(ones(space))
    for row in range(3):
        expected = model.linear.weight[row].detach().square().sum().sqrt().expand(4)
        torch.testing.assert_close(applied["linear.weight"][row], expected, rtol=1e-14, atol=0)
    for channel in range(5):
        expected = model.conv.weight[channel].detach().square().sum().sqrt().expand(2, 3, 3)
        torch.testing.assert_close(applied["conv.weight"][channel], expected, rtol=1e-14, atol=0)
    assert not applied["linear.bias"].any()
    assert not applied["conv.bias"].any()


@pytest.mark.parametrize("kind", ["elementwise", "filter"])
def test_movable_drops_what_cannot_move_and_nothing_else(kind):
    space = WeightSpace.all(Mixed())
    scaling = scaling_of(space, kind)
    vector = {name: normal(*p.shape, seed=7) for name, p in space.parameters.items()}
    moved, kept = scaling.applied(vector), scaling.movable(vector)
    for name, tensor in kept.items():
        fixed = moved[name] == 0
        assert not tensor[fixed].any()
        assert torch.equal(tensor[~fixed], vector[name][~fixed])
    assert bool((moved["linear.weight"][1] == 0).all())
    assert torch.count_nonzero(moved["linear.bias"]) == (3 if kind == "elementwise" else 0)


def test_the_scaling_stays_when_weights_move():
    space = WeightSpace.all(Mixed())
    scaling = scaling_of(space, "elementwise")
    before = flat(scaling.applied(ones(space))).clone()
    with space.perturbed(ones(space), 3.0):
        assert torch.equal(flat(scaling.applied(ones(space))), before)


def test_a_fresh_adapter_moves_in_the_factor_that_is_not_zero():
    model = with_lora(tiny_bert())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    space = WeightSpace.lora(model)
    applied = scaling_of(space, "elementwise").applied(ones(space))
    assert all(bool(tensor.any()) == name.endswith(".A") for name, tensor in applied.items())


@pytest.mark.parametrize(("pattern", "kind"), [(r"linear\.bias", "filter"), (r"linear\..*", "elementwise")])
def test_a_space_that_cannot_move_is_refused(pattern, kind):
    model = Mixed()
    if kind == "elementwise":
        nn.init.zeros_(model.linear.weight)
        nn.init.zeros_(model.linear.bias)
    with pytest.raises(UserError, match="isotropic") as error:
        scaling_of(WeightSpace.named(model, pattern), kind)
    assert "\n" not in str(error.value)


def test_weights_stay():
    space = WeightSpace.all(Mixed())
    before = state(space.model)
    scaling_of(space, "elementwise").applied(ones(space))
    assert_same_bits(space.model, before)
