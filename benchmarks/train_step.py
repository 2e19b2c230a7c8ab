"""Time and memory of an optimizer step of each method over plain LoRA, as JSON lines.

    python benchmarks/train_step.py [--methods lora,bilora,…] [--rounds 3] [--steps 10] [--batch 32]

Every method trains its own copy of the real MiniLM on the same Rotten Tomatoes batches through the real Trainer. Rounds
are interleaved (lora, bilora, …, lora, bilora, …), so that a machine that slows down slows all of them; a round's ratio
compares steps on the same batches, and the median over rounds is reported. On a CPU the process's CPU time is taken,
with one thread; on a GPU the wall time after synchronising. Memory is the peak of a run of its own: resident set on a
CPU, allocated memory on a GPU.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback, TrainingArguments
from transformers.utils import logging

from bilora import METHODS, BiLoraTrainer, build_method
from bilora.tasks import LoraSpec, TaskSpec, add_lora, load_model, load_task, load_tokenizer

BARS = {"bilora": 1.06, "flat_lora": 1.25, "lora_sam": 2.15}
WARM_UP = 2


class StepTimes(TrainerCallback):
    """Seconds of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(now() - self.began)


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def trainer_for(name: str, options: argparse.Namespace, folder: str) -> BiLoraTrainer:
    tokenizer = load_tokenizer("minilm")
    task = load_task(TaskSpec(data="rotten_tomatoes", train_examples=1000, max_length=64), tokenizer)
    model = load_model("minilm", "classification", num_labels=task.num_labels, seed=0)
    if METHODS[name].needs_lora:
        model = add_lora(model, LoraSpec(), "classification", seed=0)
    arguments = TrainingArguments(
        folder,
        max_steps=WARM_UP + options.steps,
        per_device_train_batch_size=options.batch,
        learning_rate=1e-3,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = BiLoraTrainer(model=model, method=build_method(name), args=arguments, **task.trainer_arguments())
    trainer.remove_callback(PrinterCallback)
    return trainer


def time_methods(names: list[str], options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Per method: median seconds of a step, and the median over rounds of the summed-step ratio to plain LoRA."""
    with tempfile.TemporaryDirectory() as folder:
        trainers = {name: trainer_for(name, options, f"{folder}/{name}") for name in names}
        steps: dict[str, list[list[float]]] = {name: [] for name in names}
        for _ in range(options.rounds):
            for name, trainer in trainers.items():
                clock = StepTimes()
                trainer.add_callback(clock)
                trainer.train()
                trainer.remove_callback(clock)
                steps[name].append(clock.seconds[WARM_UP:])
    return {
        name: {
            "ratio_time": statistics.median(
                sum(mine) / sum(lora) for mine, lora in zip(steps[name], steps["lora"], strict=True)
            ),
            "seconds": statistics.median(s for one_round in steps[name] for s in one_round),
        }
        for name in names
    }


def peak_memory_mb(name: str, options: argparse.Namespace) -> float:
    """Peak memory of a run of its own process."""
    command = [sys.executable, __file__, "--memory-of", name, "--batch", str(options.batch)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def print_memory(name: str, options: argparse.Namespace) -> None:
    options.steps = 3
    with tempfile.TemporaryDirectory() as folder:
        trainer_for(name, options, folder).train()
    if torch.cuda.is_available():
        print(torch.cuda.max_memory_allocated() / 2**20)
    else:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="lora,bilora,flat_lora,lora_sam", help="comma-separated registry names")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="timed steps a round")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    if options.memory_of:
        print_memory(options.memory_of, options)
        return
    names = ["lora", *(n for n in options.methods.split(",") if n != "lora")]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu, 1 thread"
    # Memory first: on Linux a child's peak resident set starts from its parent's, which is still small here.
    memory = {name: peak_memory_mb(name, options) for name in names}
    times = time_methods(names, options)
    for name in names:
        line: dict[str, Any] = {"model": "minilm", "method": name, **times[name]}
        line |= {"ratio_memory": memory[name] / memory["lora"], "memory_mb": memory[name]}
        within = times[name]["ratio_time"] <= BARS[name] if name in BARS else None
        line |= {
            "bar_time": BARS.get(name),
            "within_bar": within,
            "batch": options.batch,
            "rounds": options.rounds,
            "device": device,
        }
        print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()}), flush=True)


if __name__ == "__main__":
    main()
