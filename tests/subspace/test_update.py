"""Updates and comparisons from factors against dense matrices."""

import math

import numpy as np
import pytest
import torch

from analysis.core import COLUMNS, Factors
from analysis.subspace.compare import compare_adapters
from analysis.subspace.products import product_inner, singular_values
from analysis.subspace.update import MEASURE, base_weight, inspect_updates
from bilora.adapters.layers import adapted_layers
from bilora.errors import UserError
from tests.sharpness.cases import bert_objective, normal, randomise_factors, tiny_bert, with_lora

SHAPES = {"a": (12, 20), "b": (30, 8)}


def adapter(seed, rank=3, scale=1.5):
    return {
        name: Factors(normal(m, rank, seed=seed + i), normal(rank, n, seed=seed + 50 + i), scale)
        for i, (name, (m, n)) in enumerate(SHAPES.items())
    }


def dense(f):
    return f.scale * f.B.double() @ f.A.double()


def value(rows, quantity, layer="", **where):
    chosen = [r for r in rows if r["quantity"] == quantity and r["layer"] == layer]
    (found,) = [r for r in chosen if all(r[key] == wanted for key, wanted in where.items())]
    return found["value"]


def test_spectrum_and_ranks():
    factors = adapter(0)
    rows = inspect_updates(factors).rows()
    assert all(tuple(r) == COLUMNS for r in rows)
    weights, effective, stable = [], [], []
    for name, f in factors.items():
        sigma = torch.linalg.svdvals(dense(f))[:3].numpy()
        shares = sigma / sigma.sum()
        for i in range(3):
            assert value(rows, "singular_value", name, index=i + 1) == pytest.approx(sigma[i], rel=1e-10)
        weights.append((sigma**2).sum())
        effective.append(math.exp(-(shares * np.log(shares)).sum()))
        stable.append((sigma**2).sum() / sigma[0] ** 2)
        assert value(rows, "effective_rank", name) == pytest.approx(effective[-1], rel=1e-10)
        assert value(rows, "stable_rank", name) == pytest.approx(stable[-1], rel=1e-10)
        balance = 0.5 * float(f.B.square().sum() - f.A.square().sum())
        assert value(rows, "balancedness", name) == pytest.approx(balance, rel=1e-12)
    assert value(rows, "update_norm") == pytest.approx(math.sqrt(sum(weights)), rel=1e-10)
    assert value(rows, "effective_rank") == pytest.approx(np.average(effective, weights=weights), rel=1e-10)
    assert value(rows, "stable_rank") == pytest.approx(np.average(stable, weights=weights), rel=1e-10)
    assert not any(r["quantity"] == "intruders" for r in rows)


def test_equal_singular_values_have_full_rank_and_one_has_one():
    basis = torch.linalg.qr(normal(10, 10, seed=1)).Q
    flat = {"a": Factors(basis[:, :4], basis[:4], 2.0)}
    one = {"a": Factors(basis[:, :1], basis[:1], 2.0)}
    assert value(inspect_updates(flat).rows(), "effective_rank") == pytest.approx(4, rel=1e-9)
    assert value(inspect_updates(flat).rows(), "stable_rank") == pytest.approx(4, rel=1e-9)
    assert value(inspect_updates(one).rows(), "effective_rank") == pytest.approx(1, rel=1e-9)


def test_zero_and_broken_factors():
    factors = adapter(3)
    factors["a"] = Factors(torch.zeros(12, 3), factors["a"].A, 1.0)
    rows = inspect_updates(factors).rows()
    assert value(rows, "update_norm", "a") == 0
    assert math.isnan(value(rows, "effective_rank", "a"))
    assert value(rows, "effective_rank") == value(rows, "effective_rank", "b")
    broken = Factors(torch.full((12, 3), math.inf), torch.ones(3, 20), 1.0)
    assert singular_values(broken).isnan().all()
    with pytest.raises(UserError, match="no LoRA factors"):
        inspect_updates({})


def test_the_measure_finds_intruders_of_a_loaded_adapter():
    model = with_lora(tiny_bert())
    randomise_factors(model, 2)
    layers = adapted_layers(model)
    with torch.no_grad():
        for layer in layers.values():
            layer.B.mul_(40)  # strong enough to matter
    weights = {name: base_weight(layer) for name, layer in layers.items()}
    factors = {name: Factors(x.B.detach(), x.A.detach(), x.scale) for name, x in layers.items()}
    found = inspect_updates(factors, weights, k=4)
    rows = found.rows()
    total = above = below = 0.0
    for name, f in factors.items():
        W = weights[name].double()
        U0, S0, _ = torch.linalg.svd(W, full_matrices=False)
        U, S, _ = torch.linalg.svd(W + dense(f), full_matrices=False)
        k = min(4, min(W.shape) - 1)
        new = (U0[:, S0 > 1e-12].T @ U[:, :k]).abs().amax(dim=0) < 0.5
        assert value(rows, "intruders", name) == int(new.sum()), name
        total += int(new.sum())
        above, below = above + float(S[:k][new].square().sum()), below + float(S[:k].square().sum())
    assert value(rows, "intruders") == total > 0
    assert value(rows, "intruder_energy") == pytest.approx(above / below, rel=1e-8)
    assert value(rows, "intruders_undecided") == 0
    with pytest.raises(UserError, match="no LoRA factors"):
        MEASURE.run(bert_objective(), None, MEASURE.settings(), None)


def test_comparison_of_two_adapters():
    first, second = adapter(10), adapter(90)
    rows = compare_adapters(first, second, "with B").rows()
    assert all(tuple(r) == COLUMNS for r in rows)
    assert {r["label"] for r in rows} == {"with B"}
    inner = a = b = apart = 0.0
    for name in SHAPES:
        U, V = dense(first[name]), dense(second[name])
        assert product_inner(first[name], second[name]) == pytest.approx(float((U * V).sum()), rel=1e-10)
        cosine = float((U * V).sum() / U.norm() / V.norm())
        assert value(rows, "cosine", name, space="full") == pytest.approx(cosine, rel=1e-9)
        assert value(rows, "distance", name) == pytest.approx(float((U - V).norm() / V.norm()), rel=1e-9)
        inner, apart = inner + float((U * V).sum()), apart + float((U - V).square().sum())
        a, b = a + float(U.square().sum()), b + float(V.square().sum())
    assert value(rows, "cosine", space="full") == pytest.approx(inner / math.sqrt(a * b), rel=1e-9)
    assert value(rows, "distance") == pytest.approx(math.sqrt(apart / b), rel=1e-9)
    flat = [torch.cat([torch.cat([f.A.flatten(), f.B.flatten()]) for f in x.values()]) for x in (first, second)]
    factors = float(torch.cosine_similarity(*flat, dim=0))
    assert value(rows, "cosine", space="lora") == pytest.approx(factors, rel=1e-9)


def test_what_is_said_of_products_does_not_depend_on_the_gauge():
    first, second = adapter(20), adapter(70, rank=2)
    other = {name: Factors(f.B / 7, 7 * f.A, f.scale) for name, f in first.items()}
    rows = [*compare_adapters(first, second, "").rows(), *inspect_updates(first).rows()]
    again = [*compare_adapters(other, second, "").rows(), *inspect_updates(other).rows()]
    for one, two in zip(rows, again, strict=True):
        if one["quantity"] != "balancedness":
            assert one["value"] == pytest.approx(two["value"], rel=1e-8, abs=1e-9, nan_ok=True), one["quantity"]
    assert not any(r["quantity"] == "cosine" and r["space"] == "lora" for r in rows)  # ranks differ


def test_adapters_of_other_layers_are_refused():
    with pytest.raises(UserError, match="adapt different layers"):
        compare_adapters(adapter(0), {"a": adapter(1)["a"]}, "")
