"""Redraw the README's figures and table from the rows of the demo study: ``python figures/make.py``.

Reads ``runs/demo/results.parquet`` (made by ``make demo``) and writes into this folder one small PNG per figure with
its rows as CSV and Parquet and a JSON of what made it, and ``table.md``, which also goes into the README. Nothing is
measured here.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd

from analysis.plots import FIGURES, NothingToDraw
from analysis.plots.save import frame_hash, save_figure
from analysis.study.origin import origins
from analysis.study.store import write_text
from analysis.study.table import markdown_table
from bilora.errors import UserError

HERE = Path(__file__).parent
TABLE = "table.md"
BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"
SHOWN = ("landscape", "random_induced", "adversarial", "eigenvalues", "overlap", "outside_share")


def make(results: Path, folder: Path) -> list[Path]:
    """Draw the figures of :data:`SHOWN` from ``results`` into ``folder``; returns the files written.

    Raises:
        UserError: ``results`` does not exist, or holds none of the figures' rows.
    """
    if not results.is_file():
        raise UserError(f"{results} does not exist: run `make demo` first")
    frame = pd.read_parquet(results)
    made_by = {
        "command": "python figures/make.py",
        "study": sorted(frame["study"].unique().tolist()),
        "rows": len(frame),
        "rows_sha256": frame_hash(frame),
        "data": origins([results]),
    }
    written: list[Path] = []
    for family in FIGURES:
        if family.name not in SHOWN:
            continue
        try:
            table = family.table(frame)
        except NothingToDraw as nothing:
            print(f"left out: {family.name} ({nothing})", file=sys.stderr)
            continue
        about = {**family.about(frame), **made_by}
        written += save_figure(family.draw(frame), family.name, folder, table, about, formats=("png",))
    if not written:
        raise UserError(f"{results} holds no rows of any figure: run `make demo` again")
    table = folder / TABLE
    write_text(table, markdown_table(frame, str(frame["method"].iloc[0])))
    return [*written, table]


def fill_readme(readme: Path, table: str) -> None:
    """Put ``table`` between the marks that the README keeps for it."""
    before, rest = readme.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    write_text(readme, f"{before}{BEGIN}\n{table}{END}{after}")


def main() -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(description="Redraw the README's figures from a finished study.")
    parser.add_argument("results", nargs="?", type=Path, default=HERE.parent / "runs" / "demo" / "results.parquet")
    parser.add_argument("--folder", type=Path, default=HERE, help="where the figures go (default: beside this script)")
    given = parser.parse_args()
    try:
        for path in make(given.results, given.folder):
            print(path)
        if given.folder == HERE:
            fill_readme(HERE.parent / "README.md", (HERE / TABLE).read_text(encoding="utf-8"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
