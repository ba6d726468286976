"""Tables and the figure of experiments/floor.py, from rows alone.

Differences are taken by seed: runs of one seed have the same examples in the same order and start from the same
weights. Beside a mean difference stand its 95 % interval, by Student's t, and p of the exact permutation test: of all
2^n ways to flip the signs of n differences, the share whose mean is at least as far from 0.
"""

import itertools
import math
import sys
from pathlib import Path
from statistics import mean, median, stdev

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from rebased import lesson

PLACEMENTS = ("uniform", "official")
FAR = 8192  # tokens
NAMES = {
    **{"based": "(1+s)²/2", "rebased": "ReBased", "based_norm": "norm, (1+s)²/2", "x2": "x²", "norm": "norm(x)²"},
    **{"gamma": "(γx)²", "gamma_beta": "(γx+β)²", "elementwise": "element-wise", "cosine": "cosine²"},
}


# Statistics
def t_quantile(dof):
    """The .975 quantile of Student's t, by adding up its density on a fine grid."""
    step = 1e-4
    x = np.arange(0, 60, step) + step / 2
    constant = math.exp(math.lgamma((dof + 1) / 2) - math.lgamma(dof / 2)) / math.sqrt(dof * math.pi)
    below = 0.5 + step * np.cumsum(constant * (1 + x**2 / dof) ** (-(dof + 1) / 2))
    return float(x[np.searchsorted(below, 0.975)])


def interval(values):
    """Mean, and half the width of its 95 % interval (nan for one value)."""
    half = t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return mean(values), half


def permutation_p(differences):
    """Two-sided p of a mean difference of 0: all signs, up to 16 differences."""
    observed = abs(sum(differences)) - 1e-12
    signs = itertools.product((1, -1), repeat=len(differences))
    extreme = sum(abs(sum(s * d for s, d in zip(flip, differences, strict=True))) >= observed for flip in signs)
    return extreme / 2 ** len(differences)


def compare(before, after):
    """One column: the mean of after − before by seed, its interval, how many rose, p."""
    differences = [new - old for old, new in zip(before, after, strict=True)]
    middle, half = interval(differences)
    up = sum(d > 0 for d in differences)
    around = f"[{middle - half:+.3f}, {middle + half:+.3f}]" if len(differences) > 1 else ""
    return f"{middle:+.3f} {around}  up {up}/{len(differences)}  p {permutation_p(differences):.3f}"


def spread(values):
    """mean ± standard deviation."""
    return f"{mean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{mean(values):.3f}"


# Rows
def having(rows, **fields):
    """The rows with these values, by seed."""
    found = [row for row in rows if all(row[name] == value for name, value in fields.items())]
    return sorted(found, key=lambda row: row["seed"])


def column(rows, cell, measure="accuracy", cells="cells"):
    """One number for each row."""
    return [row[cells][cell][measure] for row in rows]


def without_floor(rows, cell, measure="accuracy"):
    """With the floor set to 0 in the trained weights; rows that had none as they are."""
    return [row.get("cells_without_floor", row["cells"])[cell][measure] for row in rows]


def title(kernel, floor):
    name = NAMES.get(kernel, kernel)
    if floor == 0.5 and kernel in ("based", "based_norm"):
        return "Based" if kernel == "based" else "Based + norm"
    return f"{name} + {floor:g}" if floor else name


# dose
def print_dose(rows):
    """Every floor: as trained, against no floor; then the floor set to 0 at test, against as trained."""
    floors = sorted({row["floor"] for row in rows})
    for placement in PLACEMENTS:
        cell = f"{FAR} {placement}"
        print(f"\ndose: accuracy at {FAR:,} tokens, {placement} queries, by the floor in training at 128")
        print(f"{'':11}{'floor':>6} {'n':>3}{'at 128':>8}{'as trained':>16}{'filler':>8}"
              f"{'against floor 0 in training':>45}{'floor := 0':>17}{'against as trained':>45}")
        for kernel in dict.fromkeys(row["kernel"] for row in rows):
            base = {row["seed"]: row for row in having(rows, kernel=kernel, floor=0.0)}
            for floor in floors:
                own = having(rows, kernel=kernel, floor=floor)
                trained = column(own, cell)
                repaired = without_floor(own, cell)
                line = f"{NAMES[kernel]:11}{floor:6g} {len(own):3}{mean(column(own, '128 official')):8.3f}"
                line += f"{spread(trained):>16}{mean(column(own, cell, 'filler')):8.3f}"
                if floor:
                    others = column([base[row["seed"]] for row in own], cell)
                    line += f"{compare(others, trained):>45}{spread(repaired):>17}{compare(trained, repaired):>45}"
                print(line)
    kept = [row for row in rows if row["floor"] >= 0.01]
    before, after = column(kept, f"{FAR} uniform"), without_floor(kept, f"{FAR} uniform")
    up = sum(new > old for old, new in zip(before, after, strict=True))
    print(f"\nFloors from .01 on, uniform queries: the floor set to 0 in the trained weights raises {up} of")
    print(f"{len(kept)} models, from {mean(before):.3f} to {mean(after):.3f} on the mean. At 128 tokens it changes"
          f" {mean(column(kept, '128 official')):.4f} to {mean(without_floor(kept, '128 official')):.4f}.")


# learned
def first_step(history, holds):
    """The first step of a history (steps, loss, accuracy, floor) for which holds(loss, accuracy, floor)."""
    return next((step for step, *rest in history if holds(*rest)), None)


def print_learned(rows):
    print("\nlearned: a floor θ² that starts at ½ and is trained, without weight decay, at 128 tokens")
    print(f"{'':22}{'seed':>5}{'floor at end':>14}{'accuracy > .9':>15}{'floor < .1':>12}{'floor < .01':>13}"
          f"{'8,192 uniform':>15}{'official':>10}{'floor := 0':>12}")
    for row in sorted(rows, key=lambda row: (row["kernel"], row["seed"])):
        history = row["history"]
        learned = first_step(history, lambda loss, accuracy, floor: accuracy > 0.9)
        tenth = first_step(history, lambda loss, accuracy, floor: floor < 0.1)
        hundredth = first_step(history, lambda loss, accuracy, floor: floor < 0.01)
        repaired = without_floor([row], f"{FAR} uniform")[0]
        print(f"{row['kernel']:22}{row['seed']:5}{row['floor_at_end']:14.1e}{learned or '-':>15}{tenth or '-':>12}"
              f"{hundredth or '-':>13}{row['cells'][f'{FAR} uniform']['accuracy']:15.3f}"
              f"{row['cells'][f'{FAR} official']['accuracy']:10.3f}{repaired:12.3f}")
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        own = having(rows, kernel=kernel)
        ends = [row["floor_at_end"] for row in own]
        print(f"{kernel}: n {len(own)}, floor at the end: median {median(ends):.1e}, from {min(ends):.1e} to "
              f"{max(ends):.1e}; accuracy at {FAR:,}, uniform {spread(column(own, f'{FAR} uniform'))}, "
              f"official {spread(column(own, f'{FAR} official'))}")


# predict
def mean_share(a, fillers):
    """The law of 01: the mean over queries of n·a / (1 + n·a), n fillers before a query, each a of all else."""
    return float(np.mean(fillers * a / (1 + fillers * a)))


def solve_share(share, fillers):
    """The a whose mean share is this one, by halving an interval of exponents."""
    low, high = -40.0, 20.0
    for _ in range(100):
        middle = (low + high) / 2
        if mean_share(math.exp(middle), fillers) < share:
            low = middle
        else:
            high = middle
    return math.exp(middle)


def fillers_of(length, placement="uniform"):
    """n of every test query."""
    from experiments import floor  # which imports this file

    return floor.fillers_before(floor.test_contexts(length, placement)).double().numpy()


def print_law(rows):
    """The share on filler at 8,192 from the one at 128, beside the measured one."""
    near, far = fillers_of(128), fillers_of(FAR)
    print(f"\npredict: share on filler at {FAR:,} tokens (uniform) from the share at 128 alone")
    print(f"{'':18}{'n':>3}{'at 128':>9}{'predicted':>11}{'measured':>10}{'mean error':>12}{'largest':>9}")
    with_floor = []
    for kernel, floor in dict.fromkeys((row["kernel"], row["floor"]) for row in rows):
        own = having(rows, kernel=kernel, floor=floor)
        at_128 = column(own, "128 uniform", "filler")
        predicted = [mean_share(solve_share(share, near), far) for share in at_128]
        measured = column(own, f"{FAR} uniform", "filler")
        errors = [abs(p - m) for p, m in zip(predicted, measured, strict=True)]
        with_floor += errors if floor >= 0.01 else []
        print(f"{title(kernel, floor):18}{len(own):3}{mean(at_128):9.3f}{mean(predicted):11.3f}{mean(measured):10.3f}"
              f"{mean(errors):12.3f}{max(errors):9.3f}")
    if with_floor:
        print(f"floors from .01 on: {len(with_floor)} models, mean error {mean(with_floor):.3f}, "
              f"largest {max(with_floor):.3f}")


def print_far(rows):
    """Accuracy to a million tokens."""
    for placement in PLACEMENTS:
        lengths = [name.split()[0] for name in rows[0]["cells"] if name.endswith(placement)]
        print(f"\npredict: accuracy, {placement} queries, trained at 128")
        print(f"{'':24}{'n':>3}" + "".join(f"{int(length):>16,}" for length in lengths))
        for kernel, floor in (("rebased", 0.0), ("rebased", 0.5), ("based", 0.0), ("based", 0.5)):
            own = having(rows, kernel=kernel, floor=floor)
            for repaired in [False, True] if floor and own else [False] if own else []:
                line = f"{title(kernel, floor) + (', floor := 0' if repaired else ''):24}{len(own):3}"
                for length in lengths:
                    cell = f"{length} {placement}"
                    line += f"{spread(without_floor(own, cell) if repaired else column(own, cell)):>16}"
                print(line)


def print_written_out(rows):
    """Contexts with counts beside contexts that are written out."""
    print("\npredict: short contexts with counts beside the same ones written out")
    print(f"{'':18}{'seed':>5}" + "".join(f"{name:>31}" for name in rows[0]["as_written_out"]))
    for row in rows:
        line = f"{title(row['kernel'], row['floor']):18}{row['seed']:5}"
        for found in row["as_written_out"].values():
            line += f"{found['short']:9.4f} {found['written_out']:7.4f}, {found['equal_verdicts']:7.2%} equal"
        print(line)
    cells = [found for row in rows for found in row["as_written_out"].values()]
    print(f"{len(rows)} models: equal verdicts {min(cell['equal_verdicts'] for cell in cells):.2%} or more; shares on "
          f"filler differ by {max(cell['filler_difference'] for cell in cells):.1e} at most")


# trained-at
def print_trained_at(rows):
    for length in sorted({row["length"] for row in rows}):
        own = [row for row in rows if row["length"] == length]
        steps = own[0]["steps"]
        print(f"\ntrained-at: trained at {length:,} tokens, official queries, {steps:,} steps; accuracy at that length")
        print(f"{'':16}{'n':>3}{'rate':>7}{'official':>16}{'above .9':>10}{'uniform':>16}   every seed, official")
        cells = {}
        for kernel, floor in dict.fromkeys((row["kernel"], row["floor"]) for row in own):
            mine = having(own, kernel=kernel, floor=floor)
            official = cells[kernel, floor] = column(mine, f"{length} official")
            learned = f"{sum(a > 0.9 for a in official)}/{len(mine)}"
            print(f"{title(kernel, floor):16}{len(mine):3}{mine[0]['learning_rate']:7g}{spread(official):>16}"
                  f"{learned:>10}{spread(column(mine, f'{length} uniform')):>16}   "
                  + " ".join(f"{a:.2f}" for a in official))
        pairs = {"ReBased without its floor of ½": (("rebased", 0.5), ("rebased", 0.0)),
                 "Based without its ½": (("based", 0.5), ("based", 0.0)),
                 "Based with norm": (("based", 0.5), ("based_norm", 0.5)),
                 "ReBased against Based": (("based", 0.5), ("rebased", 0.0)),
                 "ReBased against x²": (("x2", 0.0), ("rebased", 0.0))}
        for name, (before, after) in pairs.items():
            if before in cells and after in cells:
                print(f"  {name:32} {compare(cells[before], cells[after])}")


# controls
CONTROLS = {
    "at rate .003": {"learning_rate": 0.003},
    "random filler": {"random_filler": True},
    "12 heads": {"heads": 12},
    "d_model 32": {"d_model": 32},
    "d_model 128": {"d_model": 128},
    "no decay of γ": {"decay_gamma": False},
    "other kernels": {},
}
RUN = ("kernel", "floor", "seed", "learning_rate", "length", "d_model", "heads", "random_filler", "decay_gamma",
       "written_out")  # what tells runs apart
USUAL = {"random_filler": False, "heads": 1, "d_model": 64, "decay_gamma": True}


def print_controls(rows):
    print(f"\ncontrols: accuracy at {FAR:,} tokens; one setting changed at a time")
    print(f"{'':15}{'':20}{'n':>3}{'at 128':>8}{'uniform':>16}{'floor := 0':>16}{'official':>16}{'floor := 0':>16}"
          f"{'filler':>8}")
    for name, changed in CONTROLS.items():
        chosen = having(rows, **(USUAL | changed))
        others = ("cosine", "quartic")
        chosen = [row for row in chosen if (row["kernel"] in others) == (name == "other kernels")]
        for kernel, floor in dict.fromkeys((row["kernel"], row["floor"]) for row in chosen):
            own = having(chosen, kernel=kernel, floor=floor)
            line = f"{name:15}{title(kernel, floor):20}{len(own):3}{mean(column(own, '128 official')):8.3f}"
            for placement in PLACEMENTS:
                cell = f"{FAR} {placement}"
                line += f"{spread(column(own, cell)):>16}"
                line += f"{spread(without_floor(own, cell)):>16}" if floor else f"{'':16}"
            print(line + f"{mean(column(own, f'{FAR} uniform', 'filler')):8.3f}")


# ladder
def print_ladder(rows):
    """Every kernel without a floor and with ½, at the rate of its own search; the floor of ½ set to 0 at test."""
    print(f"\nladder: accuracy at {FAR:,} tokens, each system at its own rate")
    print(f"{'':18}{'n':>3}{'rate':>7}{'at 128':>8}{'uniform':>16}{'floor := 0':>16}{'official':>16}{'floor := 0':>16}"
          f"{'filler':>8}{'without a floor, by seed (uniform)':>48}")
    for kernel, floor in dict.fromkeys((row["kernel"], row["floor"]) for row in rows):
        own = having(rows, kernel=kernel, floor=floor)
        line = f"{title(kernel, floor):18}{len(own):3}{own[0]['learning_rate']:7g}"
        line += f"{mean(column(own, '128 official')):8.3f}"
        for placement in PLACEMENTS:
            cell = f"{FAR} {placement}"
            line += f"{spread(column(own, cell)):>16}"
            line += f"{spread(without_floor(own, cell)):>16}" if floor else " " * 16
        line += f"{mean(column(own, f'{FAR} uniform', 'filler')):8.3f}"
        if floor:
            base = having(rows, kernel=kernel, floor=0.0)
            line += f"{compare(column(own, f'{FAR} uniform'), column(base, f'{FAR} uniform')):>48}"
        print(line)


# The search
def print_search(rows):
    """Training loss and accuracy beyond the trained length at every rate."""
    seeds = sorted({row["seed"] for row in rows})
    print(f"\nrates: training loss (mean of the last 100 steps), then accuracy at {FAR:,} uniform, as trained and with "
          f"the floor set to 0;\nseeds {seeds}, which are not reported")
    rates = sorted({row["learning_rate"] for row in rows})
    print(f"{'':16}{'length':>8}" + "".join(f"{rate:>24g}" for rate in rates))
    for key in dict.fromkeys((row["kernel"], row["floor"], row["length"]) for row in rows):
        kernel, floor, length = key
        line = f"{title(kernel, floor):16}{length:8,}"
        for rate in rates:
            own = having(rows, kernel=kernel, floor=floor, length=length, learning_rate=rate)
            cell = f"{FAR} uniform"
            line += f"{mean(row['loss'] for row in own):10.4f}{mean(column(own, cell)):7.3f}"
            line += f"{mean(without_floor(own, cell)):7.3f}"
        print(line)


def report(rows, searched):
    """Print every table that these rows can fill. rows: {part: rows}; searched: likewise."""
    if "dose" in rows:
        print_dose(rows["dose"])
    if "learned" in rows:
        print_learned(rows["learned"])
    if "dose" in rows or "predict" in rows:
        print_law(rows.get("dose", rows.get("predict")))
        print_far(rows.get("dose", rows.get("predict")))
    if "predict" in rows:
        print_written_out(rows["predict"])
    if "trained-at" in rows:
        print_trained_at(rows["trained-at"])
    if "controls" in rows:
        print_controls(rows["controls"])
    if "ladder" in rows:
        print_ladder(rows["ladder"])
    for own in searched.values():
        print_search(own)
    every = {}
    for own in (*rows.values(), *searched.values()):  # a run may belong to two parts
        every |= {tuple(row[name] for name in RUN): row for row in own}
    print(f"\n{len(every)} runs, {sum(row['seconds'] for row in every.values()) / 60:.0f} minutes of one core")


# The figure
STYLES = {  # told apart in grey: colour, dashes, marker
    ("rebased", 0.0): ("tab:blue", "-", "o"),
    ("rebased", 0.5): ("tab:cyan", "--", "s"),
    ("based", 0.5): ("tab:red", "--", "^"),
    ("based", 0.0): ("tab:orange", "-", "D"),
}


def draw_far(axis, rows, written):
    """Accuracy to a million tokens; crosses were written out."""
    lengths = [int(name.split()[0]) for name in rows[0]["cells"] if name.endswith("uniform")]
    ends = []
    for key, (color, dashes, marker) in STYLES.items():
        own = having(rows, kernel=key[0], floor=key[1])
        if not own:
            continue
        means = [mean(column(own, f"{length} uniform")) for length in lengths]
        axis.plot(lengths, means, dashes, marker=marker, markersize=4, color=color)
        ends.append((title(*key), means[-1], color))
        if key == ("based", 0.5):
            means = [mean(without_floor(own, f"{length} uniform")) for length in lengths]
            axis.plot(lengths, means, ":", marker="v", markersize=4, color=color)
            ends.append(("Based, floor := 0", means[-1], color))
    for row in written:
        for name, found in row["as_written_out"].items():
            if name.endswith("uniform"):
                axis.plot(int(name.split()[0]), found["written_out"], "x", color="black", markersize=4)
    axis.set(xscale="log", ylim=(-0.03, 1.03), xlabel="tokens (trained at 128)", ylabel="accuracy")
    lesson.label_ends(axis, ends, gap=0.085)
    axis.set_title("to a million tokens")


def draw_dose(axis, rows):
    """Accuracy at 8,192 by the floor in training; open marks: the floor set to 0 at test."""
    floors = sorted({row["floor"] for row in rows})
    places = range(len(floors))
    ends = []
    for kernel, (color, marker) in {"rebased": ("tab:blue", "o"), "based": ("tab:red", "^")}.items():
        own = [having(rows, kernel=kernel, floor=floor) for floor in floors]
        trained = [mean(column(these, f"{FAR} uniform")) for these in own]
        repaired = [mean(without_floor(these, f"{FAR} uniform")) for these in own]
        axis.plot(places, trained, "-", marker=marker, color=color, markersize=5)
        axis.plot(places, repaired, ":", marker=marker, color=color, markersize=5, markerfacecolor="white")
        ends += [(f"{NAMES[kernel]}", trained[-1], color), (f"{NAMES[kernel]}, := 0", repaired[-1], color)]
    axis.set_xticks(places, [f"{floor:g}".replace("0.", ".") for floor in floors])
    axis.set(ylim=(-0.03, 1.03), xlabel="floor in training", ylabel=f"accuracy at {FAR:,}")
    axis.set_title("dose, and the floor set to 0 at test")
    lesson.label_ends(axis, ends, gap=0.085)


def draw_learned(axis, rows):
    """The floor by step, one line a seed; a mark where the training accuracy first passes .9."""
    styles = {"ReBased": ("tab:blue", "-", "o"), "Based": ("tab:red", "--", "^")}
    for name, (color, dashes, marker) in styles.items():
        for row in having(rows, kernel=f"{name.lower()}, learned"):
            steps = [entry[0] for entry in row["history"]]
            floors = [max(entry[3], 1e-9) for entry in row["history"]]
            axis.plot(steps, floors, dashes, color=color, linewidth=0.9)
            learned = first_step(row["history"], lambda loss, accuracy, floor: accuracy > 0.9)
            if learned:
                axis.plot(learned, floors[steps.index(learned)], marker, color=color, markersize=5)
        axis.plot([], [], dashes, marker=marker, color=color, label=name)
    axis.set(yscale="log", xlabel="steps of training at 128 (mark: accuracy > .9)", ylabel="floor")
    axis.legend(frameon=False)
    axis.set_title("a floor that is learned")


def draw_trained_at(axis, rows, dose, length=FAR):
    """Tested at 8,192, official queries: a dot a seed. Filled: trained there; open: trained at 128."""
    own = [row for row in rows if row["length"] == length]
    keys = list(dict.fromkeys((row["kernel"], row["floor"]) for row in own))
    for place, key in enumerate(reversed(keys)):
        color = "tab:red" if key[1] else "tab:blue"
        here = having(own, kernel=key[0], floor=key[1])
        near = having(dose, kernel=key[0], floor=key[1])
        for lift, chosen, face in ((0.15, here, color), (-0.15, near, "white")):
            values = column(chosen, f"{length} official")
            axis.plot(values, [place + lift] * len(values), "o", color=color, markerfacecolor=face, markersize=5)
    axis.set_yticks(range(len(keys)), [title(*key) for key in reversed(keys)])
    axis.set(xlim=(-0.03, 1.03), ylim=(-0.6, len(keys) - 0.4))
    axis.set_xlabel(f"accuracy at {length:,} tokens, official queries")
    axis.set_title(f"filled: trained at {length:,}; open: at 128")


def draw(rows, path):
    """Four panels, as many as have rows."""
    figure = lesson.new_figure(width=9, height=7.5)
    if figure is None:
        return
    panels = figure.subplots(2, 2).flat
    dose = rows.get("dose", rows.get("predict"))
    if dose:
        draw_far(panels[0], dose, rows.get("predict", []))
    if "dose" in rows:
        draw_dose(panels[1], rows["dose"])
    if "learned" in rows:
        draw_learned(panels[2], rows["learned"])
    if "trained-at" in rows:
        draw_trained_at(panels[3], rows["trained-at"], rows.get("dose", []))
    for panel in panels:
        panel.set_visible(panel.has_data())
    lesson.save_figure(figure, path, "Four panels: accuracy by length of context, to a million tokens; accuracy by the "
                       "floor in training, as trained and with the floor set to 0; floors that are trained, by step; "
                       f"accuracy of every seed at {FAR:,} tokens, trained there and trained at 128.")
