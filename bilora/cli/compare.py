"""``bilora compare``: a study from its file to table, figures and report."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from bilora.cli import options
from bilora.cli.console import console_for_tables
from bilora.cli.quiet import silence_libraries

if TYPE_CHECKING:
    from rich.console import Console

    from analysis.study.run import StudyRun

FAILED = 1
"""Exit code of a study with failed cells."""


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command("compare")(compare)


def compare(
    study: Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="The study file, see studies/demo.yaml.")],
    workers: Annotated[
        int | None,
        typer.Option("--workers", "-w", help="Processes, each one thread.", show_default="the cores, 1 on GPU"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the results.", show_default="runs/<name>")
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try again what failed in an earlier run.")
    ] = False,
    verbose: options.VerboseOption = False,
) -> int:
    """Train and measure methods × seeds; what is finished is kept, so that an interrupted study continues."""
    with _terminable():
        from rich.console import Console

        if not verbose:
            silence_libraries()
        from analysis.study.progress import progress_for
        from analysis.study.run import run_study
        from analysis.study.spec import read_study
        from bilora.errors import UserError

        spec = read_study(study)
        command = f"bilora compare {study.name if study.is_absolute() else study.as_posix()}"
        console = console_for_tables()
        try:
            run = run_study(
                spec,
                workers=workers,
                progress=progress_for(Console(stderr=True)),
                command=command,
                output=output,
                retry_failed=retry_failed,
            )
        except UserError as error:
            raise UserError(f"{study}: {error}") from error
    _show(run, spec.baseline_label, console)
    return FAILED if run.failures else 0


@contextmanager
def _terminable() -> Iterator[None]:
    """Let a termination signal stop the study as Ctrl-C does: workers first, then this process."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _show(run: "StudyRun", baseline: str, console: "Console") -> None:
    from analysis.study.table import result_table

    results = run.results
    if not results.frame.empty:
        present = results.frame["method"].unique().tolist()
        console.print(result_table(results.frame, baseline if baseline in present else present[0], console.width))

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    kept = run.cells - run.computed - len(run.failures)
    say(f"{run.cells} cells: {run.computed} computed, {kept} kept from before, {len(run.failures)} failed")
    if not results.frame.empty:
        say(f"table    {results.table}")
        say(f"figures  {results.figures}")
        say(f"report   {results.page}")
    for failure in run.failures:
        say(f"failed   {failure.label}: {failure.reason}")
        if run.store.error(failure.name) is not None:
            say(f"         see {run.store.partial(failure.name) / 'error.txt'}")
    for folder in run.damaged:
        say(f"damaged  {folder}: was moved aside and computed again")
    if run.failures:
        say("--retry-failed tries again what failed")
