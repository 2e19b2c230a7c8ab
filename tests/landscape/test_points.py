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

from analysis.landscape import points as points_module
from analysis.landscape.points import SHARED, Points
from analysis.landscape.store import PointStore
from analysis.landscape.surface import InPlane, loss_surface
from tests.landscape.points_run import ALSO, SETTINGS, along_directions, besides, problem
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


@pytest.fixture(scope="module")
def others():
    objective, space, plane = problem()
    return {name: besides(objective, space, plane, name) for name in ALSO}


@pytest.fixture(scope="module")
def along():
    """Along lines and random directions by one process, and the forward passes that took."""
    objective, space, _ = problem()
    objective.loss(space)  # finds out what the head reads
    passes = []
    space.model.register_forward_hook(lambda *_: passes.append(1))
    return along_directions(objective, space), len(passes)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_ranks_share_the_points_and_find_the_same_bits(alone, others, along, tmp_path, count):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    done = subprocess.run(
        [*launch, "-m", "tests.landscape.points_run", "ranks", str(tmp_path)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads((tmp_path / f"ranks-{count}-{rank}.json").read_text()) for rank in range(count)]
    assert not others["adaptive"].evaluated.all()
    for outcome in found:
        assert outcome["losses"] == alone.losses.tolist()
        for name, surface in others.items():
            assert outcome[name] == surface.losses.tolist()
        assert outcome["along"] == {name: values.tolist() for name, values in along[0].items()}
    batches, points = 4, 49
    compared = 2  # runs that find out what the head reads, on each rank
    assert sum(outcome["passes"] for outcome in found) == batches * points + count * compared
    assert np.ptp([outcome["passes"] for outcome in found]) <= batches
    by_rank = [outcome["passes along"] for outcome in found]
    beyond = 2 * batches * (count - 1)  # antithetic losses of a last round that one process would not have begun
    assert along[1] <= sum(by_rank) <= along[1] + beyond
    assert max(by_rank) < 0.75 * along[1]
    assert [outcome["stored"] for outcome in found] == [True] + [False] * (count - 1)
    # Long before the end the first rank holds what others found: a kill loses no more than a few points.
    known = np.array(found[0]["known"])
    assert np.any((known[:, 0] < 30) & (known[:, 0] - known[:, 1] >= 4))
    for done, own in known:
        assert done - 1 >= count * (own - 1 - SHARED) - count


@pytest.mark.slow
def test_worker_processes_find_the_same_bits_in_bfloat16(others):
    objective, space, plane = problem()
    surface = besides(objective, space, plane, "bfloat16", workers=2)
    assert np.array_equal(surface.losses, others["bfloat16"].losses)
    assert (surface.precision_error, surface.precision) == (others["bfloat16"].precision_error, "bfloat16")


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


def test_points_of_other_weights_examples_or_code_are_not_reused(tmp_path, monkeypatch):
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
    objective.shifted = not objective.shifted
    assert [computed(), computed()] == [1, 0]
    monkeypatch.setattr(points_module, "FORMAT", points_module.FORMAT + 1)
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
