"""``bilora measure``: the flatness of one adapter or model, whoever trained it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bilora.cli import options
from bilora.cli.console import console_for_tables
from bilora.cli.measuring_bar import MeasuringBar
from bilora.cli.plot import plot
from bilora.cli.processes import from_main, is_main_process, join_processes
from bilora.cli.quiet import silence_libraries
from bilora.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from analysis.study.spec import MeasureEntry

DEFAULT_MEASURES = "quality,random,adversarial"


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command("measure")(measure)


def measure(
    subjects: Annotated[
        list[Path],
        typer.Argument(
            metavar="ADAPTER_OR_MODEL...",
            help="Folder of a PEFT adapter, or of a whole model. Several are measured on the same examples, and their "
            "rows told apart by method and seed.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Parquet file for the rows; its JSON goes beside it.")],
    what: Annotated[
        str | None, typer.Option("--what", help="Measures, separated by commas.", show_default=DEFAULT_MEASURES)
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            metavar="NAME",
            help="Measures and settings of a published result: figure4 or table-a6 of the Bi-LoRA paper.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="The base model, as in `bilora train`.", show_default="what the adapter names"),
    ] = None,
    space: Annotated[
        str | None,
        typer.Option(
            "--space",
            help="full, lora, lora_balanced, all, separated by commas.",
            show_default="full and lora, if it has",
        ),
    ] = None,
    data: options.DataOption = "rotten_tomatoes",
    kind: options.KindOption = "classification",
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
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="A setting of a measure, `random.radii=[0.1,0.5]`, or of all that have it, `seed=1`. Repeatable.",
        ),
    ] = None,
    se: Annotated[
        float | None,
        typer.Option("--se", help="Standard error of random sharpness, over its mean: sets the number of directions."),
    ] = None,
    figures: Annotated[
        Path | None, typer.Option("--figures", help="Folder for figures of the rows, as by `bilora plot`.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an output that holds something else.")] = False,
    verbose: options.VerboseOption = False,
) -> None:
    """Measure adapters or models. The same measurement asked for again is read from its file."""
    assigned = options.parse_assignments(settings, "--set")
    if se is not None:
        assigned["random.se"] = se
    if what is not None and preset is not None:
        raise UserError(f"--preset {preset} says what to measure: leave out --what")
    if output.suffix != ".parquet":
        raise UserError(f"--output {output} is no .parquet file: name it so")
    if not verbose:
        silence_libraries()
    from analysis.core.measure import Interrupted
    from analysis.frame import rows_frame
    from analysis.study.differences import check_free
    from analysis.study.files import read_measured, write_measured
    from analysis.study.presets import preset_named
    from analysis.study.several import determinants_of, measure_subjects, named
    from analysis.study.single import find_subject
    from analysis.study.unfinished import Unfinished
    from bilora.tasks import TaskSpec

    task = TaskSpec.model_validate(
        {
            "data": data,
            "kind": kind,
            "text_column": text_column,
            "label_column": label_column,
            "train_examples": train_examples,
            "validation_examples": validation_examples,
            "max_length": max_length,
            "seed": split_seed,
        }
    )
    common = {"split": split, "examples": examples, "batch_size": batch_size}
    published = None if preset is None else preset_named(preset)
    if published is not None:
        what, assigned = published.what, {**published.settings, **assigned}
    wanted = _listed(DEFAULT_MEASURES if what is None else what, "--what")
    entries = _entries(wanted, _listed(space, "--space") if space else [], common, assigned)
    found = [find_subject(subject, model) for subject in subjects]
    for subject in subjects:
        if output.resolve().parent == subject.resolve():
            raise UserError(
                f"--output {output} lies among the files that are measured: choose a place outside {subject}"
            )
    names = named(subjects)
    made_of = determinants_of(found, task, entries)
    several = len({method for method, _ in names}) > 1
    join_processes()

    def before() -> "tuple[pd.DataFrame | None, Unfinished]":
        finished = read_measured(output, made_of, force=force)
        if several:
            check_free(output, force=force)
        return finished, Unfinished(output, made_of)

    frame, unfinished = from_main(before)
    if not is_main_process():
        if frame is None:
            measure_subjects(found, task, entries, unfinished.reading())
        return
    if frame is None:
        try:
            with MeasuringBar() as bar:
                frame = measure_subjects(found, task, entries, unfinished, bar.watch)
        except Interrupted as interrupt:
            so_far = rows_frame(interrupt.result.rows())
            unfinished.stop(so_far)
            _show(so_far, unfinished.stopped)
            raise
        write_measured(output, frame, made_of, names)
        unfinished.clear()
    _show(frame, output)
    if several:
        _show_differences(frame, output)
    if figures is not None:
        plot([output], figures, figure=[published.figure] if published else None)


def _listed(text: str, option: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise UserError(f"{option} {text!r} is not a list of different names: separate them by single commas")
    return names


def _entries(
    names: list[str], spaces: list[str], common: dict[str, Any], assigned: dict[str, Any]
) -> "list[MeasureEntry]":
    """One entry a measure, each with the settings meant for it and the spaces it has."""
    from pydantic import ValidationError

    from analysis.registry import measure_named
    from analysis.study.spec import MeasureEntry, describe

    used: set[str] = set()
    entries = []
    for name in names:
        measure = measure_named(name)
        own = {}
        for key, value in assigned.items():
            owner, dot, setting = key.rpartition(".")
            if (dot and owner == name) or (not dot and setting in measure.settings.model_fields):
                own[setting] = value
                used.add(key)
        chosen = [space for space in spaces if space in measure.offered]
        if spaces and any(measure.offered) and not chosen:
            raise UserError(f"{name} has no space {' or '.join(spaces)}: it has {', '.join(measure.offered)}")
        try:
            entries.append(MeasureEntry(**{"measure": name, "spaces": chosen, **common, **own}))
        except ValidationError as error:
            raise UserError(f"measure {name}: {describe(error, MeasureEntry)}") from error
    for key in assigned:
        if key not in used:
            raise UserError(
                f"--set {key} is no setting of {' or '.join(names)}: see the measures' settings in the docs"
            )
    unknown = [space for space in spaces if not any(space in entry.spaces for entry in entries)]
    if unknown:
        raise UserError(
            f"--space {unknown[0]} is no space of {' or '.join(names)}: choose among full, lora, lora_balanced and all"
        )
    return entries


def _show(frame: "pd.DataFrame", output: Path) -> None:
    from analysis.study.table import rows_table

    console = console_for_tables()
    console.print(rows_table(frame))
    console.print(f"rows in {output}", markup=False, highlight=False, soft_wrap=True)


def _show_differences(frame: "pd.DataFrame", output: Path) -> None:
    from analysis.study.differences import measured_differences, write_differences
    from analysis.study.table import differences_table

    console = console_for_tables()
    differences = measured_differences(frame)
    if differences.empty:
        console.print("no differences: no two methods share a training seed", highlight=False)
        return
    console.print(differences_table(differences))
    path = write_differences(output, differences)
    console.print(f"differences in {path}", markup=False, highlight=False, soft_wrap=True)
