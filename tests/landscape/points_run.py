"""A surface by ranks of ``torchrun``, or by a process that is killed; writes what it found."""

import json
import os
import signal
import sys
from pathlib import Path

import torch

from analysis.core import Objective, WeightSpace
from analysis.landscape.random_plane import random_plane
from analysis.landscape.store import PointStore
from analysis.landscape.surface import loss_surface
from tests.oracles import tiny

SETTINGS = {"points": 7, "extent": 0.5, "error": None}


def problem():
    torch.set_num_threads(1)
    space = WeightSpace.full(tiny.with_lora(tiny.bert(torch.float32)))
    objective = Objective([tiny.padded(part) for part in tiny.split(tiny.examples())])
    return objective, space, random_plane(space, seed=0)


def ranks(folder):
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    store = PointStore(folder / f"points-{rank}.jsonl")
    passes = []
    objective, space, plane = problem()
    space.model.register_forward_hook(lambda *_: passes.append(1))
    surface = loss_surface(objective, space, plane, store=store, **SETTINGS)
    outcome = {"losses": surface.losses.tolist(), "passes": len(passes), "stored": store.path.exists()}
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
