"""Solution of 1a: one constant feature is a floor."""

import math

import torch

def features(x):
    """φ(x) = (1, x₁², √2 x₁x₂, x₂²): (..., 2) -> (..., 4)."""
    first, second = x.unbind(-1)
    parts = [torch.ones_like(first), first**2, math.sqrt(2) * first * second, second**2]
    return torch.stack(parts, dim=-1)


def half_way(floor, right):
    """n · floor = right. Of Based: 13 / ½ = 26 tokens, and half of the attention is gone."""
    if floor == 0:
        return math.inf
    return right / floor
