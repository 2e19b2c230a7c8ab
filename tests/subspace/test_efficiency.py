"""Ascent efficiency of a tiny BERT in float64 against dense matrices and perturbations made by hand."""

import copy
import math

import numpy as np
import pytest
import torch

from analysis import WeightSpace
from analysis.core import COLUMNS, Factors, Trained
from analysis.core.vectors import norm, scaled
from analysis.subspace.efficiency import KINDS, MEASURE, RANDOM, ascent_efficiency
from analysis.subspace.lowrank import LowRank
from analysis.subspace.perturbations import last_applied, recorded
from bilora.errors import UserError
from bilora.training.recording import About, LayerMoment, Moment, join_moments, read_recording, write_moment
from tests.sharpness.cases import (
    Fault,
    assert_same_bits,
    bert_objective,
    change_gauge,
    fail_at,
    normal,
    randomise_factors,
    state,
    tiny_bert,
    with_lora,
)

RADIUS = 0.05


@pytest.fixture(scope="module")
def case():
    model = with_lora(tiny_bert())
    randomise_factors(model, 1)
    full, lora = WeightSpace.full(model), WeightSpace.lora(model)
    auxiliary = {
        layer: Factors(normal(f.B.shape[0], 3, seed=i), normal(3, f.A.shape[1], seed=100 + i), 0.7)
        for i, (layer, f) in enumerate(lora.factors.items())
    }
    return model, full, lora, auxiliary


@pytest.fixture(scope="module")
def measured(case):
    _, full, lora, auxiliary = case
    return ascent_efficiency(
        bert_objective(), full, lora, [RADIUS, 0.2], auxiliary=auxiliary, applied=steps_of(lora), draws=3, steps=6
    )


def steps_of(lora):
    """A perturbation of rank 1 in every layer."""
    return {
        layer: LowRank(normal(f.B.shape[0], 1, seed=200 + i), normal(1, f.A.shape[1], seed=300 + i))
        for i, (layer, f) in enumerate(lora.factors.items())
    }


def of(measured, kind, radius=RADIUS):
    (found,) = (a for a in measured.attained if (a.kind, a.radius) == (kind, radius))
    return found


def test_the_gradient_attains_all_of_the_first_order(case, measured):
    found = of(measured, "gradient")
    assert found.first_order[0] == pytest.approx(1, rel=1e-12)
    objective, full = bert_objective(), case[1]
    gradient = objective.gradient(full)
    with full.perturbed(scaled(gradient, RADIUS / norm(gradient))):
        loss = objective.loss(full)
    assert found.rises[0] == pytest.approx(loss - objective.loss(full), rel=1e-9)
    assert found.rank_r[0] >= 1


def test_the_truncated_gradient_is_the_best_of_rank_r(case, measured):
    """No perturbation of rank r attains more to first order; against dense decompositions."""
    assert of(measured, "gradient_rank_r").rank_r[0] == pytest.approx(1, rel=1e-10)
    _, full, lora, auxiliary = case
    gradient = bert_objective().gradient(full)
    leading = inner = squared = 0.0
    for layer, f in lora.factors.items():
        G, E = gradient[f"{layer}.weight"], 0.7 * auxiliary[layer].B @ auxiliary[layer].A
        leading += float(torch.linalg.svdvals(G)[: f.A.shape[0]].square().sum())
        inner, squared = inner + float((E * G).sum()), squared + float(E.square().sum())
    found = of(measured, "auxiliary")
    assert found.rank_r[0] == pytest.approx(inner / math.sqrt(squared * leading), rel=1e-9)
    assert found.first_order[0] == pytest.approx(inner / math.sqrt(squared) / norm(gradient), rel=1e-9)


def test_lora_sam_has_the_asked_length_in_full_space(case, measured):
    lora, objective = case[2], bert_objective()
    gradient = objective.gradient(lora)
    unit = scaled(gradient, 1 / norm(gradient))
    low, high = 0.0, 10.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if lora.induced_norm(unit, middle) < RADIUS else (low, middle)
    with lora.perturbed(unit, low):
        loss = objective.loss(lora)
    assert of(measured, "lora_sam").rises[0] == pytest.approx(loss - objective.loss(lora), rel=1e-6)


def test_the_best_is_at_least_that_of_each_kind(measured):
    for found in measured.attained:
        assert (found.rises <= measured.best[found.radius]).all()
        assert len(found.rises) == (3 if found.kind in RANDOM else 1)
    shares = {r["kind"]: r["value"] for r in measured.rows() if r["quantity"] == "efficiency" and r["radius"] == RADIUS}
    assert shares.keys() == set(KINDS)
    assert max(shares.values()) <= 1
    assert shares["gradient"] > 0.8
    assert abs(shares["isotropic"]) < 0.3


def test_rows(measured):
    rows = measured.rows()
    assert all(tuple(r) == COLUMNS for r in rows)
    noise = [r for r in rows if r["kind"] == "filter_noise" and r["quantity"] == "first_order_share"]
    found = of(measured, "filter_noise").first_order
    assert noise[0]["value"] == pytest.approx(found.mean())
    assert noise[0]["standard_error"] == pytest.approx(found.std(ddof=1) / math.sqrt(3))
    assert {r["induced_norm"] for r in rows if r["radius"] == RADIUS} == {RADIUS}
    assert sum(r["quantity"] == "best_rise" for r in rows) == 2


def test_only_lora_sam_depends_on_the_gauge(case, measured):
    model, _, _, auxiliary = case
    other = copy.deepcopy(model)
    change_gauge(other, 3.0)
    again = ascent_efficiency(
        bert_objective(),
        WeightSpace.full(other),
        WeightSpace.lora(other),
        [RADIUS],
        auxiliary=auxiliary,
        applied=steps_of(case[2]),
        draws=3,
        steps=6,
    )
    for kind in KINDS:
        first, second = of(measured, kind).rises, of(again, kind).rises
        if kind == "lora_sam":
            assert abs(first[0] - second[0]) > 1e-4 * abs(first[0])
        else:
            np.testing.assert_allclose(first, second, rtol=1e-6)


def test_weights_come_back_after_an_exception(case):
    _, full, lora, auxiliary = case
    objective = bert_objective()
    before = state(full.model), state(lora.model)
    for call in (3, 9, 25):
        hook = fail_at(full.model, call)
        with pytest.raises(Fault):
            ascent_efficiency(objective, full, lora, [RADIUS], auxiliary=auxiliary, draws=2, steps=4)
        hook.remove()
        assert_same_bits(full.model, before[0])
        assert_same_bits(lora.model, before[1])


def test_without_an_auxiliary_there_is_none_and_progress_reaches_its_end():
    model = with_lora(tiny_bert())
    full, lora = WeightSpace.full(model), WeightSpace.lora(model)
    told = []
    found = ascent_efficiency(
        bert_objective(), full, lora, [RADIUS, 0.2], draws=1, steps=2, watch=lambda *seen: told.append(seen)
    )
    assert [a.kind for a in found.attained] == 2 * [kind for kind in KINDS if kind not in ("applied", "auxiliary")]
    steps = [done for done, _, _ in told]
    assert steps == [*range(1, steps[-1] + 1)]
    assert {most for _, most, _ in told} == {steps[-1]}


def test_what_a_recorded_run_applied_last_is_one_of_the_kinds(case, measured, tmp_path):
    """Read from the run's folder by the measure: at the last step that had a perturbation, auxiliary or of factors."""
    model, _, lora, auxiliary = case
    about = About("made", {}, 0, 5, 10)
    for step, last in ((0, False), (5, True), (10, False)):
        layers = {}
        for layer, f in lora.factors.items():
            B, A = f.B.detach(), f.A.detach()
            pair = auxiliary[layer]
            held = {"auxiliary_B": pair.B, "auxiliary_A": pair.A, "auxiliary_scale": pair.scale} if last else {}
            layers[layer] = LayerMoment(A, B, f.scale, eps_A=0.1 * A if step == 0 else None, **held)
        write_moment(tmp_path, Moment(step, layers), about)
    join_moments(tmp_path)
    applied = last_applied(read_recording(tmp_path))
    for layer, eps in applied.items():
        expected = 0.7 * auxiliary[layer].B @ auxiliary[layer].A
        torch.testing.assert_close(eps.left @ eps.right, expected, rtol=1e-12, atol=1e-14)
    settings = MEASURE.settings(radii=(RADIUS,), draws=3, steps=6)
    rows = MEASURE.run(bert_objective(), lora, settings, Trained(model, folder=tmp_path)).rows()
    found = {r["kind"]: r["value"] for r in rows if r["quantity"] == "loss_rise"}
    assert found["applied"] == pytest.approx(of(measured, "auxiliary").rises[0], rel=1e-9)
    assert "auxiliary" not in found
    factor_step = recorded(LayerMoment(normal(2, 7, seed=1), normal(5, 2, seed=2), 2.0, eps_A=normal(2, 7, seed=3)))
    expected = 2.0 * normal(5, 2, seed=2) @ normal(2, 7, seed=3)
    torch.testing.assert_close(factor_step.left @ factor_step.right, expected, rtol=1e-12, atol=1e-14)
    assert recorded(LayerMoment(normal(2, 7, seed=1), normal(5, 2, seed=2), 2.0, noise=(1.0, 0.5))) is None


def test_a_direction_that_is_zero_attains_no_number(case):
    """Factors of which both are 0 have no gradient, and so LoRA-SAM no step; a zero auxiliary likewise."""
    model = copy.deepcopy(case[0])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.zero_()
    full, lora = WeightSpace.full(model), WeightSpace.lora(model)
    zero = {layer: Factors(torch.zeros_like(f.B), f.A.detach() + 1, 1.0) for layer, f in lora.factors.items()}
    found = ascent_efficiency(bert_objective(), full, lora, [RADIUS], auxiliary=zero, draws=2, steps=2)
    for r in found.rows():
        assert math.isnan(r["value"]) == (r["kind"] in ("lora_sam", "auxiliary")), (r["kind"], r["quantity"])
    assert found.best[RADIUS] > 0


def test_bad_settings_are_one_line(case):
    _, full, lora, _ = case
    for settings, word in (({"radii": [0.0]}, "radii"), ({"draws": 0}, "draws"), ({"steps": 0}, "steps")):
        with pytest.raises(UserError, match=word):
            ascent_efficiency(bert_objective(), full, lora, **{"radii": [0.1], **settings})
