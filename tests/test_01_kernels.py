"""The specification of 01_kernels.py."""

import copy

import pytest
import torch

from rebased import kernels

NAMES = list(kernels.KERNELS)
CHECKS = [value for name, value in vars(kernels).items()
          if name.startswith("check_") and value.__module__ == kernels.__name__]
STEPS = {**kernels.ABLATION, "rebased": dict(norm=True, gamma=True, beta=True)}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_claims_of_the_file(check):
    check()


@pytest.mark.parametrize("dim", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("name", NAMES)
def test_features_are_the_scores(name, dim):
    """Also between a few queries and many keys, with leading dimensions."""
    torch.manual_seed(dim)
    kernel = kernels.KERNELS[name](dim)
    q, k = torch.randn(2, 3, 4, dim, dtype=torch.float64), torch.randn(2, 3, 9, dim, dtype=torch.float64)
    scores = kernel.scores(q, k)
    assert scores.shape == (2, 3, 4, 9)
    torch.testing.assert_close(kernel.features(q) @ kernel.features(k).mT, scores, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_scores_by_hand(name):
    """Each formula once more, written out without the code of the file."""
    torch.manual_seed(0)
    q, k = torch.randn(5, 16, dtype=torch.float64), torch.randn(7, 16, dtype=torch.float64)
    s = torch.einsum("id,jd->ij", q, k) / 4
    expected = {
        "based": 1 + s + s**2 / 2,
        "based_norm": 1 + s + s**2 / 2,
        "based_no_floor": 0.5 + s + s**2 / 2,
        "based_norm_no_floor": 0.5 + s + s**2 / 2,
        "elementwise": torch.einsum("id,jd->ij", q**2, k**2),
        "elementwise_floor": torch.einsum("id,jd->ij", q**2, k**2) + 0.5,
        "elu": torch.einsum("id,jd->ij", torch.where(q > 0, q + 1, q.exp()), torch.where(k > 0, k + 1, k.exp())),
    }.get(name, s**2 + 0.5 if name.endswith("_floor") else s**2)
    torch.testing.assert_close(kernels.KERNELS[name](16).scores(q, k), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_coefficients_are_those_of_the_scores(name):
    kernel = kernels.KERNELS[name](16)
    if name in ("elu", "elementwise", "elementwise_floor"):
        assert kernel.coefficients is None
        return
    expected = {
        "based": (1, 1, 0.5),
        "based_norm": (1, 1, 0.5),
        "based_no_floor": (0.5, 1, 0.5),
        "based_norm_no_floor": (0.5, 1, 0.5),
    }
    assert kernel.coefficients == expected.get(name, (0.5 if name.endswith("_floor") else 0, 0, 1))
    s = torch.linspace(-3, 3, 7, dtype=torch.float64)
    c0, c1, c2 = kernel.coefficients
    torch.testing.assert_close(kernels.weights_at(kernel.scores, s), c0 + c1 * s + c2 * s**2)


def test_no_cancellation_near_the_lowest_point():
    """At s = −1 + 1e-4 Based − ½ is 5e-9; float32 must not lose it in a sum of numbers near 1."""
    s = torch.tensor([-1 + 2.0**-13])
    weight = kernels.weights_at(kernels.TaylorKernel(16, floor=0.0).scores, s)
    torch.testing.assert_close(weight, torch.tensor([2.0**-27]), rtol=1e-3, atol=0)


@pytest.mark.parametrize("size", [3.0, 3e-3])
@pytest.mark.parametrize("name", [*STEPS, "elementwise"])
def test_prepare_by_hand(name, size):
    """γ·norm(x) + β over all heads jointly, with only the steps of the kernel; at a small size ε shows."""
    torch.manual_seed(0)
    kernel = kernels.KERNELS[name](4, heads=3)
    for parameter in kernel.parameters():
        torch.nn.init.normal_(parameter)
    steps = STEPS.get(name, STEPS["rebased"])
    x = torch.randn(2, 5, 12) * size + size
    q, k = kernel.prepare(x, x)
    for prepared, side in ((q, "q"), (k, "k")):
        y = x
        if steps["norm"]:
            y = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5)
        if steps["gamma"]:
            y = y * getattr(kernel, f"gamma_{side}")
        if steps["beta"]:
            y = y + getattr(kernel, f"beta_{side}")
        torch.testing.assert_close(prepared, y)


@pytest.mark.parametrize("scale", [1.0, 3e-3])
def test_the_norm_of_based_by_hand(scale):
    """One LayerNorm over all heads for q, another for k, each with its own weight and bias; at a small scale its
    ε of 1e-5 shows."""
    torch.manual_seed(0)
    kernel = kernels.KERNELS["based_norm"](4, heads=3)
    for parameter in kernel.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 5, 12) * scale
    for prepared, norm in zip(kernel.prepare(x, x), (kernel.norm_q, kernel.norm_k), strict=True):
        y = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5)
        torch.testing.assert_close(prepared, y * norm.weight + norm.bias)


def test_parameters_of_rebased():
    """Two LayerNorms of heads·dim: 768 parameters at 12 heads of 16, as in the paper's tables."""
    count = sum(p.numel() for p in kernels.ReBasedKernel(16, heads=12).parameters())
    assert count == 768
    assert sum(p.numel() for p in kernels.TaylorKernel(16, heads=12).parameters()) == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: kernels.TaylorKernel(0),
        lambda: kernels.ReBasedKernel(16, heads=0),
        lambda: kernels.ReBasedKernel(2.5),
        lambda: kernels.ReBasedKernel(16, floor=-1.0),
        lambda: kernels.TaylorKernel(16, floor=float("nan")),
        lambda: kernels.ReBasedKernel(16).features(torch.randn(3, 15)),
        lambda: kernels.ReBasedKernel(16).scores(torch.randn(3, 16), torch.randn(3, 8)),
        lambda: kernels.ReBasedKernel(16, heads=2).prepare(torch.randn(1, 3, 16), torch.randn(1, 3, 32)),
        lambda: kernels.TaylorKernel(16, heads=2).prepare(torch.randn(1, 3, 32), torch.randn(1, 3, 16)),
        lambda: kernels.exp_scores(torch.randn(3, 4), torch.randn(3, 5)),
        lambda: kernels.exp_scores(torch.randn(3, 0), torch.randn(3, 0)),
    ],
)
def test_impossible_sizes_are_named(make):
    with pytest.raises(ValueError) as error:
        make()
    assert str(error.value).count("\n") <= 1


@pytest.mark.parametrize("bad", [torch.ones(3, 16, dtype=torch.int64), "text", None])
def test_other_types_are_named(bad):
    with pytest.raises(TypeError, match="floating-point"):
        kernels.ReBasedKernel(16).features(bad)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("floor", [0.0, 0.25, 1.0])
def test_a_floor_may_be_set_at_any_time(name, floor):
    """Scores move by the difference, coefficients and features follow; parameters stay."""
    torch.manual_seed(0)
    kernel = kernels.KERNELS[name](16).double()
    q, k = torch.randn(2, 5, 16, dtype=torch.float64)
    before = kernel.scores(q, k) - kernel.floor
    kernel.floor = floor
    torch.testing.assert_close(kernel.scores(q, k), before + floor, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(kernel.features(q) @ kernel.features(k).mT, before + floor, rtol=1e-11, atol=1e-12)
    if kernel.coefficients is not None:
        c0, c1, c2 = kernel.coefficients
        s = torch.linspace(-3, 3, 7, dtype=torch.float64)
        torch.testing.assert_close(kernels.weights_at(kernel.scores, s), c0 + c1 * s + c2 * s**2)
    assert copy.deepcopy(kernel).floor == floor
    with pytest.raises(ValueError, match="floor must be 0 or more"):
        kernel.floor = -0.1
    assert kernel.floor == floor


def test_features_stand_in_the_order_that_is_promised():
    """Constant, linear, then the pairs a <= b row by row: fast forms and saved states rely on it."""
    x = torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64)
    root2 = 2**0.5
    pairs = torch.tensor([4, 6 * root2, 10 * root2, 9, 15 * root2, 25], dtype=torch.float64)
    found = kernels.polynomial_features(x, (4.0, 3**0.5, 3.0))
    torch.testing.assert_close(found, torch.cat([torch.tensor([2.0], dtype=torch.float64), x, pairs]))


def test_the_share_with_queries_anywhere_is_a_mean_over_places():
    """The closed form against the mean over 200,000 places."""
    places = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    irrelevant = places * 8192 / 2
    for W in (13.0, 308.0, 5000.0):
        assert abs(kernels.share_anywhere(8192, W) - (irrelevant / (irrelevant + W)).mean().item()) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_starts_as_its_norm_alone(name):
    """γ is 1 and β is 0 at first, for queries and for keys."""
    kernel = kernels.KERNELS[name](4, heads=3)
    q, k = torch.randn(2, 2, 5, 12)
    normalises = getattr(kernel, "norm", False) or name.startswith("based_norm")
    for prepared, x in zip(kernel.prepare(q, k), (q, k), strict=True):
        expected = torch.nn.functional.layer_norm(x, (12,)) if normalises else x
        torch.testing.assert_close(prepared, expected)


def test_scattered_keys_take_the_share_of_their_weights():
    """Based − ½ at s = −1 + 0.1·noise weighs (0.1·noise)²/2, and 25/2 at s = 4."""
    noise = torch.randn(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    others = ((0.1 * noise) ** 2 / 2).sum().item()
    found = kernels.irrelevant_share(kernels.TaylorKernel(16, floor=0.0).scores, 500, scatter=0.1)
    assert found == pytest.approx(others / (others + 12.5), rel=1e-6)


def test_the_shares_of_each_query_are_its_own():
    """Two queries of different length: each row sums to 1, and is the weights over their sum."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, dtype=torch.float64) * torch.tensor([[1.0], [5.0]]), torch.randn(3, 4, dtype=torch.float64)
    weights = (q @ k.T) ** 2
    expected = torch.stack([row / row.sum() for row in weights])
    torch.testing.assert_close(kernels.shares(kernels.ReBasedKernel(4), q, k), expected)
