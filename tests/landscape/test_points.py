"""One surface whoever computes it: one process, several, ranks, or one that was killed and started again."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from analysis.landscape.points import Points
from analysis.landscape.store import PointStore
from analysis.landscape.surface import InPlane, loss_surface
from tests.landscape.points_run import SETTINGS, problem
from tests.sharpness.cases import flat

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def alone():
    objective, space, plane = problem()
    return loss_surface(objective, space, plane, **SETTINGS)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("error", [None, 0.02])
def test_worker_processes_find_the_same_bits(alone, workers, error):
    objective, space, plane = problem()
    before = flat(space.parameters).clone()
    settings = {**SETTINGS, "error": error}
    surface = loss_surface(objective, space, plane, workers=workers, **settings)
    expected = alone if error is None else loss_surface(objective, space, plane, **settings)
    assert np.array_equal(surface.losses, expected.losses)
    assert np.array_equal(surface.accuracies, expected.accuracies, equal_nan=True)
    assert torch.equal(flat(space.parameters), before)


@pytest.mark.slow
def test_ranks_share_the_points_and_find_the_same_bits(alone, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, "-m", "tests.landscape.points_run", "ranks", str(tmp_path)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"ranks-2-{rank}.json").read_text()) for rank in range(2))
    assert first["losses"] == second["losses"] == alone.losses.tolist()
    batches, points = 4, 49
    compared = 2  # runs that find out what the head reads, on each rank
    assert first["passes"] + second["passes"] == batches * points + 2 * compared
    assert abs(first["passes"] - second["passes"]) <= batches
    assert (first["stored"], second["stored"]) == (True, False)


@pytest.mark.slow
def test_a_killed_run_continues_where_it_was(alone, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.landscape.points_run", "killed", str(tmp_path)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == -signal.SIGKILL
    store = PointStore(tmp_path / "points.jsonl")
    found = len(store.path.read_text().splitlines()) - 1
    assert 8 <= found <= 12
    objective, space, plane = problem()
    with Points(objective, space, InPlane(plane), store=store) as at:
        at([(float(x), float(y)) for y in alone.y for x in alone.x])
        assert at.evaluated == 49 - found
    again = loss_surface(objective, space, plane, store=store, **SETTINGS)
    assert np.array_equal(again.losses, alone.losses)


def test_points_of_other_weights_or_examples_are_not_reused(tmp_path):
    objective, space, plane = problem()
    store = PointStore(tmp_path / "points.jsonl")

    def computed():
        with Points(objective, space, InPlane(plane), store=store) as at:
            at([(0.1, 0.2)])
            return at.evaluated

    assert [computed(), computed()] == [1, 0]
    with torch.no_grad():
        space.model.classifier.bias.add_(1.0)
    assert [computed(), computed()] == [1, 0]


class Failing(InPlane):
    def __call__(self, space, key):
        if key == (0.5, 0.5):
            raise RuntimeError("no such point")
        return super().__call__(space, key)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_failure_leaves_the_weights_and_no_process(workers):
    import multiprocessing

    objective, space, plane = problem()
    before = flat(space.parameters).clone()
    children = set(multiprocessing.active_children())
    with (
        pytest.raises(RuntimeError, match="no such point"),
        Points(objective, space, Failing(plane), workers=workers) as at,
    ):
        at([(0.1, 0.1), (0.5, 0.5), (0.2, 0.2)])
    assert torch.equal(flat(space.parameters), before)
    assert set(multiprocessing.active_children()) <= children


def test_an_interrupt_leaves_the_weights_and_the_points_found(tmp_path):
    objective, space, plane = problem()
    before = flat(space.parameters).clone()
    store = PointStore(tmp_path / "points.jsonl")

    def watch(done, most, note):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loss_surface(objective, space, plane, store=store, watch=watch, **SETTINGS)
    assert torch.equal(flat(space.parameters), before)
    assert 5 <= len(store.path.read_text().splitlines()) - 1 <= 6
