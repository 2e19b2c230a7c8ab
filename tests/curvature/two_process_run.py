"""Measures curvature and writes what its rank found; started by ``torchrun`` with one and with two processes."""

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from analysis.core import Objective, WeightSpace
from analysis.curvature import (
    curvature_operator,
    diagonal,
    layer_curvature,
    spectral_density,
    top_eigenvalues,
    trace,
)
from bilora.errors import UserError
from tests.oracles import modules, tiny

SIZES = {"four batches": (6, 6, 6, 3), "three batches": (9, 9, 3), "one batch": (21,)}
OPERATORS = {
    "hessian": {},
    "rebuilt": {"graphs": "rebuild"},
    "ggn": {"curvature": "ggn"},
    "differences": {"differences": "central"},
    "one-sided differences": {"differences": "one-sided"},
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
    return results | found_by_each_measure(space) | found_of_other_models()


def found_by_each_measure(space):
    """What every measure finds on three uneven batches."""
    objective = Objective([tiny.padded(part) for part in tiny.split(tiny.examples(), SIZES["three batches"])])
    results = {}
    for backend in ("xtrace", "hutchinson"):
        found = trace(objective, space, max_products=12, backend=backend)
        results[f"trace, {backend}"] = [found.value, found.standard_error]
    entries = diagonal(objective, space, samples=4)
    results["diagonal"] = space.flat(entries.values).tolist() + space.flat(entries.standard_error).tolist()
    density = spectral_density(objective, space, runs=2, steps=4)
    results["density"] = density.nodes.ravel().tolist() + density.weights.ravel().tolist()
    layers = layer_curvature(objective, space, by="kind", max_products=12)
    results["layers"] = [row["value"] for row in layers.rows()]
    restarted = {"tolerance": 1e-8, "max_products": 400, "block": 2, "max_basis": 16}
    spectrum = top_eigenvalues(objective, space, 2, vectors=True, **restarted)
    assert spectrum.converged.all()
    assert spectrum.products > 16
    results["eigenvalues, restarted blocks"] = spectrum.values.tolist()
    again = top_eigenvalues(objective, space, 2, start=spectrum.vectors, tolerance=1e-6)
    results["eigenvalues, given vectors"] = [*again.values.tolist(), again.products]
    return results


def found_of_other_models():
    """Products in full space, of a language model whose batches differ in tokens, and under autocast."""
    batches = [tiny.padded(part) for part in tiny.split(tiny.examples(), SIZES["three batches"])]
    sentences = [tiny.language_batch(part) for part in tiny.split(modules.uneven_examples(), modules.UNEVEN)]
    cases = {
        "full": (batches, WeightSpace.full(tiny.with_lora(tiny.bert())), {}),
        "language model": (sentences, WeightSpace.all(modules.small_llama()), {}),
        "language model, ggn": (sentences, WeightSpace.all(modules.small_llama()), {"curvature": "ggn"}),
        "autocast": (batches, WeightSpace.full(modules.calm_bert(torch.float32)), {"autocast": torch.bfloat16}),
    }
    results = {}
    for name, (batches_of, space, settings) in cases.items():
        with curvature_operator(Objective(batches_of), space, **settings) as operator:
            ones = torch.ones(1, space.size, dtype=operator.dtype)
            results[f"product, {name}"] = operator.matmat(ones)[0].tolist()
            results[f"gradient, {name}"] = operator.gradient().tolist()
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
