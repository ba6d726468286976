"""The specification of rebased/lesson.py and rebased/checks.py: verdicts, figures, stopwatch, errors in one line."""

import argparse
import errno
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rebased import lesson
from rebased.checks import check_positive_integers

ROOT = Path(__file__).resolve().parent.parent


def check_that_one_is_one():
    return "a note"


def check_that_two_is_three():
    raise AssertionError("it is not")


@pytest.fixture(autouse=True)
def fresh_tally(monkeypatch):
    monkeypatch.setattr(lesson, "TALLY", {"passed": 0, "failed": 0})


def test_checks_are_counted_and_printed(capsys):
    lesson.check(check_that_one_is_one)
    lesson.finish()
    assert capsys.readouterr().out == "  ok      that one is one (a note)\nchecks: 1 passed, 0 failed\n"


def test_a_failed_check_is_the_exit_status(capsys):
    lesson.check(check_that_one_is_one)
    lesson.check(check_that_two_is_three)
    with pytest.raises(SystemExit) as stop:
        lesson.finish()
    assert stop.value.code == 1
    assert "  FAILED  that two is three: it is not\nchecks: 1 passed, 1 failed\n" in capsys.readouterr().out


def test_python_without_asserts_passes_nothing():
    code = "from rebased import lesson\ndef check_x(): assert False\nlesson.check(check_x)\nlesson.finish()"
    done = subprocess.run([sys.executable, "-O", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "run without it" in done.stdout and "checks: 0 passed, 1 failed" in done.stdout


def test_a_figure_is_written_with_its_description(tmp_path, capsys):
    image = pytest.importorskip("PIL.Image")
    figure = lesson.new_figure(4, 3)
    figure.subplots().plot([0, 1])
    path = tmp_path / "deep" / "figure.png"
    lesson.save_figure(figure, path, "a line")
    assert capsys.readouterr().out == f"figure: {path}\n"
    assert image.open(path).info["Description"] == "a line"


def test_figures_leave_the_backend_alone():
    """Not even a backend that does not exist here keeps a figure from being written."""
    code = (
        "import sys; from rebased import lesson; f = lesson.new_figure(2, 2); f.subplots()\n"
        "lesson.save_figure(f, sys.argv[1], 'x'); assert 'matplotlib.pyplot' not in sys.modules"
    )
    for backend in ("module://matplotlib_inline.backend_inline", "TkAgg", "no such backend"):
        done = subprocess.run(
            [sys.executable, "-c", code, "/dev/null/x.png"], cwd=ROOT, capture_output=True, text=True,
            env={"MPLBACKEND": backend, "PATH": ""},
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("no figure: cannot write") and done.stdout.count("\n") == 1


def test_a_notebook_keeps_its_backend_and_its_figures(tmp_path, monkeypatch):
    """Drawn, shown with its description, and nothing of what the notebook has set or opened is another."""
    matplotlib = pytest.importorskip("matplotlib")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pytest.importorskip("matplotlib_inline")
    inline = "module://matplotlib_inline.backend_inline"
    monkeypatch.setenv("MPLBACKEND", inline)
    monkeypatch.setitem(matplotlib.rcParams, "backend", inline)
    shown = []
    display = SimpleNamespace(display=shown.append, Image=lambda filename, alt: (filename, alt))
    monkeypatch.setattr(lesson, "in_notebook", lambda: True)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    opened = pyplot.get_fignums()
    figure = lesson.new_figure(2, 2)
    figure.subplots().plot([0, 1])
    lesson.save_figure(figure, tmp_path / "figure.png", "a line")
    assert shown == [(tmp_path / "figure.png", "a line")]
    assert matplotlib.get_backend() == os.environ["MPLBACKEND"] == inline and pyplot.get_fignums() == opened


def test_without_matplotlib_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert lesson.new_figure(4, 3) is None
    assert capsys.readouterr().out == "no figure: matplotlib is not installed (pip install matplotlib)\n"


def test_names_at_the_ends_of_lines_keep_apart(tmp_path):
    """Where they end, or as near as .1 of the axis allows: pushed up from below, and down from above."""
    axis = lesson.new_figure(4, 3).subplots()
    axis.set(xlim=(0, 1), ylim=(0, 2))
    ends = [("top", 1.98, "C0"), ("low", 0.4, "C1"), ("near", 0.42, "C2"), ("high", 1.96, "C3")]
    lesson.label_ends(axis, ends, gap=0.1)
    heights = {text.get_text(): text.xy[1] for text in axis.texts}
    assert heights == pytest.approx({"low": 0.2, "near": 0.3, "high": 0.9, "top": 1.0})
    assert {text.get_text(): text.get_color() for text in axis.texts}["near"] == "C2"


def test_the_median_is_that_of_the_turns_that_count(monkeypatch):
    """The first is left out: of 3, 1, 2 seconds the median is 2."""
    clock = [0.0]
    durations = iter([0.5, 3.0, 1.0, 2.0])

    def call():
        clock[0] += next(durations)

    monkeypatch.setattr(lesson, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    assert lesson.median_seconds({"a": call}, repeats=3) == {"a": 2.0}


def test_turns_are_taken():
    """Contenders alternate, the first turn is not counted."""
    order = []
    times = lesson.median_seconds({name: lambda name=name: order.append(name) for name in "ab"}, repeats=3)
    assert order == list("ab" * 4) and set(times) == {"a", "b"}


def test_a_number_knows_where_it_came_from():
    found = lesson.provenance(ROOT / "01_kernels.py", ["--x", "1"])
    assert found["command"] == "python 01_kernels.py --x 1" and found["torch"] == torch.__version__
    assert set(found) == {"command", "commit", "date", "hardware", "torch"}


def test_a_notebooks_own_cells_have_no_command_line_and_run_has_one(monkeypatch):
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    monkeypatch.setattr(sys, "argv", ["/x/ipykernel_launcher.py", "-f", "kernel.json"])
    assert lesson.parse_arguments(parser).seeds == 5
    monkeypatch.setattr(sys, "argv", ["04_train_mqar.py", "--seeds", "1"])
    assert lesson.parse_arguments(parser).seeds == 1


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", "²", ""])
def test_what_is_no_positive_integer(text):
    with pytest.raises(argparse.ArgumentTypeError, match="not a positive integer"):
        lesson.positive_integer(text)
    assert lesson.positive_integer("7") == 7


@pytest.mark.parametrize("text", ["0", "-0.1", "nan", "inf", "-inf", "1e999", "fast", ""])
def test_what_is_no_learning_rate(text):
    with pytest.raises(argparse.ArgumentTypeError, match="must be above 0, got|is not a number"):
        lesson.learning_rate(text)
    assert lesson.learning_rate("1e-3") == 0.001 and lesson.at_least(int, 3)("3") == 3


def test_a_path_that_cannot_be_written_is_named_before_the_work(tmp_path):
    with pytest.raises(argparse.ArgumentTypeError, match="choose another path"):
        lesson.writable_path("/dev/null/rows.jsonl")
    path = lesson.writable_path(str(tmp_path / "deep" / "rows.jsonl"))
    assert path.parent.is_dir() and not path.exists()


@pytest.mark.parametrize(
    "error, status, message",
    [
        (lesson.Refusal("no such mixer"), 2, "error: no such mixer\n"),
        (FileNotFoundError(2, "No such file", "x.txt"), 2, "error: cannot use x.txt: No such file\n"),
        (KeyboardInterrupt(), 130, "\nstopped; go on with --resume\n"),
    ],
)
def test_what_the_user_can_mend_is_one_line(error, status, message, capsys):
    def command():
        raise error

    with pytest.raises(SystemExit) as stop:
        lesson.obey(command, "go on with --resume")
    assert stop.value.code == status and capsys.readouterr().err == message


@pytest.mark.parametrize("value", [0, -1, 2.5, "8", True, None])
def test_sizes_are_positive_integers(value):
    with pytest.raises(ValueError, match="heads must be a positive integer"):
        check_positive_integers(dim=3, heads=value)


@pytest.mark.parametrize("name, message", [
    ("x.txt", "no figure's name"), ("x", "no figure's name"), ("folder.png", "Is a directory"),
    ("x" * 252 + ".png", "File name too long"), ("rows.png", "holds something that is no picture"),
    ("rows.jsonl/x.png", "cannot write"),
])
def test_a_figure_that_cannot_be_drawn_is_refused_before_any_work(tmp_path, name, message):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "rows.png").write_text('{"seed": 0}\n', encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text('{"seed": 0}\n', encoding="utf-8")
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        lesson.figure_path(tmp_path / name)


def test_a_figure_overwrites_figures_and_nothing_else(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "rows.png"
    for content in (None, b"\x89PNG\r\n", b""):  # an older figure, an empty file
        if content is not None:
            path.write_bytes(content)
        lesson.save_figure(lesson.new_figure(1, 1), path, "nothing")
        assert f"figure: {path}" in capsys.readouterr().out
        assert lesson.figure_path(path) == path
    path.write_text('{"seed": 0}\n', encoding="utf-8")
    lesson.save_figure(lesson.new_figure(1, 1), path, "nothing")
    assert "no figure" in capsys.readouterr().out and path.read_text(encoding="utf-8") == '{"seed": 0}\n'


@pytest.mark.parametrize("name, reason", [("x" * 250 + "_attention.png", "File name too long"), ("folder.png", "Is a"),
                                          ("rows.jsonl/x.png", ""), ("x.txt", "is not supported")])
def test_a_figure_that_cannot_be_written_is_one_line(tmp_path, name, reason, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "rows.jsonl").write_text('{"seed": 0}\n', encoding="utf-8")
    lesson.save_figure(lesson.new_figure(1, 1), tmp_path / name, "nothing")
    out = capsys.readouterr().out
    assert out.startswith("no figure: cannot write") and reason in out and out.count("\n") == 1


def test_rows_need_an_ordinary_file_and_a_disk_that_is_not_full(tmp_path, monkeypatch):
    if Path("/dev/full").exists():
        with pytest.raises(argparse.ArgumentTypeError, match="no ordinary file"):
            lesson.writable_path("/dev/full")

    def full(path, data):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(argparse.ArgumentTypeError, match="No space left on device"):
        lesson.writable_path(tmp_path / "rows.jsonl")
    assert not list(tmp_path.iterdir())


NARROW = {
    "cp1252": {"PYTHONIOENCODING": "cp1252"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


@pytest.mark.parametrize("name", NARROW)
def test_a_letter_that_cannot_be_shown_is_a_question_mark(tmp_path, name):
    """In a copy of the house, whose lesson prints letters; elsewhere the output stays as its program wants it."""
    (tmp_path / "rebased").mkdir()
    for file in ("__init__.py", "lesson.py"):
        (tmp_path / "rebased" / file).write_bytes((ROOT / "rebased" / file).read_bytes())
    code = "from rebased import lesson\nprint('φ', '∞', 'end')\n"
    (tmp_path / "01_kernels.py").write_text(code, encoding="utf-8")
    command = [sys.executable, "-B", "01_kernels.py"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")} | NARROW[name]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=300)
    assert (done.returncode, done.stdout.strip()) == (0, b"? ? end"), done.stderr.decode("utf-8", "replace")


SMALL = [
    ["01_kernels.py"],
    ["02_linear_attention.py"],
    ["03_model.py"],
    ["04_train_mqar.py", *"--mixers rebased --seeds 0 --steps 20 --lengths 128 --workers 1".split()],
    ["05_train_pile.py", *"--mixers rebased --set steps=2 seq_len=64 batch_tokens=256 eval_tokens=500".split()],
    ["-m", "experiments.pile_sample", "def ", "--length", "40", "--temperature", "3"],
    ["-m", "experiments.pile_report", "runs/pile/results.jsonl"],
    ["-m", "experiments.mqar", *"--mixers rebased --seeds 0 --epochs 1 --examples 64 --test-lengths 128".split()],
    ["-m", "experiments.mqar_report", "runs/mqar_grid.jsonl"],
    ["-m", "experiments.decoding", *"--contexts 64 --batches 1 --kernels rebased".split()],
    ["-m", "experiments.baselines_cost"],
    ["-m", "experiments.floor"],
    ["-m", "experiments.floor_text"],
]
THERE = ("floor.jsonl", "floor_text.jsonl")  # rows of results/, so that nothing is left to train


@pytest.mark.slow
@pytest.mark.parametrize("name", NARROW)
def test_every_command_ends_well_where_letters_cannot_be_shown(tmp_path, name):
    """One after the other, as some read what others wrote."""
    (tmp_path / "runs").mkdir()
    for rows in THERE:
        (tmp_path / "runs" / rows).write_bytes((ROOT / "results" / rows).read_bytes())
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")} | NARROW[name]
    for command in SMALL:
        if command[0].endswith(".py"):
            command = [str(ROOT / command[0]), *command[1:]]
        command = [sys.executable, "-B", *command]
        environment["PYTHONPATH"] = str(ROOT)
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=600)
        assert done.returncode == 0, (command, done.stderr.decode("utf-8", "replace")[-500:])
    for rows in THERE:
        assert (tmp_path / "runs" / rows).read_bytes() == (ROOT / "results" / rows).read_bytes(), f"{rows}: trained"
