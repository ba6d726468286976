"""Does the floor matter in text? Four small language models, trained at 512 bytes and tested up to 16,384.

  python -m experiments.floor_text                         4 models × 3 seeds: 45 minutes on a shared core
  python -m experiments.floor_text --seeds 0 1 2 3 4 --workers 2
  python -m experiments.floor_text --search 0.004 0.008    the training loss at these rates, on a seed of their own

In associative recall a floor of ½ drowns what a model has learned, because a long context is full of filler (04). Here
the filler is text, and the models learn to predict it too. Most bytes of a text need no far token. So the loss by
position is measured, and beside it three kinds of bytes for which a far token might matter: bytes whose pair with the
byte before has occurred earlier, by the distance of its last occurrence; those of them that are rare in the training
text; and planted pairs, in training too: a key and its value, and later the key again, where the value could be known.

A model with a floor is tested three times with the same weights: as trained, with the floor set to 0, and with a floor
under the last 512 tokens only. Every run has a row, every number comes from rows, and the same command goes on where it
was interrupted. Text, order of the data and optimiser are those of 05_train_pile.py; the model is that of 04 at twice
the width, because a step of 05's four layers costs more than five times as much.
"""

import argparse
import dataclasses
import json
import math
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from experiments import sweep
from rebased import (
    EPS,
    few_places,
    files,
    lesson,
    linear_attention,
    pile_settings,
    tokens,
    train_pile,
    workers,
)
from rebased import model as models
from rebased.lesson import Refusal

MIXERS = ("based", "based_no_floor", "rebased", "rebased_floor")
SEARCH_SEED = 100
VALID_SHARE = 0.15  # of the documents of 05's text: 48 test windows must fit
TRAINED_LENGTH = 512
SAVE_EVERY = 50  # steps


@dataclass(frozen=True)
class Experiment:
    """What is trained and how it is tested, the same for all models of a table."""

    steps: int = 1500
    learning_rate: float = 0.008
    fewest_pairs: int = 8  # planted in a training window
    most_pairs: int = 24
    answer_weight: float = 4.0  # loss = mean over all bytes + this · mean over the values that could be known
    test_length: int = 16_384
    test_windows: int = 48


@dataclass(frozen=True)
class Run:
    """One model."""

    mixer: str
    seed: int


def settings_of_05(run, experiment):
    """The settings that 05's optimiser and order of data take. A larger part of the text is kept for the test."""
    return pile_settings.Settings(
        steps=experiment.steps, lr=experiment.learning_rate, seed=run.seed, warmup=50, valid_share=VALID_SHARE
    )


def make_model(run):
    """04's model made wider: a short convolution, and above it the attention that is compared. Drawn as in 04."""
    torch.manual_seed(run.seed)
    return models.LanguageModel(models.recall_config(run.mixer, vocab_size=256, d_model=128))


# Planted pairs
# A mark is two bytes that no text has, a key and its value. Where it stands again, the value could be known: the only
# bytes of which that is certain. In training each mark stands TIMES times, most often soon again: the number of places
# between is log-uniform. (Tried before, one run each: marks of letters, "@kV", at uniform gaps were not looked up after
# 225 to 400 steps, nor after 250 at log-uniform ones. There every k of the text looks like a key.)
MARK = 2
TIMES = 3
LONGEST_GAP = 200  # marks, of two bytes
KEYS = np.arange(128, 160)
VALUES = np.arange(192, 224)


def load_text():
    """05's text, as tokens, with a question mark for every byte that is not ASCII."""
    data = tokens.load_data([], tokens.make_vocabulary("bytes"), VALID_SHARE)
    return data._replace(train=only_ascii(data.train), valid=only_ascii(data.valid))


def only_ascii(stream):
    """stream (n,) uint8 -> (n,)."""
    return np.where(stream < 128, stream, np.uint8(ord("?")))


def plant(text, places, keys, values):
    """Write marks into a text; the text moves aside, and what no longer fits is cut off.

    text (n,); places (K, times): where the marks of each pair begin; keys, values (K,).
    Returns tokens (n,), and is_planted (n,) bool.
    """
    window = np.zeros(len(text), dtype=np.int64)
    is_planted = np.zeros(len(text), dtype=bool)
    for own, key, value in zip(places, keys, values, strict=True):
        for place in own:
            window[place : place + MARK] = (key, value)
            is_planted[place : place + MARK] = True
    left = np.count_nonzero(~is_planted)
    window[~is_planted] = text[:left]
    return window, is_planted


def draw_symbols(random, count):
    """Different keys, and values that may repeat: (count,) each."""
    return random.choice(KEYS, count, replace=False), random.choice(VALUES, count)


def training_window(text, random, experiment):
    """text (T + 1,) -> tokens (T + 1,), and which of them are values that could be known."""
    count = int(random.integers(experiment.fewest_pairs, experiment.most_pairs + 1))
    places = draw_places(random, count, len(text) // MARK)
    window, _ = plant(text, places, *draw_symbols(random, count))
    is_answer = np.zeros(len(text), dtype=bool)
    is_answer[places[:, 1:] + MARK - 1] = True
    return window, is_answer


def draw_places(random, count, slots):
    """(count, TIMES): where the marks of each pair begin, in their order; no two overlap."""
    free = np.ones(slots, dtype=bool)
    chosen = []
    while len(chosen) < count:
        gaps = np.exp(random.uniform(math.log(2), math.log(LONGEST_GAP), TIMES - 1)).astype(int)
        own = random.integers(slots) + np.append(0, gaps.cumsum())
        if own[-1] < slots and free[own].all():
            free[own] = False
            chosen.append(MARK * own)
    return np.stack(chosen)


# Where pairs stand in a test window: the first mark somewhere in the 256 bytes from here on, the second this many bytes
# behind the first. The last three are near pairs late in a long context: a floor counts all of it.
PROBES = ((0, 64), (0, 256), (0, 512), (0, 1024), (0, 4096), (0, 16_000), (1024, 64), (4096, 64), (16_000, 64))
EACH = 2  # pairs of a kind in a test window


def kinds_of_pairs():
    """(K, 2): begin and distance of each pair in a test window."""
    return np.repeat(PROBES, EACH, axis=0)


def draw_probes(random):
    """Pairs (K, 2) for a test window, EACH of every kind, in which no two marks overlap."""
    kinds = kinds_of_pairs()
    while True:
        first = kinds[:, 0] + random.integers(256, size=len(kinds))
        pairs = np.stack([first, first + kinds[:, 1]], axis=1)
        if np.diff(np.sort(pairs.flatten())).min() >= MARK:
            return pairs


def test_windows(stream, experiment):
    """Yields tokens (n + 1,), is_planted (n + 1,), pairs (K, 2). The same for every model; the texts do not overlap."""
    length = experiment.test_length
    for number in range(experiment.test_windows):
        text = stream[number * length : (number + 1) * length + 1]
        random = np.random.default_rng([SEARCH_SEED, number])
        pairs = draw_probes(random)
        window, is_planted = plant(text, pairs, *draw_symbols(random, len(pairs)))
        yield window, is_planted, pairs


# Training
def training_batch(data, settings, experiment, step):
    """The micro-batches of 05, planted: [(tokens (B, T + 1), is_answer (B, T + 1))]."""
    parts = []
    for part, texts in enumerate(train_pile.micro_batches(data.train, settings, step)):
        rows = []
        for row, text in enumerate(texts.numpy()):
            random = np.random.default_rng([settings.seed, step, part, row])
            rows.append(training_window(text, random, experiment))
        windows, answers = zip(*rows, strict=True)
        parts.append((torch.from_numpy(np.stack(windows)), torch.from_numpy(np.stack(answers))))
    return parts


def training_loss(model, windows, is_answer, answer_weight):
    """The loss, the mean over all other bytes, the mean over answers: windows and is_answer (B, T + 1)."""
    losses = train_pile.next_token_losses(model, windows)  # (B, T)
    asked = is_answer[:, 1:]
    answers = losses[asked].mean()
    return losses.mean() + answer_weight * answers, losses[~asked].mean().item(), answers.item()


def train_step(model, optimizer, data, settings, experiment, step):
    """One update; returns its mean loss of text and of answers."""
    for group in optimizer.param_groups:
        group["lr"] = train_pile.learning_rate(step, settings)
    optimizer.zero_grad()
    parts = training_batch(data, settings, experiment, step)
    seen = []
    for windows, is_answer in parts:
        loss, text, answers = training_loss(model, windows, is_answer, experiment.answer_weight)
        (loss / len(parts)).backward()
        seen.append((text, answers))
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
    if not torch.isfinite(norm):
        raise Refusal(f"step {step}: the gradient is {norm:.3g}; lower --learning-rate")
    optimizer.step()
    return np.mean(seen, axis=0).tolist()


def train(run, data, experiment, path, report):
    """A trained model, and [text, answers] losses of every step. Goes on from the file of weights at `path`."""
    settings = settings_of_05(run, experiment)
    model = make_model(run)
    optimizer = train_pile.make_optimizer(model, settings)
    log = []
    found = sweep.load_checkpoint(path)
    if found:
        model.load_state_dict(found["model"])
        optimizer.load_state_dict(found["optimizer"])
        log = found["log"]
    for step in range(len(log), experiment.steps):
        log.append(train_step(model, optimizer, data, settings, experiment, step))
        report(step, log[-1][0], math.exp(-log[-1][1]))
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == experiment.steps:
            content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "log": log}
            files.save_tensors(path, content)
    return model.eval(), log


# Floors at test
@contextmanager
def floor_set_to_0(model):
    """The same weights without a floor, for a while."""
    attentions = [block.mixer for block in model.blocks if hasattr(block.mixer, "kernel")]
    before = [attention.kernel.floor for attention in attentions]
    for attention in attentions:
        attention.kernel.floor = 0.0
    try:
        yield
    finally:
        for attention, floor in zip(attentions, before, strict=True):
            attention.kernel.floor = floor


@contextmanager
def floor_of_the_last(window, model):
    """The same weights with a floor under the last `window` tokens only, for a while."""
    before = [block.mixer for block in model.blocks]
    for block in model.blocks:
        if hasattr(block.mixer, "kernel"):
            block.mixer = RecentFloor(block.mixer, window)
    try:
        yield
    finally:
        for block, mixer in zip(model.blocks, before, strict=True):
            block.mixer = mixer


class RecentFloor(nn.Module):
    """Kernel attention of 03 in which only the last `window` tokens have a floor."""

    def __init__(self, mixer, window):
        super().__init__()
        self.mixer = mixer
        self.window = window

    def forward(self, x, state=None):
        mixer = self.mixer
        q, k = mixer.kernel.prepare(mixer.q(x), mixer.k(x))
        q = models.split_heads(q, mixer.heads)  # (B, H, T, D)
        k = models.split_heads(k, mixer.heads)
        v = models.split_heads(mixer.v(x), mixer.heads)  # (B, H, T, Dv)
        return mixer.out(models.join_heads(recent_floor_attention(q, k, v, mixer.kernel, self.window)))


def recent_floor_attention(q, k, v, kernel, window, chunk_size=128):
    """q, k (B, H, T, D), v (B, H, T, Dv) -> o (B, H, T, Dv); a floor for the last `window` tokens, their own included.

    A floor f adds f·Σ v_j to the numerator and f·n to the normaliser, whatever the query. So both sums over the tokens
    further back can be taken away again, exactly: o_i = (num_i − f·Σ_{j≤i−window} v_j) / (den_i − f·(i + 1 − window)).
    """
    far_values = F.pad(v.cumsum(2), (0, 0, window, 0))[:, :, : v.shape[2]]  # (B, H, T, Dv): Σ v_j of j <= i − window
    far_count = (torch.arange(v.shape[2]) + 1 - window).clamp(min=0).to(v)  # (T,)
    S, z = linear_attention.empty_state(k, v, kernel)
    outputs = []
    for start in range(0, q.shape[2], chunk_size):
        chunk = slice(start, start + chunk_size)
        q_c, k_c, v_c = q[:, :, chunk], k[:, :, chunk], v[:, :, chunk]
        phi_q, phi_k = kernel.features(q_c), kernel.features(k_c)  # (B, H, C, P)
        weights = kernel.scores(q_c, k_c).tril()  # (B, H, C, C)
        num = weights @ v_c + phi_q @ S
        den = weights.sum(-1, keepdim=True) + phi_q @ z.unsqueeze(-1)
        num = num - kernel.floor * far_values[:, :, chunk]
        den = den - kernel.floor * far_count[chunk, None]
        outputs.append(num / (den + EPS))
        S = S + phi_k.mT @ v_c
        z = z + phi_k.sum(2)
    return torch.cat(outputs, dim=2)


def ways_to_test(mixer):
    """{name: context(model)}: what is done to the floor of a trained model at test."""
    ways = {"as trained": nullcontext}
    if mixer in ("based", "rebased_floor"):
        ways["floor 0"] = floor_set_to_0
        ways["floor of the last 512"] = partial(floor_of_the_last, TRAINED_LENGTH)
    return ways


# Measures
POSITIONS = (256, 512, 1024, 2048, 4096, 8192, 16_384)  # the last of each bucket
DISTANCES = (64, 512, 2048, 16_384)


def last_distance(keys):
    """keys (n,) -> (n,): how far back each key occurred last; 0 where it had not."""
    order = np.argsort(keys, kind="stable")
    same = keys[order[1:]] == keys[order[:-1]]
    distance = np.zeros(len(keys), dtype=np.int64)
    distance[order[1:]] = np.where(same, order[1:] - order[:-1], 0)
    return distance


def repeats(window, common):
    """{definition: last distance (n,)} of tokens window (n + 1,) but the first; 0 where the definition does not hold.

    bigram: the byte and the one before it, as in 05; rare: those of them that are rare in the training text; word: the
    byte and the four before it.
    """
    pairs = train_pile.bigram_keys(window)  # (n,)
    bigram = last_distance(pairs)
    rare = np.where(np.isin(pairs, common), 0, bigram)
    five = np.lib.stride_tricks.sliding_window_view(window, 5) @ 256 ** np.arange(5)  # (n - 3,)
    word = np.append(np.zeros(3, dtype=np.int64), last_distance(five))
    return {"bigram": bigram, "rare": rare, "word": word}


class Means:
    """Means of losses by name, gathered window by window."""

    def __init__(self):
        self.sums = {}

    def add(self, name, losses):
        total, count = self.sums.get(name, (0.0, 0))
        self.sums[name] = (total + float(losses.sum()), count + len(losses))

    def found(self):
        """{name: [mean, how many]}; a name without one loss has no mean."""
        return {name: [total / count, count] for name, (total, count) in self.sums.items() if count}


def add_window(means, losses, right, window, is_planted, pairs, common):
    """Add the losses (n,) of one window, and right (n,): whether the likeliest byte was the next one."""
    is_text = ~is_planted[1:]
    begin = 0
    for end in POSITIONS:
        means.add(f"position {end}", losses[begin:end][is_text[begin:end]])
        begin = end
    late = is_text & (np.arange(len(losses)) >= len(losses) // 2)  # so that all have a long context
    for definition, distance in repeats(window, common).items():
        nearest = 0
        for farthest in DISTANCES:
            chosen = late & (distance > nearest) & (distance <= farthest)
            means.add(f"{definition} {farthest}", losses[chosen])
            nearest = farthest
    for (first, second), (begin, distance) in zip(pairs, kinds_of_pairs(), strict=True):
        assert second - first == distance
        asked = second + MARK - 2  # losses[t] is that of the byte at t + 1
        means.add(f"answer {begin} {distance}", losses[asked : asked + 1])
        means.add(f"right {begin} {distance}", right[asked : asked + 1])


@torch.no_grad()
def test(model, data, experiment, common):
    """{name: [mean, how many]} of one model, as it is."""
    means = Means()
    for window, is_planted, pairs in test_windows(data.valid, experiment):
        batch = torch.from_numpy(window).unsqueeze(0)
        logits = model(batch[:, :-1])[0]  # (n, V)
        losses = F.cross_entropy(logits, batch[0, 1:], reduction="none").numpy()
        right = (logits.argmax(-1) == batch[0, 1:]).numpy()
        add_window(means, losses, right, window, is_planted, pairs, common)
    return means.found()


@torch.no_grad()
def shares(model, data, experiment):
    """{name: [mean, how many]} of what planted queries give in the last layer: to their value, and through the floor.

    A floor f gives f·n of the normaliser to all n tokens alike; so much of the attention cannot be directed.
    """
    attention = model.blocks[-1].mixer
    means = Means()
    for window, _, pairs in test_windows(data.valid, experiment):
        x = model.blocks[-1].norm1(model.trunk(torch.from_numpy(window[:-1]).unsqueeze(0)))  # (1, T, d_model)
        asking = few_places.rows(x, torch.from_numpy(pairs[:, 1]).unsqueeze(0))  # (1, K, d_model)
        q, k = attention.kernel.prepare(attention.q(asking), attention.k(x))
        weights = attention.kernel.scores(q, k)[0]  # (K, T): there is one head
        for own, (first, second), (begin, distance) in zip(weights, pairs, kinds_of_pairs(), strict=True):
            total = own[: second + 1].sum()
            means.add(f"share {begin} {distance}", own[first + 1 : first + 2] / total)
            means.add(f"floor {begin} {distance}", attention.kernel.floor * (second + 1) / total.unsqueeze(0))
    return means.found()


# One run -> one row
def perform(run, report, experiment, rows_path):
    """Train and test one model, in a worker -> its row. The weights stay: to test again needs no second training."""
    start = time.perf_counter()
    data = load_text()
    model, log = train(run, data, experiment, weights_path(run, experiment, rows_path), report)
    trained = time.perf_counter()
    tests = {}
    if run.seed != SEARCH_SEED:
        common = train_pile.common_bigrams(data.train)
        for name, way in ways_to_test(run.mixer).items():
            with way(model):
                tests[name] = test(model, data, experiment, common)
        tests["as trained"] |= shares(model, data, experiment)
    return {
        **dataclasses.asdict(run),
        "settings": dataclasses.asdict(experiment),
        "parameters": models.count_parameters(model.config),
        "curve": curve(log),
        "tests": tests,
        "train_seconds": trained - start,
        "seconds": time.perf_counter() - start,
    }


def curve(log, every=50):
    """[steps, loss of text, loss of answers], means over the steps since the point before."""
    every = min(every, len(log))
    points = []
    for end in range(every, len(log) + 1, every):
        points.append([end, *np.mean(log[end - every : end], axis=0).tolist()])
    return points


def weights_path(run, experiment, rows_path):
    """Where the weights of a run lie, beside the rows; they are kept."""
    return sweep.checkpoint_path(rows_path, f"{run} {experiment}")


ROW = {
    "mixer": str,
    "seed": int,
    "settings": {"learning_rate": files.NUMBER},
    "curve": [[int, files.NUMBER, files.NUMBER], ...],
    "tests": {files.EACH: {files.EACH: [files.NUMBER, int]}},
}


def finished(path):
    """{(Run, settings as text): row} of a file of rows."""
    rows = files.read_rows(path, ROW)
    return {(Run(row["mixer"], row["seed"]), json.dumps(row["settings"])): row for row in rows}


def perform_missing(runs, experiment, path, processes, extra):
    """Perform those runs that have no row with these settings; returns the rows of all."""
    key = json.dumps(dataclasses.asdict(experiment))
    missing = [run for run in runs if (run, key) not in finished(path)]
    if len(missing) < len(runs):
        print(f"{path}: {len(runs) - len(missing)} of {len(runs)} runs are there already and are not repeated")
    if missing:
        work = partial(perform, experiment=experiment, rows_path=path)

        def keep(run, row):
            files.append_row(path, row | extra)

        workers.run_all(work, missing, lambda run: experiment.steps, processes, keep)
    done = finished(path)
    return [done[run, key] for run in runs]


# Tables
LINES = (  # model, how it is tested, its name
    ("based", "as trained", "Based"),
    ("based", "floor 0", "  floor 0 at test"),
    ("based", "floor of the last 512", "  floor of the last 512"),
    ("based_no_floor", "as trained", "Based − ½"),
    ("rebased", "as trained", "ReBased"),
    ("rebased_floor", "as trained", "ReBased + ½"),
    ("rebased_floor", "floor 0", "  floor 0 at test"),
    ("rebased_floor", "floor of the last 512", "  floor of the last 512"),
)
PAIRED = (  # name, line, line it is compared with: positions in LINES
    ("Based: floor 0 at test", 1, 0),
    ("Based: floor of the last 512", 2, 0),
    ("Based − ½ against Based", 3, 0),
    ("ReBased + ½: floor 0 at test", 6, 5),
    ("ReBased + ½: floor of the last 512", 7, 5),
    ("ReBased against ReBased + ½", 4, 5),
)
FAR = [f"right {begin} {distance}" for begin, distance in PROBES if begin == 0]
NEAR = ["right 0 64"] + [f"right {begin} {distance}" for begin, distance in PROBES if begin > 0]


def values_of(rows, line, name):
    """{seed: mean} of one line of LINES and one measure."""
    mixer, way, _ = LINES[line]
    found = {}
    for row in rows:
        if row["mixer"] == mixer and name in row["tests"].get(way, {}):
            found[row["seed"]] = row["tests"][way][name][0]
    return found


def spread(values, form=".3f"):
    """mean ± standard deviation over seeds; a dash for none."""
    values = list(values)
    if not values:
        return "–"
    deviation = f" ± {stdev(values):{form.lstrip('+')}}" if len(values) > 1 else ""
    return f"{mean(values):{form}}{deviation}"


def differences(rows, better, worse, name):
    """[value of line `better` − that of line `worse`] by seed, for the seeds that have both."""
    first = values_of(rows, better, name)
    second = values_of(rows, worse, name)
    return [first[seed] - second[seed] for seed in sorted(first) if seed in second]


def print_table(rows, title, columns):
    """A line for each model and way to test it; columns: {heading: measure}."""
    print(f"\n{title:36}{'n':>3}" + "".join(f"{heading:>16}" for heading in columns))
    for line, (_, _, label) in enumerate(LINES):
        seeds = len(values_of(rows, line, next(iter(columns.values()))))
        if seeds:
            cells = [spread(values_of(rows, line, name).values()) for name in columns.values()]
            print(f"  {label:34}{seeds:3}" + "".join(f"{cell:>16}" for cell in cells))


def print_differences(rows, title, columns, form):
    """Paired differences: mean ± standard deviation over seeds, and how many of them are above 0."""
    print(f"\n{title:36}{'n':>3}" + "".join(f"{heading:>24}" for heading in columns))
    for label, better, worse in PAIRED:
        cells = ""
        for name in columns.values():
            found = differences(rows, better, worse, name)
            above = sum(difference > 0 for difference in found)
            cells += f"{f'{spread(found, form)} ({above} up)' if found else '–':>24}"
        print(f"  {label:34}{len(found):3}{cells}")


def thousands(number):
    """512, 1k, 16k."""
    return str(number) if number < 1000 else f"{round(number / 1024)}k"


def position_columns():
    """{"0–256": "position 256", ...}."""
    columns = {}
    begin = 0
    for end in POSITIONS:
        columns[f"{thousands(begin)}–{thousands(end)}"] = f"position {end}"
        begin = end
    return columns


def repeat_columns(definition):
    """{"to 64": "bigram 64", ...}."""
    return {f"to {thousands(distance)}": f"{definition} {distance}" for distance in DISTANCES}


def answer_columns(names):
    """{"64 at 16k": "right 16000 64", ...}: how far back, and where in the context."""
    columns = {}
    for name in names:
        _, begin, distance = name.split()
        columns[thousands(int(distance)) + (f" at {thousands(int(begin))}" if int(begin) else "")] = name
    return columns


def print_all(rows):
    """Every table, the paired differences, and what they say."""
    print_table(rows, "loss by position", position_columns())
    print_table(rows, "planted: right, by distance", answer_columns(FAR))
    print_table(rows, "planted: right, 64 back, by place", answer_columns(NEAR))
    losses = {heading: name.replace("right", "answer") for heading, name in answer_columns(FAR).items()}
    print_table(rows, "planted: loss, by distance", losses)
    floors = {heading: name.replace("right", "floor") for heading, name in answer_columns(FAR).items()}
    print_table(rows, "planted: share given by the floor", floors)
    for definition in ("bigram", "rare", "word"):
        print_table(rows, f"loss, {definition}, last seen", repeat_columns(definition))
    columns = {"8k–16k": "position 16384"}
    columns |= {f"{definition}, 2k–16k back": f"{definition} 16384" for definition in ("bigram", "rare", "word")}
    print_differences(rows, "paired differences: loss", columns, "+.4f")
    columns = {"512 back": "right 0 512", "4k back": "right 0 4096", "16k back": "right 0 16000"}
    print_differences(rows, "paired differences: right", columns | {"64 back at 16k": "right 16000 64"}, "+.3f")
    print_reading(rows)


def print_reading(rows):
    """A sentence for each comparison: planted pairs far back, and the mean loss late in the context."""
    print()
    for label, better, worse in PAIRED:
        parts = []
        for heading, name in (("4,096 bytes back", "right 0 4096"), ("16,000", "right 0 16000")):
            found = differences(rows, better, worse, name)
            seeds = [seed for seed in values_of(rows, better, name) if seed in values_of(rows, worse, name)]
            if seeds:
                before = mean(values_of(rows, worse, name)[seed] for seed in seeds)
                after = mean(values_of(rows, better, name)[seed] for seed in seeds)
                up = sum(difference > 0 for difference in found)
                parts.append(f"{heading} {before:.3f} -> {after:.3f} (up in {up} of {len(found)})")
        if parts:
            loss = spread(differences(rows, better, worse, "position 16384"), "+.4f")
            print(f"{label}: planted pairs {', '.join(parts)}; loss at 8k–16k {loss}.")


def print_search(rows):
    """The training loss at each rate, over the last 50 steps: text, and answers."""
    print(f"\n{'training loss: text, answers':36}" + "".join(f"{mixer:>20}" for mixer in MIXERS))
    rates = sorted({row["settings"]["learning_rate"] for row in rows})
    for rate in rates:
        cells = ""
        for mixer in MIXERS:
            ends = [row["curve"][-1] for row in rows if row["mixer"] == mixer
                    and row["settings"]["learning_rate"] == rate]
            cells += f"{f'{ends[0][1]:.3f}, {ends[0][2]:.3f}' if ends else '–':>20}"
        print(f"  {rate:<34}{cells}")
    print()


PANELS = {"Based": (0, 1, 3), "ReBased": (5, 6, 4)}  # positions in LINES: with its floor, 0 at test, without
STYLES = (("with a floor of ½", "tab:red", "--"), ("the same, 0 at test", "tab:red", "-"), ("without", "black", ":"))


def draw(rows, path):
    """Planted pairs answered right by distance: the mean over seeds, and a thin line from the lowest to the highest."""
    figure = lesson.new_figure(9, 3.4)
    if figure is None:
        return
    axes = figure.subplots(1, 2, sharey=True)
    marks = [distance for begin, distance in PROBES if begin == 0]
    for axis, (title, lines) in zip(axes, PANELS.items(), strict=True):
        for line, (name, color, dashes) in zip(lines, STYLES, strict=True):
            by_distance = [list(values_of(rows, line, measure).values()) for measure in FAR]
            if all(by_distance):
                means = [mean(values) for values in by_distance]
                axis.plot(marks, means, dashes, color=color, marker=".", label=name)
                axis.vlines(marks, [min(v) for v in by_distance], [max(v) for v in by_distance], color=color, lw=0.8)
        axis.set(xscale="log", ylim=(0, 1.03), xlabel="bytes between a pair and its query", title=title)
        axis.set_xticks(marks, [thousands(mark) for mark in marks])
        axis.minorticks_off()
        axis.legend(frameon=False)
    axes[0].set_ylabel("answered right")
    lesson.save_figure(figure, path, "Pairs planted in text, answered right by distance, with a floor and without one")


# The command line
def make_parser():
    parser = argparse.ArgumentParser(description="What the floor does to small language models beyond 512 bytes")
    add = parser.add_argument
    add("--mixers", nargs="+", choices=MIXERS, default=MIXERS, help="(all four)")
    add("--seeds", nargs="+", type=lesson.seed_number, default=[0, 1, 2], help="(0 1 2)")
    add("--steps", type=lesson.positive_integer, default=Experiment.steps, help="(%(default)s)")
    rate = lesson.learning_rate
    add("--learning-rate", type=rate, default=Experiment.learning_rate, help="of all models (%(default)s)")
    add("--search", type=rate, nargs="+", metavar="RATE", help="only train at these rates, on a seed of their own")
    add("--output", type=lesson.writable_path, default="runs/floor_text.jsonl", help="rows (%(default)s)")
    add("--figure", type=lesson.figure_path, default="runs/floor_text.png", help="(%(default)s)")
    add("--workers", type=lesson.positive_integer, default=1, help="processes of one thread each (%(default)s)")
    return parser


def main(argv=None):
    """Perform what is missing, print the tables, draw the figure."""
    parser = make_parser()
    options = lesson.parse_arguments(parser, argv)
    if SEARCH_SEED in options.seeds:
        parser.error(f"seed {SEARCH_SEED} is that of --search; choose another one for --seeds")
    if options.output.resolve() == options.figure.resolve():
        parser.error(f"--output and --figure are both {options.figure}; rows need a file of theirs")
    start = time.perf_counter()
    extra = lesson.provenance(__file__, argv)
    seeds = [SEARCH_SEED] if options.search else options.seeds
    runs = list(dict.fromkeys(Run(mixer, seed) for seed in seeds for mixer in options.mixers))  # each once
    rows = []
    for rate in dict.fromkeys(options.search or [options.learning_rate]):
        experiment = Experiment(steps=options.steps, learning_rate=rate)
        rows += lesson.obey(
            lambda: perform_missing(runs, experiment, options.output, options.workers, extra),  # noqa: B023
            f"finished runs are in {options.output}; the same command goes on from there",
        )
    if options.search:
        print_search(rows)
    else:
        print_all(rows)
        draw(rows, options.figure)
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes; rows: {options.output}")


if __name__ == "__main__":
    main()
