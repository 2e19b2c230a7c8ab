"""Time and memory of Hessian eigenpairs of SmolLM2-135M on a GPU, as JSON lines.

    pip install --no-deps -r benchmarks/peers.txt
    python benchmarks/curvature_gpu.py [--variants float32,bfloat16,…] [--batches 104]

The loss is that of a language model, pretrained, on Rotten Tomatoes sentences of at most 64 tokens, four a batch; the
space is its 210 linear weights, 106 M of 134.5 M. Looked for is the eigenvalue of largest magnitude, to a relative
residual of 1e-2. ``seconds`` is wall time after synchronising, from set-up to result; ``gradient_seconds`` the median
of three gradients in float32. ``memory_over_weights`` is the peak of allocated device memory over the bytes of the
model's float32 weights, these included; ``few_batches_memory_over_weights`` the same with four batches.
hessian-eigenthings runs Lanczos with as many steps as ``float32`` needed products.
"""

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.utils import logging

from analysis import HessianOperator, Objective, WeightSpace, top_eigenvalues
from analysis.core.vectors import added, norm
from bilora.tasks import TaskSpec, load_model, load_task, load_tokenizer

BATCH = 4
FEW = 4
TOLERANCE = 1e-2
VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16 autocast": {"autocast": torch.bfloat16},
    "bfloat16 autocast rebuilt offloaded": {
        "autocast": torch.bfloat16,
        "graphs": "rebuild",
        "offload": True,
    },
}
PEER = "hessian-eigenthings"


def prepare(batches: int) -> tuple[Objective, WeightSpace]:
    tokenizer = load_tokenizer("smollm2")
    spec = TaskSpec(data="rotten_tomatoes", kind="causal_lm", train_examples=BATCH * batches, max_length=64)
    task = load_task(spec, tokenizer)
    model = load_model("smollm2", "causal_lm", tokenizer=tokenizer).cuda().eval()
    rows = sorted(task.train, key=lambda row: -len(row["input_ids"]))
    held = [task.collate(rows[start : start + BATCH]) for start in range(0, len(rows), BATCH)]
    return Objective(held, name="train"), WeightSpace.named(model, r".*_proj\.weight")


def timed(function: Callable[[], Any]) -> tuple[Any, float, int]:
    """What it returns, seconds, and the peak of device memory in bytes."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    began = time.perf_counter()
    result = function()
    torch.cuda.synchronize()
    return result, time.perf_counter() - began, torch.cuda.max_memory_allocated()


def ours(objective: Objective, space: WeightSpace, settings: dict[str, Any], most: int = 60) -> dict[str, Any]:
    found = top_eigenvalues(objective, space, 1, tolerance=TOLERANCE, max_products=most, **settings)
    return {
        "products": found.products,
        "value": float(found.values[0]),
        "residual": float(found.residuals[0]),
        "converged": bool(found.converged[0]),
    }


@sdpa_kernel(SDPBackend.MATH)
def peer(objective: Objective, space: WeightSpace, steps: int) -> dict[str, Any]:
    package = importlib.import_module("hessian_eigenthings")
    for name, parameter in space.model.named_parameters():
        parameter.requires_grad_(name in space.parameters)
    batches = [{name: tensor.cuda() for name, tensor in batch.items()} for batch in objective.batches]
    operator = package.HessianOperator(space.model, batches, lambda model, batch: model(**batch).loss)
    found = package.lanczos(operator, k=1, seed=0, max_iter=steps, tol=TOLERANCE, reorthogonalize=True)
    value, vector = float(found.eigenvalues[0]), found.eigenvectors[0]
    with HessianOperator(objective, space, graphs="rebuild") as exact:
        unit = space.named_vector((vector / vector.norm()).cuda())
        residual = norm(added(exact(unit), unit, -value)) / abs(value)
    return {"products": steps, "value": value, "residual": residual, "converged": residual <= TOLERANCE}


def lines(names: list[str], batches: int) -> Iterator[dict[str, Any]]:
    objective, space = prepare(batches)
    few = Objective(objective.batches[:FEW], name="train")
    weights = sum(p.numel() * p.element_size() for p in space.model.parameters())
    gradient = statistics.median(timed(partial(objective.gradient, space))[1] for _ in range(3))
    products = 20
    for name in names:
        line: dict[str, Any] = {"variant": name, "batches": batches, "size": space.size, "gradient_seconds": gradient}
        try:
            if name == PEER:
                if find_spec("hessian_eigenthings") is None:
                    yield line | {"skipped": "pip install --no-deps -r benchmarks/peers.txt"}
                    continue
                found, seconds, peak = timed(partial(peer, objective, space, products))
            else:
                settings = VARIANTS[name]
                timed(partial(ours, few, space, settings, most=3))  # kernels are loaded
                _, _, small = timed(partial(ours, few, space, settings, most=6))
                found, seconds, peak = timed(partial(ours, objective, space, settings))
                line["few_batches_memory_over_weights"] = small / weights
                products = found["products"] if name == "float32" else products
        except Exception as error:  # a variant that fails is a result
            yield line | {"failed": f"{type(error).__name__}: {error}"}
            continue
        yield (
            line
            | found
            | {
                "seconds": seconds,
                "gradient_equivalents": seconds / gradient,
                "memory_mb": peak / 2**20,
                "memory_over_weights": peak / weights,
                "device": torch.cuda.get_device_name(),
                "torch": torch.__version__,
            }
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", default=",".join([*VARIANTS, PEER]), help="comma-separated")
    parser.add_argument("--batches", type=int, default=104, help="of four sentences")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU: benchmarks/curvature.py runs on a CPU")
    logging.set_verbosity_error()
    for line in lines(options.variants.split(","), options.batches):
        print(json.dumps({k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in line.items()}), flush=True)


if __name__ == "__main__":
    main()
