"""What it costs to analyse an adapter of a 7B model from its factors, as JSON lines.

    python benchmarks/inspect_factors.py

A PEFT folder with 224 matrices in the shapes of Llama 2-7B (4096 × 4096, 4096 × 11008 and 11008 × 4096, 32 layers of
seven), rank 8, random factors in float32, and a second one to compare it with. ``read`` reads both, ``updates`` takes
singular values, ranks and balance, ``compare`` cosines, distances and overlaps with their test against chance. The
intruder dimensions of one layer of each shape, which need W0, are timed apart. No m × n product of factors is formed.
"""

import json
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from analysis.core.adapter_files import read_factors
from analysis.core.factors import Factors
from analysis.subspace.compare import compare_adapters
from analysis.subspace.intruders import intruder_dimensions
from analysis.subspace.update import inspect_updates

LAYERS, RANK = 32, 8
SHAPES = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (4096, 4096),
    "self_attn.v_proj": (4096, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (11008, 4096),
    "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008),
}


def write_adapter(folder: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(LAYERS):
        for name, (m, n) in SHAPES.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, n, generator=generator) / n**0.5
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(m, RANK, generator=generator) / m**0.5
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "base_model_name_or_path": "random"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def timed(name: str, run: Callable[[], Any]) -> Any:
    began, cpu = time.perf_counter(), time.process_time()
    found = run()
    line = {
        "part": name,
        "seconds": round(time.perf_counter() - began, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(json.dumps(line), flush=True)
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        folders = [Path(place) / name for name in ("first", "second")]
        for seed, folder in enumerate(folders):
            write_adapter(folder, seed)
        first, second = timed("read", lambda: [read_factors(folder) for folder in folders])
    timed("updates", lambda: inspect_updates(first).rows())
    timed("compare", lambda: compare_adapters(first, second, "first with second").rows())
    for m, n in sorted(set(SHAPES.values())):
        generator = torch.Generator().manual_seed(m + n)
        weight = torch.randn(m, n, generator=generator) / n**0.5
        update = Factors(
            0.3 * torch.randn(m, RANK, generator=generator), torch.randn(RANK, n, generator=generator), 2.0
        )
        timed(f"intruders of {m} x {n}", lambda w=weight, u=update: intruder_dimensions(w, u))


if __name__ == "__main__":
    main()
