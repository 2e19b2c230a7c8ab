"""Options that several commands share, and the reading of ``name=value``."""

import json
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from bilora.errors import UserError

ModelOption = Annotated[
    str, typer.Option("--model", help="minilm, smollm2, a local folder, a .gguf file, or a hub name.")
]
DataOption = Annotated[
    str,
    typer.Option("--data", help="rotten_tomatoes, a CSV/TSV/JSON/JSONL/Parquet file, or a folder with train.* in it."),
]
KindOption = Annotated[str, typer.Option("--kind", help="classification or causal_lm.")]
TextColumnOption = Annotated[str, typer.Option("--text-column", help="Column that holds the text.")]
LabelColumnOption = Annotated[str, typer.Option("--label-column", help="Column that holds the class.")]
TrainExamplesOption = Annotated[
    int | None, typer.Option("--train-examples", help="Examples to train on.", show_default="all")
]
ValidationExamplesOption = Annotated[
    int | None,
    typer.Option("--validation-examples", help="Examples held out.", show_default="the validation file, or a fifth"),
]
MaxLengthOption = Annotated[int, typer.Option("--max-length", help="Longest text in tokens; longer ones are cut.")]
SplitSeedOption = Annotated[int, typer.Option("--split-seed", help="Seed of the choice of examples.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of everything else.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Let the libraries log and warn.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar and no table.")]


def parse_assignments(assignments: Sequence[str] | None, option: str) -> dict[str, Any]:
    """``["rho=0.05", "name=x"]`` → ``{"rho": 0.05, "name": "x"}``: values are read as JSON, else as text.

    Raises:
        UserError: an item without ``=`` or without a name, or a name given twice.
    """
    values: dict[str, Any] = {}
    for item in assignments or ():
        name, equals, text = item.partition("=")
        name = name.strip()
        if not equals or not name:
            raise UserError(f"{option} {item!r} is not an assignment: write {option} name=value")
        if name in values:
            raise UserError(f"{option} {name} is given twice: give it once")
        values[name] = _value(text.strip())
    return values


def _value(text: str) -> Any:
    # Not YAML, in which 1e-3 is a text and `no`, a save_strategy, is false.
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)
