import json

import pytest
import torch
from safetensors.torch import save_file

from analysis.core import load_trained
from bilora.errors import UserError
from bilora.tasks import base_fingerprint
from tests.oracles import tiny

BATCH = tiny.padded(tiny.examples((5, 3)))


@pytest.fixture
def folder(tmp_path):
    model = tiny.with_lora(tiny.bert())
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        model.eval()
        tmp_path.joinpath("expected.json").write_text(json.dumps(model(**BATCH).logits.tolist()))
    return tmp_path


def test_a_peft_adapter_of_any_origin_loads(folder):
    trained = load_trained(folder, tiny.bert())
    expected = torch.tensor(json.loads((folder / "expected.json").read_text()), dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(trained.model(**BATCH).logits, expected)
    assert (trained.auxiliary, trained.method, trained.settings) == (None, None, {})
    assert not any(p.requires_grad for p in trained.model.parameters())
    assert not trained.model.training


def test_the_auxiliary_is_read_from_the_method_file(folder):
    layer = "bert.pooler.dense"
    A, B = torch.randn(2, 8), torch.randn(8, 2)
    metadata = {"method": "bilora", "settings": json.dumps({"rho": 0.05}), "scales": json.dumps({layer: 0.5})}
    tensors = {f"auxiliary.{layer}.A": A, f"auxiliary.{layer}.B": B}
    save_file(tensors, folder / "bilora_method.safetensors", metadata=metadata)
    trained = load_trained(folder, tiny.bert())
    assert (trained.method, trained.settings) == ("bilora", {"rho": 0.05})
    assert list(trained.auxiliary) == [layer]
    factors = trained.auxiliary[layer]
    assert torch.equal(factors.A, A)
    assert torch.equal(factors.B, B)
    assert factors.scale == 0.5


def test_a_method_without_auxiliary_has_none(folder):
    save_file({}, folder / "bilora_method.safetensors", metadata={"method": "lora", "settings": "{}"})
    trained = load_trained(folder, tiny.bert())
    assert (trained.method, trained.auxiliary) == ("lora", None)


def test_the_base_is_known_by_its_fingerprint(folder):
    (folder / "train.json").write_text(json.dumps({"base_fingerprint": base_fingerprint(tiny.bert())}))
    load_trained(folder, tiny.bert())
    with pytest.raises(UserError, match="another base model"):
        load_trained(folder, tiny.bert(seed=4))


def shapes(folder):
    return folder, tiny.bert(hidden=12)


def architecture(folder):
    return folder, tiny.llama()


def missing_folder(folder):
    return folder / "nowhere", tiny.bert()


def missing_weights(folder):
    (folder / "adapter_model.safetensors").unlink()
    return folder, tiny.bert()


def missing_config(folder):
    (folder / "adapter_config.json").unlink()
    return folder, tiny.bert()


def damaged_weights(folder):
    (folder / "adapter_model.safetensors").write_bytes(b"not tensors")
    return folder, tiny.bert()


def damaged_config(folder):
    (folder / "adapter_config.json").write_text("{")
    return folder, tiny.bert()


def damaged_record(folder):
    (folder / "train.json").write_text("{")
    return folder, tiny.bert()


def adapted_already(folder):
    return folder, tiny.with_lora(tiny.bert())


def wrapped_inside(folder):
    return folder, tiny.with_lora(tiny.bert()).get_base_model()


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (shapes, "another base model"),
        (architecture, "this base model lacks"),
        (missing_folder, "is no folder"),
        (missing_weights, "has no adapter_model.safetensors"),
        (missing_config, "has no adapter_config.json"),
        (damaged_weights, "damaged"),
        (damaged_config, "adapter_config.json is damaged"),
        (damaged_record, "damaged"),
        (adapted_already, "carries an adapter already"),
        (wrapped_inside, "carries an adapter already"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line_and_the_base_is_left_alone(folder, case, message):
    path, model = case(folder)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(UserError, match=message) as caught:
        load_trained(path, model)
    assert "\n" not in str(caught.value)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
