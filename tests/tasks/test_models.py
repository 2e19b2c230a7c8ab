import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from bilora.errors import UserError
from bilora.tasks import LoraSpec, add_lora, base_fingerprint, load_model, load_tokenizer, resolve_model


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory):
    """A local folder with a tiny Llama in bfloat16, whose config names no padding token, and MiniLM's tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = load_tokenizer("minilm")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_head_comes_from_the_seed_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = load_model("minilm", "classification", 2, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again, other = (load_model("minilm", "classification", 2, seed=seed) for seed in (0, 1))
    assert torch.equal(first.classifier.weight, again.classifier.weight)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
    assert first.classifier.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert {p.dtype for p in first.parameters()} == {torch.float32}
    assert not first.training


def test_factors_come_from_the_seed_alone():
    factors = []
    for noise, seed in [(1, 0), (2, 0), (3, 1)]:
        model = load_model("minilm", "classification", 2)
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        wrapped = add_lora(model, LoraSpec(r=4), "classification", seed)
        assert torch.equal(torch.get_rng_state(), before)
        factors.append(
            wrapped.get_parameter("base_model.model.bert.encoder.layer.0.output.dense.lora_A.default.weight")
        )
    assert torch.equal(factors[0], factors[1])
    assert not torch.equal(factors[0], factors[2])


def test_local_language_model_is_float32_and_can_pad(tiny_llama):
    tokenizer = load_tokenizer(tiny_llama)
    model = load_model(tiny_llama, "causal_lm", tokenizer=tokenizer)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert (
        model.config.pad_token_id == tokenizer.pad_token_id == load_model(tiny_llama, "causal_lm").config.pad_token_id
    )
    assert tokenizer.padding_side == "right"


def test_fingerprint_survives_wrapping_and_training_of_the_adapter(tiny_llama):
    for model, kind in [
        (load_model("minilm", "classification", 2, seed=0), "classification"),
        (load_model(tiny_llama, "causal_lm"), "causal_lm"),
    ]:
        plain = base_fingerprint(model)
        wrapped = add_lora(model, LoraSpec(), kind, 0)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(1.0)
        assert base_fingerprint(wrapped) == base_fingerprint(wrapped.get_base_model()) == plain


def test_fingerprint_sees_any_other_base():
    model = load_model("minilm", "classification", 2, seed=0)
    first = base_fingerprint(model)
    assert base_fingerprint(load_model("minilm", "classification", 5, seed=7)) == first
    weight = model.bert.encoder.layer[3].output.dense.weight
    with torch.no_grad():
        weight[-1, -1] = torch.nextafter(weight[-1, -1], torch.tensor(np.inf))
    assert base_fingerprint(model) != first
    assert base_fingerprint(model.to(torch.bfloat16)) != first


def test_fingerprint_with_a_saved_module_inside_the_body():
    from peft import LoraConfig, get_peft_model

    model = load_model("minilm", "classification", 2)
    plain = base_fingerprint(model)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["query"], modules_to_save=["pooler", "classifier"]))
    with torch.no_grad():
        wrapped.base_model.model.bert.pooler.modules_to_save["default"].dense.weight.add_(1.0)
    assert base_fingerprint(wrapped) == plain


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./no/such/folder", "no model folder at"),
        ("", "has no name"),
        ("missing.gguf", "no model file at"),
    ],
)
def test_missing_model(name, message):
    with pytest.raises(UserError, match=message):
        resolve_model(name)


def test_folders_that_are_no_base_model(tmp_path):
    with pytest.raises(UserError, match=r"holds no config\.json, not a base model"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds an adapter, not a base model"):
        load_model(str(tmp_path), "classification", 2)
    (tmp_path / "config.json").write_text('{"model_type": "no_such_architecture"}')
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        load_model(str(tmp_path), "classification", 2)
    assert "\n" not in str(caught.value)


def test_no_pickled_weights(tmp_path):
    BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8).save_pretrained(tmp_path)
    model = BertModel(BertConfig.from_pretrained(tmp_path))
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        load_model(str(tmp_path), "classification", 2)


def test_unknown_target_modules():
    with pytest.raises(UserError, match="target_modules"):
        add_lora(load_model("minilm", "classification", 2), LoraSpec(target_modules="nothing"), "classification", 0)


@pytest.mark.slow
def test_gguf_model_saves_as_an_ordinary_one(tmp_path):
    pytest.importorskip("gguf")
    tokenizer = load_tokenizer("smollm2")
    model = load_model("smollm2", "causal_lm", tokenizer=tokenizer)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = load_model(str(tmp_path), "causal_lm")
    assert base_fingerprint(again) == base_fingerprint(model)
    ids = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(model(**ids).logits, again(**ids).logits)
        assert tokenizer.decode(model(**ids).logits[0, -1].argmax()).strip() == "Paris"
