"""The files can be read in order: each imports only what comes before it, and nothing runs on import."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(ROOT.glob("0*.py"))
# Looks ahead, each inside a function: `chunked_attention` of 02 calls the fast sweeps, `attention` looks for the GPU
# kernels, and main() of 02 and of the kernels calls the file that measures.
EXCEPTIONS = {
    ("02_linear_attention", "02_linear_attention_triton"),
    ("02_linear_attention", "02_linear_attention_chunked"),
    ("02_linear_attention", "02_linear_attention_cost"),
    ("02_linear_attention_triton", "02_linear_attention_triton_benchmark"),
}


def imported_files(path):
    """The numbered files that a file names in import_module("...") calls."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    names = [getattr(call.func, "id", getattr(call.func, "attr", "")) for call in calls]
    return [
        call.args[0].value
        for call, name in zip(calls, names, strict=True)
        if name == "import_module" and call.args and isinstance(call.args[0], ast.Constant)
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_step_imports_only_steps_before_it(path):
    order = [other.stem for other in FILES]
    for name in imported_files(path):
        assert name in order, f"{path.name} imports {name}, which is not a file of the tutorial"
        assert order.index(name) < order.index(path.stem) or (path.stem, name) in EXCEPTIONS, (
            f"{path.name} imports {name}"
        )


def test_the_test_itself_sees_a_wrong_import(tmp_path):
    file = tmp_path / "01_kernels.py"
    file.write_text('from importlib import import_module\nlater = import_module("03_model")\n')
    assert imported_files(file) == ["03_model"]


def test_importing_prints_nothing_and_writes_nothing(tmp_path):
    """All files in one process, in order: starting PyTorch for each would take most of the time of these tests."""
    names = [path.stem for path in FILES if "triton" not in path.stem or importlib.util.find_spec("triton")]
    code = f"import importlib, sys; sys.path.insert(0, {str(ROOT)!r}); list(map(importlib.import_module, {names}))"
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == done.stderr == "" and not list(tmp_path.iterdir()), done.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_tells_what_it_is(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    for part in ("Aim", "You will learn", "Letters", "References", "Run"):
        assert part in docstring, f"{path.name}: no {part!r} in the docstring"
