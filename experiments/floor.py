"""The floor, from six sides: what it costs, who would keep it, what it predicts, and what else could explain it.

  python -m experiments.floor                      all parts; a million training steps, 225 a second on two quiet cores
  python -m experiments.floor dose                 floors from 0 to 1 in training; the floor set to 0 at test
  python -m experiments.floor learned              a floor that is trained with everything else
  python -m experiments.floor predict              shorter contexts that stand for long ones, beside the long ones
  python -m experiments.floor trained-at           trained at 2,048 and at 8,192 tokens, six kernels
  python -m experiments.floor controls             one rate, random filler, 12 heads, widths, no decay, other kernels
  python -m experiments.floor ladder               the kernels of the paper's Table 1 and softmax, with ½ and without

Task, model and optimiser are those of 04_train_mqar.py. Tables and figure are made by experiments/floor_report.py, from
rows alone. Whatever interrupts this, finished runs are kept, and the same command goes on; where all rows are there, as
in results/floor.jsonl, `--output results/floor.jsonl` trains nothing and prints the tables.

Long contexts cost nothing here. All filler tokens but the first two after a pair or a query look the same to the
attention: they have one key and one value. So one of them can stand for all the others, with a *count*, by which its
weight is multiplied. A context of any length becomes one of 6K tokens that has the same outputs at its queries;
`predict` compares it with contexts that are written out.
"""

import argparse
import functools
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from experiments import floor_report
from rebased import EPS, few_places, files, kernels, lesson, model, train_mqar, workers

PAIRS = 16
VOCAB_SIZE = 256
FILLERS = 64  # kinds of random filler, tokens 256 to 319
BATCH = 32
TEST_LENGTHS = (128, 512, 2048, 8192, 32_768, 131_072, 1_048_576)
WRITTEN_OUT = 8192  # the longest context that is also written out


# Kernels that only this experiment knows. They have scores and no features: nothing here needs a state
class LearnedFloor:
    """Mixed into a kernel: its floor is θ², and θ is trained. What is set, `floor = 0.5`, is where it starts."""

    @property
    def floor(self):
        return self.theta.square()

    @floor.setter
    def floor(self, value):
        self.theta = nn.Parameter(torch.tensor(float(value)).sqrt())


class LearnedTaylor(LearnedFloor, kernels.TaylorKernel):
    """Based with a floor that is trained."""


class LearnedReBased(LearnedFloor, kernels.ReBasedKernel):
    """ReBased with a floor that is trained."""


class QuarticKernel(kernels.TaylorKernel):
    """exp(s) to the fourth degree, 1 + s + s²/2 + s³/6 + s⁴/24, moved down so that its lowest value is the floor."""

    LOWEST = 0.270394765  # s⁴/24 at s = -1.5961, where the derivative 1 + s + s²/2 + s³/6 is 0

    def scores(self, q, k):
        s = kernels.scaled_dot(q, k)
        return 1 + s * (1 + s / 2 * (1 + s / 3 * (1 + s / 4))) - self.LOWEST + self.floor


class CosineKernel(kernels.ReBasedKernel):
    """The squared cosine of q' and k', and the floor: no weight can be larger than 1 + floor."""

    def scores(self, q, k):
        return (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT).square() + self.floor


LADDER = ("rebased", "x2", "norm", "gamma", "gamma_beta", "based", "based_norm", "elementwise")  # [1, Table 1]
KERNELS = {
    **{name: kernels.KERNELS[name] for name in LADDER},
    "based, learned": LearnedTaylor,
    "rebased, learned": LearnedReBased,
    "quartic": QuarticKernel,
    "cosine": CosineKernel,
}


@dataclass(frozen=True)
class Run:
    """One model to be trained and tested. kernel: a name in KERNELS, or softmax. floor: the one it is trained with."""

    kernel: str
    floor: float
    seed: int
    learning_rate: float
    steps: int = train_mqar.STEPS
    warmup: int = 0
    length: int = 128
    d_model: int = 64
    heads: int = 1
    random_filler: bool = False
    decay_gamma: bool = True
    written_out: bool = False


# Contexts
class Contexts(NamedTuple):
    """tokens (n, T'), counts (n, T'): for how many tokens each stands; queries at positions (n, K), targets (n, K)."""

    tokens: torch.Tensor
    counts: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor

    def part(self, chosen):
        return Contexts(*(x[chosen] for x in self))


def written_out(inputs, labels):
    """The examples of 04 as they stand: every token counts once."""
    positions = train_mqar.query_positions(labels)
    return Contexts(inputs, torch.ones(inputs.shape), positions, labels.gather(1, positions))


def short_contexts(n, length, power_a, seed):
    """The examples `make_mqar(n, length, PAIRS, VOCAB_SIZE, power_a, seed)`, 6K tokens each."""
    keys, values, places = train_mqar.draw_examples(n, length, PAIRS, VOCAB_SIZE, power_a, seed)
    places, order = places.sort(1)  # (n, K), from left to right
    end = 2 * PAIRS
    before = torch.cat([torch.full((n, 1), end - 1), places[:, :-1]], dim=1)
    gaps = places - before - 1  # (n, K): filler tokens between a query and what stands before it
    kept = gaps.clamp(max=3)  # two that a convolution of width 3 tells apart, and one for all others
    positions = end - 1 + (kept + 1).cumsum(1)  # (n, K): where the queries stand now

    tokens = torch.zeros(n, 6 * PAIRS, dtype=torch.int64)
    tokens[:, 0:end:2] = keys
    tokens[:, 1:end:2] = values
    tokens.scatter_(1, positions, keys.gather(1, order))
    counts = torch.ones(n, 6 * PAIRS)
    counts.scatter_(1, positions - 1, (gaps - 2).clamp(min=1).float())  # the token before a query
    return Contexts(tokens, counts, positions, values.gather(1, order))


def with_random_filler(contexts, seed):
    """Every filler token becomes one of 64 that mean nothing."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(FILLERS, contexts.tokens.shape, generator=generator)
    tokens = torch.where(contexts.tokens == 0, VOCAB_SIZE + noise, contexts.tokens)
    return contexts._replace(tokens=tokens)


@functools.lru_cache(maxsize=4)
def training_contexts(steps, length, seed, random_filler):
    """All examples of a run, each used once; official queries. The same for all kernels of a seed."""
    n = steps * BATCH
    if not random_filler:
        return short_contexts(n, length, train_mqar.PLACEMENTS["official"], seed)
    examples = train_mqar.make_mqar(n, length, PAIRS, VOCAB_SIZE, seed=seed)
    return with_random_filler(written_out(*examples), seed)


@functools.cache
def test_contexts(length, placement, random_filler=False, as_written=False):
    """The examples that 04 tests with: 256, and 64 from 8,192 tokens on."""
    n = 256 if length < 8192 else 64
    power_a = train_mqar.PLACEMENTS[placement]
    seed = train_mqar.TEST_SEED
    if not random_filler and not as_written:
        return short_contexts(n, length, power_a, seed)
    contexts = written_out(*train_mqar.make_mqar(n, length, PAIRS, VOCAB_SIZE, power_a, seed))
    return with_random_filler(contexts, seed) if random_filler else contexts


def fillers_before(contexts):
    """How many filler tokens stand before each query, written out: (n, K)."""
    fillers = contexts.counts * (contexts.tokens == 0)  # (n, T')
    return fillers.cumsum(1).gather(1, contexts.positions)


# Model and training
def build(run):
    """The model of 04 with the kernel of a run, and that kernel (None for softmax)."""
    torch.manual_seed(run.seed)
    vocab_size = VOCAB_SIZE + (FILLERS if run.random_filler else 0)
    mixer = "conv_attention" if run.kernel == "softmax" else "rebased"
    config = model.recall_config(mixer, vocab_size, run.d_model, run.heads)
    recall_model = model.LanguageModel(config)
    if run.kernel == "softmax":
        return recall_model, None
    kernel = KERNELS[run.kernel](config.feature_dim, run.heads, floor=run.floor)
    recall_model.blocks[-1].mixer.kernel = kernel  # it draws nothing: all kernels start from the same weights
    return recall_model, kernel


def logits_of(recall_model, contexts):
    """Logits (n, K, V) at the queries, and the shares of their attention (n, H, K, T')."""
    last = recall_model.blocks[-1]
    x = recall_model.trunk(contexts.tokens)  # (n, T', d_model)
    y = last.norm1(x)
    weights = last.mixer.weights(y, contexts.positions) * contexts.counts[:, None, None]
    weights = weights / (weights.sum(-1, keepdim=True) + EPS)
    o = few_places.project_mean(last.mixer, y, weights)  # (n, K, d_model)
    x = few_places.rows(x, contexts.positions)
    return recall_model.head(last.second_line(x + o)), weights


def floor_of(kernel):
    """The floor as a number, also where it is trained; softmax has none."""
    return torch.as_tensor(kernel.floor).item() if kernel else 0.0


def parameter_groups(recall_model, run):
    """Weight decay 0.1 on all parameters but a learned floor and, where a run says so, γ."""
    free = {"theta"} if run.decay_gamma else {"theta", "gamma_q", "gamma_k"}
    groups = [{"params": [], "weight_decay": 0.1}, {"params": [], "weight_decay": 0.0}]
    for name, parameter in recall_model.named_parameters():
        groups[name.rpartition(".")[2] in free]["params"].append(parameter)
    return [group for group in groups if group["params"]]


def train(run, report):
    """The trained model, its kernel, and the history: after every 20 steps (steps, loss, accuracy, floor)."""
    recall_model, kernel = build(run)
    optimizer = torch.optim.AdamW(parameter_groups(recall_model, run), fused=True)
    contexts = training_contexts(run.steps, run.length, run.seed, run.random_filler)
    losses, history = [], []
    for step in range(run.steps):
        for group in optimizer.param_groups:
            group["lr"] = train_mqar.learning_rate(step, run)
        batch = contexts.part(slice(step * BATCH, (step + 1) * BATCH))
        logits, _ = logits_of(recall_model, batch)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 20 == 0:
            accuracy = (logits.argmax(-1) == batch.targets).float().mean().item()
            report(step + 1, losses[-1], accuracy)
            history.append((step + 1, losses[-1], accuracy, floor_of(kernel)))
    return recall_model.eval(), kernel, history, sum(losses[-100:]) / len(losses[-100:])


# Tests
@torch.no_grad()
def test_on(recall_model, contexts):
    """{"accuracy", "right", "others", "filler"}, means over queries, and which queries were answered right (n, K)."""
    shares = torch.zeros(3, dtype=torch.float64)
    verdicts = []
    for chosen in torch.arange(len(contexts.tokens)).split(max(1, 2**16 // contexts.tokens.shape[1])):
        part = contexts.part(chosen)
        logits, weights = logits_of(recall_model, part)
        verdicts.append(logits.argmax(-1) == part.targets)
        tokens = part.tokens.where(part.tokens < VOCAB_SIZE, 0)  # every kind of filler as 0
        found = train_mqar.attention_shares(weights.mean(1), tokens, part.positions, 2 * PAIRS)
        shares += torch.stack(found).sum((1, 2))
    verdicts = torch.cat(verdicts)
    right, others, filler = (shares / verdicts.numel()).tolist()
    accuracy = verdicts.double().mean().item()
    return {"accuracy": accuracy, "right": right, "others": others, "filler": filler}, verdicts


def tested_lengths(run):
    """Random filler has to be written out, and so has its limit."""
    return [length for length in TEST_LENGTHS if length <= WRITTEN_OUT or not run.random_filler]


def test_all(recall_model, run):
    """{"128 official": ..., ...}"""
    cells = {}
    for length in tested_lengths(run):
        for placement in train_mqar.PLACEMENTS:
            contexts = test_contexts(length, placement, run.random_filler)
            cells[f"{length} {placement}"], _ = test_on(recall_model, contexts)
    return cells


def compare_written_out(recall_model):
    """Contexts with counts beside the same ones written out: accuracy, and the share of equal verdicts."""
    found = {}
    for length in (512, 2048, WRITTEN_OUT):
        for placement in train_mqar.PLACEMENTS:
            short, verdicts = test_on(recall_model, test_contexts(length, placement))
            long, expected = test_on(recall_model, test_contexts(length, placement, as_written=True))
            found[f"{length} {placement}"] = {
                "short": short["accuracy"],
                "written_out": long["accuracy"],
                "equal_verdicts": (verdicts == expected).double().mean().item(),
                "filler_difference": abs(short["filler"] - long["filler"]),
            }
    return found


def run_one(run, report):
    """Train and test one model, in a worker -> its row."""
    start = time.perf_counter()
    recall_model, kernel, history, loss = train(run, report)
    row = asdict(run) | {"loss": loss, "floor_at_end": floor_of(kernel), "history": history[4::5]}
    if "learned" in run.kernel:
        row["history"] = history
    row["cells"] = test_all(recall_model, run)
    if run.written_out:
        row["as_written_out"] = compare_written_out(recall_model)
    if floor_of(kernel) > 0:
        kernel.floor = 0.0
        row["cells_without_floor"] = test_all(recall_model, run)
    return row | {"seconds": time.perf_counter() - start}


# What is run
RATES = (0.003, 0.005, 0.01, 0.02)
SEARCH_SEEDS = (100, 101)
FLOORS = (0.0, 0.001, 0.01, 0.03, 0.1, 0.25, 0.5, 1.0)
SYSTEMS = (  # of trained-at: kernel, floor
    *(("rebased", 0.0), ("rebased", 0.5), ("based", 0.0), ("based", 0.5)),
    *(("based_norm", 0.5), ("x2", 0.0)),
)
TRAINED_AT = {2048: 1500, 8192: 2500}  # length: steps
LIKE = {"quartic": "based", "cosine": "rebased", "based, learned": "based", "rebased, learned": "rebased"}


def search_runs(part):
    """Runs that choose the learning rates of a part, on seeds of their own: every rate for whatever gets one."""
    runs = []
    for seed in SEARCH_SEEDS:
        for rate in RATES:
            if part == "trained-at":
                runs += trained_at_runs([seed], lambda run, rate=rate: rate)
            elif part == "ladder":
                runs += [replace(run, learning_rate=rate) for run in ladder_runs(seed)]
            else:
                for kernel in ("based", "rebased"):
                    runs += [Run(kernel, floor, seed, rate) for floor in (0.0, 0.5)]
    return runs


def rate_key(run, part):
    """What shares a learning rate: in a ladder every system has its own, else a kernel has one for all its floors."""
    kernel = LIKE.get(run.kernel, run.kernel)
    return (kernel, run.length, run.floor) if part in ("trained-at", "ladder") else kernel


def best_rates(rows, part):
    """{rate_key: the rate with the lowest training loss, the mean over the searched runs}."""
    losses = {}
    for row in rows:
        run = run_of(row)
        losses.setdefault(rate_key(run, part), {}).setdefault(run.learning_rate, []).append(row["loss"])
    chosen = {}
    for key, by_rate in losses.items():
        chosen[key] = min(by_rate, key=lambda rate, by=by_rate: sum(by[rate]) / len(by[rate]))
    return chosen


def planned_runs(part, seeds, rate_of):
    """The reported runs of a part, seed by seed. rate_of(run): its learning rate."""
    few = seeds[:3]
    if part == "trained-at":
        return trained_at_runs(seeds, rate_of)
    if part == "dose":
        runs = [Run(kernel, f, seed, 0) for seed in seeds for f in FLOORS for kernel in ("based", "rebased")]
    elif part == "learned":
        runs = [Run(f"{kernel}, learned", 0.5, seed, 0) for seed in seeds for kernel in ("based", "rebased")]
    elif part == "ladder":
        runs = [run for seed in seeds[:5] for run in ladder_runs(seed)]
    elif part == "predict":
        runs = [Run(kernel, f, seed, 0, written_out=True)
                for seed in seeds[:2] for f in (0.0, 0.5) for kernel in ("based", "rebased")]
    else:
        runs = [run for seed in few for run in control_runs(seed)]
        for seed in seeds:  # one rate for all, that of Based in 04
            runs += [Run(kernel, floor, seed, 0.003) for floor in (0.0, 0.5) for kernel in ("based", "rebased")]
    return [replace(run, learning_rate=run.learning_rate or rate_of(run)) for run in runs]


def trained_at_runs(seeds, rate_of):
    runs = []
    for seed in seeds:
        for length, steps in TRAINED_AT.items():
            for kernel, floor in SYSTEMS:
                run = Run(kernel, floor, seed, 0, steps, warmup=100, length=length)
                runs.append(replace(run, learning_rate=rate_of(run)))
    return runs


def ladder_runs(seed):
    """Softmax, and every kernel without a floor and with one of ½."""
    runs = [Run("softmax", 0.0, seed, 0, warmup=100)]
    return runs + [Run(kernel, floor, seed, 0) for kernel in LADDER for floor in (0.0, 0.5)]


def control_runs(seed):
    """What else could explain it: each setting with a floor and without."""
    runs = []
    for floor in (0.0, 0.5):
        for kernel in ("based", "rebased"):
            plain = Run(kernel, floor, seed, 0)
            runs += [replace(plain, random_filler=True), replace(plain, heads=12)]
            runs += [replace(plain, d_model=32), replace(plain, d_model=128)]
        runs.append(Run("rebased", floor, seed, 0, decay_gamma=False))
        runs.append(Run("cosine", floor, seed, 0))
    quartic = Run("quartic", 0.0, seed, 0)
    return [*runs, quartic, replace(quartic, floor=QuarticKernel.LOWEST)]


PARTS = ("dose", "learned", "predict", "trained-at", "controls", "ladder")


def run_of(row):
    return Run(**{field.name: row[field.name] for field in fields(Run)})


COMPARED = dict.fromkeys(("short", "written_out", "equal_verdicts", "filler_difference"), files.NUMBER)
ROW = {
    **{field.name: {float: files.NUMBER}.get(field.type, field.type) for field in fields(Run)},
    **dict.fromkeys(("loss", "floor_at_end", "seconds"), files.NUMBER),
    "history": [[int, files.NUMBER, files.NUMBER, files.NUMBER]],
    "cells": {files.EACH: files.CELL},
    "cells_without_floor?": {files.EACH: files.CELL},
    "as_written_out?": {files.EACH: COMPARED},
}


def read_done(path):
    """{run: its row} of a file. Raises Refusal for a row that lacks what tables read."""
    done = {}
    for row in files.read_rows(path, ROW):
        run = run_of(row)
        for length in tested_lengths(run):
            for placement in train_mqar.PLACEMENTS:
                if f"{length} {placement}" not in row["cells"]:
                    raise lesson.Refusal(f"{path}: the row of {run} lacks the cell '{length} {placement}'")
        if run.written_out and "as_written_out" not in row:
            raise lesson.Refusal(f"{path}: the row of {run} has no 'as_written_out'")
        done[run] = row
    return done


def perform(planned, part, role, path, processes, where_from):
    """Do those planned runs that have no row yet -> the rows of all, in the order planned."""
    done = read_done(path)
    missing = [run for run in planned if run not in done]
    print(f"{part}, {role}: {len(planned)} runs, {len(planned) - len(missing)} are there already", flush=True)
    if missing:

        def keep(run, row):
            done[run] = row | {"part": part, "role": role} | where_from
            files.append_row(path, done[run])

        workers.run_all(run_one, missing, lambda run: run.steps, processes, keep)
    return [done[run] for run in planned]


def perform_all(parts, seeds, path, processes, where_from):
    """The rows of all parts, {part: rows}, and those of their searches."""
    rows, searched = {}, {}
    for part in parts:
        search = part if part in ("trained-at", "ladder") else "128"
        if search not in searched:
            planned = search_runs(part)
            searched[search] = perform(planned, search, "search", path, processes, where_from)
        rates = best_rates(searched[search], part)
        planned = planned_runs(part, seeds, lambda run, rates=rates, part=part: rates[rate_key(run, part)])
        rows[part] = perform(planned, part, "report", path, processes, where_from)
    return rows, searched


def main(argv=None):
    """Run what is missing, print the tables, draw the figure."""
    parser = argparse.ArgumentParser(description="What the floor of a kernel costs, from six sides")
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"from {', '.join(PARTS)} (all)")
    add("--seeds", nargs="+", type=lesson.seed_number, default=list(range(10)), metavar="SEED",
        help="of the reported runs (0 to 9); ladder takes the first five, controls three, predict two")
    add("--workers", type=lesson.positive_integer, default=lesson.usable_cores(), help="processes (%(default)s)")
    add("--output", type=lesson.writable_path, default="runs/floor.jsonl", help="rows (%(default)s)")
    add("--figure", type=lesson.figure_path, default="runs/floor.png", help="(%(default)s)")
    options = lesson.parse_arguments(parser, argv)
    for part in options.parts:
        if part not in PARTS:
            parser.error(f"there is no part {part!r}; choose from {', '.join(PARTS)}")
    seeds = list(dict.fromkeys(options.seeds))
    if set(seeds) & set(SEARCH_SEEDS):
        parser.error(f"seeds {SEARCH_SEEDS} choose the learning rates and cannot be reported")
    parts = [part for part in PARTS if part in options.parts] or list(PARTS)
    where_from = lesson.provenance(__file__, argv)
    output = Path(options.output)
    rows, searched = lesson.obey(
        lambda: perform_all(parts, seeds, output, options.workers, where_from),
        f"finished runs are in {output}; the same command goes on from there",
    )
    floor_report.report(rows, searched)
    floor_report.draw(rows, options.figure)


if __name__ == "__main__":
    main()
