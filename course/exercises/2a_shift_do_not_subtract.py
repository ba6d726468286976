"""2a · Shift, do not subtract                                          (warm-up, 10 minutes)

Connects to 02_linear_attention.py,
"4. Chunked: quadratic where that is cheap, a state for the rest": the states before each chunk are
an exclusive prefix sum.

`cumsum(x) - x` looks like one. Write the one that keeps its digits, and then find numbers on which
the other fails.

Write
  exclusive_prefix(x)   the sum of all rows before each row, by shifting
  counterexample()      a few positive numbers on which cumsum(x) - x is wrong by half or more

Hint: near 100,000 two neighbouring float32 numbers lie 0.0078 apart.

Check: python -m pytest course -k 2a
"""

import torch  # noqa: F401

def exclusive_prefix(x):
    """x (T, P) -> (T, P): row t is the sum of the rows before t; row 0 is zeros."""
    # Your code.


def counterexample():
    """A float32 tensor of 2 to 8 numbers, each from 0.001 to 100,000.

    Somewhere behind the first number cumsum(x) - x must be off by 50 % or more of the true sum.
    """
    # Your code.
