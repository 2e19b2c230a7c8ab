"""Factors read from an adapter's folder are those PEFT loads onto the base."""

import json
import shutil

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model

from analysis.core.adapter_files import read_factors
from bilora.adapters.layers import adapted_layers
from bilora.errors import UserError
from tests.sharpness.cases import tiny_bert


def saved(folder, config):
    torch.manual_seed(0)
    get_peft_model(tiny_bert(torch.float32), config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"query": 4, r"encoder\.layer\.1\.output\.dense": 3}},
        {"alpha_pattern": {"value": 64, r"layer\.0\.attention\.self\.key": 3}, "rank_pattern": {"value": 5}},
        {"modules_to_save": ["classifier"]},
    ],
)
def test_factors_and_scales_are_those_peft_loads(tmp_path, options):
    config = LoraConfig(
        r=2, lora_alpha=8, target_modules="all-linear", task_type="SEQ_CLS", init_lora_weights=False, **options
    )
    folder = saved(tmp_path / "adapter", config)
    expected = adapted_layers(PeftModel.from_pretrained(tiny_bert(torch.float32), str(folder)))
    found = read_factors(folder)
    assert found.keys() == expected.keys()
    for name, layer in expected.items():
        assert torch.equal(found[name].A, layer.A.data), name
        assert torch.equal(found[name].B, layer.B.data), name
        assert found[name].scale == pytest.approx(layer.scale, rel=1e-12), name


def test_what_cannot_be_read_is_one_line(tmp_path):
    plain = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    whole = saved(tmp_path / "lora", plain)

    def changed(name, change):
        folder = tmp_path / name
        shutil.copytree(whole, folder)
        change(folder)
        return folder

    def config_with(**values):
        def change(folder):
            path = folder / "adapter_config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

        return change

    ia3 = IA3Config(target_modules=["key"], feedforward_modules=[], task_type="SEQ_CLS")
    cases = {
        "has no adapter_config.json": tmp_path,
        "holds a DoRA adapter": changed("dora", config_with(use_dora=True)),
        "holds a IA3 adapter": saved(tmp_path / "ia3", ia3),
        "has no adapter_model.safetensors": changed("empty", lambda f: (f / "adapter_model.safetensors").unlink()),
        "is damaged": changed("cut", lambda f: (f / "adapter_model.safetensors").write_bytes(b"\0" * 20)),
        "adapter_config.json is damaged": changed("words", lambda f: (f / "adapter_config.json").write_text("{")),
    }
    for message, folder in cases.items():
        with pytest.raises(UserError, match=message) as refusal:
            read_factors(folder)
        assert "\n" not in str(refusal.value)
