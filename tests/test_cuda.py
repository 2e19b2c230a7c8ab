"""On a GPU: every method trains, and every measure gives the numbers that it gives on the CPU."""

import pytest
import torch
from transformers import TrainingArguments

from analysis import MEASURES, Objective, WeightSpace, top_eigenvalues
from analysis.core import Trained
from bilora import METHODS, BiLoraTrainer, build_method
from tests.oracles import tiny
from tests.training.tiny import factors, pad, ragged_data, tiny_bert, with_lora

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SMALL = {"directions": 2, "k": 2, "m": 7, "points": 5, "runs": 2, "restarts": 1, "draws": 1, "steps": 4}
MODES = {"float32": {}, "bf16": {"bf16": True}, "fp16": {"fp16": True}}


def trained(folder, name, device, steps=4, resume=None, **arguments):
    """A model after ``steps`` AdamW steps of two micro-batches."""
    model = tiny_bert(dropout=0.1, dtype=torch.float32)
    if METHODS[name].needs_lora:
        model = with_lora(model)
    defaults = {
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": device == "cpu",
        "logging_steps": 1,
    }
    trainer = BiLoraTrainer(
        model=model,
        method=build_method(name),
        args=TrainingArguments(str(folder), **{**defaults, **arguments}),
        train_dataset=ragged_data(copies=2),
        data_collator=pad,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", list(METHODS))
def test_methods_train(tmp_path, name, mode):
    """Finite losses, moved factors, and a frozen base that keeps every bit."""
    trainer = trained(tmp_path, name, "cuda", **MODES[mode])
    start = tiny_bert(dropout=0.1, dtype=torch.float32)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4
    assert all(torch.tensor(losses).isfinite())
    now = {name: p for name, p in trainer.model.named_parameters() if p.device.type == "cuda"}
    assert len(now) == len(dict(trainer.model.named_parameters()))
    if METHODS[name].needs_lora:
        begun = factors(with_lora(start))
        assert any(not torch.equal(tensor.cpu(), begun[key]) for key, tensor in factors(trainer.model).items())
        for key, p in trainer.model.named_parameters():
            if key.endswith("base_layer.weight"):
                origin = key.removeprefix("base_model.model.").replace(".base_layer", "")
                assert torch.equal(p.detach().cpu(), start.get_parameter(origin)), key


@pytest.mark.parametrize("name", list(METHODS))
def test_a_resumed_run_ends_where_the_whole_one_does(tmp_path, name):
    whole = trained(tmp_path / "whole", name, "cuda")
    trained(tmp_path / "cut", name, "cuda", save_strategy="steps", save_steps=2)
    resumed = trained(tmp_path / "cut", name, "cuda", resume=str(tmp_path / "cut" / "checkpoint-2"))
    for key, tensor in factors(whole.model).items():
        assert torch.equal(factors(resumed.model)[key], tensor), key


def objective_of(device):
    batches = [tiny.padded(part) for part in tiny.split(tiny.examples())]
    return Objective([{key: tensor.to(device) for key, tensor in batch.items()} for batch in batches], name="train")


def measured(name, space_name, device):
    model = tiny.with_lora(tiny.bert()).to(device).eval()
    space = getattr(WeightSpace, space_name or "full")(model)
    before = {key: p.detach().clone() for key, p in space.model.named_parameters()}
    fields = MEASURES[name].settings.model_fields
    settings = MEASURES[name].settings(**{key: value for key, value in SMALL.items() if key in fields})
    made = Trained(model, WeightSpace.full(model).factors)
    rows = MEASURES[name].result(objective_of(device), space, settings, made).rows()
    for key, p in space.model.named_parameters():
        assert torch.equal(before[key], p), key
    return rows


@pytest.mark.parametrize(
    ("name", "space"),
    [(n, s) for n, m in MEASURES.items() if n != "dynamics" for s in m.offered],
)
def test_measures_agree_with_the_cpu(name, space):
    here, there = measured(name, space, "cpu"), measured(name, space, "cuda")
    assert [(r["quantity"], r["kind"], r["layer"], r["index"]) for r in here] == [
        (r["quantity"], r["kind"], r["layer"], r["index"]) for r in there
    ]
    for mine, theirs in zip(here, there, strict=True):
        assert theirs["value"] == pytest.approx(mine["value"], rel=1e-5, abs=1e-8, nan_ok=True), mine["quantity"]


def test_offloaded_vectors_give_the_same_eigenpairs():
    space = WeightSpace.full(tiny.with_lora(tiny.bert()).cuda().eval())
    here, away = (
        top_eigenvalues(objective_of("cuda"), space, 3, vectors=True, offload=offload) for offload in (False, True)
    )
    assert away.values == pytest.approx(here.values, rel=1e-9)
    assert away.residuals.max() <= 1e-2
    assert all(part.device.type == "cpu" for vector in away.vectors for part in vector.values())


def test_memory_of_a_product_does_not_grow_with_the_batches():
    """With rebuilt graphs and offloaded vectors."""
    peaks = []
    for copies in (1, 8):
        space = WeightSpace.all(tiny.bert(dtype=torch.float32, hidden=256).cuda().eval())
        objective = Objective(objective_of("cuda").batches * copies)
        torch.cuda.reset_peak_memory_stats()
        begun = torch.cuda.memory_allocated()
        top_eigenvalues(objective, space, 1, graphs="rebuild", offload=True, max_products=8)
        peaks.append(torch.cuda.max_memory_allocated() - begun)
        weights = 4 * space.size
    assert peaks[1] <= 1.05 * peaks[0]
    assert peaks[1] <= 3 * weights
