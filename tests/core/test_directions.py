import torch

from analysis.core import WeightSpace, filter_normalized, gaussian
from tests.oracles import tiny


def test_compared_models_share_their_directions():
    one = WeightSpace.full(tiny.with_lora(tiny.bert(), seed=1))
    two = WeightSpace.full(tiny.with_lora(tiny.bert(torch.float32, seed=9), seed=7))
    first, second = gaussian(one, 5, 2), gaussian(two, 5, 2)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name].float(), second[name])


def test_a_direction_does_not_depend_on_which_other_parameters_are_there():
    model = tiny.bert()
    whole = WeightSpace.all(model)
    some = WeightSpace.named(model, r"bert\.pooler.*|.*query\.weight")
    reversed_order = WeightSpace("reversed", whole.model, dict(reversed(whole.parameters.items())), {})
    expected = gaussian(whole, 0, 0)
    for space in (some, reversed_order):
        for name, step in gaussian(space, 0, 0).items():
            assert torch.equal(step, expected[name])


def test_seed_and_number_and_name_make_different_directions():
    space = WeightSpace.full(tiny.bert())
    name = "bert.encoder.layer.0.attention.self.query.weight"
    other = "bert.encoder.layer.0.attention.self.key.weight"
    base = gaussian(space, 0, 0)
    different = [gaussian(space, 1, 0)[name], gaussian(space, 0, 1)[name], base[other]]
    assert all(not torch.equal(base[name], step) for step in different)
    everything = torch.cat([step.flatten() for step in base.values()])
    assert abs(float(everything.mean())) < 4 / len(everything) ** 0.5
    assert abs(float(everything.var()) - 1) < 4 * (2 / len(everything)) ** 0.5


def test_filter_normalised_rows_have_the_norms_of_the_weights_rows():
    space = WeightSpace.all(tiny.bert())
    with torch.no_grad():
        space.parameters["bert.pooler.dense.weight"][0] = 0
    raw = gaussian(space, 0, 0)
    normalized = filter_normalized(space, raw)
    assert normalized.keys() == space.parameters.keys()
    for name, weight in space.parameters.items():
        if weight.dim() == 1:
            assert not normalized[name].any()
            continue
        torch.testing.assert_close(normalized[name].norm(dim=1), weight.detach().norm(dim=1), rtol=1e-12, atol=0)
        cosine = torch.cosine_similarity(normalized[name][1:], raw[name][1:], dim=1)
        expected = (weight.detach()[1:].norm(dim=1) > 0).double()  # the padding row of an embedding is zero
        torch.testing.assert_close(cosine, expected, rtol=1e-12, atol=1e-12)


def test_a_zero_direction_stays_zero():
    space = WeightSpace.full(tiny.bert())
    zero = {name: torch.zeros_like(p) for name, p in space.parameters.items()}
    assert not any(step.any() for step in filter_normalized(space, zero).values())
