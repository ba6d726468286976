"""04 · Associative recall: what a floor of ½ does to a trained model, and the paper's experiment

Aim: train the same two-layer model with different attentions on multi-query associative recall (MQAR), then test the
same weights on contexts up to 64 times longer, and see which of them drown in tokens that do not matter.

You will learn
  1. how to train on a few labelled positions, and to test the same weights where they have not been;
  2. how to compare fairly: one grid of learning rates, chosen on seeds that are not reported;
  3. that Based and ReBased both learn the task perfectly at the trained length, and what happens beyond it;
  4. that the floor is the cause: take the ½ from Based, give it to ReBased, and look again.

Letters: as in 04_mqar_data.

References: [P], [C] as in 01; [Z] Arora et al., Zoology, arXiv 2312.04927, github HazyResearch/zoology.

Run: python 04_train_mqar.py                        5 mixers × 3 seeds, about 4 minutes on two cores
     python 04_train_mqar.py --preset ladder        every kernel with a floor of ½ and without, 5 seeds: 50 minutes
     python 04_train_mqar.py --preset laptop        seven systems, three widths, 5 seeds: 45 minutes
     python 04_train_mqar.py --preset paper         Figure 1 of [P]: for GPUs; --shard 1/8 for the first of 8 machines
     python 04_train_mqar.py --preset paper-ladder  Table 1 of [P], likewise
All of them continue where they were interrupted.
"""
# %%
import argparse
import dataclasses
import functools
import json
import math
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
import torch.nn.functional as F

kernels = import_module("01_kernels")
cost = import_module("02_linear_attention_cost")
models = import_module("03_model")
data = import_module("04_mqar_data")
reports = import_module("04_mqar_report")
sweeps = import_module("04_mqar_sweep")
make_mqar, query_positions = data.make_mqar, data.query_positions

# %% What is run: every field can be set from the command line
LEARNING_RATES = {  # what the search of --preset ladder chose, on seeds that are not reported: results/mqar_ladder.jsonl
    "conv_attention": 0.003,
    "rebased": 0.01,
    "based": 0.003,
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
    search_seeds: tuple[int, ...] = ()  # seeds that choose the rate; none: the best mean over `seeds`, as the paper did
    model: str = "recall"  # recall: no positions, tested at any length; paper: the paper's MQAR model
    init: str = "wide"  # with the paper's N(0, 0.02) nothing is learned in 1,200 steps
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
SQUARES = tuple(name for name in models.KERNEL_NAMES if name != "elu")
# The paper's settings [P 5.1, App. A; C].
PAPER = dict(seeds=(42, 43, 44, 45, 46), learning_rates=(5e-4, 1e-3, 3e-3, 1e-2), model="paper", init="paper",
             vocab_size=8192, heads=0, dropout=0.1, examples=100_000, fresh=False, batch=512, epochs=64, softmax_epochs=64,
             softmax_warmup=0, rate_by_epoch=True, stop_at=0.99, test_examples=3000, test_lengths=())
PRESETS = {
    "ladder": dict(mixers=("conv_attention", *SQUARES), seeds=(0, 1, 2, 3, 4), search_seeds=(100, 101),
                   learning_rates=(0.001, 0.003, 0.01)),
    "laptop": dict(mixers=SEVEN, lengths=(64,), pairs=(8,), d_models=(16, 24, 32), seeds=(0, 1, 2, 3, 4),
                   learning_rates=(0.003, 0.01), search_seeds=(100, 101), model="paper", epochs=8, softmax_epochs=8,
                   warmup=100, stop_at=0.99, test_examples=1000, test_lengths=()),
    "paper": PAPER | dict(mixers=SEVEN, lengths=(128, 256, 512, 1024, 2048), pairs=(16, 64, 128, 256, 512),
                          d_models=(64, 128, 256, 512)),
    "paper-ladder": PAPER | dict(mixers=("based", "x2", "norm", "gamma", "gamma_beta", "rebased", "based_norm", "elementwise"),
                                 lengths=(256, 2048), pairs=(32, 32), d_models=(16, 24, 32, 48)),
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
    cells = [(mixer, length, pairs, d_model) for length, pairs in zip(experiment.lengths, experiment.pairs, strict=True)
             for d_model in experiment.d_models for mixer in experiment.mixers]
    cells = sweeps.shard(cells, part)
    rates = {cell: (chosen[cell],) if chosen else experiment.learning_rates or (LEARNING_RATES[cell[0]],) for cell in cells}
    return [Run(*cell, rate, seed) for seed in seeds for cell in cells for rate in rates[cell]]


def is_softmax(mixer):
    """Whether the softmax fields of an Experiment hold for this mixer."""
    return mixer in ("attention", "conv_attention")


def epochs_of(run, experiment):
    return experiment.softmax_epochs if is_softmax(run.mixer) else experiment.epochs


def model_config(run, experiment):
    """The model of 03 for a run."""
    heads = experiment.heads or (12 if run.mixer in models.KERNEL_NAMES else 1)
    if experiment.model == "recall":
        config = models.recall_config(run.mixer, experiment.vocab_size, run.d_model, heads)
        return dataclasses.replace(config, init=experiment.init, dropout=experiment.dropout, attention_dropout=experiment.dropout)
    config = models.mqar_config(run.mixer, run.d_model, run.length)
    return dataclasses.replace(config, vocab_size=experiment.vocab_size, heads=heads, init=experiment.init,
                               dropout=min(config.dropout, experiment.dropout), attention_dropout=experiment.dropout)

# %% Training
# The loss looks at the K query positions; so do the last layer and the head, which need nothing else: 16 rows of 128.
DATA_SEED, TEST_SEED = 42, 10**12  # of examples that do not change, and of tests: no epoch has the second


@functools.lru_cache(maxsize=1)
def fixed_examples(n, length, pairs, vocab_size):
    """The training set where it is the same in all runs and epochs."""
    return make_mqar(n, length, pairs, vocab_size, seed=DATA_SEED)


def epoch_batches(run, experiment, epoch):
    """Yields (inputs, labels) of one epoch; seed and epoch alone decide which and in which order."""
    if experiment.fresh:
        seed = run.seed + 1000 * epoch
        inputs, labels = make_mqar(experiment.examples, run.length, run.pairs, experiment.vocab_size, seed=seed)
        order = torch.arange(experiment.examples)
    else:
        inputs, labels = fixed_examples(experiment.examples, run.length, run.pairs, experiment.vocab_size)
        order = torch.randperm(experiment.examples, generator=torch.Generator().manual_seed(run.seed + 1000 * epoch))
    for at in order.split(experiment.batch)[: steps_per_epoch(experiment)]:
        yield inputs[at], labels[at]


def steps_per_epoch(experiment):
    """Whole batches only."""
    return experiment.examples // experiment.batch


def learning_rate(step, run, experiment):
    """Linear warm-up times half a cosine to 0, taken after each batch or after each epoch."""
    per_epoch, epochs = steps_per_epoch(experiment), epochs_of(run, experiment)
    warmup = experiment.softmax_warmup if is_softmax(run.mixer) else experiment.warmup
    done = step // per_epoch / epochs if experiment.rate_by_epoch else step / (per_epoch * epochs)
    return run.learning_rate * min(1, (step + 1) / (warmup + 1)) * (1 + math.cos(math.pi * done)) / 2


def train_epoch(model, optimizer, run, experiment, epoch, report):
    """One pass; report(steps done, loss, accuracy) now and then. Returns the mean loss of its last 20 steps."""
    model.train()
    device, losses, first = model.embedding.weight.device, [], epoch * steps_per_epoch(experiment)
    for step, (inputs, labels) in enumerate(epoch_batches(run, experiment, epoch), first):
        optimizer.param_groups[0]["lr"] = learning_rate(step, run, experiment)
        positions = query_positions(labels)
        targets = labels.gather(1, positions).to(device)  # (B, K)
        logits = model(inputs.to(device), positions.to(device))  # (B, K, V)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if (step + 1) % 20 == 0 or step + 1 == first + steps_per_epoch(experiment):
            report(step + 1, loss.item(), (logits.argmax(-1) == targets).float().mean().item())
    return torch.stack(losses[-20:]).mean().item()


def train(run, experiment, device="cpu", checkpoint=None, report=lambda steps, loss, accuracy: None):
    """Train one model -> the model, and its history: loss and test accuracy after each epoch, γ and β before and after.

    checkpoint: where to keep the state after each epoch, and to go on from; the result does not depend on it.
    """
    torch.manual_seed(run.seed)
    model = models.LanguageModel(model_config(run, experiment)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.learning_rate, weight_decay=0.1, fused=True)
    history = {"losses": [], "accuracies": [], "placed": placed(model, {})}
    saved = checkpoint and sweeps.load_checkpoint(checkpoint, device)
    if saved:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        history = saved["history"]
    for epoch in range(len(history["losses"]), epochs_of(run, experiment)):
        if history["accuracies"] and (history["accuracies"][-1] > experiment.stop_at or math.isnan(history["losses"][-1])):
            break
        torch.manual_seed(run.seed + 1000 * epoch)  # dropout: each epoch begins anew, so no random state has to be kept
        history["losses"].append(train_epoch(model, optimizer, run, experiment, epoch, report))
        history["accuracies"].append(accuracy(model.eval(), run, experiment))
        placed(model, history["placed"])
        if checkpoint and epochs_of(run, experiment) > 1:
            content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "history": history}
            sweeps.save_checkpoint(checkpoint, content)
    return model.eval(), history


def placed(model, history):
    """Append [mean, std] of the entries of each γ and β of the last layer to history; returns it. [P fig 10]"""
    kernel = getattr(model.blocks[-1].mixer, "kernel", None)
    for name in reports.PLACED:
        values = getattr(kernel, name, None)
        if values is not None:
            history.setdefault(name, []).append([values.mean().item(), values.std(correction=0).item()])
    return history

# %% Testing: the same weights, longer contexts
# Each cell is a length and a placement of the queries: the official power law or uniform. Beside the accuracy: the
# shares of the last layer's attention and how well its largest weights mark the right pair (`attention_shares` and
# `overlap` of 04_mqar_data). Heads are averaged first.
PLACEMENTS = {"official": 0.01, "uniform": 1.0}
MEASURES = ("accuracy", "right", "others", "filler")


@functools.lru_cache(maxsize=8)
def test_set(n, length, pairs, vocab_size, power_a):
    """inputs, labels, query positions of a test."""
    inputs, labels = make_mqar(n, length, pairs, vocab_size, power_a, TEST_SEED)
    return inputs, labels, query_positions(labels)


@torch.no_grad()
def accuracy(model, run, experiment):
    """The share of test queries answered right at the trained length."""
    inputs, labels, positions = test_set(experiment.test_examples, run.length, run.pairs, experiment.vocab_size, 0.01)
    device, right = model.embedding.weight.device, 0
    for rows in torch.arange(len(inputs)).split(max(1, 2**16 // run.length)):
        chosen = model(inputs[rows].to(device), positions[rows].to(device)).argmax(-1).cpu()
        right += (chosen == labels[rows].gather(1, positions[rows])).sum().item()
    return right / positions.numel()


@torch.no_grad()
def test(model, length, power_a, run, experiment):
    """{"accuracy", "right", "others", "filler", "iou"} of one cell, means over queries; None without weights to look at."""
    n = max(1, experiment.test_examples // 4) if length >= 8192 else experiment.test_examples
    inputs, labels, positions = test_set(n, length, run.pairs, experiment.vocab_size, power_a)
    device, totals, sets = model.embedding.weight.device, torch.zeros(4, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    looks = hasattr(model.blocks[-1].mixer, "weights")
    for rows in torch.arange(n).split(max(1, 2**16 // length)):
        tokens, at = inputs[rows], positions[rows]
        x = model.trunk(tokens.to(device))
        right = model.top(x, at.to(device)).argmax(-1).cpu() == labels[rows].gather(1, at)
        shares = [torch.zeros_like(right)] * 3
        if looks:
            weights = model.attention_weights(x, at.to(device)).mean(1).cpu()  # (B, n, T)
            shares = data.attention_shares(weights, tokens, at, 2 * run.pairs)
            sets += torch.tensor(data.overlap(weights, tokens, at, 2 * run.pairs))
        totals += torch.stack([right.double(), *shares]).sum((1, 2))
    means = (totals / positions.numel()).tolist()
    cell = dict(zip(MEASURES, means if looks else [means[0], None, None, None], strict=True))
    return cell | {"iou": (sets[0] / sets[1]).item() if looks else None}


@torch.no_grad()
def look(model, run, experiment):
    """The attention of the first test example at its queries, to be drawn: weights, and the place of each value."""
    inputs, _, positions = test_set(experiment.test_examples, run.length, run.pairs, experiment.vocab_size, 0.01)
    tokens, at = inputs[:1], positions[:1]
    device = model.embedding.weight.device
    weights = model.attention_weights(model.trunk(tokens.to(device)), at.to(device)).mean(1)[0].cpu()  # (n, T)
    right = data.right_places(tokens, at, 2 * run.pairs)[0].double().argmax(-1) + 1  # (n,): one after the key
    return {"weights": [[float(f"{w:.3g}") for w in row] for row in weights.tolist()], "right": right.tolist()}


@torch.no_grad()
def full_pass(model, run, experiment):
    """Linear time, shown: every position of one longest sequence through the chunked form, and through the quadratic."""
    length = max(experiment.test_lengths)
    tokens, _ = make_mqar(1, length, run.pairs, experiment.vocab_size, 1.0, TEST_SEED)
    x, layer = model.trunk(tokens), model.blocks[-1]
    q, k = layer.mixer.queries_and_keys(layer.norm1(x), None)
    v = models.split_heads(layer.mixer.v(layer.norm1(x)), layer.mixer.heads)
    forms = models.linear_attention.chunked_attention, models.linear_attention.quadratic_attention
    start = time.perf_counter()
    chunked = forms[0](q, k, v, layer.mixer.kernel)
    middle = time.perf_counter()
    quadratic = forms[1](q, k, v, layer.mixer.kernel)
    end = time.perf_counter()
    difference = ((chunked - quadratic).norm() / quadratic.norm()).item()
    return {"length": length, "chunked_seconds": middle - start, "quadratic_seconds": end - middle, "difference": difference}

# %% One run -> one row
def perform(run, experiment, device, checkpoint, report):
    """Train and test one model, in a worker -> its row of results."""
    start = time.perf_counter()
    model, history = train(run, experiment, device, checkpoint, report)
    trained = time.perf_counter() - start
    cells = {f"{length} {placement}": test(model, length, power_a, run, experiment)
             for length in experiment.test_lengths or (run.length,) for placement, power_a in PLACEMENTS.items()
             if experiment.test_lengths or placement == "official"}
    first = run.seed == experiment.seeds[0]
    looks = first and hasattr(model.blocks[-1].mixer, "weights")
    timed = first and run.mixer in models.KERNEL_NAMES and len(experiment.test_lengths) > 1
    return {
        **dataclasses.asdict(run),
        "settings": settings(experiment),
        "accuracy": max(history["accuracies"]),
        **history,
        "cells": cells,
        "picture": look(model, run, experiment) if looks else None,
        "full_pass": full_pass(model.cpu(), run, experiment) if timed else None,
        "train_seconds": trained,
        "seconds": time.perf_counter() - start,
    }


AXES = ("mixers", "lengths", "pairs", "d_models", "seeds", "learning_rates", "search_seeds")


def settings(experiment):
    """The fields that are the same in all runs of a sweep, as JSON gives them back."""
    fields = dataclasses.asdict(experiment)
    return json.loads(json.dumps({name: fields[name] for name in fields if name not in AXES}))

# %% The sweep: first the runs that choose the learning rates, then those that are reported
ROW = ("mixer", "length", "pairs", "d_model", "learning_rate", "seed", "settings", "cells", "placed")


def finished(path, experiment):
    """{Run: row} of the rows in the file that have these settings."""
    rows = [row for row in sweeps.read_rows(path, ROW) if row["settings"] == settings(experiment)]
    return {Run(*(row[field.name] for field in dataclasses.fields(Run))): row for row in rows}


def perform_missing(planned, experiment, path, workers, extra):
    """Perform those planned runs that have no row yet."""
    missing = [run for run in planned if run not in finished(path, experiment)]
    if len(missing) < len(planned):
        print(f"{path}: {len(planned) - len(missing)} of {len(planned)} runs are there already and are not repeated")
    if missing:
        key = json.dumps(settings(experiment))
        checkpoints = {run: sweeps.checkpoint_path(path, f"{run} {key}") for run in missing}
        sweeps.perform_all(checkpoints, perform, (experiment,), path, workers,
                           lambda run: epochs_of(run, experiment) * steps_per_epoch(experiment), extra)


def sweep(experiment, path, workers, part, extra):
    """Perform all planned runs of a shard; returns its rows, in the order planned."""
    search = planned_runs(experiment, experiment.search_seeds, part) if experiment.search_seeds else []
    perform_missing(search, experiment, path, workers, extra)
    done = finished(path, experiment)
    chosen = reports.best_rates([done[run] for run in search], experiment.search_seeds) if search else None
    planned = planned_runs(experiment, experiment.seeds, part, chosen)
    perform_missing(planned, experiment, path, workers, extra)
    done = finished(path, experiment)
    return [done[run] for run in search + planned]

# %% Claims
def check_chunked_equals_quadratic():
    """An untrained model at 600 tokens: both forms of its last layer give the same outputs."""
    torch.manual_seed(0)
    experiment, run = Experiment(test_lengths=(600,)), Run("rebased", 128, 16, 64, 0.01, 0)
    found = full_pass(models.LanguageModel(model_config(run, experiment)), run, experiment)
    assert found["difference"] < 1e-4, found


def check_the_paper_preset_is_the_papers():
    """The models of `--preset paper` have the counts of Table 6, and its runs are 7 systems × 20 cells × 4 rates × 5 seeds."""
    experiment = Experiment(**PRESETS["paper"])
    for mixer, length, count in (("based", 256, 577_984), ("rebased", 256, 578_752), ("attention", 1024, 623_744),
                                 ("conv_attention", 512, 578_752), ("mamba", 1024, 655_360), ("rwkv", 1024, 623_872)):
        found = models.count_parameters(model_config(Run(mixer, length, 16, 64, 0.001, 0), experiment))
        assert found == count, f"{mixer}: {found:,}, the paper has {count:,}"
    assert len(planned_runs(experiment, experiment.seeds)) == 7 * 20 * 4 * 5


CHECKS = [*data.CHECKS, check_chunked_equals_quadratic, check_the_paper_preset_is_the_papers]

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
    names = dict.fromkeys((*SEVEN, *models.KERNEL_NAMES))
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
    "mixers": mixer_name, "seeds": at_least(int, 0), "search_seeds": at_least(int, 0),
    "learning_rates": at_least(float, 0, strict=True), "model": str, "init": str, "heads": at_least(int, 0),
    "dropout": at_least(float, 0), "warmup": at_least(int, 0), "softmax_warmup": at_least(int, 0),
    "stop_at": at_least(float, 0),
}


def make_parser():
    """Options of the program and one for each field of Experiment."""
    parser = argparse.ArgumentParser(description="04: train mixers on associative recall, test them on longer contexts. Without "
                                     "options: 5 mixers × 3 seeds, 4 minutes on two cores.")
    parser.add_argument("--preset", choices=tuple(PRESETS),
                        help="ladder: every kernel with a floor of ½ and without; laptop: seven systems, three widths; "
                        "paper, paper-ladder: Figure 1 and Table 1 of the paper, for GPUs")
    parser.add_argument("--output", type=kernels.writable, default=None,
                        help="rows of results; runs that are there are not repeated (runs/mqar.jsonl, runs/mqar_PRESET.jsonl)")
    parser.add_argument("--figure", type=kernels.writable, default=None, help="where to draw it (as --output, but .png)")
    parser.add_argument("--workers", type=at_least(int, 1), default=sweeps.default_workers(),
                        help="processes, one thread each; on GPUs they take turns at them (%(default)s)")
    parser.add_argument("--shard", type=shard_of, default=(1, 1), metavar="i/n",
                        help="perform part i of n, on this machine; join the files of rows with cat, then run without --shard")
    group = parser.add_argument_group("settings of the experiment (default: without a preset)")
    for field in dataclasses.fields(Experiment):
        flag, many = "--" + field.name.replace("_", "-"), isinstance(field.default, tuple)
        if isinstance(field.default, bool):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS,
                               help=f"({field.default})")
        else:
            group.add_argument(flag, type=TYPES.get(field.name, at_least(int, 1)), nargs="*" if many else None,
                               default=argparse.SUPPRESS, help=f"({field.default})")
    return parser


def make_experiment(options, parser):
    """The experiment asked for; the program ends with one line if it cannot be run."""
    names = [field.name for field in dataclasses.fields(Experiment)]
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(options).items() if k in names}
    experiment = Experiment(**(PRESETS.get(options.preset, {}) | given))
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
        raise ValueError(f"--pairs needs one value for each length: {len(experiment.lengths)}, got {len(experiment.pairs)}")
    if set(experiment.seeds) & set(experiment.search_seeds):
        raise ValueError("--search-seeds choose the learning rate: they must not be among --seeds")
    without = [mixer for mixer in experiment.mixers if mixer not in LEARNING_RATES]
    if without and not experiment.learning_rates:
        raise ValueError(f"no learning rate is known for {', '.join(without)}; give --learning-rates (and --search-seeds)")
    if experiment.model not in ("recall", "paper"):
        raise ValueError(f"--model is recall or paper, got {experiment.model!r}")
    if experiment.batch > experiment.examples:
        raise ValueError(f"an epoch of {experiment.examples} --examples has no batch of {experiment.batch}")
    if experiment.test_lengths and (experiment.model == "paper" or len(experiment.lengths) > 1):
        raise ValueError("--test-lengths need one trained length and a model without positions (--model recall)")
    for run in planned_runs(experiment, experiment.seeds[:1]):
        model_config(run, experiment)
        for length in (run.length, *experiment.test_lengths):
            make_mqar(1, length, run.pairs, experiment.vocab_size)


def main(argv=None):
    """Run what is missing, print the tables and their reading, draw the figures, run the checks; returns failed checks."""
    parser = make_parser()
    options = kernels.parse_arguments(parser, argv)
    experiment = make_experiment(options, parser)
    path = options.output or kernels.writable(f"runs/mqar_{options.preset}.jsonl" if options.preset else "runs/mqar.jsonl")
    figure = options.figure or kernels.writable(path.with_suffix(".png"))
    data.show_example()
    start = time.perf_counter()
    try:
        extra = cost.provenance(__file__, sys.argv[1:] if argv is None else argv)
        rows = sweep(experiment, path, options.workers, options.shard, extra)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"cannot write {error.filename or path}: {error.strerror}; finished runs before this one are kept")
    except BrokenProcessPool:
        parser.error(f"a worker died (out of memory?); finished runs are in {path}, the same command goes on; try --workers 1")
    except KeyboardInterrupt:
        print(f"\ninterrupted: finished runs are in {path}, unfinished ones beside it; the same command goes on from there")
        raise SystemExit(130) from None
    reports.report(rows, experiment.search_seeds, Path(figure))
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes; rows: {path}\n")
    return kernels.run_checks(CHECKS)


if __name__ == "__main__":
    if main():
        sys.exit(1)
