"""What one curvature product costs over one gradient, as JSON lines.

    python benchmarks/products.py [--rounds 5]

The fresh BERT of ``curvature.py``, float32, one thread, process CPU time. Rounds are interleaved and the median over
them is reported. Kept graphs are built before the clock starts.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from curvature import ENCODER, quiet, small_bert

from analysis import WeightSpace
from analysis.curvature import DifferenceOperator, GaussNewtonOperator, HessianOperator


def seconds(function: Callable[[], Any]) -> float:
    began = time.process_time()
    function()
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    model, data = small_bert()
    space, objective = WeightSpace.named(model, ENCODER), data.objective()
    operators = {
        "hessian, graphs kept": HessianOperator(objective, space, graphs="retain"),
        "hessian, rebuilt": HessianOperator(objective, space, graphs="rebuild"),
        "ggn, graphs kept": GaussNewtonOperator(objective, space, graphs="retain"),
        "ggn, rebuilt": GaussNewtonOperator(objective, space, graphs="rebuild"),
        "central differences": DifferenceOperator(objective, space, kind="central"),
        "one-sided differences": DifferenceOperator(objective, space, kind="one-sided"),
    }
    row = torch.randn(1, space.size, generator=torch.Generator().manual_seed(0))
    for operator in operators.values():
        operator.matmat(row)
    ratios: dict[str, list[float]] = {name: [] for name in operators}
    for _ in range(options.rounds):
        gradient = seconds(lambda: objective.gradient(space))
        for name, operator in operators.items():
            ratios[name].append(seconds(lambda operator=operator: operator.matmat(row)) / gradient)
    for name, found in ratios.items():
        print(json.dumps({"product": name, "gradients": round(statistics.median(found), 2), "rounds": options.rounds}))


if __name__ == "__main__":
    main()
