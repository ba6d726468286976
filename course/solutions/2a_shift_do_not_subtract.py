"""Solution of 2a: zeros in front, the last row left out; and a small number before a large one."""

import torch

def exclusive_prefix(x):
    """The inclusive sum, moved down by one row."""
    return torch.cat([torch.zeros_like(x[:1]), x.cumsum(0)[:-1]])


def counterexample():
    """0.001 + 100,000 is 100,000 in float32: the small number is gone before it is asked for."""
    return torch.tensor([0.001, 100_000.0])
