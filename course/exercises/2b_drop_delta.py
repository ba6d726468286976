"""2b · Drop δ from the backward pass and see which gradient breaks             (20 minutes)

Connects to 02_linear_attention.py, "Backwards: what the normaliser adds".

There `gradient_of_q` is written out for the kernel s². Write the other two beside it: the whole
backward pass of the quadratic form, with δ and without. Which of dq, dk, dv survive without it?
Answer before you compute.

    o_i = Σ_j w_ij v_j / den_i     den_i = Σ_j w_ij + EPS     w_ij = s_ij², s_ij = q_i·k_j/√D, j ≤ i

Write
  gradients(q, k, v, do, with_delta)   dq, dk and dv, by hand: no autograd
  broken_without_delta(...)            the names of those that are wrong without δ

Hint: dv_j collects do_i from every i that looks at j, times the share w_ij / den_i. And dk is to
the columns of ds what dq is to its rows.
The question behind it: for which gradient does it matter that a mean divides by the sum of its
weights?

Check: python -m pytest course -k 2b
"""

import math  # noqa: F401

import torch  # noqa: F401

from rebased import EPS, kernels  # noqa: F401  (01_kernels.py)

def gradients(q, k, v, do, with_delta=True):
    """q, k (..., T, D), v, do (..., T, Dv) -> dq, dk (..., T, D), dv (..., T, Dv); sim = s².

    do is the gradient of the loss by o. with_delta=False: δ is taken to be 0.
    """
    # Your code.


def broken_without_delta(q, k, v, do):
    """The names among "q", "k", "v" whose gradient changes by over 1e-6 of its size: a set."""
    # Your code.
