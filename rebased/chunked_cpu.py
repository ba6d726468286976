"""The chunked form, fast on a CPU.

Aim: the four steps of `chunked_attention` in 02_linear_attention.py at the speed of matrix products, with a backward
pass that keeps no features. Read 02 first: this file computes the same numbers, and where it gives up plainness a
comment says what that bought (on one core, float32, B=1 H=4 T=4,096 D=16 Dv=64, unless said otherwise).

You will learn
  1. a column of ones that makes numerator, normaliser, S and z one product;
  2. a backward pass that is the forward sweep run from the end, with a state R of its own;
  3. why features are cheaper to compute again than to keep, and how they are laid out to be cheap;
  4. how long a chunk should be, from a count of FLOPs and calls.

Equations, of one head, with w_ij = sim(q_i, k_j)
  forward      num_i = Σ_{j≤i} w_ij v_j,   den_i = Σ_{j≤i} w_ij,   o_i = num_i / den_i           [1, section 3]
  backward     δ_i = do_i·o_i,   dw_ij = (do_i·v_j − δ_i) / den_i,   dv_j = Σ_{i≥j} w_ij do_i / den_i
  later chunks R = Σ_i φ(q_i) [do_i, −δ_i]ᵀ / den_i,   dv_j += Rᵀφ(k_j),   dφ(k_j) += R [v_j, 1]ᵀ   [2, section 3.3.1]

Letters: as in 02. N = B·H, or as many of these heads as are worked on at once; C the length of a chunk; G chunks make
  a group; V = Dv + 1 the width of [v, 1]; do the gradient of o, and so for other letters.

References
  [1] Aksenov et al., Linear Transformers with Learnable Kernel Functions are Better In-Context Models, ACL 2024.
  [2] Katharopoulos et al., Transformers are RNNs, ICML 2020, arXiv 2006.16236: the gradient by sums from both ends.
  [3] Hua et al., Transformer Quality in Linear Time, ICML 2022, arXiv 2202.10447: chunks.
"""

import functools
import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from rebased import EPS
from rebased.autograd import first_order_only, refuse_transforms, without_autocast

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
# num = Σ w v and den = Σ w are the same sum, once of v and once of 1. So append a 1 to every v: one product gives
# [num, den], and one state holds [S, z]. (To fill the width up to a multiple of 8 was measured to gain nothing.)
def with_ones(v):
    """v (..., Dv) -> [v, 1] (..., V), V = Dv + 1."""
    return F.pad(v, (0, 1), value=1.0)


def join_state(S, z):
    """S (B, H, P, Dv), z (B, H, P) -> [S, z] (B·H, P, V)."""
    return torch.cat([S, z.unsqueeze(-1)], dim=-1).flatten(0, 1)


# Features, laid out for a chunk
# Kept for the backward pass, features would be 272 numbers a token where q and k have 32, and it is memory that makes
# long sequences slow. So they are computed again on the way back, and must be cheap. Two things make them so.
#
# Time is the last dimension, (rows, P, C): a feature is a row of C numbers, and multiplying two coordinates of x
# multiplies two rows, along memory.
#
# Which pairs (a, b)? Multiply x by itself rotated by 0, 1, ..., D/2 places, and each pair of places meets once (at
# D/2, if D is even, twice: only the first half counts). All rotations are views of [x, x], so the 136 products of
# D = 16 are one multiplication of two views, without a list of indices. (Features made so take a fifth to an eighth of
# the time of rows of 136 that are gathered by index, as 01 has them.)
#
# As in 01, squares and the constant are larger by D units in the last place, so that no weight comes out below 0.
#
# All is written into room that is reserved once, as fresh memory for each group costs 5 %.
@functools.lru_cache
def rotation_order(D):
    """For each product of the rotations, the place of its pair in torch.triu_indices(D, D): the order of 01."""
    pairs = list(itertools.combinations_with_replacement(range(D), 2))  # (0, 0), (0, 1), ..., (1, 1), ...
    place = {pair: number for number, pair in enumerate(pairs)}
    order = []
    for turn in range(D // 2 + 1):
        for a in range(D):
            b = (a + turn) % D
            order.append(place[min(a, b), max(a, b)])
    return order[: len(pairs)]


def reorder(S, coefficients, D, inwards):
    """S (N, P, V) from 01's order of features to that of the rotations, or back."""
    if coefficients is None:
        return S
    before = S.shape[1] - D * (D + 1) // 2  # the constant and the linear features stand first, in both orders
    places = list(range(before)) + [before + place for place in rotation_order(D)]
    order = torch.tensor(places, device=S.device)
    if not inwards:
        order = order.argsort()
    return S.index_select(1, order)


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
        once = 1 + D * torch.finfo(x.dtype).eps
        self.square = math.sqrt(once / 2)  # of x_a·x_a: it occurs once, where the scale counts each pair twice
        if c0:
            self.room[:, 0] = math.sqrt(c0 * once)

    def gradient_room(self):
        """Zeros (rows, P or more, C) for a gradient of φ(x)ᵀ, to be written in [:, :P]; what stands behind stays 0."""
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
        products[:, 0].mul_(self.square)  # ... but x_a·x_a occurs once, not twice
        return self.room[:, : self.P]

    def pull_back(self, gradient):
        """A gradient of the last φ(x)ᵀ, in its gradient_room -> dx (rows, C, D). Both rooms are used up."""
        D = self.D
        if self.linear:
            linear = gradient[:, self.before - D : self.before] * self.linear
        # d(x_a x_b) = x_b dx_a + x_a dx_b: the factor at rest, and the rotated one, rotated back.
        g = self.products(gradient)
        g[:, 0].mul_(self.square)
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
        self.shape = (rows, C, self.P)
        self.new_zeros = x.new_zeros

    def gradient_room(self):
        return self.new_zeros(self.shape).mT  # (rows, P, C), so that pull_back gives rows along memory

    def __call__(self, x):
        return x.mT

    def pull_back(self, gradient):
        return gradient.mT


def make_features(x, coefficients, rows, C):
    """What computes φ of chunks like those of x (..., D), `rows` of them at once."""
    if coefficients is None:
        return GivenFeatures(x, rows, C)
    return PolynomialFeatures(x, coefficients, rows, C)


# What both sweeps need
# Only S runs from chunk to chunk. All else is the same for every chunk, so G chunks are stacked on the heads and done
# by the same calls, G·N rows at once. (Against G = 1 that takes a quarter off the time of both passes.)
class Part(NamedTuple):
    """A stretch of the sequence that one sweep takes: which tokens, which chunks, C and G."""

    times: slice
    chunks: slice
    C: int
    G: int


class Room:
    """Sizes, and memory for one group, reserved once for the whole sweep."""

    def __init__(self, q, v, coefficients, part, states):
        """q (N, T, D), v (N, T, Dv); states: whether features are needed at all."""
        self.N = len(q)
        self.rows = part.G * self.N
        self.Dv = v.shape[-1]
        self.weight = complete_square(coefficients, q.shape[-1])
        self.v1 = with_ones(v.new_empty(part.G, self.N, part.C, self.Dv))  # (G, N, C, V)
        self.u = q.new_empty(self.rows, part.C, part.C)
        if states:
            self.phi_q = make_features(q, coefficients, self.rows, part.C)
            self.phi_k = make_features(q, coefficients, self.rows, part.C)


def groups_of(tensors, part):
    """Tensors (N, T, d) -> for each group, views (G, N, C, d) of its chunks."""
    views = [x.unflatten(1, (-1, part.C)).transpose(0, 1).split(part.G) for x in tensors]
    return list(zip(*views, strict=True))


def add_product(S, A, B):
    """S + A @ B, in place; A @ B if S is None."""
    if S is None:
        return torch.bmm(A, B)
    return S.baddbmm_(A, B)


# The forward sweep: the four steps of 02, a group of chunks at a time
def forward_sweep(tensors, past, S, keep, coefficients, part):
    """tensors = q, k (N, T, D), v, o (N, T, Dv), inverse (N, T, 1), T a multiple of G·C; S (N, P, V) or None.

    Writes o and inverse = 1/den, and to past (T/C, N, P, V), unless it is None, the state before each chunk.
    Returns the state after T, written over S, or None unless `keep`.
    """
    q, _, v, _, _ = tensors
    groups = groups_of(tensors, part)
    one_chunk = len(groups) * part.G == 1
    states = keep or S is not None or not one_chunk  # one chunk alone needs no features
    room = Room(q, v, coefficients, part, states)
    num = torch.empty_like(room.v1)  # (G, N, C, V): numerator and normaliser side by side
    for group, (q_g, k_g, v_g, o_g, inverse_g) in enumerate(groups):
        q_g = q_g.flatten(0, 1)  # (G·N, C, D)
        k_g = k_g.flatten(0, 1)
        room.v1[..., : room.Dv] = v_g
        # 1. Inside a chunk: the quadratic form.
        u = masked_products(q_g, k_g, room.weight, out=room.u)
        weights = weigh(u, room.weight)
        torch.bmm(weights, room.v1.flatten(0, 1), out=num.flatten(0, 1))
        # 2 and 4. All chunks before, through the state; then the chunk joins it.
        if states:
            before = None if past is None else past[group * part.G :]
            is_last = group == len(groups) - 1
            S = read_and_join(S, q_g, k_g, room, num, before, join_last=keep or not is_last)
        # 3. One division: the normaliser is the column of ones.
        torch.add(num[..., room.Dv :], EPS, out=inverse_g).reciprocal_()
        torch.mul(num[..., : room.Dv], inverse_g, out=o_g)
    return S if keep else None


def read_and_join(S, q, k, room, num, past, join_last):
    """Steps 2 and 4 for each chunk of a group: num (G, N, C, V) += φ(q) S, then S += φ(k)ᵀ [v, 1]. Returns S.

    q, k (G·N, C, D). The state before each chunk is written to past (G or more, N, P, V), unless it is None. The last
    chunk joins S only if somebody goes on from there.
    """
    phi_q = room.phi_q(q).split(room.N)  # G times (N, P, C)
    phi_k = room.phi_k(k).split(room.N)
    for g in range(len(num)):
        if S is not None:
            num[g].baddbmm_(phi_q[g].mT, S)
            if past is not None:
                past[g] = S
        if join_last or g < len(num) - 1:
            S = add_product(S, phi_k[g], room.v1[g])
    return S


# The backward sweep: the same groups, from the end
# A weight w_ij moves o_i = num_i/den_i in two ways. It adds v_j to the numerator, and it makes the normaliser larger,
# which shrinks all of o_i: dw_ij = (do_i·v_j − do_i·o_i)/den_i. The second term is δ_i = do_i·o_i, the same for all j.
# So the gradient of num is do/den and that of den is −δ/den: side by side, [do, −δ]/den, they are the gradient of the
# one product with [v, 1]. (δ is taken from an o that was not rounded: where den is tiny, 1/den makes noise of any
# rounding.)
#
# What S was to the forward sweep, R = Σ_i φ(q_i) [do_i, −δ_i]ᵀ/den_i over *later* i is to this one. It is built up
# anew from the end, never by subtracting from a total, which would leave rounding errors where little should be left.
# The states S before each chunk were kept by the forward sweep, P·V numbers for C tokens; beside o and 1/den, that is
# all that is kept.
class BackwardRoom(Room):
    """And for d1 = [do, −δ]/den, dv1 = [dv, ...], du and dφ."""

    def __init__(self, q, v, coefficients, part, states):
        super().__init__(q, v, coefficients, part, states)
        self.d1 = torch.empty_like(self.v1)  # (G, N, C, V)
        self.dv1 = torch.empty_like(self.v1)
        self.du = torch.empty_like(self.u)
        if states:
            self.gradient = self.phi_q.gradient_room()
            self.dphi = self.gradient[:, : self.phi_q.P]  # (G·N, P, C)


def backward_sweep(tensors, do, grads, past, R, coefficients, part):
    """The mirror of `forward_sweep`, with its tensors and past: do (N, T, Dv) -> writes dq, dk, dv = grads.

    R (N, P, V) is the gradient of the final state, or None; returned, written over it, is that of the initial state.
    past is None if there is one chunk and no initial state.
    """
    q, _, v, _, _ = tensors
    states = past is not None or R is not None
    room = BackwardRoom(q, v, coefficients, part, states)
    groups = groups_of([*tensors, do, *grads], part)
    for group in reversed(range(len(groups))):
        q_g, k_g, v_g, o_g, inverse_g, do_g, dq_g, dk_g, dv_g = groups[group]
        q_g = q_g.flatten(0, 1)  # (G·N, C, D)
        k_g = k_g.flatten(0, 1)
        room.v1[..., : room.Dv] = v_g
        # 3. Through the division.
        divide_backward(do_g, o_g, inverse_g, room)
        # 1. Inside a chunk.
        dq, dk = inside_backward(q_g, k_g, room)
        # 4. What the chunk gave to later ones, through R.
        if states:
            R = join_backward(R, q_g, k_g, room)
            dk += room.phi_k.pull_back(room.gradient)
        # 2. What it read from earlier ones: dφ(q) = S [do, −δ]ᵀ/den.
        if past is not None:
            before = past[group * part.G : (group + 1) * part.G].flatten(0, 1)  # (G·N, P, V)
            torch.bmm(before, room.d1.flatten(0, 1).mT, out=room.dphi)
            dq += room.phi_q.pull_back(room.gradient)
        dq_g[:] = dq.unflatten(0, (part.G, room.N))
        dk_g[:] = dk.unflatten(0, (part.G, room.N))
        dv_g[:] = room.dv1[..., : room.Dv]
    return R


def divide_backward(do, o, inverse, room):
    """Step 3: do, o (G, N, C, Dv), inverse = 1/den (G, N, C, 1) -> [do, −δ]/den, in room.d1."""
    do_over_den = torch.mul(do, inverse, out=room.d1[..., : room.Dv])
    products = torch.mul(do_over_den, o, out=room.dv1[..., : room.Dv])  # dv1 is free yet
    torch.sum(products, -1, out=room.d1[..., room.Dv]).neg_()


def inside_backward(q, k, room):
    """Step 1: q, k (G·N, C, D) -> dq, dk; the weights' share of dv is written to room.dv1."""
    weight = room.weight
    d1 = room.d1.flatten(0, 1)  # (G·N, C, V)
    v1 = room.v1.flatten(0, 1)
    # The weights are computed again: to keep them would cost C numbers a token.
    u = masked_products(q, k, weight, out=room.u)
    dw = torch.bmm(d1, v1.mT, out=room.du)  # (do_i·v_j − δ_i)/den_i
    if weight.squared:
        du = dw.mul_(u)  # sim = u² + floor, so du = 2u·dw; u is 0 where j > i. The 2 comes at the end
        scale = 2 * weight.scale
    else:
        du = dw.tril_()
        scale = weight.scale
    torch.bmm(weigh(u, weight).mT, d1, out=room.dv1.flatten(0, 1))  # dv_j = Σ_i w_ij do_i/den_i
    dq = torch.bmm(du, k).mul_(scale)
    dk = torch.bmm(du.mT, q).mul_(scale)
    return dq, dk


def join_backward(R, q, k, room):
    """Step 4, chunk by chunk from the last: dv += φ(k)ᵀ R, dφ(k) = R [v, 1]ᵀ, and then R += φ(q) [do, −δ]ᵀ/den.

    Writes room.dphi and adds to room.dv1. Returns R. Leaves φ(q) and φ(k) in their rooms, for `pull_back`.
    """
    phi_q = room.phi_q(q).split(room.N)  # G times (N, P, C)
    phi_k = room.phi_k(k).split(room.N)
    dphi_k = room.dphi.split(room.N)
    for g in reversed(range(len(phi_q))):
        if R is not None:  # else nothing comes later, and dphi is 0 as it was made
            room.dv1[g].baddbmm_(phi_k[g].mT, R)
            torch.bmm(R, room.v1[g].mT, out=dphi_k[g])
        R = add_product(R, phi_q[g], room.d1[g])
    return R


# In parts, few heads at a time
# Two more things keep the work in a core's cache. A group is so many tokens and heads that its features fit. And heads
# do not meet, so some can wait: so many go at once that a chunk of theirs fits. (If 512 heads of 512 tokens go all at
# once, the forward pass takes 14 % longer.)
GROUP = 1024  # tokens times heads of a group, a core ...
NUMBERS = 160 * 1024  # ... but no more than have so many features
TOGETHER = 16  # heads, a core


def parts(q, C, P):
    """q (N, T, D) cut into whole groups of G chunks, then the chunks left over, then the tokens left over: Parts."""
    N, T, _ = q.shape
    tokens = 2**16 if q.is_cuda else min(GROUP, NUMBERS // P) * torch.get_num_threads()
    G = max(1, tokens // (N * C))
    in_groups = T - T % (G * C)
    in_chunks = T - T % C
    first_left = in_groups // C  # chunks
    last_left = in_chunks // C
    found = []
    if in_groups > 0:
        found.append(Part(slice(0, in_groups), slice(0, first_left), C, G))
    if in_chunks > in_groups:
        found.append(Part(slice(in_groups, in_chunks), slice(first_left, last_left), C, last_left - first_left))
    if T > in_chunks:
        found.append(Part(slice(in_chunks, T), slice(last_left, last_left + 1), T - in_chunks, 1))
    return found


def head_groups(N, device):
    """Slices of the N heads that go together; all at once on a GPU."""
    if device.type == "cuda":
        return [slice(0, N)]
    together = TOGETHER * torch.get_num_threads()
    return [slice(n, min(n + together, N)) for n in range(0, N, together)]


def cut(tensors, heads, times):
    """Views of these heads and tokens of each tensor (N, T, ...)."""
    return [x[heads, times] for x in tensors]


# One differentiable operation
class ChunkedAttention(torch.autograd.Function):
    """The two sweeps, as autograd sees them."""

    @staticmethod
    def forward(ctx, q, k, v, S, coefficients, C, keep):
        """q, k (N, T, D), v (N, T, Dv), S (N, P, V) or None -> o (N, T, Dv), the final S if `keep`, else None."""
        N, T, D = q.shape
        P = count_features(coefficients, D)
        o = torch.empty_like(v)
        inverse = torch.empty_like(v[..., :1])
        past = None
        chunks = math.ceil(T / C)
        if any(ctx.needs_input_grad) and (chunks > 1 or S is not None):
            past = v.new_empty(chunks, N, P, v.shape[-1] + 1)
            past[0] = 0
        finals = []
        for heads in head_groups(N, q.device):
            state = None if S is None else S[heads].clone()
            for part in parts(q[heads], C, P):
                tensors = cut((q, k, v, o, inverse), heads, part.times)
                before = None if past is None else past[part.chunks, heads]
                goes_on = keep or part.times.stop < T
                state = forward_sweep(tensors, before, state, goes_on, coefficients, part)
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
    """dq, dk, dv, and dS of the initial state, or None if there was none."""
    coefficients, C, started = options
    P = count_features(coefficients, q.shape[-1])
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    firsts = []
    with without_autocast(q.device):  # backward() may have been called inside of one
        for heads in head_groups(len(q), q.device):
            R = None if d_final is None else d_final[heads].clone()
            for part in reversed(parts(q[heads], C, P)):
                tensors = cut((q, k, v, o, inverse), heads, part.times)
                written = cut(grads, heads, part.times)
                before = None if past is None else past[part.chunks, heads]
                R = backward_sweep(tensors, do[heads, part.times], written, before, R, coefficients, part)
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
# torch.compile leaves it as it is: it would unroll every chunk and compile for minutes, anew for each length (measured:
# 102 s for 1,000 tokens, which then took a fifth less time).
@torch.compiler.disable
def chunked_attention(q, k, v, coefficients, S=None, z=None, return_state=False, chunk_size=None):
    """Causal attention with sim = c0 + c1·s + c2·s², s = q·k/√D, by chunks. [1, section 3; 3]

    q, k (B, H, T, D), v (B, H, T, Dv), of one type, float32 or float64; S (B, H, P, Dv) and z (B, H, P) are the state
    of what came before, or None; coefficients = (c0, c1, c2) with c0, c1 >= 0 and c2 > 0, or None: then q and k
    (B, H, T, P) are features, and sim = q·k. chunk_size None takes the chunk of least predicted cost.
    Returns o (B, H, T, Dv), or (o, S, z) with return_state.

    Features, and so P, are those of 01_kernels.py in their order. Memory beyond inputs and outputs: for the backward
    pass one state a chunk, else one state. First derivatives only: a second one, torch.func and torch.jit.trace raise
    RuntimeError.
    Nothing is checked here; `attention` of 02_linear_attention.py is the door that does.
    """
    refuse_transforms("chunked_attention or quadratic_attention of 02_linear_attention.py")
    B, H, T, D = q.shape
    Dv = v.shape[-1]
    if chunk_size is None:
        chunk_size = best_chunk(B * H, T, D, Dv + 1, count_features(coefficients, D))
    if S is not None:
        S = reorder(join_state(S, z).to(q.dtype), coefficients, D, inwards=True)
    q = q.flatten(0, 1)  # (N, T, D)
    k = k.flatten(0, 1)
    v = v.flatten(0, 1)
    with without_autocast(q.device):
        o, S = ChunkedAttention.apply(q, k, v, S, coefficients, min(T, chunk_size), return_state)
    o = o.unflatten(0, (B, H))
    if not return_state:
        return o
    S = reorder(S, coefficients, D, inwards=False).unflatten(0, (B, H))  # (B, H, P, V)
    return o, S[..., :Dv], S[..., Dv]
