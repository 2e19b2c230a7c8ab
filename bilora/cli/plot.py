"""``bilora plot``: the figures of measured rows, redrawn without the model."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bilora.cli.quiet import silence_libraries
from bilora.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

TEXTS = ("study", "method", "cell", "measure", "space", "quantity", "kind", "split", "layer", "label")
"""Columns of text; all others are numbers."""


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command("plot")(plot)


def plot(
    data: Annotated[
        list[Path],
        typer.Argument(
            metavar="DATA...",
            help="Rows of `bilora measure` (.parquet or .csv), or the folder or table of a study. Several are drawn "
            "together; rows without a method take their file's name, or the label in the JSON beside it.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the figures; those of the same name are replaced.")
    ] = Path("figures"),
    figure: Annotated[
        list[str] | None,
        typer.Option("--figure", metavar="NAME", help="One figure. Repeatable.", show_default="all that have rows"),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(help="The method that differences are taken to.", show_default="the first"),
    ] = None,
) -> None:
    """Draw every figure whose rows are there: PNG, PDF, SVG, its data and a JSON; surfaces also as HTML and VTK."""
    silence_libraries()
    from analysis.plots import draw_all
    from analysis.plots.save import frame_hash
    from analysis.study.origin import origins

    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file: name a folder")
    if (output.parent / "provenance.json").is_file() and output.name == "figures":
        raise UserError(f"--output {output} holds the figures of a study: name another folder")
    frame = read_rows(data)
    made_by = {
        "study": sorted(study for study in frame["study"].unique().tolist() if study),
        "command": " ".join(["bilora plot", *(path.name for path in data)]),
        "rows": len(frame),
        "rows_sha256": frame_hash(frame),
        "data": origins(_files(data)),
    }
    for path in draw_all(frame, output, made_by, only=figure or None, baseline=baseline):
        typer.echo(path)


def read_rows(data: list[Path]) -> "pd.DataFrame":
    """The rows in ``data``, in one table with the columns of a study.

    Args:
        data: Parquet or CSV files, or folders that hold ``results.parquet``. Files without the columns ``method`` and
            ``seed`` take the ``label`` and ``seed`` of the JSON beside them, else the file's name and 0.

    Raises:
        UserError: a file that is missing, damaged or holds something else, or the same rows twice.
    """
    import pandas as pd

    files = _files(data)
    frames = [_read(file) for file in files]
    names = _names([file for file, frame in zip(files, frames, strict=True) if "method" not in frame])
    parts = [
        frame if "method" in frame else frame.assign(method=names[file][0], seed=names[file][1])
        for file, frame in zip(files, frames, strict=True)
    ]
    every = pd.concat([part if "study" in part else part.assign(study="") for part in parts], ignore_index=True)
    _check_once(every)
    return every


def _files(data: list[Path]) -> list[Path]:
    """The tables, with that of a study for its folder."""
    return [path / "results.parquet" if path.is_dir() else path for path in data]


def _read(file: Path) -> "pd.DataFrame":
    import pandas as pd

    from analysis.core.result import DEFAULTS

    if not file.is_file():
        raise UserError(f"{file} does not exist: give the rows of `bilora measure`, or a study that has finished")
    try:
        if file.suffix == ".parquet":
            frame = pd.read_parquet(file)
        elif file.suffix == ".csv":
            frame = _from_csv(file)
        else:
            raise UserError(f"{file} is neither .parquet nor .csv: give the rows of `bilora measure` or of a study")
    except (OSError, ValueError, pd.errors.ParserError) as error:
        raise UserError(f"{file} cannot be read ({str(error).splitlines()[0]}): measure again") from error
    missing = [name for name in ("measure", "quantity", "value") if name not in frame]
    missing += [name for name in ("method", "seed") if ("method" in frame) != ("seed" in frame) and name not in frame]
    if missing:
        raise UserError(
            f"{file} lacks the columns {', '.join(missing)}: give the rows of `bilora measure` or of a study"
        )
    if frame.empty:
        raise UserError(f"{file} holds no rows: measure again")
    words = [name for name in frame if name not in TEXTS and not pd.api.types.is_numeric_dtype(frame[name])]
    if words:
        raise UserError(f"{file} holds words in the column {words[0]}: give the rows as they were written")
    return frame.assign(**{name: default for name, default in DEFAULTS.items() if name not in frame})


def _from_csv(file: Path) -> "pd.DataFrame":
    """Empty cells are NaN in columns of numbers and empty in those of text, where NA is a name like any other."""
    import pandas as pd

    numbers = [name for name in pd.read_csv(file, nrows=0).columns if name not in TEXTS]
    missing = {name: ["", "nan", "NaN"] for name in numbers}
    return pd.read_csv(file, dtype=dict.fromkeys(TEXTS, str), keep_default_na=False, na_values=missing)


def _names(files: list[Path]) -> dict[Path, tuple[str, int]]:
    """Method and seed of files without them; files of one name are told apart by their folders."""
    from analysis.study.files import read_json

    records = {file: read_json(file.with_suffix(".json")) for file in files}
    stems = Counter(file.stem for file in records)
    found = {}
    for file, record in records.items():
        own = file.stem if stems[file.stem] == 1 else f"{file.resolve().parent.name}/{file.stem}"
        label, seed = record.get("label"), record.get("seed")
        found[file] = (label if isinstance(label, str) and label else own, seed if isinstance(seed, int) else 0)
    return found


def _check_once(frame: "pd.DataFrame") -> None:
    from analysis.statistics import KEYS

    keys = ["method", "seed", *KEYS]
    repeated = frame.duplicated(keys)
    if repeated.any():
        first = frame.loc[repeated, keys].iloc[0]
        raise UserError(
            f"{first['measure']} of {first['method']}, seed {first['seed']}, is there twice: give each file once, "
            "under a name of its own"
        )
