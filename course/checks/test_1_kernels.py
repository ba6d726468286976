"""The checks of 1a, 1b and 1c; how they find an answer: course/conftest.py.

PYTEST_DONT_REWRITE: a message of an assertion is all that a student should read.
"""

import math

import torch

from course.answers import agree
from rebased import linear_attention

def vectors(*shape, seed=0):
    """Normal random numbers in float64, always the same."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_1a_floor_of_one(answer):
    q, k = vectors(2, 7, 2)
    phi_q = answer.ask("features", q)
    phi_k = answer.ask("features", k)
    agree(phi_q @ phi_k.T, 1 + (q @ k.T) ** 2, "φ(q)·φ(k), which should be 1 + (q·k)²,")
    assert phi_q.shape == (7, 4), f"four features are enough, you have {phi_q.shape[-1]}"
    for floor, right in ((1.0, 17.0), (0.5, 13.0), (0.01, 3.0)):
        n = answer.ask("half_way", floor, right)
        share = n * floor / (n * floor + right)
        told = f"half_way({floor}, {right}) = {n}: so many tokens take {share:.3f}, not half"
        assert abs(share - 0.5) < 1e-9, told
    without = answer.ask("half_way", 0.0, 1.0)
    assert without == math.inf, f"without a floor no number is enough: math.inf, not {without}"


def test_1b_squared_cosine(answer):
    kernel = answer.get("SquaredCosineKernel")(8)
    q, k = vectors(2, 6, 8)
    phi = kernel.features(q)
    assert phi is not None, "SquaredCosineKernel.features returns None: its body is yours to write"
    cosine = torch.nn.functional.cosine_similarity(q[:, None], k[None], dim=-1)
    agree(phi @ kernel.features(k).T, cosine**2, "φ(q)·φ(k), which should be cos²(q, k),")
    agree(kernel.scores(q, k), cosine**2, "scores(q, k)")
    assert kernel.num_features == 36, f"36 features at D = 8, you have {kernel.num_features}"
    assert torch.isfinite(kernel.features(torch.zeros(8))).all(), "zeros should have features too"
    kernel.floor = 0.5
    agree(kernel.scores(q, k), cosine**2 + 0.5, "with floor = 0.5, scores(q, k)")
    q, k, v = vectors(3, 1, 2, 20, 8)
    expected = linear_attention.quadratic_attention(q, k, v, kernel)
    agree(linear_attention.attention(q, k, v, kernel), expected, "attention with your kernel")
    for T, D in ((1000, 16), (4000, 4)):
        directions = torch.nn.functional.normalize(vectors(200_000, D), dim=-1)
        others = T * (directions[:, 0] ** 2).mean().item()
        share = answer.ask("random_share", T, D)
        measured = others / (others + 1)
        told = f"random_share({T}, {D}) = {share:.4f}"
        told += f"; 200,000 random directions give {measured:.4f}"
        assert abs((1 - share) / (1 - measured) - 1) < 0.05, told


def test_1c_quartic(answer):
    make = answer.get("QuarticKernel")
    q, k = vectors(2, 6, 4)
    phi = make(4).features(q)
    assert phi is not None, "QuarticKernel.features returns None: its body is yours to write"
    s = q @ k.T / 2  # √D = 2
    agree(phi @ make(4).features(k).T, s**4, "φ(q)·φ(k), which should be s⁴,")
    assert make(4).scores(q, k) is not None, "scores returns None: its body is yours to write"
    agree(make(4).scores(q, k), s**4, "scores(q, k)")
    agree(make(4, floor=0.25).scores(q, k), s**4 + 0.25, "with floor = 0.25, scores(q, k)")
    told = f"right, but with {phi.shape[-1]} features at D = 4 where 35 do: see the second way"
    assert phi.shape[-1] == 35, told
    rows = answer.ask("compare", 8192)
    assert set(rows) == {"Based", "ReBased", "quartic"}, f"compare has the rows {list(rows)}"
    x = 0.05 * vectors(8192)  # irrelevant keys beside the zero, and one right key at s = 4
    weights = {"Based": (x**2 / 2 + 0.5, 13), "ReBased": (x**2, 16), "quartic": (x**4, 256)}
    for name, num_features in (("Based", 153), ("ReBased", 136), ("quartic", 3876)):
        P, share = rows[name]
        assert P == num_features, f"compare: {name} has {num_features} features at D = 16, not {P}"
        others, right = weights[name]
        expected = (others.sum() / (others.sum() + right)).item()
        told = f"compare: the share of {name} should be near {expected:.4f}, yours is {share:.4f}"
        assert 0.9 < share / expected < 1.1, told
