"""``bilora landscape``: the loss between adapters, and along a training."""

from pathlib import Path
from typing import Annotated, Any

import typer

from bilora.cli import options
from bilora.cli.console import console_for_tables
from bilora.cli.measuring_bar import MeasuringBar
from bilora.cli.processes import from_main, is_main_process, join_processes
from bilora.cli.quiet import silence_libraries
from bilora.errors import UserError


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command("landscape")(landscape)


def landscape(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="KIND",
            help="adapters: the plane through three or more. trajectory: the plane a training moved in, from its "
            "checkpoints. connect: the straight lines between all pairs.",
        ),
    ],
    folders: Annotated[
        list[Path], typer.Argument(metavar="ADAPTER...", help="Folders of PEFT adapters of one base model.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Parquet file for the rows; its JSON goes beside it.")],
    model: Annotated[
        str | None,
        typer.Option("--model", help="The base model, as in `bilora train`.", show_default="what the adapters name"),
    ] = None,
    space: Annotated[str, typer.Option("--space", help="full, lora, lora_balanced or all.")] = "full",
    data: options.DataOption = "rotten_tomatoes",
    task_kind: options.KindOption = "classification",
    text_column: options.TextColumnOption = "text",
    label_column: options.LabelColumnOption = "label",
    train_examples: options.TrainExamplesOption = None,
    validation_examples: options.ValidationExamplesOption = None,
    max_length: options.MaxLengthOption = 128,
    split_seed: options.SplitSeedOption = 0,
    split: Annotated[str, typer.Option("--split", help="validation or train.")] = "validation",
    examples: Annotated[
        int | None, typer.Option("--examples", help="Examples to measure on.", show_default="all")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Examples a forward pass.")] = 32,
    points: Annotated[int, typer.Option("--points", help="Points along a side, or on a line.")] = 21,
    error: Annotated[
        float | None,
        typer.Option(
            "--error",
            help="Of interpolated losses of a plane, over their range; 0 evaluates every point.",
            show_default="0.02",
        ),
    ] = None,
    precision: Annotated[
        str, typer.Option("--precision", help="full, or bfloat16 for the forward passes on a plane.")
    ] = "full",
    workers: Annotated[int, typer.Option("--workers", help="Processes.")] = 1,
    force: Annotated[bool, typer.Option("--force", help="Replace an output that holds something else.")] = False,
    verbose: options.VerboseOption = False,
) -> None:
    """The loss on a plane or line through trained adapters. Killed, it continues; draw it with `bilora plot`."""
    if output.suffix != ".parquet":
        raise UserError(f"--output {output} is no .parquet file: name it so")
    if not verbose:
        silence_libraries()
    from pydantic import ValidationError

    from analysis.study.files import read_measured, write_measured
    from analysis.study.landscapes import (
        LandscapeSpec,
        find_adapters,
        landscape_determinants,
        landscape_rows,
        point_stores,
    )
    from analysis.study.several import named
    from analysis.study.spec import describe
    from analysis.study.table import rows_table
    from bilora.tasks import TaskSpec

    task = TaskSpec.model_validate(
        {
            "data": data,
            "kind": task_kind,
            "text_column": text_column,
            "label_column": label_column,
            "train_examples": train_examples,
            "validation_examples": validation_examples,
            "max_length": max_length,
            "seed": split_seed,
        }
    )
    given: dict[str, Any] = {
        "kind": kind,
        "space": space,
        "split": split,
        "examples": examples,
        "batch_size": batch_size,
        "points": points,
        "precision": precision,
        "workers": workers,
    }
    if error is not None:
        given["error"] = error or None
    try:
        spec = LandscapeSpec.model_validate(given)
    except ValidationError as failure:
        raise UserError(f"landscape {describe(failure, LandscapeSpec)}") from failure
    spec.check_count(len(folders))
    subjects = find_adapters(folders, model, spec.kind)
    for subject in subjects:
        if output.resolve().parent == subject.folder.resolve():
            raise UserError(f"--output {output} lies among the files that are measured: choose a place outside")
    made_of = landscape_determinants(subjects, task, spec)
    join_processes()
    frame = from_main(lambda: read_measured(output, made_of, force=force))
    if frame is None:
        stores = point_stores(output, spec, len(subjects))
        with MeasuringBar() as bar:
            frame = landscape_rows(subjects, task, spec, stores, bar.watch(kind) if is_main_process() else None)
        if is_main_process():
            write_measured(output, frame, made_of, named(folders) if len(folders) == 1 else [])
            for store in stores:
                store.remove()
    if is_main_process():
        console = console_for_tables()
        console.print(rows_table(frame))
        console.print(f"rows in {output}", markup=False, highlight=False, soft_wrap=True)
