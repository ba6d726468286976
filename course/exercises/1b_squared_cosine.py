"""1b · The squared cosine: a kernel without a floor that cannot raise its voice   (20 minutes)

Connects to 01_kernels.py, "A kernel as a module" and "What a floor costs in a long context".

    sim(q, k) = cos²(q, k) = (q·k)² / (|q|² |k|²)

It reaches 0, as ReBased does. But it never exceeds 1, however large training makes q and k. So let
one key lie in the very direction of the query, and T others in random directions. What is the share
of the others now?

Write
  SquaredCosineKernel    a class like those of 01; `features` is all that it needs
  random_share(T, D)     the share of T keys in random directions, beside one right key

Hint for the class: `kernels.symmetric_products` has (q·k)². What must happen to x before it? End
with `self.add_floor(...)`, so that a floor can be set. `scores` comes from the class `Kernel`.
Hint for the share: the squares of D cosines with D perpendicular axes sum to 1. What is the mean of
one of them, if no direction is preferred?

With one line more, `"squared_cosine": SquaredCosineKernel` in KERNELS of 01, every form, the
model and 04 would know it: `python 04_train_mqar.py --mixers squared_cosine --seeds 0`.

Check: python -m pytest course -k 1b
"""

import torch.nn.functional as F  # noqa: F401

from rebased import kernels  # 01_kernels.py

class SquaredCosineKernel(kernels.Kernel):
    """sim = cos²(q, k) + floor. P = D(D+1)/2 (+ 1 with floor)."""

    def features(self, x):
        """φ(x): (..., D) -> (..., P). Finite also for a vector of zeros."""
        # Your code.


def random_share(T, D):
    """The share of the attention that goes to T keys in random directions of D dimensions.

    The right key lies in the direction of the query. Take the mean weight of the others.
    """
    # Your code.
