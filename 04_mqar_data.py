"""04 · Associative recall: the data, and what to look for in a model's attention

Aim: make multi-query associative recall (MQAR) examples a whole data set at a time, and measure where the attention of
the queries goes.

You will learn
  1. the task: key-value pairs first, then each key comes back once and its value is asked for;
  2. how to draw without replacement for all examples in one call;
  3. what "the right place" is for a model whose first layer is a convolution.

The data [P 5.1; Z; C]
  Vocabulary V; keys are 1 .. V/2 − 1, values V/2 .. V − 1. The first 2K tokens are K pairs, keys distinct, values
  distinct. Then each key returns once, at an even distance from the end of the pairs: slot s = 1, 2, ... is drawn
  without replacement with p(s) ∝ s^(a−1); a = 0.01 keeps most queries early, a = 1 spreads them uniformly.
  All else is 0. The label at a query is its value, elsewhere −100 (no loss).

Letters: T length, K pairs, V vocabulary, n examples in the data, in (B, n) the number of queries;
  filler: a token 0 after the pairs.

References: [P], [C] as in 01; [Z] Arora et al., Zoology, arXiv 2312.04927, github HazyResearch/zoology.

Run: python 04_mqar_data.py      (5 seconds: one example in columns, the checks)
"""
# %%
import argparse
import sys
from importlib import import_module

import torch

kernels = import_module("01_kernels")

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

# %% Where the attention of a query goes
# On the right pair (key, value, or the token after it, which a convolution of width 3 tells of both), on the other pairs,
# or on filler.
def right_places(tokens, positions, end):
    """Where the right pair of each query can be read, three places: tokens (B, T), positions (B, n) -> (B, n, T) bool."""
    asked = tokens.gather(1, positions)  # (B, n): the key
    key_at = (tokens[:, None, 0:end:2] == asked.unsqueeze(-1)).double().argmax(-1) * 2  # (B, n)
    offset = torch.arange(tokens.shape[1]) - key_at.unsqueeze(-1)  # (B, n, T)
    return (offset >= 0) & (offset <= 2)


def attention_shares(weights, tokens, positions, end):
    """weights (B, n, T) of queries at positions (B, n); pairs lie before `end` -> right, others, filler, each (B, n).

    Earlier queries count as none of the three, so the shares add up to at most 1.
    """
    is_right, place = right_places(tokens, positions, end), torch.arange(tokens.shape[1])
    is_filler = ((place >= end) & (tokens == 0)).unsqueeze(1) & ~is_right
    is_other = (place < end) & ~is_right
    return [(weights * mask).sum(-1).double() for mask in (is_right, is_other, is_filler)]


def overlap(weights, tokens, positions, end):
    """Sizes of the intersection and of the union of what is attended to and what should be, summed over queries.

    Attended: every place with at least half of the largest weight of its row. What should be: the right pair, whose
    three places count as one. (How the paper made its matrix binary is not stated [P 5.6].)
    """
    attended, is_right = weights >= weights.amax(-1, keepdim=True) / 2, right_places(tokens, positions, end)
    hits = (attended & is_right).any(-1).sum().item()
    return hits, (attended & ~is_right).sum().item() + is_right.shape[0] * is_right.shape[1]

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
    assert overlap(weights, tokens, torch.tensor([[8]]), 6) == (1, 3)  # attended: 3 (right), 1, 6


CHECKS = [check_data_format, check_pairs_depend_on_the_seed_alone, check_shares_are_shares]


def main(argv=None):
    """The example and the checks; returns how many failed."""
    parser = argparse.ArgumentParser(description="04: one example of associative recall in columns; checks (5 seconds)")
    kernels.parse_arguments(parser, argv)
    show_example()
    return kernels.run_checks(CHECKS)


if __name__ == "__main__":
    if main():
        sys.exit(1)
