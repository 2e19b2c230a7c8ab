"""``bilora train``: one training run."""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bilora.cli import options
from bilora.cli.options import parse_assignments
from bilora.cli.processes import is_main_process
from bilora.cli.quiet import silence_libraries

if TYPE_CHECKING:
    from bilora.training.record import TrainRecord


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command("train")(train)


def train(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the adapter and train.json.")],
    model: options.ModelOption = "minilm",
    data: options.DataOption = "rotten_tomatoes",
    kind: options.KindOption = "classification",
    text_column: options.TextColumnOption = "text",
    label_column: options.LabelColumnOption = "label",
    train_examples: options.TrainExamplesOption = None,
    validation_examples: options.ValidationExamplesOption = None,
    max_length: options.MaxLengthOption = 128,
    split_seed: options.SplitSeedOption = 0,
    method: Annotated[
        str, typer.Option("--method", help="Training method, see `bilora methods`, or path/to/file.py:Class.")
    ] = "bilora",
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A setting of the method. Repeatable.")
    ] = None,
    training: Annotated[
        list[str] | None,
        typer.Option("--train", metavar="NAME=VALUE", help="One of transformers.TrainingArguments. Repeatable."),
    ] = None,
    rank: Annotated[int, typer.Option("--rank", help="LoRA rank.")] = 8,
    alpha: Annotated[float, typer.Option("--alpha", help="LoRA alpha: the update is scaled by alpha/rank.")] = 16,
    dropout: Annotated[float, typer.Option("--dropout", help="LoRA dropout.")] = 0.0,
    target_modules: Annotated[
        list[str] | None,
        typer.Option("--target-modules", help="Layer to adapt. Repeatable.", show_default="all-linear"),
    ] = None,
    rslora: Annotated[bool, typer.Option("--rslora", help="Scale by alpha/√rank.")] = False,
    dora: Annotated[bool, typer.Option("--dora", help="Train the norms of the weight's rows apart (DoRA).")] = False,
    init: Annotated[
        str,
        typer.Option("--init", help="Where the factors start: default, gaussian, orthogonal, pissa, olora or lora_ga."),
    ] = "default",
    loraplus_lr_ratio: Annotated[
        float | None,
        typer.Option("--loraplus-lr-ratio", help="LoRA+: learning rate of B over that of A.", show_default="the same"),
    ] = None,
    record: Annotated[
        int | None,
        typer.Option("--record", metavar="N", help="Record factors and perturbations every N steps."),
    ] = None,
    seed: options.SeedOption = 0,
    quiet: options.QuietOption = False,
    verbose: options.VerboseOption = False,
) -> None:
    """Train an adapter. An interrupted run continues when the same command is given again."""
    assigned = {
        "settings": parse_assignments(settings, "--set"),
        "training": parse_assignments(training, "--train"),
    }
    if not verbose:
        silence_libraries()
    from bilora.cli.progress import TrainingBar
    from bilora.training.run import train_run
    from bilora.training.spec import TrainSpec

    lora: dict[str, Any] = {
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": rslora,
        "use_dora": dora,
        "init_lora_weights": init,
        "loraplus_lr_ratio": loraplus_lr_ratio,
    }
    if target_modules:
        lora["target_modules"] = target_modules[0] if len(target_modules) == 1 else target_modules
    task = {
        "data": data,
        "kind": kind,
        "text_column": text_column,
        "label_column": label_column,
        "train_examples": train_examples,
        "validation_examples": validation_examples,
        "max_length": max_length,
        "seed": split_seed,
    }
    spec = TrainSpec.model_validate(
        {"model": model, "task": task, "lora": lora, "method": method, "seed": seed, **assigned}
    )
    with nullcontext() if quiet else TrainingBar() as bar:
        finished = train_run(spec, output, progress=False, callbacks=() if bar is None else (bar,), record_every=record)
    if is_main_process() and not quiet:
        _show(finished, spec.method)


def _show(record: "TrainRecord", method: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{method}: {record.steps} steps in {record.seconds:.0f} s")
    table.add_column("")
    for name in record.validation:
        table.add_column(name, justify="right")
    for split, values in (("train", record.train), ("validation", record.validation)):
        table.add_row(split, *(f"{values[name]:.4f}" for name in record.validation))
    console = Console()
    console.print(table)
    console.print(f"saved in {record.output}", soft_wrap=True)
