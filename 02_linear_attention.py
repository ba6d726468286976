"""02 · Linear attention: one layer, four ways

Aim: compute the same causal attention as a quadratic form, as cumulative sums, as a recurrence with a state of
constant size, and chunk by chunk; know what each costs before timing it.

You will learn
  1. how features let the sums over keys be formed once, and why cost then grows with T instead of T²;
  2. why the textbook linear form is slow all the same, and what a chunk repairs;
  3. the state: cut a sequence anywhere, carry S and z, go on; the bytes do not depend on T;
  4. a backward pass that recomputes features instead of storing them.

Equations
  quadratic    o_i = Σ_{j≤i} w_ij v_j / Σ_{j≤i} w_ij,   w_ij = sim(q_i, k_j)                       [P 3]
  linear       o_i = φ(q_i)ᵀ Σ_{j≤i} φ(k_j) v_jᵀ / φ(q_i)ᵀ Σ_{j≤i} φ(k_j)                          [P 3, K 3.2]
  recurrent    S_i = S_{i−1} + φ(k_i) v_iᵀ,  z_i = z_{i−1} + φ(k_i),  o_i = φ(q_i)ᵀ S_i / φ(q_i)ᵀ z_i   [K 3.3]
  chunked      quadratic for j in the chunk of i, linear through S and z for all chunks before

Letters: B batch, H heads, T time, D query/key dimension, Dv value dimension, P features after φ, C chunk length,
  N = B·H (in 01: the number of queries); S the state (B, H, P, Dv), z its normaliser (B, H, P); num, den the two sums
  whose quotient is o; w = sim, u its root before squaring; do the gradient of o, δ = do·o; R the state of the backward
  pass; V the width of v with its column of ones, a multiple of 8 (in 03: the vocabulary); c one chunk's length, <= C;
  G chunks make a group: their G·N heads and chunks are the rows of one product.
  q, k are prepared and split: `kernel.prepare` of 01 first, then (B, T, H·D) -> (B, H, T, D).

References: [P], [K] as in 01; chunks: Hua et al., Transformer Quality in Linear Time, ICML 2022, arXiv 2202.10447.

Run: python 02_linear_attention.py     (20 seconds: predicted and measured cost, runs/02_linear_attention.png, checks)
     python 02_linear_attention.py --benchmark --threads 1     (15 minutes: against softmax, up to 65,536 tokens)
"""
# %%
import argparse
import functools
import io
import math
import sys
from importlib import import_module
from typing import NamedTuple

import torch
import torch.nn.functional as F

kernels = import_module("01_kernels")  # a name that starts with a digit cannot follow `import`

EPS = 1e-12  # added to every normaliser; 01 shows how small those can be: a larger ε pulls first rows towards 0

# %% The state
# All that the past can still say: S = Σ φ(k_j) v_jᵀ and z = Σ φ(k_j). At D = 16, Dv = 64 it is 35 KB per head
# in float32, the size of 69 keys and values of a softmax cache with heads of 64. Sums over 64k tokens overflow half precision, so
# it is float32 at least, whatever the inputs are. It is a value: keep it, copy it, save it, go on from it twice.
class State(NamedTuple):
    """S (B, H, P, Dv) and z (B, H, P), float32 or float64."""

    S: torch.Tensor
    z: torch.Tensor


def accept(q, k, v, kernel, state=None, T=None):
    """Check shapes and types; return q, k, v as float32 (float64 if one of them is).

    T: the number of queries; None if there are as many as keys.

    Raises TypeError for what is not a floating-point tensor, ValueError for shapes that do not fit.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        free = name == "v" and isinstance(x, torch.Tensor) and x.ndim > 0  # Dv may be anything
        kernels.check_last_dim(x, x.shape[-1] if free else kernel.dim, name)
        if x.ndim != 4 or 0 in x.shape:
            raise ValueError(f"{name} must be (B, H, T, size) with every size at least 1, got {tuple(x.shape)}")
    if q.shape[:2] != k.shape[:2] or k.shape[:3] != v.shape[:3] or q.shape[2] != (T or k.shape[2]):
        raise ValueError(f"q, k and v disagree in B, H or T: {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    if state is not None:
        if not isinstance(state, State):
            raise TypeError(f"state must be a State(S, z) as another call returned it, got {type(state).__name__}")
        expected = (*k.shape[:2], kernel.num_features, v.shape[-1])
        if state.S.shape != expected or state.z.shape != expected[:3]:
            raise ValueError(f"state must be S {expected} and z {expected[:3]} (B, H, P, Dv), "
                             f"got {tuple(state.S.shape)} and {tuple(state.z.shape)}")
    dtype = torch.float64 if torch.float64 in (q.dtype, k.dtype, v.dtype) else torch.float32
    return q.to(dtype), k.to(dtype), v.to(dtype)


def without_autocast(form):
    """Keep autocast out of a form: its sums are float32 or better however the rest of the model runs."""

    @functools.wraps(form)
    def wrapped(q, *args, **options):
        device = q.device.type if isinstance(q, torch.Tensor) else "cpu"
        with torch.autocast(device, enabled=False):
            return form(q, *args, **options)

    return wrapped

# %% 1. Quadratic: the definition, and the oracle of every test
# Every query meets every key before it: T² weights per head, computed, masked, multiplied. With `positions` only
# some rows are computed: if a loss looks at 16 positions, 16 rows are enough.
@without_autocast
def quadratic_attention(q, k, v, kernel, positions=None):
    """q, k (B, H, T, D), v (B, H, T, Dv) -> o (B, H, T, Dv). Needs no features. [P 3]

    With positions (B, n): q (B, H, n, D) holds the queries of those places only, o is (B, H, n, Dv).
    Raises TypeError, ValueError as `accept` does.
    """
    dtype = v.dtype if isinstance(v, torch.Tensor) else None
    q, k, v = accept(q, k, v, kernel, T=None if positions is None else positions.shape[-1])
    weights = causal_weights(q, k, kernel, positions)  # (B, H, T or n, T)
    return (weights @ v / (weights.sum(-1, keepdim=True) + EPS)).to(dtype)


def causal_weights(q, k, kernel, positions=None):
    """sim(q_i, k_j), 0 for j > i: q (B, H, n, D), k (B, H, T, D) -> (B, H, n, T). Not yet normalised."""
    if positions is None:
        return kernel.scores(q, k).tril()
    seen = torch.arange(k.shape[2], device=k.device) <= positions.unsqueeze(-1)  # (B, n, T)
    return kernel.scores(q, k) * seen.unsqueeze(1)

# %% 2. Linear: the textbook form
# Sums instead of meetings: one cumulative sum over time of φ(k_j) v_jᵀ. No T², but every prefix is written out,
# P·Dv = 8,704 numbers a token: linear in T, and yet the slowest form at the lengths of the table. Read it; do not use it.
@without_autocast
def linear_attention(q, k, v, kernel):
    """q, k (B, H, T, D), v (B, H, T, Dv) -> o (B, H, T, Dv), in memory T·P·Dv. [P 3, K 3.2]"""
    dtype = v.dtype if isinstance(v, torch.Tensor) else None
    q, k, v = accept(q, k, v, kernel)
    phi_q, phi_k = kernel.features(q), kernel.features(k)  # (B, H, T, P)
    S = torch.einsum("bhtp,bhtd->bhtpd", phi_k, v).cumsum(2)  # (B, H, T, P, Dv)
    num = torch.einsum("bhtp,bhtpd->bhtd", phi_q, S)
    den = (phi_q * phi_k.cumsum(2)).sum(-1, keepdim=True)  # (B, H, T, 1)
    return (num / (den + EPS)).to(dtype)

# %% 3. Recurrent: one token at a time
# The prefix need not be written out if it is used at once. This is how a trained model speaks: constant time and
# memory per token, however long the context. For training it is serial, one tiny product after another.
@without_autocast
def recurrent_step(q, k, v, kernel, state=None):
    """One token: q, k (B, H, D), v (B, H, Dv), state or None -> o (B, H, Dv) and the next State. [K 3.3]"""
    dtype = v.dtype if isinstance(v, torch.Tensor) else None
    q, k, v = (x.unsqueeze(2) if isinstance(x, torch.Tensor) and x.ndim == 3 else x for x in (q, k, v))
    q, k, v = (x.squeeze(2) for x in accept(q, k, v, kernel, state))
    phi_q, phi_k = kernel.features(q), kernel.features(k)  # (B, H, P)
    S, z = phi_k.unsqueeze(-1) * v.unsqueeze(-2), phi_k
    if state is not None:
        S, z = state.S + S, state.z + z
    num = (phi_q.unsqueeze(-2) @ S).squeeze(-2)  # (B, H, Dv)
    den = (phi_q * z).sum(-1, keepdim=True)
    return (num / (den + EPS)).to(dtype), State(S, z)


@without_autocast
def recurrent_attention(q, k, v, kernel, state=None, return_state=False):
    """The recurrence over T tokens: shapes as in `quadratic_attention`; (o, State) with return_state."""
    dtype = v.dtype if isinstance(v, torch.Tensor) else None
    q, k, v = accept(q, k, v, kernel, state)
    outputs = []
    for t in range(q.shape[2]):
        o, state = recurrent_step(q[:, :, t], k[:, :, t], v[:, :, t], kernel, state)
        outputs.append(o)
    o = torch.stack(outputs, dim=2).to(dtype)  # (B, H, T, Dv)
    return (o, state) if return_state else o

# %% 4. Chunked: quadratic where that is cheap, a state for the rest
# Cut T into chunks of C. Inside a chunk the quadratic form is one good matrix product; all earlier chunks come in
# through S. Prefixes are written out T/C times instead of T, and all work is matrix products. Three ideas keep it short:
#
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


def with_ones(v):
    """v (..., Dv) -> [v, 1, ...] (..., V), V the next multiple of 8."""
    return F.pad(v, (0, 8 - v.shape[-1] % 8), value=1.0)

# %% Features, laid out for a chunk
# The features of 01 in the same order, but with time as the last dimension, (rows, P, c): each rotation of x is then
# a run of rows, and all products are one multiplication along memory. On a CPU that takes half the time of the
# row layout, a quarter of the matrix product that reads it; so the backward pass computes features again. Storing them
# for autograd, 136 numbers a token where q has 16, is what makes long sequences slow.
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

# %% The forward sweep: four steps a group
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
        # 2. Everything before: the state, read by φ(q); then the chunk joins it (the last: only if somebody goes on).
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
        torch.add(num[..., Dv : Dv + 1], EPS, out=inv).reciprocal_()
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


def parts(q, C):
    """(times, C, G) of the parts of q (N, T, D) that one sweep takes: whole groups of G chunks; whole chunks; the rest."""
    T, tokens = q.shape[1], 2**16 if q.is_cuda else GROUP * torch.get_num_threads()
    G = max(1, tokens // (len(q) * C))
    groups, chunks = T - T % (G * C), T - T % C
    cuts = (0, groups, C, G), (groups, chunks, C, (chunks - groups) // C), (chunks, T, T - chunks, 1)
    return [(slice(start, end), c, g) for start, end, c, g in cuts if start < end]


class ChunkedAttention(torch.autograd.Function):
    """The two sweeps as one differentiable operation, a few heads at a time so that a group stays in cache."""

    @staticmethod
    def forward(ctx, q, k, v, S, coefficients, C, keep):
        (N, T, D), o, inverse = q.shape, torch.empty_like(v), torch.empty_like(v[..., :1])
        past, final, chunks = None, [], math.ceil(T / C)
        if any(ctx.needs_input_grad) and (chunks > 1 or S is not None):
            past = v.new_empty(chunks, N, count_features(coefficients, D), with_ones(v[:1, :1]).shape[-1])
            past[0] = 0
        sweeps = [(g, *part) for g in head_groups(q) for part in parts(q[g], C)]
        for g, times, c, G in sweeps:
            if times.start == 0:
                state = None if S is None else S[g].clone()
            before = None if past is None else past[times.start // C :, g][: (times.stop - times.start) // c]
            inputs = (x[g, times] for x in (q, k, v, o, inverse))
            state = forward_sweep(*inputs, before, state, keep or times.stop < T, coefficients, c, G)
            final += [state] if times.stop == T else []
        ctx.save_for_backward(q, k, v, o, inverse, past)
        ctx.rest = sweeps, S is not None, coefficients, C
        return o, torch.cat(final) if keep else None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, dS):
        (q, k, v, o, inverse, past), (sweeps, started, coefficients, C) = ctx.saved_tensors, ctx.rest
        grads, first = [torch.empty_like(x) for x in (q, k, v)], []
        for g, times, c, G in reversed(sweeps):
            if times.stop == q.shape[1]:
                R = None if dS is None else dS[g].clone()
            before = None if past is None else past[times.start // C :, g][: (times.stop - times.start) // c]
            inputs = (x[g, times] for x in (q, k, v, o, inverse))
            R = backward_sweep(*inputs, before, R, do[g, times], [x[g, times] for x in grads], coefficients, c, G)
            first += [R] if times.start == 0 else []
        return *grads, torch.cat(first[::-1]) if started else None, None, None, None

# %% The chunk of least cost
# A short chunk spends its time on states and on calls, a long one on weights that the mask throws away. Per token and
# head, in FLOPs: 2C(D + V) inside and 4PV through the state. What is not a matrix product is charged at the ratio of
# the two rates (an element-wise pass reaches about 1/20 of the FLOP rate of a product). More threads share all this,
# but not the calls: two or three a chunk for the state. (Those of a group are the same for every C: a group is so many
# tokens and heads that its features fit in a core's cache.)
PASS, STEP, TOGETHER, GROUP = 20, 4e6, 16, 1024  # FLOPs an element-wise step, a chunk; heads, and tokens of a group, a thread


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


def head_groups(q):
    """Slices of N that keep a chunk in each core's cache; all of N at once on a GPU."""
    N, together = len(q), TOGETHER * torch.get_num_threads()
    return [slice(None)] if q.is_cuda else [slice(n, n + together) for n in range(0, N, together)]


@torch.compiler.disable  # torch.compile cannot follow products written into reserved room, and would gain nothing here
@without_autocast
def chunked_attention(q, k, v, kernel, state=None, return_state=False, chunk_size=None):
    """q, k (B, H, T, D), v (B, H, T, Dv), State or None -> o (B, H, T, Dv), or (o, State) with return_state.

    Any T. Memory beyond inputs and outputs: one state a chunk. Raises as `accept`; ValueError for chunk_size < 1.
    """
    dtype = v.dtype if isinstance(v, torch.Tensor) else None
    q, k, v = accept(q, k, v, kernel, state)
    coefficients, (B, H, T, _), Dv = kernel.coefficients, q.shape, v.shape[-1]
    if coefficients is None:  # sim = φ(q)·φ(k): the linear polynomial of the features, √D undoing that of s
        q, k = kernel.features(q), kernel.features(k)
        coefficients = (0.0, math.sqrt(q.shape[-1]), 0.0)
    D, P, V = q.shape[-1], kernel.num_features, Dv + 8 - Dv % 8
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"chunk_size must be a positive integer or None, got {chunk_size!r}")
    C = min(T, chunk_size or best_chunk(B * H, T, D, V, P))
    S = None
    if state is not None:  # z becomes the columns of S that belong to the ones
        S = torch.cat([state.S, state.z.unsqueeze(-1).expand(-1, -1, -1, V - Dv)], dim=-1).flatten(0, 1).to(q.dtype)
    o, S = ChunkedAttention.apply(*(x.flatten(0, 1) for x in (q, k, v)), S, coefficients, C, return_state)
    o = o.unflatten(0, (B, H)).to(dtype)
    if not return_state:
        return o
    S = S.unflatten(0, (B, H))  # (B, H, P, V)
    return o, State(S[..., :Dv], S[..., Dv])


@torch.compiler.assume_constant_result  # torch.compile cannot trace an import: it asks once and keeps the answer
def has_triton_form():
    """Whether the GPU kernels are in sys.modules now; not without Triton, nor on a GPU older than it takes (Ampere)."""
    try:
        return bool(import_module("02_linear_attention_triton")) and torch.cuda.get_device_capability() >= (8, 0)
    except ImportError:
        return False


def attention(q, k, v, kernel, state=None, return_state=False):
    """What 03 calls: the fastest form at hand. Arguments and result as in `chunked_attention`."""
    if isinstance(q, torch.Tensor) and q.is_cuda and has_triton_form():
        gpu = sys.modules["02_linear_attention_triton"]
        if gpu.beyond_limits(q, k, v, kernel) is None:
            return gpu.triton_attention(q, k, v, kernel, state, return_state)
    return chunked_attention(q, k, v, kernel, state, return_state)

# %% Claims: all forms are one function, and a sequence can be cut anywhere
def example(kernel, T, B=2, H=3, Dv=5, seed=0):
    """Prepared, split q, k and v in float64, from normal projections, ready for gradients."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, B, T, H * kernel.dim, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        q, k = (y.unflatten(-1, (H, kernel.dim)).transpose(1, 2).contiguous() for y in kernel.double().prepare(*x))
    v = torch.randn(B, H, T, Dv, generator=generator, dtype=torch.float64)
    return [y.requires_grad_() for y in (q, k, v)]


def distance(found, expected):
    """‖found − expected‖ / ‖expected‖ over lists of tensors."""
    found, expected = (torch.cat([x.flatten() for x in y]) for y in (found, expected))
    return ((found - expected).norm() / expected.norm()).item()


def check_forms_agree():
    """Linear, recurrent and chunked equal the quadratic form, outputs and gradients, every kernel, within 1e-9."""
    forms = (linear_attention, recurrent_attention, functools.partial(chunked_attention, chunk_size=8))
    for name, kernel in kernels.all_kernels(4, heads=3).items():
        inputs = example(kernel, T=29)
        expected = quadratic_attention(*inputs, kernel)
        upstream = torch.randn_like(expected)
        gradients = torch.autograd.grad(expected, inputs, upstream)
        for form in forms:
            o = form(*inputs, kernel)
            error = max(distance([o], [expected]), distance(torch.autograd.grad(o, inputs, upstream), gradients))
            assert error < 1e-9, f"{name}: {form} is off by {error:.1e}"


def check_first_row_is_v0():
    """At position 0 there is one value to look at, so the output is v_0, whatever the kernel."""
    for name, kernel in kernels.all_kernels(16, heads=3).items():
        q, k, v = example(kernel, T=20)
        error = (chunked_attention(q, k, v, kernel)[:, :, 0] - v[:, :, 0]).abs().max()
        assert error < 1e-5, f"{name}: o_0 differs from v_0 by {error:.1e}"


def check_the_future_is_not_seen():
    """Other tokens from 13 on change nothing before 13."""
    kernel = kernels.ReBasedKernel(8, heads=3)
    q, k, v = example(kernel, T=30)
    others = [torch.cat([x[:, :, :13], y[:, :, 13:]], 2) for x, y in zip((q, k, v), example(kernel, 30, seed=1), strict=True)]
    for form in (quadratic_attention, linear_attention, recurrent_attention, chunked_attention):
        assert torch.equal(form(q, k, v, kernel)[:, :, :13], form(*others, kernel)[:, :, :13]), form.__name__


def check_cut_save_resume():
    """Cut at 11, write the state to a file, load it, go on with another form: the same output."""
    kernel = kernels.ReBasedKernel(16, heads=3)
    q, k, v = example(kernel, T=40)
    first, state = chunked_attention(*(x[:, :, :11] for x in (q, k, v)), kernel, return_state=True)
    file = io.BytesIO()
    torch.save(state._asdict(), file)  # a plain dict of tensors, so that loading needs no pickled code
    file.seek(0)
    state = State(**torch.load(file, weights_only=True))
    second = recurrent_attention(*(x[:, :, 11:] for x in (q, k, v)), kernel, state)
    assert distance([torch.cat([first, second], 2)], [quadratic_attention(q, k, v, kernel)]) < 1e-9
    return f"{state.S[0, 0].numel()} + {state.z[0, 0].numel()} numbers a head, at any T"


CHECKS = [check_forms_agree, check_first_row_is_v0, check_the_future_is_not_seen, check_cut_save_resume]

# %%
def main(argv=None):
    """The table, its reading, the figure, the checks; returns how many checks failed."""
    parser = argparse.ArgumentParser(description="02: one layer as four forms, predicted and measured (20 seconds)")
    parser.add_argument("--figure", type=kernels.writable, default="runs/02_linear_attention.png",
                        help="where to draw it (%(default)s)")
    parser.add_argument("--benchmark", action="store_true",
                        help="all forms and softmax, T from 256 to 65,536, forward and backward (15 minutes on one core)")
    parser.add_argument("--threads", type=int, choices=range(1, 257), metavar="N", help="threads of PyTorch (all cores)")
    options = kernels.parse_arguments(parser, argv)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    cost = import_module("02_linear_attention_cost")  # the tables: what each form costs
    (cost.benchmark if options.benchmark else cost.compare)(options.figure)
    return kernels.run_checks(CHECKS)


if __name__ == "__main__":
    if main():
        sys.exit(1)
