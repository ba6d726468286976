"""1a · A kernel whose floor is 1                                        (warm-up, 10 minutes)

Connects to 01_kernels.py, "The smallest example: a square in two dimensions" and
"What a floor costs in a long context".

There (q·k)² in two dimensions got three features. Take 1 + (q·k)² instead: no key can weigh less
than 1. One feature more does it. Then ask what that floor costs.

Write
  features(x)              φ with φ(q)·φ(k) = 1 + (q·k)², for vectors of two numbers
  half_way(floor, right)   how many irrelevant tokens take half of the attention

Hint: a feature that is the same for every vector adds the same number to every similarity.

Check: python -m pytest course -k 1a
"""

import math  # noqa: F401

import torch  # noqa: F401

def features(x):
    """φ(x) with φ(q)·φ(k) = 1 + (q·k)²: (..., 2) -> (..., 4)."""
    # Your code.


def half_way(floor, right):
    """The number of tokens of weight `floor` that together weigh as much as one of weight `right`.

    A float; math.inf if there is no floor. (Then look at Based: floor ½, right key 13.)
    """
    # Your code.
