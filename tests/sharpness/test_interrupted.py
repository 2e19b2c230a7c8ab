"""Real measures under real Ctrl+C at random moments: the weights are the same bits each time."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("interrupted_run.py")
MEASURES = {
    "random",
    "adversarial",
    "worst_case",
    "m_sharpness",
    "quantisation",
    "read_noise",
    "ascent_gap",
    "differences",
    "surface",
}


def test_interrupted_at_random_moments():
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "1"], capture_output=True, text=True, env=environment, cwd=root, timeout=280
    )
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert {line["measure"] for line in lines} == MEASURES
    for line in lines:
        assert line["displaced"] == [], line
        assert line["interrupted"] >= 1, line
