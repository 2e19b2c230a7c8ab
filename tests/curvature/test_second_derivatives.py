import pytest
import torch
import torch.nn.functional as F
from torch import nn

from analysis.core import Objective, WeightSpace, gaussian
from analysis.curvature import HessianOperator
from analysis.curvature.second_derivatives import StoredSecondDerivatives
from tests.oracles import modules


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHT, BIAS = drawn(6, seed=1), drawn(6, seed=2)
FUNCTIONS = {
    "gelu": F.gelu,
    "gelu, tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu, named": lambda x: F.gelu(input=x),
    "silu": F.silu,
    "silu, named": lambda x: F.silu(input=x),
    "silu, in place": torch.nn.SiLU(inplace=True),
    "layer_norm": lambda x: F.layer_norm(x, (6,)),
    "layer_norm, weighted": lambda x: F.layer_norm(x, (6,), WEIGHT, BIAS, 1e-3),
    "layer_norm over two dimensions": lambda x: F.layer_norm(x, (3, 6)),
    "LayerNorm": torch.nn.LayerNorm(6).double().requires_grad_(False),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_derivatives_are_those_of_torch(name):
    function = FUNCTIONS[name]
    found, expected = [], []
    for results, stored in ((found, True), (expected, False)):
        x = drawn(4, 3, 6).requires_grad_()
        if stored:
            with StoredSecondDerivatives():
                y = function(x.sin())
        else:
            y = function(x.sin())
        (gradient,) = torch.autograd.grad((y * drawn(4, 3, 6, seed=3)).square().sum(), x, create_graph=True)
        for seed in (4, 5):  # two products through one graph
            (product,) = torch.autograd.grad(gradient, x, drawn(4, 3, 6, seed=seed), retain_graph=True)
            results += [y, gradient, product]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def test_learnt_weights_keep_torchs_own_derivatives():
    x, weight, bias = drawn(4, 6).requires_grad_(), WEIGHT.clone().requires_grad_(), BIAS.clone().requires_grad_()
    with StoredSecondDerivatives():
        y = F.layer_norm(x, (6,), weight, bias)
    gradients = torch.autograd.grad(y.pow(3).sum(), (x, weight, bias), create_graph=True)
    products = torch.autograd.grad(gradients, (x, weight, bias), [torch.ones_like(g) for g in gradients])
    plain = torch.autograd.grad(F.layer_norm(x, (6,), weight, bias).pow(3).sum(), (x, weight, bias), create_graph=True)
    expected = torch.autograd.grad(plain, (x, weight, bias), [torch.ones_like(g) for g in plain])
    torch.testing.assert_close(products, expected, rtol=1e-12, atol=1e-13)


def test_a_third_derivative_is_refused_rather_than_wrong():
    x = drawn(5).requires_grad_()
    with StoredSecondDerivatives():
        y = F.gelu(x)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(second.sum(), x)


def test_an_activation_in_place_serves_kept_graphs():
    model = nn.Sequential(nn.Linear(5, 6), nn.SiLU(inplace=True), nn.Linear(6, 4)).double()
    space, objective = WeightSpace.all(modules.Classifier(model)), Objective(modules.points())
    v = gaussian(space, 0, 0)
    expected = objective.hvp(space, v)
    with HessianOperator(objective, space, graphs="retain") as operator:
        for found in (operator(v), operator(v)):
            for name in expected:
                torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-14)
