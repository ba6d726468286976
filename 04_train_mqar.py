"""04 · Associative recall: trained at 128 tokens, tested at 8,192, with a floor and without it

Aim: train one small model with three attentions on a task that needs recall and nothing else; see
on longer contexts what a floor of ½ costs, and that one assignment to a trained model repairs it.

You will learn
  1. the task: pairs of a key and its value, and later each key again, whose value is asked for;
  2. how to train where a few places carry a label, on examples that never repeat;
  3. where the attention of a query goes, and what a longer context does to that;
  4. how to tell a cause from a coincidence: change one number in trained weights, and look again.

Equations
  place of a query   p(s) ∝ s^(a − 1) for the slots s = 1, 2, ..., without replacement           [2]
  loss               −log p(value | all tokens up to the query), the mean over the queries
  share on filler    Σ w_j over filler tokens j / Σ w_j over all tokens, with w_j = sim(q, k_j)

Letters: B batch, T tokens of a context, K pairs (and so K queries), V size of the vocabulary,
  n examples in a set, or (B, n) queries that are looked at; s a slot for a query, a the power that
  places the queries. The floor is that of 01: the lowest value that a similarity can have.

References
  [1] Aksenov et al., ReBased, as in 01.
  [2] Arora et al., Zoology: Measuring and Improving Recall in Efficient Language Models,
      arXiv 2312.04927; its code: github.com/HazyResearch/zoology.
  [3] Efraimidis and Spirakis, Weighted random sampling with a reservoir, Information Processing
      Letters 97, 2006.

Run: python 04_train_mqar.py              (3 attentions × 5 seeds: 5 minutes on two cores)
     python 04_train_mqar.py --seeds 0    (one seed of each: 1 minute)
  Results go to runs/mqar.jsonl, a line for each run; runs that are there are not repeated.
"""

# %%
import json
import math
from dataclasses import asdict, dataclass
from statistics import mean, stdev

import torch
import torch.nn.functional as F

# kernels: 01_kernels.py; model: 03_model.py; train_mqar: this file, as processes import it
from rebased import files, kernels, lesson, model, mqar_options, train_mqar, workers
from rebased.checks import check_recall_task

# %% [markdown]
# ## The task, with one example in columns
#
# To use what stands earlier in a text, a model must find it again. *Multi-query associative recall*
# [2] asks for that and for nothing else. A context begins with K pairs of a key and its value. Then
# every key comes back once, as a *query*, and there its value is to be named: that is the label.
# All other places have no label (−100, which PyTorch's loss leaves out). What stands between the
# queries is *filler*, the token 0.
#
# ```
# V = 12      key value   key value                         query                   query
# inputs        1    10     5     9     0     0     0     0     5     0     0     0     1     0
# labels        ·     ·     ·     ·     ·     ·     ·     ·     9     ·     ·     ·    10     ·
# ```
#
# **Why is the filler one constant token, and not random ones?** A random filler could be a key, and
# the token after it would look like its value: a false pair, and the label would be a matter of
# opinion. And constant filler makes the question sharp. The convolution of width 3 tells the two
# filler tokens behind a pair or a query apart. All others are the same to the attention and plainly
# of no use, so whatever they are given is lost.
#
# **Where do the queries stand?** Every second place after the pairs is a *slot*, s = 1, 2, ...
# Slots are drawn without replacement with p(s) ∝ s^(a−1). The authors' a = 0.01 is nearly 1/s: most
# queries come soon after the pairs. We call that *official*. With a = 1 a query may stand anywhere,
# *uniform*; in a long context it then has far more filler before it, and the task is harder.
#
# How does one draw without replacement for thousands of examples at once? Set an alarm clock for
# each slot, which rings after a random time, exponential with rate p(s). The first K clocks to
# ring, in their order, are such a draw [3]. Keys and values are drawn so too, with equal rates.

# %%
def draw_distinct(rates, rows, count, generator):
    """`count` distinct indices for each row, one after the other with p ∝ rates: (rows, count)."""
    drawn = torch.empty(rows, count, dtype=torch.int64)
    for part in drawn.split(1000):  # a thousand rows at a time take less memory
        clocks = torch.empty(len(part), len(rates), dtype=torch.float64)
        clocks.exponential_(generator=generator)  # rate 1
        part.copy_((clocks / rates).topk(count, largest=False).indices)  # the first to ring
    return drawn


def draw_examples(num_examples, seq_len, num_pairs, vocab_size, power_a=0.01, seed=0):
    """keys, values and the places where the keys come back, (n, K) each. As for `make_mqar`."""
    check_recall_task(num_examples, seq_len, num_pairs, vocab_size, power_a, seed)
    generator = torch.Generator().manual_seed(seed)
    half = vocab_size // 2
    keys = 1 + draw_distinct(torch.ones(half - 1), num_examples, num_pairs, generator)  # (n, K)
    values = torch.ones(vocab_size - half)
    values = half + draw_distinct(values, num_examples, num_pairs, generator)  # (n, K)

    end = 2 * num_pairs  # of the pairs
    slots = torch.arange(1, (seq_len - end) // 2 + 1, dtype=torch.float64)
    drawn = draw_distinct(slots ** (power_a - 1), num_examples, num_pairs, generator)  # s − 1
    places = end + 2 * drawn  # (n, K): where each key comes back
    return keys, values, places


def make_mqar(num_examples, seq_len, num_pairs, vocab_size, power_a=0.01, seed=0):
    """Recall examples -> inputs, labels (n, T) int64. [2]

    Keys are 1 .. V/2 − 1, values V/2 .. V − 1. With another seq_len or power_a the same pairs meet
    other contexts. Raises ValueError for what cannot be.
    """
    keys, values, places = draw_examples(
        num_examples, seq_len, num_pairs, vocab_size, power_a, seed
    )
    end = 2 * num_pairs
    inputs = torch.zeros(num_examples, seq_len, dtype=torch.int64)
    inputs[:, 0:end:2] = keys
    inputs[:, 1:end:2] = values
    inputs.scatter_(1, places, keys)
    labels = torch.full_like(inputs, -100).scatter_(1, places, values)
    return inputs, labels


def query_positions(labels):
    """Where the labels are: (n, T) -> (n, K), from left to right. Every row has as many."""
    return (labels != -100).nonzero()[:, 1].view(len(labels), -1)

# %% [markdown]
# The example from above, now as the function makes it. And a check, which reads fifty of them by a
# slow rule that shares no code with the function: a dictionary is filled from the pairs, and every
# query must find its label in it.

# %%
def show_example():
    """Two pairs in 14 tokens, in columns."""
    inputs, labels = make_mqar(1, 14, 2, vocab_size=12, power_a=1.0, seed=20)
    roles = ["key", "value", "key", "value"]
    for label in labels[0, 4:].tolist():
        roles.append("query" if label >= 0 else "")
    print("V = 12   " + "".join(f"{role:>6}" for role in roles))
    print("inputs   " + "".join(f"{token:6}" for token in inputs[0].tolist()))
    shown = [label if label >= 0 else "·" for label in labels[0].tolist()]
    print("labels   " + "".join(f"{label:>6}" for label in shown) + "\n")


def check_a_dictionary_answers_every_query():
    """Pairs first, then every key once more at an even place; all else is filler."""
    inputs, labels = make_mqar(50, 64, 8, 40, seed=5)
    for tokens, targets in zip(inputs.tolist(), labels.tolist(), strict=True):
        memory = dict(zip(tokens[0:16:2], tokens[1:16:2], strict=True))
        assert len(memory) == len(set(memory.values())) == 8
        assert all(0 < key < 20 <= value < 40 for key, value in memory.items())
        queries = [t for t in range(16, 64) if tokens[t] != 0]
        assert sorted(tokens[t] for t in queries) == sorted(memory)
        assert all(t % 2 == 0 for t in queries)
        for t in range(64):
            assert targets[t] == (memory[tokens[t]] if t in queries else -100)


def check_the_same_pairs_meet_other_contexts():
    """In a longer context the same pairs; from another seed others."""
    short, _ = make_mqar(4, 64, 8, 40, 0.01, seed=1)
    long, _ = make_mqar(4, 256, 8, 40, 1.0, seed=1)
    other, _ = make_mqar(4, 64, 8, 40, 0.01, seed=2)
    assert torch.equal(short[:, :16], long[:, :16])
    assert not torch.equal(short[:, :16], other[:, :16])


if __name__ == "__main__":
    show_example()
    lesson.check(check_a_dictionary_answers_every_query)
    lesson.check(check_the_same_pairs_meet_other_contexts)

# %% [markdown]
# ## One training run
#
# The model is `recall_config` of 03: a short convolution, by which every value learns which key
# stands before it, and above it the attention that is compared. It has no position embedding, so
# the trained weights can be tested at any length.
#
# Everything that decides how a run ends stands in one place. The learning rates were chosen by a
# search among .001, .003 and .01, on seeds that are not reported (100 and 101), by the accuracy
# over all tested lengths. (By the training loss Based would run at .01, and be worse at 8,192
# tokens; its floor set to 0 repairs it there as well: results/README.md, "The floor, from six
# sides".)
#
# For softmax the search could not tell .003 from .01, and the faster one is taken: on those seeds
# it has learned the task after 600 steps, where .003 takes 1,000 (and on one of five other seeds
# more than 2,000). The first 100 steps of softmax warm up.

# %%
LEARNING_RATES = {"conv_attention": 0.01, "rebased": 0.01, "based": 0.003}  # the first is softmax
USUAL_RATE = 0.003  # for a kernel that no search has seen
WARMUP = {"conv_attention": 100, "attention": 100}
STEPS = 1200


@dataclass(frozen=True)
class Run:
    """One model to be trained and tested."""

    mixer: str
    seed: int
    learning_rate: float
    steps: int
    warmup: int = 0
    length: int = 128
    pairs: int = 16
    vocab_size: int = 256
    d_model: int = 64
    batch: int = 32
    test_lengths: tuple[int, ...] = (128, 512, 2048, 8192)
    test_examples: int = 256  # a quarter of them from 8,192 tokens on

# %% [markdown]
# All examples of a run are drawn in one go, and each is used once: every batch is new to the model.
# Runs of one seed see the same examples in the same order, whatever their attention, so that they
# can be compared in pairs. Runs of other seeds see other examples, and none sees those of the
# tests: a run draws from its own seed, below 2³¹, the tests from 2³¹, and PyTorch's generator
# starts in another state for each seed.
#
# The learning rate rises over the warm-up and falls to 0 along half a cosine. The optimiser is
# AdamW with weight decay 0.1 on all parameters, γ and β among them. The loss looks at the K queries
# only, and so the last layer is computed at these only (`logits_at` of 03).

# %%
TEST_SEED = 2**31


def learning_rate(step, run):
    """Linear warm-up times half a cosine down to 0."""
    warmup = min(1, (step + 1) / (run.warmup + 1))
    return run.learning_rate * warmup * (1 + math.cos(math.pi * step / run.steps)) / 2


def training_step(recall_model, optimizer, inputs, positions, targets):
    """inputs (B, T), asked at positions (B, K) for targets (B, K) -> loss and accuracy."""
    logits = recall_model.logits_at(inputs, positions)  # (B, K, V)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach(), (logits.argmax(-1) == targets).float().mean()


def train(run, report=lambda steps, loss, accuracy: None):
    """The trained model of a run, in evaluation mode.

    report(steps done, loss, accuracy) is called every 20 steps.
    """
    torch.manual_seed(run.seed)
    config = model.recall_config(run.mixer, run.vocab_size, run.d_model)
    recall_model = model.LanguageModel(config)
    optimizer = torch.optim.AdamW(recall_model.parameters(), weight_decay=0.1, fused=True)
    examples = run.steps * run.batch
    inputs, labels = make_mqar(examples, run.length, run.pairs, run.vocab_size, seed=run.seed)
    positions = query_positions(labels)  # (n, K)
    targets = labels.gather(1, positions)  # (n, K)
    for step in range(run.steps):
        optimizer.param_groups[0]["lr"] = learning_rate(step, run)
        batch = slice(step * run.batch, (step + 1) * run.batch)
        loss, accuracy = training_step(
            recall_model, optimizer, inputs[batch], positions[batch], targets[batch]
        )
        if (step + 1) % 20 == 0:
            report(step + 1, loss.item(), accuracy.item())
    return recall_model.eval()

# %% [markdown]
# This lesson trains three attentions, each from five seeds. Others can be asked for on the command
# line (`--help` says how), or in a notebook by `%run 04_train_mqar.py --seeds 0`. The command line
# is read here, before anything is trained, so that a mistake in it costs nothing.

# %%
def parse_options(argv=None):
    """What to run, and where to put it."""
    mixers = ["conv_attention", "attention", *kernels.KERNELS]
    return mqar_options.read_options(mixers, list(LEARNING_RATES), Run, STEPS, argv)


if __name__ == "__main__":
    options = parse_options()

# %% [markdown]
# Small first: two pairs in 16 tokens, with the attention of Based. To guess among the eight values
# is right one time in eight; to name one of the two that occurred, without recall, every second
# time.

# %%
SMALL = Run(
    "based", seed=0, learning_rate=0.01, steps=300, length=16, pairs=2, vocab_size=16, d_model=32
)


def print_progress(steps, loss, accuracy):
    if steps in (20, 60, 100, 200, 300):
        print(f"{steps:5}{loss:9.3f}{accuracy:11.3f}")


if __name__ == "__main__":
    print("steps     loss   accuracy")
    small_model = train(SMALL, print_progress)
    print()

# %% [markdown]
# ## Where the attention of a query goes
#
# The weights of a row sum to 1. Which part of them does a query give to
#
# - the **right** pair: its key, its value, or the token after it (which, through a convolution of
#   width 3, has seen both);
# - **other** pairs;
# - **filler**?
#
# What is missing to 1 went to earlier queries and to the query itself.

# %%
def right_places(tokens, positions, end):
    """Where each query can read its pair, three places: tokens (B, T), positions (B, n) -> bool.

    end: of the pairs. Returns (B, n, T).
    """
    asked = tokens.gather(1, positions).unsqueeze(-1)  # (B, n, 1): the key
    is_its_key = tokens[:, 0:end:2].unsqueeze(1) == asked  # (B, n, K)
    key_at = 2 * is_its_key.int().argmax(-1, keepdim=True)  # (B, n, 1): where it is True
    distance = torch.arange(tokens.shape[1]) - key_at  # (B, n, T)
    return (distance >= 0) & (distance <= 2)


def attention_shares(weights, tokens, positions, end):
    """weights (B, n, T) of queries at positions (B, n) -> right, others, filler, each (B, n)."""
    right = right_places(tokens, positions, end)
    in_pairs = torch.arange(tokens.shape[1]) < end  # (T,)
    filler = (~in_pairs & (tokens == 0)).unsqueeze(1)  # (B, 1, T)
    shares = []
    for places in (right, in_pairs & ~right, filler & ~right):
        shares.append((weights * places).sum(-1).double())
    return shares


def check_shares_are_shares():
    """Weights put by hand on a value, on another pair and on filler are found there."""
    tokens = torch.tensor([[2, 8, 4, 7, 3, 9, 0, 0, 4, 0]])  # place 8 asks for the pair at 2, 3
    weights = torch.zeros(1, 1, 10)
    weights[0, 0, [3, 1, 6, 7]] = torch.tensor([0.4, 0.3, 0.2, 0.1])
    right, others, filler = attention_shares(weights, tokens, torch.tensor([[8]]), end=6)
    for found, expected in ((right, 0.4), (others, 0.3), (filler, 0.3)):
        assert abs(found.item() - expected) < 1e-6


if __name__ == "__main__":
    lesson.check(check_shares_are_shares)

# %% [markdown]
# A test has a length and a placement of the queries. It says how many queries are answered right,
# and the three shares, as means over all queries.

# %%
PLACEMENTS = {"official": 0.01, "uniform": 1.0}  # name: the power a


@torch.no_grad()
def test_at(trained, run, length, placement):
    """{"accuracy", "right", "others", "filler"} of a trained model on contexts of this length."""
    examples = run.test_examples if length < 8192 else max(1, run.test_examples // 4)
    power_a = PLACEMENTS[placement]
    inputs, labels = make_mqar(
        examples, length, run.pairs, run.vocab_size, power_a, seed=TEST_SEED
    )
    totals = dict.fromkeys(["accuracy", "right", "others", "filler"], 0.0)
    for part in torch.arange(examples).split(max(1, 2**16 // length)):  # 65,536 tokens at a time
        tokens = inputs[part]
        positions = query_positions(labels[part])
        logits, weights = trained.logits_at(tokens, positions, return_weights=True)
        correct = logits.argmax(-1) == labels[part].gather(1, positions)  # (B, K)
        weights = weights.mean(1)  # (B, K, T): heads averaged
        right, others, filler = attention_shares(weights, tokens, positions, 2 * run.pairs)
        totals["accuracy"] += correct.sum().item()
        totals["right"] += right.sum().item()
        totals["others"] += others.sum().item()
        totals["filler"] += filler.sum().item()
    return {name: total / (examples * run.pairs) for name, total in totals.items()}


def show_small_tests(trained, how):
    """One line for each length, queries anywhere."""
    print(f"{how}\ntokens   accuracy    right   others   filler")
    for length in (16, 128, 1024):
        found = test_at(trained, SMALL, length, "uniform")
        line = f"{length:6,}{found['accuracy']:11.3f}{found['right']:9.3f}"
        print(line + f"{found['others']:9.3f}{found['filler']:9.3f}")
    print()


if __name__ == "__main__":
    show_small_tests(small_model, "as trained, at 16 tokens:")

# %% [markdown]
# ## The floor taken out of trained weights
#
# The longer the context, the more attention goes to filler, and the fewer answers are right. Is it
# the floor of ½? One could train another model without it. But that model would differ in all its
# weights. The cleaner experiment changes one number in the model that stands there and trains
# nothing: 1 + s + s²/2 becomes (1 + s)²/2.

# %%
def kernel_of(trained):
    """The kernel of the last layer; None for softmax."""
    return getattr(trained.blocks[-1].mixer, "kernel", None)


if __name__ == "__main__":
    kernel_of(small_model).floor = 0.0
    show_small_tests(small_model, "the same weights, the floor set to 0:")
    kernel_of(small_model).floor = 0.5

# %% [markdown]
# Now the real size. A run is trained, tested, and where its kernel has a floor, tested once more
# without it. That makes one row of results. (Its `role` says that it is reported; rows of a search
# for learning rates are not.)

# %%
def test_all(trained, run):
    """{"128 official": what `test_at` says, ...} for every length and placement."""
    results = {}
    for length in run.test_lengths:
        for placement in PLACEMENTS:
            results[f"{length} {placement}"] = test_at(trained, run, length, placement)
    return results


def run_one(run, report):
    """Train and test one model -> its row."""
    trained = train(run, report)
    row = asdict(run) | {"role": "report", "cells": test_all(trained, run)}
    kernel = kernel_of(trained)
    if kernel is not None and kernel.floor > 0:
        kernel.floor = 0.0
        row["cells_without_floor"] = test_all(trained, run)
    return row

# %% [markdown]
# ## Fifteen runs, one process for each core
#
# Runs have nothing to tell each other, so each core gets a process of its own, with one thread
# (`rebased/workers.py`). A finished run is written to `runs/mqar.jsonl` at once. Whatever happens
# then, it is not lost, and the next start does only what is missing.
#
# (In a notebook the processes load this file, not your cells: a new kernel must stand in 01.)

# %%
def finished_rows(runs, path):
    """{run: its row} of those runs that have one in `path`."""
    found = {}
    for row in files.read_rows(path, files.RECALL):
        for run in runs:
            settings = json.loads(json.dumps(asdict(run)))  # as in a row: a list for a tuple
            if all(row.get(name) == value for name, value in settings.items()):
                found[run] = row
    return found


def all_rows(runs, path, processes):
    """The rows of all these runs; those that are missing are run first."""
    found = finished_rows(runs, path)
    missing = [run for run in runs if run not in found]
    if found:
        print(f"{path}: {len(found)} of {len(runs)} runs are there already and are not repeated")
    if missing:
        where_from = lesson.provenance(train_mqar.__file__)  # command, commit, day, machine

        def keep(run, row):
            files.append_row(path, row | where_from)

        workers.run_all(train_mqar.run_one, missing, lambda run: run.steps, processes, keep)
    found = finished_rows(runs, path)
    return [found[run] for run in runs]

# %% [markdown]
# Each attention for each seed makes a run. They are run seed by seed, so that an interrupted table
# has whole seeds.

# %%
def planned_runs(options):
    """Every mixer for every seed."""
    runs = []
    for seed in dict.fromkeys(options.seeds):  # each once
        for mixer in dict.fromkeys(options.mixers):
            rate = LEARNING_RATES.get(mixer, USUAL_RATE)
            warmup = WARMUP.get(mixer, 0)
            lengths = tuple(options.lengths)
            run = train_mqar.Run(mixer, seed, rate, options.steps, warmup, test_lengths=lengths)
            runs.append(run)  # of train_mqar: other processes know no cells of a notebook
    return runs


if __name__ == "__main__":
    rows = lesson.obey(
        lambda: all_rows(planned_runs(options), options.output, options.workers),
        after_a_stop=f"finished runs are in {options.output}; the same command goes on from there",
    )

# %% [markdown]
# ## The result
#
# Each number is a mean over seeds, ± the standard deviation between them. "Based, floor 0" is no
# other model: it is Based, the same weights, tested once more after one assignment.

# %%
TITLES = {"conv_attention": "softmax", "rebased": "ReBased", "based": "Based"}
MEASURES = {"accuracy": "accuracy", "filler": "share on filler"}


def lines_of(rows):
    """{title: the results of each seed}; a line of its own for models whose floor was set to 0."""
    lines = {}
    for row in rows:
        title = TITLES.get(row["mixer"], row["mixer"])
        lines.setdefault(title, []).append(row["cells"])
        if "cells_without_floor" in row:
            lines.setdefault(f"{title}, floor 0", []).append(row["cells_without_floor"])
    return lines


def values_of(results, length, placement, measure):
    """One number for each seed."""
    return [cells[f"{length} {placement}"][measure] for cells in results]


def mean_and_spread(values):
    """mean ± standard deviation, which a single seed does not have."""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def print_tables(lines, lengths):
    """Accuracy and share on filler, for uniform and for official queries."""
    for placement in ("uniform", "official"):
        for measure, name in MEASURES.items():
            head = f"{name}, {placement} queries"
            print(f"{head:34} n" + "".join(f"{f'T = {T:,}':>15}" for T in lengths))
            for title, results in lines.items():
                line = f"  {title:32}{len(results):2}"
                for T in lengths:
                    line += f"{mean_and_spread(values_of(results, T, placement, measure)):>15}"
                print(line)
            print()


if __name__ == "__main__":
    lines = lines_of(rows)
    print_tables(lines, options.lengths)

# %% [markdown]
# The numbers, read by a rule: a kernel has learned the task if it answers .9 of the queries at the
# shortest length; its floor is what costs the answers at the longest one if they rise in every seed
# when it is set to 0, and by more than .1 on the mean.

# %%
LEARNED = 0.9


def read_tables(lines, lengths):
    """On the longest context, on seeds that have not learned, on each floor that was set to 0."""
    T = max(lengths)
    found = []
    for title, results in lines.items():
        found.append(f"{title} {mean(values_of(results, T, 'uniform', 'accuracy')):.3f}")
    print(f"At {T:,} tokens, {T / Run.length:g} times the trained length, queries anywhere,")
    print(f"this share of them is answered right: {'; '.join(found)}.\n")
    for title, results in lines.items():
        at_first = values_of(results, min(lengths), "official", "accuracy")
        learned = sum(accuracy >= LEARNED for accuracy in at_first)
        if learned < len(results):
            print(f"{title}: only {learned} of {len(results)} seeds have learned the task.\n")
    for title in lines:
        if f"{title}, floor 0" in lines:
            read_floor(title, lines[title], lines[f"{title}, floor 0"], lengths)


def read_floor(title, as_trained, changed, lengths):
    """What setting the floor to 0 says about this kernel."""
    learned = mean(values_of(as_trained, min(lengths), "official", "accuracy"))
    if learned < LEARNED:
        print(f"{title} has not learned the task, accuracy {learned:.3f} at {min(lengths)}:")
        print("longer contexts say nothing about its floor.\n")
        return
    T = max(lengths)
    before = values_of(as_trained, T, "uniform", "accuracy")
    after = values_of(changed, T, "uniform", "accuracy")
    higher = sum(new > old for old, new in zip(before, after, strict=True))
    filler = mean(values_of(as_trained, T, "uniform", "filler"))
    filler_after = mean(values_of(changed, T, "uniform", "filler"))
    print(f"Set the floor of {title} to 0 in the trained weights, and its accuracy goes from")
    print(f"{mean(before):.3f} to {mean(after):.3f} (up in {higher} of {len(after)}),", end=" ")
    print(f"its share on filler from {filler:.3f} to {filler_after:.3f}.")
    if higher == len(after) and mean(after) > mean(before) + 0.1:
        print("What it had learned was there all along: the floor had drowned it.\n")
    else:
        print("In this run the floor is not what costs the answers.\n")


if __name__ == "__main__":
    read_tables(lines, options.lengths)

# %% [markdown]
# ## The picture
#
# Left the accuracy, right the share of attention on filler; above with uniform queries, below with
# official ones. A mark is a mean; the thin line through it goes from the lowest seed to the
# highest.

# %%
STYLES = [  # at most seven lines: more cannot be told apart
    ("black", ":", "o"),
    ("tab:blue", "-", "s"),
    ("tab:red", "--", "^"),
    ("tab:orange", "-.", "D"),
    ("tab:green", "-", "v"),
    ("tab:purple", "--", "P"),
    ("tab:gray", "-.", "X"),
]


def draw_panel(axis, lines, lengths, placement, measure):
    """One line each, its name at its end; the marks of a length stand beside each other."""
    ends = []
    for i, (title, results) in enumerate(lines.items()):
        color, dashes, marker = STYLES[i % len(STYLES)]
        places = [T * 1.08 ** (i - len(lines) / 2) for T in lengths]
        seeds = [values_of(results, T, placement, measure) for T in lengths]
        means = [mean(values) for values in seeds]
        lowest = [min(values) for values in seeds]
        highest = [max(values) for values in seeds]
        axis.vlines(places, lowest, highest, color=color, linewidth=1)
        axis.plot(places, means, dashes, marker=marker, markersize=4, color=color)
        ends.append((title, means[-1], color))
    axis.set(xscale="log", ylim=(-0.04, 1.04))
    axis.set_xticks(lengths, [f"{T:,}" for T in lengths], minor=False)
    axis.minorticks_off()
    lesson.label_ends(axis, ends)


def draw_figure(lines, lengths, path):
    """Four panels."""
    figure = lesson.new_figure(width=8, height=6)
    if figure is None:
        return
    axes = figure.subplots(2, 2)
    for row, placement in zip(axes, ("uniform", "official"), strict=True):
        for axis, (measure, name) in zip(row, MEASURES.items(), strict=True):
            draw_panel(axis, lines, lengths, placement, measure)
            axis.set_title(f"{name}, {placement} queries")
            axis.set_xlabel(f"tokens (trained at {Run.length})")
    T = max(lengths)
    found = []
    for title, results in lines.items():
        found.append(f"{title} {mean(values_of(results, T, 'uniform', 'accuracy')):.2f}")
    says = f"Accuracy at {T:,} tokens, uniform queries: {'; '.join(found)}."
    lesson.save_figure(figure, path, "Accuracy and share on filler by length of context. " + says)


if __name__ == "__main__":
    draw_figure(lines, options.lengths, options.figure)

# %% [markdown]
# ## What it does not say
#
# - **Nothing about the trained length.** There every attention that learns the task answers nearly
#   everything: see the first column. The paper's differences at the trained length appear in longer
#   contexts with more pairs [1, Figure 1].
# - **Not that ReBased is the better kernel.** Compare it with Based whose floor is 0.
# - **Not that a kernel without a floor ignores filler.** It *can* give a token 0. No training makes
#   that exact for all, and its share on filler grows too, only later.
# - **Little about text**, where most tokens do not depend on a single token far away. In the mean
#   loss of small language models no effect of the floor was found; in pairs planted in their text
#   one was found where the floor has a large share (results/README.md, "Does the floor matter in
#   text?").
# - It is one task and one size of model. ReBased and Based each run at the
#   best of the rates .001, .003 and .01, which are not the same one. "Based, floor 0" has the very
#   weights of Based: between these two lines nothing differs but the floor. At 8,192 tokens a seed
#   answers 1,024 queries: .9 is known to ±.01.
#
# `python -m experiments.floor` goes on from here: floors from 0 to 1, a floor that is trained
# itself, contexts up to a million tokens, models that are *trained* at 8,192 tokens, and the
# kernels of the paper's ablation with a floor and without, at rates chosen by the training loss.

# %%
if __name__ == "__main__":
    lesson.finish()
