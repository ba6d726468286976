"""A lesson -> a notebook: read with jupytext, run with nbclient, tidied for a reader.

Why: the lessons are plain Python files, and stay the only thing that is written by hand. What is
said twice in a file (its docstring is prose, its progress bars are for a terminal) is put into the
form that a notebook has for it. `course/build` calls this; nothing here is run by itself.
"""

import os
import re
import shutil
import textwrap
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from rebased import LESSONS
from rebased.lesson import Refusal

ROOT = Path(__file__).resolve().parents[2]
LISTS = ("You will learn", "References")


# The docstring
def docstring_as_markdown(text):
    """The docstring of a lesson as Markdown: a title, and each of its parts under a bold word.

    A part begins after an empty line. Equations and commands keep their columns; lists are lists.
    """
    title, *parts = re.split(r"\n\s*\n", text.strip())
    sections = [f"# {title.strip()}"]
    for part in parts:
        sections.append(part_as_markdown(part))
    return "\n\n".join(sections)


def part_as_markdown(part):
    """One part of the docstring. Its first line is "Head", or "Head: and what it says"."""
    first, _, rest = part.partition("\n")
    head, colon, beginning = first.partition(":")
    if colon and beginning:
        rest = f"{beginning}\n{rest}"
    if head.startswith("Equations"):
        return f"**{first}**\n\n{as_it_stands(rest)}"
    if head == "Run":
        return f"**Run**\n\n{as_it_stands('    ' + rest)}"  # the place of "Run:"
    if head in LISTS:
        return f"**{head}**\n\n{as_list(rest)}"
    return f"**{head}:** {plain(' '.join(rest.split()))}"


def as_it_stands(text):
    """A block in which columns are kept."""
    return f"```text\n{textwrap.dedent(text).rstrip()}\n```"


def as_list(text):
    """Items begin with "1." or "[1]"; what follows on further lines belongs to them."""
    items = []
    for line in text.splitlines():
        line = line.strip()
        if re.match(r"\d+\. |\[\d+\] ", line):
            items.append(line)
        elif line:
            items[-1] += " " + line
    items = [item if item[0].isdigit() else f"- {item}" for item in items]
    return "\n".join(linked(plain(item)) for item in items)


def plain(text):
    """Text in which Markdown finds no signs of its own."""
    return re.sub(r"([*_<])", r"\\\1", text)


def linked(text):
    """Addresses of papers and repositories as links."""
    text = re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)
    return re.sub(r"(?<!/)\b(github\.com/[\w./-]*\w)", r"[\1](https://\1)", text)


# The notebook
def read_lesson(file):
    """The notebook of a lesson, not run; its docstring is a Markdown cell."""
    notebook = jupytext.read(file)
    first = notebook.cells[0]
    if first.cell_type != "code" or not first.source.startswith('"""'):
        raise Refusal(f"{file.name}: a lesson begins with its docstring")
    text = docstring_as_markdown(first.source.strip('"'))
    notebook.cells[0] = nbformat.v4.new_markdown_cell(text)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata = nbformat.from_dict({"kernelspec": kernel})
    return notebook


def aim_of(notebook):
    """What the lesson is for, in its own words."""
    return re.search(r"\*\*Aim:\*\* (.*)", notebook.cells[0].source)[1]


def run_lesson(name, notebook, folder, train_again=False):
    """Run all cells in `folder`, in place -> seconds. Raises Refusal if a cell fails.

    The folder is a scratch one: what a lesson writes to runs/ stays out of the reader's own runs.
    """
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    rows = ROOT / "results" / "mqar.jsonl"
    if name == LESSONS["train_mqar"] and rows.exists() and not train_again:
        shutil.copy(rows, folder / "runs" / "mqar.jsonl")  # 04 does not repeat the runs it finds
    here = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, here))}
    where = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=3600, kernel_name="python3", resources=where)
    client.extra_arguments = ["--IPKernelApp.log_level=40"]  # errors only
    start = time.perf_counter()
    try:
        client.execute(env=environment)
    except CellExecutionError as error:
        raise Refusal(f"{name}.py: a cell fails: {error.ename}: {error.evalue}") from None
    tidy_outputs(notebook)
    return time.perf_counter() - start


def tidy_outputs(notebook):
    """Join what was printed piece by piece, and leave out progress bars and the times of cells."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        kept = []
        for output in cell.get("outputs", []):
            if output.output_type != "stream":
                kept.append(output)
            elif output.name == "stdout" and kept and kept[-1].output_type == "stream":
                kept[-1].text += output.text
            elif output.name == "stdout":
                kept.append(output)
        if cell.cell_type == "code":
            cell.outputs = kept


def setup_lines(repository):
    """The two lines that fetch the repository and go into it, as on Colab."""
    address = f"https://github.com/{repository or 'OWNER/REPOSITORY'}"
    return [f"!git clone --quiet --depth 1 {address} lessons", "%cd lessons"]


def for_download(notebook, repository):
    """A copy whose first cell fetches the repository, where the notebook does not lie in it."""
    body = "\n".join(f"    {line}" for line in setup_lines(repository))
    source = f'import os\n\nif not os.path.exists("01_kernels.py"):  # on Colab, say\n{body}'
    copy = nbformat.from_dict(notebook)
    copy.cells = [nbformat.v4.new_code_cell(source), *notebook.cells]
    for number, cell in enumerate(copy.cells):
        cell["id"] = f"cell-{number}"  # the same in every build
    copy.nbformat_minor = 5
    return copy
