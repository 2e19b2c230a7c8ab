"""Where the time of an optimizer step goes, for the methods that miss their bar in train_step.py, as JSON lines.

    python benchmarks/step_parts.py [--models minilm,smollm2] [--rounds 3] [--steps 4]

Each part of a step is timed where it runs, in the real Trainer, and given as a share of plain LoRA's whole step; rounds
are interleaved and the median over them is reported. What no part covers (data, optimizer, clipping) is ``other``.
"""

import argparse
import contextlib
import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from train_step import WARM_UP, now, time_of, trainer_for
from transformers import TrainerCallback
from transformers.utils import logging

from bilora.methods.rop import Rop
from bilora.training.mixin import MethodMixin
from bilora.training.replay import Replay

PARTS = {
    "lora": {"first_pass": (MethodMixin, "plain_training_step")},
    "lora_sam": {"first_pass": (MethodMixin, "plain_training_step"), "second_pass": (Replay, "replay")},
    "lora_esam": {
        "first_pass": (MethodMixin, "plain_training_step"),
        "scoring_forward": (Replay, "losses"),
        "half_batch_pass": (Replay, "replay"),
    },
    "rop": {"first_pass": (MethodMixin, "plain_training_step"), "noise": (Rop, "_noise")},
}
"""Method → part → the function that runs it. A part inside another is taken out of the outer one."""


class Stopwatch(TrainerCallback):
    """Seconds spent in each part after the warm-up, each moment counted for the innermost part alone."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = defaultdict(float)
        self._running: list[str] = []
        self._since = 0.0

    def on_step_begin(self, arguments: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == WARM_UP:
            self.seconds.clear()

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            # A replay trains its micro-batches with the function of the first pass: they belong to the replay.
            if part == "first_pass" and self._running:
                return function(*args, **kwargs)
            self._lap()
            self._running.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._lap()
                self._running.pop()

        return run

    def _lap(self) -> None:
        moment = now()
        if self._running:
            self.seconds[self._running[-1]] += moment - self._since
        self._since = moment


@contextlib.contextmanager
def watched(name: str) -> Iterator[Stopwatch]:
    watch = Stopwatch()
    with contextlib.ExitStack() as stack:
        for part, (owner, function) in PARTS[name].items():
            stack.enter_context(mock.patch.object(owner, function, watch.timed(part, getattr(owner, function))))
        yield watch


def shares(model: str, steps: int, rounds: int) -> Iterator[dict[str, Any]]:
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        trainers = {name: trainer_for(model, name, steps, f"{folder}/{name}") for name in PARTS}
        for _ in range(rounds):
            whole = 0.0
            for name, trainer in trainers.items():
                with watched(name) as watch:
                    trainer.add_callback(watch)
                    step = statistics.mean(time_of(trainer))
                    trainer.remove_callback(watch)
                parts = {part: watch.seconds[part] / steps for part in PARTS[name]}
                whole = whole or step
                for part, seconds in {**parts, "other": step - sum(parts.values()), "step": step}.items():
                    found[name, part].append(seconds / whole)
    for (name, part), values in found.items():
        rounded = [round(value, 3) for value in values]
        yield {"model": model, "method": name, "part": part, "share": statistics.median(rounded), "rounds": rounded}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="minilm,smollm2", help="comma-separated: minilm, smollm2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="timed steps a round")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    for model in options.models.split(","):
        for line in shares(model, options.steps, options.rounds):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
