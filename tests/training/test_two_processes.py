"""Two real processes (DDP over gloo) reach the same weights as one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bilora import METHODS

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
