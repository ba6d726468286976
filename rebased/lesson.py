"""What every lesson needs at its edges: checks, figures, a stopwatch, where a number came from, the command line."""

import argparse
import math
import os
import platform
import subprocess
import sys
import time
from dataclasses import fields, replace
from datetime import date
from pathlib import Path

import torch

class Refusal(Exception):
    """What the user can mend, said in one line or two."""


# Checks
TALLY = {"passed": 0, "failed": 0}


def check(claim):
    """Run one `check_...` function where its claim is made, print the verdict, and count it for `finish`.

    The function asserts; what it returns, if anything, is printed as a note.
    """
    name = claim.__name__.removeprefix("check_").replace("_", " ")
    try:
        if not __debug__:
            raise AssertionError("python -O removes what a check asserts; run without it")
        note = claim()
    except AssertionError as error:
        TALLY["failed"] += 1
        print(f"  FAILED  {name}: {str(error) or claim.__doc__}")
    else:
        TALLY["passed"] += 1
        print(f"  ok      {name}" + (f" ({note})" if note else ""))


def finish():
    """Print `checks: n passed, m failed`; end with exit status 1 if one failed."""
    passed, failed = TALLY["passed"], TALLY["failed"]
    TALLY.update(passed=0, failed=0)
    print(f"checks: {passed} passed, {failed} failed")
    if failed:
        raise SystemExit(1)


# Figures
def in_notebook():
    """Whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return hasattr(shell, "kernel")


def new_figure(width, height):
    """A matplotlib Figure of so many inches, or None, after one line that says so, where it is not installed.

    It belongs to no backend: nothing is opened on a screen, and a notebook keeps its own settings.
    """
    if not in_notebook():
        os.environ.pop("MPLBACKEND", None)  # a notebook's `!python` hands down a backend that only it has
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no figure: matplotlib is not installed (pip install matplotlib)")
        return None
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure, path, description):
    """Write a figure and say where; in a notebook, show it. description: for a reader who cannot see it."""
    path = Path(path)
    try:
        if holds_something_else(path):
            print(f"no figure: {path} holds something that is no picture; it is kept, choose another --figure")
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120, metadata={"Description": description} if path.suffix == ".png" else None)
    except (OSError, ValueError) as error:
        print(f"no figure: cannot write {path} ({error})")
        return
    print(f"figure: {path}")
    if in_notebook():
        from IPython.display import Image, display

        display(Image(filename=path, alt=description))


PICTURES = {  # kinds of figures, and how such files begin
    ".png": (b"\x89PNG",),
    ".jpg": (b"\xff\xd8\xff",),
    ".pdf": (b"%PDF",),
    ".svg": (b"<?xml", b"<svg"),
}


def holds_something_else(path):
    """Whether a file is there that no figure may overwrite: rows, say."""
    if not path.is_file() or path.stat().st_size == 0:
        return False
    with open(path, "rb") as file:
        begin = file.read(8)
    return not any(begin.startswith(begins) for kind in PICTURES.values() for begins in kind)


def label_ends(axis, ends, gap=0.075):
    """Write the names of lines beside their right ends, in their colours, no two closer than `gap` of the axis' height.

    ends: [(name, y of the last point, colour)]. Call it when the limits of the axis are set.
    """
    to_fraction = axis.transData + axis.transAxes.inverted()
    right = axis.get_xlim()[1]
    ends = sorted(ends, key=lambda end: end[1])
    heights = [to_fraction.transform((right, y))[1] for _, y, _ in ends]
    for i in range(1, len(heights)):  # from below: push up what is too close
        heights[i] = max(heights[i], heights[i - 1] + gap)
    highest = 1.0
    for i in reversed(range(len(heights))):  # from above: push down what has left the axis
        heights[i] = highest = min(heights[i], highest)
        highest -= gap
    for (name, _, color), height in zip(ends, heights, strict=True):
        axis.annotate(name, (1.02, height), xycoords="axes fraction", color=color, va="center", annotation_clip=False)


# Text
def speak_plainly():
    """Print as ? what this output cannot show, and say in one line what the user can mend.

    So no table and no trained model is lost to a pipe of Windows, or to LC_ALL=C. Done at the import of this file, but
    only where a program of this repository runs: other programs keep their output as they want it.
    """
    program = getattr(sys.modules["__main__"], "__file__", None)
    if program and Path(program).resolve().is_relative_to(Path(__file__).resolve().parent.parent):
        replace_letters()
        sys.excepthook = say_in_one_line


def replace_letters():
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's cannot be, and shows everything
            stream.reconfigure(errors="replace")


def say_in_one_line(kind, error, traceback):
    """What the user can mend, wherever it comes from (a full disk behind a pipe), is no stack trace."""
    if issubclass(kind, (Refusal, OSError)):
        print(f"error: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


speak_plainly()


def printable(text):
    """Text that may come from anywhere, for a terminal: a · stands for what would move its cursor or ring its bell."""
    return "".join(character if character.isprintable() or character in "\n\t" else "·" for character in text)


# Stopwatch
def median_seconds(calls, repeats=5):
    """{name: median seconds} of functions that take turns, so that a slow moment of the machine meets all of them.

    calls: {name: function without arguments}. A first turn warms up and does not count.
    """
    times = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn > 0:
                times[name].append(time.perf_counter() - start)
    return {name: sorted(values)[repeats // 2] for name, values in times.items()}


def machine_speed():
    """(floating-point operations/s of a matrix product, bytes/s of a copy, seconds of an empty call), now, here."""
    a = torch.randn(1024, 1024)
    b = torch.randn(2**24)
    tiny = torch.zeros(1)

    def thousand_calls():
        for _ in range(1000):
            tiny + 1

    seconds = median_seconds({"product": lambda: a @ a, "copy": b.clone, "calls": thousand_calls}, repeats=9)
    copied = 2 * b.nbytes  # read and written
    return 2 * 1024**3 / seconds["product"], copied / seconds["copy"], seconds["calls"] / 1000


# Where a number comes from
def provenance(file, argv=None):
    """What a reader of a result must know: command, commit, day, machine, version of PyTorch.

    argv: what the command line of `file` had; by default that of this program.
    """
    argv = command_line() if argv is None else argv
    file = Path(file).resolve()
    git = ["git", "-C", str(file.parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    root = Path(__file__).resolve().parent.parent
    name = file.relative_to(root) if file.is_relative_to(root) else file.name
    return {
        "command": " ".join(["python", str(name), *argv]),
        "commit": commit,
        "date": date.today().isoformat(),
        "hardware": f"{processor()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
    }


def usable_cores():
    """How many cores this process may use; where the system does not tell, how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def processor():
    """The model of the processor, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")  # Linux; elsewhere `platform` knows
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(": ")[1]
    return platform.processor() or platform.machine()


# The command line
def command_line():
    """The arguments of this program. In a notebook's own cells there are none; what `%run` gives is heeded."""
    return [] if Path(sys.argv[0]).name.endswith("kernel_launcher.py") else sys.argv[1:]


def parse_arguments(parser, argv=None):
    """Parse argv, or the command line."""
    return parser.parse_args(command_line() if argv is None else argv)


def change(settings, assignments):
    """A copy of a dataclass of settings, changed by texts like "steps=200". A value has the type of the one before.

    Raises Refusal for a name that is not there and a text that is no such value.
    """
    known = [field.name for field in fields(settings)]
    changes = {}
    for text in assignments:
        name, _, value = text.partition("=")
        if name not in known:
            raise Refusal(f"{text}: there is no setting {name!r}; choose from {', '.join(known)}")
        kind = type(getattr(settings, name))
        try:
            changes[name] = {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
        except (KeyError, ValueError):
            like = f"{name}={getattr(settings, name)}"
            raise Refusal(f"{text}: {name} must be of type {kind.__name__}, as in {like}") from None
    return replace(settings, **changes)


def positive_integer(text):
    """An argparse type: an integer of at least 1."""
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def seed_number(text):
    """An argparse type: a seed; from 2³¹ on the tests of 04 have theirs."""
    if not (text.isascii() and text.isdecimal() and len(text) <= 10) or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"a seed is at least 0 and below 2**31, got {text[:40]!r}")
    return int(text)


def at_least(kind, least, strict=False):
    """An argparse type: a finite number that is >= least, or > least if strict."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number ({kind.__name__})") from None
        if not (value > least or (value == least and not strict)) or value == math.inf:
            raise argparse.ArgumentTypeError(f"must be {'above' if strict else 'at least'} {least}, got {text}")
        return value

    return parse


learning_rate = at_least(float, 0, strict=True)


def writable_path(text):
    """An argparse type: the path if it can be written, its folder made; asked before any work is done."""
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        if not new and not path.is_file() and not path.is_dir():
            raise argparse.ArgumentTypeError(f"cannot write {path}: it is no ordinary file; choose another path")
        path.open("ab").close()
        if new:
            try:
                path.write_bytes(bytes(2**16))  # a full disk says so here
            finally:
                path.unlink()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write {path}: {error.strerror}; choose another path") from None
    return path


def figure_path(text):
    """An argparse type: where a figure can be written, and is of a kind that can be drawn."""
    path = Path(text)
    if path.suffix.lower() not in PICTURES:
        raise argparse.ArgumentTypeError(f"{path} is no figure's name; let it end in {', '.join(PICTURES)}")
    writable_path(text)
    if holds_something_else(path):
        raise argparse.ArgumentTypeError(f"{path} holds something that is no picture; choose another path")
    return path


def obey(command, after_a_stop):
    """command(), with one line and exit status 2 instead of a stack trace for what the user can mend.

    after_a_stop: what to tell who pressed Ctrl-C. What the output cannot show is shown as ?.
    """
    replace_letters()
    try:
        return command()
    except (Refusal, OSError, UnicodeError) as error:
        named = f"cannot use {error.filename}: {error.strerror}" if getattr(error, "filename", None) else error
        print(f"error: {named}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"\nstopped; {after_a_stop}", file=sys.stderr)
        raise SystemExit(130) from None
