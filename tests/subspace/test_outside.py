"""Outside share and alignment: factored against dense, closed forms, chance, and on a real architecture."""

import math

import numpy as np
import pytest
import torch

from analysis.core import COLUMNS, Factors, Trained, WeightSpace, norm
from analysis.subspace.lowrank import LowRank
from analysis.subspace.measure import MEASURE
from analysis.subspace.outside import outside_shares, reach_of
from analysis.subspace.perturbations import KINDS, factored, flat_lora, induced
from analysis.subspace.reachable import ReachableSet, inner, squared_norm
from bilora.errors import UserError
from tests.sharpness.cases import bert_objective, change_gauge, normal, tiny_bert, with_lora

M, N, R = 18, 25, 3


def point(seed=0, m=M, n=N, r=R):
    return Factors(normal(m, r, seed=seed), normal(r, n, seed=seed + 1), 2.0)


def dense_outside(factors, eps):
    """Oracle: projections by pseudo-inverses, everything m×n."""
    P_B = factors.B @ torch.linalg.pinv(factors.B)
    P_A = torch.linalg.pinv(factors.A) @ factors.A
    return (torch.eye(len(P_B)) - P_B) @ eps @ (torch.eye(len(P_A)) - P_A)


@pytest.mark.parametrize("shape", [(M, N), (N, M)])
def test_factored_equals_dense_equals_oracle(shape):
    m, n = shape
    f, low = point(m=m, n=n), LowRank(normal(m, 5, seed=7), normal(5, n, seed=8))
    eps, G = low.left @ low.right, normal(m, n, seed=9)
    reachable = ReachableSet.of(f)
    expected = float(dense_outside(f, eps).square().sum())
    assert squared_norm(reachable.outside(low)) == pytest.approx(expected, rel=1e-11)
    assert squared_norm(reachable.outside(eps)) == pytest.approx(expected, rel=1e-11)
    assert squared_norm(low) == pytest.approx(float(eps.square().sum()), rel=1e-11)
    assert inner(low, G) == pytest.approx(float((eps * G).sum()), rel=1e-11)
    assert inner(eps, G) == pytest.approx(float((eps * G).sum()), rel=1e-11)


def test_the_tangent_space_itself_has_nothing_outside():
    f = point()
    X, Y = normal(R, N, seed=3), normal(M, R, seed=4)
    tangent = LowRank(torch.cat([f.B, Y], dim=1), torch.cat([X, f.A], dim=0))
    share = squared_norm(ReachableSet.of(f).outside(tangent)) / squared_norm(tangent)
    assert share < 1e-25


def test_lora_sam_leaves_its_tangent_space_by_the_product_of_the_two_steps_alone():
    f = point()
    eps_B, eps_A = 1e-3 * normal(M, R, seed=5), 1e-3 * normal(R, N, seed=6)
    perturbation = induced(f, eps_B, eps_A)
    dense = f.scale * ((f.B + eps_B) @ (f.A + eps_A) - f.B @ f.A)
    torch.testing.assert_close(perturbation.left @ perturbation.right, dense, rtol=1e-9, atol=1e-14)
    expected = float((f.scale * dense_outside(f, eps_B @ eps_A)).square().sum())
    assert squared_norm(ReachableSet.of(f).outside(perturbation)) == pytest.approx(expected, rel=1e-9)
    assert expected / squared_norm(perturbation) < 1e-6


def test_random_perturbations_average_to_chance():
    f = point()
    reachable = ReachableSet.of(f)
    assert reachable.chance == pytest.approx((1 - R / M) * (1 - R / N))
    shares = []
    for seed in range(300):
        eps = normal(M, N, seed=100 + seed)
        shares.append(squared_norm(reachable.outside(eps)) / squared_norm(eps))
    error = np.std(shares, ddof=1) / math.sqrt(len(shares))
    assert abs(np.mean(shares) - reachable.chance) < 4 * error
    assert error < 0.005


def test_an_untrained_adapter_reaches_rows_of_A_only():
    f = Factors(torch.zeros(M, R), normal(R, N, seed=1), 1.0)
    reachable = ReachableSet.of(f)
    assert reachable.chance == pytest.approx(1 - R / N)
    assert squared_norm(reachable.outside(normal(M, R, seed=2) @ f.A)) < 1e-20
    assert squared_norm(reachable.outside(torch.eye(M, N, dtype=torch.float64))) > 0.1


def test_totals_weigh_layers_by_their_norm():
    factors = {"a": point(0), "b": point(20)}
    eps = {"a": normal(M, N, seed=40), "b": 10 * point(20).B @ normal(R, N, seed=41)}
    gradient = {"a.weight": normal(M, N, seed=42), "b.weight": eps["b"].clone()}
    reach = reach_of("gradient", eps, factors, gradient)
    outside = [float(dense_outside(factors[x], eps[x]).square().sum()) for x in "ab"]
    squares = [float(eps[x].square().sum()) for x in "ab"]
    assert reach.share == pytest.approx(sum(outside) / sum(squares), rel=1e-10)
    chance = (1 - R / M) * (1 - R / N)
    assert reach.chance == pytest.approx(chance, rel=1e-12)
    whole = torch.cat([eps["a"], eps["b"]]).flatten(), torch.cat([gradient["a.weight"], gradient["b.weight"]]).flatten()
    assert reach.alignment == pytest.approx(float(torch.cosine_similarity(*whole, dim=0)), rel=1e-12)
    rows = {(r["quantity"], r["layer"]): r for r in reach.rows()}
    assert rows["outside_share", "a"]["value"] == pytest.approx(outside[0] / squares[0], rel=1e-10)
    assert rows["outside_share", "b"]["value"] == pytest.approx(0, abs=1e-20)
    assert rows["alignment", "b"]["value"] == pytest.approx(1, rel=1e-12)
    assert rows["alignment", ""]["value"] == reach.alignment
    assert rows["outside_share", ""]["induced_norm"] == pytest.approx(math.sqrt(sum(squares)))
    assert all(tuple(r) == COLUMNS for r in reach.rows())


def test_a_zero_perturbation_has_no_share():
    factors = {"a": point()}
    zero = {"a": LowRank(torch.zeros(M, 1, dtype=torch.float64), torch.zeros(1, N, dtype=torch.float64))}
    reach = reach_of("auxiliary", zero, factors, {"a.weight": normal(M, N, seed=1)})
    assert math.isnan(reach.share)
    assert math.isnan(reach.alignment)
    assert all(math.isnan(r["value"]) for r in reach.rows())


def bert_reaches(model, auxiliary, **settings):
    reaches = outside_shares(
        bert_objective(), WeightSpace.full(model), WeightSpace.lora(model), auxiliary=auxiliary, **settings
    )
    return {r.kind: r for r in reaches}


def test_every_kind_on_a_padded_bert_against_dense_matrices():
    model, auxiliary = with_lora(tiny_bert()), WeightSpace.lora(with_lora(tiny_bert(), seed=6)).factors
    objective, full, lora = bert_objective(), WeightSpace.full(model), WeightSpace.lora(model)
    G = objective.gradient(full)
    g = objective.gradient(lora)
    rho = 0.05
    eps = {name: rho * step / norm(g) for name, step in g.items()}
    dense = {kind: {} for kind in ("auxiliary", "lora_sam", "gradient", "gradient_rank_r")}
    for layer, f in lora.factors.items():
        B, A, G_l = f.B.detach(), f.A.detach(), G[f"{layer}.weight"]
        left, singular, right = torch.linalg.svd(G_l, full_matrices=False)
        dense["auxiliary"][layer] = auxiliary[layer].scale * (auxiliary[layer].B @ auxiliary[layer].A).detach()
        dense["lora_sam"][layer] = f.scale * ((B + eps[f"{layer}.B"]) @ (A + eps[f"{layer}.A"]) - B @ A)
        dense["gradient"][layer] = G_l
        dense["gradient_rank_r"][layer] = (left[:, :2] * singular[:2]) @ right[:2]
    plain = {layer: Factors(f.B.detach(), f.A.detach(), f.scale) for layer, f in lora.factors.items()}
    found = bert_reaches(model, auxiliary, rho=rho)
    assert tuple(found) == KINDS
    total = math.sqrt(sum(float(x.square().sum()) for x in G.values()))
    for kind, matrices in dense.items():
        outside = sum(float(dense_outside(plain[x], matrices[x]).square().sum()) for x in plain)
        squared = sum(float(matrices[x].square().sum()) for x in plain)
        ascent = sum(float((matrices[x] * G[f"{x}.weight"]).sum()) for x in plain)
        assert found[kind].share == pytest.approx(outside / squared, rel=1e-7), kind
        assert found[kind].alignment == pytest.approx(ascent / math.sqrt(squared) / total, rel=1e-8), kind
    assert found["gradient"].alignment == pytest.approx(1, rel=1e-12)
    assert found["gradient"].alignment > found["gradient_rank_r"].alignment > found["lora_sam"].alignment > 0
    assert found["lora_sam"].share < 0.05 < found["gradient"].share
    assert abs(found["filter_noise"].alignment) < 0.1


def test_filter_noise_has_its_expected_share():
    """E = Σ tr((I − P_B)·D²)·(1 − q/n) / Σ ‖D‖², D the row norms of W: below chance where B lengthens rows of W."""
    model = with_lora(tiny_bert())
    full = WeightSpace.full(model)
    expected, squares = 0.0, 0.0
    for layer, f in full.factors.items():
        D2 = full.filter_norms()[f"{layer}.weight"].square()
        off = 1 - (f.B @ torch.linalg.pinv(f.B)).diagonal()
        expected += float((off * D2).sum()) * (1 - f.A.shape[0] / f.A.shape[1])
        squares += float(D2.sum())
    gradient = {name: torch.zeros_like(p) for name, p in full.parameters.items()}
    shares = [reach_of("filter_noise", flat_lora(full, 0.05, seed), full.factors, gradient).share for seed in range(40)]
    error = np.std(shares, ddof=1) / math.sqrt(len(shares))
    assert abs(np.mean(shares) - expected / squares) < 4 * error
    assert error < 0.005
    chance = reach_of("filter_noise", flat_lora(full, 0.05, 0), full.factors, gradient).chance
    assert expected / squares < chance - 0.05


def test_lora_sam_share_vanishes_with_its_radius():
    model = with_lora(tiny_bert())
    large, small = (bert_reaches(model, None, kinds=("lora_sam",), rho=rho)["lora_sam"].share for rho in (1e-2, 1e-4))
    assert small == pytest.approx(1e-4 * large, rel=0.1)


def test_only_lora_sam_depends_on_the_gauge():
    model, other = with_lora(tiny_bert()), with_lora(tiny_bert())
    change_gauge(other, 4.0)
    auxiliary = WeightSpace.lora(with_lora(tiny_bert(), seed=6)).factors
    one, two = bert_reaches(model, auxiliary), bert_reaches(other, auxiliary)
    for kind in ("auxiliary", "gradient", "gradient_rank_r", "filter_noise"):
        assert one[kind].share == pytest.approx(two[kind].share, rel=1e-10)
        assert one[kind].alignment == pytest.approx(two[kind].alignment, rel=1e-10)
    assert one["lora_sam"].alignment != pytest.approx(two["lora_sam"].alignment, rel=1e-3)


def test_auxiliary_pair_is_scaled_by_its_own_factor():
    f = point()
    assert squared_norm(factored(f)) == pytest.approx(float((2.0 * f.B @ f.A).square().sum()), rel=1e-12)


def test_the_measure_with_and_without_an_auxiliary():
    model = with_lora(tiny_bert())
    auxiliary = WeightSpace.lora(with_lora(tiny_bert(), seed=6)).factors
    space, objective = WeightSpace.lora(model), bert_objective()
    rows = MEASURE.run(objective, space, MEASURE.settings(), Trained(model, auxiliary, "bilora")).rows()
    assert all(tuple(r) == COLUMNS for r in rows)
    kinds = {q: {r["kind"] for r in rows if r["quantity"] == q} for q in ("overlap", "outside_share", "alignment")}
    assert kinds == {"overlap": {"column", "row"}, "outside_share": {*KINDS}, "alignment": {*KINDS}}
    assert {r["layer"] for r in rows} == {"", *auxiliary}
    plain = MEASURE.run(objective, space, MEASURE.settings(), Trained(model)).rows()
    assert {r["kind"] for r in plain} == {*KINDS} - {"auxiliary"}
    with pytest.raises(UserError, match="adapter"):
        MEASURE.run(objective, space, MEASURE.settings(), None)


def test_progress_counts_kinds():
    seen = []
    bert_reaches(with_lora(tiny_bert()), None, progress=lambda *at: seen.append(at))
    assert seen == [(i, 5) for i in range(1, 6)]


def test_auxiliary_of_another_adapter_is_one_line():
    with pytest.raises(UserError, match="differ in layer"):
        bert_reaches(with_lora(tiny_bert()), {"elsewhere": point()})


@pytest.mark.parametrize("change", [{"rho": 0.0}, {"sigma": math.inf}, {"kinds": ()}, {"kinds": ("random",)}])
def test_bad_settings_are_refused(change):
    with pytest.raises(UserError, match=next(iter(change))):
        MEASURE.settings.checked(**change)
