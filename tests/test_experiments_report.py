"""The specification of experiments/mqar_report.py: tables from rows alone, each row once, no claim without its rows."""

import json
import math
from pathlib import Path

import pytest
import torch

from experiments import mqar_report
from rebased import files, kernels

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
        lesson_row = {k: row[k] for k in mqar_report.ROW}
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
