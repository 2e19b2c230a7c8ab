"""A study from its file to its results."""

from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from pydantic import ValidationError

from analysis.study.engine import Failure, default_workers, run_cells
from analysis.study.plan import plan_study, train_spec
from analysis.study.progress import Progress, Silent
from analysis.study.results import Results, write_results
from analysis.study.spec import StudySpec
from analysis.study.store import Store
from bilora.errors import UserError
from bilora.tasks import load_task, load_tokenizer


@dataclass(frozen=True)
class StudyRun:
    """How a study ended.

    Attributes:
        results: table, figures and page, from the cells that are finished.
        failures: cells without a result.
        computed: number of cells computed now.
        cells: number of cells in all.
        store: where they lie; ``store.error(name)`` is the full text of a failure.
        damaged: cells that were found damaged, now or before, and moved aside.
    """

    results: Results
    failures: tuple[Failure, ...]
    computed: int
    cells: int
    store: Store
    damaged: tuple[Path, ...] = ()


def run_study(
    spec: StudySpec,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
    command: str = "",
    output: Path | None = None,
    retry_failed: bool = False,
) -> StudyRun:
    """Compute the cells of ``spec`` that are not finished, then write table, figures and page.

    Finished cells are kept for good: interrupted at any moment and started again, the study continues, and ends with
    the same table. Several processes may run one study in one folder.

    Worker processes are spawned: a script that calls this must guard it with ``if __name__ == "__main__"``.

    Args:
        spec: the study.
        workers: worker processes; default :func:`analysis.study.engine.default_workers`.
        progress: where to report; default nowhere.
        command: what the user typed, for the provenance.
        output: folder in place of the study's own.
        retry_failed: try again what failed in an earlier run.

    Raises:
        UserError: bad input, before anything is computed.
    """
    if workers is not None and workers < 1:
        raise UserError(f"workers is {workers}: give at least 1")
    if output is not None:
        spec = spec.model_copy(update={"output": output})
    if spec.folder.exists() and not spec.folder.is_dir():
        raise UserError(f"{spec.folder} is a file: choose another output folder")
    check_arguments(spec)
    plan = plan_study(spec)
    store = Store(spec.folder / "cells")
    missing = [cell for cell in plan.cells if store.record(cell.name) is None]
    if missing:
        check_inputs(spec)
    store.folder.mkdir(parents=True, exist_ok=True)
    failures = run_cells(
        plan.cells,
        store,
        workers=workers or default_workers(),
        progress=progress or Silent(),
        retry_failed=retry_failed,
    )
    with FileLock(spec.folder / ".results.lock"):
        results = write_results(spec, plan, store, failures, command)
    computed = len(missing) - len(failures)
    return StudyRun(results, tuple(failures), computed, len(plan.cells), store, store.damaged())


def check_arguments(spec: StudySpec) -> None:
    """Check every method's training arguments.

    Raises:
        UserError: one line that names the key.
    """
    for label in spec.methods:
        try:
            train_spec(spec, label, spec.seeds[0])
        except ValidationError as error:
            own = spec.methods[label].training
            problem = error.errors()[0]
            text = str(problem.get("ctx", {}).get("error", problem["msg"]))
            where = f"methods.{label}.training" if any(f"{key!r}" in text or key in text for key in own) else "training"
            raise UserError(f"{where}: {text}") from error


def check_inputs(spec: StudySpec) -> None:
    """Load the task and see whether it can give what the study asks for.

    Raises:
        UserError: unreadable data, a wrong column, too few examples.
    """
    try:
        task = load_task(spec.task, load_tokenizer(spec.model))
    except UserError as error:
        raise UserError(f"task: {error}") from error
    for i, entry in enumerate(spec.measures):
        available = len(getattr(task, entry.split))
        if entry.examples is not None and entry.examples > available:
            raise UserError(
                f"measures.{i}.examples: {entry.examples} asked for, but {entry.split} has {available}: ask for fewer"
            )
