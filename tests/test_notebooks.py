"""The notebooks run from top to bottom in a fresh kernel."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NEED_TORCH = ("02_calibrate", "03_live_vs_simulated")
NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def _runs(path: Path) -> object:
    marks = [pytest.mark.slow, *([pytest.mark.live] if path.stem in NEED_TORCH else [])]
    return pytest.param(path, marks=marks, id=path.stem)


@pytest.mark.parametrize("path", [_runs(path) for path in NOTEBOOKS])
def test_notebook_runs(path: Path) -> None:
    if path.stem in NEED_TORCH:
        pytest.importorskip("torch")
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)


def test_the_notebooks_are_there() -> None:
    names = ["01_quickstart", "02_calibrate", "03_live_vs_simulated", "04_policy_design"]
    assert [path.stem for path in NOTEBOOKS] == names
