"""01 · Kernels: which similarities are inner products, and what their lowest value costs

Aim: write attention's similarity of query and key as an inner product of features, and see why Based cannot
ignore a token while ReBased can.

You will learn
  1. why exp(s) has no finite features, and how a polynomial of s has (136 or 153 of them at D = 16);
  2. where Based's floor of ½ comes from, and what share of the attention it gives away as a context grows;
  3. what ReBased changes: normalise, scale by γ, shift by β, square;
  4. that Based is the squared kernel with a constant coordinate appended, plus that floor.

Equations, with s = q·k/√D
  a kernel     sim(q, k) = φ(q)·φ(k): sums over keys can be formed before q is known         [P 3]
  softmax      sim(q, k) = exp(s)                                                            [K 3.2]
  Based        sim(q, k) = 1 + s + s²/2 = (1 + s)²/2 + ½                                     [P 3.2, 4]
  ReBased      sim(q, k) = s², of q' = γ_q·norm(q) + β_q and k' = γ_k·norm(k) + β_k          [P 4]

Letters: B batch, H heads, T time, N number of queries, D query/key feature dimension (16), P number of features after φ;
  gamma (γ) and beta (β) the learned scale and shift, one vector of length H·D for queries and one for keys.

References
  [P] Aksenov et al., Linear Transformers with Learnable Kernel Functions are Better In-Context Models,
      ACL 2024, arXiv 2402.10644; [C] the code released with it, github corl-team/rebased.
  [K] Katharopoulos et al., Transformers are RNNs, ICML 2020, arXiv 2006.16236.
  [A] Arora et al., Based: Simple linear attention language models ..., ICML 2024, arXiv 2402.18668.

Run: python 01_kernels.py      (5 seconds: a table, its reading, runs/01_kernels.png, the checks)
"""
# %%
import argparse
import math
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

# %% Inputs are checked where they enter. A wrong shape that travels three files deep comes back as a riddle.
def check_last_dim(x, size, name):
    """Raise TypeError or ValueError unless x is a floating-point tensor whose last dimension is `size`."""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {kind}; convert it with .float()")
    if x.ndim == 0 or x.shape[-1] != size or size == 0:
        raise ValueError(f"{name} must have last dimension {size or '1 or more'}, got shape {tuple(x.shape)}")

# %% Softmax: a similarity without finite features
# Softmax attention weighs a value by exp(s). Its Taylor series has a term of every degree, so no finite φ
# gives φ(q)·φ(k) = exp(q·k/√D) for all q and k: every query must meet every key, and cost grows with T².
def scaled_dot(q, k):
    """s = q·k/√D. q (..., N, D), k (..., T, D) -> (..., N, T)."""
    return q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])


def exp_scores(q, k):
    """Softmax's similarity before it is normalised. q (..., N, D), k (..., T, D) -> (..., N, T). [K 3.2]

    Raises TypeError for integer tensors, ValueError for unequal D.
    """
    check_last_dim(q, q.shape[-1], "q")
    check_last_dim(k, q.shape[-1], "k")
    return torch.exp(scaled_dot(q, k))

# %% A square has features
# (q·k)² = Σ_a Σ_b q_a q_b k_a k_b is an inner product of all D² products x_a x_b. The pairs (a, b) and (b, a)
# are the same number; one of them, times √2, does: D(D+1)/2 = 136 features at D = 16 instead of 256.
# Which pairs? Multiply x by itself rotated by 0, 1, ..., D/2 places and each pair of places meets once (at
# D/2, if D is even, twice: keep the first half). No list of indices, one broadcast multiplication.
def symmetric_products(x):
    """f(x) with f(q)·f(k) = (q·k)². (..., D) -> (..., D(D+1)/2)."""
    D = x.shape[-1]
    rotated = torch.cat([x, x], dim=-1).unfold(-1, D, 1)[..., : D // 2 + 1, :]  # (..., D//2 + 1, D)
    root2 = x.new_full((D // 2 + 1, 1), math.sqrt(2))
    root2[0] = 1.0  # x_a x_a occurs once, every other pair twice
    return (x.unsqueeze(-2) * rotated * root2).flatten(-2)[..., : D * (D + 1) // 2]


def polynomial_features(x, coefficients):
    """φ(x) with φ(q)·φ(k) = c0 + c1·s + c2·s². (..., D) -> (..., P); a term whose c is 0 takes no room."""
    c0, c1, c2 = coefficients
    root_d = math.sqrt(x.shape[-1])
    constant = [torch.full_like(x[..., :1], math.sqrt(c0))] if c0 else []
    linear = [x * math.sqrt(c1 / root_d)] if c1 else []
    return torch.cat([*constant, *linear, symmetric_products(x * math.sqrt(math.sqrt(c2) / root_d))], dim=-1)

# %% A kernel has three methods
# `prepare` acts on the projections while all heads still lie side by side, (B, T, H·D): what is learned lives
# there, because ReBased normalises over all heads jointly [C]. Then the heads are split, and `scores` and
# `features` are two ways to one number: features(q)·features(k) == scores(q, k).
#
# Where the similarity is a polynomial, `scores` completes the square: c0 + c1·s + c2·s² = c2·(s + shift)² + floor.
# The sum of three terms would cancel near the lowest point, where precision is all that is left.
class Kernel(nn.Module):
    """What all kernels share. dim is D, the size of one head; coefficients are (c0, c1, c2) or None.

    Raises ValueError for impossible sizes. `num_features` is P.
    """

    def __init__(self, dim, heads=1, coefficients=None, floor=0.0):
        super().__init__()
        for name, value in (("dim", dim), ("heads", heads)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if not 0 <= floor < math.inf:
            raise ValueError(f"floor must be 0 or more (a negative similarity is no weight), got {floor!r}")
        self.dim, self.heads, self.coefficients, self.floor = dim, heads, coefficients, floor

    def prepare(self, q, k):
        """q, k (B, T, H·D) -> q', k' of the same shape; the identity where nothing is learned."""
        check_last_dim(q, self.heads * self.dim, "q")
        check_last_dim(k, self.heads * self.dim, "k")
        return self.place(q, "q"), self.place(k, "k")

    def place(self, x, side):
        """What `prepare` does to the queries (side "q") or the keys ("k")."""
        return x

    def scores(self, q, k):
        """q (..., N, D), k (..., T, D) -> (..., N, T), the unnormalised weights."""
        check_last_dim(q, self.dim, "q")
        check_last_dim(k, self.dim, "k")
        if self.coefficients is None:
            return self.features(q) @ self.features(k).transpose(-2, -1)
        _, c1, c2 = self.coefficients
        s = scaled_dot(q, k)
        square = c2 * (s + c1 / (2 * c2) if c1 else s).square()
        return square + self.floor if self.floor else square

    def features(self, x):
        """φ(x): (..., D) -> (..., P)."""
        check_last_dim(x, self.dim, "x")
        return polynomial_features(x, self.coefficients)

    @property
    def num_features(self):
        return self.features(torch.ones(1, self.dim)).shape[-1]

# %% Based: the Taylor polynomial of exp(s), and its floor
# 1 + s + s²/2 = (1 + s)²/2 + ½. Wherever a key lies, its weight is at least ½. With floor=0 the parabola stays
# and the ½ goes: compare the two and nothing but the floor differs.
class TaylorKernel(Kernel):
    """Based: (1 + s)²/2 + floor; 1 + s + s²/2 with floor ½. P = 153 at D = 16. [P 3.2, A]

    norm: LayerNorm over H·D before the head split, as in ReBased (Based itself has none).
    """

    def __init__(self, dim, heads=1, floor=0.5, norm=False):
        super().__init__(dim, heads, (0.5 + floor, 1.0, 0.5), floor)
        self.norm_q = nn.LayerNorm(heads * dim) if norm else nn.Identity()
        self.norm_k = nn.LayerNorm(heads * dim) if norm else nn.Identity()

    def place(self, x, side):
        return self.norm_q(x) if side == "q" else self.norm_k(x)

# %% ReBased: a square, placed by what is learned
# The weight is 0 wherever q' and k' are orthogonal: a token can be ignored. The rungs of the paper's ablation
# (Table 1) are variants. `elementwise` is φ(x) = x² as the paper's text has it, D features and Σ q'_i² k'_i²; the
# released code squares the whole product [C], and so does every other variant here.
LADDER = {  # variant: the steps of q' = γ·norm(q) + β that it takes
    "x2": (),
    "gamma": ("gamma",),
    "gamma_beta": ("gamma", "beta"),
    "norm": ("norm",),
    "rebased": ("norm", "gamma", "beta"),
    "elementwise": ("norm", "gamma", "beta"),
}


class ReBasedKernel(Kernel):
    """ReBased: s² + floor on prepared q', k'. P = 136 at D = 16. [P 4, Table 1; C]

    variant is a key of LADDER (else ValueError); floor > 0 puts back what ReBased removed.
    """

    def __init__(self, dim, heads=1, variant="rebased", floor=0.0):
        if variant not in LADDER:
            raise ValueError(f"unknown ReBased variant {variant!r}; choose one of {', '.join(LADDER)}")
        super().__init__(dim, heads, None if variant == "elementwise" else (floor, 0.0, 1.0), floor)
        self.variant = variant
        for side in "qk":  # register_parameter(name, None) leaves an attribute that is None
            gamma = nn.Parameter(torch.ones(heads * dim)) if "gamma" in LADDER[variant] else None
            beta = nn.Parameter(torch.zeros(heads * dim)) if "beta" in LADDER[variant] else None
            self.register_parameter(f"gamma_{side}", gamma)
            self.register_parameter(f"beta_{side}", beta)

    def place(self, x, side):
        gamma, beta = getattr(self, f"gamma_{side}"), getattr(self, f"beta_{side}")
        if "norm" in LADDER[self.variant]:  # one LayerNorm over all heads
            return F.layer_norm(x, x.shape[-1:], gamma, beta, eps=1e-5)
        x = x if gamma is None else x * gamma
        return x if beta is None else x + beta

    def features(self, x):
        if self.variant != "elementwise":
            return super().features(x)
        check_last_dim(x, self.dim, "x")
        return F.pad(x.square(), (0, 1), value=math.sqrt(self.floor)) if self.floor else x.square()

# %% elu + 1: the kernel of the first linear transformer, D positive features, no polynomial of s
class EluKernel(Kernel):
    """φ(x) = elu(x) + 1. P = D. [K 3.2.1]"""

    def features(self, x):
        check_last_dim(x, self.dim, "x")
        return F.elu(x) + 1


def all_kernels(dim, heads=1):
    """Name -> a fresh kernel, for every kernel of this file: each polynomial with a floor of ½ and without one."""
    kernels = {
        "based": TaylorKernel(dim, heads),
        "based_no_floor": TaylorKernel(dim, heads, floor=0.0),
        "based_norm": TaylorKernel(dim, heads, norm=True),
        "based_norm_no_floor": TaylorKernel(dim, heads, floor=0.0, norm=True),
        "elu": EluKernel(dim, heads),
    }
    for variant in LADDER:
        kernels[variant] = ReBasedKernel(dim, heads, variant)
        kernels[variant + "_floor"] = ReBasedKernel(dim, heads, variant, floor=0.5)
    return kernels

# %% Claim: for every kernel, features and scores are the same number (float64: only a wrong formula differs)
def check_features_equal_scores():
    """features(q)·features(k) == scores(q, k), odd and even D; 136 and 153 features at D = 16."""
    torch.manual_seed(0)
    for dim in (1, 2, 7, 16):
        q, k = torch.randn(2, 3, 5, dim, dtype=torch.float64)
        for name, kernel in all_kernels(dim).items():
            scores, inner = kernel.scores(q, k), kernel.features(q) @ kernel.features(k).transpose(-2, -1)
            error = (scores - inner).abs().max() / scores.abs().max()
            assert error < 1e-12, f"{name} at D = {dim}: features and scores differ by {error:.1e}"
    assert ReBasedKernel(16).num_features == 136 and TaylorKernel(16).num_features == 153

# %% Where the floor of ½ comes from
# Walk a key along the direction of the query and s takes every value: q = √D·e₁ and k = s·e₁.
def weights_at(scores, s, dim=16):
    """The similarity `scores(q, k)` of keys placed so that q·k/√D = s. s (N,) -> (N,)."""
    q, k = s.new_zeros(1, dim), s.new_zeros(len(s), dim)
    q[0, 0], k[:, 0] = math.sqrt(dim), s
    return scores(q, k)[0]


REACH = 4  # the scores s that we allow lie in [-REACH, REACH]
GRID = torch.arange(-REACH * 1000, REACH * 1000 + 1, dtype=torch.float64) / 1000


def lowest_point(scores):
    """(s, weight) where the similarity weighs least within ±REACH."""
    weights = weights_at(scores, GRID)
    return GRID[weights.argmin()].item(), weights.min().item()


def check_floors():
    """Based's lowest weight is ½, at s = −1; ReBased's is 0, at s = 0; floor=0 frees Based."""
    assert lowest_point(TaylorKernel(16).scores) == (-1.0, 0.5)
    assert lowest_point(TaylorKernel(16, floor=0.0).scores) == (-1.0, 0.0)
    assert lowest_point(ReBasedKernel(16).scores) == (0.0, 0.0)

# %% Claim: with q~ = [q/D^¼, 1], Based is ½(q~·k~)² + ½, the squared kernel plus a floor
# So γ = 0 and β ≠ 0 in one coordinate of q and of k make it constant and give ReBased Based's parabola in the
# D − 1 that are left; nothing gives it the floor.
def check_based_is_a_square_plus_half():
    """1 + s + s²/2 == ½(q~·k~)² + ½ on random vectors."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 9, 16, dtype=torch.float64)
    q_, k_ = (F.pad(x / 16**0.25, (0, 1), value=1.0) for x in (q, k))
    square = 17 * ReBasedKernel(17, variant="x2").scores(q_, k_)  # scores divides by D + 1: undo it
    assert torch.allclose(TaylorKernel(16).scores(q, k), square / 2 + 0.5, rtol=1e-12)

# %% How γ and β move the parabola
# In one dimension, for q' = 1, the weight of a key is (γk + β)²: zero at k = −β/γ, curvature 2γ². Each kernel's
# lowest point is fixed in its own s, Based's at −1 and ReBased's at 0; but ReBased's s is taken after γ and β, so in
# terms of the projections q and k its zero is where training puts it.
def parabola(k, gamma, beta):
    """ReBased's weight of the scalar keys k (N,) for q' = 1."""
    kernel = ReBasedKernel(1, variant="gamma_beta").requires_grad_(False).to(k.dtype)
    kernel.gamma_k.fill_(gamma), kernel.beta_k.fill_(beta)
    q, keys = kernel.prepare(k.new_ones(1, 1, 1), k.reshape(1, -1, 1))
    return kernel.scores(q, keys)[0, 0]


def check_beta_moves_the_zero():
    """The weight is 0 at −β/γ and (γd)² at a distance d from there."""
    for gamma, beta in ((1.0, 0.0), (1.0, 1.5), (2.0, -1.0), (0.5, 0.5)):
        near = torch.tensor([0.0, 0.3, -2.0], dtype=torch.float64)
        assert torch.allclose(parabola(near - beta / gamma, gamma, beta), (gamma * near) ** 2, atol=1e-14)

# %% What a floor costs over a long context
# One key matters, T do not. Let training be as good as can be with scores within ±4: the right key at s = 4,
# the others exactly where the kernel weighs least. The share of attention they take is
# T·w / (T·w + w_right). `scatter` then spreads them around that place, as no model hits it exactly.
def irrelevant_share(scores, T, scatter=0.0):
    """Share of the attention on T irrelevant keys, beside one right key at s = REACH."""
    noise = torch.randn(T, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lost = weights_at(scores, lowest_point(scores)[0] + scatter * noise).sum().item()
    return lost / (lost + weights_at(scores, GRID[-1:]).item())


def check_a_floor_grows_with_context():
    """Based loses T/2 against 13 (its weight at s = 4), ReBased nothing."""
    for T in (128, 1024, 8192):
        assert abs(irrelevant_share(TaylorKernel(16).scores, T) - (T / 2) / (T / 2 + 13)) < 1e-9
        assert irrelevant_share(ReBasedKernel(16).scores, T) == 0.0

# %% The price of a weight that can be 0
# Attention divides by the sum of its weights, plus a small ε against 0/0. In the first row that sum is one weight, and
# it can almost vanish: then float32 has few digits left, and a large ε would pull the row to 0. 02 takes ε = 1e-12.
def check_first_rows_can_almost_vanish():
    """Over 10,000 random pairs the smallest s² is tiny beside the median; Based's stays above ½."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 10_000, 1, 16, dtype=torch.float64)
    weights = ReBasedKernel(16).scores(q, k)
    assert TaylorKernel(16).scores(q, k).min() >= 0.5
    return f"smallest of 10,000 normalisers: {weights.min() / weights.median():.0e} of the median for ReBased"

# %% What every file prints at its end, and how it takes its arguments
def run_checks(checks):
    """Print one line per check, then `checks: n passed, m failed`; return m."""
    failed = 0
    for check in checks:
        name = check.__name__.removeprefix("check_").replace("_", " ")
        try:
            note = check()
            print(f"  ok      {name}" + (f" ({note})" if note else ""))
        except AssertionError as error:
            failed += 1
            print(f"  FAILED  {name}: {str(error) or check.__doc__}")
    print(f"checks: {len(checks) - failed} passed, {failed} failed")
    return failed


def parse_arguments(parser, argv):
    """Parse argv, or the command line; nothing inside a notebook, whose sys.argv is not ours."""
    return parser.parse_args([] if argv is None and "ipykernel" in sys.modules else argv)


def positive(text):
    """An argparse type: an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def writable(path):
    """An argparse type: the path if it can be written, its folder made; asked before any work is done."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        path.open("ab").close()
        if new:
            path.unlink()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write {path}: {error.strerror}; choose another path") from None
    return path


def pyplot():
    """matplotlib.pyplot, drawing to files; None, with one line that says so, where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        print("no figure: matplotlib is not installed (pip install matplotlib)")
        return None
    matplotlib.use("agg")
    return __import__("matplotlib.pyplot").pyplot

# %% The table and the figure
SHOWN = {
    "softmax exp(s)": exp_scores,
    "Based": TaylorKernel(16).scores,
    "Based − ½": TaylorKernel(16, floor=0.0).scores,
    "ReBased": ReBasedKernel(16).scores,
    "ReBased + ½": ReBasedKernel(16, floor=0.5).scores,
}


def print_table():
    """One row per similarity: features, lowest weight, the share that irrelevant tokens take."""
    print(f"One right key at s = {REACH}; T others where the similarity is lowest within ±{REACH} (last column: ±0.05 off).\n")
    print(f"{'':16}{'features':>9}{'lowest':>9}{'at':>5}   share of attention on the T others")
    print(f"{'similarity':16}{'at D=16':>9}{'weight':>9}{'s =':>5}{'T=128':>9}{'1,024':>9}{'8,192':>9}{'8,192±':>9}")
    for name, scores in SHOWN.items():
        place, weight = lowest_point(scores)
        shares = [irrelevant_share(scores, T) for T in (128, 1024, 8192)] + [irrelevant_share(scores, 8192, 0.05)]
        P = scores.__self__.num_features if hasattr(scores, "__self__") else "∞"
        print(f"{name:16}{P:>9}{weight:9.3f}{place:5.0f}" + "".join(f"{share:9.3f}" for share in shares))


def draw(path):
    """Three panels: the similarities, what their floors cost, how γ and β place ReBased's parabola."""
    plt = pyplot()
    if plt is None:
        return
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    lengths, k = [2**n for n in range(4, 17)], GRID[1000:-1000]
    for name, scores in SHOWN.items():
        left.plot(GRID, weights_at(scores, GRID), label=name)
        middle.plot(lengths, [irrelevant_share(scores, T, 0.05) for T in lengths], label=name)
    for gamma, beta in ((1.0, 0.0), (1.0, 1.5), (2.0, -1.0)):
        right.plot(k, parabola(k, gamma, beta), label=f"γ = {gamma:g}, β = {beta:g}")
    left.axhline(0.5, color="gray", linestyle=":", linewidth=1)
    left.set(title="Based never falls below ½", xlabel="s = q·k/√D", ylabel="similarity", ylim=(-0.3, 8))
    middle.set(title="share of attention on T irrelevant keys\n(scatter 0.05)", xlabel="T", xscale="log")
    right.set(title="ReBased: γ and β place the zero", xlabel="k (one dimension, q' = 1)", ylim=(-0.3, 8))
    for axis in (left, middle, right):
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    print(f"figure: {path}\n")


CHECKS = [
    check_features_equal_scores,
    check_floors,
    check_based_is_a_square_plus_half,
    check_beta_moves_the_zero,
    check_a_floor_grows_with_context,
    check_first_rows_can_almost_vanish,
]


def main(argv=None):
    """The table, its reading, the figure, the checks; returns how many checks failed."""
    parser = argparse.ArgumentParser(description="01: kernels, their features and their floors (5 seconds)")
    parser.add_argument("--figure", type=writable, default="runs/01_kernels.png", help="where to draw it (%(default)s)")
    options = parse_arguments(parser, argv)
    print_table()
    lost, kept = (irrelevant_share(SHOWN[name], 8192) for name in ("Based", "ReBased"))
    print(f"\nAt 8,192 tokens Based gives {lost:.1%} of its attention to what does not matter, however well it is trained, while")
    print(f"scores stay within ±{REACH}: no token weighs less than ½. ReBased can give {kept:.0%}, for its weight reaches 0. The")
    print("last column is what scatter costs: without a floor the loss shrinks with the scatter and can be learned away, with")
    print("one it cannot.\n")
    draw(options.figure)
    return run_checks(CHECKS)


if __name__ == "__main__":
    if main():
        sys.exit(1)
