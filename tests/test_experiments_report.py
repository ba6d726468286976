"""The specification of experiments/mqar_report.py: tables from rows alone, each row once, no claim without its rows."""

import json
import math
import random
import re
import statistics
from pathlib import Path

import pytest
import torch
from matplotlib import colors

from experiments import mqar_report
from rebased import files, kernels, lesson

ROOT = Path(__file__).resolve().parent.parent


def example_row(mixer, seed, rate, accuracy, d=64, role="report", T=128, K=16):
    """A row as experiments/mqar.py writes it, with one cell."""
    cell = {"accuracy": accuracy, "right": 0.5, "others": 0.3, "filler": 0.2, "iou": 0.4}
    run = {"mixer": mixer, "length": T, "pairs": K, "d_model": d, "learning_rate": rate, "seed": seed}
    return run | {
        "role": role,
        "settings": {"epochs": 6},
        "accuracy": accuracy,
        "cells": {f"{T} official": cell},
        "placed": {},
        "picture": None,
        "full_pass": None,
    }


def longer_row(mixer, seed, accuracy, learned=1.0, official=0.95):
    """A row that was tested at 128 and 8,192 tokens."""
    row = example_row(mixer, seed, 0.01, learned)
    cell = row["cells"]["128 official"]
    more = {"8192 official": cell | {"accuracy": official}, "8192 uniform": cell | {"accuracy": accuracy}}
    return row | {"cells": row["cells"] | {"128 uniform": cell} | more}


def write(path, rows):
    for row in rows:
        files.append_row(path, row)
    return path


def test_rates_are_chosen_on_other_seeds():
    """The search rows choose; a rate that is best on the reported rows alone is not taken."""
    rows = [
        example_row("rebased", 100, 0.001, 0.9, role="search"),
        example_row("rebased", 100, 0.01, 0.8, role="search"),
        example_row("rebased", 0, 0.001, 0.3),
        example_row("rebased", 0, 0.01, 1.0),
    ]
    (cell,) = mqar_report.reported(rows).values()
    assert [row["accuracy"] for row in cell] == [0.3]
    own = [row | {"role": "report"} for row in rows]
    (cell,) = mqar_report.reported(own).values()  # the paper's way: .6 and .9 over both seeds
    assert [row["accuracy"] for row in cell] == [1.0, 0.8]


def test_mean_and_std():
    """By hand: 1, 2, 6 have mean 3 and standard deviation √7."""
    mean, std = mqar_report.mean_std([1, 2, 6])
    assert mean == 3 and abs(std - 7**0.5) < 1e-12 and mqar_report.mean_std([4]) == (4, 0)


def test_the_papers_numbers_are_found():
    """Figure 1 and Table 1, and nothing where the paper has nothing. Table 1 prints the mean of each row too."""
    assert mqar_report.published("rebased", 1024, 256, 64) == 0.55
    assert mqar_report.published("based", 256, 32, 24) == 0.45
    assert mqar_report.published("elu", 128, 16, 64) is None and mqar_report.published("rebased", 128, 16, 32) is None
    means = {
        (256, 32): {"based": 0.58, "x2": 0.54, "norm": 0.57, "gamma": 0.51, "gamma_beta": 0.61, "rebased": 0.63},
        (2048, 32): {"based": 0.51, "x2": 0.44, "norm": 0.58, "gamma": 0.48, "gamma_beta": 0.60, "rebased": 0.61},
    }
    for cell, row in mqar_report.TABLE_1.items():
        for mixer, values in row.items():
            assert abs(sum(values) / 4 - means[cell][mixer]) < 0.0101, (cell, mixer)
    assert mqar_report.published("gamma", 2048, 32, 48) == 0.99


def test_every_floor_has_its_kernel():
    """The names with and without a floor go together, for every kernel of 01 that can have one."""
    names = [name for name in kernels.KERNELS if name != "elu"]
    floored = [name for name in names if mqar_report.has_floor(name)]
    assert sorted(map(mqar_report.without_floor, floored)) == sorted(set(names) - set(floored))
    assert all(kernels.KERNELS[name](2).floor == (0.5 if name in floored else 0) for name in names)
    titles = [mqar_report.title(name) for name in kernels.KERNELS]
    assert len(set(titles)) == len(titles) and not set(titles) & set(kernels.KERNELS)


def test_an_unknown_kernel_is_called_by_its_name():
    """Also in the order of a table, where it comes last, with its floor and where the floor was set to 0."""
    assert mqar_report.title("mine") == "mine" and mqar_report.title("mine_floor") == "mine_floor"
    assert mqar_report.title("based floor := 0") == "Based, floor 0"
    mixers = ["mine", "elementwise", "rebased floor := 0", "based", "rebased"]
    assert sorted(mixers, key=mqar_report.order) == ["rebased", "rebased floor := 0", "based", "elementwise", "mine"]


def test_a_row_counts_once(tmp_path):
    """Files joined with a duplicate, the same file twice; another role, seed or setting is another row."""
    rows = [example_row("rebased", 0, 0.01, 0.9), example_row("rebased", 1, 0.01, 0.7)]
    path = write(tmp_path / "rows.jsonl", [*rows, rows[0], rows[0] | {"role": "search"}])
    write(tmp_path / "more.jsonl", [rows[1] | {"settings": {"epochs": 7}}])
    assert len(mqar_report.read([path, path])) == 3
    assert len(mqar_report.read([path, path, tmp_path / "more.jsonl"])) == 4


def test_rows_that_do_not_say_what_they_are(tmp_path):
    """They are reported, but for the seeds that the user names."""
    row = example_row("rebased", 7, 0.01, 0.9)
    del row["role"]
    path = write(tmp_path / "rows.jsonl", [row])
    assert [row["role"] for row in mqar_report.read([path])] == ["report"]
    assert [row["role"] for row in mqar_report.read([path], search_seeds=[7])] == ["search"]


def test_different_settings_in_one_cell_are_said(capsys):
    rows = [example_row("rebased", 0, 0.01, 0.9), example_row("rebased", 1, 0.01, 0.9)]
    mqar_report.warn_of_mixed_settings(rows)
    assert capsys.readouterr().out == ""
    mqar_report.warn_of_mixed_settings([*rows, rows[0] | {"settings": {"epochs": 7}}])
    assert "Careful: the rows of ReBased at T = 128, K = 16, d = 64" in capsys.readouterr().out


def test_missing_cells_are_shown_as_missing(capsys):
    """One width of one system is not there: – in its place, with the paper's value where the paper has one."""
    rows = [
        example_row("rebased", 0, 0.01, 0.97),
        example_row("rebased", 0, 0.01, 0.5, d=128),
        example_row("based", 0, 0.01, 0.99),
    ]
    mqar_report.print_grid(rows)
    lines = capsys.readouterr().out.splitlines()
    rebased, based = (next(line for line in lines if line.startswith(name + " ")) for name in ("ReBased", "Based"))
    assert "0.970 ± 0.000 (1) [1.00]" in rebased and "0.500 ± 0.000 (1) [1.00]" in rebased
    assert based.endswith("– [1.00]") and "T = 128, d = 64: ReBased 0.970, behind Based 0.990." in lines


def test_the_papers_iou_stands_beside_its_own_cell_only(capsys):
    """T = 128, K = 32; elsewhere a line says that the cell is not among the rows."""
    mqar_report.print_look([example_row("rebased", 0, 0.01, 1.0, T=64, K=8), example_row("based", 0, 0.01, 1.0)])
    out = capsys.readouterr().out
    assert "[0.1" not in out and "is of T = 128, K = 32: not among these rows" in out
    both = [example_row("rebased", 0, 0.01, 1.0, K=32), example_row("rebased", 0, 0.01, 1.0, T=64, K=8)]
    mqar_report.print_look(both)
    out = capsys.readouterr().out
    assert out.count("[0.173]") == 1 and "not among these rows" not in out


def test_the_soft_iou_is_that_of_the_share(capsys):
    """.5 on the right pair: the smaller of weight and truth sum to .5, the larger to 1.5."""
    mqar_report.print_look([example_row("rebased", 0, 0.01, 1.0, K=32)])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("ReBased"))
    assert line.split()[-2:] == ["0.333", "[0.173]"] and line.split()[-3] == "0.400"


def test_what_decay_alone_leaves_of_gamma():
    """An AdamW of PyTorch beside a parameter whose gradient is 0, over the same cosine."""
    row = example_row("rebased", 0, 0.02, 1.0)
    row["settings"] = {"examples": 64, "batch": 16, "epochs": 5, "warmup": 3, "rate_by_epoch": False}
    row["placed"] = {"gamma_q": [[1, 0]] * 4}  # it stopped after three epochs of five
    gamma = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.AdamW([gamma], weight_decay=0.1)
    for step in range(12):
        optimizer.param_groups[0]["lr"] = 0.02 * min(1, (step + 1) / 4) * (1 + math.cos(math.pi * step / 20)) / 2
        gamma.grad = torch.zeros(1)
        optimizer.step()
    assert abs(mqar_report.decay_alone(row) - gamma.item()) < 1e-6


def test_floors_are_counted_where_the_task_was_learned(capsys):
    """Three kernels; one has not learned it; at official queries one of the others does not separate."""
    rows = []
    for mixer, learned, official in (("based", 1.0, 0.5), ("x2_floor", 1.0, 0.99), ("elementwise_floor", 0.1, 0.99)):
        for seed in (0, 1):
            rows.append(longer_row(mixer, seed, 0.3, learned, official))
            rows.append(longer_row(mqar_report.without_floor(mixer), seed, 0.9, learned))
    mqar_report.print_floors(rows)
    uniform, official = capsys.readouterr().out.split("Uniform queries: ")[1].split("Official queries: ")
    assert uniform.startswith("in 2 of 2 kernels") and "Did not learn it: element-wise (also so)" in uniform
    assert official.startswith("in 1 of 2 kernels") and "Did not learn it: element-wise (not so)" in official


def test_the_ladder_as_committed(tmp_path, capsys, monkeypatch):
    """Nothing is told but the file's name: five seeds of each, seven kernels that learned it."""
    monkeypatch.setattr(mqar_report.lesson, "new_figure", lambda width, height: None)
    mqar_report.main([str(ROOT / "results" / "mqar_ladder.jsonl"), "--figure", str(tmp_path / "ladder.png")])
    out = capsys.readouterr().out
    assert "Based              0.003  5  official" in out and "0.352 ± 0.062" in out and "0.882 ± 0.096" in out
    assert out.count("in 7 of 7 kernels that learned the task") == 2 and "on seeds 100, 101" in out


@pytest.mark.parametrize("name, message", [
    ("x.txt", "is no figure's name; let it end in .png"), ("x" * 248 + ".png", "File name too long"),
    ("x.png", "x_attention.png: Is a directory"), ("y.png", "y_gamma_beta.png holds something that is no picture"),
])
def test_figures_that_cannot_be_drawn_are_refused_before_the_tables(tmp_path, capsys, name, message):
    (tmp_path / "x_attention.png").mkdir()
    (tmp_path / "y_gamma_beta.png").write_text("{}", encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        mqar_report.main([str(ROOT / "results" / "mqar_laptop.jsonl"), "--figure", str(tmp_path / name)])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and message in err.splitlines()[-1] and out == ""


def test_figures_of_a_ladder(tmp_path, capsys):
    """More than seven mixers: panels for each kernel. All three figures are drawn from the committed rows."""
    some = ("conv_attention", "based", "based_no_floor", "rebased", "rebased_floor", "x2", "x2_floor", "norm")
    rows = [row for row in mqar_report.read([ROOT / "results" / "mqar_ladder.jsonl"]) if row["mixer"] in some]
    mqar_report.draw_recall(rows, tmp_path / "ladder.png")
    few = [row for row in rows if row["mixer"] in some[:4]]
    mqar_report.draw_look(few, tmp_path / "attention.png")
    mqar_report.draw_placed(few, tmp_path / "gamma_beta.png")
    assert capsys.readouterr().out.count("figure: ") == 3


def test_the_laptop_as_committed(capsys):
    """The table of results/README.md, without being told which seeds searched; no IoU of another cell beside it."""
    rows = mqar_report.read([ROOT / "results" / "mqar_laptop.jsonl"])
    mqar_report.print_grid(rows)
    mqar_report.print_look(rows)
    out = capsys.readouterr().out
    assert "0.686 ± 0.271 (5)" in out and "0.676 ± 0.236 (5)" in out and "[0.1" not in out


def test_rows_of_the_lesson_are_reported_too(tmp_path, capsys):
    """04 writes fewer fields, and a second set of tests where it set the floor to 0: a line of its own."""
    rows = []
    for seed, (before, after) in enumerate([(0.3, 0.9), (0.4, 0.8)]):
        row = longer_row("based", seed, before)
        changed = longer_row("based", seed, after)["cells"]
        lesson_row = {k: row[k] for k in mqar_report.ROW if not k.endswith("?")}
        lesson_row |= {"role": "report", "steps": 1200, "cells_without_floor": changed}
        for cell in [*lesson_row["cells"].values(), *changed.values()]:
            cell.pop("iou", None)
        rows.append(json.loads(json.dumps(lesson_row)))
    path = write(tmp_path / "rows.jsonl", rows)
    mqar_report.main([str(path), "--figure", str(tmp_path / "figure.png")])
    out = capsys.readouterr().out
    assert "Based, floor 0" in out and "0.850 ± 0.071" in out and "0.350 ± 0.071" in out
    assert (tmp_path / "figure.png").exists()


@pytest.mark.parametrize("count", [1, 7, 8, 15, 17])
def test_a_panel_has_at_most_seven_lines(count):
    parts = mqar_report.parts_of(list(range(count)))
    assert sum(parts, []) == list(range(count)) and max(map(len, parts)) <= 7
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_grid_of_the_papers_ablation_is_drawn(tmp_path, capsys):
    """Eight mixers, the paper's values in panels of their own."""
    rows = []
    for mixer in ("based", "x2", "norm", "gamma", "gamma_beta", "rebased", "based_norm", "elementwise"):
        rows += [example_row(mixer, seed, 0.01, 0.9 - seed / 10, d=d, T=256, K=32) for d in (16, 24) for seed in (0, 1)]
    mqar_report.draw_grid(rows, tmp_path / "grid.png")
    assert (tmp_path / "grid.png").stat().st_size > 10_000


# Rows whose every cell differs, and what tables, sentences and figures make of them
NAMES = {  # in the order of a table
    "conv_attention": "conv + softmax",
    "rebased": "ReBased",
    "rebased_floor": "ReBased + ½",
    "based": "Based",
    "based_no_floor": "Based − ½",
    "x2": "x²",
    "x2_floor": "x² + ½",
    "norm": "norm(x)²",
    "norm_floor": "norm(x)² + ½",
}
RATES = {mixer: 0.001 * (i + 1) for i, mixer in enumerate(NAMES)}
FLOORS = ("rebased", "based_no_floor", "x2", "norm"), ("rebased_floor", "based", "x2_floor", "norm_floor")
LENGTHS = (128, 512, 8192)


def full_row(mixer, seed, rate, numbers, role="report"):
    """A row with every field that a run can leave, each number of it another one, drawn from `numbers`."""
    row = example_row(mixer, seed, rate, numbers.random(), role=role)
    row["settings"] = {"examples": 64, "batch": 16, "epochs": 4, "warmup": 3, "rate_by_epoch": False}
    for cell in [f"{T} {placement}" for T in LENGTHS for placement in ("official", "uniform")]:
        row["cells"][cell] = {name: numbers.random() for name in ("accuracy", "right", "others", "filler", "iou")}
    row["full_pass"] = {"length": 8192, "chunked_seconds": numbers.random(), "quadratic_seconds": numbers.random()}
    if mixer.startswith("rebased"):
        names = ("gamma_q", "gamma_k", "beta_q", "beta_k")
        row["placed"] = {name: [[numbers.random(), numbers.random()] for _ in range(4)] for name in names}
    right = list(range(1, 33, 2))
    numbers.shuffle(right)
    row["picture"] = {"weights": [[numbers.random() / 40 for _ in range(60)] for _ in range(16)], "right": right}
    return row


@pytest.fixture(scope="module")
def ladder():
    """Nine mixers and three seeds at two rates each; the rate that the search liked is that of RATES."""
    numbers = random.Random(0)
    rows = []
    for mixer, rate in RATES.items():
        for seed in (0, 1, 2):
            rows += [full_row(mixer, seed, rate, numbers), full_row(mixer, seed, 10 * rate, numbers)]
        liked, disliked = (full_row(mixer, 100, r, numbers, "search") for r in (rate, 10 * rate))
        for cell in disliked["cells"]:
            disliked["cells"][cell]["accuracy"] = liked["cells"][cell]["accuracy"] - 0.01
        disliked["accuracy"] = 1.0  # at the trained length alone it would be chosen
        rows += [disliked, liked]
    numbers.shuffle(rows)
    return rows


def own_rows(rows, mixer):
    """The rows that are to be reported, seed by seed."""
    chosen = {(row["role"], row["learning_rate"], row["seed"]): row for row in rows if row["mixer"] == mixer}
    return [chosen["report", RATES[mixer], seed] for seed in (0, 1, 2)]


def numbers_of(rows, mixer, cell, measure):
    return [row["cells"][cell][measure] for row in own_rows(rows, mixer)]


def said(values):
    """mean ± std, by Python's own statistics."""
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def line_of(text, name, width=18):
    """What stands behind the first line that begins with this name in a column of its own."""
    return next(line[width:] for line in text.splitlines() if line[:width].rstrip() == name)


def test_every_entry_by_length(ladder, capsys):
    mqar_report.print_recall(ladder)
    lines = capsys.readouterr().out.splitlines()[4:]
    expected = []
    for mixer in sorted(NAMES, key=lambda mixer: mqar_report.order(mixer)):
        head = f"{NAMES[mixer]} {RATES[mixer]:g} 3"
        for measure, name in (("accuracy", ""), ("filler", ", on filler")):
            for placement in ("official", "uniform"):
                entries = [said(numbers_of(ladder, mixer, f"{T} {placement}", measure)) for T in LENGTHS]
                expected.append(f"{head} {placement}{name} {' '.join(entries)}".split())
                head = ""
    assert [line.split() for line in lines] == expected


def test_every_entry_between_floors(ladder, capsys):
    mqar_report.print_floors(ladder)
    shown = capsys.readouterr().out
    for without, with_floor in zip(*FLOORS, strict=True):
        entries = []
        for measure in ("accuracy", "filler", "right"):
            entries += [said(numbers_of(ladder, mixer, "8192 uniform", measure)) for mixer in (without, with_floor)]
        found = line_of(shown, NAMES[without])
        assert [entry.strip() for entry in re.split(r"\||   +", found.strip())] == entries


def test_every_entry_of_the_attention(ladder, capsys):
    mqar_report.print_look(ladder)
    shown = capsys.readouterr().out
    for mixer, name in NAMES.items():
        entries = ["128", "16", "64"]
        for measure in ("accuracy", "right", "others", "filler", "iou"):
            entries.append(f"{statistics.mean(numbers_of(ladder, mixer, '128 official', measure)):.3f}")
        right = statistics.mean(numbers_of(ladder, mixer, "128 official", "right"))
        entries.append(f"{right / (2 - right):.3f}")
        assert line_of(shown, name).split() == entries


def test_every_entry_of_the_search(ladder, capsys):
    mqar_report.print_search(ladder)
    shown = capsys.readouterr().out
    assert "on seeds 100;" in shown
    rates = sorted({row["learning_rate"] for row in ladder})
    for mixer, name in NAMES.items():
        entries = ["128", "16", "64"] + ["–"] * len(rates)
        for row in ladder:
            if row["mixer"] == mixer and row["role"] == "search":
                mean = statistics.mean(cell["accuracy"] for cell in row["cells"].values())
                mark = "*" if row["learning_rate"] == RATES[mixer] else ""
                entries[3 + rates.index(row["learning_rate"])] = f"{mean:.3f}{mark}"
        assert line_of(shown, name).split() == entries


def test_every_entry_of_gamma_and_beta(ladder, capsys):
    mqar_report.print_placed(ladder)
    shown = capsys.readouterr().out
    for mixer in ("rebased", "rebased_floor"):
        entries = "128 64"
        for name in ("gamma_q", "gamma_k", "beta_q", "beta_k"):
            ends = [row["placed"][name][3] for row in own_rows(ladder, mixer)]
            mean, std = (statistics.mean(end[i] for end in ends) for i in (0, 1))
            entries += f" {mean:.3f} ± {std:.3f}"
        entries += f" {mqar_report.decay_alone(own_rows(ladder, mixer)[0]):.3f}"
        assert line_of(shown, NAMES[mixer]).split() == entries.split()
    assert "Based − ½" not in shown


def test_the_sentences_are_those_of_the_numbers(ladder, capsys):
    mqar_report.read_recall(ladder)
    shown = capsys.readouterr().out
    for mixer, name in NAMES.items():
        mean = statistics.mean(numbers_of(ladder, mixer, "8192 uniform", "accuracy"))
        assert re.search(rf"[:,] {re.escape(name)} {mean:.3f}[,.]", shown), name
    assert "At 8,192 tokens, 64 times the trained length" in shown
    passes = [(row["full_pass"]["chunked_seconds"], row["full_pass"]["quadratic_seconds"])
              for row in ladder if row["mixer"] == "rebased"]
    pattern = r"took (\d+) ms through the\nchunked form, (\d+) ms through the quadratic"
    chunked, quadratic = re.search(pattern, shown).groups()
    assert (chunked, quadratic) in [(f"{a * 1e3:.0f}", f"{b * 1e3:.0f}") for a, b in passes]


@pytest.mark.parametrize("based, rebased_floor, rebased, based_no_floor, repairs", [
    (0.3, 0.2, 0.8, 0.9, True), (0.8, 0.9, 0.2, 0.3, False), (0.3, 0.85, 0.8, 0.9, False), (0.3, 0.2, 0.25, 0.9, False),
])
def test_the_floor_is_blamed_where_both_lie_below_both(based, rebased_floor, rebased, based_no_floor, repairs, capsys):
    """In another order of the four, and where two overlap, nothing is said to be repaired."""
    means = {"based": based, "rebased_floor": rebased_floor, "rebased": rebased, "based_no_floor": based_no_floor}
    mqar_report.read_recall([longer_row(mixer, seed, mean) for mixer, mean in means.items() for seed in (0, 1)])
    shown = capsys.readouterr().out
    assert ("taking the ½ from Based repairs it" in shown) == repairs != ("does not follow the floor" in shown)


def test_a_floor_that_helps_or_overlaps_is_not_counted(capsys):
    """Of three kernels one is better with its floor, one has seeds that overlap, one has learned without it only."""
    rows = []
    for mixer, with_floor, without in (("based", 0.9, 0.3), ("x2_floor", 0.5, 0.4), ("norm_floor", 0.2, 0.9)):
        for seed in (0, 1):
            learned = 0.5 if mixer == "norm_floor" else 1.0
            rows.append(longer_row(mixer, seed, with_floor - 0.3 * seed, learned))
            rows.append(longer_row(mqar_report.without_floor(mixer), seed, without + 0.01 * seed))
    mqar_report.print_floors(rows)
    shown = capsys.readouterr().out
    assert "Uniform queries: in 0 of 2 kernels" in shown and "Did not learn it: norm(x)² (also so)." in shown


# The grid of widths
@pytest.fixture(scope="module")
def grid():
    """Eight mixers, two of the paper's lengths, three widths, two seeds; one cell is missing."""
    numbers = random.Random(1)
    rows = []
    for mixer in ("based", "x2", "norm", "gamma", "gamma_beta", "rebased", "mamba", "elu"):
        for T in (256, 2048):
            for d in (16, 24, 64):
                for seed in (0, 1):
                    accuracy = numbers.random()
                    row = example_row(mixer, seed, 0.01, accuracy, d=d, T=T, K=32)
                    rows.append(row | {"accuracies": [accuracy, accuracy / 2]})
    return [row for row in rows if (row["mixer"], row["length"], row["d_model"]) != ("norm", 256, 24)]


def accuracies(rows, mixer, T, d):
    key = (mixer, T, d)
    return [row["accuracy"] for row in rows if (row["mixer"], row["length"], row["d_model"]) == key]


TABLE_1 = {(256, 16): 0.06, (256, 24): 0.45, (2048, 16): 0.02, (2048, 24): 0.40}  # [1, Table 1], Based


def test_every_entry_of_the_grid(grid, capsys):
    mqar_report.print_grid(grid)
    shown = capsys.readouterr().out
    for T in (256, 2048):
        part = shown[shown.index(f"T = {T:,}, K = 32") :]
        for mixer in ("based", "x2", "norm", "rebased", "mamba", "elu"):
            line = line_of(part, mqar_report.title(mixer))
            entries = re.findall(r"(?:–|[\d.]+ ± [\d.]+ \(\d\))(?: \[[\d.]+\])?", line)
            for d, entry in zip((16, 24, 64), entries, strict=True):
                mine = accuracies(grid, mixer, T, d)
                expected = f"{said(mine)} (2)" if mine else "–"
                assert entry.split(" [")[0] == expected
                if mixer == "based":
                    assert entry.partition(" [")[2] == (f"{TABLE_1[T, d]:.2f}]" if d < 64 else "")


@pytest.mark.parametrize("others, says", [
    ({"based": 0.70, "x2": 0.65}, "leads"),
    ({"based": 0.804, "x2": 0.60}, "level with Based"),
    ({"based": 0.796, "x2": 0.60}, "level with Based"),
    ({"based": 0.81, "x2": 0.801}, "behind Based 0.810"),
    ({"based": 0.90, "x2": 0.95}, "behind Based 0.900, x² 0.950"),
])
def test_who_leads(others, says, capsys):
    """Differences below .005 are none."""
    rows = [example_row(mixer, 0, 0.01, accuracy) for mixer, accuracy in ({"rebased": 0.80} | others).items()]
    mqar_report.print_grid(rows)
    assert capsys.readouterr().out.splitlines()[-1] == f"T = 128, d = 64: ReBased 0.800, {says}."


# Figures, by the data that are drawn
@pytest.fixture
def drawn(monkeypatch):
    """The figures that would be written."""
    figures = []
    monkeypatch.setattr(lesson, "save_figure", lambda figure, path, description: figures.append(figure))
    return figures


def panel(axis):
    """{name at the end of a line: (x of its marks, y, lowest and highest of its thin lines)}.

    The names stand above each other as the last marks do.
    """
    found = {}
    for text in axis.texts:
        (line,) = [line for line in axis.get_lines() if line.get_color() == text.get_color()]
        ranges = []
        for thin in axis.collections:
            if colors.same_color(thin.get_color(), text.get_color()):
                ranges += [(segment[0][1], segment[1][1]) for segment in thin.get_segments()]
        found[text.get_text()] = line.get_xdata(), line.get_ydata(), ranges
    names = [text.get_text() for text in sorted(axis.texts, key=lambda text: text.xy[1])]
    assert names == sorted(found, key=lambda name: found[name][1][-1])
    return found


def assert_drawn(axis, expected, places):
    """expected: {name: [values of the seeds at each place]}."""
    found = panel(axis)
    assert found.keys() == expected.keys()
    for name, seeds in expected.items():
        x, y, ranges = found[name]
        assert [min(places, key=lambda place: abs(place - at)) for at in x] == list(places)[: len(x)]
        assert list(y) == pytest.approx([statistics.mean(values) for values in seeds])
        assert [end for pair in ranges for end in pair] == pytest.approx(
            [end for values in seeds for end in (min(values), max(values))]
        )


def test_panels_of_each_kernel(ladder, drawn, tmp_path):
    """Uniform queries; softmax in every panel, a kernel without its floor and with it."""
    mqar_report.draw_recall(ladder, tmp_path / "x.png")
    found = {axis.get_title(): axis for axis in drawn[0].axes}
    assert len(found) == 8
    for pair in zip(*FLOORS, strict=True):
        for measure, name in (("accuracy", "accuracy"), ("filler", "share on filler")):
            axis = found[f"{NAMES[pair[0]]}: {name}"]
            expected = {}
            for mixer in ("conv_attention", *pair):
                expected[NAMES[mixer]] = [numbers_of(ladder, mixer, f"{T} uniform", measure) for T in LENGTHS]
            assert_drawn(axis, expected, LENGTHS)


def test_four_panels_of_a_few_mixers(ladder, drawn, tmp_path):
    few = ("conv_attention", "rebased", "based", "x2")
    mqar_report.draw_recall([row for row in ladder if row["mixer"] in few], tmp_path / "x.png")
    assert len(drawn[0].axes) == 4
    for axis in drawn[0].axes:
        name, placement = axis.get_title().removesuffix(" queries").split(", ")
        measure = {"accuracy": "accuracy", "share on filler": "filler"}[name]
        expected = {}
        for mixer in few:
            expected[NAMES[mixer]] = [numbers_of(ladder, mixer, f"{T} {placement}", measure) for T in LENGTHS]
        assert_drawn(axis, expected, LENGTHS)


def test_panels_of_the_grid(grid, drawn, tmp_path):
    """Every width from its own cell, beside the paper's values."""
    some = [row for row in grid if row["mixer"] in ("based", "rebased", "elu") and row["d_model"] < 64]
    mqar_report.draw_grid(some, tmp_path / "x.png")
    found = {axis.get_title(): axis for axis in drawn[0].axes}
    assert len(found) == 4
    for T in (256, 2048):
        ours = {mqar_report.title(mixer): [accuracies(grid, mixer, T, d) for d in (16, 24)]
                for mixer in ("based", "rebased", "elu")}
        assert_drawn(found[f"T = {T:,}, 32 pairs"], ours, (16, 24))
        paper = panel(found[f"T = {T:,}, 32 pairs: the paper's"])
        assert paper.keys() == {"Based", "ReBased"}
        assert list(paper["Based"][1]) == [TABLE_1[T, 16], TABLE_1[T, 24]]


def test_the_picture_of_the_attention(ladder, drawn, tmp_path):
    """Weights on the pairs, sorted by the place that is asked for; a frame around three places of each row."""
    mqar_report.draw_look([row for row in ladder if row["mixer"] in ("based", "x2")], tmp_path / "x.png")
    axes = [axis for axis in drawn[0].axes if axis.images]
    assert len(axes) == 2
    for axis in axes:
        name, says = axis.get_title().split(", d = 64: ")
        row = own_rows(ladder, "based" if name == "Based" else "x2")[0]
        by_place = dict(zip(row["picture"]["right"], row["picture"]["weights"], strict=True))
        weights = [by_place[place][:32] for place in range(1, 33, 2)]
        assert axis.images[0].get_array().tolist() == weights
        assert says == f"{1 - sum(map(sum, weights)) / 16:.2f} beyond the pairs"
        for i, frame in enumerate(axis.get_lines()):
            place = 2 * i + 1  # of the value: its key stands before it
            assert set(frame.get_xdata()) == {place - 1.5, place + 1.5} and set(frame.get_ydata()) == {i - 0.5, i + 0.5}


def test_gamma_and_beta_by_epoch(ladder, drawn, tmp_path):
    mqar_report.draw_placed(ladder, tmp_path / "x.png")
    assert [axis.get_title() for axis in drawn[0].axes] == ["ReBased, d = 64", "ReBased + ½, d = 64"]
    labels = {"γ of q": "gamma_q", "γ of k": "gamma_k", "β of q": "beta_q", "β of k": "beta_k"}
    for axis, mixer in zip(drawn[0].axes, ("rebased", "rebased_floor"), strict=True):
        placed = own_rows(ladder, mixer)[0]["placed"]
        bands = {}
        for band in axis.collections:
            vertices = band.get_paths()[0].vertices
            bands[tuple(band.get_facecolor()[0][:3])] = vertices[:, 1].min(), vertices[:, 1].max()
        for text in axis.texts:
            (line,) = [line for line in axis.get_lines() if line.get_color() == text.get_color()]
            means, stds = zip(*placed[labels[text.get_text()]], strict=True)
            assert list(line.get_ydata()) == list(means)
            lowest, highest = bands[colors.to_rgb(text.get_color())]
            assert lowest == pytest.approx(min(m - s for m, s in zip(means, stds, strict=True)))
            assert highest == pytest.approx(max(m + s for m, s in zip(means, stds, strict=True)))
        assert len(axis.texts) == 4
