"""m-sharpness against groups computed by hand, closed forms, and the worst case of all examples at once."""

import copy
import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from analysis.comparable import check_same_m
from analysis.core import COLUMNS, Objective, WeightSpace
from analysis.frame import to_frame
from analysis.sharpness.adversarial import adversarial_sharpness
from analysis.sharpness.m_sharpness import MEASURE, groups_of, m_sharpness
from analysis.sharpness.worst_case import worst_case_sharpness
from analysis.statistics import paired_differences
from bilora.errors import UserError
from tests.oracles import tiny
from tests.sharpness.cases import (
    LENGTHS,
    Fault,
    Quadratic,
    assert_same_bits,
    bert_objective,
    fail_at,
    normal,
    quadratic_objective,
    sentences,
    state,
    tiny_bert,
    with_lora,
)


def six_examples():
    """In batches of 4 and 2."""
    x = normal(6, 15, seed=4)
    return Objective([{"x": x[:4]}, {"x": x[4:]}], name="train"), x


def six_sentences():
    """Batches of 4 and 2 sentences, padded to different lengths."""
    ids = sentences()[:6]
    labels = torch.tensor([n % 3 for n in LENGTHS[:6]])
    batches = []
    for part in (slice(0, 4), slice(4, 6)):
        masks = [torch.ones_like(row) for row in ids[part]]
        batches.append(
            {
                "input_ids": nn.utils.rnn.pad_sequence(ids[part], batch_first=True),
                "attention_mask": nn.utils.rnn.pad_sequence(masks, batch_first=True),
                "labels": labels[part],
            }
        )
    return Objective(batches), list(zip(ids, labels, strict=True))


def test_two_groups_of_a_quadratic_by_hand():
    model = Quadratic()
    objective, _ = six_examples()
    result = m_sharpness(objective, WeightSpace.all(model), [0.2, 1.5], m=3)
    theta = model.theta().detach()
    parts = [torch.cat([batch["x"] for batch in group.batches]) for group in groups_of(objective, 3, seed=0)]
    assert [len(part) for part in parts] == [3, 3]
    for i, rho in enumerate((0.2, 1.5)):
        rises = []
        for part in parts:
            g = model.H @ (theta - part.mean(0))
            d = rho * g / g.norm()
            rises.append(float(g @ d + 0.5 * d @ model.H @ d))
        np.testing.assert_allclose(result.rises[i], rises, rtol=1e-11)
        assert result.mean[i] == pytest.approx(sum(rises) / 2, rel=1e-11)
        assert result.standard_error[i] == pytest.approx(np.std(rises, ddof=1) / math.sqrt(2), rel=1e-9)
        np.testing.assert_allclose(result.induced_norms[i], rho, rtol=1e-12)


@pytest.mark.parametrize("kind", ["isotropic", "elementwise", "filter"])
def test_all_examples_in_one_group_are_the_worst_case(kind):
    model, objective = with_lora(tiny_bert()), bert_objective()
    space = WeightSpace.full(model)
    whole = worst_case_sharpness(objective, space, [0.5], kind=kind, steps=4, restarts=2).points[0]
    searched = m_sharpness(objective, space, [0.5], m=7, kind=kind, steps=4, restarts=2)
    assert searched.mean[0] == pytest.approx(whole.lower_bound, rel=1e-12)
    assert searched.induced_norms[0, 0] == pytest.approx(whole.induced_norm, rel=1e-12)
    assert math.isnan(searched.standard_error[0])
    one = m_sharpness(objective, space, [0.5], m=7, kind=kind)
    assert one.mean[0] == pytest.approx(whole.one_step, rel=1e-12)


def test_a_group_over_two_padded_batches_is_its_sentences():
    objective, examples = six_sentences()
    model = tiny_bert()
    space = WeightSpace.full(model)
    loss_of = {
        tuple(ids.tolist()): model(input_ids=ids[None], labels=label[None]).loss.item() for ids, label in examples
    }
    seen, widths = [], set()
    for group in groups_of(objective, 3, seed=0):
        held = [
            tuple(ids[mask.bool()].tolist())
            for batch in group.batches
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        seen += held
        widths.add(tuple(batch["input_ids"].shape[1] for batch in group.batches))
        assert group.loss(space) == pytest.approx(sum(loss_of[ids] for ids in held) / 3, rel=1e-12)
    assert sorted(seen) == sorted(loss_of)
    assert any(len(set(of_group)) == 2 for of_group in widths)  # nothing was padded anew


@pytest.mark.parametrize("m", [1, 2, 3, 6])
def test_groups_hold_every_example_once(m):
    objective, x = six_examples()
    groups = groups_of(objective, m, seed=0)
    held = torch.cat([batch["x"] for group in groups for batch in group.batches])
    assert sorted(held.tolist()) == sorted(x.tolist())
    assert [group.weight for group in groups] == [m] * (6 // m)
    assert {group.name for group in groups} == {"train"}


def test_one_step_of_each_group_of_a_bert():
    objective, _ = six_sentences()
    space = WeightSpace.full(with_lora(tiny_bert()))
    result = m_sharpness(objective, space, [0.1, 0.4], m=2)
    for j, group in enumerate(groups_of(objective, 2, seed=0)):
        expected = adversarial_sharpness(group, space, [0.1, 0.4])
        np.testing.assert_allclose(result.rises[:, j], [p.loss_rise for p in expected.points], rtol=1e-9)


def test_smaller_groups_give_larger_values():
    objective, _ = six_sentences()
    space = WeightSpace.full(with_lora(tiny_bert()))
    means = [m_sharpness(objective, space, [0.5], m=m, steps=8).mean[0] for m in (1, 2, 6)]
    assert means == sorted(means, reverse=True)
    assert means[0] > 1.2 * means[2]


@pytest.mark.parametrize("shifted", [True, False])
def test_groups_of_a_language_model_weigh_by_their_tokens(shifted):
    chosen = tiny.examples((10, 3, 7, 5), vocabulary=30)
    batches = [tiny.language_batch(part) for part in tiny.split(chosen, (3, 1))]
    objective = Objective(batches, shifted=shifted)
    space = WeightSpace.all(tiny.gpt2())
    result = m_sharpness(objective, space, [0.3], m=2, seed=1)
    lost = 1 if shifted else 0
    tokens = [
        sum(int(batch["attention_mask"].sum()) for batch in group.batches) for group in groups_of(objective, 2, seed=1)
    ]
    assert result.weights.tolist() == [n - 2 * lost for n in tokens]
    assert sum(tokens) == 25
    assert tokens[0] != tokens[1]
    share = result.weights / result.weights.sum()
    assert result.mean[0] == pytest.approx(float(share @ result.rises[0]), rel=1e-12)
    assert abs(result.mean[0] - result.rises[0].mean()) > 1e-6
    if shifted:  # as GPT-2's own loss is, in float32
        whole = sum(w * g.loss(space) for w, g in zip(share, groups_of(objective, 2, seed=1), strict=True))
        assert whole == pytest.approx(objective.loss(space), rel=1e-6)


def test_standard_error_is_that_of_a_weighted_mean():
    """Groups of equal weight give the usual formula; unequal ones the ratio estimator's."""
    result = m_sharpness(six_examples()[0], WeightSpace.all(Quadratic()), [0.5], m=1)
    expected = np.std(result.rises[0], ddof=1) / math.sqrt(6)
    assert result.standard_error[0] == pytest.approx(expected, rel=1e-12)
    assert result.standard_error[0] > 0


def test_groups_are_named_by_their_seed():
    objective, _ = six_examples()

    def parts(seed, of=objective):
        return [{tuple(x) for batch in group.batches for x in batch["x"].tolist()} for group in groups_of(of, 2, seed)]

    assert parts(3) == parts(3)
    assert any(parts(seed) != parts(0) for seed in range(1, 5))
    neighbours = [{tuple(x) for x in objective.batches[0]["x"][i : i + 2].tolist()} for i in (0, 2)]
    assert any(not any(pair in parts(seed) for pair in neighbours) for seed in range(5))
    results = [m_sharpness(objective, WeightSpace.all(Quadratic()), [0.5], m=2, seed=seed) for seed in range(4)]
    assert len({float(result.mean[0]) for result in results}) > 1
    assert [result.seed for result in results] == [0, 1, 2, 3]


def test_standard_error_is_the_spread_over_fresh_examples_grouped_anew():
    """Examples come sorted, as those of a dataset do: groups of neighbours would give a far larger standard error."""
    space, means, errors, of_neighbours = WeightSpace.all(Quadratic()), [], [], []
    model = space.model
    theta = model.theta().detach()
    for draw in range(250):
        x = normal(12, 15, seed=100 + draw)
        x = x[((theta - x) @ model.H).norm(dim=1).argsort()]
        result = m_sharpness(Objective([{"x": x}]), space, [0.3], m=3, seed=draw)
        means.append(result.mean[0])
        errors.append(result.standard_error[0])
        g = torch.stack([model.H @ (theta - part.mean(0)) for part in x.split(3)])
        d = 0.3 * g / g.norm(dim=1, keepdim=True)
        rises = (g * d).sum(1) + 0.5 * torch.einsum("bi,ij,bj->b", d, model.H, d)
        of_neighbours.append(float(rises.std() / 2))
    variance = np.var(means, ddof=1)
    assert np.mean(np.square(errors)) == pytest.approx(variance, rel=0.25)
    assert np.mean(np.square(of_neighbours)) > 1.5 * variance


def test_a_group_that_leaves_the_numbers_stays_visible():
    class Overflowing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return {"loss": (x.mean() * self.layer.weight.square().sum()).exp()}

    x = torch.tensor([[1e-6], [1e-6], [1.0], [1.0]])
    objective, space = Objective([{"x": x}]), WeightSpace.full(Overflowing())
    result = m_sharpness(objective, space, [50.0], m=1)
    assert np.isfinite(result.rises[0]).sum() == 2
    assert np.isposinf(result.rises[0]).sum() == 2
    assert np.isposinf(result.mean[0])
    assert math.isnan(result.standard_error[0])
    assert [r["value"] for r in result.rows() if r["quantity"] == "loss_rise"] == [math.inf]


@pytest.mark.parametrize(("m", "cure"), [(4, "measure 4 examples"), (8, "take m = 6")])
def test_groups_that_do_not_come_out_are_refused(m, cure):
    with pytest.raises(UserError, match=cure) as error:
        m_sharpness(six_examples()[0], WeightSpace.all(Quadratic()), [0.1], m=m)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("kind", "label"), [("isotropic", "m=3"), ("elementwise", "m=3 elementwise")])
def test_rows_carry_m_in_their_kind(kind, label):
    settings = MEASURE.settings(radii=(0.1, 0.5), m=3, kind=kind, seed=4)
    result = MEASURE.run(six_examples()[0], WeightSpace.all(Quadratic()), settings, None)
    rows = result.rows()
    assert all(tuple(r) == COLUMNS for r in rows)
    assert {(r["measure"], r["space"], r["split"], r["kind"]) for r in rows} == {("m_sharpness", "all", "train", label)}
    assert {r["direction_seed"] for r in rows} == {4}
    rises = [r for r in rows if r["quantity"] == "loss_rise"]
    assert [(r["radius"], r["value"], r["standard_error"]) for r in rises] == list(
        zip((0.1, 0.5), result.mean, result.standard_error, strict=True)
    )
    assert [(r["quantity"], r["value"]) for r in rows if r["quantity"] != "loss_rise"] == [
        ("groups", 2),
        ("steps", 1),
        ("restarts", 1),
    ]


def measured(method, m, seed=0):
    result = m_sharpness(six_examples()[0], WeightSpace.all(Quadratic()), [0.1], m=m)
    return to_frame(result, method=method, seed=seed)


def test_values_of_different_m_are_never_compared():
    with pytest.raises(UserError, match="not comparable"):
        paired_differences(pd.concat([measured("LoRA", 3), measured("Bi-LoRA", 2)]), "LoRA")
    both = pd.concat([measured("LoRA", 3), measured("Bi-LoRA", 3)])
    assert not paired_differences(both, "LoRA").empty


def test_methods_measured_with_different_m_are_refused():
    with pytest.raises(UserError, match=r"m=3 for LoRA but m=2 for Bi-LoRA") as error:
        check_same_m(pd.concat([measured("LoRA", 3), measured("Bi-LoRA", 2)]))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="m=2, m=3"):
        check_same_m(pd.concat([measured("LoRA", 3), measured("Bi-LoRA", 2), measured("Bi-LoRA", 3)]))


def test_methods_measured_with_the_same_m_pass():
    same = pd.concat([measured(method, m) for method in ("LoRA", "Bi-LoRA") for m in (2, 3)])
    check_same_m(same)
    elsewhere = measured("LoRA", 6).assign(space="lora")
    check_same_m(pd.concat([same, elsewhere]))
    other = measured("Full FT", 6).assign(measure="worst_case")
    check_same_m(pd.concat([same, other]))
    check_same_m(same.iloc[:0])


def test_m_swapped_between_spaces_is_refused():
    frames = [
        measured(method, m).assign(space=space)
        for method, space, m in (("A", "full", 2), ("A", "lora", 3), ("B", "full", 3), ("B", "lora", 2))
    ]
    with pytest.raises(UserError, match="space full"):
        check_same_m(pd.concat(frames))


@pytest.mark.parametrize("steps", [1, 3])
def test_weights_are_the_same_bits_after_success_and_interrupts(steps):
    model = with_lora(tiny_bert(torch.float32))
    space, users = WeightSpace.lora(model), state(model)
    before = state(space.model)
    objective, _ = six_sentences()
    m_sharpness(objective, space, [0.5], m=3, kind="filter", steps=steps)
    assert_same_bits(space.model, before)
    handle = fail_at(space.model, 4)
    with pytest.raises(Fault):
        m_sharpness(objective, space, [0.5], m=3, kind="filter", steps=steps)
    handle.remove()
    assert_same_bits(space.model, before)

    calls = []

    def interrupt(module, arguments):
        calls.append(None)
        if len(calls) == 6:
            raise KeyboardInterrupt

    space.model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        m_sharpness(objective, space, [0.5], m=3, steps=steps)
    assert_same_bits(space.model, before)
    assert_same_bits(model, users)


def test_same_seed_same_result():
    model, (objective, _) = with_lora(tiny_bert(torch.float32)), six_sentences()
    runs = [
        m_sharpness(copy.deepcopy(objective), WeightSpace.full(model), [0.3], m=3, steps=3, restarts=2, seed=4)
        for _ in range(2)
    ]
    assert np.array_equal(runs[0].rises, runs[1].rises)


def test_progress_counts_groups_and_radii():
    seen = []
    m_sharpness(six_examples()[0], WeightSpace.all(Quadratic()), [0.1, 0.2], m=2, watch=lambda *at: seen.append(at[:2]))
    assert seen == [(i, 6) for i in range(1, 7)]


@pytest.mark.parametrize("change", [{"radii": []}, {"m": 0}, {"kind": "rows"}, {"steps": 0}, {"restarts": 0}])
def test_bad_settings_are_one_line(change):
    objective, _ = quadratic_objective()
    with pytest.raises(UserError, match=next(iter(change))) as error:
        m_sharpness(objective, WeightSpace.all(Quadratic()), **{"radii": [0.1], "m": 5, **change})
    assert "\n" not in str(error.value)
