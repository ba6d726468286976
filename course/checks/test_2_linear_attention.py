"""The checks of 2a, 2b and 2c; how they find an answer: course/conftest.py.

PYTEST_DONT_REWRITE: a message of an assertion is all that a student should read.
"""

import math

import torch

from course.answers import agree
from rebased import EPS, kernels, linear_attention

def random(*shape, seed=0):
    """Normal random numbers in float64, always the same."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_2a_shift_do_not_subtract(answer):
    x = random(500, 20).square().float()
    x[100] = 1e8
    exact = x.double().cumsum(0) - x.double()
    found = answer.ask("exclusive_prefix", x)
    agree(found, exact, "exclusive_prefix of random squares", tolerance=1e-5)
    assert not found[0].any(), "before the first row there is nothing: row 0 should be zeros"
    errors = ((found.double() - exact)[1:101] / exact[1:101]).abs()
    told = f"the row before the large number is off by {errors[-1].max():.1e} of its size"
    assert errors.max() < 1e-5, f"{told}: was something subtracted?"

    x = answer.ask("counterexample")
    good = isinstance(x, torch.Tensor) and x.dtype == torch.float32 and x.ndim == 1
    assert good and 2 <= len(x) <= 8, "counterexample should be a float32 tensor of 2 to 8 numbers"
    inside = 0.000999 < x.min() and x.max() <= 100_000
    assert inside, "each number should lie between 0.001 and 100,000"
    exact = (x.double().cumsum(0) - x.double())[1:]
    subtracted = (x.cumsum(0) - x)[1:].double()
    worst = ((subtracted - exact) / exact).abs().max().item()
    assert worst >= 0.5, f"on your numbers cumsum(x) - x is off by {worst:.1%} at most, not by 50 %"


def backward(q, k, v, do, constant_den):
    """dq, dk, dv of sum(o · do) by autograd; without δ is: as if den were a constant."""
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    weights = (q @ k.mT / math.sqrt(q.shape[-1])).square().tril()
    den = weights.sum(-1, keepdim=True) + EPS
    o = weights @ v / (den.detach() if constant_den else den)
    return torch.autograd.grad(o, (q, k, v), do)


def test_2b_drop_delta(answer):
    for shape, Dv in (((2, 3, 12, 4), 5), ((1, 1, 30, 8), 8)):
        q, k = random(2, *shape)
        v, do = random(2, *shape[:-1], Dv, seed=1)
        for with_delta in (True, False):
            found = answer.ask("gradients", q, k, v, do, with_delta)
            assert len(found) == 3, "gradients should return dq, dk and dv"
            expected = backward(q, k, v, do, constant_den=not with_delta)
            how = "with δ" if with_delta else "without δ"
            for name, one, other in zip(("dq", "dk", "dv"), found, expected, strict=True):
                agree(one, other, f"{how}: {name}", tolerance=1e-8)
        broken = set(answer.ask("broken_without_delta", q, k, v, do))
        told = f"broken_without_delta says {sorted(broken)}; compare your two sets of gradients"
        assert broken == {"q", "k"}, told
        do = do * 0  # nothing to propagate: nothing can be broken
        broken = set(answer.ask("broken_without_delta", q, k, v, do))
        assert not broken, f"with do = 0 all gradients are 0; nothing is broken, not {broken}"


def slow_decay(q, k, v, kernel, decay):
    """The definition, one meeting of query and key at a time."""
    sim = kernel.scores(q, k)
    o = torch.zeros_like(v)
    for i in range(q.shape[2]):
        num = torch.zeros_like(v[:, :, 0])
        den = EPS
        for j in range(i + 1):
            weight = sim[:, :, i, j, None] * decay ** (i - j)
            num = num + weight * v[:, :, j]
            den = den + weight
        o[:, :, i] = num / den
    return o


def test_2c_decay(answer):
    for kernel in (kernels.TaylorKernel(4), kernels.EluKernel(4)):
        q, k = random(2, 2, 3, 15, 4)
        v = random(2, 3, 15, 5, seed=1)
        for decay in (1.0, 0.8):
            expected = slow_decay(q, k, v, kernel, decay)
            found = answer.ask("decayed_quadratic", q, k, v, kernel, decay)
            agree(found, expected, f"decayed_quadratic with decay {decay}")
            found, state = answer.ask("decayed_recurrent", q, k, v, kernel, decay)
            agree(found, expected, f"decayed_recurrent with decay {decay}")
            first, state = answer.ask(
                "decayed_recurrent", q[:, :, :6], k[:, :, :6], v[:, :, :6], kernel, decay
            )
            second, state = answer.ask(
                "decayed_recurrent", q[:, :, 6:], k[:, :, 6:], v[:, :, 6:], kernel, decay, state
            )
            agree(torch.cat([first, second], 2), expected, "cut at 6 and continued: o")
        P = kernel.num_features
        sizes = (tuple(state.S.shape), tuple(state.z.shape))
        assert sizes == ((2, 3, P, 5), (2, 3, P)), f"S and z have the shapes {sizes}"
    plain = linear_attention.quadratic_attention(q, k, v, kernel)
    agree(answer.ask("decayed_quadratic", q, k, v, kernel, 1.0), plain, "without decay: o")
    for floor, right, decay, T in ((0.5, 13, 1.0, 1000), (0.5, 13, 0.99, 300), (1, 2, 0.5, 3)):
        filler = sum(floor * decay**distance for distance in range(T))
        expected = filler / (filler + right * decay**T)
        share = answer.ask("share_on_filler", floor, right, decay, T)
        told = f"share_on_filler({floor}, {right}, {decay}, {T}) should be {expected:.6f}"
        assert abs(share - expected) < 1e-9, f"{told}, yours is {share:.6f}"
