"""README.md and results/README.md: the example runs, links lead somewhere, tables are what their command prints."""

import json
import re
import shlex
from pathlib import Path
from statistics import mean

import pytest

from experiments import floor, floor_text, mqar_report
from rebased import kernels, train_mqar

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("*/*.md")])


def fenced(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def test_the_first_block_is_the_two_commands():
    lines = fenced(README, "sh")[0].splitlines()
    assert len(lines) == 2 and lines[0].endswith("04_train_mqar.py") and lines[1].endswith("pytest -q")
    assert README.index("```") == README.index("```sh")


def test_the_example_runs():
    (example,) = fenced(README, "python")
    names = {}
    exec(example, names)
    assert names["o"].shape == (2, 4, 1000, 64) and names["o1"].shape == (2, 4, 64)
    assert names["based"].coefficients == (0.5, 1.0, 0.5)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_module_that_is_named_is_there():
    for text in (README, RESULTS):
        for name in re.findall(r"python -m experiments\.(\w+)", text):
            assert (ROOT / "experiments" / f"{name}.py").exists(), name


REPORTS = [block for block in fenced(RESULTS, "text") if block.startswith("$ python -m experiments.mqar_report")]


@pytest.mark.parametrize("block", REPORTS, ids=lambda block: block.splitlines()[0].split()[-1])
def test_a_table_is_what_its_command_prints(block, tmp_path, capsys, monkeypatch):
    command, *expected = block.splitlines()
    monkeypatch.chdir(ROOT)
    arguments = shlex.split(command)[4:]
    mqar_report.main([*arguments, "--figure", str(tmp_path / "figure.png")])
    found = [line.rstrip() for line in capsys.readouterr().out.splitlines() if not line.startswith("figure: ")]
    assert "\n".join(found).strip() == "\n".join(line.rstrip() for line in expected).strip()


@pytest.mark.parametrize("experiment", [floor, floor_text], ids=lambda module: module.__name__)
def test_a_plans_tables_are_what_its_command_prints(experiment, tmp_path, capsys, monkeypatch):
    """From the committed rows, with today's plan of runs: all rows are there, nothing is trained."""
    begin = f"$ python -m {experiment.__name__} "
    (block,) = [block for block in fenced(RESULTS, "text") if block.startswith(begin)]
    command, *expected = block.splitlines()
    *arguments, rows = shlex.split(command)[4:]
    (tmp_path / "results").mkdir()
    (tmp_path / rows).write_bytes((ROOT / rows).read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiment.workers, "run_all", None)  # would be called if a run were missing
    experiment.main([*arguments, rows, "--figure", "figure.png"])
    found = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    found = [line for line in found if not line.startswith("figure: ") and " minutes; rows: " not in line]
    assert "\n".join(found).strip() == "\n".join(line.rstrip() for line in expected).strip()


def test_what_is_said_of_the_floor_is_in_its_rows():
    """The numbers that README.md and 01 take from results/floor.jsonl."""
    rows = []
    for line in (ROOT / "results" / "floor.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["part"] == "dose" and row["role"] == "report":
            rows.append(row)

    def accuracies(chosen, cell, cells="cells"):
        return [row[cells][cell]["accuracy"] for row in chosen]

    floored = [row for row in rows if row["floor"] >= 0.01]
    before = accuracies(floored, "8192 uniform")
    after = accuracies(floored, "8192 uniform", "cells_without_floor")
    up = sum(new > old for old, new in zip(before, after, strict=True))
    text = README.replace("\n", " ")
    assert f"repairs {up} of {len(floored)} models" in text
    assert f"from {mean(before):.2f} to {mean(after):.2f} on the mean".replace("0.", ".") in text
    lesson = Path(kernels.__file__).read_text(encoding="utf-8")
    for kernel, floor_, words in (("rebased", 0.0, "answers {}\n"), ("based", 0.5, "than Based, {},")):
        own = [row for row in rows if (row["kernel"], row["floor"]) == (kernel, floor_)]
        far = f"{mean(accuracies(own, '1048576 uniform')):.2f}".replace("0.", ".")
        assert words.format(far) in lesson
        assert kernel == "based" or f"at a million tokens ReBased answers {far}" in text


def test_every_file_of_rows_is_described():
    for path in (ROOT / "results").iterdir():
        assert f"`{path.name}`" in RESULTS or path.name == "README.md", path.name


def test_the_main_table_is_that_of_its_rows(capsys):
    """04's own words and table, from results/mqar.jsonl; and the numbers that 01 and README.md take from it."""
    runs = train_mqar.planned_runs(train_mqar.parse_options([]))  # the settings are today's, too
    found = train_mqar.finished_rows(runs, ROOT / "results" / "mqar.jsonl")
    lines = train_mqar.lines_of([found[run] for run in runs])
    lengths = list(train_mqar.Run.test_lengths)
    train_mqar.print_tables(lines, lengths)
    train_mqar.read_tables(lines, lengths)
    assert capsys.readouterr().out.strip() in RESULTS

    def value_of(title, length, measure):
        return mean(train_mqar.values_of(lines[title], length, "uniform", measure))

    lesson = Path(kernels.__file__).read_text(encoding="utf-8")
    for value in (f"{value_of('Based', 8192, 'filler'):.2f}", f"{value_of('Based', 128, 'filler'):.3f}"):
        assert f"{value.removeprefix('0')} " in lesson
    before, after = (f"{value_of(title, 8192, 'accuracy'):.2f}"[1:] for title in ("Based", "Based, floor 0"))
    assert f"recall goes from {before} to {after}" in README
