"""04 · Associative recall: what a floor of ½ does to a trained model

Aim: train the same two-layer model with five attentions on multi-query associative recall (MQAR), then test the
same weights on contexts up to 64 times longer, and see which of them drown in tokens that do not matter.

You will learn
  1. the task: key-value pairs first, then each key comes back once and its value is asked for;
  2. how to compare fairly: one grid of learning rates, chosen on seeds that are not reported;
  3. that Based and ReBased both learn the task perfectly at the trained length, and what happens beyond it;
  4. that the floor is the cause: take the ½ from Based, give it to ReBased, and look again.

The data [P 5.1; Z; C]
  Vocabulary V; keys are 1 .. V/2 − 1, values V/2 .. V − 1. The first 2K tokens are K pairs, keys distinct, values
  distinct. Then each key returns once, at an even distance from the end of the pairs: slot s = 1, 2, ... is drawn
  without replacement with p(s) ∝ s^(a−1); a = 0.01 keeps most queries early, a = 1 spreads them uniformly.
  All else is 0. The label at a query is its value, elsewhere −100 (no loss).

Letters: T length, K pairs, V vocabulary, n examples in the data, in (B, n) the number of queries;
  filler: a token 0 after the pairs.

References: [P], [C] as in 01; [Z] Arora et al., Zoology, arXiv 2312.04927, github HazyResearch/zoology.

Run: python 04_train_mqar.py            5 mixers × 3 seeds, about 4 minutes on two cores; continues if interrupted
     python 04_train_mqar.py --search   the learning rates: 5 × 3 rates × 2 other seeds, about 6 minutes
"""
# %%
import argparse
import dataclasses
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib import import_module

import torch
import torch.nn.functional as F
from tqdm import tqdm

kernels = import_module("01_kernels")
model_file = import_module("03_model")

# %% Distinct symbols, a whole data set at once
# Draw with replacement and redraw whatever occurred earlier in its row, until nothing did. No symbol is treated
# unlike another, so every ordered choice stays equally likely. Where most symbols are taken that would need many
# rounds: then shuffle all of them.
def distinct(n, count, population, generator):
    """n rows of `count` distinct integers below `population`, uniformly: (n, count) int64."""
    if 4 * count > population:
        return torch.rand(n, population, generator=generator).argsort(1)[:, :count]
    drawn = torch.randint(population, (n, count), generator=generator)
    todo = torch.arange(n)
    while len(todo):
        rows, order = drawn[todo].sort(dim=1, stable=True)
        repeats = torch.zeros_like(rows, dtype=torch.bool)
        repeats[:, 1:] = rows[:, 1:] == rows[:, :-1]
        repeats = torch.zeros_like(repeats).scatter(1, order, repeats)  # back in the order of drawing
        again = repeats.any(1)
        todo, repeats = todo[again], repeats[again]
        fresh = torch.randint(population, repeats.shape, generator=generator)
        drawn[todo] = torch.where(repeats, fresh, drawn[todo])
    return drawn

# %% The task
# A key's slot is drawn without replacement with the weights p(s), key after key. Adding Gumbel noise to log p and
# taking the K largest, largest first, is the same draw for all examples in one call.
def make_mqar(num_examples, seq_len, num_pairs, vocab_size, power_a=0.01, seed=0):
    """Multi-query associative recall -> inputs, labels (n, seq_len) int64; −100 marks positions without loss. [Z]

    The pairs depend on the seed alone: with another seq_len or power_a the same pairs meet other contexts.
    Raises ValueError if the pairs do not fit into the length or the vocabulary.
    """
    if num_examples < 1 or num_pairs < 1 or power_a <= 0:
        raise ValueError(f"need num_examples >= 1, num_pairs >= 1, power_a > 0; got {num_examples}, {num_pairs}, {power_a}")
    if seq_len < 4 * num_pairs:
        raise ValueError(f"{num_pairs} pairs and their queries need 4·{num_pairs} = {4 * num_pairs} positions, "
                         f"seq_len is {seq_len}")
    if num_pairs > vocab_size // 2 - 1:
        raise ValueError(f"{num_pairs} distinct keys need a vocabulary of {2 * num_pairs + 2} or more, got {vocab_size}")
    generator, half = torch.Generator().manual_seed(seed), vocab_size // 2
    keys = 1 + distinct(num_examples, num_pairs, half - 1, generator)  # (n, K)
    values = half + distinct(num_examples, num_pairs, vocab_size - half, generator)
    slots = torch.arange((seq_len - 2 * num_pairs) // 2)
    log_p = (power_a - 1) * torch.log1p(slots.double())
    gumbel = -torch.empty(num_examples, len(slots), dtype=torch.float64).exponential_(generator=generator).log()
    places = 2 * num_pairs + 2 * (log_p + gumbel).topk(num_pairs).indices  # (n, K): place of each key's query
    inputs = torch.zeros(num_examples, seq_len, dtype=torch.int64)
    inputs[:, 0 : 2 * num_pairs : 2], inputs[:, 1 : 2 * num_pairs : 2] = keys, values
    labels = torch.full_like(inputs, -100)
    return inputs.scatter_(1, places, keys), labels.scatter_(1, places, values)


def query_positions(labels):
    """Where the labels are: (n, T) -> (n, K), increasing. Every row has the same number."""
    return (labels != -100).nonzero()[:, 1].view(len(labels), -1)


def show_example():
    """One small example in aligned columns."""
    inputs, labels = make_mqar(1, 16, 2, 12, power_a=1, seed=3)
    roles = ["key", "val"] * 2 + ["query" if label >= 0 else "" for label in labels[0, 4:].tolist()]
    print("V = 12     " + "".join(f"{role:>6}" for role in roles))
    print("inputs     " + "".join(f"{token:6}" for token in inputs[0].tolist()))
    print("labels     " + "".join(f"{label if label >= 0 else '.':>6}" for label in labels[0].tolist()) + "\n")

# %% What is run: every field can be set from the command line
LEARNING_RATES = {  # what --search marked as best, on seeds that are not reported; its runs: results/mqar_search.jsonl
    "conv_attention": 0.003,
    "rebased": 0.01,
    "based": 0.003,
    "based_no_floor": 0.003,
    "rebased_floor": 0.02,
}
TITLES = {
    "conv_attention": "softmax",
    "rebased": "ReBased",
    "based": "Based",
    "based_no_floor": "Based − ½",
    "rebased_floor": "ReBased + ½",
}


@dataclass(frozen=True)
class Experiment:
    """Train at `length`, test at `test_lengths`. Softmax learns later, so it gets more steps and a warm-up."""

    mixers: tuple[str, ...] = tuple(TITLES)
    seeds: tuple[int, ...] = (0, 1, 2)
    learning_rates: tuple[float, ...] = ()  # empty: each mixer at its own, from LEARNING_RATES
    length: int = 128
    pairs: int = 16
    vocab_size: int = 256
    d_model: int = 64
    heads: int = 1
    steps: int = 1200
    softmax_steps: int = 2000
    softmax_warmup: int = 100
    batch: int = 32
    test_lengths: tuple[int, ...] = (128, 512, 2048, 8192)
    test_examples: int = 256  # a quarter of them at 8,192 and beyond


@dataclass(frozen=True)
class Run:
    """One training run: a mixer, a learning rate, a seed."""

    mixer: str
    learning_rate: float
    seed: int


def planned_runs(experiment):
    """All runs, seed by seed, so that an interrupted sweep has whole seeds first."""
    return [
        Run(mixer, rate, seed)
        for seed in experiment.seeds
        for mixer in experiment.mixers
        for rate in experiment.learning_rates or (LEARNING_RATES[mixer],)
    ]

# %% Training
# The data are fresh at every step. The loss looks at the K query positions; so do the last layer and the head,
# which need nothing else: 16 rows of 128.
def train(run, experiment, report=lambda steps, loss, accuracy: None):
    """Train one model; report(steps done since the last call, loss, accuracy) now and then. Returns the model."""
    torch.manual_seed(run.seed)
    softmax = run.mixer in ("attention", "conv_attention")
    steps = experiment.softmax_steps if softmax else experiment.steps
    warmup = experiment.softmax_warmup if softmax else 0
    model = model_file.LanguageModel(recall_config(run.mixer, experiment))
    data = make_mqar(steps * experiment.batch, experiment.length, experiment.pairs, experiment.vocab_size, seed=run.seed)
    positions = query_positions(data[1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.learning_rate, weight_decay=0.1, fused=True)
    for step in range(steps):
        rate = min(1, (step + 1) / (warmup + 1)) * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = run.learning_rate * rate
        at = slice(step * experiment.batch, (step + 1) * experiment.batch)
        targets = data[1][at].gather(1, positions[at])  # (B, K)
        logits = model(data[0][at], positions[at])  # (B, K, V)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 20 == 0 or step + 1 == steps:
            report(step % 20 + 1, loss.item(), (logits.argmax(-1) == targets).float().mean().item())
    return model.eval()


def recall_config(mixer, experiment):
    """The model of 03 for this experiment, initialised "wide": with the paper's N(0, 0.02) nothing is learned in 1,200
    steps."""
    return model_file.recall_config(mixer, experiment.vocab_size, experiment.d_model, experiment.heads)

# %% Testing: the same weights, longer contexts
# Each cell is a length and a placement of the queries: the official power law or uniform. Beside the accuracy: the
# share of the last layer's attention that falls on the right pair (key, value, or the token after it, which the
# convolution of width 3 tells of both), on the other pairs, and on filler.
PLACEMENTS = {"official": 0.01, "uniform": 1.0}
TEST_SEED = 1_000_000  # no training run has it


@torch.no_grad()
def test(model, length, power_a, experiment):
    """{"accuracy", "right", "others", "filler"} of one cell, each a mean over queries."""
    n = max(1, experiment.test_examples // 4) if length >= 8192 else experiment.test_examples
    inputs, labels = make_mqar(n, length, experiment.pairs, experiment.vocab_size, power_a, TEST_SEED)
    positions, totals = query_positions(labels), torch.zeros(4, dtype=torch.float64)
    for rows in torch.arange(n).split(max(1, 2**16 // length)):
        tokens, at = inputs[rows], positions[rows]
        x = model.trunk(tokens)
        right = model.top(x, at).argmax(-1) == labels[rows].gather(1, at)
        shares = attention_shares(model.attention_weights(x, at).mean(1), tokens, at, 2 * experiment.pairs)
        totals += torch.stack([right.double(), *shares]).sum((1, 2))
    return dict(zip(("accuracy", "right", "others", "filler"), (totals / positions.numel()).tolist(), strict=True))


def attention_shares(weights, tokens, positions, end):
    """weights (B, n, T) of queries at positions (B, n); pairs lie before `end` -> right, others, filler, each (B, n).

    Earlier queries count as none of the three, so the shares add up to at most 1.
    """
    T = tokens.shape[1]
    place = torch.arange(T)
    asked = tokens.gather(1, positions)  # (B, n): the key
    key_at = (tokens[:, None, 0:end:2] == asked.unsqueeze(-1)).double().argmax(-1) * 2  # (B, n)
    offset = place - key_at.unsqueeze(-1)  # (B, n, T)
    is_right = (offset >= 0) & (offset <= 2)
    is_filler = ((place >= end) & (tokens == 0)).unsqueeze(1) & ~is_right
    is_other = (place < end) & ~is_right
    return [(weights * mask).sum(-1).double() for mask in (is_right, is_other, is_filler)]


@torch.no_grad()
def full_pass(model, experiment):
    """Linear time, shown: every position of one longest sequence through the chunked form, and through the quadratic."""
    length = max(experiment.test_lengths)
    tokens, _ = make_mqar(1, length, experiment.pairs, experiment.vocab_size, 1.0, TEST_SEED)
    start = time.perf_counter()
    chunked = model(tokens)
    middle = time.perf_counter()
    quadratic = model(tokens, torch.arange(length).unsqueeze(0))  # all rows, each against all keys
    end = time.perf_counter()
    difference = ((chunked - quadratic).norm() / quadratic.norm()).item()
    return {"length": length, "chunked_seconds": middle - start, "quadratic_seconds": end - middle, "difference": difference}

# %% One run, in a process of its own with one thread
# Runs share nothing, so one process per core is the best use of a machine. A worker reports its steps through a
# queue and returns its row; it ends when the program that started it is gone.
PROGRESS = None  # in a worker: the queue to the program


def start_worker(progress):
    """Make this process a worker: one thread, deaf to Ctrl-C, gone with its parent."""
    global PROGRESS
    PROGRESS = progress
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def perform(run, experiment):
    """Train and test one model -> its row of results."""
    start = time.perf_counter()
    model = train(run, experiment, report=lambda *news: PROGRESS.put(news))
    trained = time.perf_counter() - start
    cells = {f"{length} {placement}": test(model, length, power_a, experiment)
             for length in experiment.test_lengths for placement, power_a in PLACEMENTS.items()}
    first = run.seed == experiment.seeds[0] and run.mixer in model_file.KERNEL_NAMES
    return {
        **dataclasses.asdict(run),
        "settings": settings(experiment),
        "cells": cells,
        "full_pass": full_pass(model, experiment) if first else None,
        "train_seconds": trained,
        "seconds": time.perf_counter() - start,
    }


def settings(experiment):
    """The fields that make two runs of one mixer, rate and seed different, as JSON gives them back."""
    fields = dataclasses.asdict(experiment)
    return json.loads(json.dumps({name: fields[name] for name in fields if name not in ("mixers", "seeds", "learning_rates")}))

# %% Results: a row as soon as a run has ended
# Appended and flushed to disk one line at a time. Whatever interrupts the program, finished rows stay and are not
# run again; half a line, if the machine went down in the middle of writing, is cut off at the next start.
def read_rows(path):
    """The rows of a results file; [] if there is none. Raises ValueError that names a line which is not a row."""
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text().splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        try:
            rows.append(json.loads(line))
            _ = [rows[-1][field] for field in ("mixer", "learning_rate", "seed", "settings", "cells")]
        except (json.JSONDecodeError, KeyError, TypeError, IndexError):
            raise ValueError(f"{path}, line {number} is not a row of results; mend it or choose another --output") from None
    return rows


def append_row(path, row):
    """Write one row as one line that is on disk when this returns."""
    with path.open("ab+") as file:
        content_end = file.seek(0, os.SEEK_END)
        if content_end:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def sweep(experiment, path, workers, extra):
    """Perform all planned runs that have no row yet; returns the rows of this experiment, in the order planned."""
    planned = planned_runs(experiment)
    missing = [run for run in planned if run not in finished(path, experiment)]
    if len(missing) < len(planned):
        print(f"{path}: {len(planned) - len(missing)} of {len(planned)} runs are there already and are not repeated")
    if missing:
        perform_all(missing, experiment, path, workers, extra)
    done = finished(path, experiment)
    return [done[run] for run in planned]


def finished(path, experiment):
    """{Run: row} of the rows in the file that have these settings."""
    rows = [row for row in read_rows(path) if row["settings"] == settings(experiment)]
    return {Run(row["mixer"], row["learning_rate"], row["seed"]): row for row in rows}


def perform_all(runs, experiment, path, workers, extra):
    """Perform runs, one process a core, with a bar over all training steps (loss and accuracy: the latest reported)."""
    context = multiprocessing.get_context("spawn")
    progress, workers = context.Queue(), min(workers, len(runs))
    softmax = sum(run.mixer in ("attention", "conv_attention") for run in runs)
    steps = softmax * experiment.softmax_steps + (len(runs) - softmax) * experiment.steps
    with (
        ProcessPoolExecutor(workers, context, start_worker, (progress,)) as pool,
        tqdm(total=steps, unit="step", desc=f"{len(runs)} runs", smoothing=0.05, mininterval=1) as bar,
    ):
        waiting = {pool.submit(perform, run, experiment) for run in runs}
        try:
            while waiting:
                for future in [future for future in waiting if future.done()]:
                    waiting.remove(future)
                    append_row(path, future.result() | extra)
                while not progress.empty():
                    done, loss, accuracy = progress.get()
                    bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.2f}", refresh=False)
                    bar.update(done)
                time.sleep(0.1)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise

# %% The table: means and standard deviations over seeds
def mean_std(values):
    """(mean, standard deviation over seeds), 0 for one seed."""
    values = torch.tensor(values, dtype=torch.float64)
    return values.mean().item(), values.std().item() if len(values) > 1 else 0.0


def column(rows, mixer, cell, measure):
    """One number a seed."""
    return [row["cells"][cell][measure] for row in rows if row["mixer"] == mixer]


def print_table(rows, experiment):
    """Accuracy and the share of attention on filler, by length, for each mixer."""
    seeds = len(experiment.seeds)
    print(f"\nTrained at T = {experiment.length} with {experiment.pairs} pairs; the same weights tested at other lengths. "
          f"Mean ± std over {seeds} seeds.\n")
    print(f"{'':14}{'lr':>6}  {'queries':20}" + "".join(f"{f'T = {T:,}':>15}" for T in experiment.test_lengths))
    for mixer in experiment.mixers:
        rate = next(row["learning_rate"] for row in rows if row["mixer"] == mixer)
        lines = [(f"{placement}", "accuracy", placement) for placement in PLACEMENTS]
        lines.append(("share on filler", "filler", "uniform"))
        for i, (label, measure, placement) in enumerate(lines):
            head = f"{TITLES.get(mixer, mixer):14}{rate:6g}" if i == 0 else " " * 20
            cells = [mean_std(column(rows, mixer, f"{T} {placement}", measure)) for T in experiment.test_lengths]
            print(f"{head}  {label:20}" + "".join(f"{f'{mean:.3f} ± {std:.3f}':>15}" for mean, std in cells))


def read_table(rows, experiment):
    """The sentences under the table, from its numbers."""
    T = max(experiment.test_lengths)
    means = {mixer: mean_std(column(rows, mixer, f"{T} uniform", "accuracy"))[0] for mixer in experiment.mixers}
    print(f"\nAt {T:,} tokens, {T // experiment.length} times the trained length, queries anywhere: "
          + ", ".join(f"{TITLES.get(mixer, mixer)} {mean:.3f}" for mixer, mean in means.items()) + ".")
    if set(TITLES) <= set(means):
        floored, free = ("based", "rebased_floor"), ("rebased", "based_no_floor")
        if max(means[m] for m in floored) < min(means[m] for m in free):
            print("Both kernels with a floor of ½ lie below both without: taking the ½ from Based repairs it, giving it to "
                  "ReBased breaks it.\nThe floor is what costs recall here; γ, β and the normalisation are not needed for this.")
        else:
            print("The order of the four kernels does not follow the floor in this run.")
    for row in rows:
        if row["mixer"] == "rebased" and row["full_pass"]:
            cost = row["full_pass"]
            print(f"Linear time: all {cost['length']:,} positions of one sequence took {cost['chunked_seconds'] * 1e3:.0f} ms "
                  f"through the chunked form, {cost['quadratic_seconds'] * 1e3:.0f} ms through the quadratic one.")


def draw(rows, experiment, path):
    """Accuracy and share of attention on filler against length, uniform queries; a dot per seed, lines through means."""
    plt = kernels.pyplot()
    if plt is None:
        return
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    panels = (("accuracy", "accuracy (queries anywhere)"), ("filler", "share of attention on filler"))
    for axis, (measure, title) in zip(axes, panels, strict=True):
        for i, mixer in enumerate(experiment.mixers):
            values = [column(rows, mixer, f"{T} uniform", measure) for T in experiment.test_lengths]
            axis.plot(experiment.test_lengths, [mean_std(v)[0] for v in values], color=f"C{i}", label=TITLES.get(mixer, mixer))
            for T, dots in zip(experiment.test_lengths, values, strict=True):
                axis.plot([T] * len(dots), dots, "o", color=f"C{i}", markersize=3, alpha=0.6)
        axis.axvline(experiment.length, color="gray", linestyle=":", linewidth=1)
        axis.set(title=title, xlabel=f"context length T (trained at {experiment.length})", xscale="log", ylim=(-0.03, 1.03))
        axis.set_xticks(experiment.test_lengths, [f"{T:,}" for T in experiment.test_lengths], minor=False)
        axis.minorticks_off()
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=120)
    print(f"figure: {path}\n")


def print_search(rows, experiment):
    """The search: mean accuracy over all cells, for each mixer and rate; the best is marked."""
    print(f"\nMean accuracy over all lengths and placements, seeds {', '.join(map(str, experiment.seeds))}; * the best.\n")
    print(f"{'':14}" + "".join(f"{rate:>10g}" for rate in experiment.learning_rates))
    for mixer in experiment.mixers:
        means = [mean_std([cell["accuracy"] for row in rows if (row["mixer"], row["learning_rate"]) == (mixer, rate)
                           for cell in row["cells"].values()])[0] for rate in experiment.learning_rates]
        cells = "".join(f"{mean:9.3f}{'*' if mean == max(means) else ' '}" for mean in means)
        print(f"{TITLES.get(mixer, mixer):14}{cells}")
    print()

# %% Claims about the data and the measures
def check_data_format():
    """Read examples by a slow independent rule: pairs first, each key once more, its value as label."""
    inputs, labels = make_mqar(50, 64, 8, 40, seed=5)
    for tokens, targets in zip(inputs.tolist(), labels.tolist(), strict=True):
        pairs = dict(zip(tokens[0:16:2], tokens[1:16:2], strict=True))
        assert len(pairs) == 8 == len(set(pairs.values())) and all(0 < k < 20 <= v < 40 for k, v in pairs.items())
        queries = [t for t in range(16, 64) if tokens[t]]
        assert sorted(tokens[t] for t in queries) == sorted(pairs) and all(t % 2 == 0 for t in queries)
        assert all(targets[t] == (pairs[tokens[t]] if t in queries else -100) for t in range(64))


def check_pairs_depend_on_the_seed_alone():
    """Longer or differently placed, the same pairs; another seed, others."""
    short, long = (make_mqar(4, T, 8, 40, a, seed=1)[0][:, :16] for T, a in ((64, 0.01), (256, 1.0)))
    assert torch.equal(short, long) and not torch.equal(short, make_mqar(4, 64, 8, 40, seed=2)[0][:, :16])


def check_shares_are_shares():
    """Weights put by hand on the value, on another pair and on filler are found there."""
    tokens = torch.tensor([[2, 8, 4, 7, 3, 9, 0, 0, 4, 0]])
    weights = torch.zeros(1, 1, 10)
    weights[0, 0, [3, 1, 6, 7]] = torch.tensor([0.4, 0.3, 0.2, 0.1])
    shares = attention_shares(weights, tokens, torch.tensor([[8]]), 6)
    assert torch.allclose(torch.stack(shares).flatten(), torch.tensor([0.4, 0.3, 0.3], dtype=torch.float64))


def check_chunked_equals_rows():
    """An untrained model at 600 tokens: the full pass gives the logits of the row-wise one."""
    torch.manual_seed(0)
    small = Experiment(test_lengths=(600,))
    cost = full_pass(model_file.LanguageModel(recall_config("rebased", small)), small)
    assert cost["difference"] < 1e-4, cost


CHECKS = [check_data_format, check_pairs_depend_on_the_seed_alone, check_shares_are_shares, check_chunked_equals_rows]

# %% The command line: every field of Experiment is an option
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


def mixer_name(text):
    """An argparse type: the name of a two-layer model of 03."""
    names = ("conv_attention", "attention", *model_file.KERNEL_NAMES)  # those with weights to look at
    if text not in names:
        raise argparse.ArgumentTypeError(f"unknown mixer {text!r}; choose from {', '.join(names)}")
    return text


def make_parser():
    """Options of the program and one for each field of Experiment."""
    parser = argparse.ArgumentParser(
        description="04: train five mixers on associative recall, test them on longer contexts (4 minutes on two cores)",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--search", action="store_true", help=f"try the learning rates {GRID} on seeds {SEARCH_SEEDS}")
    parser.add_argument("--output", type=kernels.writable, default=None,
                        help="rows of results; runs that are there are not repeated (runs/mqar.jsonl or mqar_search.jsonl)")
    parser.add_argument("--figure", type=kernels.writable, default="runs/mqar.png", help="where to draw it")
    parser.add_argument("--workers", type=at_least(int, 1), default=os.cpu_count(), help="processes, one thread each")
    special = {"mixers": mixer_name, "seeds": at_least(int, 0), "learning_rates": at_least(float, 0, strict=True)}
    for field in dataclasses.fields(Experiment):
        many = isinstance(field.default, tuple)
        parser.add_argument("--" + field.name.replace("_", "-"), type=special.get(field.name, at_least(int, 1)),
                            nargs="+" if many else None, default=argparse.SUPPRESS, help=f"default {field.default}")
    return parser


GRID, SEARCH_SEEDS = (0.003, 0.01, 0.02), (100, 101)


def make_experiment(options, parser):
    """The experiment asked for; the program ends with one line if it cannot be run."""
    names = [field.name for field in dataclasses.fields(Experiment)]
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(options).items() if k in names}
    base = {"seeds": SEARCH_SEEDS, "learning_rates": GRID} if options.search else {}
    experiment = Experiment(**(base | given))
    without = [mixer for mixer in experiment.mixers if mixer not in LEARNING_RATES]
    if without and not experiment.learning_rates:
        parser.error(f"no learning rate is known for {', '.join(without)}; give --learning-rates, or --search for one")
    try:
        for length in (experiment.length, *experiment.test_lengths):
            make_mqar(1, length, experiment.pairs, experiment.vocab_size)
        for mixer in experiment.mixers:
            recall_config(mixer, experiment)
    except ValueError as error:
        parser.error(str(error))
    return experiment


def main(argv=None):
    """Run what is missing, print the table and its reading, draw the figure, run the checks; returns failed checks."""
    parser = make_parser()
    options = kernels.parse_arguments(parser, argv)
    experiment = make_experiment(options, parser)
    path = options.output or kernels.writable("runs/mqar_search.jsonl" if options.search else "runs/mqar.jsonl")
    show_example()
    start = time.perf_counter()
    try:
        rows = sweep(experiment, path, options.workers, kernels.provenance(__file__, sys.argv[1:] if argv is None else argv))
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"cannot write {path}: {error.strerror}; finished runs before this one are kept")
    except BrokenProcessPool:
        parser.error(f"a worker died (out of memory?); finished runs are in {path}, the same command goes on; try --workers 1")
    except KeyboardInterrupt:
        print(f"\ninterrupted: finished runs are in {path}; the same command goes on from there")
        raise SystemExit(130) from None
    if options.search or len(experiment.learning_rates) > 1:
        print_search(rows, experiment)
    else:
        print_table(rows, experiment)
        read_table(rows, experiment)
        draw(rows, experiment, options.figure)
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes; rows: {path}\n")
    return kernels.run_checks(CHECKS)


if __name__ == "__main__":
    if main():
        sys.exit(1)
