"""Solution of 2b: dq and dk break, dv does not. The values do not enter the normaliser."""

import math

import torch

from rebased import EPS, kernels  # 01_kernels.py

def gradients(q, k, v, do, with_delta=True):
    """The backward pass of the quadratic form with sim = s²."""
    s = kernels.scaled_dot(q, k).tril()  # (..., T, T)
    weights = s.square()
    den = weights.sum(-1, keepdim=True) + EPS  # (..., T, 1)
    shares = weights / den
    o = shares @ v  # (..., T, Dv)
    delta = (do * o).sum(-1, keepdim=True)  # (..., T, 1)
    if not with_delta:
        delta = torch.zeros_like(delta)
    dw = (do @ v.mT - delta) / den  # (..., T, T)
    ds = 2 * s * dw / math.sqrt(q.shape[-1])
    dq = ds @ k
    dk = ds.mT @ q
    dv = shares.mT @ do  # δ does not occur in it
    return dq, dk, dv


def broken_without_delta(q, k, v, do):
    """Compare the two, name by name."""
    right = gradients(q, k, v, do)
    wrong = gradients(q, k, v, do, with_delta=False)
    broken = set()
    for name, with_it, without_it in zip("qkv", right, wrong, strict=True):
        if (with_it - without_it).norm() > 1e-6 * with_it.norm():
            broken.add(name)
    return broken
