"""A surface by ranks of ``torchrun``, or by a process that is killed; writes what it found."""

import json
import math
import os
import signal
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from analysis.core import Objective, WeightSpace
from analysis.landscape import surface as surface_module
from analysis.landscape.lines import loss_lines
from analysis.landscape.random_plane import random_plane
from analysis.landscape.store import PointStore
from analysis.landscape.surface import loss_surface
from analysis.sharpness.random import random_sharpness
from analysis.sharpness.read_noise import read_noise
from tests.oracles import tiny

SETTINGS = {"points": 7, "extent": 0.5, "error": None}
ALSO = {
    "adaptive": {"points": 11, "extent": 0.1, "error": 0.05},
    "bfloat16": {"points": 5, "extent": 0.5, "error": None, "precision": "bfloat16"},
}
"""Surfaces that ranks compute besides."""


def problem():
    torch.set_num_threads(1)
    space = WeightSpace.full(tiny.with_lora(tiny.bert(torch.float32)))
    objective = Objective([tiny.padded(part) for part in tiny.split(tiny.examples())])
    return objective, space, random_plane(space, seed=0)


def besides(objective, space, plane, name, **more):
    """One of :data:`ALSO`; that in bfloat16 stays so, however far it is off."""
    with patch.object(surface_module, "PRECISION_ERROR", math.inf):
        return loss_surface(objective, space, plane, **ALSO[name], **more)


def along_directions(objective, space):
    """What else is shared between ranks: arrays that must be those of one process, by name."""
    lines = loss_lines(objective, space, points=5, directions=3, target_rise=0.05)
    fixed = random_sharpness(objective, space, [0.2, 0.4], directions=5)
    chosen = random_sharpness(objective, space, [0.4], se=0.2, max_directions=40, antithetic=True)
    noise = read_noise(objective, space, [0.1, 0.3], directions=3)
    return {
        "lines": lines.losses,
        "coordinates": lines.coordinates,
        "random": fixed.rises,
        "norms": fixed.induced_norms,
        "examples": np.array(fixed.example_errors),
        "chosen": chosen.rises,
        "read noise": noise.rises,
        "accuracy": noise.scores["accuracy"],
    }


def ranks(folder):
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    store = PointStore(folder / f"points-{rank}.jsonl")
    passes = []
    objective, space, plane = problem()
    space.model.register_forward_hook(lambda *_: passes.append(1))
    known = []  # points on this rank's list, and passes by this rank, as they come
    batches = len(objective.batches)

    def watch(done, most, note):
        known.append((done, len(passes) // batches))

    surface = loss_surface(objective, space, plane, store=store, watch=watch, **SETTINGS)
    outcome = {"losses": surface.losses.tolist(), "passes": len(passes), "stored": store.path.exists(), "known": known}
    for name in ALSO:
        outcome[name] = besides(objective, space, plane, name).losses.tolist()
    before = len(passes)
    outcome["along"] = {name: found.tolist() for name, found in along_directions(objective, space).items()}
    outcome["passes along"] = len(passes) - before
    (folder / f"ranks-{dist.get_world_size()}-{rank}.json").write_text(json.dumps(outcome))
    dist.destroy_process_group()


def killed(folder):
    """Dies after ten points, as by ``kill -9``."""
    done = []

    def watch(*_):
        done.append(1)
        if len(done) == 12:
            os.kill(os.getpid(), signal.SIGKILL)

    objective, space, plane = problem()
    loss_surface(objective, space, plane, store=PointStore(folder / "points.jsonl"), watch=watch, **SETTINGS)


if __name__ == "__main__":
    {"ranks": ranks, "killed": killed}[sys.argv[1]](Path(sys.argv[2]))
