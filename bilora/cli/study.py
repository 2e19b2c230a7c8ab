"""``bilora study``: begin a study file, check it, and see how far its study is. ``bilora compare`` runs it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bilora.cli.console import console_for_tables
from bilora.cli.quiet import silence_libraries
from bilora.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from analysis.study.estimate import Estimate
    from analysis.study.plan import Plan
    from analysis.study.spec import StudySpec
    from analysis.study.status import StudyStatus
    from analysis.study.store import Store

StudyArgument = Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="The study file.")]
OutputOption = Annotated[
    Path | None, typer.Option("--output", "-o", help="Folder of the results.", show_default="runs/<name>")
]

commands = typer.Typer(
    no_args_is_help=True, help="Begin a study file, check it, see how far it is; `bilora compare` runs it."
)


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    app.add_typer(commands, name="study")


@commands.command()
def init(
    path: Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="The file to write.")] = Path("study.yaml"),
) -> None:
    """Write a commented example."""
    from importlib.resources import files

    from analysis.study.store import write_text

    if path.exists():
        raise UserError(f"{path} is there already: name another file")
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {path.parent}: make it first")
    write_text(path, files("analysis.study").joinpath("example.yaml").read_text(encoding="utf-8"))
    typer.echo(path)


@commands.command()
def schema(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A file.", show_default="standard output")
    ] = None,
) -> None:
    """Write the JSON schema of study files, by which editors complete and check them."""
    from analysis.study.schema import study_schema
    from analysis.study.store import write_text

    text = json.dumps(study_schema(), indent=1) + "\n"
    if output is None:
        typer.echo(text, nl=False)
        return
    if output.is_dir() or not output.parent.is_dir():
        raise UserError(f"--output {output} cannot be written: name a file in a folder that is there")
    write_text(output, text)
    typer.echo(output)


@commands.command()
def check(
    study: StudyArgument,
    workers: Annotated[
        int | None,
        typer.Option("--workers", "-w", help="Processes to plan for.", show_default="the cores, 1 on GPU"),
    ] = None,
    output: OutputOption = None,
    estimate: Annotated[
        bool, typer.Option(help="Try three steps and each measurement for a few seconds, to tell time and memory.")
    ] = True,
) -> None:
    """Check a study file and its inputs, and print its cells, and about how long and how much memory they take."""
    from rich.console import Console

    silence_libraries()
    from analysis.study.engine import default_workers
    from analysis.study.estimate import described, estimate_study
    from analysis.study.plan import plan_study
    from analysis.study.run import check_arguments, check_inputs
    from analysis.study.store import Store

    if workers is not None and workers < 1:
        raise UserError(f"workers is {workers}: give at least 1")
    spec = _read(study, output)
    try:
        check_arguments(spec)
        plan = plan_study(spec)
        check_inputs(spec)
    except UserError as error:
        raise UserError(f"{study}: {error}") from error
    store = Store(spec.folder / "cells")
    missing = [cell for cell in plan.cells if store.record(cell.name) is None]
    found = None
    if estimate and missing:
        with Console(stderr=True).status("") as status:
            found = estimate_study(spec, plan, lambda words: status.update(f"trying {words}"))
    console = console_for_tables()
    console.print(_plan_table(spec, plan, store, found))
    lines = [f"{len(plan.cells)} cells, {len(plan.cells) - len(missing)} of them finished; results in {spec.folder}"]
    if found is not None:
        processes = min(workers or default_workers(), len(missing))
        seconds = sum(found.seconds(spec, cell) for cell in missing)
        alone = f"at most about {described(seconds)} in one process"
        lines.append(
            f"at most about {described(seconds / processes)} in {processes} processes" if processes > 1 else alone
        )
        lines.append(f"about {found.memory / 2**30:.1f} GB of memory a process")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


@commands.command()
def status(study: StudyArgument, output: OutputOption = None) -> None:
    """Show what of a study is done, running, failed and still to do; it may run meanwhile."""
    silence_libraries()
    from analysis.study.status import study_status

    spec = _read(study, output)
    try:
        found = study_status(spec)
    except UserError as error:
        raise UserError(f"{study}: {error}") from error
    console = console_for_tables()
    console.print(_status_table(spec, found))
    lines = [f"running  {label}" for label in found.running]
    for failure in found.failures:
        lines.append(f"failed   {failure.label}: {failure.reason}")
        lines.append(f"         see {found.store.partial(failure.name) / 'error.txt'}")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _read(study: Path, output: Path | None) -> "StudySpec":
    from analysis.study.spec import read_study

    spec = read_study(study)
    return spec if output is None else spec.model_copy(update={"output": output})


def _plan_table(spec: "StudySpec", plan: "Plan", store: "Store", found: "Estimate | None") -> "Table":
    """A line a method and a line a measurement: how many cells there are, how many done, and the time of one."""
    from rich.table import Table

    from analysis.study.estimate import described

    table = Table(title=spec.name)
    for name in ("what", "cells", "finished", *(("one takes, at most",) if found else ())):
        table.add_column(name, justify="left" if name == "what" else "right")
    lines: dict[str, tuple[list[bool], float]] = {}
    for cell in plan.cells:
        seconds = found.seconds(spec, cell) if found else 0.0
        lines.setdefault(cell.title, ([], seconds))[0].append(store.record(cell.name) is not None)
    for title, (done, seconds) in lines.items():
        times = (described(seconds),) if found else ()
        table.add_row(title, str(len(done)), str(sum(done)), *times)
    return table


def _status_table(spec: "StudySpec", found: "StudyStatus") -> "Table":
    from rich.table import Table

    from analysis.study.status import STATES

    table = Table(title=spec.name)
    table.add_column("cells")
    for state in STATES:
        table.add_column(state, justify="right")
    for kind in dict.fromkeys(kind for kind, _ in found.counts):
        table.add_row(kind, *(str(found.counts[kind, state] or "") for state in STATES))
    table.add_section()
    table.add_row("all", *(str(found.total(state) or "") for state in STATES))
    return table
