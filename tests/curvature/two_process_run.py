"""Measures curvature and writes what its rank found; started by ``torchrun`` with one and with two processes."""

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from analysis.core import Objective, WeightSpace
from analysis.curvature import curvature_operator, top_eigenvalues
from bilora.errors import UserError
from tests.oracles import modules, tiny

SIZES = {"four batches": (6, 6, 6, 3), "three batches": (9, 9, 3), "one batch": (21,)}
OPERATORS = {
    "hessian": {},
    "rebuilt": {"graphs": "rebuild"},
    "ggn": {"curvature": "ggn"},
    "differences": {"differences": "central"},
}


def found():
    """Eigenvalues and a product of each kind of curvature, and the forward passes of this rank."""
    space = WeightSpace.lora(tiny.with_lora(tiny.bert()))
    passes = []
    space.model.register_forward_hook(lambda *_: passes.append(1))
    results = {}
    for shape, sizes in SIZES.items():
        objective = Objective([tiny.padded(part) for part in tiny.split(tiny.examples(), sizes)])
        for curvature in ("hessian", "ggn"):
            settings = {"tolerance": 1e-8, "max_products": 300, "curvature": curvature}
            spectrum = top_eigenvalues(objective, space, 3, **settings)
            assert spectrum.converged.all()
            results[f"eigenvalues, {curvature}, {shape}"] = spectrum.values.tolist()
        ones = torch.ones(1, space.size, dtype=torch.float64)
        for kind, settings in OPERATORS.items():
            passes.clear()
            with curvature_operator(objective, space, **settings) as operator:
                results[f"product, {kind}, {shape}"] = operator.matmat(ones)[0].tolist()
            results[f"passes, {kind}, {shape}"] = len(passes)
    return results


def refusals():
    """What is said of a loss that is not finite on one batch of two, so on one rank of two."""
    batches = modules.points((3, 6))
    batches[1]["x"][0, 0] = torch.inf
    objective, space = Objective(batches), WeightSpace.all(modules.Softmax())
    said = {}
    for kind, settings in OPERATORS.items():
        try:
            with curvature_operator(objective, space, **settings) as operator:
                operator.matmat(torch.ones(1, space.size, dtype=torch.float64))
        except UserError as error:
            said[kind] = str(error)
    try:
        top_eigenvalues(objective, space, 1)
    except UserError as error:
        said["eigenvalues"] = str(error)
    return said


def main(what: str, folder: Path) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    outcome = {"found": found, "refusals": refusals}[what]()
    (folder / f"{what}-{dist.get_world_size()}-{dist.get_rank()}.json").write_text(json.dumps(outcome))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
