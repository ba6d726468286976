"""The checks of 4a, 4b and 4c; how they find an answer: course/conftest.py.

PYTEST_DONT_REWRITE: a message of an assertion is all that a student should read.
"""

from statistics import mean

import pytest
import torch

from rebased import kernels, train_mqar

PAIRS = 16
VOCABULARY = 256


def is_filler(labels):
    """(n, T) bool, by a loop."""
    mask = torch.zeros_like(labels, dtype=torch.bool)
    for row in range(len(labels)):
        for t in range(2 * PAIRS, labels.shape[1]):
            mask[row, t] = labels[row, t] == -100
    return mask


def count_false_keys(inputs, labels):
    """By a loop over all tokens."""
    filler = is_filler(labels)
    counts = []
    for tokens, fills in zip(inputs.tolist(), filler.tolist(), strict=True):
        keys = set(tokens[0 : 2 * PAIRS : 2])
        counts.append(sum(is_fill and t in keys for t, is_fill in zip(tokens, fills, strict=True)))
    return counts


def check_filled(filled, inputs, labels, name):
    """Pairs and queries as before; a token of 1 .. V − 1 for all else."""
    filler = is_filler(labels)
    assert filled.shape == inputs.shape, f"{name}: the shape is {tuple(filled.shape)}"
    assert torch.equal(filled[~filler], inputs[~filler]), f"{name} changed a pair or a query"
    tokens = filled[filler]
    inside = 1 <= tokens.min() and tokens.max() < VOCABULARY
    assert inside, f"{name}: filler from {tokens.min()} to {tokens.max()}, not 1 to 255"
    return tokens


def test_4a_false_keys(answer):
    inputs, labels = train_mqar.make_mqar(200, 128, PAIRS, VOCABULARY, seed=3)
    original = inputs.clone()
    arguments = (PAIRS, VOCABULARY, torch.Generator().manual_seed(0))
    filled = answer.ask("fill", inputs, labels, *arguments)
    assert torch.equal(inputs, original), "fill changed the inputs it was given; work on a copy"
    tokens = check_filled(filled, inputs, labels, "fill")
    kinds = len(tokens.unique())
    assert kinds == 255, f"fill: {kinds} different tokens in 16,000 fillers; 255 are expected"
    expected = count_false_keys(filled, labels)
    found = answer.ask("false_keys", filled, labels, PAIRS)
    told = f"the first three examples have {expected[:3]} false keys, yours: {found[:3].tolist()}"
    assert found.tolist() == expected, told
    per_filler = mean(expected) / 80  # 16 of 255 tokens are keys of the example
    told = f"{per_filler:.3f} of your fillers are keys; equally likely tokens give .063"
    assert abs(per_filler - 16 / 255) < 0.008, told
    safe = answer.ask("fill_safely", inputs, labels, *arguments)
    tokens = check_filled(safe, inputs, labels, "fill_safely")
    left = sum(count_false_keys(safe, labels))
    assert left == 0, f"fill_safely leaves {left} false keys in 200 examples"
    kinds = len(tokens.unique())
    assert kinds == 255, f"fill_safely: only {kinds} different tokens; all but the keys may occur"


def test_4b_take_out_the_half(answer):
    run = answer.ask("my_run")
    assert isinstance(run, train_mqar.Run), f"my_run returns a {type(run).__name__}, not a Run"
    assert run.seed > 0, "seed 0 is the lesson's: choose your own"
    small = run.steps <= 500 and run.batch <= 32 and run.length <= 64
    assert small, "a run of 500 steps of 32 examples of 64 tokens is the most this check trains"
    trained = train_mqar.train(run)
    kernel = train_mqar.kernel_of(trained)
    assert kernel is not None and kernel.floor > 0, f"{run.mixer} has no floor to take out"
    before = kernel.floor
    learned = train_mqar.test_at(trained, run, run.length, "uniform")["accuracy"]
    assert learned >= 0.9, f"your model answers {learned:.2f} at {run.length} tokens: train longer"
    floors = [before, 0.1, 0.01, 0.0]
    rows = answer.ask("dose", trained, run, floors, 512)
    assert kernel.floor == before, f"the model came back with the floor {kernel.floor}"
    assert [row[0] for row in rows] == floors, "one row for each floor, in their order"
    for floor, accuracy, filler in rows:
        kernel.floor = floor
        expected = train_mqar.test_at(trained, run, 512, "uniform")
        right = (expected["accuracy"], expected["filler"])
        same = abs(accuracy - right[0]) + abs(filler - right[1]) < 1e-4
        told = f"floor {floor}: accuracy {right[0]:.3f}, share on filler {right[1]:.3f}"
        assert same, f"{told}; yours: {accuracy:.3f}, {filler:.3f}"


def slow_recall(kernel, num_pairs, value_dim, seed):
    """Every key meets every key: no state."""
    generator = torch.Generator().manual_seed(1000 + seed)
    k = torch.randn(num_pairs, kernel.dim, generator=generator, dtype=torch.float64)
    v = torch.randint(2, (num_pairs, value_dim), generator=generator).double() * 2 - 1
    weights = kernel.scores(k, k)
    o = weights @ v / weights.sum(1, keepdim=True)
    return ((o @ v.T).argmax(1) == torch.arange(num_pairs)).double().mean().item()


@torch.no_grad()
def test_4c_capacity(answer):
    for name, D, pairs, value_dim in (
        ("rebased", 8, 32, 32), ("elu", 8, 32, 32), ("based", 16, 128, 32), ("rebased", 8, 32, 8)
    ):  # fmt: skip
        kernel = kernels.KERNELS[name](D)
        found = [answer.ask("recall", kernel, pairs, value_dim, seed) for seed in range(30)]
        assert len(set(found)) > 1, "recall is the same for every seed"
        expected = mean(slow_recall(kernel, pairs, value_dim, seed) for seed in range(30))
        what = f"recall of {name} at D = {D}, {pairs} pairs, {value_dim} signs"
        told = f"{what}: {expected:.3f} where every key meets every key, yours {mean(found):.3f}"
        assert mean(found) == pytest.approx(expected, abs=0.06), told
    rows = answer.ask("table", 32)
    wanted = {(name, D) for name in ("elu", "based", "rebased") for D in (4, 8, 16)}
    assert set(rows) == wanted, f"table has the rows {sorted(rows)}"
    for (name, D), K in rows.items():
        kernel = kernels.KERNELS[name](D)
        at_K = mean(slow_recall(kernel, K, 32, seed) for seed in range(10))
        beyond = mean(slow_recall(kernel, 2 * K, 32, seed) for seed in range(10))
        told = f"table: {name} at D = {D} recalls {at_K:.2f} of {K} pairs, {beyond:.2f} of {2 * K}"
        assert at_K > 0.4 and beyond < 0.6, f"{told}; capacity is the last one at .5 or more"
