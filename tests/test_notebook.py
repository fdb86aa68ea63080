"""Notebook cells in a real kernel: short plain-text output; the notebooks of the documentation run."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
LINE = '"model=mlp", "model.widths=[4]", "data.subset=40", "epochs=2", "threads=1"'
CELLS = [
    f"from dlopt import train\nresult = train([{LINE}])\nresult",
    f'train([{LINE}], console=True).summary["status"]',
    'train(["optimzer=adamw"])',
]


@pytest.mark.slow
def test_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(each) for each in CELLS])
    kernel: Any = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, allow_errors=True, resources=kernel).execute()
    silent, shown, wrong = (cell.outputs for cell in notebook.cells)

    assert [output["output_type"] for output in silent] == ["execute_result"], silent
    [value] = silent
    text = value["data"]["text/plain"]
    assert text.startswith("<finished: epochs 2, val_loss ") and "outputs/train/" in text and len(text) < 250

    text = "".join(output["text"] for output in shown if output["output_type"] == "stream")
    assert all(output.get("name") != "stderr" for output in shown)
    assert not [character for character in text if character < " " and character != "\n"], "control characters"
    assert [line.split()[0] for line in text.splitlines() if re.match(r" +\d/2 ", line)] == ["1/2", "2/2"]
    assert max(len(line) for line in text.splitlines()) <= 110 and len(text.splitlines()) < 60

    [error] = wrong
    assert error["ename"] == "UserError"
    assert error["traceback"][0].startswith("dlopt: optimzer=adamw: unknown key; did you mean optimizer?")
    assert len(error["traceback"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(ROOT.glob("docs/tutorials/*.ipynb")), ids=lambda path: path.name)
def test_notebooks_of_the_documentation_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel"), pytest.importorskip("pandas"), pytest.importorskip("matplotlib_inline")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, as_version=4)
    written = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    kernel: Any = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=kernel).execute()  # raises the error of a cell
    found = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    assert list(map(kinds, found)) == list(map(kinds, written)), "run the notebook again and save it"
    assert any("image/svg+xml" in kinds(outputs) for outputs in found)
    assert not re.search("/(home|root|tmp|work)/", json.dumps(written))


def kinds(outputs: list[Any]) -> list[str]:
    """The most specific form of each output of a cell."""
    return [max(output.get("data", {"stream": ""}), key=lambda kind: ("svg" in kind, kind)) for output in outputs]
