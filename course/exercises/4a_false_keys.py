"""4a · Random fillers plant false keys                                  (warm-up, 15 minutes)

Connects to 04_train_mqar.py, "The task, with one example in columns": why is the filler one
constant token, and not random ones?

Make the filler random and count what goes wrong: a filler that is one of the example's keys looks
like a pair with whatever follows it. Then repair it.

Write
  fill(inputs, labels, num_pairs, vocab_size, generator)          random tokens for the filler
  false_keys(inputs, labels, num_pairs)                           how many of them are keys
  fill_safely(inputs, labels, num_pairs, vocab_size, generator)   random, and no false keys

Hint: filler is what stands after the pairs and is no query. Before filling it is 0; afterwards only
the labels tell: a query has one, filler has −100.
Hint for the last: draw, and draw again where it went wrong. Or give every token a random number,
the keys of the example −1, and take the largest.

Then it is open: does a model that is trained on safe random fillers recall as far as one that knows
a single filler? (`train` of 04 makes its own examples: copy it and fill them.)

Check: python -m pytest course -k 4a
"""

import torch  # noqa: F401

def fill(inputs, labels, num_pairs, vocab_size, generator):
    """A copy of inputs (n, T) with each filler replaced by a token of 1 .. vocab_size − 1.

    Each of these is equally likely. Pairs and queries stay as they are.
    """
    # Your code.


def false_keys(inputs, labels, num_pairs):
    """How many filler tokens of each example are one of its own keys: (n,) int64."""
    # Your code.


def fill_safely(inputs, labels, num_pairs, vocab_size, generator):
    """As `fill`, but no filler of an example is one of its keys; all other tokens may occur."""
    # Your code.
