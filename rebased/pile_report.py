"""Tables and the figure of 05, from rows alone: dictionaries as its run writes them, one for each model."""

import math
from dataclasses import asdict
from statistics import median

import numpy as np
import torch

from rebased import lesson

# Told apart by their dashes where there is no colour
STYLES = {"attention": ("black", ":"), "rebased": ("tab:blue", "-"), "based": ("tab:red", "--")}
OTHERS = [("tab:orange", "-."), ("tab:green", "-"), ("tab:purple", "--"), ("tab:gray", "-."), ("tab:brown", "-"),
          ("tab:pink", ":"), ("tab:olive", "-")]


def summary(log, batch_tokens, points=60):
    """What a row keeps of the log: the median speed, and the training curve in at most so many points.

    A point is [tokens seen, mean loss since the point before].
    """
    every = math.ceil(len(log) / points)
    curve = []
    for end in range(every, len(log) + 1, every):
        losses = [record["loss"] for record in log[end - every : end]]
        curve.append([end * batch_tokens, sum(losses) / every])
    return {"tokens_per_s": median(record["tokens_per_s"] for record in log), "curve": curve}


def about_training(settings, config, log):
    """What a row keeps of how a model was trained, as plain types."""
    about = {"seed": settings.seed, "settings": asdict(settings), "config": asdict(config)}
    return about | summary(log, settings.batch_tokens)


def collect(losses, masks, subsets, perplexity, bits_per_byte):
    """What a row says of the losses (n,) of a text, as plain types.

    masks: {name: mask (n,)}. subsets: (name, is_text, bytes, zlib's bits per byte), as from `tokens.subsets_of`.
    perplexity and bits_per_byte are the lesson's functions.
    """
    slices = {}
    for name, mask in masks.items():
        slices[name] = {
            "share": float(mask.mean()),
            "recall": perplexity(losses[mask]),
            "other": perplexity(losses[~mask]),
        }
    found = {}
    for name, is_text, num_bytes, zlib in subsets:
        bits = bits_per_byte(losses[is_text], num_bytes)
        found[name] = {"bytes": num_bytes, "bits_per_byte": bits, "zlib": zlib}
    numbers = found.pop("all")
    numbers["loss"] = float(losses.mean())
    numbers["perplexity"] = perplexity(losses)
    numbers["tokens"] = len(losses)
    return numbers | {"slices": slices, "subsets": found}


@torch.no_grad()
def loss_by_position(losses_of, stream, length):
    """[[last position, mean loss]] of positions 1 to 16, 17 to 32, 33 to 64, ... in contexts of `length` tokens.

    losses_of: a function, tokens (1, T + 1) -> losses (1, T). stream (n + 1,): cut into contexts that do not overlap.
    """
    length = min(length, len(stream) - 1)
    total = np.zeros(length)
    contexts = 0
    for begin in range(0, len(stream) - length, length):
        context = torch.from_numpy(stream[begin : begin + length + 1].astype(np.int64))
        total += losses_of(context.unsqueeze(0))[0].cpu().double().numpy()
        contexts += 1
    ends = [2**n for n in range(4, 40) if 2**n < length] + [length]
    parts = np.split(total / contexts, ends[:-1])
    return [[end, float(part.mean())] for end, part in zip(ends, parts, strict=True)]


# Tables
def print_tables(rows):
    """The models; perplexity by slices; bits per byte by subsets, with a > where it is above that of zlib."""
    print_models(rows)
    print_slices(rows)
    print_bits(rows)


def print_models(rows):
    settings = rows[0]["settings"]
    print(f"{settings['steps']:,} steps of {settings['batch_tokens']:,} tokens, T = {settings['seq_len']:,}; "
          f"validation: {rows[0]['tokens']:,} tokens, {rows[0]['bytes']:,} bytes\n")
    print(f"{'':20}{'parameters':>12}{'loss':>8}{'perplexity':>12}{'bits per byte':>15}{'tokens/s':>10}")
    for row in rows:
        print(f"{row['mixer']:20}{row['parameters']:12,}{row['loss']:8.3f}{row['perplexity']:12.2f}"
              f"{row['bits_per_byte']:14.3f}{mark(row)}{row['tokens_per_s']:10,.0f}")
    print(f"{'zlib':20}{'':32}{rows[0]['zlib']:14.3f}\n")


def print_slices(rows):
    print(f"{'perplexity':20}{'share':>12}" + "".join(f"{row['mixer']:>{width(row)}}" for row in rows))
    for name, first in rows[0]["slices"].items():
        for part, share in (("recall", first["share"]), ("other", 1 - first["share"])):
            title = f"{name}, AR" if part == "recall" else "    the others"
            cells = "".join(f"{number(row['slices'][name][part], '.2f'):>{width(row)}}" for row in rows)
            print(f"{title:20}{share:12.1%}{cells}")
    print()


def print_bits(rows):
    print(f"{'bits per byte':20}{'bytes':>12}{'zlib':>9}" + "".join(f"{row['mixer']:>{width(row)}}" for row in rows))
    for name, first in rows[0]["subsets"].items():
        cells = ""
        for row in rows:
            cell = row["subsets"][name]
            cells += f"{cell['bits_per_byte']:{width(row) - 1}.3f}{mark(cell)}"
        print(f"{name[:19]:20}{first['bytes']:12,}{first['zlib']:9.3f}{cells}")
    print("> : above zlib, which only looks up repetitions\n")


def width(row):
    """Of the column of a model."""
    return max(12, len(row["mixer"]) + 2)


def mark(cell):
    return ">" if cell["bits_per_byte"] > cell["zlib"] else " "


def number(value, form):
    """A number, or a dash where there was nothing to measure."""
    return "–" if value is None else format(value, form)


def print_reading(rows):
    """What the tables say."""
    ordered = sorted(rows, key=lambda row: row["bits_per_byte"])
    best = ordered[0]
    tokens = best["settings"]["steps"] * best["settings"]["batch_tokens"]
    ranking = ", ".join(f"{row['mixer']} {row['bits_per_byte']:.3f}" for row in ordered)
    print(f"Bits per byte after {tokens:,} tokens, one seed: {ranking}; zlib {best['zlib']:.3f}.")
    above = [row["mixer"] for row in ordered if mark(row) == ">"]
    if above:
        print(f"Not yet at zlib: {', '.join(above)}. What has not learned that much says little about its mixer.")
    bigram = best["slices"]["bigram"]
    recall = number(bigram["recall"], ".2f")
    other = number(bigram["other"], ".2f")
    print(f"{bigram['share']:.0%} of the tokens end a pair that the context has had: perplexity {recall} there, "
          f"{other} on the others ({best['mixer']}).\n")


# The figure
def draw(rows, path):
    """Training loss against tokens, and validation loss against the position in the context; at most seven models."""
    figure = lesson.new_figure(width=6.5, height=7)
    if figure is None:
        return
    above, below = figure.subplots(2, 1)
    rows = rows[:7]
    above.set(title="training", xlabel="tokens seen", ylabel="loss, nats a token")
    above.xaxis.set_major_formatter(lambda tokens, _: f"{tokens:,.0f}")
    draw_lines(above, rows, "curve")
    length = rows[0]["settings"]["seq_len"]
    below.set(title="validation, by position in the context", ylabel="loss, nats a token", xscale="log")
    below.set_xlabel(f"position; dotted: the end of the trained length, {length:,}")
    ends = [end for end, _ in rows[0]["by_position"]]
    below.set_xticks(ends, [f"{end:,}" for end in ends])
    below.minorticks_off()
    if length <= ends[-1]:
        below.axvline(length, color="gray", linestyle=":", linewidth=1)
    draw_lines(below, rows, "by_position")
    said = ", ".join(f"{row['mixer']} {row['loss']:.2f}" for row in rows)
    lesson.save_figure(figure, path, f"Loss of language models in training and by position; validation loss: {said}.")


def draw_lines(axis, rows, key):
    """A line for each model, its name at its end."""
    others = iter(OTHERS)
    ends = []
    for row in rows:
        color, dashes = STYLES.get(row["mixer"]) or next(others)
        axis.plot([x for x, _ in row[key]], [y for _, y in row[key]], dashes, color=color)
        ends.append((row["mixer"], row[key][-1][1], color))
    lesson.label_ends(axis, ends)
