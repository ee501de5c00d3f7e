"""The notebook under examples/, run from the top as a reader would."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "examples" / "interference.ipynb"
FIGURE = "application/vnd.plotly.v1+json"


def test_the_notebook_is_kept_without_outputs():
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None


@pytest.mark.slow
def test_the_notebook_runs_from_the_top(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    figures = [o.data[FIGURE] for o in outputs if FIGURE in o.get("data", {})]
    assert len(figures) == 6
    assert all(figure["data"] for figure in figures)
    said = "".join(o.text for o in outputs if o.get("name") == "stdout")
    assert "36 rows" in said  # two arms, three tasks, alone and at five weights
    assert "predicted shift" in said
    assert (tmp_path / "runs/notebook/merged/adapter_model.safetensors").is_file()
