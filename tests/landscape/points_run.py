"""A surface by ranks of ``torchrun``, or by a process that is killed; writes what it found."""

import json
import math
import os
import signal
import sys
from pathlib import Path
from unittest.mock import patch

import torch

from analysis.core import Objective, WeightSpace
from analysis.landscape import surface as surface_module
from analysis.landscape.random_plane import random_plane
from analysis.landscape.store import PointStore
from analysis.landscape.surface import loss_surface
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
