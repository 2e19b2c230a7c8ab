"""Runs one measure after the other while another thread sends SIGINT at random moments; a JSON line for each measure.

Usage: ``interrupted_run.py SECONDS``, the time to spend on a measure; three signals at least.
"""

import json
import os
import random
import signal
import sys
import threading
import time
from types import SimpleNamespace

import torch

from analysis.core import Factors, WeightSpace
from analysis.curvature.eigen import top_eigenvalues
from analysis.landscape.random_plane import random_plane
from analysis.landscape.surface import loss_surface
from analysis.sharpness.adversarial import adversarial_sharpness
from analysis.sharpness.ascent_gap import ascent_gap
from analysis.sharpness.m_sharpness import m_sharpness
from analysis.sharpness.quantisation import quantisation
from analysis.sharpness.random import random_sharpness
from analysis.sharpness.read_noise import read_noise
from analysis.sharpness.worst_case import worst_case_sharpness
from tests.sharpness.cases import bert_objective, state, tiny_bert, with_lora


def measures(objective, space):
    auxiliary = {layer: Factors(f.B, f.A, 0.1) for layer, f in space.factors.items()}
    plane = random_plane(space, seed=0)
    return {
        "random": lambda: random_sharpness(objective, space, [0.1], directions=8),
        "adversarial": lambda: adversarial_sharpness(objective, space, [0.1, 0.2, 0.3]),
        "worst_case": lambda: worst_case_sharpness(objective, space, [0.2], steps=4, restarts=2),
        "m_sharpness": lambda: m_sharpness(objective, space, [0.1], m=1),
        "quantisation": lambda: quantisation(objective, space, kinds=["int8", "nf4", "int8 base"]),
        "read_noise": lambda: read_noise(objective, space, [0.05], directions=8),
        "ascent_gap": lambda: ascent_gap(objective, space, auxiliary),
        "differences": lambda: top_eigenvalues(objective, space, 1, max_products=8, differences="central"),
        "surface": lambda: loss_surface(objective, space, plane, points=5, extent=0.5, error=None),
    }


def interrupted(measure, delay):
    """Run ``measure`` and send SIGINT after ``delay`` seconds; whether it was interrupted."""
    sender = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))
    try:
        sender.start()
        measure()
        sender.join()
        time.sleep(0.01)
    except KeyboardInterrupt:
        return True
    return False


def main(seconds):
    objective, space = bert_objective(), WeightSpace.full(with_lora(tiny_bert(torch.float32)))
    before, drawn = state(space.model), random.Random(0)
    for name, measure in measures(objective, space).items():
        start = time.perf_counter()
        measure()
        usual = time.perf_counter() - start
        seen = SimpleNamespace(measure=name, sent=0, interrupted=0, displaced=[])
        while seen.sent < 3 or time.perf_counter() - start < seconds:
            seen.interrupted += interrupted(measure, drawn.uniform(0, usual))
            seen.sent += 1
            torch.set_grad_enabled(True)  # torch's own blocks may be cut short on leaving
            seen.displaced += [n for n, t in space.model.state_dict().items() if not torch.equal(t, before[n])]
        print(json.dumps(vars(seen)), flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits it as ignored
    main(float(sys.argv[1]))
