"""The lessons as executed notebooks: prose in Markdown cells, each section's output in its own cell, figures inline.

Needs jupytext, nbconvert and ipykernel (pip install jupytext nbconvert ipykernel); skipped without them.
"""

import sys
from pathlib import Path

import pytest

jupytext = pytest.importorskip("jupytext")
nbformat = pytest.importorskip("nbformat")
preprocessors = pytest.importorskip("nbconvert.preprocessors")
pytest.importorskip("ipykernel")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
SMALL = {  # the command line of a small run, as `%run` would give it
    "01_kernels": [],
    "02_linear_attention": [],
    "03_model": [],
    "04_train_mqar": ["--seeds", "0", "--steps", "20", "--workers", "2", "--output", "{tmp}/rows.jsonl"],
    "05_train_pile": ["--set", "steps=3", "eval_tokens=5000", "--out", "{tmp}/pile"],
}


def executed(name, tmp_path):
    """The notebook of a lesson, run in a fresh kernel at the repository's root, as JSON cells."""
    notebook = jupytext.read(ROOT / f"{name}.py")
    arguments = [f"{name}.py", *(part.format(tmp=tmp_path) for part in SMALL[name])]
    command_line = f"import sys\nsys.argv = {arguments!r}" if SMALL[name] else "import sys"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(command_line))
    client = preprocessors.ExecutePreprocessor(timeout=600, kernel_name="python3")
    client.preprocess(notebook, {"metadata": {"path": str(ROOT)}})
    return notebook.cells[1:]


def printed(cell):
    return "".join(output.get("text", "") for output in cell.get("outputs", []) if output.output_type == "stream")


@pytest.mark.parametrize("name", SMALL)
def test_a_lesson_reads_as_a_notebook(name, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    cells = executed(name, tmp_path)
    markdown = [cell.source for cell in cells if cell.cell_type == "markdown"]
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert sum(source.startswith("## ") for source in markdown) >= 5, "headings in Markdown cells"
    assert sum(len(source.split()) for source in markdown) > 400, "prose in Markdown cells"
    assert not [cell for cell in cells if cell.metadata.get("title")], "a heading lost in a cell's metadata"
    shown = [cell for cell in code if 'if __name__ == "__main__":' in cell.source]
    assert len(shown) >= 5
    talking = [cell for cell in shown if cell.outputs]
    assert len(talking) >= 0.7 * len(shown), "sections print their output in their own cell"
    images = [output for cell in code for output in cell.outputs if "image/png" in output.get("data", {})]
    assert name == "03_model" or images, "the figure is inline"
    assert "checks: " in printed(code[-1]) and ", 0 failed" in printed(code[-1])


def test_run_heeds_its_arguments(tmp_path):
    """`%run 04_train_mqar.py --help` in a notebook prints the help, not the whole experiment."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("%run 04_train_mqar.py --help")])
    client = preprocessors.ExecutePreprocessor(timeout=120, kernel_name="python3", allow_errors=True)
    client.preprocess(notebook, {"metadata": {"path": str(ROOT)}})
    assert "usage" in printed(notebook.cells[0]) and sys.version
