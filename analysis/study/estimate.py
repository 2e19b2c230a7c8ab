"""What a study will take: a few steps of one training and a few seconds of every measurement, scaled up.

The first method with an adapter is trained for three steps in a temporary folder, and each measurement is begun on that
adapter. One that tells its progress is stopped after a while and its time taken as time·most/done, an upper end where
it may settle before (eigenvalues); the others run to their end. A step of another method is taken to cost its
``passes`` times as much. Everything is measured in one process with one thread, as in a study's workers; of several
workers each is taken to be as fast as one alone.
"""

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from analysis.core.memory import peak_memory
from analysis.study.plan import Cell, Plan, train_spec
from analysis.study.spec import StudySpec
from analysis.study.work import Measuring, Training, task_for
from bilora.methods import method_class
from bilora.training.run import DEFAULTS, train_run
from bilora.training.spec import TrainSpec

STEPS = 3
SECONDS = 4.0
"""After which a measurement that tells its progress is stopped."""


@dataclass(frozen=True)
class Estimate:
    """Seconds of one cell, by what it does, and the memory of a worker.

    Attributes:
        training: name of the cell → seconds.
        measuring: (number of the entry in the study file, space) → seconds.
        memory: peak resident set of the process that tried it all, in bytes.
    """

    training: dict[str, float]
    measuring: dict[tuple[int, str], float]
    memory: int

    def seconds(self, spec: StudySpec, cell: Cell) -> float:
        """Of one cell of ``spec``."""
        if isinstance(cell.compute, Measuring):
            return self.measuring[spec.measures.index(cell.compute.entry), cell.compute.space]
        return self.training[cell.name]


class _Enough(Exception):
    """A measurement has run long enough to be judged."""


def estimate_study(spec: StudySpec, plan: Plan, told: Callable[[str], None] = lambda words: None) -> Estimate:
    """Time and memory of the cells of ``spec``.

    Args:
        spec: the study.
        plan: its cells.
        told: called with what is tried now.

    Raises:
        UserError: bad input, as the study itself would meet.
    """
    # A model without an adapter has fewer spaces to measure in.
    adapted = (label for label, entry in spec.methods.items() if method_class(entry.method).needs_lora)
    first = next(adapted, next(iter(spec.methods)))
    with tempfile.TemporaryDirectory() as folder, _one_thread():
        run = Path(folder) / "run"
        told(f"{first}: {STEPS} steps")
        begun = time.monotonic()
        short = train_spec(spec, first, spec.seeds[0])
        short = short.model_copy(
            update={"training": {**short.training, "max_steps": STEPS, "warmup_steps": 0, "save_strategy": "no"}}
        )
        record = train_run(short, run, progress=False, record_every=1 if spec.record else None)
        around = time.monotonic() - begun - record.seconds
        each = record.seconds / STEPS / method_class(short.method).passes
        examples = len(task_for(spec.task, spec.model).train)
        training = {
            cell.name: around
            + each * steps_of(cell.compute.spec, examples) * method_class(cell.compute.spec.method).passes
            for cell in plan.cells
            if isinstance(cell.compute, Training)
        }
        measuring = {}
        for (entry, space), cell in _measurements(spec, plan, first).items():
            told(cell.entry.measure + (f", {space} space" if space else ""))
            measuring[entry, space] = _seconds(replace(cell, spec=short), run)
    return Estimate(training, measuring, peak_memory())


@contextmanager
def _one_thread() -> Iterator[None]:
    """As in a worker."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def steps_of(spec: TrainSpec, examples: int) -> int:
    """Optimizer steps of a training in one process, as the Trainer counts them."""
    arguments = {**DEFAULTS, **spec.training}
    if arguments.get("max_steps", -1) > 0:
        return int(arguments["max_steps"])
    batches = math.ceil(examples / arguments["per_device_train_batch_size"])
    an_epoch = math.ceil(batches / arguments.get("gradient_accumulation_steps", 1))
    return math.ceil(arguments["num_train_epochs"] * an_epoch)


def _measurements(spec: StudySpec, plan: Plan, label: str) -> dict[tuple[int, str], Measuring]:
    """The measurements of one method's first seed, by their place in the study file and space."""
    found = {}
    for placement in plan.placements:
        compute = placement.cell.compute
        if placement.method == label and placement.seed == spec.seeds[0] and isinstance(compute, Measuring):
            found[spec.measures.index(compute.entry), compute.space] = compute
    return found


def _seconds(measuring: Measuring, run: Path) -> float:
    begun = time.monotonic()
    share = 1.0

    def watch(done: int, most: int, note: str) -> None:
        nonlocal share
        if done and time.monotonic() - begun > SECONDS:
            share = done / max(most, done)
            raise _Enough

    with suppress(_Enough):
        measuring.measured(run, watch=watch)
    return (time.monotonic() - begun) / share


def described(seconds: float) -> str:
    """A time in words of two figures: ``40 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 9.5 else f"{seconds:.1f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
