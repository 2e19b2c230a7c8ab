"""Flat-LoRA's noise: its law, its schedule, and base weights that are never written."""

import math

import pytest
import torch

from bilora import FlatLora
from bilora.adapters.layers import adapted_layers
from bilora.adapters.swap import swapped
from bilora.methods import Step
from bilora.methods.flat_lora import _squared_row_norms, merged_squared_row_norms
from tests.training.tiny import pad, ragged_data, tiny_bert, with_lora


def nonzero(model):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def noise(method, layer, step):
    before = layer.base_weight.detach().clone()
    with method.perturbed(step):
        return layer.base_weight.detach() - before


def test_law_of_the_noise():
    """Rows are normal with variance sigma_t²/n·‖W'_i‖² of the merged weight, fresh at each step, same for a step."""
    model = nonzero(with_lora(tiny_bert()))
    method = FlatLora(sigma=0.3)
    method.prepare(model, seed=0)
    layer = next(la for n, la in adapted_layers(model).items() if n.endswith("output.dense"))
    n = layer.A.shape[1]
    assert torch.equal(noise(method, layer, Step(1, 2, 11)), noise(method, layer, Step(1, 2, 11)))
    many = []
    for seed in range(400):
        method._drawn_at = None
        many.append(noise(method, layer, Step(1, 2, seed)))
    sample = torch.stack(many)
    sigma_t = 0.3 * 0.5 * (1 - math.cos(math.pi / 2))
    merged = layer.base_weight.detach() + layer.scale * layer.B.detach() @ layer.A.detach()
    expected = sigma_t * merged.norm(dim=1) / math.sqrt(n)
    # 400·n draws per row: the sample deviation is within 5 standard errors of the truth.
    torch.testing.assert_close(sample.std(dim=(0, 2)), expected, rtol=5 / math.sqrt(2 * 400 * n), atol=0)
    standardised = sample / expected[None, :, None]
    assert abs(float(standardised.mean())) < 5 / math.sqrt(standardised.numel())
    assert float((standardised**4).mean()) == pytest.approx(3.0, abs=5 * math.sqrt(96 / standardised.numel()))


def test_row_norms_of_the_merged_weight():
    for layer in adapted_layers(nonzero(with_lora(tiny_bert()))).values():
        got = merged_squared_row_norms(layer, _squared_row_norms(layer))
        torch.testing.assert_close(got, layer.merged_weight(torch.float64).square().sum(1), rtol=1e-12, atol=0)


def test_schedule_rises_from_zero():
    model = with_lora(tiny_bert())
    method = FlatLora(sigma=0.2)
    method.prepare(model, seed=0)
    layer = next(iter(adapted_layers(model).values()))
    assert not noise(method, layer, Step(0, 10, 0)).any()
    found = []
    for index in (0, 5, 10):
        method.after_update(Step(index, 10, 0))
        noise(method, layer, Step(index, 10, 0))
        found.append(method.metrics()["sigma_t"])
    assert found == pytest.approx([0.0, 0.1, 0.2])


def test_one_draw_for_a_whole_accumulation_window(train):
    model = with_lora(tiny_bert())
    seen = []
    layer = next(iter(adapted_layers(model).values()))
    layer.module.register_forward_hook(lambda *_: seen.append(layer.base_weight.detach().clone()))
    train(model, FlatLora(sigma=0.5), per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=2)
    assert torch.equal(seen[2], seen[3])
    assert not torch.equal(seen[0], seen[2])


def test_gradient_is_taken_at_the_perturbed_weights():
    model = nonzero(with_lora(tiny_bert()))
    method = FlatLora(sigma=0.5)
    method.prepare(model, seed=0)
    batch = pad(list(ragged_data()))
    with method.perturbed(Step(1, 2, 0)):
        model.train()(**batch).loss.backward()
        copies = {n: la.base_weight.detach().clone() for n, la in adapted_layers(model).items()}
    got = {n: la.B.grad.clone() for n, la in adapted_layers(model).items()}
    other = nonzero(with_lora(tiny_bert()))
    with torch.no_grad():
        for n, la in adapted_layers(other).items():
            la.base_weight.copy_(copies[n])
    other.train()(**batch).loss.backward()
    for n, la in adapted_layers(other).items():
        torch.testing.assert_close(got[n], la.B.grad, rtol=1e-12, atol=1e-15)


def test_base_weights_survive_a_step_that_raises(train):
    model = with_lora(tiny_bert(dtype=torch.float32))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    layer = next(iter(adapted_layers(model).values()))
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("injected")

    layer.module.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="injected"):
        train(model, FlatLora(sigma=0.5))
    after = dict(model.named_parameters())
    assert all(torch.equal(after[n], p) for n, p in before.items())


def test_swapped_restores_and_refuses():
    weight = torch.nn.Parameter(torch.arange(3.0))
    storage = weight.data_ptr()

    def fail_inside():
        with swapped({weight: torch.ones(3)}):
            assert torch.equal(weight, torch.ones(3))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert weight.data_ptr() == storage
    assert torch.equal(weight, torch.arange(3.0))
    with pytest.raises(ValueError, match="does not fit"), swapped({weight: torch.ones(4)}):
        pass
