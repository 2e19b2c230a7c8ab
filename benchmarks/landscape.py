"""What a loss surface costs in several tools, and how wrong the cheap ones are, as JSON lines.

    pip install --no-deps -r benchmarks/peers.txt
    python benchmarks/landscape.py [--model bert|smollm2] [--variants tomgoldstein,exact,…] [--points 21]

``bert``, of 4 × 256 with 11.2 M parameters, is trained for 60 steps on 256 real sentences (Rotten Tomatoes, mean 26
tokens); ``smollm2`` is SmolLM2-135M, pretrained, as a language model of the same sentences, on a GPU if there is one.
The loss on these sentences is taken on a 21 × 21 grid over two filter-normalised random directions, |x|, |y| ≤ 1, and
≤ 0.5 for ``smollm2``. ``seconds`` is CPU time with one thread from given axes to the grid, on a GPU wall time after
synchronising; ``speedup`` its ratio to ``tomgoldstein`` by the point of the full grid; errors are over the range of
losses, against ``tomgoldstein``'s grid.

``tomgoldstein`` does what the functions of github.com/tomgoldstein/loss-landscape do for a point: weights + changes
written to every parameter, then loss and accuracy over a loader, whose batches are padded to the tokenizer's maximum
of 64 as is usual. ``landscaper`` and ``loss-landscapes`` run their own loops with the same evaluation, on a smaller
grid, because their points are not ours: landscaper scales axes by its own rule, loss-landscapes draws them itself.
``exact`` evaluates every point in float32, ``bfloat16`` every point in bfloat16 from float32 masters, ``adaptive``
interpolates to within 2 % of the range.
"""

import argparse
import contextlib
import importlib.util
import json
import platform
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BatchEncoding, BertConfig, BertForSequenceClassification
from transformers.utils import logging

from analysis import Objective, WeightSpace
from analysis.core.vectors import Vector
from analysis.landscape.plane import Plane
from analysis.landscape.random_plane import random_plane
from analysis.landscape.surface import LossSurface, loss_surface
from bilora.tasks import Task, TaskSpec, load_model, load_task, load_tokenizer
from bilora.tasks.metrics import IGNORED
from bilora.tasks.models import seeded

EXTENTS = {"bert": 1.0, "smollm2": 0.5}
MAX_LENGTH = 64
BATCH = 32
PEER_POINTS = 5
"""A side of the grid on which other tools' own loops are timed."""


@dataclass(frozen=True, eq=False)
class Problem:
    """One surface: ``padded`` are the batches for tools that take any loader."""

    objective: Objective
    padded: list[BatchEncoding]
    space: WeightSpace
    plane: Plane
    points: int
    extent: float


@dataclass(frozen=True, eq=False)
class Made:
    """What a tool made: ``losses`` (rows, columns) where its points are ours."""

    points: int
    losses: np.ndarray | None
    note: str = ""


def prepare(name: str, points: int, batch: int) -> Problem:
    model, task = language_model() if name == "smollm2" else trained_bert()
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    space = WeightSpace.all(model)
    objective = Objective.from_dataset(task.train, task.collate, batch_size=batch, name="train")
    padded = [to_maximum(held).to(model.device) for held in batches_of(task, batch)]
    return Problem(objective, padded, space, random_plane(space, seed=0), points, EXTENTS[name])


def language_model() -> tuple[Any, Task]:
    tokenizer = load_tokenizer("smollm2")
    spec = TaskSpec(data="rotten_tomatoes", kind="causal_lm", train_examples=256, max_length=MAX_LENGTH)
    return load_model("smollm2", "causal_lm", tokenizer=tokenizer), load_task(spec, tokenizer)


def trained_bert() -> tuple[Any, Task]:
    tokenizer = load_tokenizer("minilm")
    task = load_task(TaskSpec(data="rotten_tomatoes", train_examples=256, max_length=MAX_LENGTH), tokenizer)
    with seeded(0, "landscape benchmark"):
        config = BertConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=1024,
            num_labels=2,
        )
        model = BertForSequenceClassification(config)
        train(model, batches_of(task, BATCH))
    return model, task


def batches_of(task: Task, size: int) -> list[Any]:
    rows = list(task.train)
    return [task.collate(rows[start : start + size]) for start in range(0, len(rows), size)]


def train(model: nn.Module, batches: list[Any]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    model.train()
    for step in range(60):
        model(**batches[step % len(batches)]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def to_maximum(batch: Any) -> BatchEncoding:
    def padded(name: str, tensor: Tensor) -> Tensor:
        value = IGNORED if name == "labels" else 0
        return nn.functional.pad(tensor, (0, MAX_LENGTH - tensor.shape[1]), value=value)

    return BatchEncoding({n: padded(n, tensor) if tensor.dim() == 2 else tensor for n, tensor in batch.items()})


def evaluated(model: nn.Module, batches: list[BatchEncoding]) -> float:
    """Mean cross-entropy over a loader (of tokens, in a language model), with the accuracy that such loops count."""
    criterion = nn.CrossEntropyLoss()
    total, correct, count = 0.0, 0, 0
    with torch.no_grad():
        for batch in batches:
            inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
            logits, labels = model(**inputs).logits, batch["labels"]
            if labels.dim() == 2:
                logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            number = int((labels != IGNORED).sum())
            total += criterion(logits, labels).item() * number
            count += number
            correct += int((logits.max(1)[1] == labels).sum())
    return total / count


def tomgoldstein(problem: Problem) -> Made:
    """Every point: fresh changes for every parameter, written to the network, and a full evaluation."""
    model = problem.space.model
    names = list(problem.space.parameters)
    parameters = [problem.space.parameters[name] for name in names]
    weights = [p.data.clone() for p in parameters]
    first, second = ([axis[name] for name in names] for axis in problem.plane.axes)
    coordinates = np.linspace(-problem.extent, problem.extent, problem.points)
    losses = np.empty((problem.points, problem.points))
    for i, y in enumerate(coordinates):
        for j, x in enumerate(coordinates):
            changes = [d0 * float(x) + d1 * float(y) for d0, d1 in zip(first, second, strict=True)]
            for p, w, d in zip(parameters, weights, changes, strict=True):
                p.data = w + d
            losses[i, j] = evaluated(model, problem.padded)
    for p, w in zip(parameters, weights, strict=True):
        p.data = w
    return Made(problem.points**2, losses)


def landscaper(problem: Problem) -> Made:
    # Its package imports topology and plotting libraries that the loop does not use.
    spec = importlib.util.find_spec("landscaper")
    assert spec is not None
    package = types.ModuleType("landscaper")
    package.__path__ = list(spec.submodule_search_locations or [])
    sys.modules["landscaper"] = package
    compute = importlib.import_module("landscaper.compute")
    directions = [[axis[name].clone() for name in problem.space.parameters] for axis in problem.plane.axes]
    compute.compute_loss_landscape(
        problem.space.model,
        problem.padded,
        directions,
        evaluated,
        steps=PEER_POINTS,
        distance=0.1,
        dim=2,
        device=problem.space.device.type,
    )
    return Made(PEER_POINTS**2, None, "its own scaling of the axes; noise is added to its maximum")


def loss_landscapes(problem: Problem) -> Made:
    package = importlib.import_module("loss_landscapes")

    class Loss(importlib.import_module("loss_landscapes.metrics").Metric):  # type: ignore[misc]
        def __call__(self, wrapper: Any) -> float:
            return evaluated(wrapper.modules[0], problem.padded)

    package.random_plane(
        problem.space.model, Loss(), distance=1, steps=PEER_POINTS, normalization="filter", deepcopy_model=True
    )
    return Made(PEER_POINTS**2, None, "its own axes, uniform on [0, 1]")


def ours(problem: Problem, **settings: Any) -> Made:
    surface: LossSurface = loss_surface(
        problem.objective, problem.space, problem.plane, points=problem.points, extent=problem.extent, **settings
    )
    note = f"evaluated {int(surface.evaluated.sum())}, error seen {surface.error:.4f}"
    if surface.precision == "bfloat16":
        note += f", error of bfloat16 at points checked {surface.precision_error:.4f}"
    return Made(int(surface.evaluated.sum()), surface.losses, note)


VARIANTS: dict[str, tuple[Callable[..., Made], dict[str, Any]]] = {
    "tomgoldstein": (tomgoldstein, {}),
    "landscaper": (landscaper, {}),
    "loss-landscapes": (loss_landscapes, {}),
    "exact": (ours, {"error": None}),
    "bfloat16": (ours, {"error": None, "precision": "bfloat16"}),
    "adaptive": (ours, {"error": 0.02}),
    "adaptive bfloat16": (ours, {"error": 0.02, "precision": "bfloat16"}),
}
PACKAGES = {"landscaper": "landscaper", "loss-landscapes": "loss_landscapes"}


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def lines(model: str, names: list[str], points: int, batch: int) -> Iterator[dict[str, Any]]:
    problem = prepare(model, points, batch)
    before = weights_of(problem.space)
    reference: np.ndarray | None = None
    per_point = float("nan")
    for name in names:
        print(name, file=sys.stderr, flush=True)
        run, settings = VARIANTS[name]
        line: dict[str, Any] = {"model": model, "variant": name}
        if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
            yield {**line, "skipped": "pip install --no-deps -r benchmarks/peers.txt"}
            continue
        evaluated(problem.space.model, problem.padded[:2])
        began = now()
        try:
            with contextlib.redirect_stdout(sys.stderr):  # landscaper prints
                made = run(problem, **settings)
        except Exception as error:  # a peer that fails is a result
            yield {**line, "failed": f"{type(error).__name__}: {error}"}
            continue
        seconds = now() - began
        grid = made.points if made.losses is None else points**2
        if name == "tomgoldstein":
            reference, per_point = made.losses, seconds / grid
        line |= {"points": made.points, "seconds": seconds, "speedup": per_point / (seconds / grid)}
        if reference is not None and made.losses is not None:
            error = np.abs(made.losses - reference) / np.ptp(reference)
            line |= {"max_error": error.max(), "rms_error": np.sqrt((error**2).mean())}
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        if name in PACKAGES:
            versions[name] = metadata.version(name)
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu, 1 thread"
        line |= {"note": made.note, "device": device, "versions": versions}
        yield line
        changed = weights_of(problem.space)
        if any(not torch.equal(before[n], changed[n]) for n in before):
            print(f"{name} left other weights behind; they are put back", file=sys.stderr)
            for n, parameter in problem.space.parameters.items():
                parameter.data = before[n].clone()


def weights_of(space: WeightSpace) -> Vector:
    return {name: parameter.detach().clone() for name, parameter in space.parameters.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", default=",".join(VARIANTS), help="comma-separated")
    parser.add_argument("--model", default="bert", choices=list(EXTENTS))
    parser.add_argument("--points", type=int, default=21, help="of a side of the grid")
    parser.add_argument("--batch", type=int, default=BATCH, help="examples a forward pass, of every variant")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    for line in lines(options.model, options.variants.split(","), options.points, options.batch):
        rounded = {key: float(f"{v:.4g}") if isinstance(v, float | np.floating) else v for key, v in line.items()}
        print(json.dumps(rounded), flush=True)


if __name__ == "__main__":
    main()
