"""Solution of 4a: with 16 pairs and 256 symbols one filler in 16 is a false key."""

import torch

def is_filler(labels, num_pairs):
    """(n, T) bool: after the pairs, and without a label."""
    after_pairs = torch.arange(labels.shape[1]) >= 2 * num_pairs
    return after_pairs & (labels == -100)


def is_a_key(inputs, num_pairs):
    """(n, T) bool: which tokens are one of the keys of their example."""
    keys = inputs[:, 0 : 2 * num_pairs : 2]  # (n, K)
    return (inputs.unsqueeze(2) == keys.unsqueeze(1)).any(2)


def fill(inputs, labels, num_pairs, vocab_size, generator):
    """Random tokens where there is filler."""
    random = torch.randint(1, vocab_size, inputs.shape, generator=generator)
    return torch.where(is_filler(labels, num_pairs), random, inputs)


def false_keys(inputs, labels, num_pairs):
    """Count the filler that is a key."""
    wrong = is_filler(labels, num_pairs) & is_a_key(inputs, num_pairs)
    return wrong.sum(1)


def fill_safely(inputs, labels, num_pairs, vocab_size, generator):
    """Draw again what is a key, until nothing is."""
    filled = fill(inputs, labels, num_pairs, vocab_size, generator)
    while to_redraw(filled, labels, num_pairs).any():
        again = fill(inputs, labels, num_pairs, vocab_size, generator)
        filled = torch.where(to_redraw(filled, labels, num_pairs), again, filled)
    return filled


def to_redraw(filled, labels, num_pairs):
    """(n, T) bool: the filler that must be drawn again."""
    return is_filler(labels, num_pairs) & is_a_key(filled, num_pairs)
