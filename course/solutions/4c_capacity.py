"""Solution of 4c: what a state holds grows with P, and shrinks with what every key weighs.

elu + 1 gives every key nearly the same weight, so it holds next to nothing at any D. s² holds 8,
32, 128 pairs at D = 4, 8, 16: the factor 4 is nearly that of P = D(D+1)/2. Based adds 1 + s to it,
which tells keys apart less well. In steps of 2 the table does not show that; `recall` of 256 pairs
at D = 16 does.
"""

from statistics import mean

import torch

from rebased import kernels  # 01_kernels.py

@torch.no_grad()
def recall(kernel, num_pairs, value_dim, seed=0):
    """Write all pairs, read all keys, take the likest value."""
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(num_pairs, kernel.dim, generator=generator)  # (K, D)
    signs = torch.randint(2, (num_pairs, value_dim), generator=generator)
    v = 2.0 * signs - 1  # (K, Dv)
    phi = kernel.features(k)  # (K, P)
    S = phi.T @ v  # (P, Dv)
    z = phi.sum(0)  # (P,)
    o = (phi @ S) / (phi @ z).unsqueeze(1)  # (K, Dv)
    answers = (o @ v.T).argmax(1)  # (K,)
    return (answers == torch.arange(num_pairs)).float().mean().item()


def capacity(kernel, value_dim=32):
    """Double the number of pairs until less than half come back."""
    largest = 1
    while mean(recall(kernel, 2 * largest, value_dim, seed) for seed in range(10)) >= 0.5:
        largest *= 2
    return largest


def table(value_dim=32):
    """Three kernels at three sizes."""
    found = {}
    for name in ("elu", "based", "rebased"):
        for D in (4, 8, 16):
            found[name, D] = capacity(kernels.KERNELS[name](D), value_dim)
    return found
