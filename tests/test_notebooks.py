"""Every notebook runs from top to bottom in a fresh kernel, offline, and shows its figures."""

import ast
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from analysis import plots

FOLDER = Path(__file__).parents[1] / "notebooks"
PLOTS = {name for name in plots.__all__ if name.islower() and not name.startswith(("write_", "draw_"))}
FIGURES = {"image/png", "application/vnd.plotly.v1+json"}


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
        shown = [output for output in cell.outputs if FIGURES & output.get("data", {}).keys()]
        assert len(shown) == 1, f"{len(shown)} figures are shown by:\n{cell.source}"


def draws(source):
    """Whether a cell makes a figure: calls a function of :mod:`analysis.plots`."""
    calls = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return any(isinstance(function, ast.Name) and function.id in PLOTS for function in calls)
