"""Two real processes (DDP over gloo) reach the same weights as one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bilora import METHODS
from bilora.training import read_recording
from bilora.training.recording import TENSORS

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    for world in (1, 2):
        # accelerate starts several processes with torchrun only under --multi_gpu; the variable keeps them on the CPU.
        processes = ["--multi_gpu", "--num_processes", "2"] if world == 2 else ["--cpu", "--num_processes", "1"]
        command = [sys.executable, "-m", "accelerate.commands.launch", *processes, "--num_machines", "1"]
        command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        done = subprocess.run(
            [*command, "-m", "tests.training.two_process_run", str(tmp_path)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
            env=environment,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    for name in METHODS:
        one, two = (load_file(tmp_path / f"{name}-{world}.safetensors") for world in (1, 2))
        assert one.keys() == two.keys()
        for key, tensor in one.items():
            torch.testing.assert_close(
                two[key], tensor, rtol=0, atol=1e-8, msg=lambda m, k=key, n=name: f"{n} {k}: {m}"
            )
        if METHODS[name].needs_lora:
            check_same_recording(*(read_recording(tmp_path / f"{name}-{world}") for world in (1, 2)))


def check_same_recording(one, two):
    assert one.steps == two.steps == (0, 1, 2, 3)
    for first, second in zip(one, two, strict=True):
        assert first.numbers.keys() == second.numbers.keys()
        for key in ("loss", "loss_perturbed"):
            # Of the last micro-batch: four examples of one process, two of each of two.
            assert first.numbers.get(key) == pytest.approx(second.numbers.get(key), abs=1e-8)
        for layer, expected in first.layers.items():
            for name in (*TENSORS, "gradients", "noise"):
                left, right = getattr(expected, name), getattr(second.layers[layer], name)
                assert (left is None) == (right is None), name
                if left is not None:
                    left, right = torch.as_tensor(left), torch.as_tensor(right)
                    torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-8, equal_nan=True)
