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
  N = B·H; S the state (B, H, P, Dv), z its normaliser (B, H, P); num, den the two sums whose quotient is o.
  q, k are prepared and split: `kernel.prepare` of 01 first, then (B, T, H·D) -> (B, H, T, D).

References: [P], [K] as in 01; chunks: Hua et al., Transformer Quality in Linear Time, ICML 2022, arXiv 2202.10447.

Run: python 02_linear_attention.py     (15 seconds: predicted and measured cost, runs/02_linear_attention.png, checks)
"""
# %%
import argparse
import functools
import io
import math
import sys
import time
from importlib import import_module
from typing import NamedTuple

import torch
import torch.nn.functional as F

kernels = import_module("01_kernels")  # a name that starts with a digit cannot follow `import`

EPS = 1e-12  # added to every normaliser; 01 shows why no larger: at 1e-5 the first row misses v_0 by up to .79

# %% The state
# All that the past can still say: S = Σ φ(k_j) v_jᵀ and z = Σ φ(k_j). At D = 16, Dv = 64 it is 35 KB per head
# in float32, the size of 109 keys and values of a softmax cache. Sums over 64k tokens overflow half precision, so
# it is float32 at least, whatever the inputs are. It is a value: keep it, copy it, save it, go on from it twice.
class State(NamedTuple):
    """S (B, H, P, Dv) and z (B, H, P), float32 or float64."""

    S: torch.Tensor
    z: torch.Tensor


def accept(q, k, v, kernel, state=None, T=None):
    """Check shapes and types; return q, k, v as float32 (float64 if one of them is). T: the keys' length.

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
# P·Dv = 8,704 numbers a token: linear in T, and yet the slowest form here. Read it once; do not run it.
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
# through S. Prefixes are written out T/C times instead of T, and all work is matrix products. Two ideas keep it short:
#
# - A column of ones appended to v makes num and den one product, and z one more column of S. (BLAS likes widths
#   that are multiples of 16: the column is repeated to the next one.)
# - A similarity that is no polynomial of s (elu, element-wise) is the *linear* polynomial of its features:
#   sim = φ(q)·φ(k). So one routine serves every kernel; it knows (c0, c1, c2) and nothing else.
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
    """u = scale·(q·k) + shift: q, k (N, C, D) -> out (N, C, C)."""
    torch.bmm(q * weight.scale, k.mT, out=out)
    return out.add_(weight.shift) if weight.shift else out


def weigh(u, weight):
    """sim(u) below the diagonal, 0 above, in place."""
    if weight.square:
        u.square_()
    return (u.add_(weight.floor) if weight.floor else u).tril_()

# %% Features, laid out for a chunk
# The features of 01 in the same order, with time as the last dimension, (N, P, C): each rotation of x is then a run
# of consecutive rows and each product runs along memory. On a CPU that is ten times as fast as the row layout and
# costs a fifth of the matrix product that reads it; as it is that cheap, the backward pass computes it again.
def chunk_features(x, coefficients, out):
    """φ(x)ᵀ: x (N, C, D) -> out (N, P, C)."""
    (c0, c1, c2), D, row = coefficients, x.shape[-1], 0
    if c0:
        out[:, 0], row = math.sqrt(c0), 1
    if c1:
        torch.mul(x.mT, math.sqrt(c1 / math.sqrt(D)), out=out[:, row : row + D])
        row += D
    if c2:
        twice = torch.cat([x.mT, x.mT], dim=1).mul_((c2 / D) ** 0.25)  # (N, 2D, C)
        left = twice[:, :D]
        for turn in range(D // 2 + 1):
            rows = min(D, out.shape[1] - row)  # the last rotation is half a one when D is even
            torch.mul(left[:, :rows], twice[:, turn : turn + rows], out=out[:, row : row + rows])
            left = twice[:, :D] * math.sqrt(2) if turn == 0 else left
            row += rows
    return out


def chunk_features_backward(x, grad, coefficients):
    """The gradient of x (N, C, D), from the gradient of φ(x)ᵀ (N, P, C)."""
    (c0, c1, c2), D, row = coefficients, x.shape[-1], 0
    row = 1 if c0 else 0
    dx = torch.zeros_like(x.mT)  # (N, D, C)
    if c1:
        dx += grad[:, row : row + D] * math.sqrt(c1 / math.sqrt(D))
        row += D
    if c2:
        scale = (c2 / D) ** 0.25
        twice = torch.cat([x.mT, x.mT], dim=1)
        d_twice = torch.zeros_like(twice)
        for turn in range(D // 2 + 1):  # product rule: d(x_a x_b) = x_b dx_a + x_a dx_b
            rows = min(D, grad.shape[1] - row)
            d_phi, factor = grad[:, row : row + rows], scale * scale * (math.sqrt(2) if turn else 1)
            d_twice[:, :rows].addcmul_(d_phi, twice[:, turn : turn + rows], value=factor)
            d_twice[:, turn : turn + rows].addcmul_(d_phi, twice[:, :rows], value=factor)
            row += rows
        dx += d_twice[:, :D] + d_twice[:, D:]
    return dx.mT

# %% The forward sweep: four steps a chunk
def forward_sweep(q, k, v, S, o, inverse, coefficients, C, keep):
    """q, k (N, T, D), v (N, T, Dv), S (N, P, V) or None -> the state after T, the list of states before each chunk.

    Writes o (N, T, Dv) and inverse = 1/den (N, T, 1). keep: "all" states, the "last" one, or None.
    """
    (N, T, D), Dv, weight = q.shape, v.shape[-1], complete_square(coefficients, q.shape[-1])
    U, PHI, past = q.new_empty(N, C, C), q.new_empty(N, num_rows(coefficients, D), C), []
    for t in range(0, T, C):
        qc, kc, v1 = q[:, t : t + C], k[:, t : t + C], with_ones(v[:, t : t + C])
        c = qc.shape[1]  # C, less in the last chunk
        u, phi = U[:, :c, :c], PHI[..., :c]
        past.append(S)
        # 1. Inside the chunk: the quadratic form.
        num = weigh(inner(qc, kc, weight, out=u), weight) @ v1  # (N, c, V)
        # 2. Everything before: the state, read by φ(q).
        if S is not None:
            num.baddbmm_(chunk_features(qc, coefficients, out=phi).mT, S)
        # 3. One division: the normaliser is the column of ones.
        inv = torch.add(num[..., Dv : Dv + 1], EPS).reciprocal_()
        torch.mul(num[..., :Dv], inv, out=o[:, t : t + C])
        inverse[:, t : t + C] = inv
        # 4. The chunk joins the state (not needed after the last one, unless somebody goes on from there).
        if keep or t + C < T:
            phi = chunk_features(kc, coefficients, out=phi)
            S = torch.bmm(phi, v1) if S is None else torch.baddbmm(S, phi, v1)
    return S, past

# %% The backward sweep: the same chunks, from the end
# With num = Σ w v and den = Σ w, the gradients of the two are do/den and −δ/den, δ = do·o: side by side they are
# the gradient of one product with [v, 1]. What S was to the forward sweep, R = Σ_i φ(q_i) [do_i, −δ_i]ᵀ/den_i over
# *later* i is to this one; it is built up anew, never by subtracting from a total, which would leave rounding errors.
# Features are computed again from q and k: stored, they would be 136 numbers a token where q has 16.
def backward_sweep(q, k, v, do, o, inverse, past, R, grads, coefficients, C):
    """The mirror of `forward_sweep`: writes dq, dk, dv = grads; R (N, P, V), the gradient of the final state, or
    None -> the gradient of the initial state."""
    (N, T, D), Dv, weight = q.shape, v.shape[-1], complete_square(coefficients, q.shape[-1])
    U, PHI = q.new_empty(2, N, C, C), q.new_empty(N, num_rows(coefficients, D), C)
    for i, t in reversed(list(enumerate(range(0, T, C)))):
        qc, kc, v1, oc = q[:, t : t + C], k[:, t : t + C], with_ones(v[:, t : t + C]), o[:, t : t + C]
        c, S = qc.shape[1], past[i]
        (u, du), phi = U[..., :c, :c], PHI[..., :c]
        # 3. The division: the gradient of [num, den].
        d1 = torch.zeros_like(v1)  # (N, c, V)
        torch.mul(do[:, t : t + C], inverse[:, t : t + C], out=d1[..., :Dv])
        torch.sum(d1[..., :Dv] * oc, -1, out=d1[..., Dv]).neg_()
        # 1. Inside the chunk: w is computed again. sim = u², so du = 2u·dw.
        inner(qc, kc, weight, out=u)
        torch.bmm(d1, v1.mT, out=du)
        du = (du.mul_(u) if weight.square else du).tril_()
        dv = weigh(u, weight).mT @ d1
        scale = weight.scale * (2 if weight.square else 1)
        dq, dk = (du @ kc).mul_(scale), (du.mT @ qc).mul_(scale)
        # 2. Everything before: dφ(q) = [do, −δ]/den Sᵀ.
        if S is not None:
            torch.bmm(S, d1.mT, out=phi)
            dq += chunk_features_backward(qc, phi, coefficients)
        # 4. Everything after: dφ(k) = [v, 1] Rᵀ, and φ(k) carries R into dv.
        if R is not None:
            torch.bmm(R, v1.mT, out=phi)
            dk += chunk_features_backward(kc, phi, coefficients)
            dv.baddbmm_(chunk_features(kc, coefficients, out=phi).mT, R)
        for grad, part in zip(grads, (dq, dk, dv[..., :Dv]), strict=True):
            grad[:, t : t + C] = part
        if S is not None:
            phi = chunk_features(qc, coefficients, out=phi)
            R = torch.bmm(phi, d1) if R is None else torch.baddbmm(R, phi, d1)
    return R


def with_ones(v):
    """v (N, C, Dv) -> [v, 1, ...] (N, C, V), V the next multiple of 16."""
    return F.pad(v, (0, 16 - v.shape[-1] % 16), value=1.0)


def num_rows(coefficients, D):
    """P of the polynomial with these coefficients."""
    c0, c1, c2 = coefficients
    return bool(c0) + bool(c1) * D + bool(c2) * D * (D + 1) // 2


class ChunkedAttention(torch.autograd.Function):
    """The two sweeps as one differentiable operation, a few heads at a time so that the chunk stays in cache."""

    @staticmethod
    def forward(ctx, q, k, v, S, coefficients, C, keep):
        o, inverse = torch.empty_like(v), torch.empty_like(v[..., :1])
        groups = head_groups(q, C)
        sweeps = [
            forward_sweep(q[g], k[g], v[g], None if S is None else S[g], o[g], inverse[g], coefficients, C, keep)
            for g in groups
        ]
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(q, k, v, o, inverse)
            ctx.past, ctx.rest = [past for _, past in sweeps], (coefficients, C, groups)
        return o, torch.cat([final for final, _ in sweeps]) if keep else None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, dS):
        (q, k, v, o, inverse), (coefficients, C, groups) = ctx.saved_tensors, ctx.rest
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        first = [
            backward_sweep(q[g], k[g], v[g], do[g], o[g], inverse[g], past, None if dS is None else dS[g],
                           [grad[g] for grad in grads], coefficients, C)
            for g, past in zip(groups, ctx.past, strict=True)
        ]
        return *grads, torch.cat(first) if ctx.needs_input_grad[3] else None, None, None, None

# %% The chunk of least cost
# A short chunk spends its time on states and on calls, a long one on weights that the mask throws away. Per token and
# head, in FLOPs: 2C(D + V) inside and 4PV through the state. What is not a matrix product is charged at the ratio of
# the two rates (an element-wise pass reaches about 1/20 of the FLOP rate of a product), and every chunk pays for its
# thirty calls. `chunk_size=None` takes the least sum.
PASS, CALLS, CACHE = 20, 10e6, 2**17  # FLOPs an element-wise step; FLOPs the calls of a chunk; weights held in cache


def predicted_chunk_cost(C, N, T, D, V, P):
    """FLOPs, or what takes as long, per token and head of the forward sweep."""
    chunks, together = math.ceil(T / C), min(N, max(1, CACHE // C**2))
    inside = C * (2 * (D + V) + 4 * PASS)
    through_state = (4 * P * V + 3 * P * PASS) * (1 - 1 / chunks)
    return inside + through_state + CALLS / (together * C)


def best_chunk(N, T, D, V, P):
    """The power of two from 16 to 512 of least predicted cost; T itself if that is shorter."""
    candidates = [min(C, T) for C in (16, 32, 64, 128, 256, 512)]
    return min(candidates, key=lambda C: predicted_chunk_cost(C, N, T, D, V, P))


def head_groups(q, C):
    """Slices of N that keep a chunk's weights in each core's cache; all of N at once on a GPU."""
    N = q.shape[0]
    together = N if q.is_cuda else max(1, CACHE // C**2) * torch.get_num_threads()
    return [slice(n, n + together) for n in range(0, N, together)]


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
    D, P, V = q.shape[-1], num_rows(coefficients, q.shape[-1]), with_ones(v[:1, :1, :1]).shape[-1]
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


def attention(q, k, v, kernel, state=None, return_state=False):
    """What 03 calls: the fastest form at hand. Arguments and result as in `chunked_attention`."""
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

# %% What each form must cost, before it is timed
# Per head. FLOPs are multiplications and additions; bytes are what cannot stay in cache: every pass of the quadratic
# form over its T² weights, every prefix of the linear one, the state of the recurrent one at each token.
def predicted_cost(form, T, D, Dv, P):
    """(FLOPs, bytes moved, bytes held, calls) of one head, float32, forward."""
    if form == "quadratic":
        return 2 * T * T * (D + Dv), 4 * 9 * T * T, 4 * 3 * T * T, 10
    if form == "linear":
        return 4 * T * P * Dv, 4 * 4 * T * P * Dv, 4 * 3 * T * P * Dv, 10
    if form == "recurrent":
        return 4 * T * P * Dv, 4 * 5 * T * P * Dv, 4 * P * Dv, 25 * T
    C = best_chunk(1, T, D, Dv + 16, P)
    moved = 4 * T * (2 * D + 2 * Dv) + 4 * 2 * P * Dv * T // C
    return T * (4 * P * Dv + 2 * C * (D + Dv)), moved, 4 * P * Dv * 2, 40 * T // C


def machine_speed():
    """(FLOP/s of a matrix product, bytes/s of a copy, seconds of an empty call) of this machine, now."""
    a, b = torch.randn(1024, 1024), torch.randn(2**24)
    tiny = torch.zeros(1)
    return 2 * 1024**3 / seconds(lambda: a @ a), 8 * 2**24 / seconds(lambda: b.clone()), seconds(lambda: tiny + 1)


def seconds(call, repeats=5):
    """Median time of a call, the first one not counted."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2]


# %% The table and the figure
FORMS = {
    "quadratic": quadratic_attention,
    "linear": linear_attention,
    "recurrent": recurrent_attention,
    "chunked": chunked_attention,
}
B, H, D, DV = 1, 4, 16, 64


@torch.no_grad()
def measure(lengths):
    """Rows (form, T, FLOPs, bytes, predicted seconds, measured seconds or None where it would not fit)."""
    kernel, (flops_rate, byte_rate, call) = kernels.ReBasedKernel(D), machine_speed()
    for form, function in FORMS.items():
        for T in lengths:
            flops, moved, held, calls = predicted_cost(form, T, D, DV, kernel.num_features)
            predicted = H * (flops / flops_rate + moved / byte_rate) + calls * call
            q, k, v = torch.rand(2, B, H, T, D).unbind() + (torch.randn(B, H, T, DV),)
            fits = H * held < 2e9 and predicted < 1
            measured = seconds(lambda: function(q, k, v, kernel), 3) if fits else None  # noqa: B023
            yield form, T, H * flops, H * moved, predicted, measured


def print_table(rows):
    """Predicted and measured milliseconds, a line per form and length."""
    print(f"ReBased, float32, forward, B={B} H={H} D={D} Dv={DV}, {torch.get_num_threads()} threads.\n")
    print(f"{'form':12}{'T':>7}{'GFLOP':>10}{'GB moved':>10}{'predicted':>12}{'measured':>12}")
    for form, T, flops, moved, predicted, measured in rows:
        shown = f"{measured * 1e3:9.2f} ms" if measured else f"{'–':>12}"
        print(f"{form:12}{T:7,}{flops / 1e9:10.3f}{moved / 1e9:10.3f}{predicted * 1e3:9.2f} ms{shown}")
    print("– not run: it would hold more than 2 GB, or take more than a second.\n")


def draw(rows, path):
    """Time against T on logarithmic axes: points measured, lines predicted."""
    plt = kernels.pyplot()
    if plt is None:
        return
    figure, axis = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    for i, form in enumerate(FORMS):
        lengths, predicted, measured = zip(*[(row[1], row[4], row[5]) for row in rows if row[0] == form], strict=True)
        axis.plot(lengths, [x * 1e3 for x in predicted], ":", color=f"C{i}")
        axis.plot(lengths, [x and x * 1e3 for x in measured], "o-", color=f"C{i}", label=form)
    axis.set(xscale="log", yscale="log", xlabel="T", ylabel="ms, forward", title="one layer, four ways (dotted: predicted)")
    axis.legend(frameon=False)
    figure.savefig(path, dpi=120)
    print(f"figure: {path}\n")


def main(argv=None):
    """The table, its reading, the figure, the checks; returns how many checks failed."""
    parser = argparse.ArgumentParser(description="02: one layer as four forms, predicted and measured (15 seconds)")
    parser.add_argument("--figure", type=kernels.writable, default="runs/02_linear_attention.png",
                        help="where to draw it (%(default)s)")
    options = kernels.parse_arguments(parser, argv)
    rows = list(measure((128, 512, 2048, 8192)))
    print_table(rows)
    time_of = {(form, T): measured for form, T, *_, measured in rows if measured}
    for form in ("quadratic", "recurrent"):
        longest = max(T for name, T in time_of if name == form)
        ratio = time_of[form, longest] / time_of["chunked", longest]
        print(f"At T = {longest:,} the {form} form takes {ratio:.0f} times as long as the chunked one.")
    growth = time_of["chunked", 8192] / time_of["chunked", 2048]
    print(f"From 2,048 to 8,192 tokens, four times as many, the chunked form takes {growth:.1f} times as long: linear time.\n")
    draw(rows, options.figure)
    return kernels.run_checks(CHECKS)


if __name__ == "__main__":
    if main():
        sys.exit(1)
