"""The house: five lessons and nothing else at the top, imports one way, nothing printed, nothing loaded twice."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LESSONS = {
    "kernels": "01_kernels",
    "linear_attention": "02_linear_attention",
    "model": "03_model",
    "train_mqar": "04_train_mqar",
    "train_pile": "05_train_pile",
}
LESSON_FILES = [ROOT / f"{name}.py" for name in LESSONS.values()]
REBASED = sorted((ROOT / "rebased").glob("*.py"))
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.py"))


def imports_of(path):
    """What a file imports from this repository: {"rebased.files", "01_kernels", "experiments.mqar", ...}."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "rebased":
            found |= {LESSONS.get(alias.name, f"rebased.{alias.name}") for alias in node.names if alias.name != "EPS"}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} if node.module.startswith(("rebased.", "experiments")) else set()
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith(("rebased", "experiments"))}
        elif isinstance(node, ast.Constant) and node.value in LESSONS.values():
            found.add(node.value)  # import_module("01_kernels")
    return found


def test_five_lessons_and_nothing_else_at_the_top():
    assert [path.name for path in sorted(ROOT.glob("*.py"))] == [path.name for path in LESSON_FILES]


@pytest.mark.parametrize("path", REBASED, ids=lambda path: path.name)
def test_rebased_imports_no_lesson(path):
    found = imports_of(path) - (set(LESSONS.values()) if path.name == "__init__.py" else set())  # which names them
    assert not [name for name in found if not name.startswith("rebased.")]


def test_rebased_has_no_circle():
    """Take away whatever imports nothing that is left, until nothing is left."""
    left = {f"rebased.{path.stem}": imports_of(path) for path in REBASED if path.name != "__init__.py"}
    while left:
        free = [name for name, needs in left.items() if not needs & left.keys()]
        assert free, f"in a circle: {', '.join(left)}"
        for name in free:
            del left[name]


@pytest.mark.parametrize("path", LESSON_FILES, ids=lambda path: path.name)
def test_a_lesson_imports_only_lessons_before_it(path):
    for name in imports_of(path):
        before = name in LESSONS.values() and name < path.stem
        own = path.stem in ("04_train_mqar", "05_train_pile") and name == path.stem  # so that workers can import it
        assert name.startswith("rebased.") or before or own, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", LESSON_FILES, ids=lambda path: path.name)
def test_a_lesson_tells_what_it_is(path):
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    for part in ("Aim", "You will learn", "Letters", "References", "Run"):
        assert part in docstring, f"{path.name}: no {part!r} in the docstring"


@pytest.mark.parametrize("path", LESSON_FILES, ids=lambda path: path.name)
def test_a_lesson_fits_a_projector(path):
    """No line over 100 columns, no function over 30 lines."""
    text = path.read_text(encoding="utf-8")
    body = text.split('"""', 2)[2]  # the docstring may be as wide as its equations
    wide = [line for line in body.splitlines() if len(line) > 100]
    assert not wide, wide[0]
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    long = [node.name for node in functions if node.end_lineno - node.lineno + 1 > 30]
    assert not long, long


PYTHON = [path for path in sorted(ROOT.rglob("*.py")) if not {"runs", ".venv", "venv"} & set(path.parts)]


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_text_file_is_opened_with_its_encoding(path):
    """Else the same file is another text on Windows, or under LC_ALL=C. Bytes have none."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            assert not lacks_encoding(node), f"{path.name}, line {node.lineno}: name encoding=\"utf-8\""


def lacks_encoding(call):
    """Whether this call opens text and does not say how it is written."""
    name = getattr(call.func, "attr", getattr(call.func, "id", None))
    texts = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
    if name == "open":
        keywords = [keyword.value.value for keyword in call.keywords if keyword.arg == "mode"]
        opens = not any(isinstance(text, str) and "b" in text and len(text) < 4 for text in texts + keywords)
        # image.open, gzip.open, webbrowser.open: other functions of that name
        opens = opens and not (isinstance(call.func, ast.Attribute) and getattr(call.func.value, "id", "") in OTHERS)
    else:
        opens = name in ("read_text", "write_text")
    return opens and "encoding" not in {keyword.arg for keyword in call.keywords}


OTHERS = ("image", "Image", "gzip", "webbrowser", "os", "tarfile", "zipfile", "wave")


def test_the_test_itself_sees_a_missing_encoding():
    calls = ["open(path)", "open(path, 'w')", "path.open()", "path.read_text()", "path.write_text(text)"]
    fine = ["open(path, 'rb')", "path.open('ab')", "open(path, encoding='utf-8')", "path.write_bytes(data)"]
    found = [lacks_encoding(ast.parse(text).body[0].value) for text in calls + fine]
    assert found == [True] * 5 + [False] * 4


def test_the_test_itself_sees_a_wrong_import(tmp_path):
    file = tmp_path / "01_kernels.py"
    file.write_text("from rebased import lesson, model\nfrom experiments.mqar import main\nimport rebased.files\n",
                    encoding="utf-8")
    assert imports_of(file) == {"rebased.lesson", "03_model", "experiments.mqar", "rebased.files"}


def run(code_or_arguments, cwd):
    """A Python process that finds the repository: (exit status, what it printed)."""
    arguments = ["-c", code_or_arguments] if isinstance(code_or_arguments, str) else code_or_arguments
    done = subprocess.run([sys.executable, "-B", *arguments], cwd=cwd, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def test_importing_prints_nothing_and_writes_nothing(tmp_path):
    """Everything in one process: to start PyTorch for each file would take most of the time of these tests."""
    skip = set() if importlib.util.find_spec("triton") else {"triton_kernels", "benchmark_gpu"}
    names = [f"rebased.{path.stem}" for path in REBASED if path.stem not in skip | {"__init__"}]
    names += [f"experiments.{path.stem}" for path in EXPERIMENTS if path.stem not in skip | {"__init__"}]
    code = f"""
import importlib, sys
sys.path.insert(0, {str(ROOT)!r})
from rebased import kernels, linear_attention, model, train_mqar, train_pile
for name in {names}:
    importlib.import_module(name)
files = [getattr(module, "__file__", None) or "" for module in sys.modules.values()]
loaded = [file for file in files if file.startswith({str(ROOT)!r})]
assert len(loaded) == len(set(loaded)), "loaded twice"
"""
    assert run(code, tmp_path) == (0, "")
    assert not list(tmp_path.iterdir())


def test_a_lesson_that_runs_is_not_loaded_again(tmp_path):
    """In a copy of the house whose first lesson asks for itself."""
    (tmp_path / "rebased").mkdir()
    (tmp_path / "rebased" / "__init__.py").write_bytes((ROOT / "rebased" / "__init__.py").read_bytes())
    lesson = "import sys\nfrom rebased import kernels\nprint(kernels is sys.modules['__main__'])\n"
    (tmp_path / "01_kernels.py").write_text(lesson, encoding="utf-8")
    assert run(["01_kernels.py"], tmp_path) == (0, "True\n")


def test_plain_names_work_from_a_script_and_under_m(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom rebased import kernels, linear_attention, model\n"
        "print(kernels.__name__, linear_attention.__name__, model.__name__)\n",
        encoding="utf-8",
    )
    assert run([str(script)], tmp_path) == (0, "01_kernels 02_linear_attention 03_model\n")
    code = "from rebased import kernels; import sys; print(sys.modules['01_kernels'] is kernels)"
    assert run(["-c", code], ROOT) == (0, "True\n")


def test_an_unknown_name_is_answered_with_those_that_exist():
    code = "from rebased import kernel"
    status, text = run(code, ROOT)
    assert status == 1 and "cannot import name 'kernel'" in text
    code = "import rebased; rebased.kernel"
    assert "the lessons are kernels, linear_attention" in run(code, ROOT)[1]


# What Windows has not got, as far as the libraries here can do without it
AS_ON_WINDOWS = """
import os, signal, sys
for name in ("fcntl", "resource"):
    sys.modules[name] = None
for name in ("fork", "killpg", "setsid", "getpgid", "sched_getaffinity", "mkfifo"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGKILL", "SIGHUP", "SIGUSR1", "SIGALRM"):
    if hasattr(signal, name):
        delattr(signal, name)
"""


def collect(folder, *files):
    """Collect the tests in these files (all of them) without those names: (exit status, what was printed)."""
    (folder / "as_on_windows.py").write_text(AS_ON_WINDOWS, encoding="utf-8")
    start = f"import sys, pytest; sys.path.insert(0, {str(folder)!r}); sys.exit(pytest.main(sys.argv[1:]))"
    plain = ["-p", "as_on_windows", "-p", "no:cacheprovider", "--collect-only", "-q", "-m", "slow or not slow"]
    return run(["-c", start, *plain, *map(str, files)], ROOT)


@pytest.mark.slow
def test_every_test_is_collected_where_unix_is_missing(tmp_path):
    """One import at the top of one file would cost the whole suite on Windows. Tests that need it skip themselves."""
    status, text = collect(tmp_path)
    assert status == 0, text[-2000:]
    assert "test_kills.py::test_training" in text and "test_files.py" in text


def test_the_test_itself_sees_what_windows_has_not_got(tmp_path):
    lines = ["import resource", "import fcntl", "import signal; x = signal.SIGKILL", "from os import fork", "x = 1"]
    files = [tmp_path / f"test_{i}.py" for i in range(len(lines))]
    for file, line in zip(files, lines, strict=True):
        file.write_text(f"{line}\n\n\ndef test():\n    pass\n", encoding="utf-8")
    status, text = collect(tmp_path, *files)
    wrong = {Path(line.split()[1]).name for line in text.splitlines() if line.startswith("ERROR ")}
    assert status == 2 and wrong == {file.name for file in files[:4]}, text
