"""What recording a run costs: step time with a recorder every 10 steps over step time without, as JSON lines.

    python benchmarks/recording.py [--methods lora,lora_sam,flat_lora,bilora] [--steps 50] [--rounds 3]

MiniLM with LoRA of rank 8 on all linear layers, batches of 32 real sentences of at most 32 tokens, one CPU thread. Runs
without and with a recorder take turns; ``overhead`` is the ratio of their median step times minus 1. Every 50 steps the
recorder also evaluates the loss without and with the perturbation, and that is in it.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import PrinterCallback, TrainerCallback, TrainingArguments
from transformers.utils import logging

from bilora import METHODS, BiLoraTrainer, build_method
from bilora.tasks import LoraSpec, TaskSpec, add_lora, load_model, load_task, load_tokenizer
from bilora.training import Recorder
from bilora.training.run import DEFAULTS

BATCH = 32
EVERY = 10


class Clock(TrainerCallback):
    """CPU seconds from the first step's begin to the last one's end, without loading and saving at the ends."""

    def on_train_begin(self, *args: object, **kwargs: object) -> None:
        self.began = time.process_time()

    def on_train_end(self, *args: object, **kwargs: object) -> None:
        self.seconds = time.process_time() - self.began


def seconds(method: str, steps: int, recorded: bool) -> float:
    """CPU seconds of ``steps`` steps, writing the recording included."""
    tokenizer = load_tokenizer("minilm")
    task = load_task(TaskSpec(data="rotten_tomatoes", train_examples=BATCH * 8, max_length=32), tokenizer)
    model = add_lora(load_model("minilm", task.kind, task.num_labels, 0, tokenizer=tokenizer), LoraSpec(), task.kind, 0)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        recorder = [Recorder(Path(folder) / "run", every=EVERY)] if recorded else []
        arguments = TrainingArguments(
            **DEFAULTS
            | {
                "output_dir": folder,
                "max_steps": steps,
                "per_device_train_batch_size": BATCH,
                "use_cpu": True,
                "save_strategy": "no",
                "logging_strategy": "no",
                "disable_tqdm": True,
                "dataloader_pin_memory": False,
            }
        )
        trainer = BiLoraTrainer(
            model=model,
            method=build_method(method),
            args=arguments,
            callbacks=[*recorder, clock],
            **task.trainer_arguments(),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return clock.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="lora,lora_sam,flat_lora,bilora", help="comma-separated")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    for name in options.methods.split(","):
        if name not in METHODS:
            parser.error(f"unknown method {name}")
        times: dict[bool, list[float]] = {False: [], True: []}
        for number in range(options.rounds):
            for recorded in (False, True) if number % 2 == 0 else (True, False):
                print(name, number, recorded, file=sys.stderr, flush=True)
                times[recorded].append(seconds(name, options.steps, recorded) / options.steps)
        plain, with_recorder = (statistics.median(times[recorded]) for recorded in (False, True))
        line = {
            "method": name,
            "every": EVERY,
            "steps": options.steps,
            "step_seconds": round(plain, 4),
            "recorded_step_seconds": round(with_recorder, 4),
            "overhead": round(with_recorder / plain - 1, 4),
            "spread": round(max(times[False]) / min(times[False]) - 1, 4),
            "torch": torch.__version__,
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
