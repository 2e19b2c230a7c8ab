"""What a run records: the perturbation each method applies, at the place where it applies it, and nothing else."""

import json
import math
import struct
from itertools import pairwise

import pytest
import torch

from bilora import METHODS, BiLoraTrainer, build_method
from bilora.adapters.layers import adapted_layers
from bilora.errors import UserError
from bilora.training import Recorder, read_recording
from bilora.training.recording import FILE_NAME, FOLDER_NAME, moment_files
from tests.training.tiny import factors, ragged_data, tiny_bert, with_lora

LORA_METHODS = [name for name, method in METHODS.items() if method.needs_lora]
ADAM = {"optim": "adamw_torch", "learning_rate": 1e-2}
UNPERTURBED = {"lora", "lora_obar", "lora_nbar", "rop"}
DENSE = {"sam", "flat_lora", "rwp_full"}


def run(train, folder, method, every=1, steps=4, dtype=torch.float64, **arguments):
    model = with_lora(tiny_bert(dtype=dtype))
    settings = {"max_steps": steps, **ADAM, **arguments}
    train(model, build_method(method), callbacks=[Recorder(folder, every=every, losses_every=1)], **settings)
    return model


def total(tensors):
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors if t is not None))


@pytest.mark.parametrize("name", LORA_METHODS)
def test_recording_changes_nothing(train, tmp_path, name):
    plain = with_lora(tiny_bert(dropout=0.2), dropout=0.2)
    train(plain, build_method(name), max_steps=4, **ADAM)
    recorded = with_lora(tiny_bert(dropout=0.2), dropout=0.2)
    train(recorded, build_method(name), max_steps=4, callbacks=[Recorder(tmp_path / "r", 1, 1)], **ADAM)
    for key, expected in factors(plain).items():
        assert torch.equal(factors(recorded)[key], expected), key


@pytest.mark.parametrize("name", LORA_METHODS)
def test_what_is_perturbed(train, tmp_path, name):
    """Factors, W itself, or an auxiliary: one of them for each method, from some step on."""
    run(train, tmp_path / "r", name)
    recording = read_recording(tmp_path / "r")
    assert recording.finished
    assert recording.steps == (0, 1, 2, 3, 4)
    moments = [recording.at(step) for step in recording.steps[:-1]]
    layers = [layer for moment in moments for layer in moment.layers.values()]
    in_factors = any(layer.eps_B is not None for layer in layers)
    assert in_factors == (name not in UNPERTURBED | DENSE | {"bilora"})
    assert any(layer.noise is not None for layer in layers) == (name in DENSE)
    assert all((layer.auxiliary_A is not None) == (name == "bilora") for layer in layers)
    perturbed = [moment for moment in moments if "loss_perturbed" in moment.numbers]
    assert bool(perturbed) == (name not in UNPERTURBED)
    assert all(math.isfinite(moment.numbers["loss"]) for moment in moments)
    end = recording.at(4)
    assert all(layer.eps_A is None and layer.noise is None and not layer.gradients for layer in end.layers.values())


def test_lora_sam_is_recorded_with_its_radius_and_direction(train, tmp_path):
    model = with_lora(tiny_bert())
    gradients = {}

    class Watching(BiLoraTrainer):
        def _end_window(self, wrapped):
            gradients.setdefault(
                self.state.global_step,
                {n: (x.A.grad.clone(), x.B.grad.clone()) for n, x in adapted_layers(model).items()},
            )
            super()._end_window(wrapped)

    method = build_method("lora_sam", {"rho": 0.3})
    train(model, method, callbacks=[Recorder(tmp_path / "r", 1)], trainer=Watching, **ADAM)
    recording = read_recording(tmp_path / "r")
    for step in (0, 1, 2):
        layers = recording.at(step).layers
        found = gradients[step]
        length = total(g for pair in found.values() for g in pair)
        assert total(e for x in layers.values() for e in (x.eps_A, x.eps_B)) == pytest.approx(0.3, rel=1e-9)
        for name, layer in layers.items():
            for eps, gradient in zip((layer.eps_A, layer.eps_B), found[name], strict=True):
                torch.testing.assert_close(eps, 0.3 * gradient / length, rtol=1e-9, atol=1e-13)


def test_the_auxiliary_in_force_is_the_one_before_the_update(train, tmp_path):
    rho = 0.02
    model = run(train, tmp_path / "r", "bilora", steps=6, learning_rate=0.05)
    recording = read_recording(tmp_path / "r")
    first = recording.at(0).layers
    assert total(x.auxiliary_B for x in first.values()) == 0
    method = build_method("bilora", {"rho": rho})
    model = with_lora(tiny_bert())
    train(model, method, max_steps=6, callbacks=[Recorder(tmp_path / "s", 1)], **ADAM)
    norms = []
    for moment in list(read_recording(tmp_path / "s"))[1:-1]:
        norms.append(total(x.auxiliary_scale * x.auxiliary_B @ x.auxiliary_A for x in moment.layers.values()))
        assert moment.numbers["c_over_rho"] > 0
    assert max(norms) == pytest.approx(rho, rel=1e-9)


@pytest.mark.parametrize("name", sorted(DENSE))
def test_noise_is_summarised_exactly(train, tmp_path, name):
    seen = {}

    class Watching(BiLoraTrainer):
        def plain_training_step(self, model, micro, share):
            layers = adapted_layers(self.model)
            seen[self.state.global_step] = {n: x.base_weight.data.clone() for n, x in layers.items()}
            return super().plain_training_step(model, micro, share)

    model = with_lora(tiny_bert())
    rest = {n: x.base_weight.data.clone() for n, x in adapted_layers(model).items()}
    train(model, build_method(name), callbacks=[Recorder(tmp_path / "r", 1)], trainer=Watching, max_steps=4, **ADAM)
    for moment in list(read_recording(tmp_path / "r"))[1:-1]:
        for layer, found in moment.layers.items():
            E = seen[moment.step][layer] - rest[layer]
            P = found.B @ torch.linalg.pinv(found.B)
            Q = torch.linalg.pinv(found.A) @ found.A
            outside = E - P @ E - E @ Q + P @ E @ Q
            assert found.noise[0] == pytest.approx(float(E.square().sum()), rel=1e-9)
            assert found.noise[1] == pytest.approx(float(outside.square().sum()), rel=1e-9)


def test_losses_without_and_with_the_perturbation(train, tmp_path):
    """In one micro-batch without dropout they are the losses of the two passes of LoRA-SAM."""
    losses = []

    class Watching(BiLoraTrainer):
        def plain_training_step(self, model, micro, share):
            loss = super().plain_training_step(model, micro, share)
            losses.append(float(loss))
            return loss

    method = build_method("lora_sam", {"rho": 0.5})
    recorder = Recorder(tmp_path / "r", 1, 1)
    train(with_lora(tiny_bert()), method, callbacks=[recorder], trainer=Watching, **ADAM)
    recording = read_recording(tmp_path / "r")
    for step in (0, 1, 2):
        numbers = recording.at(step).numbers
        assert numbers["loss"] == pytest.approx(losses[2 * step], rel=1e-12)
        assert numbers["loss_perturbed"] == pytest.approx(losses[2 * step + 1], rel=1e-12)
        assert numbers["loss_perturbed"] > numbers["loss"]


def test_moments_are_every_so_many_steps_and_the_last(train, tmp_path):
    model = with_lora(tiny_bert())
    train(model, build_method("lora"), max_steps=8, callbacks=[Recorder(tmp_path / "r", 3)], **ADAM)
    recording = read_recording(tmp_path / "r")
    assert recording.steps == (0, 3, 6, 7, 8)
    assert [("loss" in m.numbers) for m in recording] == [True, False, False, False, False]
    end = recording.at(8).layers
    for name, layer in adapted_layers(model).items():
        assert torch.equal(end[name].B, layer.B.data)
        assert torch.equal(end[name].A, layer.A.data)


@pytest.mark.parametrize("name", ["lora_sam", "bilora", "flat_lora"])
def test_a_killed_run_goes_on_without_gaps_or_repeats(train, tmp_path, name):
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3, **ADAM}

    def go(folder, resume=None, stop=None):
        callbacks = [Recorder(tmp_path / folder, 2, 2)]
        model = with_lora(tiny_bert(dropout=0.1), dropout=0.1)
        limits = {} if stop is None else {"trainer": killed_at(stop)}
        train(
            model,
            build_method(name),
            ragged_data(copies=2),
            callbacks=callbacks,
            folder=f"{folder}-out",
            resume=resume,
            **limits,
            **settings,
        )

    go("whole")
    with pytest.raises(Killed):
        go("killed", stop=5)
    partial = read_recording(tmp_path / "killed")
    assert not partial.finished
    assert partial.steps == (0, 2, 4)  # step 4 came after the checkpoint of step 3
    go("killed", resume=str(tmp_path / "killed-out" / "checkpoint-3"))
    whole, resumed = (read_recording(tmp_path / folder) for folder in ("whole", "killed"))
    assert (tmp_path / "whole" / FILE_NAME).read_bytes() == (tmp_path / "killed" / FILE_NAME).read_bytes()
    assert whole.steps == resumed.steps == (0, 2, 4, 6, 7, 8)


class Killed(Exception):
    pass


def killed_at(step):
    class Dies(BiLoraTrainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == step:
                raise Killed
            return super().training_step(*args, **kwargs)

    return Dies


def test_readable_while_training(train, tmp_path):
    seen = []

    class Looking(BiLoraTrainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step:
                seen.append(read_recording(tmp_path / "r").steps)
            return super().training_step(*args, **kwargs)

    train(with_lora(tiny_bert()), build_method("lora"), callbacks=[Recorder(tmp_path / "r", 1)], trainer=Looking)
    assert seen == [(0,), (0, 1)]
    assert not (tmp_path / "r" / FOLDER_NAME).exists()


def test_a_step_that_is_not_finite_is_not_recorded(train, tmp_path):
    class Bad(BiLoraTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss * float("nan") if self.state.global_step == 1 and self.model.training else loss

    train(with_lora(tiny_bert()), build_method("lora"), callbacks=[Recorder(tmp_path / "r", 1)], trainer=Bad)
    assert read_recording(tmp_path / "r").steps == (0, 2, 3)


def test_joined_file_is_sound_safetensors(train, tmp_path):
    """Offsets are contiguous from 0, as the format asks, and float32 stays float32."""
    run(train, tmp_path / "r", "bilora", dtype=torch.float32)
    raw = (tmp_path / "r" / FILE_NAME).read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    header.pop("__metadata__")
    spans = sorted(entry["data_offsets"] for entry in header.values())
    assert spans[0][0] == 0
    assert all(before[1] == after[0] for before, after in pairwise(spans))
    assert spans[-1][1] == len(raw) - 8 - size
    assert {entry["dtype"] for entry in header.values()} == {"F32"}
    assert size % 8 == 0


def test_bad_use_is_one_line(train, tmp_path):
    with pytest.raises(UserError, match="every must be an integer of at least 1"):
        Recorder(tmp_path, every=0)
    with pytest.raises(UserError, match="holds no recording: train with --record"):
        read_recording(tmp_path)
    run(train, tmp_path / "r", "lora")
    with pytest.raises(UserError, match="holds the recording of a finished run"):
        run(train, tmp_path / "r", "lora")
    with pytest.raises(UserError, match="step 9 was not recorded"):
        read_recording(tmp_path / "r").at(9)
    with pytest.raises(UserError, match="carries no LoRA adapter"):
        train(tiny_bert(), build_method("full"), callbacks=[Recorder(tmp_path / "full", 1)])
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / FILE_NAME).write_bytes((tmp_path / "r" / FILE_NAME).read_bytes()[:100])
    with pytest.raises(UserError, match="is damaged"):
        read_recording(damaged)


def test_another_interval_is_refused_on_resuming(train, tmp_path):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, **ADAM}
    with pytest.raises(Killed):
        train(
            with_lora(tiny_bert()),
            build_method("lora"),
            callbacks=[Recorder(tmp_path / "r", 1)],
            trainer=killed_at(3),
            **settings,
        )
    before = moment_files(tmp_path / "r")
    with pytest.raises(UserError, match="is recorded every 1 steps: go on so"):
        train(
            with_lora(tiny_bert()),
            build_method("lora"),
            callbacks=[Recorder(tmp_path / "r", 2)],
            resume=str(tmp_path / "out" / "checkpoint-2"),
            **settings,
        )
    assert moment_files(tmp_path / "r") == before
