"""01 · Kernels: similarities that are inner products, and what their lowest value costs

Aim: write attention's similarity of query and key as an inner product of features, and see why
Based cannot ignore a token while ReBased can.

You will learn
  1. why one wants features: with them the sum over all keys can be formed before a query is known;
  2. why softmax's exp(s) has no finite features, and how a polynomial of s has them;
  3. where the floor of ½ in Based comes from, and what share of the attention it gives away;
  4. what ReBased changes: normalise, scale by γ, shift by β, square.

Equations, with s = q·k / √D
  a kernel   sim(q, k) = φ(q)·φ(k)                                                  [1, section 3]
  softmax    sim(q, k) = exp(s)                                                     [3, section 3.2]
  Based      sim(q, k) = 1 + s + s²/2 = (1 + s)²/2 + ½                              [1, section 3.2]
  ReBased    sim(q, k) = (q'·k' / √D)²                                              [1, section 4]
             with q' = γ_q·norm(q) + β_q and k' = γ_k·norm(k) + β_k

Letters
  B batch, H heads, T time (tokens), D size of a query or key in one head (16); s the scaled product
  of a query and a key; φ the features, P how many there are; γ (gamma) and β (beta): the learned
  scale and shift, for queries and for keys, vectors of length H·D; ε a small constant.

References
  [1] Aksenov et al., Linear Transformers with Learnable Kernel Functions are Better In-Context
      Models, ACL 2024, arXiv 2402.10644.
  [2] The code released with it: github.com/corl-team/rebased.
  [3] Katharopoulos et al., Transformers are RNNs, ICML 2020, arXiv 2006.16236.
  [4] Arora et al., Simple linear attention language models balance the recall-throughput tradeoff
      (Based), ICML 2024, arXiv 2402.18668.

Run: python 01_kernels.py      (5 seconds; draws runs/01_kernels.png)
"""

# %%
import math
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from rebased import EPS, lesson
from rebased.checks import check_last_dim, check_positive_integers

# %% [markdown]
# ## Why one wants features
#
# Attention gives token $i$ a mean of the values up to it, its own included. Each value counts by
# the similarity of its key to the query:
#
# $$o_i = \frac{\sum_{j \le i} \mathrm{sim}(q_i, k_j)\, v_j}
#              {\sum_{j \le i} \mathrm{sim}(q_i, k_j)}$$
#
# For softmax the similarity is $\exp(s)$ with $s = q \cdot k / \sqrt{D}$. Every query has to meet
# every key before it: T tokens make about T²/2 meetings, and to speak one more token all earlier
# keys must still be there.
#
# Now suppose that the similarity were an inner product of *features*, $\mathrm{sim}(q, k) =
# \varphi(q) \cdot \varphi(k)$. Then the query does not depend on $j$ and may leave the sum:
#
# $$o_i = \frac{\varphi(q_i)^\top \left(\sum_{j \le i} \varphi(k_j) v_j^\top\right)}
#              {\varphi(q_i)^\top \left(\sum_{j \le i} \varphi(k_j)\right)}$$
#
# Both brackets speak of keys and values alone. They can be formed before any query is known, and a
# new token adds one term to each. That is linear attention. All that is needed is a similarity with
# features.

# %%
def scaled_dot(q, k):
    """s = q·k / √D. q (..., N, D) and k (..., T, D) -> (..., N, T).

    Raises TypeError for tensors that are not floating-point, ValueError for unequal D.
    """
    check_last_dim(q, q.shape[-1], "q")
    check_last_dim(k, q.shape[-1], "k")
    return q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])


def exp_scores(q, k):
    """The similarity of softmax. q (..., N, D), k (..., T, D) -> (..., N, T). [3, section 3.2]"""
    return torch.exp(scaled_dot(q, k))

# %% [markdown]
# ## The smallest example: a square in two dimensions
#
# Write out $(q \cdot k)^2$ for vectors of two numbers:
#
# $$(q_1 k_1 + q_2 k_2)^2 = q_1^2 k_1^2 + 2\, q_1 q_2\, k_1 k_2 + q_2^2 k_2^2$$
#
# Every term is something of q times the same thing of k. So the three features $\varphi(x) =
# (x_1^2,\ \sqrt{2}\, x_1 x_2,\ x_2^2)$ do it: $\varphi(q) \cdot \varphi(k) = (q \cdot k)^2$.
#
# Four tokens, by hand. In the third column each key meets the query. In the last two columns the
# query is not used: the features of the keys, and the same times the value, are only added up.

# %%
def square_features(x):
    """φ(x) = (x₁², √2 x₁x₂, x₂²). (..., 2) -> (..., 3)."""
    first, second = x.unbind(-1)
    return torch.stack([first**2, math.sqrt(2) * first * second, second**2], dim=-1)


def show_four_tokens():
    """The same output twice: the query meets four keys, or two sums that were formed without it."""
    keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, -1.0]])
    values = torch.tensor([10.0, 20.0, 30.0, 40.0])
    query = torch.tensor([1.0, 2.0])

    weights = (keys @ query).square()  # (4,), without the 1/√D: whole numbers
    phi = square_features(keys)  # (4, 3)
    S = (phi * values.unsqueeze(1)).sum(0)  # (3,): the sum of φ(k) v
    z = phi.sum(0)  # (3,): the sum of φ(k)

    print("query (1, 2)\n")
    print("   key     value  (q·k)²           φ(k)                φ(k)·v")
    for key, value, weight, features in zip(keys, values, weights, phi, strict=True):
        left = f"({key[0]:2.0f}, {key[1]:2.0f}){value:7.0f}{weight:8.0f}"
        print(f"{left}    {triple(features)}    {triple(features * value)}")
    print(f"sum{'':20}{weights.sum():4.0f}    {triple(z)}    {triple(S)}\n")
    num = weights @ values
    den = weights.sum()
    print(f"four meetings: {num:.0f} / {den:.0f} = {num / den:.2f}")
    phi_query = square_features(query)  # (3,)
    num = phi_query @ S
    den = phi_query @ z
    print(f"two sums:      φ(q) = {triple(phi_query)}: {num:.0f} / {den:.0f} = {num / den:.2f}\n")


def triple(x):
    """Three numbers in aligned columns."""
    return f"({x[0]:5.1f},{x[1]:6.1f},{x[2]:5.1f})"


if __name__ == "__main__":
    show_four_tokens()

# %% [markdown]
# ## Features of any polynomial of degree two
#
# In D dimensions $(q \cdot k)^2 = \sum_a \sum_b q_a q_b\, k_a k_b$ is an inner product of all
# products $x_a x_b$. The pairs (a, b) and (b, a) give the same number; one of them, times √2, does.
# That leaves D(D+1)/2 pairs with a ≤ b: 136 at D = 16, instead of 256. (A pair with a = b stands in
# the sum once. It gets a factor of 1.000002 in float32; a later section, "The price of a weight
# that can be 0", says what for. Until then read `a_little_over_one` as 1.)
#
# A constant term is a feature that is the same for every vector, and a linear term is D features,
# the vector itself. So $c_0 + c_1 s + c_2 s^2$ has 1 + D + D(D+1)/2 features, 153 at D = 16.

# %%
def a_little_over_one(x):
    """1 and D units in its last place, for x (..., D): "The price of a weight that can be 0"."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return 1 + x.shape[-1] * torch.finfo(dtype).eps


def symmetric_products(x):
    """f(x) with f(q)·f(k) = (q·k)², but for a little. (..., D) -> (..., D(D+1)/2)."""
    D = x.shape[-1]
    a, b = torch.triu_indices(D, D, device=x.device)  # all pairs a <= b
    once = x.new_full((), a_little_over_one(x))
    how_often = torch.where(a == b, once, 2.0)  # a pair stands twice in the double sum
    return x[..., a] * x[..., b] * how_often.sqrt()


def polynomial_features(x, coefficients):
    """φ(x) with φ(q)·φ(k) = c0 + c1·s + c2·s²; a term whose c is 0 takes no room.

    (..., D) -> (..., P): the constant, then the linear features, then the pairs.
    """
    c0, c1, c2 = coefficients
    D = x.shape[-1]
    parts = []
    if c0:
        constant = math.sqrt(c0 * a_little_over_one(x))
        parts.append(torch.full_like(x[..., :1], constant))  # √c0 · √c0 = c0
    if c1:
        parts.append(x * math.sqrt(c1 / math.sqrt(D)))  # c1 · q·k / √D = c1·s
    if c2:
        parts.append(symmetric_products(x) * math.sqrt(c2 / D))  # c2 · (q·k)² / D = c2·s²
    return torch.cat(parts, dim=-1)

# %% [markdown]
# And exp(s)? Its Taylor series has a term of every degree, so it needs infinitely many features.
# One can see that: a table of the similarities of N queries and N keys has at most as high a rank
# as there are features. That of exp(s) has rank N, however large we make N.

# %%
def show_ranks():
    """The rank of N × N similarities at D = 16, in float64."""
    torch.manual_seed(0)
    print("rank of N × N similarities    N = 100    N = 200    N = 400    N = 800")
    q, k = torch.randn(2, 800, 16, dtype=torch.float64)
    s = scaled_dot(q, k)
    tables = {"s²": s**2, "1 + s + s²/2": 1 + s + s**2 / 2, "exp(s)": torch.exp(s)}
    for name, table in tables.items():
        ranks = [torch.linalg.matrix_rank(table[:N, :N]).item() for N in (100, 200, 400, 800)]
        print(f"{name:26}" + "".join(f"{rank:11}" for rank in ranks))
    print()


if __name__ == "__main__":
    show_ranks()

# %% [markdown]
# ## A kernel as a module
#
# From here on a kernel is a small module with three methods.
#
# - `prepare` acts on the projected queries and keys while the heads still lie side by side, (B, T,
#   H·D). What is learned lives there. Where nothing is learned it returns them as they are.
# - `scores` is the similarity, as the formula has it; `features` is φ. Both act on one head, (...,
#   T, D), and they are two ways to one number: `features(q) @ features(k).T == scores(q, k)`.
#
# `coefficients` are (c0, c1, c2) where the similarity is a polynomial of s: the fast forms of the
# next lesson need nothing else. A kernel that is no polynomial leaves them None and has only
# features.

# %%
class Kernel(nn.Module):
    """What all kernels share. dim is D, the size of one head; `num_features` is P.

    floor: a constant that is added to every similarity. It may be set at any time, also on a model
    that is trained. It is no parameter: a `state_dict` does not hold it, so set it again after
    loading. And a state (02) belongs to the floor that it was made with. Raises ValueError for
    impossible sizes and for a floor below 0.

    A subclass defines `coefficients`, or `features` with `add_floor` at their end.
    """

    coefficients = None

    def __init__(self, dim, heads=1, floor=0.0):
        super().__init__()
        check_positive_integers(dim=dim, heads=heads)
        self.dim = dim
        self.heads = heads
        self.floor = floor

    @property
    def floor(self):
        return self._floor

    @floor.setter
    def floor(self, value):
        if not 0 <= value < math.inf:
            raise ValueError(f"floor must be 0 or more, for it is a weight; got {value!r}")
        self._floor = float(value)

    def prepare(self, q, k):
        """q, k (B, T, H·D) -> q', k' of the same shape."""
        check_last_dim(q, self.heads * self.dim, "q")
        check_last_dim(k, self.heads * self.dim, "k")
        return q, k

    def scores(self, q, k):
        """q (..., N, D), k (..., T, D) -> (..., N, T), the similarities."""
        return self.features(q) @ self.features(k).transpose(-2, -1)

    def features(self, x):
        """φ(x): (..., D) -> (..., P)."""
        check_last_dim(x, self.dim, "x")
        return polynomial_features(x, self.coefficients)

    def add_floor(self, features):
        """The features with a constant one more, √floor, if there is a floor."""
        if not self.floor:
            return features
        constant = torch.full_like(features[..., :1], math.sqrt(self.floor))
        return torch.cat([constant, features], dim=-1)

    @property
    def num_features(self):
        return self.features(torch.ones(1, self.dim)).shape[-1]

# %% [markdown]
# ## Based: the first three terms of exp(s)
#
# Based [4] cuts the Taylor series of exp(s) after the square. Completing the square shows what that
# does:
#
# $$1 + s + \frac{s^2}{2} = \frac{(1 + s)^2}{2} + \frac{1}{2}$$
#
# Wherever a key lies, its weight is at least ½. We call that constant the *floor* and make it an
# argument: with floor = 0 the parabola stays and the ½ goes, and nothing else differs.

# %%
class TaylorKernel(Kernel):
    """Based: (1 + s)²/2 + floor, with a floor of ½. P = 153 at D = 16. [1, section 3.2; 4]

    norm: LayerNorm over all H·D numbers before the heads are split, with a scale and a shift, as
    in ReBased; Based has none.
    """

    def __init__(self, dim, heads=1, floor=0.5, norm=False):
        super().__init__(dim, heads, floor)
        self.norm_q = nn.LayerNorm(heads * dim) if norm else nn.Identity()
        self.norm_k = nn.LayerNorm(heads * dim) if norm else nn.Identity()

    @property
    def coefficients(self):
        return (0.5 + self.floor, 1.0, 0.5)

    def prepare(self, q, k):
        q, k = super().prepare(q, k)
        return self.norm_q(q), self.norm_k(k)

    def scores(self, q, k):
        # The square, not the sum of three terms: near s = −1 those would cancel.
        return (1 + scaled_dot(q, k)).square() / 2 + self.floor

# %% [markdown]
# ## ReBased: a square, placed by what is learned
#
# ReBased keeps only the square: a key that is orthogonal to the query weighs nothing. And it lets
# training place the parabola. Query and key are normalised, scaled by γ and shifted by β first:
#
# $$q' = \gamma_q \odot \mathrm{norm}(q) + \beta_q \qquad
#   k' = \gamma_k \odot \mathrm{norm}(k) + \beta_k \qquad
#   \mathrm{sim} = \left(\frac{q' \cdot k'}{\sqrt{D}}\right)^2$$
#
# The norm is that of a LayerNorm, $(x - \mathrm{mean}) / \sqrt{\mathrm{variance} + 10^{-5}}$, where
# mean and variance are taken over all H·D numbers of a token: the heads are not normalised one by
# one [2]. Each of the three steps can be left out: that is the paper's ablation [1, Table 1].

# %%
class ReBasedKernel(Kernel):
    """ReBased: s² + floor of prepared q', k'. P = 136 at D = 16. [1, section 4 and Table 1; 2]

    norm, gamma, beta: which of the three steps are taken. A floor above 0 puts back what ReBased
    took away.
    """

    def __init__(self, dim, heads=1, norm=True, gamma=True, beta=True, floor=0.0):
        super().__init__(dim, heads, floor)
        self.norm = norm
        self.gamma_q = nn.Parameter(torch.ones(heads * dim)) if gamma else None
        self.gamma_k = nn.Parameter(torch.ones(heads * dim)) if gamma else None
        self.beta_q = nn.Parameter(torch.zeros(heads * dim)) if beta else None
        self.beta_k = nn.Parameter(torch.zeros(heads * dim)) if beta else None

    @property
    def coefficients(self):
        return (self.floor, 0.0, 1.0)

    def prepare(self, q, k):
        q, k = super().prepare(q, k)
        return self.place(q, self.gamma_q, self.beta_q), self.place(k, self.gamma_k, self.beta_k)

    def place(self, x, gamma, beta):
        """γ · norm(x) + β, with only the steps that this kernel takes."""
        if self.norm:
            return F.layer_norm(x, x.shape[-1:], gamma, beta, eps=1e-5)  # over all H·D
        if gamma is not None:
            x = x * gamma
        if beta is not None:
            x = x + beta
        return x

    def scores(self, q, k):
        return scaled_dot(q, k).square() + self.floor

# %% [markdown]
# ## Two relatives
#
# The *text* of the paper squares each number of the vector, φ(x) = x², and so has D features [1,
# section 4]. The released code squares the whole product [2], and so do we by default; the
# element-wise kernel is here to be compared. The first linear transformer took elu(x) + 1, D
# positive features [3]. Neither is a polynomial of s.

# %%
class ElementwiseKernel(ReBasedKernel):
    """φ(x) = x², number by number: Σ q'_i² k'_i² + floor. P = D (+ 1 with floor). [1, section 4]"""

    coefficients = None

    def scores(self, q, k):
        return Kernel.scores(self, q, k)  # the product of the features, not the square of ReBased

    def features(self, x):
        check_last_dim(x, self.dim, "x")
        return self.add_floor(x.square())


class EluKernel(Kernel):
    """φ(x) = elu(x) + 1. P = D (+ 1 with floor). [3, section 3.2.1]"""

    def features(self, x):
        check_last_dim(x, self.dim, "x")
        return self.add_floor(F.elu(x) + 1)

# %% [markdown]
# Every kernel has a name. A new one is a class and one line here, and all forms, models and tests
# know it.

# %%
KERNELS = {
    "based": TaylorKernel,
    "based_no_floor": partial(TaylorKernel, floor=0.0),
    "based_norm": partial(TaylorKernel, norm=True),
    "based_norm_no_floor": partial(TaylorKernel, floor=0.0, norm=True),
    "rebased": ReBasedKernel,
    "rebased_floor": partial(ReBasedKernel, floor=0.5),
    "elementwise": ElementwiseKernel,
    "elementwise_floor": partial(ElementwiseKernel, floor=0.5),
    "elu": EluKernel,
}
ABLATION = {  # the rows of Table 1 of [1]: which steps of γ · norm(x) + β are taken
    "x2": dict(norm=False, gamma=False, beta=False),
    "norm": dict(norm=True, gamma=False, beta=False),
    "gamma": dict(norm=False, gamma=True, beta=False),
    "gamma_beta": dict(norm=False, gamma=True, beta=True),
}
for name, steps in ABLATION.items():
    KERNELS[name] = partial(ReBasedKernel, **steps)
    KERNELS[name + "_floor"] = partial(ReBasedKernel, **steps, floor=0.5)

# %% [markdown]
# A claim is a function that asserts it; the tests call the same functions. The first one: for every
# kernel, features and scores are the same number. In float64 only a wrong formula could differ.

# %%
def check_features_equal_scores():
    """features(q)·features(k) == scores(q, k) within 1e-12; 136 and 153 features at D = 16."""
    torch.manual_seed(0)
    for dim in (1, 2, 7, 16):
        q, k = torch.randn(2, 3, 5, dim, dtype=torch.float64)
        for name, make in KERNELS.items():
            kernel = make(dim)
            scores = kernel.scores(q, k)
            inner = kernel.features(q) @ kernel.features(k).mT
            error = (scores - inner).abs().max() / scores.abs().max()
            assert error < 1e-12, f"{name} at D = {dim}: features and scores differ by {error:.1e}"
    assert ReBasedKernel(16).num_features == 136
    assert TaylorKernel(16).num_features == 153


if __name__ == "__main__":
    lesson.check(check_features_equal_scores)

# %% [markdown]
# ## Where each kernel is lowest
#
# Walk a key along the direction of the query, and s takes every value. With $q = \sqrt{D}\, e_1$
# and $k = s\, e_1$ we read each similarity as a function of s alone, for s from −4 to 4.

# %%
REACH = 4
GRID = torch.arange(-REACH * 1000, REACH * 1000 + 1, dtype=torch.float64) / 1000


def weights_at(scores, s, dim=16):
    """The similarity `scores(q, k)` of keys that are placed so that q·k/√D = s. s (N,) -> (N,)."""
    q = s.new_zeros(1, dim)
    q[0, 0] = math.sqrt(dim)
    k = s.new_zeros(len(s), dim)
    k[:, 0] = s
    return scores(q, k)[0]


def lowest_point(scores):
    """(s, weight) where the similarity weighs least within ±REACH."""
    weights = weights_at(scores, GRID)
    return GRID[weights.argmin()].item(), weights.min().item()


def check_floors():
    """Based's lowest weight is ½, at s = −1; without its floor 0; ReBased's is 0, at s = 0."""
    assert lowest_point(TaylorKernel(16).scores) == (-1.0, 0.5)
    assert lowest_point(TaylorKernel(16, floor=0.0).scores) == (-1.0, 0.0)
    assert lowest_point(ReBasedKernel(16).scores) == (0.0, 0.0)


if __name__ == "__main__":
    lesson.check(check_floors)

# %% [markdown]
# The two parabolas are close relatives. Append a constant coordinate to query and key, $\tilde q =
# [q / D^{1/4},\ 1]$, and Based is the squared kernel on those vectors plus its floor:
#
# $$1 + s + \frac{s^2}{2} = \frac{1}{2} (\tilde q \cdot \tilde k)^2 + \frac{1}{2}$$
#
# ReBased can make such a coordinate itself where it needs one: γ = 0 and β ≠ 0 in one place.
# Nothing gives it the ½.

# %%
def check_based_is_a_square_plus_half():
    """1 + s + s²/2 == ½ (q~·k~)² + ½ on random vectors."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 9, 16, dtype=torch.float64)
    q_with_one = F.pad(q / 16**0.25, (0, 1), value=1.0)  # (9, 17)
    k_with_one = F.pad(k / 16**0.25, (0, 1), value=1.0)
    square = (q_with_one @ k_with_one.mT).square()
    assert torch.allclose(TaylorKernel(16).scores(q, k), square / 2 + 0.5, rtol=1e-12)


if __name__ == "__main__":
    lesson.check(check_based_is_a_square_plus_half)

# %% [markdown]
# ## How γ and β move the parabola
#
# In one dimension and for q' = 1, a key weighs (γk + β)²: zero at k = −β/γ, and steeper as γ grows.
# In D dimensions the zeros are a plane, all k' at a right angle to q', and β shifts it. In its own
# s ReBased is always lowest at 0. But that s is taken *after* γ and β: in terms of what the model
# projects, the zero lies where training puts it.

# %%
def parabola(k, gamma, beta):
    """ReBased's weight of the scalar keys k (N,) for q' = 1, by the class above."""
    kernel = ReBasedKernel(1, norm=False).to(k.dtype)
    with torch.no_grad():
        kernel.gamma_k.fill_(gamma)
        kernel.beta_k.fill_(beta)
        q, keys = kernel.prepare(k.new_ones(1, 1, 1), k.reshape(1, -1, 1))
        return kernel.scores(q, keys)[0, 0]


def check_beta_moves_the_zero():
    """The weight is 0 at −β/γ, and (γd)² at a distance d from there."""
    distance = torch.tensor([0.0, 0.3, -2.0], dtype=torch.float64)
    for gamma, beta in ((1.0, 0.0), (1.0, 1.5), (2.0, -1.0), (0.5, 0.5)):
        weights = parabola(distance - beta / gamma, gamma, beta)
        assert torch.allclose(weights, (gamma * distance) ** 2, atol=1e-14)


if __name__ == "__main__":
    lesson.check(check_beta_moves_the_zero)

# %% [markdown]
# ## What a floor costs in a long context
#
# One key matters, and T others do not. Let training be as good as it can be while s stays within
# ±4: the right key lies at s = 4, and the others exactly where the kernel weighs least, w_low. They
# take this share of the attention:
#
# $$\mathrm{share} = \frac{T\, w_{low}}{T\, w_{low} + w_{right}}$$
#
# No model hits the lowest point exactly. So the last column scatters the keys around it, with a
# standard deviation of 0.05 in s (an arbitrary small number).

# %%
def irrelevant_share(scores, T, scatter=0.0):
    """The share of the attention on T irrelevant keys, beside one right key at s = REACH."""
    noise = torch.randn(T, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    place, _ = lowest_point(scores)
    irrelevant = weights_at(scores, place + scatter * noise).sum().item()
    right = weights_at(scores, GRID[-1:]).item()
    return irrelevant / (irrelevant + right)


SHOWN = {
    "softmax exp(s)": exp_scores,
    "Based": TaylorKernel(16).scores,
    "Based − ½": TaylorKernel(16, floor=0.0).scores,
    "ReBased": ReBasedKernel(16).scores,
    "ReBased + ½": ReBasedKernel(16, floor=0.5).scores,
}


def show_what_a_floor_costs():
    """One row for each similarity: weights where it is lowest and at s = 4, and the share lost."""
    print("                   lowest          at    share of attention on the T others")
    print("similarity         weight   s =  s = 4    T=128    1,024    8,192    8,192, scattered")
    for name, scores in SHOWN.items():
        place, weight = lowest_point(scores)
        right = weights_at(scores, GRID[-1:]).item()
        cells = f"{name:17}{weight:8.3f}{place:6.0f}{right:7.1f}"
        for T in (128, 1024, 8192):
            cells += f"{irrelevant_share(scores, T):9.3f}"
        print(cells + f"{irrelevant_share(scores, 8192, scatter=0.05):9.3f}")
    print()


def check_a_floor_grows_with_context():
    """Based loses T/2 against 13; ReBased, with every key exactly at its zero, nothing."""
    for T in (128, 1024, 8192):
        assert abs(irrelevant_share(SHOWN["Based"], T) - (T / 2) / (T / 2 + 13)) < 1e-9
        assert irrelevant_share(SHOWN["ReBased"], T) == 0.0


if __name__ == "__main__":
    show_what_a_floor_costs()
    lesson.check(check_a_floor_grows_with_context)

# %% [markdown]
# At 8,192 tokens Based gives nearly all of its attention to what does not matter. Without the floor
# the loss is what the scatter makes it, and training can shrink that. With the floor only a larger
# weight of the right key helps, and the floor's share still grows with T. (Softmax has no floor,
# and loses here only because s stops at 4: each further step of s multiplies its weight by e, while
# a polynomial of degree two gains less and less. A trained softmax uses that; in 04 it loses
# nothing.)
#
# **Theory beside measurement.** The table says .997. Five Based models that are trained in lesson
# 04 give irrelevant tokens .81 of their attention at 8,192 tokens, and .067 at the 128 tokens they
# were trained with (results/README.md). Two things differ. The query of 04 may stand anywhere: at a
# fraction u of the context it has u·T irrelevant tokens before it, not T. And nothing holds s
# within ±4: training raises the right weight until it is enough, at the length it trains at. Let
# all relevant tokens together weigh W and each irrelevant one ½. Then the mean share is
#
# $$\int_0^1 \frac{\frac{1}{2} u T}{\frac{1}{2} u T + W}\, du
#   = 1 - x \ln\left(1 + \frac{1}{x}\right), \qquad x = \frac{2W}{T}$$
#
# Which W belongs to .81? One that is 22 times the 13 above, and still far too small: it does not
# grow with the context, and the floor's share does.

# %%
def share_anywhere(T, W, floor=0.5):
    """The mean share of T irrelevant tokens of weight `floor`, the query anywhere among them."""
    x = W / (floor * T)
    return 1 - x * math.log(1 + 1 / x)


def show_the_weight_behind_the_measurement(measured=0.81, T=8192):
    """Find W by trying: the smallest whole number whose share is not above the measured one."""
    W = 1
    while share_anywhere(T, W) > measured:
        W += 1
    print(f"A share of {measured:.2f} at T = {T:,} belongs to W = {W}. With that W the share is")
    near = share_anywhere(128, W)
    far = share_anywhere(131_072, W)
    print(f"{near:.2f} at T = 128 (measured: .067) and {far:.2f} at T = 131,072.\n")


if __name__ == "__main__":
    show_the_weight_behind_the_measurement()

# %% [markdown]
# **The law behind it.** Let n irrelevant tokens stand before a query, and let each of them weigh a
# times as much as all the relevant ones together. Their share is
#
# $$\frac{n\,a}{1 + n\,a} \qquad a = \frac{floor}{W}$$
#
# The integral above is its mean over n from 0 to T. So a share that is measured at one length tells
# a, and a tells the share at every other length. And only the *ratio* of floor and W counts.
# Multiply every query by c: the weights s² become c² times as large, all of them, and in the share
# c² cancels. (Those of (1 + s)² do nearly so where s is large.) A square without a floor is
# *scale-free*. A floor is not multiplied, so the same c makes it c² times smaller, relative to W.
# That is the way out that training has: larger queries and keys. It takes it as far as its own
# length needs, and no further.
#
# And a weight that *can* be 0 promises less than it seems. No training puts every irrelevant key
# exactly on the zero. Of the queries in a million tokens a ReBased trained at 128 answers .14
# (`python -m experiments.floor`): far more than Based, .01, and far from all.

# %%
def shares(kernel, q, k):
    """Each key's share of the attention of q (N, D) on k (T, D): (N, T)."""
    weights = kernel.scores(q, k)
    return weights / weights.sum(-1, keepdim=True)


def check_only_floor_over_scale_counts():
    """Queries 3 times as large change nothing without a floor, and divide a floor by 9."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 50, 16, dtype=torch.float64)
    square = ReBasedKernel(16)
    assert torch.allclose(shares(square, 3 * q, k), shares(square, q, k), rtol=1e-10)
    floored = ReBasedKernel(16, floor=0.9)
    lower = ReBasedKernel(16, floor=0.1)
    assert torch.allclose(shares(floored, 3 * q, k), shares(lower, q, k), rtol=1e-10)


if __name__ == "__main__":
    lesson.check(check_only_floor_over_scale_counts)

# %% [markdown]
# ## The price of a weight that can be 0
#
# Attention divides by the sum of its weights, plus a small ε against 0/0. At the first token that
# sum is a single weight w, and without a floor it can almost vanish. Then ε pulls the output
# towards 0, where it should be the first value itself: v₀ · w / (w + ε). So ε must be small beside
# the smallest weights that occur. We take ε = 1e-12, in one place for all forms (`EPS` of
# `rebased/__init__.py`). (At the other end float32 itself ends, at 3e38: where the weights of a
# query add up to more, its output is 0 or no number.)
#
# There is a second price. The square of a tiny s is a tiny number, known to seven digits in
# float32. But φ(q)·φ(k) is a *sum* of products with either sign, and where the sum is tiny they
# cancel. What rounding leaves behind does not shrink with the result: it is a part, some 1e-7, of
# (Σ|q_a k_a|)²/D. So a weight that should be almost 0 can come out below 0, weights of either sign
# add up to nearly nothing, and a quotient by that is no mean of values any more. (Without the
# remedy below: outputs 10⁶ times as large as any value, where q·k is 1e-4 of |q|·|k| for all keys.)
#
# The remedy costs nothing. Among the features are the squares x_a², and Σ q_a² k_a², what they
# give, is never below 0. By Cauchy and Schwarz (Σ|q_a k_a|)² ≤ D · Σ q_a² k_a². So make the squares
# (and the constant, another square) larger by D units in the last place, 2e-6 at D = 16. That is
# more than rounding takes away: weights stay above 0, and outputs within the values (to 20 %).
# Ordinary weights change in their sixth digit. What remains: where *all* weights of a query are
# below some 1e-6 of |q|²|k|²/D, the mean is taken with other weights than it should be. With keys
# at a right angle up to 1e-2 the forms of 02 are off by .2 to 2 %, up to 1e-3 by 15 to 50 %, up to
# 1e-4 by half and more. Only the quadratic one, which has no sums of φ, answers such a query right.
# And a sum that is carried on token by token collects roundings of its own: there this holds for
# ReBased up to some 2,000 tokens, and for Based without its floor up to some 250. (The test
# `test_rows_whose_weights_are_all_nearly_0` measures such rows in every form.)

# %%
def check_features_give_no_weight_below_zero():
    """float32; queries and keys at right angles up to 1e-3, 1e-4, 1e-5, seen in turned axes."""
    torch.manual_seed(0)
    turn = torch.linalg.qr(torch.randn(16, 16)).Q
    for angle in (1e-3, 1e-4, 1e-5):
        q, k = torch.randn(2, 1000, 16)
        q[:, 8:] *= angle
        k[:, :8] *= angle
        q = q @ turn
        k = k @ turn
        for kernel in (ReBasedKernel(16), TaylorKernel(16, floor=0.0)):
            lowest = (kernel.features(q) @ kernel.features(k).T).min()
            assert lowest >= 0, f"{type(kernel).__name__}: a weight of {lowest:.1e}"


if __name__ == "__main__":
    lesson.check(check_features_give_no_weight_below_zero)

# %%
def show_epsilon():
    """The worst of 10,000 random first rows of ReBased, by ε: the output should be v₀."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 10_000, 1, 16)
    weights = ReBasedKernel(16).scores(q, k).flatten()
    smallest = weights.min()
    print(f"10,000 first rows: smallest weight {smallest:.0e}, median {weights.median():.2f}")
    for epsilon in (1e-5, 1e-6, EPS):
        part = smallest / (smallest + epsilon)
        print(f"  ε = {epsilon:.0e}: the worst first output is {part:.6f} · v₀")
    print()


if __name__ == "__main__":
    show_epsilon()

# %% [markdown]
# ## The picture
#
# Left: Based never falls below ½. Middle: what that costs as the context grows. Right: γ and β
# place the zero of ReBased.

# %%
STYLES = {
    "softmax exp(s)": ":",
    "Based": "--",
    "Based − ½": "-",
    "ReBased": "-",
    "ReBased + ½": "--",
}


def draw():
    """Three panels; lines with a floor are dashed."""
    figure = lesson.new_figure(width=13, height=4)
    if figure is None:
        return
    left, middle, right = figure.subplots(1, 3)
    lengths = [2**n for n in range(4, 17)]
    for name, scores in SHOWN.items():
        left.plot(GRID, weights_at(scores, GRID), STYLES[name], label=name)
        shares = [irrelevant_share(scores, T, scatter=0.05) for T in lengths]
        middle.plot(lengths, shares, STYLES[name], label=name)
    keys = GRID[1000:-1000]
    for gamma, beta in ((1.0, 0.0), (1.0, 1.5), (2.0, -1.0)):
        right.plot(keys, parabola(keys, gamma, beta), label=f"γ = {gamma:g}, β = {beta:g}")
    left.set(title="similarity", xlabel="s = q·k/√D", ylim=(-0.3, 8))
    middle.set(title="share on T irrelevant keys, scattered", xlabel="T", xscale="log")
    right.set(title="ReBased's weight of a key, q' = 1", xlabel="k, one dimension", ylim=(-0.3, 8))
    for axis in (left, middle, right):
        axis.legend(frameon=False, fontsize=9)
    lesson.save_figure(
        figure,
        "runs/01_kernels.png",
        "Similarities against s: Based stays above one half, ReBased reaches 0. The share of "
        "attention on irrelevant tokens grows towards 1 with the context where there is a floor. "
        "Beta moves the zero of ReBased's parabola.",
    )


if __name__ == "__main__":
    draw()
    lesson.finish()
