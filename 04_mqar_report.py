"""04 · The report: tables and figures of associative recall, from rows alone

Aim: say what a file of results says, with the paper's number beside every number that the paper has.

You will learn
  1. how a learning rate is chosen without looking at the runs that are reported;
  2. what the paper published for this task (its Figure 1 and Table 1), and how far a laptop's cells are from that;
  3. what the attention of a trained model looks like, as numbers and as a picture;
  4. where γ and β go in training.

Nothing is trained here. A row is a dictionary that 04_train_mqar.py wrote: the run (mixer, length, pairs, d_model,
learning_rate, seed), its settings, accuracy on the test set after every epoch, and per tested length and placement of
the queries the accuracy and where the attention went. A *cell* is all rows of one mixer, length, pairs and d_model.

Letters: T length, K pairs, d the width d_model; seeds in a cell: n.

References: [P] as in 01; [F] its Figure 1, which gives no numbers: read by eye, ±.02; [Z] as in 04_train_mqar.

Run: python 04_mqar_report.py results/mqar_laptop.jsonl     (5 seconds; any number of files; figures go to runs/)
"""
# %%
import argparse
import json
import math
import sys
from importlib import import_module
from pathlib import Path

kernels = import_module("01_kernels")

TITLES = {
    "attention": "softmax", "conv_attention": "conv + softmax", "rebased": "ReBased", "based": "Based",
    "based_no_floor": "Based − ½", "rebased_floor": "ReBased + ½", "based_norm": "Based + norm",
    "based_norm_no_floor": "Based + norm − ½", "mamba": "Mamba", "rwkv": "RWKV-4", "elu": "elu + 1",
    "x2": "x²", "norm": "norm(x)²", "gamma": "(γx)²", "gamma_beta": "(γx+β)²", "elementwise": "element-wise",
}


def title(mixer):
    """What a table calls a mixer."""
    return TITLES.get(mixer) or title(mixer.removesuffix("_floor")) + " + ½"

def order(mixer):
    """Where a mixer stands in a table: as in TITLES, what is not there right after its own kernel without a floor."""
    name = mixer if mixer in TITLES else mixer.removesuffix("_floor")
    return list(TITLES).index(name), mixer

# %% What the paper published
# Figure 1: accuracy at d = 64, 128, 256, 512 where K = T/8 (16 at 128) or T/4 [F]. Table 1: the ablation, K = 32 [P].
FIGURE_1 = {  # (T, K): {mixer: accuracies}
    (128, 16): {"rebased": (1, 1, 1, 1), "based": (1, 1, 1, 1), "mamba": (0.73, 0.77, 0.99, 0.98),
                "rwkv": (0.10, 0.25, 0.54, 0.82), "conv_attention": (1, 1, 1, 1)},
    (256, 64): {"rebased": (0.97, 0.99, 1, 1), "based": (0.99, 1, 1, 1), "mamba": (0.09, 0.12, 0.19, 0.34),
                "rwkv": (0, 0, 0, 0), "conv_attention": (1, 1, 1, 1)},
    (512, 128): {"rebased": (0.89, 0.99, 1, 1), "based": (0.90, 0.99, 1, 1), "mamba": (0, 0.02, 0.39, 0.20),
                 "rwkv": (0, 0, 0, 0), "conv_attention": (1, 1, 1, 1)},
    (1024, 256): {"rebased": (0.55, 0.98, 0.99, 1), "based": (0.33, 0.99, 0.99, 1), "mamba": (0, 0, 0, 0.17),
                  "rwkv": (0, 0, 0, 0), "conv_attention": (1, 1, 1, 1)},
    (2048, 512): {"rebased": (0.07, 0.66, 0.98, 0.99), "based": (0.14, 0.49, 0.98, 0.99), "mamba": (0, 0, 0, 0),
                  "rwkv": (0, 0, 0, 0), "conv_attention": (1, 1, 1, 1)},
}
TABLE_1 = {  # (T, K): {mixer: accuracies at d = 16, 24, 32, 48}
    (256, 32): {"based": (0.06, 0.45, 0.82, 0.99), "x2": (0.05, 0.47, 0.64, 0.99), "norm": (0.09, 0.39, 0.84, 0.97),
                "gamma": (0.02, 0.35, 0.71, 0.98), "gamma_beta": (0.06, 0.51, 0.89, 0.99),
                "rebased": (0.09, 0.59, 0.86, 0.99)},
    (2048, 32): {"based": (0.02, 0.40, 0.66, 0.99), "x2": (0.03, 0.33, 0.46, 0.93), "norm": (0.05, 0.56, 0.72, 0.99),
                 "gamma": (0.02, 0.26, 0.65, 0.98), "gamma_beta": (0.06, 0.50, 0.85, 0.99),
                 "rebased": (0.04, 0.58, 0.83, 0.99)},
}
IOU = {"attention": 0.999, "based": 0.157, "rebased": 0.173}  # T = 128, K = 32; how it was binarised is not stated [P 5.6]


def published(mixer, T, K, d):
    """The paper's accuracy of a cell, or None."""
    for table, widths in ((FIGURE_1, (64, 128, 256, 512)), (TABLE_1, (16, 24, 32, 48))):
        values = table.get((T, K), {}).get(mixer)
        if values and d in widths:
            return values[widths.index(d)]

# %% From rows to cells
# The learning rate of a cell has the best mean score over its search seeds; rows of search seeds are not reported. The
# paper had no such seeds: it chose by the mean over the reported ones, on the test set, and so does its preset.
def cell_of(row):
    """(mixer, T, K, d)"""
    return row["mixer"], row["length"], row["pairs"], row["d_model"]


def score(row):
    """What a learning rate is chosen by: the mean accuracy over all tested contexts, or the best epoch if there is one."""
    if len(row["cells"]) > 1:
        return sum(cell["accuracy"] for cell in row["cells"].values()) / len(row["cells"])
    return row["accuracy"]


def mean_std(values):
    """(mean, standard deviation over seeds): 0 for one seed."""
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1))


def scores_by_rate(rows, search_seeds):
    """{cell: {learning rate: mean score}} over the search seeds, over all seeds where a cell has none of them."""
    scores, searched = {}, {cell_of(row) for row in rows if row["seed"] in search_seeds}
    for row in rows:
        if row["seed"] in search_seeds or cell_of(row) not in searched:
            scores.setdefault(cell_of(row), {}).setdefault(row["learning_rate"], []).append(score(row))
    return {cell: {rate: mean_std(rates[rate])[0] for rate in sorted(rates)} for cell, rates in scores.items()}


def best_rates(rows, search_seeds):
    """{cell: learning rate}; the lower one if two are equal."""
    return {cell: max(rates, key=rates.get) for cell, rates in scores_by_rate(rows, search_seeds).items()}


def reported(rows, search_seeds):
    """{cell: its rows at the chosen rate, on seeds that did not choose it}; the order is always the same."""
    best, cells = best_rates(rows, search_seeds), {}
    for row in sorted(rows, key=lambda row: (order(row["mixer"]), cell_of(row), row["seed"])):
        if row["seed"] not in search_seeds and row["learning_rate"] == best[cell_of(row)]:
            cells.setdefault(cell_of(row), []).append(row)
    return cells


def axes_of(rows):
    """Mixers, (T, K) and widths that occur."""
    return (sorted({row["mixer"] for row in rows}, key=order), sorted({(row["length"], row["pairs"]) for row in rows}),
            sorted({row["d_model"] for row in rows}))

# %% Accuracy by width and length: the form of the paper's Figure 1 and Table 1
def print_search(rows, search_seeds):
    """Mean score of each rate; the chosen one is marked."""
    scores = scores_by_rate(rows, search_seeds)
    if all(len(values) < 2 for values in scores.values()):
        return
    rates = sorted({rate for values in scores.values() for rate in values})
    seeds = f"seeds {', '.join(map(str, search_seeds))}" if search_seeds else "the reported seeds"
    print(f"\nMean accuracy by learning rate, on {seeds}; * chosen.\n")
    print(f"{'':18}{'T':>7}{'K':>5}{'d':>5}" + "".join(f"{rate:>10g}" for rate in rates))
    for (mixer, T, K, d), values in sorted(scores.items(), key=lambda item: (item[0][1:], order(item[0][0]))):
        best = max(values, key=values.get)
        marks = (f"{values[rate]:9.3f}{'*' if rate == best else ' '}" if rate in values else f"{'–':>9} " for rate in rates)
        print(f"{title(mixer):18}{T:7,}{K:5}{d:5}{''.join(marks)}")


def print_grid(rows, search_seeds):
    """Best accuracy of any epoch: mean ± std (seeds), the paper's value in brackets; – is missing."""
    mixers, lengths, widths = axes_of(rows)
    cells = reported(rows, search_seeds)
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
    mean, std = mean_std([row["accuracy"] for row in own])
    return f"{mean:.3f} ± {std:.3f} ({len(own)}){beside}"


def print_leaders(cells, mixers, lengths, widths):
    """Where ReBased leads, and who does where it does not (differences below .005 count as none)."""
    for T, K in lengths:
        for d in widths:
            means = {mixer: mean_std([row["accuracy"] for row in cells[mixer, T, K, d]])[0]
                     for mixer in mixers if (mixer, T, K, d) in cells}
            if "rebased" not in means or len(means) < 2:
                continue
            ahead = [f"{title(mixer)} {mean:.3f}" for mixer, mean in means.items() if mean > means["rebased"] + 0.005]
            rest = [mixer for mixer, mean in means.items() if mixer != "rebased" and mean >= means["rebased"] - 0.005]
            says = f"behind {', '.join(ahead)}" if ahead else "level with " + ", ".join(map(title, rest)) if rest else "leads"
            print(f"T = {T:,}, d = {d}: ReBased {means['rebased']:.3f}, {says}.")


def draw_grid(rows, search_seeds, path):
    """Accuracy against width, a panel for each length, bars of one std; the paper's values as crosses, dotted."""
    plt = kernels.pyplot()
    if plt is None:
        return
    mixers, lengths, widths = axes_of(rows)
    cells = reported(rows, search_seeds)
    figure, axes = plt.subplots(1, len(lengths), figsize=(1.5 + 4 * len(lengths), 4), layout="constrained", squeeze=False)
    for axis, (T, K) in zip(axes[0], lengths, strict=True):
        for i, mixer in enumerate(mixers):
            own = [(d, *mean_std([row["accuracy"] for row in cells[mixer, T, K, d]]))
                   for d in widths if (mixer, T, K, d) in cells]
            theirs = [(d, published(mixer, T, K, d)) for d in widths if published(mixer, T, K, d) is not None]
            if own:
                d, mean, std = zip(*own, strict=True)
                beside = [x * (1 + 0.02 * (i - 3)) for x in d]  # so that bars do not hide each other
                axis.errorbar(beside, mean, std, marker="o", capsize=3, color=f"C{i}", label=title(mixer))
            if theirs:
                axis.plot(*zip(*theirs, strict=True), "x:", color=f"C{i}", alpha=0.6)
        axis.set(title=f"T = {T:,}, {K} pairs", xlabel="d_model", xscale="log", ylim=(-0.05, 1.15))
        axis.set_xticks(widths, list(map(str, widths)), minor=False)
        axis.minorticks_off()
    any_published = any(published(mixer, T, K, d) is not None for mixer in mixers for T, K in lengths for d in widths)
    axes[0, 0].set_ylabel("best test accuracy" + " (× the paper's)" * any_published)
    labels = {label: mark for axis in axes[0] for mark, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(labels.values(), labels.keys(), frameon=False, fontsize=8, loc="outside right upper")
    save(figure, path)


def save(figure, path):
    """Write a figure and say where."""
    figure.savefig(path, dpi=120)
    print(f"figure: {path}")

# %% Beyond the trained length: the same weights, longer contexts
PLACEMENTS = ("official", "uniform")


def tested_lengths(rows):
    """The lengths that these rows were tested at with uniform queries."""
    return sorted({int(cell.split()[0]) for row in rows for cell in row["cells"] if cell.endswith("uniform")})


def column(rows, cell, measure):
    """One number a seed; rows without this cell have none."""
    return [row["cells"][cell][measure] for row in rows if cell in row["cells"]]


def spread(values):
    """mean ± std, or – where there is nothing."""
    return "{:.3f} ± {:.3f}".format(*mean_std(values)) if values else "–"


def print_recall(rows, search_seeds):
    """Accuracy and the share of attention on filler, by length, for each mixer."""
    lengths = tested_lengths(rows)
    first = rows[0]
    print(f"\nTrained at T = {first['length']} with {first['pairs']} pairs; the same weights tested at other lengths. "
          "Mean ± std over seeds.\n")
    print(f"{'':18}{'lr':>6}{'n':>3}  {'queries':17}" + "".join(f"{f'T = {T:,}':>15}" for T in lengths))
    for (mixer, *_), own in reported(rows, search_seeds).items():
        lines = [(placement, "accuracy", placement) for placement in PLACEMENTS] + [("share on filler", "filler", "uniform")]
        for i, (label, measure, placement) in enumerate(lines):
            head = f"{title(mixer):18}{own[0]['learning_rate']:6g}{len(own):3}" if i == 0 else " " * 27
            entries = (spread(column(own, f"{T} {placement}", measure)) for T in lengths)
            print(f"{head}  {label:17}" + "".join(f"{entry:>15}" for entry in entries))


def read_recall(rows, search_seeds):
    """The sentences under the table, from its numbers."""
    T, cells = max(tested_lengths(rows)), reported(rows, search_seeds)
    means = {mixer: mean_std(column(own, f"{T} uniform", "accuracy"))[0] for (mixer, *_), own in cells.items()}
    print(f"\nAt {T:,} tokens, {T // rows[0]['length']} times the trained length, queries anywhere: "
          + ", ".join(f"{title(mixer)} {mean:.3f}" for mixer, mean in means.items()) + ".")
    if {"based", "based_no_floor", "rebased", "rebased_floor"} <= set(means):
        if max(means["based"], means["rebased_floor"]) < min(means["rebased"], means["based_no_floor"]):
            print("Both kernels with a floor of ½ lie below both without: taking the ½ from Based repairs it, giving it to "
                  "ReBased breaks it.\nThe floor is what costs recall here; γ, β and the normalisation are not needed for this.")
        else:
            print("The order of the four kernels does not follow the floor in this run.")
    passes = [row["full_pass"] for row in rows if row["mixer"] == "rebased" and row["full_pass"]]
    for cost in passes[:1]:
        print(f"Linear time: all {cost['length']:,} positions of one sequence took {cost['chunked_seconds'] * 1e3:.0f} ms "
              f"through the chunked form, {cost['quadratic_seconds'] * 1e3:.0f} ms through the quadratic one.")


def draw_recall(rows, search_seeds, path):
    """Accuracy and share of attention on filler against length, uniform queries; a dot per seed, lines through means."""
    plt = kernels.pyplot()
    if plt is None:
        return
    lengths, cells = tested_lengths(rows), reported(rows, search_seeds)
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    bases = list(dict.fromkeys(without_floor(mixer) for mixer, *_ in cells))
    for axis, measure in zip(axes, ("accuracy", "filler"), strict=True):
        for i, ((mixer, *_), own) in enumerate(cells.items()):
            values = [column(own, f"{T} uniform", measure) for T in lengths]
            many = len(cells) > 6  # the ladder: one colour a kernel, dashed where it has a floor
            style = {"color": f"C{bases.index(without_floor(mixer))}", "linestyle": "--" if has_floor(mixer) else "-"} if many \
                else {"color": f"C{i}"}
            axis.plot(lengths, [mean_std(v)[0] for v in values], label=title(mixer), **style)
            for T, dots in zip(lengths, values, strict=True):
                axis.plot([T] * len(dots), dots, "o", color=style["color"], markersize=2 if many else 3, alpha=0.5)
        axis.axvline(rows[0]["length"], color="gray", linestyle=":", linewidth=1)
        axis.set(xlabel=f"context length T (trained at {rows[0]['length']})", xscale="log", ylim=(-0.03, 1.03))
        axis.set_xticks(lengths, [f"{T:,}" for T in lengths], minor=False)
        axis.minorticks_off()
    axes[0].set_title("accuracy (queries anywhere)")
    axes[1].set_title("share of attention on filler")
    axes[0].legend(frameon=False, fontsize=7 if many else 10, ncols=2 if many else 1)
    save(figure, path)

# %% A controlled experiment: every kernel with a floor of ½ and without one
def has_floor(mixer):
    """Whether a kernel's similarity has a floor of ½."""
    return mixer in ("based", "based_norm") or mixer.endswith("_floor") and not mixer.endswith("_no_floor")


def without_floor(mixer):
    """The name of the same kernel without its floor."""
    return mixer + "_no_floor" if mixer in ("based", "based_norm") else mixer.removesuffix("_floor") \
        if has_floor(mixer) else mixer


def print_floors(rows, search_seeds):
    """One line a kernel at the longest context, uniform queries: without the floor, and with it."""
    cells, T = {mixer: own for (mixer, *_), own in reported(rows, search_seeds).items()}, max(tested_lengths(rows))
    pairs = [(without_floor(mixer), mixer) for mixer in cells if has_floor(mixer) and without_floor(mixer) in cells]
    if len(pairs) < 3:
        return
    print(f"\nThe same kernel without a floor | with a floor of ½, at T = {T:,}, queries anywhere; mean ± std.\n")
    print(f"{'':18}{'accuracy':^33}{'share on filler':^33}{'share on the right pair':^33}")
    lower = 0
    for pair in pairs:
        entries = (f"{' | '.join(spread(column(cells[mixer], f'{T} uniform', measure)) for mixer in pair):^33}"
                   for measure in ("accuracy", "filler", "right"))
        print(f"{title(pair[0]):18}{''.join(entries)}")
        accuracies = [column(cells[mixer], f"{T} uniform", "accuracy") for mixer in pair]
        lower += max(accuracies[1]) < min(accuracies[0])
    print(f"\nIn {lower} of {len(pairs)} kernels every seed with the floor lies below every seed without it.")

# %% What the attention looks like
def print_look(rows, search_seeds):
    """At the trained length: shares of the attention and the IoU with the truth, the paper's beside it."""
    print("\nWhere the attention of the queries goes at the trained length (official queries), and its IoU with the truth: a "
          "place counts as\nattended if it has at least half of the largest weight of its row; the places of the right pair "
          "count as one [T = 128, K = 32, P 5.6].\n")
    print(f"{'':18}{'T':>6}{'d':>5}{'accuracy':>10}{'right pair':>12}{'other pairs':>12}{'filler':>9}{'IoU':>16}")
    for (mixer, T, _, d), own in reported(rows, search_seeds).items():
        name = f"{T} official"
        if column(own, name, "iou") and None not in column(own, name, "iou"):
            means = [mean_std(column(own, name, measure))[0] for measure in ("accuracy", "right", "others", "filler", "iou")]
            beside = f" [{IOU[mixer]:.3f}]" if mixer in IOU else ""
            print(f"{title(mixer):18}{T:6,}{d:5}{means[0]:10.3f}{means[1]:12.3f}{means[2]:12.3f}{means[3]:9.3f}"
                  f"{f'{means[4]:.3f}{beside}':>16}")


def draw_look(rows, search_seeds, path):
    """The attention of one test example at its queries, for the first seed of each mixer that has a picture."""
    shown = [own[0] for own in reported(rows, search_seeds).values() if own[0].get("picture")]
    plt = kernels.pyplot() if shown else None
    if plt is None:
        return
    columns = min(3, len(shown))
    lines = math.ceil(len(shown) / columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.3 * columns, 2 * lines + 0.4), layout="constrained", squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    for axis, row in zip(axes.flat, shown, strict=False):
        picture = row["picture"]
        axis.imshow(picture["weights"], aspect="auto", cmap="Greys", vmin=0, interpolation="nearest")
        axis.plot(picture["right"], range(len(picture["right"])), "o", markersize=5, markerfacecolor="none", color="C3")
        axis.set(title=f"{title(row['mixer'])}, d = {row['d_model']}", yticks=[])
    figure.supxlabel("place in the context (circle: the value asked for)", fontsize=9)
    figure.supylabel("query", fontsize=9)
    save(figure, path)

# %% γ and β over training (the paper's Figure 10)
PLACED = {"gamma_q": "γ of q", "gamma_k": "γ of k", "beta_q": "β of q", "beta_k": "β of k"}


def print_placed(rows, search_seeds):
    """Mean and spread of the entries of γ and β after the last epoch, over seeds."""
    cells = {cell: own for cell, own in reported(rows, search_seeds).items() if own[0]["placed"]}
    if not cells:
        return
    print("\nγ and β after training: mean ± std over their entries, averaged over seeds. They start at 1 and 0; the paper's\n"
          "figure 10 ends near .13 and 0 [P].\n")
    print(f"{'':18}{'T':>6}{'d':>5}" + "".join(f"{label:>17}" for label in PLACED.values()))
    for (mixer, T, _, d), own in cells.items():
        entries = []
        for name in PLACED:
            ends = [row["placed"][name][-1] for row in own if row["placed"].get(name)]
            entries.append("{:.3f} ± {:.3f}".format(*(sum(x) / len(ends) for x in zip(*ends, strict=True))) if ends else "–")
        print(f"{title(mixer):18}{T:6,}{d:5}" + "".join(f"{entry:>17}" for entry in entries))


def draw_placed(rows, search_seeds, path):
    """Mean (line) and spread (band) of the entries of γ and β after each epoch; a panel for each mixer that has them."""
    shown = [own[0] for own in reported(rows, search_seeds).values() if own[0]["placed"]]
    plt = kernels.pyplot() if shown else None
    if plt is None:
        return
    columns = min(4, len(shown))
    lines = math.ceil(len(shown) / columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3.4 * columns, 2.6 * lines), layout="constrained", squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    for axis, row in zip(axes.flat, shown, strict=False):
        for i, (name, label) in enumerate(PLACED.items()):
            means, stds = zip(*row["placed"].get(name) or [(math.nan, 0)], strict=True)
            epochs = range(len(means))
            axis.plot(epochs, means, color=f"C{i}", label=label)
            axis.fill_between(epochs, [m - s for m, s in zip(means, stds, strict=True)],
                              [m + s for m, s in zip(means, stds, strict=True)], color=f"C{i}", alpha=0.15)
        axis.set(title=f"{title(row['mixer'])}, d = {row['d_model']}", xlabel="epoch")
    axes[0, 0].legend(frameon=False, fontsize=8)
    save(figure, path)

# %% All of it
def report(rows, search_seeds, figure):
    """Print every table that these rows can fill and draw its figure; `figure` names the first, others go beside it."""
    beyond = len(tested_lengths(rows)) > 1
    (print_recall, print_grid)[not beyond](rows, search_seeds)
    print_search(rows, search_seeds)
    if beyond:
        print_floors(rows, search_seeds)
    print_look(rows, search_seeds)
    print_placed(rows, search_seeds)
    if beyond:
        read_recall(rows, search_seeds)
    print()
    (draw_recall, draw_grid)[not beyond](rows, search_seeds, figure)
    draw_look(rows, search_seeds, figure.with_stem(figure.stem + "_attention"))
    draw_placed(rows, search_seeds, figure.with_stem(figure.stem + "_gamma_beta"))
    print()

# %% Claims
def example_row(mixer, seed, rate, accuracy, d=64):
    """A row as 04_train_mqar writes it, with one cell."""
    cell = {"accuracy": accuracy, "right": 0.5, "others": 0.3, "filler": 0.2, "iou": 0.4}
    return {"mixer": mixer, "length": 128, "pairs": 16, "d_model": d, "learning_rate": rate, "seed": seed,
            "accuracy": accuracy, "cells": {"128 official": cell}, "placed": {}, "picture": None, "full_pass": None}


def check_rates_are_chosen_on_other_seeds():
    """The search seeds choose; a rate that is best on the reported seeds alone is not taken."""
    rows = [example_row("rebased", 100, 0.001, 0.9), example_row("rebased", 100, 0.01, 0.8),
            example_row("rebased", 0, 0.001, 0.3), example_row("rebased", 0, 0.01, 1.0)]
    (cell,) = reported(rows, (100,)).values()
    assert [row["accuracy"] for row in cell] == [0.3]
    (cell,) = reported(rows, ()).values()  # the paper's way: .65 and .9 over both seeds
    assert [row["accuracy"] for row in cell] == [1.0, 0.8]


def check_mean_and_std():
    """By hand: 1, 2, 6 have mean 3 and standard deviation √7."""
    mean, std = mean_std([1, 2, 6])
    assert mean == 3 and abs(std - math.sqrt(7)) < 1e-12 and mean_std([4]) == (4, 0)


def check_the_papers_numbers_are_found():
    """Figure 1 and Table 1, and nothing where the paper has nothing."""
    assert published("rebased", 1024, 256, 64) == 0.55 and published("based", 256, 32, 24) == 0.45
    assert published("elu", 128, 16, 64) is None and published("rebased", 128, 16, 32) is None


def check_every_floor_has_its_kernel():
    """The names with and without a floor go together, for every polynomial kernel of 01 and the element-wise one."""
    names = [name for name in kernels.all_kernels(2) if name != "elu"]
    floored = [name for name in names if has_floor(name)]
    assert sorted(map(without_floor, floored)) == sorted(set(names) - set(floored)) and all(map(title, names))


CHECKS = [check_rates_are_chosen_on_other_seeds, check_mean_and_std, check_the_papers_numbers_are_found,
          check_every_floor_has_its_kernel]


def main(argv=None):
    """Report the rows of the files named; then the checks. Returns how many failed."""
    parser = argparse.ArgumentParser(description="04: tables and figures from files of rows; trains nothing")
    parser.add_argument("rows", type=Path, nargs="*", help="files that 04_train_mqar.py wrote, of one experiment")
    parser.add_argument("--search-seeds", type=int, nargs="*", default=(), metavar="SEED",
                        help="seeds whose runs chose the learning rate and are not reported (as the experiment had them)")
    parser.add_argument("--figure", type=kernels.writable, default="runs/mqar_report.png", help="the first figure (%(default)s)")
    options = kernels.parse_arguments(parser, argv)
    rows = []
    for path in options.rows:
        try:
            rows += [json.loads(line) for line in path.read_text().splitlines()]
            _ = [(cell_of(row), row["seed"], row["placed"]) for row in rows]
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(f"{path} is no file of rows ({type(error).__name__}: {error})")
    if rows:
        report(rows, tuple(options.search_seeds), options.figure)
    return kernels.run_checks(CHECKS)


if __name__ == "__main__":
    if main():
        sys.exit(1)
