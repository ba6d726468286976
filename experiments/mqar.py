"""Associative recall in grids: every mixer, width, length and rate; the rate searched on seeds that are not reported.

  python -m experiments.mqar                        5 mixers × 3 seeds, at the rates of a search
  python -m experiments.mqar --preset ladder        every kernel with a floor of ½ and without, 5 seeds: 50 minutes
  python -m experiments.mqar --preset laptop        seven systems, three widths, 5 seeds: 45 minutes
  python -m experiments.mqar --preset paper         Figure 1 of [1]: for GPUs; --shard 1/8 for the first of 8 machines
  python -m experiments.mqar --preset paper-ladder  Table 1 of [1], likewise

(Minutes on two cores.) All of them go on where they were interrupted. The task, its examples and its measures are
those of 04_train_mqar.py; the tables are made by experiments/mqar_report.py, from rows alone.

[1] Aksenov et al., ReBased, as in 01_kernels.py; [2] the code released with it, github.com/corl-team/rebased.
"""

import argparse
import dataclasses
import functools
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from experiments import mqar_report, sweep
from rebased import (
    files,
    kernels,
    lesson,
    linear_attention,
    mamba,
    model,
    rwkv,
    train_mqar,
    workers,
)
from rebased.checks import check_recall_task

model.BLOCKS["mamba"] = mamba.MambaBlock
model.BLOCKS["rwkv"] = rwkv.RWKVBlock

# What is run: every field can be set from the command line
LEARNING_RATES = {  # chosen by the search of --preset ladder, on seeds that are not reported: results/mqar_ladder.jsonl
    **train_mqar.LEARNING_RATES,
    "conv_attention": 0.003,  # 1.0000 against .9996 at .01, which 04 takes: it learns faster
    "based_no_floor": 0.003,
    "rebased_floor": 0.003,
}


@dataclass(frozen=True)
class Experiment:
    """What is trained and tested. Softmax learns later, so it may get more epochs and a warm-up of its own."""

    mixers: tuple[str, ...] = tuple(LEARNING_RATES)
    lengths: tuple[int, ...] = (128,)
    pairs: tuple[int, ...] = (16,)  # one for each length
    d_models: tuple[int, ...] = (64,)
    seeds: tuple[int, ...] = (0, 1, 2)
    learning_rates: tuple[float, ...] = ()  # none: each mixer at its own, from LEARNING_RATES
    search_seeds: tuple[int, ...] = ()  # they choose the rate; none: the best mean over `seeds`, as the paper did
    model: str = "recall"  # recall: no positions, tested at any length; paper: the paper's MQAR model
    init: str = "wide"  # with "paper", N(0, 0.02), one of four runs reached .667 in 1,200 steps
    vocab_size: int = 256
    heads: int = 1  # 0: as the paper, 12 for kernels and 1 for all others
    dropout: float = 0.0  # of embeddings and of softmax weights
    examples: int = 6400  # in an epoch
    fresh: bool = True  # new examples in every epoch; else the same, in another order
    batch: int = 32
    epochs: int = 6
    softmax_epochs: int = 10
    warmup: int = 0  # steps
    softmax_warmup: int = 100
    rate_by_epoch: bool = False  # the cosine takes a step after each epoch, as the paper's; else after each batch
    stop_at: float = 1.0  # a run ends early above this test accuracy
    test_examples: int = 256
    test_lengths: tuple[int, ...] = (128, 512, 2048, 8192)  # none: the trained length only


SEVEN = ("attention", "conv_attention", "based", "rebased", "mamba", "rwkv", "elu")
LADDER = (
    *("based", "based_no_floor", "based_norm", "based_norm_no_floor"),
    *("x2", "x2_floor", "gamma", "gamma_floor", "gamma_beta", "gamma_beta_floor"),
    *("norm", "norm_floor", "rebased", "rebased_floor", "elementwise", "elementwise_floor"),
)
PAPER = dict(  # the paper's settings [1, section 5.1 and App. A; 2]
    seeds=(42, 43, 44, 45, 46),
    learning_rates=(5e-4, 1e-3, 3e-3, 1e-2),
    model="paper",
    init="paper",
    vocab_size=8192,
    heads=0,
    dropout=0.1,
    examples=100_000,
    fresh=False,
    batch=512,
    epochs=64,
    softmax_epochs=64,
    softmax_warmup=0,
    rate_by_epoch=True,
    stop_at=0.99,
    test_examples=3000,
    test_lengths=(),
)
PRESETS = {
    "ladder": dict(
        mixers=("conv_attention", *LADDER),
        seeds=(0, 1, 2, 3, 4),
        search_seeds=(100, 101),
        learning_rates=(0.001, 0.003, 0.01),
    ),
    "laptop": dict(
        mixers=SEVEN,
        lengths=(64,),
        pairs=(8,),
        d_models=(16, 24, 32),
        seeds=(0, 1, 2, 3, 4),
        search_seeds=(100, 101),
        learning_rates=(0.003, 0.01),
        model="paper",
        epochs=8,
        softmax_epochs=8,
        warmup=100,
        stop_at=0.99,
        test_examples=1000,
        test_lengths=(),
    ),
    "paper": PAPER
    | dict(
        mixers=SEVEN,
        lengths=(128, 256, 512, 1024, 2048),
        pairs=(16, 64, 128, 256, 512),
        d_models=(64, 128, 256, 512),
    ),
    "paper-ladder": PAPER
    | dict(
        mixers=("based", "x2", "norm", "gamma", "gamma_beta", "rebased", "based_norm", "elementwise"),
        lengths=(256, 2048),
        pairs=(32, 32),
        d_models=(16, 24, 32, 48),
    ),
}


@dataclass(frozen=True)
class Run:
    """One training run: T, K and d are those of its cell."""

    mixer: str
    length: int
    pairs: int
    d_model: int
    learning_rate: float
    seed: int

    @property
    def cell(self):
        return self.mixer, self.length, self.pairs, self.d_model


def planned_runs(experiment, seeds, part=(1, 1), chosen=None):
    """All runs of these seeds, seed by seed, so that an interrupted sweep has whole seeds first.

    part: shard i of n; a cell is never divided. chosen: {cell: learning rate} instead of the whole grid.
    """
    cells = []
    for length, pairs in zip(experiment.lengths, experiment.pairs, strict=True):
        for d_model in experiment.d_models:
            cells += [(mixer, length, pairs, d_model) for mixer in experiment.mixers]
    cells = list(dict.fromkeys(cells))  # each once, whatever is named twice
    runs = []
    for seed in seeds:
        for cell in sweep.shard(cells, part):
            rates = (chosen[cell],) if chosen else experiment.learning_rates or (LEARNING_RATES[cell[0]],)
            runs += [Run(*cell, rate, seed) for rate in rates]
    return list(dict.fromkeys(runs))


def is_softmax(mixer):
    """Whether the softmax fields of an Experiment hold for this mixer."""
    return mixer in ("attention", "conv_attention")


def epochs_of(run, experiment):
    return experiment.softmax_epochs if is_softmax(run.mixer) else experiment.epochs


def model_config(run, experiment):
    """The model of 03 for a run."""
    heads = experiment.heads or (12 if run.mixer in kernels.KERNELS else 1)
    if experiment.model == "recall":
        config = model.recall_config(run.mixer, experiment.vocab_size, run.d_model, heads)
        dropout = experiment.dropout
    else:
        config = model.mqar_config(run.mixer, run.d_model, run.length)
        dropout = min(config.dropout, experiment.dropout)
    return dataclasses.replace(
        config,
        vocab_size=experiment.vocab_size,
        heads=heads,
        init=experiment.init,
        dropout=dropout,
        attention_dropout=experiment.dropout,
    )


# The examples. 04 draws all examples of a run from one seed; here a run can be cut, so every epoch has a seed. The
# seeds of runs being below 2^20 and epochs fewer than 2^11, no two have the same one. All lie below 2^31, where the
# seeds of the tests and of the examples that do not change begin.
SEEDS = 2**20
EPOCHS = 2**11
TEST_SEED = train_mqar.TEST_SEED
FIXED_SEED = TEST_SEED + 42


def epoch_seed(run, epoch):
    return run.seed + SEEDS * epoch


@functools.lru_cache(maxsize=1)
def fixed_examples(n, length, pairs, vocab_size):
    """The training set where it is the same in all runs and epochs."""
    return train_mqar.make_mqar(n, length, pairs, vocab_size, seed=FIXED_SEED)


def epoch_batches(run, experiment, epoch):
    """Yields (inputs, labels) of one epoch; seed and epoch alone decide which and in which order."""
    n, vocab_size, seed = experiment.examples, experiment.vocab_size, epoch_seed(run, epoch)
    if experiment.fresh:
        inputs, labels = train_mqar.make_mqar(n, run.length, run.pairs, vocab_size, seed=seed)
        order = torch.arange(n)
    else:
        inputs, labels = fixed_examples(n, run.length, run.pairs, vocab_size)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    for at in order.split(experiment.batch)[: steps_per_epoch(experiment)]:
        yield inputs[at], labels[at]


def steps_per_epoch(experiment):
    """Whole batches only."""
    return experiment.examples // experiment.batch


# Training
def learning_rate(step, run, experiment):
    """Linear warm-up times half a cosine to 0, taken after each batch or after each epoch."""
    per_epoch, epochs = steps_per_epoch(experiment), epochs_of(run, experiment)
    warmup = experiment.softmax_warmup if is_softmax(run.mixer) else experiment.warmup
    done = step // per_epoch / epochs if experiment.rate_by_epoch else step / (per_epoch * epochs)
    return run.learning_rate * min(1, (step + 1) / (warmup + 1)) * (1 + math.cos(math.pi * done)) / 2


def train_epoch(trained, optimizer, run, experiment, epoch, report):
    """One pass; report(steps done, loss, accuracy) now and then. Returns the mean loss of its last 20 steps."""
    trained.train()
    device = trained.embedding.weight.device
    losses = []
    first = epoch * steps_per_epoch(experiment)
    for step, (inputs, labels) in enumerate(epoch_batches(run, experiment, epoch), first):
        optimizer.param_groups[0]["lr"] = learning_rate(step, run, experiment)
        positions = train_mqar.query_positions(labels)  # found before they travel to a GPU, which then need not wait
        targets = labels.gather(1, positions)
        loss, accuracy = train_mqar.training_step(
            trained, optimizer, inputs.to(device), positions.to(device), targets.to(device)
        )
        losses.append(loss)
        if (step + 1) % 20 == 0 or step + 1 == first + steps_per_epoch(experiment):
            report(step + 1, loss.item(), accuracy.item())
    return torch.stack(losses[-20:]).mean().item()


def train(run, experiment, device="cpu", checkpoint=None, report=lambda steps, loss, accuracy: None):
    """Train one model -> it, and its history: loss and test accuracy after each epoch, γ and β before and after.

    checkpoint: where to keep the state after each epoch, and to go on from; the result does not depend on it.
    """
    torch.manual_seed(run.seed)
    trained = model.LanguageModel(model_config(run, experiment)).to(device)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=run.learning_rate, weight_decay=0.1, fused=True)
    history = {"losses": [], "accuracies": [], "placed": placed(trained, {})}
    saved = checkpoint and sweep.load_checkpoint(checkpoint)
    if saved:
        trained.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        history = saved["history"]
    for epoch in range(len(history["losses"]), epochs_of(run, experiment)):
        if epoch and (history["accuracies"][-1] > experiment.stop_at or math.isnan(history["losses"][-1])):
            break
        torch.manual_seed(epoch_seed(run, epoch))  # dropout: each epoch begins anew, no random state has to be kept
        history["losses"].append(train_epoch(trained, optimizer, run, experiment, epoch, report))
        history["accuracies"].append(accuracy(trained.eval(), run, experiment))
        placed(trained, history["placed"])
        if checkpoint and epochs_of(run, experiment) > 1:
            content = {"model": trained.state_dict(), "optimizer": optimizer.state_dict(), "history": history}
            files.save_tensors(checkpoint, content)
    return trained.eval(), history


def placed(trained, history):
    """Append [mean, std] of the entries of each γ and β of the last layer to history; returns it. [1, Figure 10]"""
    kernel = kernel_of(trained)
    for name in mqar_report.PLACED:
        values = getattr(kernel, name, None)
        if values is not None:
            history.setdefault(name, []).append([values.mean().item(), values.std(correction=0).item()])
    return history


def kernel_of(trained):
    """The kernel of the last layer; None if it has none."""
    return getattr(getattr(trained.blocks[-1], "mixer", None), "kernel", None)


def has_weights(trained):
    """Whether the last layer is an attention, whose weights can be looked at."""
    return hasattr(getattr(trained.blocks[-1], "mixer", None), "weights")


# Testing. Each cell is a length and a placement of the queries. Beside what 04 measures: how well the largest weights
# mark the right pair. Heads are averaged first.
@functools.lru_cache(maxsize=8)
def test_set(n, length, pairs, vocab_size, power_a):
    """inputs, labels, query positions of a test."""
    inputs, labels = train_mqar.make_mqar(n, length, pairs, vocab_size, power_a, TEST_SEED)
    return inputs, labels, train_mqar.query_positions(labels)


def overlap(weights, tokens, positions, pairs_end):
    """Sizes of the intersection and of the union of what is attended to and what should be, summed over queries.

    Attended: every place with at least half of the largest weight of its row. What should be: the right pair, whose
    three places count as one. (How the paper made its matrix binary is not stated [1, section 5.6].)
    """
    attended = weights >= weights.amax(-1, keepdim=True) / 2
    is_right = train_mqar.right_places(tokens, positions, pairs_end)
    hits = (attended & is_right).any(-1).sum().item()
    return hits, (attended & ~is_right).sum().item() + is_right.shape[0] * is_right.shape[1]


@torch.no_grad()
def accuracy(trained, run, experiment):
    """The share of test queries answered right at the trained length."""
    inputs, labels, positions = test_set(
        experiment.test_examples, run.length, run.pairs, experiment.vocab_size, train_mqar.PLACEMENTS["official"]
    )
    device, right = trained.embedding.weight.device, 0
    for part in torch.arange(len(inputs)).split(max(1, 2**16 // run.length)):
        chosen = trained.logits_at(inputs[part].to(device), positions[part].to(device)).argmax(-1).cpu()
        right += (chosen == labels[part].gather(1, positions[part])).sum().item()
    return right / positions.numel()


@torch.no_grad()
def test(trained, length, power_a, run, experiment):
    """{"accuracy", "right", "others", "filler", "iou"} of one cell, means over queries; None where no weights are."""
    n = max(1, experiment.test_examples // 4) if length >= 8192 else experiment.test_examples
    inputs, labels, positions = test_set(n, length, run.pairs, experiment.vocab_size, power_a)
    device = trained.embedding.weight.device
    looks = has_weights(trained)
    right = 0
    totals = torch.zeros(3, dtype=torch.float64)
    hits, union = 0, 0
    for part in torch.arange(n).split(max(1, 2**16 // length)):
        tokens, at = inputs[part], positions[part]
        found = trained.logits_at(tokens.to(device), at.to(device), return_weights=looks)
        logits = found
        if looks:
            logits, weights = found[0], found[1].mean(1).cpu()  # (B, n, V), (B, n, T)
            totals += torch.stack(train_mqar.attention_shares(weights, tokens, at, 2 * run.pairs)).sum((1, 2))
            more_hits, more_union = overlap(weights, tokens, at, 2 * run.pairs)
            hits, union = hits + more_hits, union + more_union
        right += (logits.argmax(-1).cpu() == labels[part].gather(1, at)).sum().item()
    shares = (totals / positions.numel()).tolist() if looks else [None] * 3
    return {
        "accuracy": right / positions.numel(),
        **dict(zip(("right", "others", "filler"), shares, strict=True)),
        "iou": hits / union if looks else None,
    }


@torch.no_grad()
def look(trained, run, experiment):
    """The attention of the first test example at its queries, to be drawn: weights, and the place of each value."""
    inputs, _, positions = test_set(
        experiment.test_examples, run.length, run.pairs, experiment.vocab_size, train_mqar.PLACEMENTS["official"]
    )
    tokens, at = inputs[:1], positions[:1]
    device = trained.embedding.weight.device
    _, weights = trained.logits_at(tokens.to(device), at.to(device), return_weights=True)
    weights = weights.mean(1)[0].cpu()  # (n, T)
    right = train_mqar.right_places(tokens, at, 2 * run.pairs)[0].double().argmax(-1) + 1  # (n,): one after the key
    return {"weights": [[float(f"{w:.3g}") for w in row] for row in weights.tolist()], "right": right.tolist()}


@torch.no_grad()
def full_pass(trained, run, experiment):
    """Linear time, shown: every place of one longest sequence through the chunked form, and through the quadratic."""
    length = max(experiment.test_lengths)
    tokens, _ = train_mqar.make_mqar(1, length, run.pairs, experiment.vocab_size, 1.0, TEST_SEED)
    block, kernel = trained.blocks[-1], kernel_of(trained)
    x = block.norm1(trained.trunk(tokens))
    q, k = kernel.prepare(block.mixer.q(x), block.mixer.k(x))
    q, k, v = (model.split_heads(y, block.mixer.heads) for y in (q, k, block.mixer.v(x)))
    start = time.perf_counter()
    chunked = linear_attention.attention(q, k, v, kernel)
    middle = time.perf_counter()
    quadratic = linear_attention.quadratic_attention(q, k, v, kernel)
    end = time.perf_counter()
    return {
        "length": length,
        "chunked_seconds": middle - start,
        "quadratic_seconds": end - middle,
        "difference": linear_attention.relative_error([chunked], [quadratic]),
    }


# One run -> one row
def perform(run, report, experiment, role, rows_path):
    """Train and test one model, in a worker -> its row of results. Its checkpoint lies beside the rows."""
    start = time.perf_counter()
    checkpoint = checkpoint_of(run, experiment, role, rows_path)
    trained, history = train(run, experiment, workers.device(), checkpoint, report)
    train_seconds = time.perf_counter() - start
    cells = {}
    for length in experiment.test_lengths or (run.length,):
        for placement, power_a in train_mqar.PLACEMENTS.items():
            if experiment.test_lengths or placement == "official":
                cells[f"{length} {placement}"] = test(trained, length, power_a, run, experiment)
    first = run.seed == experiment.seeds[0]
    looks = first and has_weights(trained)
    timed = first and kernel_of(trained) is not None and len(experiment.test_lengths) > 1
    return {
        **dataclasses.asdict(run),
        "role": role,
        "settings": settings(experiment),
        "accuracy": max(history["accuracies"]),
        **history,
        "cells": cells,
        "picture": look(trained, run, experiment) if looks else None,
        "full_pass": full_pass(trained.cpu(), run, experiment) if timed else None,
        "train_seconds": train_seconds,
        "seconds": time.perf_counter() - start,
    }


def checkpoint_of(run, experiment, role, rows_path):
    return sweep.checkpoint_path(rows_path, f"{role} {run} {json.dumps(settings(experiment))}")


AXES = ("mixers", "lengths", "pairs", "d_models", "seeds", "learning_rates", "search_seeds")


def settings(experiment):
    """The fields that are the same in all runs of a sweep, as JSON gives them back."""
    fields = dataclasses.asdict(experiment)
    return json.loads(json.dumps({name: fields[name] for name in fields if name not in AXES}))


# The sweep: first the runs that choose the learning rates ("search"), then those that are reported ("report")
def finished(path, experiment, role):
    """{Run: row} of the rows in the file that have these settings and this role."""
    found = {}
    for row in files.read_rows(path, mqar_report.ROW):
        if row.get("settings") == settings(experiment) and row.get("role") == role:
            found[Run(*(row[field.name] for field in dataclasses.fields(Run)))] = row
    return found


def perform_missing(planned, experiment, role, path, processes, extra):
    """Perform those planned runs that have no row yet; returns the rows of all, in the order planned."""
    done = finished(path, experiment, role)
    missing = [run for run in planned if run not in done]
    for run in done:  # a kill between a row and the end of its checkpoint leaves that behind
        sweep.remove_checkpoint(checkpoint_of(run, experiment, role, path))
    if len(missing) < len(planned):
        print(f"{path}: {len(planned) - len(missing)} of {len(planned)} runs are there already and are not repeated")
    if missing:

        def keep(run, row):
            files.append_row(path, row | extra)
            sweep.remove_checkpoint(checkpoint_of(run, experiment, role, path))

        work = functools.partial(perform, experiment=experiment, role=role, rows_path=path)
        workers.run_all(work, missing, functools.partial(total_steps, experiment=experiment), processes, keep)
        done = finished(path, experiment, role)
    return [done[run] for run in planned]


def total_steps(run, experiment):
    return epochs_of(run, experiment) * steps_per_epoch(experiment)


def perform_sweep(experiment, path, processes, part, extra):
    """Perform all planned runs of a shard; returns its rows, in the order planned."""
    if not planned_runs(experiment, experiment.seeds, part):
        raise lesson.Refusal(f"--shard {part[0]}/{part[1]} has nothing to do: there are fewer cells than shards")
    searched, chosen = [], None
    if experiment.search_seeds:
        search = planned_runs(experiment, experiment.search_seeds, part)
        searched = perform_missing(search, experiment, "search", path, processes, extra)
        chosen = mqar_report.best_rates(searched)
    planned = planned_runs(experiment, experiment.seeds, part, chosen)
    return searched + perform_missing(planned, experiment, "report", path, processes, extra)


# The command line: every field of Experiment is an option
def seed_number(text):
    """An argparse type: a seed of a run."""
    value = lesson.at_least(int, 0)(text)
    if value >= SEEDS:
        raise argparse.ArgumentTypeError(f"a seed must be below {SEEDS}, lest two runs share examples; got {text}")
    return value


def mixer_name(text):
    """An argparse type: the name of a two-layer model of 03."""
    names = dict.fromkeys((*SEVEN, *kernels.KERNELS))
    if text not in names:
        raise argparse.ArgumentTypeError(f"unknown mixer {text!r}; choose from {', '.join(names)}")
    return text


def shard_of(text):
    """An argparse type: "i/n" -> (i, n)."""
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
        raise argparse.ArgumentTypeError(f"{text!r} is not i/n with 1 <= i <= n, like 2/8")
    return int(i), int(n)


TYPES = {
    "mixers": mixer_name,
    "seeds": seed_number,
    "search_seeds": seed_number,
    "learning_rates": lesson.learning_rate,
    "model": str,
    "init": str,
    "heads": lesson.at_least(int, 0),
    "dropout": lesson.at_least(float, 0),
    "warmup": lesson.at_least(int, 0),
    "softmax_warmup": lesson.at_least(int, 0),
    "stop_at": lesson.at_least(float, 0),
}


def make_parser():
    """Options of the program and one for each field of Experiment."""
    parser = argparse.ArgumentParser(
        description="Train mixers on associative recall in grids, test them on longer contexts. "
        "Without options: 5 mixers × 3 seeds, 4 minutes on two cores."
    )
    add = parser.add_argument
    add("--preset", choices=tuple(PRESETS),
        help="ladder: every kernel with a floor of ½ and without; laptop: seven systems, three widths; "
        "paper, paper-ladder: Figure 1 and Table 1 of the paper, for GPUs")
    add("--output", type=lesson.writable_path,
        help="rows of results; runs that are there are not repeated (runs/mqar_PRESET.jsonl, runs/mqar_grid.jsonl)")
    add("--figure", type=mqar_report.figure_paths, help="where to draw it (as --output, but .png)")
    add("--workers", type=lesson.at_least(int, 1), default=workers.default_workers(),
        help="processes, one thread each; on GPUs they take turns at them (%(default)s)")
    add("--shard", type=shard_of, default=(1, 1), metavar="i/n",
        help="perform part i of n, on this machine; join the files of rows with cat, then run without --shard")
    group = parser.add_argument_group("settings of the experiment (default: without a preset)")
    for field in dataclasses.fields(Experiment):
        flag = "--" + field.name.replace("_", "-")
        settings_of_flag = {"default": argparse.SUPPRESS, "help": f"({field.default})"}
        if isinstance(field.default, bool):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **settings_of_flag)
        else:
            many = "*" if isinstance(field.default, tuple) else None
            kind = TYPES.get(field.name, lesson.at_least(int, 1))
            group.add_argument(flag, type=kind, nargs=many, **settings_of_flag)
    return parser


def make_experiment(options, parser):
    """The experiment asked for; the program ends with one line if it cannot be run."""
    given = dict(PRESETS.get(options.preset, {}))
    for field in dataclasses.fields(Experiment):
        if hasattr(options, field.name):
            value = getattr(options, field.name)
            given[field.name] = tuple(value) if isinstance(value, list) else value
    experiment = Experiment(**given)
    try:
        refuse_impossible(experiment)
    except ValueError as error:
        parser.error(str(error))
    return experiment


def refuse_impossible(experiment):
    """Raise ValueError, in one line, for what would fail after an hour."""
    for field in ("mixers", "lengths", "d_models", "seeds"):
        if not getattr(experiment, field):
            raise ValueError(f"--{field.replace('_', '-')} needs at least one value")
    if len(experiment.pairs) != len(experiment.lengths):
        needed, given = len(experiment.lengths), len(experiment.pairs)
        raise ValueError(f"--pairs needs one value for each length: {needed}, got {given}")
    if set(experiment.seeds) & set(experiment.search_seeds):
        raise ValueError("--search-seeds choose the learning rate: they must not be among --seeds")
    without = [mixer for mixer in experiment.mixers if mixer not in LEARNING_RATES]
    if without and not experiment.learning_rates:
        unknown = ", ".join(without)
        raise ValueError(f"no learning rate is known for {unknown}; give --learning-rates (and --search-seeds)")
    if experiment.model not in ("recall", "paper"):
        raise ValueError(f"--model is recall or paper, got {experiment.model!r}")
    if experiment.batch > experiment.examples:
        raise ValueError(f"an epoch of {experiment.examples} --examples has no batch of {experiment.batch}")
    if max(experiment.epochs, experiment.softmax_epochs) >= EPOCHS:
        raise ValueError(f"--epochs must be below {EPOCHS}, lest two epochs share examples")
    if experiment.test_lengths and (experiment.model == "paper" or len(experiment.lengths) > 1):
        raise ValueError("--test-lengths need one trained length and a model without positions (--model recall)")
    for run in planned_runs(experiment, experiment.seeds[:1]):
        model_config(run, experiment)
        for length in (run.length, *experiment.test_lengths):
            check_recall_task(1, length, run.pairs, experiment.vocab_size, 1.0, 0)


def where_to_write(options, parser):
    """The files of rows and of the first figure; the program ends with one line if one of them cannot be written."""
    try:
        rows = options.output or lesson.writable_path(f"runs/mqar_{options.preset or 'grid'}.jsonl")
        figure = options.figure or mqar_report.figure_paths(rows.with_suffix(".png"))
    except argparse.ArgumentTypeError as error:
        parser.error(f"{error} (--output, --figure)")
    if rows.resolve() == figure.resolve():
        parser.error(f"--output and --figure are both {figure}; rows need a file of theirs")
    return rows, figure


def main(argv=None):
    """Run what is missing, print the tables and their reading, draw the figures."""
    parser = make_parser()
    options = lesson.parse_arguments(parser, argv)
    experiment = make_experiment(options, parser)
    path, figure = where_to_write(options, parser)
    train_mqar.show_example()
    start = time.perf_counter()
    extra = lesson.provenance(__file__, argv)
    rows = lesson.obey(
        lambda: perform_sweep(experiment, path, options.workers, options.shard, extra),
        f"finished runs are in {path}, unfinished ones beside it; the same command goes on from there",
    )
    mqar_report.report(rows, figure)
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes; rows: {path}")


if __name__ == "__main__":
    main()
