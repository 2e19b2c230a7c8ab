"""Runs twelve short cells in the folder named on the command line; killed from outside."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from study_work import Note

from analysis.study.engine import run_cells
from analysis.study.plan import Cell
from analysis.study.progress import Silent
from analysis.study.store import Store


def cells(folder: Path) -> list[Cell]:
    """Four trainings with two measurements each."""
    made = []
    for i in range(4):
        training = Cell("training", f"train {i}", {"id": i}, Note(folder / "log", f"train {i}", seconds=0.15))
        made.append(training)
        for j in range(2):
            note = Note(folder / "log", f"measure {i} {j}", seconds=0.15)
            made.append(Cell("measure", f"measure {i} {j}", {"id": (i, j)}, note, training=training))
    return made


if __name__ == "__main__":
    here = Path(sys.argv[1])
    run_cells(cells(here), Store(here / "cells"), workers=2, progress=Silent())
