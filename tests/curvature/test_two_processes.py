"""Two real processes (gloo) share the batches and find what one finds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.curvature.two_process_run import OPERATORS, SIZES

ROOT = Path(__file__).parents[2]


def outcomes(what, world, folder):
    """What each rank wrote of what it ``found``, or of its ``refusals``."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    done = subprocess.run(
        [*launch, "-m", "tests.curvature.two_process_run", what, str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{what}-{world}-{rank}.json").read_text()) for rank in range(world)]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Number of processes → what each of them found."""
    return {world: outcomes("found", world, tmp_path_factory.mktemp("found")) for world in (1, 2)}


@pytest.mark.slow
def test_two_processes_find_what_one_finds(found):
    (one,), (first, second) = found[1], found[2]
    assert one.keys() == first.keys() == second.keys()
    for key, expected in one.items():
        if key.startswith("passes"):
            continue
        assert first[key] == second[key], key
        # Differences divide the rounding of sums in another order by a small step; autocast's weights are float32.
        bound = 1e-6 if "differences" in key or "autocast" in key else 1e-10
        error = np.linalg.norm(np.subtract(first[key], expected)) / np.linalg.norm(expected)
        assert error <= bound, key


@pytest.mark.slow
def test_each_process_runs_its_own_batches(found):
    for kind in OPERATORS:
        for shape, sizes in SIZES.items():
            one, *two = (rank[f"passes, {kind}, {shape}"] for rank in found[1] + found[2])
            probes = 2  # every process checks that two passes agree
            assert sum(two) - 2 * probes == one - probes, (kind, shape)
            share = -(-len(sizes) // 2) / len(sizes)
            assert max(two) - probes == share * (one - probes), (kind, shape)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_on_one_rank_ends_both(tmp_path):
    for said in outcomes("refusals", 2, tmp_path):
        assert said.keys() == {*OPERATORS, "eigenvalues"}
        for kind, line in said.items():
            assert "finite" in line, (kind, line)
            assert "loss on the" in line or "another process failed and says why" in line, (kind, line)
            assert "\n" not in line, (kind, line)
