"""Every notebook runs from top to bottom in a fresh kernel, offline."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from analysis import plots

FOLDER = Path(__file__).parents[1] / "notebooks"
PLOTS = [name for name in plots.__all__ if name.islower() and not name.startswith(("write_", "draw_"))]
FIGURES = {"image/png", "application/vnd.plotly.v1+json", "text/html"}


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda p: p.stem)
def test_notebook_runs(path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(FOLDER)}}).execute()
    drawing = [cell for cell in notebook.cells if cell.cell_type == "code" and draws(cell.source)]
    assert drawing
    for cell in drawing:
        kinds = {kind for output in cell.outputs for kind in output.get("data", {})}
        assert kinds & FIGURES, f"no figure is shown by:\n{cell.source}"


def draws(source):
    """Whether a cell's last line is a figure: a call of :mod:`analysis.plots`, or the name of one."""
    last = source.rstrip().splitlines()[-1]
    return last == "figure" or any(last.startswith(f"{name}(") for name in PLOTS)
