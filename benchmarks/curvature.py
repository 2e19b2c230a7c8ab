"""What the top eigenpairs of a Hessian cost in several tools, and how wrong they are, as JSON lines.

    pip install --no-deps -r benchmarks/peers.txt
    python benchmarks/curvature.py [--settings bert,bert_trained,…] [--tools bilora,…] [--k 1,5] [--rounds 1]

Each tool looks for the ``k`` eigenvalues of largest magnitude of the Hessian of one mean loss, with the same float32
weights, batches and parameters, in a process of its own with one thread; ``seconds`` is that process's CPU time from
the tool's set-up to its eigenvectors. ``gradient_seconds`` is the median of five gradients over all batches in that
process just before, and ``gradient_equivalents`` their ratio, which drifts less than seconds do. Products are counted
where the tool makes them. After the clock has stopped every returned pair is judged alike: ``max_residual`` is the
largest ``‖H·v − λ·v‖/(|λ|·‖v‖)``, with the tool's own λ and v, an exact product at the float32 weights by our
``HessianOperator``, and norms in float64; the target is 1e-3. A small residual says that a pair is an eigenpair, not
that it is among the largest: compare ``values`` between tools.

``bert`` has new weights and random labels; ``bert_trained`` is the same architecture after 160 steps on real sentences,
from three seeds, since how many products five pairs need is a matter of the spectrum. In ``bert_lora`` and ``minilm``
every tool measures at the merged weights of a Bi-LoRA adapter trained for 30 steps; ``bilora warm`` starts from the
eigenvectors at those of a LoRA adapter trained from the same seed, as in a study that compares the two, and what those
cost is not counted.

Peers run on our model with ``sdpa_kernel(MATH)``, which has second derivatives; batches hold equal numbers of examples,
so that averages over batches are right in all of them. Steps of the tool tuned by hand are the fewest, by fives, that
meet the target, and finding them is not counted against it. The determinism check of curvlinops (two gradients and two
products) is off.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from typing import Any, Literal
from unittest import mock

import datasets
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from transformers.utils import logging

from analysis import HessianOperator, Objective, WeightSpace, top_eigenvalues
from analysis.core.vectors import added, norm
from bilora import BiLoraTrainer, build_method
from bilora.seeds import generator_for
from bilora.tasks import LoraSpec, TaskSpec, add_lora, load_model, load_task, load_tokenizer
from bilora.tasks.models import seeded

TARGET = 1e-3
"""Relative residual that is asked for."""
MAX_PRODUCTS = 200
"""Of ours: enough for it to stop by itself."""
ENCODER = r"bert\.encoder\..*\.(query|key|value|dense)\.weight"
"""The linear layers of a BERT's encoder."""
GRADIENTS = 5
ADAPTER_STEPS = 30
TRAINING_STEPS = 160
SENTENCES = 1024
TUNED_STEPS = {
    ("bert", 1): 15,
    ("bert", 5): 45,
    ("bert_trained 0", 5): 65,
    ("bert_trained 1", 5): 20,
    ("bert_trained 2", 5): 20,
    ("bert_lora", 1): 10,
    ("bert_lora", 5): 60,
    ("minilm", 5): 30,
}
"""(setting, k) → Lanczos steps after which the pairs of hessian-eigenthings meet the target."""


@dataclass(frozen=True, eq=False)
class Data:
    """Examples and how they are batched."""

    examples: datasets.Dataset
    collate: Callable[..., Any]
    batch: int

    def objective(self) -> Objective:
        """In batches of equal numbers of examples, neighbours in length."""
        return self._in_batches(self.batch)

    def whole(self) -> Objective:
        """The same mean loss as one batch."""
        return self._in_batches(len(self.examples))

    def _in_batches(self, size: int) -> Objective:
        rows = sorted(self.examples, key=lambda row: -len(row["input_ids"]))
        batches = [self.collate(rows[start : start + size]) for start in range(0, len(rows), size)]
        return Objective(batches, name="train")


@dataclass(frozen=True, eq=False)
class Problem:
    """One Hessian. ``near``: eigenvectors at another adapter of the same base, (at least k, size)."""

    setting: str
    data: Data
    objective: Objective
    space: WeightSpace
    near: Tensor | None


@dataclass(frozen=True, eq=False)
class Found:
    """What a tool returned: ``values`` (k,), ``vectors`` (k, size), and whether it says that they have converged."""

    values: list[float]
    vectors: Tensor
    products: int
    claimed: bool | None


@dataclass(frozen=True)
class Tool:
    """A way to the eigenpairs, the distribution it comes in, and what a reader of the numbers should know."""

    find: Callable[[Problem, int], Found]
    package: str
    module: str
    note: str


@dataclass(frozen=True)
class Setting:
    """A model with its data, the tools run by default, and how its weights are trained first, if they are."""

    load: Callable[[], tuple[Any, Data]]
    ks: tuple[int, ...]
    tools: tuple[str, ...]
    trained: Literal["", "whole", "adapters"] = ""


def new_bert(vocabulary: int, seed: int) -> Any:
    """BERT of 4 × 128 with new weights."""
    with seeded(seed, "benchmark model"):
        return BertForSequenceClassification(
            BertConfig(
                vocab_size=vocabulary,
                hidden_size=128,
                num_hidden_layers=4,
                num_attention_heads=2,
                intermediate_size=512,
                max_position_embeddings=64,
                num_labels=2,
            )
        )


def small_bert() -> tuple[Any, Data]:
    """A new BERT; 4 batches of 16 examples of 16 to 64 tokens, padded to 64; random labels."""
    model = new_bert(1000, seed=0)
    generator = generator_for("benchmark data", 0)
    examples, tokens = 64, 64
    lengths = torch.randint(16, tokens + 1, (examples, 1), generator=generator)
    mask = (torch.arange(tokens) < lengths).long()
    columns = {
        "input_ids": torch.randint(1, 1000, (examples, tokens), generator=generator) * mask,
        "attention_mask": mask,
        "labels": torch.randint(0, 2, (examples,), generator=generator),
    }
    return model.eval(), Data(
        datasets.Dataset.from_dict({name: column.tolist() for name, column in columns.items()}),
        default_data_collator,
        batch=16,
    )


def sentences() -> tuple[datasets.Dataset, Callable[..., Any], int]:
    """Rotten Tomatoes for training, its collation and the size of its vocabulary."""
    tokenizer = load_tokenizer("minilm")
    task = load_task(TaskSpec(data="rotten_tomatoes", train_examples=SENTENCES, max_length=64), tokenizer)
    return task.train, task.collate, len(tokenizer)


def trained_bert(seed: int) -> tuple[Any, Data]:
    """A new BERT to be trained on the sentences, of which 64 are measured on in batches of 16."""
    examples, collate, vocabulary = sentences()
    return new_bert(vocabulary, seed), Data(examples.select(range(64)), collate, batch=16)


def train_whole(model: Any, seed: int) -> None:
    """AdamW on all weights."""
    examples, collate, _ = sentences()
    arguments = training_arguments(TRAINING_STEPS, batch=32, learning_rate=3e-4, seed=seed)
    trainer = Trainer(model=model, args=arguments, train_dataset=examples, data_collator=collate)
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def minilm() -> tuple[Any, Data]:
    """MiniLM with a new head; 512 Rotten Tomatoes sentences of at most 64 tokens in batches of 32."""
    tokenizer = load_tokenizer("minilm")
    task = load_task(TaskSpec(data="rotten_tomatoes", train_examples=512, max_length=64), tokenizer)
    model = load_model("minilm", "classification", task.num_labels, seed=0, tokenizer=tokenizer)
    return model, Data(task.train, task.collate, batch=32)


def train_adapter(model: Any, data: Data, method: str) -> Any:
    """``model`` with an adapter after a short training by ``method``: every method has one start and one data order."""
    adapted = add_lora(model, LoraSpec(), "classification", seed=1)
    trainer = BiLoraTrainer(
        model=adapted,
        method=build_method(method),
        args=training_arguments(ADAPTER_STEPS, data.batch, learning_rate=1e-3, seed=1),
        train_dataset=data.examples,
        data_collator=data.collate,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return adapted


def training_arguments(steps: int, batch: int, learning_rate: float, seed: int) -> TrainingArguments:
    return TrainingArguments(
        tempfile.mkdtemp(),  # nothing is saved there
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=learning_rate,
        seed=seed,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )


def prepare(setting: str, folder: str, k: int) -> None:
    """Write trained weights: of a whole model, or the merged ones of an adapter and ``k`` eigenvectors at another's."""
    quiet()
    if SETTINGS[setting].trained == "whole":
        model, _ = SETTINGS[setting].load()
        train_whole(model, seed=int(setting.split()[-1]))
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, point_in(folder))
        return
    _, second = merged_point(setting, "bilora")
    save_file({name: tensor.contiguous() for name, tensor in second.model.state_dict().items()}, point_in(folder))
    if k:
        data, first = merged_point(setting, "lora")
        save_file({"vectors": ours(Problem(setting, data, data.objective(), first, None), k).vectors}, near_in(folder))


def merged_point(setting: str, method: str) -> tuple[Data, WeightSpace]:
    model, data = SETTINGS[setting].load()
    return data, WeightSpace.named(train_adapter(model, data, method), ENCODER)


def point_in(folder: str) -> str:
    return f"{folder}/second.safetensors"


def near_in(folder: str) -> str:
    return f"{folder}/near.safetensors"


def problem_of(setting: str, folder: str, tool: str) -> Problem:
    model, data = SETTINGS[setting].load()
    near = None
    if SETTINGS[setting].trained:
        model.load_state_dict(load_file(point_in(folder)))
        near = load_file(near_in(folder))["vectors"] if tool == "bilora warm" else None
    model.eval()
    return Problem(setting, data, data.objective(), WeightSpace.named(model, ENCODER), near)


def ours(
    problem: Problem, k: int, *, tolerance: float = TARGET, max_products: int = MAX_PRODUCTS, **settings: Any
) -> Found:
    space = problem.space
    found = top_eigenvalues(
        problem.objective, space, k, tolerance=tolerance, max_products=max_products, vectors=True, **settings
    )
    vectors = torch.stack([space.flat(vector) for vector in found.vectors])
    return Found(found.values.tolist(), vectors, found.products, bool(found.converged.all()))


def warm(problem: Problem, k: int) -> Found:
    assert problem.near is not None
    return ours(problem, k, start=[problem.space.named_vector(row) for row in problem.near[:k]])


class Counted:
    """A function that counts its calls."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.calls = 0
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        return self._function(*arguments)


class NumberedBatches(nn.Module):
    """Batch number → mean loss of that batch: PyHessian reads (inputs, targets) and cannot take a dict of tensors.

    Iterated over, it gives its numbers as often as the batch has examples, by which PyHessian weights it.
    """

    def __init__(self, objective: Objective, space: WeightSpace) -> None:
        super().__init__()
        self.model = space.model
        self._objective = objective
        self._space = space

    def forward(self, number: Tensor) -> Tensor:
        return self._objective.batch_loss(self._space, int(number[0]))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for number, weight in enumerate(self._objective.weights):
            yield torch.full((weight,), number), torch.empty(0)


@sdpa_kernel(SDPBackend.MATH)
def pyhessian(problem: Problem, k: int, *, iterations: int, tol: float, whole: bool = False) -> Found:
    """Power iteration. With all examples in one batch PyHessian keeps the gradient's graph between products."""
    module = importlib.import_module("pyhessian.hessian")
    torch.manual_seed(0)
    batches = NumberedBatches(problem.data.whole() if whole else problem.objective, problem.space)
    source = {"data": next(iter(batches))} if whole else {"dataloader": batches}
    engine = module.hessian(batches, lambda loss, _: loss, cuda=False, **source)
    product = Counted(module.hessian_vector_product if whole else engine.dataloader_hv_product)
    owner, name = (module, "hessian_vector_product") if whole else (engine, "dataloader_hv_product")
    with mock.patch.object(owner, name, product):
        values, vectors = engine.eigenvalues(maxIter=iterations, tol=tol, top_n=k)
    rows = torch.stack([torch.cat([part.detach().reshape(-1) for part in vector]) for vector in vectors])
    return Found(values, rows, product.calls, None)


@sdpa_kernel(SDPBackend.MATH)
def eigenthings(problem: Problem, k: int, algorithm: str, **settings: Any) -> Found:
    package = importlib.import_module("hessian_eigenthings")
    operator = package.HessianOperator(
        problem.space.model, problem.objective.batches, lambda model, batch: model(**batch).loss
    )
    operator.matvec = Counted(operator.matvec)
    if algorithm == "tuned":
        steps = TUNED_STEPS[problem.setting, k]
        algorithm, settings = "lanczos", {"max_iter": steps, "tol": TARGET, "reorthogonalize": True}
    found = getattr(package, algorithm)(operator, k=k, seed=0, **settings)
    return Found(found.eigenvalues.tolist(), found.eigenvectors, operator.matvec.calls, bool(found.converged.all()))


class Logits(nn.Module):
    """Batch without labels → logits: curvlinops applies the loss itself."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        logits: Tensor = self.model(**batch).logits
        return logits


@sdpa_kernel(SDPBackend.MATH)
def curvlinops(problem: Problem, k: int) -> Found:
    """SciPy's implicitly restarted Lanczos on the Hessian of curvlinops; ``tol`` is ARPACK's relative residual."""
    sparse = importlib.import_module("scipy.sparse.linalg")
    operator = importlib.import_module("curvlinops").HessianLinearOperator(
        Logits(problem.space.model),
        nn.CrossEntropyLoss(),
        list(problem.space.parameters.values()),
        [
            ({name: tensor for name, tensor in batch.items() if name != "labels"}, batch["labels"])
            for batch in problem.objective.batches
        ],
        check_deterministic=False,
        num_data=int(problem.objective.weight),
        batch_size_fn=lambda batch: len(batch["input_ids"]),
    )
    operator._matmat = Counted(operator._matmat)
    start = np.random.default_rng(0).standard_normal(problem.space.size).astype(np.float32)
    claimed = True
    try:
        values, vectors = sparse.eigsh(operator.to_scipy(np.float32), k=k, which="LM", tol=TARGET, v0=start)
    except sparse.ArpackNoConvergence as error:
        values, vectors, claimed = error.eigenvalues, error.eigenvectors, False
    return Found(values.tolist(), torch.from_numpy(vectors.T.copy()), operator._matmat.calls, claimed)


def _ours(note: str, **settings: Any) -> Tool:
    return Tool(partial(ours, **settings), "bilora", "analysis", note)


def _pyhessian(note: str, **settings: Any) -> Tool:
    return Tool(partial(pyhessian, **settings), "pyhessian", "pyhessian", note)


def _eigenthings(note: str, algorithm: str, **settings: Any) -> Tool:
    return Tool(
        partial(eigenthings, algorithm=algorithm, **settings), "hessian-eigenthings", "hessian_eigenthings", note
    )


TOOLS = {
    "bilora": _ours("tolerance 1e-3"),
    "bilora one-sided": _ours(
        "quick look: one-sided differences, tolerance 1e-2 by its own products",
        tolerance=1e-2,
        max_products=100,
        differences="one-sided",
    ),
    "bilora warm": Tool(
        warm, "bilora", "analysis", "starts from the eigenvectors at the LoRA adapter of the same seed"
    ),
    "pyhessian": _pyhessian("defaults: tol 1e-3, maxIter 100", iterations=100, tol=1e-3),
    "pyhessian tight": _pyhessian("tol 1e-5, maxIter 300", iterations=300, tol=1e-5),
    "pyhessian one batch": _pyhessian(
        "defaults, all examples in one batch with its graph kept", iterations=100, tol=1e-3, whole=True
    ),
    "hessian-eigenthings power": _eigenthings("tol 1e-3, max_iter 100", "deflated_power_iteration", tol=TARGET),
    "hessian-eigenthings lanczos": _eigenthings("defaults: 2k steps", "lanczos"),
    "hessian-eigenthings lanczos tuned": _eigenthings("steps tuned by hand, reorthogonalized", "tuned"),
    "curvlinops eigsh": Tool(curvlinops, "curvlinops-for-pytorch", "curvlinops", "tol 1e-3, which LM"),
}

SETTINGS = {
    "bert": Setting(
        small_bert,
        (1, 5),
        tuple(name for name in TOOLS if name != "bilora warm"),
    ),
    **{
        f"bert_trained {seed}": Setting(
            partial(trained_bert, seed),
            (5,),
            ("bilora", "hessian-eigenthings lanczos tuned", "curvlinops eigsh", "pyhessian"),
            trained="whole",
        )
        for seed in range(3)
    },
    "bert_lora": Setting(small_bert, (1, 5), tuple(TOOLS), trained="adapters"),
    "minilm": Setting(
        minilm,
        (5,),
        (
            "bilora",
            "bilora one-sided",
            "bilora warm",
            "hessian-eigenthings lanczos tuned",
            "curvlinops eigsh",
        ),
        trained="adapters",
    ),
}
"""With adapters, every tool measures at the merged weights of the second of two that differ in their method."""


def measure(setting: str, tool: str, k: int, folder: str) -> dict[str, Any]:
    """One line; to be called in a process that does nothing else."""
    quiet()
    problem = problem_of(setting, folder, tool)
    gradient = statistics.median(
        seconds_of(lambda: problem.objective.gradient(problem.space)) for _ in range(GRADIENTS)
    )
    began = time.process_time()
    found = TOOLS[tool].find(problem, k)
    seconds = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    order = sorted(range(len(found.values)), key=lambda i: -abs(found.values[i]))
    residuals = residuals_of(problem, found)
    return {
        "products": found.products,
        "seconds": seconds,
        "gradient_seconds": gradient,
        "gradient_equivalents": seconds / gradient,
        "max_residual": max(residuals, default=None),
        "target_met": len(residuals) == k and max(residuals) <= TARGET,
        "converged_claimed": found.claimed,
        "values": [found.values[i] for i in order],
        "residuals": [residuals[i] for i in order],
        "peak_rss_mb": peak,
        "size": problem.space.size,
        "loss": problem.objective.loss(problem.space),
    }


def seconds_of(function: Callable[[], object]) -> float:
    began = time.process_time()
    function()
    return time.process_time() - began


def residuals_of(problem: Problem, found: Found) -> list[float]:
    units = [problem.space.named_vector((row.double() / row.double().norm()).float()) for row in found.vectors]
    with HessianOperator(problem.objective, problem.space) as operator:
        products = operator.many(units)
    triples = zip(found.values, units, products, strict=True)
    return [norm(added(product, unit, -value)) / abs(value) for value, unit, product in triples]


def quiet() -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*backward.*create_graph.*")


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a call returns in a new process, whose peak memory is then its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def lines(setting: str, tools: list[str], ks: list[int], rounds: int) -> Iterator[dict[str, Any]]:
    """A line per tool and k, that of the round with the median of ``gradient_equivalents``."""
    with tempfile.TemporaryDirectory() as folder:
        if SETTINGS[setting].trained:
            alone(prepare, setting, folder, max(ks) if "bilora warm" in tools else 0)
        runs: dict[tuple[int, str], list[dict[str, Any]]] = {(k, tool): [] for k in ks for tool in tools}
        for number in range(rounds):
            for (k, tool), done in runs.items():
                print(f"{setting}: round {number + 1} of {rounds}, k = {k}, {tool}", file=sys.stderr, flush=True)
                done.append(outcome(setting, tool, k, folder))
                if number + 1 == rounds:
                    done.sort(key=lambda run: run.get("gradient_equivalents", 0.0))
                    yield {"setting": setting, "tool": tool, "k": k, "note": TOOLS[tool].note, **done[rounds // 2]}


def outcome(setting: str, tool: str, k: int, folder: str) -> dict[str, Any]:
    if find_spec(TOOLS[tool].module) is None:
        return {"skipped": "pip install --no-deps -r benchmarks/peers.txt"}
    packages = ("torch", "transformers", TOOLS[tool].package)
    versions = {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}
    try:
        return {**alone(measure, setting, tool, k, folder), "versions": versions}
    except Exception as error:  # a peer that fails is a result, and no reason to lose those of the others
        return {"failed": f"{type(error).__name__}: {error}", "versions": versions}


def chosen_settings(names: str) -> list[str]:
    """Names as they are, or the first word that several settings share."""
    wanted = names.split(",")
    return [setting for name in wanted for setting in SETTINGS if name in (setting, setting.split()[0])]


def rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--settings", default=",".join(SETTINGS), help="comma-separated; bert_trained stands for its three seeds"
    )
    parser.add_argument("--tools", help=f"comma-separated, of: {', '.join(TOOLS)}; each setting has its own choice")
    parser.add_argument("--k", help="comma-separated numbers of eigenvalues (bert and bert_lora 1,5, others 5)")
    parser.add_argument("--rounds", type=int, default=1, help="the median over them is reported")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the processes started below, before they load a BLAS
    for setting in chosen_settings(options.settings):
        chosen = SETTINGS[setting]
        tools = options.tools.split(",") if options.tools else list(chosen.tools)
        if chosen.trained != "adapters":
            tools = [tool for tool in tools if tool != "bilora warm"]  # no other adapter to start from
        ks = [int(k) for k in options.k.split(",")] if options.k else list(chosen.ks)
        for line in lines(setting, tools, ks, options.rounds):
            print(json.dumps({key: rounded(value) for key, value in line.items()}), flush=True)


if __name__ == "__main__":
    main()
