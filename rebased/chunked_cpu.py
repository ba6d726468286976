"""The chunked form, fast on a CPU.

Aim: the four steps of `chunked_attention` in 02_linear_attention.py at the speed of matrix products, with a backward
pass that keeps no features. Read 02 first: this file computes the same numbers, and where it gives up plainness a
comment says what that bought. (Percentages: one core, float32, B=1 H=4 T=4,096 D=16 Dv=64.)

You will learn
  1. one column of ones that makes numerator, normaliser, S and z one product;
  2. a backward pass that is the forward sweep run from the end, with a state R of its own;
  3. why features are cheaper to compute again than to keep, and how they are laid out to be cheap;
  4. how long a chunk should be, from a count of FLOPs and calls.

Equations, of one head, with w_ij = sim(q_i, k_j)
  forward      num_i = Σ_{j≤i} w_ij v_j,   den_i = Σ_{j≤i} w_ij,   o_i = num_i / den_i           [1, section 3]
  backward     δ_i = do_i·o_i,   dw_ij = (do_i·v_j − δ_i) / den_i,   dv_j = Σ_{i≥j} w_ij do_i / den_i
  later chunks R = Σ_i φ(q_i) [do_i, −δ_i]ᵀ / den_i,   dv_j += Rᵀφ(k_j),   dφ(k_j) += R [v_j, 1]ᵀ   [2, section 3.3.1]

Letters: as in 02. N = B·H, or as many of these heads as are worked on at once; C the length of a chunk; G chunks make
  a group; V the width of v with its columns of ones; do the gradient of o, and so for other letters.

References
  [1] Aksenov et al., Linear Transformers with Learnable Kernel Functions are Better In-Context Models, ACL 2024.
  [2] Katharopoulos et al., Transformers are RNNs, ICML 2020, arXiv 2006.16236: the gradient by sums from both ends.
  [3] Hua et al., Transformer Quality in Linear Time, ICML 2022, arXiv 2202.10447: chunks.
"""

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from rebased import EPS
from rebased.autograd import first_order_only

# The weight of a pair
# A kernel reaches this file as three numbers, sim = c0 + c1·s + c2·s² with s = q·k/√D, or as None: then q and k are
# features already and sim = q·k. The sum of three terms would cancel near the lowest point of the parabola, where
# precision is all that is left; so the square is completed, c2·(s + c1/(2·c2))² + floor.
class Weight(NamedTuple):
    """u = scale·(q·k) + shift, and sim = u² + floor; sim = u if not squared."""

    scale: float
    shift: float
    floor: float
    squared: bool


def complete_square(coefficients, D):
    """(c0, c1, c2) of a polynomial of s = q·k/√D, or None for features -> Weight."""
    if coefficients is None:
        return Weight(1.0, 0.0, 0.0, False)
    c0, c1, c2 = coefficients
    return Weight(math.sqrt(c2 / D), c1 / (2 * math.sqrt(c2)), c0 - c1 * c1 / (4 * c2), True)


def count_features(coefficients, D):
    """P of the polynomial with these coefficients; D for features."""
    if coefficients is None:
        return D
    c0, c1, _ = coefficients
    P = D * (D + 1) // 2
    if c1:
        P += D
    if c0:
        P += 1
    return P


def masked_products(q, k, weight, out):
    """u = scale·(q·k) + shift where j <= i, else 0: q, k (rows, C, D) -> out (rows, C, C)."""
    shift = q.new_full((1, 1, 1), weight.shift)
    beta = 1 if weight.shift else 0  # with 0 the shift is not even read
    torch.baddbmm(shift, q, k.mT, beta=beta, alpha=weight.scale, out=out)
    return out.tril_()


def weigh(u, weight):
    """sim(u), in place; 0 stays where j > i."""
    if weight.squared:
        u.square_()
    if weight.floor:
        u.add_(weight.floor).tril_()
    return u


# A column of ones
# num = Σ w v and den = Σ w are the same sum, once of v and once of 1. So append a column of ones to v: one product
# gives [num, den], and one state holds [S, z]. Matrix products like widths that are multiples of 8: the column of
# ones is repeated up to the next one.
def padded_width(Dv):
    """V, the next multiple of 8 after Dv."""
    return Dv + 8 - Dv % 8


def with_ones(v):
    """v (..., Dv) -> [v, 1, ..., 1] (..., V)."""
    Dv = v.shape[-1]
    return F.pad(v, (0, padded_width(Dv) - Dv), value=1.0)


def join_state(S, z, V):
    """S (B, H, P, Dv), z (B, H, P) -> [S, z, ..., z] (B·H, P, V)."""
    ones = V - S.shape[-1]
    columns = z.unsqueeze(-1).expand(-1, -1, -1, ones)
    return torch.cat([S, columns], dim=-1).flatten(0, 1)


# Features, laid out for a chunk
# Kept for the backward pass, features would be 272 numbers a token where q and k have 32, and it is memory that makes
# long sequences slow. So they are computed again on the way back, and must be cheap to compute. Two things make them so.
#
# Time is the last dimension, (rows, P, C): a feature is a row of C numbers, and multiplying two coordinates of x
# multiplies two rows, along memory.
#
# Which pairs (a, b)? Multiply x by itself rotated by 0, 1, ..., D/2 places, and each pair of places meets once (at
# D/2, if D is even, twice: only the first half counts). All rotations are views of [x, x], so the 136 products of
# D = 16 are one multiplication of two views, without a list of indices.
#
# All is written into room that is reserved once: fresh memory for each group would cost more than the products.
@functools.lru_cache
def rotation_order(D):
    """For each product of the rotations, the place of its pair in torch.triu_indices(D, D), which is 01's order."""
    place = torch.empty(D, D, dtype=torch.int64)
    rows, columns = torch.triu_indices(D, D)
    place[rows, columns] = torch.arange(len(rows))
    place[columns, rows] = place[rows, columns]
    x = torch.arange(D)
    order = torch.cat([place[x, (x + turn) % D] for turn in range(D // 2 + 1)])
    return order[: len(rows)]


def reorder(S, coefficients, D, inwards):
    """S (N, P, V) from 01's order of features to that of the rotations, or back."""
    if coefficients is None:
        return S
    before = S.shape[1] - D * (D + 1) // 2  # the constant and the linear features stand first, in both orders
    order = torch.cat([torch.arange(before), before + rotation_order(D)])
    if not inwards:
        order = order.argsort()
    return S.index_select(1, order.to(S.device))


class PolynomialFeatures:
    """φ(x)ᵀ of chunks x (rows, C, D) for c0 + c1·s + c2·s², and how a gradient of it becomes one of x."""

    def __init__(self, x, coefficients, rows, C):
        c0, c1, c2 = coefficients
        D = x.shape[-1]
        self.D = D
        self.turns = D // 2 + 1
        self.P = count_features(coefficients, D)
        self.before = self.P - D * (D + 1) // 2  # constant and linear features
        self.scale = (2 * c2 / D) ** 0.25  # of x, so that a product of two is √(2·c2)·x_a·x_b/√D
        self.linear = math.sqrt(c1 / math.sqrt(D))
        one = torch.eye(D, dtype=x.dtype, device=x.device)
        twice = torch.cat([one, one]) * self.scale
        self.double = twice.expand(rows, -1, -1)  # (rows, 2D, D)
        back = [one.roll(turn, 0) for turn in range(self.turns)]
        self.back = torch.cat(back, dim=1).expand(rows, -1, -1)  # (rows, D, turns·D)
        self.room = x.new_empty(rows, self.before + self.turns * D, C)
        if c0:
            self.room[:, 0] = math.sqrt(c0)

    def gradient_room(self):
        """Zeros for a gradient of φ(x)ᵀ, to be written in [:, :P]; what stands behind stays 0."""
        return torch.zeros_like(self.room)

    def products(self, room):
        """The part of a room for the products, (rows, turns, D, C)."""
        return room[:, self.before :].unflatten(1, (self.turns, self.D))

    def rotations(self):
        """x rotated by 0, 1, ..., D/2 places: (rows, turns, D, C), a view."""
        return self.x_twice.unfold(1, self.D, 1).mT[:, : self.turns]

    def __call__(self, x):
        """x (rows, C, D) -> φ(x)ᵀ (rows, P, C), in the room: valid until the next call."""
        D = self.D
        # One product transposes x, doubles it and scales it.
        self.x_twice = torch.bmm(self.double, x.mT)  # (rows, 2D, C)
        x_once = self.x_twice[:, :D]
        if self.linear:
            linear = self.room[:, self.before - D : self.before]
            torch.mul(x_once, self.linear / self.scale, out=linear)
        products = self.products(self.room)
        torch.mul(x_once.unsqueeze(1), self.rotations(), out=products)  # each pair times √2 ...
        products[:, 0].mul_(math.sqrt(0.5))  # ... but x_a·x_a occurs once, not twice
        return self.room[:, : self.P]

    def pull_back(self, gradient):
        """A gradient of the last φ(x)ᵀ, in its gradient_room -> dx (rows, C, D). Both rooms are used up."""
        D = self.D
        if self.linear:
            linear = gradient[:, self.before - D : self.before] * self.linear
        # d(x_a x_b) = x_b dx_a + x_a dx_b: the factor at rest, and the rotated one, rotated back.
        g = self.products(gradient)
        g[:, 0].mul_(math.sqrt(0.5))
        dx = torch.mul(g, self.rotations(), out=self.products(self.room)).sum(1)  # (rows, D, C)
        g.mul_(self.x_twice[:, None, :D])
        dx.baddbmm_(self.back, g.flatten(1, 2))
        dx.mul_(self.scale)
        if self.linear:
            dx += linear
        return dx.mT


class GivenFeatures:
    """The same for q and k that are features already: nothing to compute, only views."""

    def __init__(self, x, rows, C):
        self.P = x.shape[-1]
        self.room = x.new_empty(rows, C, self.P)

    def gradient_room(self):
        return torch.empty_like(self.room).mT  # (rows, P, C)

    def __call__(self, x):
        return x.mT

    def pull_back(self, gradient):
        return gradient.mT


def make_features(x, coefficients, rows, C):
    """What computes φ of chunks of x, `rows` of them at once."""
    if coefficients is None:
        return GivenFeatures(x, rows, C)
    return PolynomialFeatures(x, coefficients, rows, C)


# The forward sweep: the four steps of 02, a group of chunks at a time
# Only S runs from chunk to chunk. All else is the same for every chunk, so G chunks are stacked on the heads and done
# by the same calls: G·N rows.
def groups_of(tensors, C, G):
    """Tensors (N, T, d) -> for each group, views (G, N, C, d) of its chunks."""
    cut = [x.unflatten(1, (-1, C)).transpose(0, 1).split(G) for x in tensors]
    return list(zip(*cut, strict=True))


def add_product(S, A, B):
    """S + A @ B, in place; A @ B if S is None."""
    if S is None:
        return torch.bmm(A, B)
    return S.baddbmm_(A, B)


def forward_sweep(tensors, past, S, keep, coefficients, C, G):
    """tensors = q, k (N, T, D), v, o (N, T, Dv), inverse (N, T, 1), with T a multiple of G·C; S (N, P, V) or None.

    Writes o and inverse = 1/den, and to past (T/C, N, P, V), unless it is None, the state before each chunk.
    Returns the state after T, written over S, or None unless `keep`.
    """
    q, _, v, _, _ = tensors
    N, T, Dv = v.shape
    last = T // C - 1
    weight = complete_square(coefficients, q.shape[-1])
    states = last > 0 or keep or S is not None  # one chunk alone needs no features at all
    if states:
        phi_q = make_features(q, coefficients, G * N, C)
        phi_k = make_features(q, coefficients, G * N, C)
    v1 = with_ones(v.new_empty(G, N, C, Dv))
    num = torch.empty_like(v1)
    u = q.new_empty(G * N, C, C)
    chunk = 0
    for q_g, k_g, v_g, o_g, inverse_g in groups_of(tensors, C, G):
        q_g = q_g.flatten(0, 1)  # (G·N, C, D)
        k_g = k_g.flatten(0, 1)
        v1[..., :Dv] = v_g
        # 1. Inside a chunk: the quadratic form.
        masked_products(q_g, k_g, weight, out=u)
        torch.bmm(weigh(u, weight), v1.flatten(0, 1), out=num.flatten(0, 1))
        # 2. Everything before: the state, read by φ(q). 4. Then the chunk joins it (the last: if somebody goes on).
        if states:
            features_q = phi_q(q_g).split(N)
            features_k = phi_k(k_g).split(N)
            for g in range(G):
                if S is not None:
                    num[g].baddbmm_(features_q[g].mT, S)
                    if past is not None:
                        past[chunk] = S
                if keep or chunk < last:
                    S = add_product(S, features_k[g], v1[g])
                chunk += 1
        # 3. One division: the normaliser is the column of ones.
        torch.add(num[..., Dv : Dv + 1], EPS, out=inverse_g).reciprocal_()
        torch.mul(num[..., :Dv], inverse_g, out=o_g)
    return S if keep else None


# The backward sweep: the same groups, from the end
# o = num/den depends on a weight through both: do_i·v_j is what w_ij would earn by adding v_j to the numerator, and
# δ_i = do_i·o_i what it costs by making the normaliser larger. So the gradient of num is do/den and that of den is
# −δ/den: side by side, [do, −δ]/den, they are the gradient of one product with [v, 1].
#
# What S was to the forward sweep, R = Σ_i φ(q_i) [do_i, −δ_i]ᵀ/den_i over *later* i is to this one. It is built up
# anew from the end, never by subtracting from a total, which would leave rounding errors where little should be left.
def backward_sweep(tensors, do, grads, past, R, coefficients, C, G):
    """The mirror of `forward_sweep`, with its tensors and past: do (N, T, Dv) -> writes dq, dk, dv = grads.

    R (N, P, V) is the gradient of the final state, or None; returned, written over it, is that of the initial state.
    past is None if there is one chunk and no initial state.
    """
    q, _, v, _, _ = tensors
    N, T, Dv = v.shape
    weight = complete_square(coefficients, q.shape[-1])
    states = past is not None or R is not None
    if states:
        phi_q = make_features(q, coefficients, G * N, C)
        phi_k = make_features(q, coefficients, G * N, C)
        gradient = phi_q.gradient_room()
        dphi = gradient[:, : phi_q.P]
        dphi_k = dphi.split(N)
    v1 = with_ones(v.new_empty(G, N, C, Dv))
    d1 = torch.zeros_like(v1)  # [do, −δ, 0, ...]/den
    dv1 = torch.empty_like(v1)
    v1_rows = v1.flatten(0, 1)  # the same memory, (G·N, C, V)
    d1_rows = d1.flatten(0, 1)
    dv1_rows = dv1.flatten(0, 1)
    u = q.new_empty(G * N, C, C)
    du = torch.empty_like(u)
    scale = 2 * weight.scale if weight.squared else weight.scale
    groups = groups_of([*tensors, do, *grads], C, G)
    for group in reversed(range(len(groups))):
        q_g, k_g, v_g, o_g, inverse_g, do_g, dq_g, dk_g, dv_g = groups[group]
        q_g = q_g.flatten(0, 1)
        k_g = k_g.flatten(0, 1)
        v1[..., :Dv] = v_g
        # 3. The division: the gradient of [num, den].
        do_over_den = torch.mul(do_g, inverse_g, out=d1[..., :Dv])
        products = torch.mul(do_over_den, o_g, out=dv1[..., :Dv])
        torch.sum(products, -1, out=d1[..., Dv]).neg_()
        # 1. Inside a chunk: w is computed again; dw = [do, −δ]/den·[v, 1], and where sim = u², du = 2u·dw.
        masked_products(q_g, k_g, weight, out=u)
        torch.bmm(d1_rows, v1_rows.mT, out=du)
        if weight.squared:
            du.mul_(u)
        else:
            du.tril_()
        torch.bmm(weigh(u, weight).mT, d1_rows, out=dv1_rows)
        dq = torch.bmm(du, k_g).mul_(scale)
        dk = torch.bmm(du.mT, q_g).mul_(scale)
        # 2. Everything after a chunk: φ(k) carries R into dv, and dφ(k) = R [v, 1]ᵀ. Then the chunk joins R.
        if states:
            features_q = phi_q(q_g).split(N)
            features_k = phi_k(k_g).split(N)
            for g in reversed(range(G)):
                if R is None:
                    dphi_k[g].zero_()
                else:
                    dv1[g].baddbmm_(features_k[g].mT, R)
                    torch.bmm(R, v1[g].mT, out=dphi_k[g])
                R = add_product(R, features_q[g], d1[g])
            dk += phi_k.pull_back(gradient)
        # Everything before a chunk: dφ(q) = S [do, −δ]ᵀ/den.
        if past is not None:
            before = past[group * G : (group + 1) * G].flatten(0, 1)  # (G·N, P, V)
            torch.bmm(before, d1_rows.mT, out=dphi)
            dq += phi_q.pull_back(gradient)
        dq_g[:] = dq.unflatten(0, (G, N))
        dk_g[:] = dk.unflatten(0, (G, N))
        dv_g[:] = dv1[..., :Dv]
    return R


# In parts, few heads at a time
GROUP = 1024  # tokens times heads of a group, a core ...
NUMBERS = 160 * 1024  # ... but no more than makes so many features: they fit in its cache
TOGETHER = 16  # heads a core: heads do not meet, so some can wait, and a chunk of few enough stays in its cache


class Part(NamedTuple):
    """A stretch of the sequence that one sweep takes: which tokens, which chunks, C and G."""

    times: slice
    chunks: slice
    C: int
    G: int


def parts(q, C, P):
    """q (N, T, D) cut into whole groups of G chunks, then the chunks left over, then the tokens left over."""
    N, T, _ = q.shape
    tokens = 2**16 if q.is_cuda else min(GROUP, NUMBERS // P) * torch.get_num_threads()
    G = max(1, tokens // (N * C))
    in_groups = T - T % (G * C)
    in_chunks = T - T % C
    found = []
    if in_groups > 0:
        found.append(Part(slice(0, in_groups), slice(0, in_groups // C), C, G))
    if in_chunks > in_groups:
        chunks = slice(in_groups // C, in_chunks // C)
        found.append(Part(slice(in_groups, in_chunks), chunks, C, chunks.stop - chunks.start))
    if T > in_chunks:
        found.append(Part(slice(in_chunks, T), slice(in_chunks // C, in_chunks // C + 1), T - in_chunks, 1))
    return found


def head_groups(N, device):
    """Slices of the N heads; all at once on a GPU."""
    if device.type == "cuda":
        return [slice(0, N)]
    together = TOGETHER * torch.get_num_threads()
    return [slice(n, min(n + together, N)) for n in range(0, N, together)]


def cut(tensors, heads, times):
    """The part of each tensor (N, T, ...)."""
    return [x[heads, times] for x in tensors]


class ChunkedAttention(torch.autograd.Function):
    """The two sweeps as one differentiable operation."""

    @staticmethod
    def forward(ctx, q, k, v, S, coefficients, C, keep):
        """q, k (N, T, D), v (N, T, Dv), S (N, P, V) or None -> o (N, T, Dv), the final S if `keep`, else None."""
        N, T, D = q.shape
        o = torch.empty_like(v)
        inverse = torch.empty_like(v[..., :1])
        P = count_features(coefficients, D)
        past = None
        chunks = math.ceil(T / C)
        if any(ctx.needs_input_grad) and (chunks > 1 or S is not None):
            past = v.new_empty(chunks, N, P, padded_width(v.shape[-1]))
            past[0] = 0
        tensors = q, k, v, o, inverse
        finals = []
        for heads in head_groups(N, q.device):
            state = None if S is None else S[heads].clone()
            for part in parts(q[heads], C, P):
                before = None if past is None else past[part.chunks, heads]
                go_on = keep or part.times.stop < T
                mine = cut(tensors, heads, part.times)
                state = forward_sweep(mine, before, state, go_on, coefficients, part.C, part.G)
            finals.append(state)
        ctx.save_for_backward(q, k, v, o, inverse, past)
        ctx.options = coefficients, C, S is not None
        return o, torch.cat(finals) if keep else None

    @staticmethod
    def backward(ctx, do, d_final):
        compute = functools.partial(gradients, ctx.options)
        found = first_order_only(compute, (do, d_final, *ctx.saved_tensors), instead=INSTEAD)
        return *found, None, None, None


INSTEAD = "quadratic_attention of 02_linear_attention.py, which autograd follows"


def gradients(options, do, d_final, q, k, v, o, inverse, past):
    """dq, dk, dv, and dS of the initial state or None."""
    coefficients, C, started = options
    P = count_features(coefficients, q.shape[-1])
    tensors = q, k, v, o, inverse
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    firsts = []
    for heads in head_groups(len(q), q.device):
        R = None if d_final is None else d_final[heads].clone()
        for part in reversed(parts(q[heads], C, P)):
            before = None if past is None else past[part.chunks, heads]
            mine = cut(tensors, heads, part.times)
            do_part = do[heads, part.times]
            R = backward_sweep(mine, do_part, cut(grads, heads, part.times), before, R, coefficients, part.C, part.G)
        firsts.append(R)
    return *grads, torch.cat(firsts) if started else None


# The chunk of least cost
# A short chunk spends its time on states and on calls, a long one on weights that the mask throws away. What is not a
# matrix product is charged as so many FLOPs as a product could do meanwhile; the three constants were fitted to timings
# on one core. More threads share all this, but not the calls: two or three a chunk for the state. (The calls of a group
# are the same for every C: a group is so many tokens and heads that its features fit in a core's cache.)
PASS = 20  # FLOPs that one element-wise step on one number costs as much as
MAKING = 9  # element-wise steps that a feature costs as much as, that of q and that of k together
STEP = 2e6  # FLOPs that the calls for one chunk cost as much as


def predicted_chunk_cost(C, N, T, D, V, P, threads):
    """FLOPs, or what takes as long, per token and head of the forward sweep."""
    chunks = math.ceil(T / C)
    inside = C * (2 * (D + V) + 4 * PASS)  # two products; scale, mask, square and floor
    if chunks == 1:
        return inside / threads  # no state, no features
    making = 0 if P == D else MAKING * P * PASS  # P = D: the features were handed in
    through_state = 4 * P * V * (1 - 1 / chunks)  # S is read by all chunks but the first, made of all but the last
    states = 3 * P * V * PASS / C  # S is read, written and kept, once a chunk
    calls = STEP / (C * min(N, TOGETHER * threads))
    return (inside + making + through_state + states) / threads + calls


def best_chunk(N, T, D, V, P, threads=None):
    """The power of two from 16 to 512 of least predicted cost; T itself if that is shorter."""
    if threads is None:
        threads = torch.get_num_threads()
    candidates = [min(C, T) for C in (16, 32, 64, 128, 256, 512)]
    return min(candidates, key=lambda C: predicted_chunk_cost(C, N, T, D, V, P, threads))


# The whole form
@torch.compiler.disable  # torch.compile cannot follow products written into reserved room, and would gain nothing
def chunked_attention(q, k, v, coefficients, S=None, z=None, return_state=False, chunk_size=None):
    """Causal attention with sim = c0 + c1·s + c2·s², s = q·k/√D, by chunks. [1, section 3; 3]

    q, k (B, H, T, D), v (B, H, T, Dv), of one type, float32 or float64; S (B, H, P, Dv) and z (B, H, P) are the state
    of what came before, or None; coefficients = (c0, c1, c2) with c0, c1 >= 0 and c2 > 0, or None: then q and k
    (B, H, T, P) are features, and sim = q·k. chunk_size None takes the chunk of least predicted cost.
    Returns o (B, H, T, Dv), or (o, S, z) with return_state.

    Features, and so P, are those of 01_kernels.py in their order. Memory beyond inputs and outputs: for the backward
    pass one state a chunk, else one state. First derivatives only: a second one raises RuntimeError.
    Nothing is checked here; `attention` of 02_linear_attention.py is the door that does.
    """
    B, H, T, D = q.shape
    Dv = v.shape[-1]
    V = padded_width(Dv)
    P = count_features(coefficients, D)
    if chunk_size is None:
        chunk_size = best_chunk(B * H, T, D, V, P)
    if S is not None:
        S = reorder(join_state(S, z, V), coefficients, D, inwards=True)
    q = q.flatten(0, 1)  # (N, T, D)
    k = k.flatten(0, 1)
    v = v.flatten(0, 1)
    with torch.autocast(q.device.type, enabled=False):
        o, S = ChunkedAttention.apply(q, k, v, S, coefficients, min(T, chunk_size), return_state)
    o = o.unflatten(0, (B, H))
    if not return_state:
        return o
    S = reorder(S, coefficients, D, inwards=False).unflatten(0, (B, H))  # (B, H, P, V)
    return o, S[..., :Dv], S[..., Dv]
