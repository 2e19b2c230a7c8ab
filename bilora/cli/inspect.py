"""``bilora inspect``: what adapters and recorded runs say by themselves, without examples."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bilora.cli import options
from bilora.cli.console import console_for_tables
from bilora.cli.plot import plot
from bilora.cli.quiet import silence_libraries
from bilora.errors import UserError

if TYPE_CHECKING:
    import pandas as pd


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command("inspect")(inspect)


def inspect(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN_OR_ADAPTER...",
            help="Folders of runs, recorded by `bilora train --record N` or in a study, or of LoRA adapters trained "
            "anywhere. Runs may still be going on.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Parquet file for the rows; its JSON goes beside it.")
    ] = Path("inspect.parquet"),
    figures: Annotated[
        Path | None,
        typer.Option("--figures", help="Folder for the figures.", show_default="beside the rows, by their name"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="The base model, for intruder dimensions.",
            show_default="what the adapters name, if it is here",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an output that holds something else.")] = False,
    verbose: options.VerboseOption = False,
) -> None:
    """Ranks, intruder dimensions and overlaps of adapters; how recorded runs moved, and what perturbed them."""
    if output.suffix != ".parquet":
        raise UserError(f"--output {output} is no .parquet file: name it so")
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder: give folders of adapters or runs")
        if output.resolve().parent == folder.resolve():
            raise UserError(f"--output {output} lies among the files that are inspected: choose a place outside")
    if not verbose:
        silence_libraries()
    from analysis.study.files import read_json, write_measured
    from analysis.study.inspect import inspect_folders
    from analysis.study.several import named

    names = named(folders)
    places = hashlib.sha256("\n".join(str(folder.resolve()) for folder in folders).encode()).hexdigest()
    asked = {"inspected": [f"{method}, seed {seed}" for method, seed in names], "folders": places}
    # The same folders are looked at again, since a run may have gone on.
    if output.exists() and not force and read_json(output.with_suffix(".json")).get("determinants") != asked:
        raise UserError(f"{output} holds something else: name another output, or replace it with --force")
    frame, notes = inspect_folders(folders, model)
    write_measured(output, frame, asked, names)
    _show(frame, output)
    for note in notes:
        typer.echo(f"note: {note}", err=True)
    plot([output], figures if figures is not None else output.with_suffix(""))


def _show(frame: "pd.DataFrame", output: Path) -> None:
    from analysis.study.inspect_table import inspect_table

    console = console_for_tables()
    console.print(inspect_table(frame))
    console.print(f"rows in {output}", markup=False, highlight=False, soft_wrap=True)
