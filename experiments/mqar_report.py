"""The tables and figures of associative recall, from rows alone, the paper's number beside each that the paper has.

  python -m experiments.mqar_report results/mqar_ladder.jsonl   (5 seconds; any number of files; figures go to runs/)

Nothing is trained here. A row is a dictionary that experiments/mqar.py or 04_train_mqar.py wrote: the run (mixer,
length, pairs, d_model, learning_rate, seed), its role ("search": it chose a learning rate; "report": it is reported),
and for each tested length and placement of the queries the accuracy and where the attention went. A *cell* is all rows
of one mixer, length, pairs and d_model.

Letters: T length, K pairs, d the width d_model, n seeds in a cell.

[1] Aksenov et al., ReBased, as in 01_kernels.py. Its Figure 1 gives no numbers: they are read by eye, ±.02.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from rebased import files, lesson, train_mqar

CELL = dict.fromkeys((*files.CELL, "iou?"), files.MEASURED) | {"accuracy": files.NUMBER}  # not all have weights
ROW = {  # of 04 and of experiments/mqar.py
    **files.RECALL,
    **dict.fromkeys(("length", "pairs", "d_model"), int),
    "learning_rate": files.NUMBER,
    "cells": {files.EACH: CELL},
    "cells_without_floor?": {files.EACH: CELL},
    "role?": str,
    "accuracy?": files.NUMBER,
    "placed?": {files.EACH: [[files.NUMBER, files.NUMBER], ...]},
    "picture?": ({"right": [int, ...], "weights": [[files.NUMBER, ...], ...]}, type(None)),
    "full_pass?": (dict, type(None)),
    "settings?": dict,
}
TITLES = {
    "attention": "softmax",
    "conv_attention": "conv + softmax",
    "rebased": "ReBased",
    "based": "Based",
    "based_no_floor": "Based − ½",
    "rebased_floor": "ReBased + ½",
    "based_norm": "Based + norm",
    "based_norm_no_floor": "Based + norm − ½",
    "mamba": "Mamba",
    "rwkv": "RWKV-4",
    "elu": "elu + 1",
    "x2": "x²",
    "norm": "norm(x)²",
    "gamma": "(γx)²",
    "gamma_beta": "(γx+β)²",
    "elementwise": "element-wise",
}
FLOOR_SET_TO_0 = " floor := 0"  # behind a mixer's name: the trained model with one assignment more


def has_floor(mixer):
    """Whether a kernel's similarity has a floor of ½, by its name."""
    return mixer in ("based", "based_norm") or (mixer.endswith("_floor") and not mixer.endswith("_no_floor"))


def without_floor(mixer):
    """The name of the same kernel without its floor."""
    if not has_floor(mixer):
        return mixer
    return mixer + "_no_floor" if mixer in ("based", "based_norm") else mixer.removesuffix("_floor")


def title(mixer):
    """What a table calls a mixer; one that is not known here, by its name."""
    if mixer.endswith(FLOOR_SET_TO_0):
        return title(mixer.removesuffix(FLOOR_SET_TO_0)) + ", floor 0"
    if mixer in TITLES:
        return TITLES[mixer]
    return TITLES[without_floor(mixer)] + " + ½" if without_floor(mixer) in TITLES else mixer


def order(mixer):
    """Where a mixer stands in a table: as in TITLES, a kernel's variant after it, those that are not known last."""
    names = list(TITLES)
    kernel = mixer.removesuffix(FLOOR_SET_TO_0)
    if kernel not in TITLES:
        kernel = without_floor(kernel)
    return (names.index(kernel) if kernel in TITLES else len(names)), mixer


# What the paper published
# Figure 1: accuracy at d = 64, 128, 256, 512 where K = T/8 (16 at 128) or T/4. Table 1: the ablation, K = 32.
FIGURE_1 = {  # (T, K): {mixer: accuracies}
    (128, 16): {
        "rebased": (1, 1, 1, 1),
        "based": (1, 1, 1, 1),
        "mamba": (0.73, 0.77, 0.99, 0.98),
        "rwkv": (0.10, 0.25, 0.54, 0.82),
        "conv_attention": (1, 1, 1, 1),
    },
    (256, 64): {
        "rebased": (0.97, 0.99, 1, 1),
        "based": (0.99, 1, 1, 1),
        "mamba": (0.09, 0.12, 0.19, 0.34),
        "rwkv": (0, 0, 0, 0),
        "conv_attention": (1, 1, 1, 1),
    },
    (512, 128): {
        "rebased": (0.89, 0.99, 1, 1),
        "based": (0.90, 0.99, 1, 1),
        "mamba": (0, 0.02, 0.39, 0.20),
        "rwkv": (0, 0, 0, 0),
        "conv_attention": (1, 1, 1, 1),
    },
    (1024, 256): {
        "rebased": (0.55, 0.98, 0.99, 1),
        "based": (0.33, 0.99, 0.99, 1),
        "mamba": (0, 0, 0, 0.17),
        "rwkv": (0, 0, 0, 0),
        "conv_attention": (1, 1, 1, 1),
    },
    (2048, 512): {
        "rebased": (0.07, 0.66, 0.98, 0.99),
        "based": (0.14, 0.49, 0.98, 0.99),
        "mamba": (0, 0, 0, 0),
        "rwkv": (0, 0, 0, 0),
        "conv_attention": (1, 1, 1, 1),
    },
}
TABLE_1 = {  # (T, K): {mixer: accuracies at d = 16, 24, 32, 48}
    (256, 32): {
        "based": (0.06, 0.45, 0.82, 0.99),
        "x2": (0.05, 0.47, 0.64, 0.99),
        "norm": (0.09, 0.39, 0.84, 0.97),
        "gamma": (0.02, 0.35, 0.71, 0.98),
        "gamma_beta": (0.06, 0.51, 0.89, 0.99),
        "rebased": (0.09, 0.59, 0.86, 0.99),
    },
    (2048, 32): {
        "based": (0.02, 0.40, 0.66, 0.99),
        "x2": (0.03, 0.33, 0.46, 0.93),
        "norm": (0.05, 0.56, 0.72, 0.99),
        "gamma": (0.02, 0.26, 0.65, 0.99),
        "gamma_beta": (0.06, 0.50, 0.85, 0.99),
        "rebased": (0.04, 0.58, 0.83, 0.99),
    },
}
IOU_CELL = 128, 32  # T and K of the paper's IoU; how it was binarised is not stated [1, section 5.6]
IOU = {"attention": 0.999, "based": 0.157, "rebased": 0.173}


def published(mixer, T, K, d):
    """The paper's accuracy of a cell, or None."""
    for table, widths in ((FIGURE_1, (64, 128, 256, 512)), (TABLE_1, (16, 24, 32, 48))):
        values = table.get((T, K), {}).get(mixer)
        if values and d in widths:
            return values[widths.index(d)]


# From rows to cells
# The learning rate of a cell has the best mean score over its search rows, which are not reported. The paper had no
# such seeds: it chose by the mean over the reported ones, on the test set. So does a cell that has no search rows.
def read(paths, search_seeds=()):
    """The rows of these files, each once. search_seeds: whose rows are a search where a row does not say what it is.

    Raises Refusal for what is no file of rows.
    """
    found = {}
    for path in paths:
        if not path.is_file():
            raise lesson.Refusal(f"{path} is no file of rows: there is no such file")
        for row in files.read_rows(path, ROW):
            row = {"role": "search" if row["seed"] in search_seeds else "report"} | row
            check_measures(row, path)
            found.setdefault(identity(row), row)
    return list(found.values())


def check_measures(row, path):
    """Raise Refusal for a row that has no accuracy at the trained length, half a picture, or shares in some cells."""
    official = f"{row['length']} official"
    if "accuracy" not in row and official not in row["cells"]:
        raise lesson.Refusal(f"{path}: a row of {row['mixer']!r} has neither 'accuracy' nor a cell {official!r}")
    if row.get("picture"):
        right, weights = row["picture"]["right"], row["picture"]["weights"]
        if len(right) != len(weights) or len(set(map(len, weights))) > 1:
            raise lesson.Refusal(f"{path}: the 'picture' of a row of {row['mixer']!r} has no weights for each query")
    for field in ("cells", "cells_without_floor"):
        cells = row.get(field, {}).values()
        if len({cell[share] is None for cell in cells for share in ("right", "others", "filler")}) > 1:
            raise lesson.Refusal(f"{path}: a row of {row['mixer']!r} has shares of attention in some {field} only")


def identity(row):
    """What two copies of a row agree in: the run, its role, its settings."""
    names = ("settings", "steps", "warmup", "vocab_size", "batch", "test_lengths")  # experiments/mqar.py; 04
    settings = {name: row.get(name) for name in names}
    return (*cell_of(row), row["learning_rate"], row["seed"], row["role"], json.dumps(settings))


def with_lines_of_their_own(rows):
    """Rows, and behind each that was tested once more with its floor set to 0 a row of that."""
    all_rows = []
    for row in rows:
        all_rows.append(row)
        if row.get("cells_without_floor"):
            changed = {"mixer": row["mixer"] + FLOOR_SET_TO_0, "cells": row["cells_without_floor"], "placed": {}}
            all_rows.append(row | changed | {"picture": None, "full_pass": None})
    return all_rows


def cell_of(row):
    """(mixer, T, K, d)"""
    return row["mixer"], row["length"], row["pairs"], row["d_model"]


def score(row):
    """What a rate is chosen by: the mean accuracy over all tested contexts; the best epoch where there is one."""
    if len(row["cells"]) > 1:
        return fmean(cell["accuracy"] for cell in row["cells"].values())
    return best_accuracy(row)


def best_accuracy(row):
    """That of the best epoch; a row of 04 has only its end."""
    return row["accuracy"] if "accuracy" in row else row["cells"][f"{row['length']} official"]["accuracy"]


def mean_std(values):
    """(mean, standard deviation over seeds): 0 for one seed. Exact sums: `sum` adds otherwise from Python 3.12 on."""
    mean = fmean(values)
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / max(1, len(values) - 1))


def scores_by_rate(rows):
    """{cell: {learning rate: mean score}} over the search rows, over all rows where a cell has none of them."""
    searched = {cell_of(row) for row in rows if row["role"] == "search"}
    scores = {}
    for row in rows:
        if row["role"] == "search" or cell_of(row) not in searched:
            scores.setdefault(cell_of(row), {}).setdefault(row["learning_rate"], []).append(score(row))
    return {cell: {rate: mean_std(rates[rate])[0] for rate in sorted(rates)} for cell, rates in scores.items()}


def best_rates(rows):
    """{cell: learning rate}; the lower one if two are equal."""
    return {cell: max(rates, key=rates.get) for cell, rates in scores_by_rate(rows).items()}


def reported(rows):
    """{cell: its rows at the chosen rate, without those that chose it}; the order is always the same."""
    best, cells = best_rates(rows), {}
    for row in sorted(rows, key=lambda row: (order(row["mixer"]), cell_of(row), row["seed"])):
        if row["role"] == "report" and row["learning_rate"] == best[cell_of(row)]:
            cells.setdefault(cell_of(row), []).append(row)
    return cells


def axes_of(rows):
    """Mixers, (T, K) and widths that occur."""
    mixers = sorted({row["mixer"] for row in rows}, key=order)
    return mixers, sorted({(row["length"], row["pairs"]) for row in rows}), sorted({row["d_model"] for row in rows})


def warn_of_mixed_settings(rows):
    """A cell whose rows were trained or tested in different ways has no mean worth printing: say so."""
    for (mixer, T, K, d), own in reported(rows).items():
        if len({identity(row)[-1] for row in own}) > 1:
            cell = f"{title(mixer)} at T = {T:,}, K = {K}, d = {d}"
            print(f"Careful: the rows of {cell} have different settings; report their files one by one.")


# Accuracy by width and length: the form of the paper's Figure 1 and Table 1
def print_search(rows):
    """Mean score of each rate; the chosen one is marked."""
    scores = scores_by_rate(rows)
    if all(len(values) < 2 for values in scores.values()):
        return
    rates = sorted({rate for values in scores.values() for rate in values})
    seeds = sorted({row["seed"] for row in rows if row["role"] == "search"})
    seeds = f"seeds {', '.join(map(str, seeds))}" if seeds else "the reported seeds"
    print(f"\nMean accuracy by learning rate, on {seeds}; * chosen.\n")
    print(f"{'':18}{'T':>7}{'K':>5}{'d':>5}" + "".join(f"{rate:>10g}" for rate in rates))
    for (mixer, T, K, d), values in sorted(scores.items(), key=lambda item: (item[0][1:], order(item[0][0]))):
        best = max(values, key=values.get)
        marks = ""
        for rate in rates:
            marks += f"{values[rate]:9.3f}{'*' if rate == best else ' '}" if rate in values else f"{'–':>9} "
        print(f"{title(mixer):18}{T:7,}{K:5}{d:5}{marks}")


def print_grid(rows):
    """Best accuracy of any epoch: mean ± std (seeds), the paper's value in brackets; – is missing."""
    mixers, lengths, widths = axes_of(rows)
    cells = reported(rows)
    print("\nBest test accuracy of any epoch: mean ± std (seeds) [the paper's]; – not run.")
    for T, K in lengths:
        print(f"\n{f'T = {T:,}, K = {K}':18}" + "".join(f"{f'd = {d}':>26}" for d in widths))
        for mixer in mixers:
            print(f"{title(mixer):18}" + "".join(f"{grid_entry(cells, mixer, T, K, d):>26}" for d in widths))
    print()
    print_leaders(cells, mixers, lengths, widths)


def grid_entry(cells, mixer, T, K, d):
    """One entry of the grid."""
    paper, own = published(mixer, T, K, d), cells.get((mixer, T, K, d))
    beside = f" [{paper:.2f}]" if paper is not None else ""
    if not own:
        return "–" + beside
    mean, std = mean_std([best_accuracy(row) for row in own])
    return f"{mean:.3f} ± {std:.3f} ({len(own)}){beside}"


def print_leaders(cells, mixers, lengths, widths):
    """Where ReBased leads, and who does where it does not (differences below .005 count as none)."""
    for T, K in lengths:
        for d in widths:
            means = {}
            for mixer in mixers:
                if (mixer, T, K, d) in cells:
                    means[mixer], _ = mean_std([best_accuracy(row) for row in cells[mixer, T, K, d]])
            if "rebased" not in means or len(means) < 2:
                continue
            ahead = [f"{title(mixer)} {mean:.3f}" for mixer, mean in means.items() if mean > means["rebased"] + 0.005]
            others = [mixer for mixer in means if mixer != "rebased"]
            level = [mixer for mixer in others if means[mixer] >= means["rebased"] - 0.005]
            says = "leads"
            if ahead:
                says = f"behind {', '.join(ahead)}"
            elif level:
                says = "level with " + ", ".join(map(title, level))
            print(f"T = {T:,}, d = {d}: ReBased {means['rebased']:.3f}, {says}.")


MOST = 7  # lines in a panel: more cannot be told apart


def parts_of(items):
    """Items in as few parts as hold at most MOST each, of nearly the same size."""
    count = math.ceil(len(items) / MOST)
    parts, start = [], 0
    for i in range(count):
        size = len(items) // count + (i < len(items) % count)
        parts.append(items[start : start + size])
        start += size
    return parts


def draw_grid(rows, path):
    """Accuracy against width. A panel: a length, at most seven mixers, our values or the paper's."""
    mixers, lengths, widths = axes_of(rows)
    cells = reported(rows)
    panels = []
    for T, K in lengths:
        for part in parts_of(mixers):
            own, theirs = {}, {}
            for mixer in part:
                for d in widths:
                    if (mixer, T, K, d) in cells:
                        own.setdefault(title(mixer), {})[d] = [best_accuracy(row) for row in cells[mixer, T, K, d]]
                    if published(mixer, T, K, d) is not None:
                        theirs.setdefault(title(mixer), {})[d] = [published(mixer, T, K, d)]
            panels.append((f"T = {T:,}, {K} pairs", own))
            if theirs:
                panels.append((f"T = {T:,}, {K} pairs: the paper's", theirs))
    figure, axes = panels_of(len(panels), height=3.6)
    if figure is None:
        return
    for axis, (name, lines) in zip(axes, panels, strict=False):
        draw_grid_panel(axis, lines, widths)
        axis.set_title(name)
    shown = ", ".join(map(title, mixers))
    lesson.save_figure(figure, path, f"Best test accuracy against the width of the model: {shown}")


def draw_grid_panel(axis, lines, widths):
    """lines {title: {width: accuracies of the seeds}}; the marks of a width stand beside each other."""
    ends = []
    shown = zip(lines.items(), train_mqar.STYLES, strict=False)
    for i, ((label, seeds), (color, dashes, marker)) in enumerate(shown):
        places = [d * 1.02 ** (i - len(lines) / 2) for d in seeds]
        means = [mean_std(values)[0] for values in seeds.values()]
        lowest = [min(values) for values in seeds.values()]
        highest = [max(values) for values in seeds.values()]
        axis.vlines(places, lowest, highest, color=color, linewidth=1)
        axis.plot(places, means, dashes, marker=marker, markersize=4, color=color)
        ends.append((label, means[-1], color))
    axis.set(xlabel="d_model", ylabel="best test accuracy", xscale="log", ylim=(-0.05, 1.05))
    axis.set_xticks(widths, list(map(str, widths)), minor=False)
    axis.minorticks_off()
    lesson.label_ends(axis, ends)


def panels_of(count, height):
    """A figure of `count` panels, at most two in a row so that it can be read on a phone: (figure, its axes)."""
    columns = min(2, count)
    lines = math.ceil(count / columns)
    figure = lesson.new_figure(4.2 * columns + 0.4, height * lines)
    if figure is None:
        return None, []
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.set_axis_off()
    return figure, axes


# Beyond the trained length: the same weights, longer contexts
PLACEMENTS = ("official", "uniform")


def tested_lengths(rows):
    """The lengths that these rows were tested at with uniform queries."""
    return sorted({int(cell.split()[0]) for row in rows for cell in row["cells"] if cell.endswith("uniform")})


def column(rows, cell, measure):
    """One number a seed; rows without this cell, or without weights to look at, have none."""
    values = [row["cells"][cell].get(measure) for row in rows if cell in row["cells"]]
    return [value for value in values if value is not None]


def spread(values):
    """mean ± std, or – where there is nothing."""
    return "{:.3f} ± {:.3f}".format(*mean_std(values)) if values else "–"


def print_recall(rows):
    """Accuracy and the share of attention on filler, by length, for each mixer."""
    lengths = tested_lengths(rows)
    first = rows[0]
    trained = f"Trained at T = {first['length']} with {first['pairs']} pairs"
    print(f"\n{trained}; the same weights tested at other lengths. Mean ± std over seeds.\n")
    print(f"{'':18}{'lr':>6}{'n':>3}  {'queries':20}" + "".join(f"{f'T = {T:,}':>15}" for T in lengths))
    for (mixer, *_), own in reported(rows).items():
        head = f"{title(mixer):18}{own[0]['learning_rate']:6g}{len(own):3}"
        for measure, name in (("accuracy", ""), ("filler", ", on filler")):
            for placement in PLACEMENTS:
                entries = ""
                for T in lengths:
                    entries += f"{spread(column(own, f'{T} {placement}', measure)):>15}"
                print(f"{head:27}  {placement + name:20}{entries}")
                head = ""


def read_recall(rows):
    """The sentences under the table, from its numbers."""
    T, cells = max(tested_lengths(rows)), reported(rows)
    means = {}
    for (mixer, *_), own in cells.items():
        values = column(own, f"{T} uniform", "accuracy")
        if values:
            means[mixer], _ = mean_std(values)
    print(f"\nAt {T:,} tokens, {T / rows[0]['length']:g} times the trained length, queries anywhere: "
          + ", ".join(f"{title(mixer)} {mean:.3f}" for mixer, mean in means.items()) + ".")
    if {"based", "based_no_floor", "rebased", "rebased_floor"} <= set(means):
        if max(means["based"], means["rebased_floor"]) < min(means["rebased"], means["based_no_floor"]):
            print("Both kernels with a floor of ½ lie below both without: taking the ½ from Based repairs it, giving\n"
                  "it to ReBased breaks it. The floor costs recall here; γ, β and the normalisation are not needed.")
        else:
            print("The order of the four kernels does not follow the floor in this run.")
    passes = [row["full_pass"] for row in rows if row["mixer"] == "rebased" and row.get("full_pass")]
    for cost in passes[:1]:
        chunked, quadratic = cost["chunked_seconds"] * 1e3, cost["quadratic_seconds"] * 1e3
        print(f"Linear time: all {cost['length']:,} positions of one sequence took {chunked:.0f} ms through the\n"
              f"chunked form, {quadratic:.0f} ms through the quadratic one.")


def draw_recall(rows, path):
    """Accuracy and share on filler against length. Up to seven lines as in 04, else two panels for each kernel."""
    lengths = tested_lengths(rows)
    cells = {}
    for (mixer, *_), own in reported(rows).items():
        cells.setdefault(mixer, own)
    longest = f"{max(lengths)} uniform"
    if len(cells) <= MOST and all(len(column(own, longest, "filler")) == len(own) for own in cells.values()):
        lines = {title(mixer): [row["cells"] for row in own] for mixer, own in cells.items()}
        return train_mqar.draw_figure(lines, lengths, path)
    families = {}  # {kernel without its floor: its variants}; softmax is drawn into every panel
    for mixer in cells:
        if mixer != "conv_attention":
            families.setdefault(without_floor(mixer.removesuffix(FLOOR_SET_TO_0)), []).append(mixer)
    figure, axes = panels_of(2 * len(families), height=2.6)
    if figure is None:
        return
    panels = [(kernel, measure) for kernel in families for measure in train_mqar.MEASURES]
    for axis, (kernel, measure) in zip(axes, panels, strict=True):
        lines = {}
        for mixer in ["conv_attention", *sorted(families[kernel], key=has_floor)]:
            if mixer in cells and len(column(cells[mixer], longest, measure)) == len(cells[mixer]):
                lines[title(mixer)] = [row["cells"] for row in cells[mixer]]
        train_mqar.draw_panel(axis, lines, lengths, "uniform", measure)
        axis.set_title(f"{title(kernel)}: {train_mqar.MEASURES[measure]}", fontsize=10)
    for axis in axes[-2:]:
        axis.set_xlabel(f"tokens (trained at {rows[0]['length']})")
    says = "Accuracy and share of attention on filler against the length of the context, queries anywhere"
    names = ", ".join(map(title, cells))
    lesson.save_figure(figure, path, f"{says}; every kernel without and with a floor of ½: {names}")


# A controlled experiment: every kernel with a floor of ½ and without one
LEARNED = 0.9  # a cell has learned the task if its mean accuracy at the trained length is above this


def print_floors(rows):
    """One line a kernel at the longest context, uniform queries: without the floor, and with it."""
    cells, T = {mixer: own for (mixer, *_), own in reported(rows).items()}, max(tested_lengths(rows))
    pairs = [(without_floor(mixer), mixer) for mixer in cells if has_floor(mixer) and without_floor(mixer) in cells]
    if len(pairs) < 3:
        return
    print(f"\nThe same kernel without a floor | with a floor of ½, at T = {T:,}, queries anywhere; mean ± std.\n")
    print(f"{'':18}{'accuracy':^33}{'share on filler':^33}{'share on the right pair':^33}")
    for pair in pairs:
        entries = ""
        for measure in ("accuracy", "filler", "right"):
            entries += f"{' | '.join(spread(column(cells[mixer], f'{T} uniform', measure)) for mixer in pair):^33}"
        print(f"{title(pair[0]):18}{entries}")
    print()
    for placement in reversed(PLACEMENTS):
        print(read_floors(cells, pairs, T, placement))


def read_floors(cells, pairs, T, placement):
    """In how many of the kernels that have learned the task the floor costs every seed."""
    learned, below, others = 0, 0, []
    for pair in pairs:
        trained = f"{cells[pair[0]][0]['length']} official"
        without, with_floor = (column(cells[mixer], f"{T} {placement}", "accuracy") for mixer in pair)
        separate = max(with_floor) < min(without)
        if all(mean_std(column(cells[mixer], trained, "accuracy"))[0] > LEARNED for mixer in pair):
            learned += 1
            below += separate
        else:
            others.append(f"{title(pair[0])} ({'also so' if separate else 'not so'})")
    text = (f"{placement.capitalize()} queries: in {below} of {learned} kernels that learned the task every seed with\n"
            "the floor lies below every seed without it.")
    return text + (f" Did not learn it: {', '.join(others)}." if others else "")


# What the attention looks like
def print_look(rows):
    """At the trained length: shares of the attention, and the IoU with the truth; the paper's where T and K are its."""
    shown = {}
    for cell, own in reported(rows).items():
        if column(own, f"{cell[1]} official", "iou"):
            shown[cell] = own
    if not shown:
        return
    print("\nWhere the attention of the queries goes at the trained length (official queries), and its IoU with the\n"
          "truth, by two rules. Hard: a place counts as attended if it has at least half of the largest weight of its\n"
          "row; the places of the right pair count as one. Soft: r/(2 − r), where r is the share on the right pair.\n")
    heads = f"{'accuracy':>10}{'right pair':>12}{'other pairs':>12}{'filler':>9}{'hard IoU':>10}{'soft IoU':>16}"
    print(f"{'':18}{'T':>6}{'K':>5}{'d':>5}{heads}")
    for (mixer, T, K, d), own in shown.items():
        means = {}
        for measure in ("accuracy", "right", "others", "filler", "iou"):
            means[measure], _ = mean_std(column(own, f"{T} official", measure))
        beside = f" [{IOU[mixer]:.3f}]" if mixer in IOU and (T, K) == IOU_CELL else ""
        soft = f"{means['right'] / (2 - means['right']):.3f}{beside}"
        line = f"{title(mixer):18}{T:6,}{K:5}{d:5}{means['accuracy']:10.3f}{means['right']:12.3f}"
        print(line + f"{means['others']:12.3f}{means['filler']:9.3f}{means['iou']:10.3f}{soft:>16}")
    if not any(cell[1:3] == IOU_CELL for cell in shown):
        T, K = IOU_CELL
        print(f"(The paper's IoU, by a rule it does not state, is of T = {T}, K = {K}: not among these rows.)")


def draw_look(rows, path):
    """The attention of one test example at its queries, for the first seed of each mixer that has a picture.

    Queries are sorted by the place they ask for. Of the context the pairs are drawn. A frame stands around the places
    of the right pair and leaves them to be seen.
    """
    shown = [own[0] for own in reported(rows).values() if own[0].get("picture")]
    figure, axes = panels_of(len(shown), height=2.4) if shown else (None, [])
    if figure is None:
        return
    for axis, row in zip(axes, shown, strict=False):
        pairs_end = 2 * row["pairs"]
        by_place = sorted(zip(row["picture"]["right"], row["picture"]["weights"], strict=True))
        weights = [query[:pairs_end] for _, query in by_place]
        axis.imshow(weights, aspect="auto", cmap="Greys", vmin=0, interpolation="nearest")
        for i, (right, _) in enumerate(by_place):
            frame_x = [right - 1.5, right + 1.5, right + 1.5, right - 1.5, right - 1.5]
            axis.plot(frame_x, [i - 0.5, i - 0.5, i + 0.5, i + 0.5, i - 0.5], color="tab:red", linewidth=0.8)
        beyond = 1 - sum(map(sum, weights)) / len(weights)
        name = f"{title(row['mixer'])}, d = {row['d_model']}"
        axis.set_title(f"{name}: {max(0, beyond):.2f} beyond the pairs", fontsize=9)
        axis.set(yticks=[], xlim=(-0.8, pairs_end + 0.8), ylim=(len(weights) - 0.3, -0.7))
    figure.supxlabel("place among the pairs (framed: key and value asked for, and the token after them)", fontsize=9)
    figure.supylabel("query, sorted by what it asks for", fontsize=9)
    names = ", ".join(title(row["mixer"]) for row in shown)
    lesson.save_figure(figure, path, f"The weights that queries give to the pairs, the right one framed: {names}")


# γ and β over training (the paper's Figure 10)
PLACED = {"gamma_q": "γ of q", "gamma_k": "γ of k", "beta_q": "β of q", "beta_k": "β of k"}


def print_placed(rows):
    """Mean and spread of the entries of γ and β after the last epoch, over seeds, and what decay alone leaves of γ."""
    cells = {cell: own for cell, own in reported(rows).items() if own[0].get("placed")}
    if not cells:
        return
    print("\nγ and β after training: mean ± std over their entries, averaged over seeds. They start at 1 and 0; the\n"
          "paper's figure 10 ends near .13 and 0 [1]. Last: the γ that weight decay alone would leave. A mean β\n"
          "near 0 is not a small β: its size is its spread.\n")
    heads = "".join(f"{label:>17}" for label in PLACED.values())
    print(f"{'':18}{'T':>6}{'d':>5}{heads}{'γ by decay':>13}")
    for (mixer, T, _, d), own in cells.items():
        entries = ""
        for name in PLACED:
            ends = [row["placed"][name][-1] for row in own if row["placed"].get(name)]
            entry = "–"
            if ends:
                mean, std = (fmean(values) for values in zip(*ends, strict=True))
                entry = f"{mean:.3f} ± {std:.3f}"
            entries += f"{entry:>17}"
        left = "–"
        if "gamma_q" in own[0]["placed"]:
            left = f"{fmean(decay_alone(row) for row in own):.3f}"
        print(f"{title(mixer):18}{T:6,}{d:5}{entries}{left:>13}")


def decay_alone(row):
    """What AdamW's weight decay of 0.1 would leave of a parameter that starts at 1 and never gets a gradient."""
    settings = row["settings"]
    per_epoch = settings["examples"] // settings["batch"]
    epochs_done = len(row["placed"]["gamma_q"]) - 1  # a row has the beginning, too
    left = 1.0
    for step in range(epochs_done * per_epoch):
        done = step // per_epoch * per_epoch if settings["rate_by_epoch"] else step
        schedule = (1 + math.cos(math.pi * done / (settings["epochs"] * per_epoch))) / 2
        warmup = min(1, (step + 1) / (settings["warmup"] + 1))
        left *= 1 - 0.1 * row["learning_rate"] * warmup * schedule
    return left


def draw_placed(rows, path):
    """Mean (line) and spread (band) of the entries of γ and β by epoch; a panel for each mixer that has them."""
    shown = [own[0] for own in reported(rows).values() if own[0].get("placed")]
    figure, axes = panels_of(len(shown), height=2.6) if shown else (None, [])
    if figure is None:
        return
    for axis, row in zip(axes, shown, strict=False):
        ends = []
        for (name, label), (color, dashes, _) in zip(PLACED.items(), train_mqar.STYLES, strict=False):
            if row["placed"].get(name):
                means, stds = zip(*row["placed"][name], strict=True)
                epochs = range(len(means))
                lower = [mean - std for mean, std in zip(means, stds, strict=True)]
                upper = [mean + std for mean, std in zip(means, stds, strict=True)]
                axis.plot(epochs, means, dashes, color=color)
                axis.fill_between(epochs, lower, upper, color=color, alpha=0.12)
                ends.append((label, means[-1], color))
        axis.set(title=f"{title(row['mixer'])}, d = {row['d_model']}", xlabel="epoch")
        lesson.label_ends(axis, ends, gap=0.11)
    names = ", ".join(title(row["mixer"]) for row in shown)
    lesson.save_figure(figure, path, f"Mean and spread of the entries of γ and β over training: {names}")


# All of it
def figures_of(figure):
    """The files that figures go to: the one named, and two beside it."""
    return figure, figure.with_stem(figure.stem + "_attention"), figure.with_stem(figure.stem + "_gamma_beta")


def figure_paths(text):
    """An argparse type: where the first figure goes, if it can be drawn there and the others beside it."""
    for path in figures_of(Path(text)):
        lesson.figure_path(path)
    return Path(text)


def report(rows, figure):
    """Print every table that these rows can fill and draw its figure; `figure` names the first, others lie beside."""
    rows = with_lines_of_their_own(rows)
    beyond = len(tested_lengths(rows)) > 1
    warn_of_mixed_settings(rows)
    print_recall(rows) if beyond else print_grid(rows)
    print_search(rows)
    if beyond:
        print_floors(rows)
    print_look(rows)
    print_placed(rows)
    if beyond:
        read_recall(rows)
    print()
    first, attention, gamma_beta = figures_of(figure)
    draw_recall(rows, first) if beyond else draw_grid(rows, first)
    draw_look(rows, attention)
    draw_placed(rows, gamma_beta)
    print()


def main(argv=None):
    """Report the rows of the files named."""
    parser = argparse.ArgumentParser(description="Tables and figures from files of rows; trains nothing")
    parser.add_argument("rows", type=Path, nargs="+", help="files that experiments/mqar.py or 04_train_mqar.py wrote")
    parser.add_argument("--search-seeds", type=int, nargs="*", default=(), metavar="SEED",
                        help="for rows that do not say it: seeds whose runs chose the rate and are not reported")
    parser.add_argument("--figure", type=figure_paths, default="runs/mqar_report.png",
                        help="the first figure (%(default)s)")
    options = lesson.parse_arguments(parser, argv)
    rows = lesson.obey(lambda: read(options.rows, options.search_seeds), "nothing was written")
    if not rows:
        parser.error(f"no rows in {', '.join(map(str, options.rows))}")
    report(rows, options.figure)


if __name__ == "__main__":
    main()
