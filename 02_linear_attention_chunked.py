"""02 · The chunked form, fast on a CPU

Aim: the four steps of `chunked_in_four_steps` at the speed of matrix products, with a backward pass that keeps no
features.

You will learn
  1. one column of ones that makes numerator, normaliser, S and z one product;
  2. a backward pass that is the forward sweep run from the end, with a state R of its own;
  3. why features are cheaper to compute again than to keep, and how they are laid out to be cheap;
  4. how long a chunk should be, from a count of FLOPs and calls.

Equations, of one head, with w_ij = sim(q_i, k_j) = u_ij² + floor (or u_ij, if it is no square)
  forward      num_i = Σ_{j≤i} w_ij v_j,  den_i = Σ_{j≤i} w_ij,  o_i = num_i/den_i           [P 3]
  backward     dw_ij = (do_i·v_j − δ_i)/den_i with δ_i = do_i·o_i,   dv_j = Σ_{i≥j} w_ij do_i/den_i
  later chunks R = Σ_i φ(q_i) [do_i, −δ_i]ᵀ/den_i,   dv_j += Rᵀφ(k_j),   dφ(k_j) += R [v_j, 1]ᵀ

Letters: as in 02; N = B·H, or as many heads of them as a sweep takes at once (in 01: queries); do the gradient of o; V
  the width of v with its columns of ones, a multiple of 8 (in 03: the vocabulary); c the chunk of a part of the sequence,
  <= C; G chunks make a group: their G·N heads and chunks are the rows of one product.

References: [P], [K] as in 01, chunks as in 02; the gradient by sums from both ends: [K 3.3.1].

Run: python 02_linear_attention_chunked.py     (10 seconds: what is kept and how long it takes, by chunk; checks)
"""
# %%
import argparse
import functools
import math
import sys
from importlib import import_module
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer

kernels = import_module("01_kernels")
la = import_module("02_linear_attention")

# %% Three ideas keep it short
# - A column of ones appended to v makes num and den one product, and z one more column of S. (BLAS likes widths
#   that are multiples of 8: the column is repeated to the next one.)
# - A similarity that is no polynomial of s (elu, element-wise) is the *linear* polynomial of its features:
#   sim = φ(q)·φ(k). So one routine serves every kernel; it knows (c0, c1, c2) and nothing else.
# - Only S runs from chunk to chunk. The rest of G chunks is done at once, stacked on the heads: G·N rows.
class Weight(NamedTuple):
    """sim = u² + floor with u = scale·(q·k) + shift; without c2, sim = u."""

    scale: float
    shift: float
    floor: float
    square: bool


def complete_square(coefficients, D):
    """(c0, c1, c2) of a polynomial of s = q·k/√D -> Weight."""
    c0, c1, c2 = coefficients
    if not c2:
        return Weight(c1 / math.sqrt(D), c0, 0.0, False)
    return Weight(math.sqrt(c2 / D), c1 / (2 * math.sqrt(c2)), c0 - c1 * c1 / (4 * c2), True)


def inner(q, k, weight, out):
    """u = scale·(q·k) + shift where j <= i, else 0: q, k (rows, C, D) -> out (rows, C, C)."""
    shift = q.new_full((1, 1, 1), weight.shift)
    return torch.baddbmm(shift, q, k.mT, beta=1 if weight.shift else 0, alpha=weight.scale, out=out).tril_()


def weigh(u, weight):
    """sim(u), in place; 0 stays where j > i."""
    u = u.square_() if weight.square else u
    return u.add_(weight.floor).tril_() if weight.floor else u


def width(Dv):
    """V, the next multiple of 8 after Dv."""
    return Dv + 8 - Dv % 8


def with_ones(v):
    """v (..., Dv) -> [v, 1, ...] (..., V)."""
    return F.pad(v, (0, width(v.shape[-1]) - v.shape[-1]), value=1.0)

# %% Features, laid out for a chunk
# The features of 01 in the same order, but with time as the last dimension, (rows, P, C): each rotation of x is then
# a run of rows, and all products are one multiplication along memory (main() times it beside the row layout). So cheap,
# they are computed again by the backward pass: kept for autograd, 136 numbers a token where q has 16, they would fill
# the memory, and it is memory that makes long sequences slow.
# They are written to room reserved once a sweep: fresh memory for each group would cost more than the products.
class ChunkFeatures:
    """φ(x)ᵀ of chunks x (rows, C, D), like those of q, and its gradient, for c0 + c1·s + c2·s²."""

    def __init__(self, q, coefficients, rows, C):
        D, (c0, c1, c2) = q.shape[-1], coefficients
        self.D, self.turns, self.before = D, D // 2 + 1 if c2 else 0, bool(c0) + bool(c1) * D
        self.scale, self.linear = (2 * c2 / D) ** 0.25 or 1.0, math.sqrt(c1 / math.sqrt(D))
        one = torch.eye(D, dtype=q.dtype, device=q.device)
        self.double = (torch.cat([one, one]) * self.scale).expand(rows, -1, -1)  # (rows, 2D, D)
        if self.turns:
            self.back = torch.cat([one.roll(turn, 0) for turn in range(self.turns)], 1).expand(rows, -1, -1)
        self.P = count_features(coefficients, D)
        self.room = q.new_empty(rows, self.before + self.turns * D, C)  # of the last turn P counts half if D is even
        self.room[:, : bool(c0)] = math.sqrt(c0)

    def products(self, room):
        """The part of a room for the products, (rows, turns, D, C)."""
        return room[:, self.before :].unflatten(1, (self.turns, self.D))

    def rotations(self):
        """The rows of x rotated by 0, 1, ..., D/2 places: (rows, turns, D, C), a view."""
        return self.twice.unfold(1, self.D, 1).mT[:, : self.turns]

    def __call__(self, x):
        """x (rows, C, D) -> φ(x)ᵀ (rows, P, C), in the room: valid until the next call."""
        D = self.D
        self.twice = torch.bmm(self.double, x.mT)  # (rows, 2D, C): [x, x]ᵀ, scaled
        if self.linear:
            torch.mul(self.twice[:, :D], self.linear / self.scale, out=self.room[:, self.before - D : self.before])
        if self.turns:
            products = self.products(self.room)
            torch.mul(self.twice[:, None, :D], self.rotations(), out=products)  # √2 x_a x_b ...
            products[:, 0].mul_(math.sqrt(0.5))  # ... but x_a² occurs once
        return self.room[:, : self.P]

    def backward(self, gradient):
        """dx (rows, C, D) for the x of the last call; gradient: that of φ(x)ᵀ, in room of the same size; both are lost."""
        D = self.D
        linear = gradient[:, self.before - D : self.before] * self.linear if self.linear else 0
        if not self.turns:
            return linear.mT
        # d(x_a x_b) = x_b dx_a + x_a dx_b: the factor at rest, and the rotated one, rotated back.
        g = self.products(gradient)
        g[:, 0].mul_(math.sqrt(0.5))
        dx = torch.mul(g, self.rotations(), out=self.products(self.room)).sum(1)  # (rows, D, C)
        dx.baddbmm_(self.back, g.mul_(self.twice[:, None, :D]).flatten(1, 2))
        return (dx.mul_(self.scale) + linear).mT


def count_features(coefficients, D):
    """P of the polynomial with these coefficients."""
    c0, c1, c2 = coefficients
    return bool(c0) + bool(c1) * D + bool(c2) * D * (D + 1) // 2

# %% The forward sweep: the four steps of 02, a group at a time
def in_groups(x, C, G):
    """x (N, T, d) -> views (G, N, C, d) of its chunks, G at a time."""
    return x.unflatten(1, (-1, C)).transpose(0, 1).split(G)


def forward_sweep(q, k, v, o, inverse, past, S, keep, coefficients, C, G):
    """q, k (N, T, D), v (N, T, Dv), S (N, P, V), overwritten, or None; T a multiple of G·C -> the state after T, if `keep`.

    Writes o (N, T, Dv), inverse = 1/den (N, T, 1), and the state before each chunk to past (T/C, N, P, V) if given.
    """
    N, Dv, chunks, last = len(q), v.shape[-1], 0, q.shape[1] // C - 1
    weight, states = complete_square(coefficients, q.shape[-1]), last or keep or S is not None
    phi_q, phi_k = (ChunkFeatures(q, coefficients, G * N, C) for _ in "qk") if states else (None, None)
    v1, u = with_ones(v.new_empty(G, N, C, Dv)), q.new_empty(G * N, C, C)
    num = torch.empty_like(v1)
    for qg, kg, vg, og, inv in zip(*(in_groups(x, C, G) for x in (q, k, v, o, inverse)), strict=True):
        qg, kg = qg.flatten(0, 1), kg.flatten(0, 1)  # (G·N, C, D)
        v1[..., :Dv] = vg
        # 1. Inside a chunk: the quadratic form.
        torch.bmm(weigh(inner(qg, kg, weight, out=u), weight), v1.flatten(0, 1), out=num.flatten(0, 1))
        # 2, 4. Everything before: the state, read by φ(q); then the chunk joins it (the last: only if somebody goes on).
        if states:
            for n, fq, fk, x in zip(num, phi_q(qg).split(N), phi_k(kg).split(N), v1, strict=True):
                if S is not None:
                    n.baddbmm_(fq.mT, S)
                    if past is not None:
                        past[chunks] = S
                if keep or chunks < last:
                    S = add_product(S, fk, x)
                chunks += 1
        # 3. One division: the normaliser is the column of ones.
        torch.add(num[..., Dv : Dv + 1], la.EPS, out=inv).reciprocal_()
        torch.mul(num[..., :Dv], inv, out=og)
    return S if keep else None


def add_product(S, A, B):
    """S + A @ B, in place; A @ B if S is None."""
    return torch.bmm(A, B) if S is None else S.baddbmm_(A, B)

# %% The backward sweep: the same groups, from the end
# With num = Σ w v and den = Σ w, the gradients of the two are do/den and −δ/den, δ = do·o: side by side they are
# the gradient of one product with [v, 1]. What S was to the forward sweep, R = Σ_i φ(q_i) [do_i, −δ_i]ᵀ/den_i over
# *later* i is to this one; it is built up anew, never by subtracting from a total, which would leave rounding errors.
def backward_sweep(q, k, v, o, inverse, past, R, do, grads, coefficients, C, G):
    """The mirror of `forward_sweep`: writes dq, dk, dv = grads; R (N, P, V), the gradient of the final state,
    overwritten, or None -> the gradient of the initial state. past: as there, None if there is one chunk and no state."""
    N, Dv, weight = len(q), v.shape[-1], complete_square(coefficients, q.shape[-1])
    scale, states = weight.scale * (2 if weight.square else 1), past is not None or R is not None
    phi_q, phi_k = (ChunkFeatures(q, coefficients, G * N, C) for _ in "qk") if states else (None, None)
    v1, (u, du) = with_ones(v.new_empty(G, N, C, Dv)), q.new_empty(2, G * N, C, C)
    d1, dv1 = torch.zeros_like(v1), torch.empty_like(v1)
    gradient = torch.zeros_like(phi_q.room) if states else None
    V1, D1, DV1 = (x.flatten(0, 1) for x in (v1, d1, dv1))  # the same as rows
    groups = [in_groups(x, C, G) for x in (q, k, v, o, inverse, do, *grads)]
    groups.append(past.split(G) if past is not None else [None] * len(groups[0]))
    for qg, kg, vg, og, inv, dog, dq, dk, dv, before in reversed(list(zip(*groups, strict=True))):
        qg, kg = qg.flatten(0, 1), kg.flatten(0, 1)
        v1[..., :Dv] = vg
        # 3. The division: the gradient of [num, den].
        torch.mul(dog, inv, out=d1[..., :Dv])
        torch.sum(torch.mul(d1[..., :Dv], og, out=dv1[..., :Dv]), -1, out=d1[..., Dv]).neg_()
        # 1. Inside a chunk: w is computed again; where sim = u², du = 2u·dw.
        inner(qg, kg, weight, out=u)
        torch.bmm(D1, V1.mT, out=du)
        du = du.mul_(u) if weight.square else du.tril_()
        torch.bmm(weigh(u, weight).mT, D1, out=DV1)
        dqg, dkg = torch.bmm(du, kg).mul_(scale), torch.bmm(du.mT, qg).mul_(scale)
        # 2. Everything after a chunk: φ(k) carries R into dv, and dφ(k) = R [v, 1]ᵀ. Then the chunk joins R.
        if states:
            dphi = gradient[:, : phi_q.P]
            fq, fk, dfk = phi_q(qg).split(N), phi_k(kg).split(N), dphi.split(N)
            for j in reversed(range(G)):
                if R is None:
                    dfk[j].zero_()
                else:
                    dv1[j].baddbmm_(fk[j].mT, R)
                    torch.bmm(R, v1[j].mT, out=dfk[j])
                R = add_product(R, fq[j], d1[j])
            dkg += phi_k.backward(gradient)
        if before is not None:  # Everything before: dφ(q) = S [do, −δ]ᵀ/den.
            torch.bmm(before.flatten(0, 1), D1.mT, out=dphi)
            dqg += phi_q.backward(gradient)
        for grad, found in zip((dq, dk, dv), (dqg, dkg, DV1[..., :Dv]), strict=True):
            grad[:] = found.unflatten(0, (G, N))
    return R


GROUP = 1024  # tokens times heads of a group, a core: their features fit in its cache


def parts(q, C):
    """(times, C, G) of the parts of q (N, T, D) that one sweep takes: whole groups of G chunks; whole chunks; the rest."""
    T, tokens = q.shape[1], 2**16 if q.is_cuda else GROUP * torch.get_num_threads()
    G = max(1, tokens // (len(q) * C))
    groups, chunks = T - T % (G * C), T - T % C
    cuts = (0, groups, C, G), (groups, chunks, C, (chunks - groups) // C), (chunks, T, T - chunks, 1)
    return [(slice(start, end), c, g) for start, end, c, g in cuts if start < end]

# %% Few heads at a time
# Heads do not meet, so some can wait: few enough at once that a chunk of theirs stays in each core's cache.
TOGETHER = 16  # heads a core


def head_groups(q):
    """Slices of N; all of N at once on a GPU."""
    N, together = len(q), TOGETHER * torch.get_num_threads()
    return [slice(None)] if q.is_cuda else [slice(n, n + together) for n in range(0, N, together)]


class ChunkedAttention(torch.autograd.Function):
    """The two sweeps as one differentiable operation, a few heads at a time so that a group stays in cache."""

    @staticmethod
    def forward(ctx, q, k, v, S, coefficients, C, keep):
        (N, T, D), o, inverse = q.shape, torch.empty_like(v), torch.empty_like(v[..., :1])
        past, chunks = None, math.ceil(T / C)
        if any(ctx.needs_input_grad) and (chunks > 1 or S is not None):
            past = v.new_empty(chunks, N, count_features(coefficients, D), width(v.shape[-1]))
            past[0] = 0

        def sweep_of(heads):
            state = None if S is None else S[heads].clone()
            for times, c, G in parts(q[heads], C):
                before = None if past is None else past[times.start // C :, heads][: (times.stop - times.start) // c]
                inputs = (x[heads, times] for x in (q, k, v, o, inverse))
                state = forward_sweep(*inputs, before, state, keep or times.stop < T, coefficients, c, G)
            return state

        final = [sweep_of(heads) for heads in head_groups(q)]
        ctx.save_for_backward(q, k, v, o, inverse, past)
        ctx.rest = S is not None, coefficients, C
        return o, torch.cat(final) if keep else None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, dS):
        (q, k, v, o, inverse, past), (started, coefficients, C) = ctx.saved_tensors, ctx.rest
        grads = [torch.empty_like(x) for x in (q, k, v)]

        def sweep_of(heads):
            R = None if dS is None else dS[heads].clone()
            for times, c, G in reversed(parts(q[heads], C)):
                before = None if past is None else past[times.start // C :, heads][: (times.stop - times.start) // c]
                inputs, out = (x[heads, times] for x in (q, k, v, o, inverse)), [x[heads, times] for x in grads]
                R = backward_sweep(*inputs, before, R, do[heads, times], out, coefficients, c, G)
            return R

        first = [sweep_of(heads) for heads in head_groups(q)]
        return *grads, torch.cat(first) if started else None, None, None, None

# %% The chunk of least cost
# A short chunk spends its time on states and on calls, a long one on weights that the mask throws away. Per token and
# head, in FLOPs: 2C(D + V) inside and 4PV through the state. What is not a matrix product is charged at the ratio of
# the two rates (an element-wise pass reaches about 1/20 of the FLOP rate of a product). More threads share all this,
# but not the calls: two or three a chunk for the state. (Those of a group are the same for every C: a group is so many
# tokens and heads that its features fit in a core's cache.)
PASS, STEP = 20, 4e6  # FLOPs an element-wise step, a chunk


def predicted_chunk_cost(C, N, T, D, V, P, threads):
    """FLOPs, or what takes as long, per token and head of the forward sweep."""
    chunks = math.ceil(T / C)
    inside = C * (2 * (D + V) + 4 * PASS)
    through_state = (4 * P * V + 3 * P * PASS) * (1 - 1 / chunks)
    return (inside + through_state) / threads + STEP * (chunks > 1) / (C * min(N, TOGETHER * threads))


def best_chunk(N, T, D, V, P, threads=None):
    """The power of two from 16 to 512 of least predicted cost; T itself if that is shorter."""
    threads = threads or torch.get_num_threads()
    candidates = [min(C, T) for C in (16, 32, 64, 128, 256, 512)]
    return min(candidates, key=lambda C: predicted_chunk_cost(C, N, T, D, V, P, threads))

# %% The whole form
def sweep(q, k, v, kernel, S=None, z=None, chunk_size=None, keep=False):
    """q, k (B, H, T, D), v (B, H, T, Dv), S (B, H, P, Dv) and z (B, H, P) or None -> o (B, H, T, Dv), S, z.

    The returned S and z are None unless `keep`. Shapes and types are checked by `chunked_attention` of 02.
    """
    coefficients, (B, H, T, _), Dv = kernel.coefficients, q.shape, v.shape[-1]
    if coefficients is None:  # sim = φ(q)·φ(k): the linear polynomial of the features, √D undoing that of s
        q, k = kernel.features(q), kernel.features(k)
        coefficients = (0.0, math.sqrt(q.shape[-1]), 0.0)
    D, P, V = q.shape[-1], kernel.num_features, width(Dv)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # (N, T, ...)
    C = min(T, chunk_size or best_chunk(len(q), T, D, V, P))
    if S is not None:  # z becomes the columns of S that belong to the ones
        S = torch.cat([S, z.unsqueeze(-1).expand(-1, -1, -1, V - Dv)], dim=-1).flatten(0, 1).to(q.dtype)
    o, S = ChunkedAttention.apply(q, k, v, S, coefficients, C, keep)
    o = o.unflatten(0, (B, H))
    if not keep:
        return o, None, None
    S = S.unflatten(0, (B, H))  # (B, H, P, V)
    return o, S[..., :Dv], S[..., Dv]

# %% Claims
def check_equals_the_four_steps():
    """Outputs, final states and gradients equal those of `chunked_in_four_steps`, every kernel, within 1e-9."""
    for name, kernel in kernels.all_kernels(5, heads=3).items():
        inputs, results = la.example(kernel, T=29), []
        for form in (la.chunked_in_four_steps, la.chunked_attention):
            o, state = form(*inputs, kernel, return_state=True, chunk_size=8)
            loss = o.sin().sum() + state.S.sin().sum() + state.z.sin().sum()
            results.append([o, *state, *torch.autograd.grad(loss, inputs)])
        error = max(la.distance([x], [y]) for x, y in zip(*results, strict=True))
        assert error < 1e-9, f"{name}: off by {error:.1e}"


def check_features_are_those_of_01():
    """The chunk layout holds the features of 01 in their order, and their gradient."""
    for dim, coefficients in ((16, (0.0, 0.0, 1.0)), (7, (1.0, 1.0, 0.5)), (1, (0.5, 0.0, 1.0))):
        x = torch.randn(3, 9, dim, dtype=torch.float64, requires_grad=True)
        expected = kernels.polynomial_features(x, coefficients).mT
        features = ChunkFeatures(x, coefficients, 3, 9)
        assert la.distance([features(x.detach())], [expected]) < 1e-12
        upstream = torch.zeros_like(features.room)
        upstream[:, : features.P].normal_()
        gradient = torch.autograd.grad(expected, x, upstream[:, : features.P].clone())
        assert la.distance([features.backward(upstream)], gradient) < 1e-12


CHECKS = [check_equals_the_four_steps, check_features_are_those_of_01]

# %% What is kept, and how long it takes
HEADS, T, D, Dv = 4, 4096, 16, 64


def kept_bytes(forward):
    """Bytes that autograd holds between forward and backward: the storages it saves, each counted once."""
    storages = {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        o = forward()  # the result holds the graph, so that no address is given twice
    return sum(storages.values()) if o.requires_grad else 0


def milliseconds(call):
    """Median of as many calls as fit in 0.3 s, on as many threads as PyTorch has."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.3).median * 1e3


def print_table():
    """The four steps as autograd runs them, then this file by chunk size; returns {C: (predicted cost, ms)}."""
    kernel, V = kernels.ReBasedKernel(D), width(Dv)
    inputs = [*torch.rand(2, 1, HEADS, T, D).add_(0.1), torch.randn(1, HEADS, T, Dv)]
    inputs = [x.requires_grad_() for x in inputs]
    costs, threads = {}, torch.get_num_threads()
    print(f"ReBased, float32, B=1 H={HEADS} T={T:,} D={D} Dv={Dv}, {threads} threads; C predicted best: "
          f"{best_chunk(HEADS, T, D, V, kernel.num_features)}.")
    print("Predicted cost: FLOPs a token, head and thread, passes and calls charged as FLOPs.\n")
    print(f"{'form':24}{'C':>5}{'predicted cost':>16}{'forward':>12}{'+ backward':>12}{'kept':>10}")
    for form, C in [(la.chunked_in_four_steps, 64)] + [(la.chunked_attention, C) for C in (16, 32, 64, 128, 256, 512)]:
        forward = functools.partial(form, *inputs, kernel, chunk_size=C)
        alone = milliseconds(functools.partial(form, *(x.detach() for x in inputs), kernel, chunk_size=C))
        both = milliseconds(lambda: torch.autograd.grad(forward().sum(), inputs))  # noqa: B023
        flops = predicted_chunk_cost(C, HEADS, T, D, V, kernel.num_features, threads)
        fast = form is la.chunked_attention
        costs |= {C: (flops, alone)} if fast else {}
        print(f"{form.__name__:24}{C:5}" + (f"{flops:16,.0f}" if fast else f"{'':16}")
              + f"{alone:9.1f} ms{both:9.1f} ms{kept_bytes(forward) / 1e6:7.0f} MB")
    return costs


def print_layouts():
    """Features of T tokens as rows (01) and as laid out here."""
    x = torch.randn(HEADS * T // 64, 64, D)
    features = ChunkFeatures(x, (0.0, 0.0, 1.0), len(x), 64)
    rows, laid_out = milliseconds(lambda: kernels.polynomial_features(x, (0.0, 0.0, 1.0))), milliseconds(lambda: features(x))
    print(f"φ of {HEADS} × {T:,} keys: {rows:.2f} ms as rows of 136 (01), {laid_out:.2f} ms as laid out here.\n")


def main(argv=None):
    """The table, its reading, the checks; returns how many checks failed."""
    parser = argparse.ArgumentParser(description="02: the chunked form on a CPU; what it keeps and takes, by chunk (10 seconds)")
    kernels.parse_arguments(parser, argv)
    costs = print_table()
    chosen, best = min(costs, key=lambda C: costs[C][0]), min(costs, key=lambda C: costs[C][1])
    print(f"\nThe chunk of least predicted cost is {chosen}, the fastest measured {best}: the choice costs a factor of "
          f"{costs[chosen][1] / costs[best][1]:.2f}.")
    print_layouts()
    return kernels.run_checks(CHECKS)


if __name__ == "__main__":
    if main():
        sys.exit(1)
