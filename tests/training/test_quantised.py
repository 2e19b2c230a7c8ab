"""QLoRA: adapters on a base model whose weights are packed to 4 bits (nf4)."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.integrations import dequantize_module_weight

from bilora import METHODS, build_method
from bilora.adapters.layers import adapted_layers
from bilora.errors import UserError
from bilora.methods import Step
from tests.training.tiny import factors, pad, ragged_data, tiny_bert

bnb = pytest.importorskip("bitsandbytes")

BATCH = pad(list(ragged_data()))
KEPT = [name for name in ("lora", "bilora", "lora_sam", "lora_obar", "lora_nbar") if name in METHODS]
REFUSED = [name for name in ("flat_lora", "rwp_full", "sam") if name in METHODS]


def nf4_bert(storage=torch.uint8):
    """Every linear layer of the encoder as nf4, computing in float32."""
    model = tiny_bert(dtype=torch.float32)
    for name, module in list(model.bert.encoder.named_modules()):
        if isinstance(module, torch.nn.Linear):
            packed = bnb.nn.Linear4bit(
                module.in_features,
                module.out_features,
                compute_dtype=torch.float32,
                quant_type="nf4",
                quant_storage=storage,
            )
            packed.load_state_dict(module.state_dict())
            # Where the CPU multiplies bfloat16, evaluation would repack the weights, which needs sizes divisible by 32.
            packed.support_avx512bf16_for_cpu = False
            model.bert.encoder.set_submodule(name, packed.to("cpu"))
    model.is_loaded_in_4bit = True
    return model


def dequantised_bert():
    """The same function in float32: each weight is what the packed one stands for."""
    model, packed = tiny_bert(dtype=torch.float32), nf4_bert()
    with torch.no_grad():
        for name, module in packed.named_modules():
            if isinstance(module, bnb.nn.Linear4bit):
                model.get_parameter(f"{name}.weight").copy_(dequantize_module_weight(module))
    return model


def adapted(model, **options):
    torch.manual_seed(1)
    config = LoraConfig(
        task_type="SEQ_CLS", r=2, lora_alpha=4, target_modules=r".*encoder.*(query|value|dense)", **options
    )
    return get_peft_model(model, config)


def frozen(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_trains_as_on_the_dequantised_base(train, tmp_path, name, options):
    """Three steps equal those on a float model of the same function; the packed weights keep every bit."""
    packed, floating = adapted(nf4_bert(), **options), adapted(dequantised_bert(), **options)
    before, start = frozen(packed), factors(packed)
    trainer = train(packed, build_method(name))
    train(floating, build_method(name))
    after, expected = factors(packed), factors(floating)
    for key, tensor in expected.items():
        torch.testing.assert_close(after[key], tensor, rtol=1e-4, atol=1e-6)
    assert any(not torch.equal(after[key], tensor) for key, tensor in start.items())
    assert all(torch.equal(frozen(packed)[key], tensor) for key, tensor in before.items())
    trainer.save_model(str(tmp_path / "adapter"))
    reloaded = PeftModel.from_pretrained(nf4_bert(), tmp_path / "adapter").eval()
    assert torch.equal(reloaded(**BATCH).logits, packed.eval()(**BATCH).logits)


def test_the_auxiliary_perturbs_the_dequantised_weight():
    """One gradient of Bi-LoRA at a radius that is felt, against autograd through W + s2·B2·A2."""
    model, method = adapted(nf4_bert()), build_method("bilora", {"rho": 5.0})
    method.prepare(model, seed=0)
    name, layer = next(iter(adapted_layers(model).items()))
    state = method.state_dict()
    A2 = state[f"auxiliary.{name}.A"]
    B2 = torch.randn(len(state[f"auxiliary.{name}.B"]), len(A2))
    pairs = method.optimizer_groups()[0][0]
    with torch.no_grad():
        next(p for p in pairs if p.shape == B2.shape).copy_(B2)
    x = torch.randn(5, layer.A.shape[1])
    with method.perturbed(Step(0, 1, 0)):
        got = layer.module.train()(x)
    weight = layer.merged_weight() + layer.scale * B2 @ A2
    torch.testing.assert_close(got, x @ weight.T + layer.module.get_base_layer().bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("name", REFUSED)
def test_methods_that_need_base_weights_refuse(name, storage):
    """Also where the packed bits lie under a floating-point type."""
    with pytest.raises(UserError, match=r"is quantised \(nf4\)") as caught:
        build_method(name).prepare(adapted(nf4_bert(storage)), seed=0)
    assert "\n" not in str(caught.value)
