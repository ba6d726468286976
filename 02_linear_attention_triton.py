"""02 · Linear attention on a GPU: the chunked form as kernels, forward and backward

Aim: run the four steps of `chunked_attention` on chip, so that φ(q) and φ(k) never touch memory and time grows with T.

You will learn
  1. why a GPU wants long chunks, and what that makes of the four steps;
  2. φ as a table, applied by two one-hot products; its gradient is the same two products, transposed;
  3. a backward pass through the normaliser, whose sums over later queries are the state kernel in reverse;
  4. how to test kernels without a GPU: interpret them, compile them for a card that is not there.

Equations, for sim = u² + floor with u = scale·q·k + shift (`complete_square` of 02)
  forward    o_i = Σ_j w_ij v_j / den_i,  den_i = Σ_j w_ij + ε;  earlier segments: S = Σ φ(k_j) v_jᵀ, z = Σ φ(k_j)
  backward   δ_i = do_i·o_i = Σ_j w_ij (do_i·v_j)/den_i,  dw_ij = (do_i·v_j − δ_i)/den_i,  du_ij = 2 u_ij dw_ij
             dq_i = scale Σ_j du_ij k_j,  dk_j = scale Σ_i du_ij q_i,  dv_j = Σ_i (w_ij/den_i) do_i
             later segments: R = Σ φ(q_i) do_iᵀ/den_i, r = −Σ φ(q_i) δ_i/den_i

Letters: as in 02; a *segment* is the chunk of 02, cut into *tiles*. On chip: [TILE, D], [TILE, DV], [F features, DV].
References: [P], [K] as in 01; tiles and δ: Dao, FlashAttention-2, arXiv 2307.08691.

Run: python 02_linear_attention_triton.py    (a minute; without a GPU: what the compiler made of the kernels, and checks
     in Triton's interpreter; with one: speed and memory against other forms; --figure PATH draws them)
"""
# %%
import argparse
import functools
import math
import os
import subprocess
import sys
from collections import namedtuple
from importlib import import_module

import torch
import torch.nn.functional as F

MISSING = "02_linear_attention_triton needs Triton (Linux: pip install triton==3.7.1); every other file runs without it"
try:
    import triton
    import triton.language as tl
except ImportError:
    raise (SystemExit if __name__ == "__main__" else ImportError)(MISSING) from None

kernels, linear = import_module("01_kernels"), import_module("02_linear_attention")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read by Triton when it is imported: kernels then run on a CPU

# %% Sizes
# The state of a head is 35 KB, the k and v of 218 tokens. With a chunk of 64 it would move eight times the bytes of
# q, k, v and o. So a segment has 512 tokens, met in tiles of 64: inside, a query meets (512 + 64)/2 keys on average.
SEGMENT, TILE, FEATURES = 512, 64, 32  # tokens a state, tokens a tile, rows of the state a step

# What the compiler must know. _PAD: a power of 2, at least 16, for a tensor core takes no less. STATE: numbers of a state:
# S, then z, then up to a multiple of 16 (alignment). TYPE, PRECISION: of the factors of a product; all sums are float32.
Sizes = namedtuple("Sizes", "D DV P D_PAD DV_PAD P_PAD STATE SEGMENT TILE F TYPE PRECISION EPS")


def sizes_for(D, Dv, P, dtype, segment=SEGMENT):
    """bfloat16 is multiplied as it is. float16 goes as tf32, with its 10 bits and a range that S does not overflow."""
    # float32 is multiplied as it is ("ieee"), off the tensor cores, where an H100 does 67 TFLOP/s and not 990: correct
    # to 1e-5, and slower by up to that factor. Operands of four bytes go in half tiles, or registers would not suffice.
    half = dtype != torch.bfloat16
    return Sizes(D, Dv, P, triton.next_power_of_2(max(16, D)), triton.next_power_of_2(max(16, Dv)),
                 -(-P // FEATURES) * FEATURES, -(-P * (Dv + 1) // 16) * 16, segment, TILE // 2 if half else TILE, FEATURES,
                 tl.float32 if half else tl.bfloat16, "ieee" if dtype == torch.float32 else "tf32", linear.EPS)

# %% φ as a table
# Every feature of 01 is a product of two coordinates, φ_f(x) = c_f · x[a_f] · x[b_f], where an index of −1 reads 1. On
# chip, coordinates are picked by a product with a one-hot matrix, exact and on the tensor cores. Padding has c = 0.
@functools.lru_cache
def feature_rows(coefficients, D):
    """[(a, b, c)] in the order of 01's `features`; its length is P."""
    (c0, c1, c2), root_d = coefficients, math.sqrt(D)
    rows = [(-1, -1, math.sqrt(c0))] if c0 else []
    rows += [(a, -1, math.sqrt(c1 / root_d)) for a in range(D)] if c1 else []
    for turn in range(D // 2 + 1):  # the rotations of 01; half of the last one if D is even
        c = math.sqrt(c2 / D * (2 if turn else 1))
        rows += [(a, (a + turn) % D, c) for a in range(D // 2 if 2 * turn == D else D)]
    return rows


@functools.lru_cache
def feature_table(coefficients, D, device):
    """float32 (3, P_PAD): the rows a, b and c."""
    rows = feature_rows(coefficients, D)
    return torch.tensor(rows + [(-1, -1, 0.0)] * (-len(rows) % FEATURES), device=device).T.contiguous()

# %% On chip: small parts
# Tensors are (N, T, size), N = B·H as in 02. Rows beyond T and columns beyond the size read 0; offsets can pass 2³¹.
@triton.jit
def load(x, n, t, T, SIZE: tl.constexpr, PADDED: tl.constexpr, TYPE: tl.constexpr):
    d, row = tl.arange(0, PADDED), n.to(tl.int64) * T + t
    return tl.load(x + row[:, None] * SIZE + d[None, :], mask=(t < T)[:, None] & (d < SIZE)[None, :], other=0.0).to(TYPE)


@triton.jit
def load_row(x, n, t, T):
    return tl.load(x + n.to(tl.int64) * T + t, mask=t < T, other=0.0)


@triton.jit
def store(x, n, t, T, values, SIZE: tl.constexpr, PADDED: tl.constexpr):
    d, row = tl.arange(0, PADDED), n.to(tl.int64) * T + t
    values = values.to(x.dtype.element_ty)
    tl.store(x + row[:, None] * SIZE + d[None, :], values, mask=(t < T)[:, None] & (d < SIZE)[None, :])


@triton.jit
def factors(x, table, f, sizes: tl.constexpr):
    """x [TILE, D] -> x[a_f], x[b_f] [TILE, F], c [F], and the one-hot matrices A, B [D, F]."""
    a, b, c = tl.load(table + f), tl.load(table + sizes.P_PAD + f), tl.load(table + 2 * sizes.P_PAD + f)
    d = tl.arange(0, sizes.D_PAD).to(tl.float32)
    A, B = (d[:, None] == a[None, :]).to(sizes.TYPE), (d[:, None] == b[None, :]).to(sizes.TYPE)
    xa = tl.dot(x, A, input_precision=sizes.PRECISION) + (a < 0).to(tl.float32)[None, :]
    xb = tl.dot(x, B, input_precision=sizes.PRECISION) + (b < 0).to(tl.float32)[None, :]
    return xa, xb, c[None, :], A, B


@triton.jit
def features_backward(dx, dphi, xa, xb, A, B, sizes: tl.constexpr):
    """dx + the gradient of x: the product rule; the one-hots carry each factor's share back to its column."""
    dx = tl.dot((dphi * xb).to(sizes.TYPE), tl.trans(A), dx, input_precision=sizes.PRECISION)
    return tl.dot((dphi * xa).to(sizes.TYPE), tl.trans(B), dx, input_precision=sizes.PRECISION)


@triton.jit
def load_state(states, slot, f, sizes: tl.constexpr):
    """Rows f of the state in a slot: S [F, DV] and z [F]."""
    d, states = tl.arange(0, sizes.DV_PAD), states + slot.to(tl.int64) * sizes.STATE
    mask = (f < sizes.P)[:, None] & (d < sizes.DV)[None, :]
    S = tl.load(states + f[:, None] * sizes.DV + d[None, :], mask=mask, other=0.0)
    return S, tl.load(states + sizes.P * sizes.DV + f, mask=f < sizes.P, other=0.0)

# %% Step 4 of 02 first: what a segment adds to the state
# In 02 the chunks follow each other. Here all segments sum their φ(k) vᵀ at once, a program for each and for each block
# of features, and a scan makes prefixes. Slot 0 holds the initial state, segment s goes into slot s + 1: after an
# *inclusive* scan slot s is what came before segment s, and the last slot is the final state. No shift, no subtraction.
# REVERSE is the mirror image: (x, y) is (q, do), slot 0 the gradient of the final state, the last segment comes first.
# S is summed transposed, [DV, F]: 64 rows are what Hopper's warpgroup instructions take.
@triton.jit
def state_kernel(x, y, inverse, delta, table, states, T, steps, slots, sizes: tl.constexpr, REVERSE: tl.constexpr):
    program, BLOCKS = tl.program_id(0), sizes.P_PAD // sizes.F
    f = program % BLOCKS * sizes.F + tl.arange(0, sizes.F)
    step, n = program // BLOCKS % steps, program // BLOCKS // steps
    first = (slots - 2 - step if REVERSE else step) * sizes.SEGMENT
    S, z = tl.zeros((sizes.DV_PAD, sizes.F), tl.float32), tl.zeros((sizes.TILE, sizes.F), tl.float32)
    for start in range(first, min(first + sizes.SEGMENT, T), sizes.TILE):
        t = start + tl.arange(0, sizes.TILE)
        xt = load(x, n, t, T, sizes.D, sizes.D_PAD, sizes.TYPE)
        yt = load(y, n, t, T, sizes.DV, sizes.DV_PAD, sizes.TYPE)
        xa, xb, c, _, _ = factors(xt, table, f, sizes)
        phi = (xa * xb * c).to(sizes.TYPE)
        if REVERSE:  # rows do/den and −δ/den
            scale = load_row(inverse, n, t, T)
            yt, ones = (yt * scale[:, None]).to(sizes.TYPE), -scale * load_row(delta, n, t, T)
        else:  # rows v and 1; 0 beyond T, where the constant feature is not 0
            ones = (t < T).to(tl.float32)
        S = tl.dot(tl.trans(yt), phi, S, input_precision=sizes.PRECISION)
        z += phi.to(tl.float32) * ones[:, None]
    d, states = tl.arange(0, sizes.DV_PAD), states + (n * slots + step + 1).to(tl.int64) * sizes.STATE
    tl.store(states + f[None, :] * sizes.DV + d[:, None], S, mask=(f < sizes.P)[None, :] & (d < sizes.DV)[:, None])
    tl.store(states + sizes.P * sizes.DV + f, tl.sum(z, 0), mask=f < sizes.P)

# %% The scan: prefix sums over the slots, in place; no atomics here or elsewhere, so two runs give the same bits
ROWS, COLUMNS = 16, 256  # slots at a time, so that sixteen loads are under way at once; numbers of a state a program


@triton.jit
def scan_kernel(states, steps, slots, STATE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    program, BLOCKS = tl.program_id(0), (STATE + COLUMNS - 1) // COLUMNS
    column = program % BLOCKS * COLUMNS + tl.arange(0, COLUMNS)
    states += (program // BLOCKS).to(tl.int64) * slots * STATE
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, steps + 1, ROWS):
        slot = (start + tl.arange(0, ROWS)).to(tl.int64)
        where, mask = slot[:, None] * STATE + column[None, :], (slot <= steps)[:, None] & (column < STATE)[None, :]
        x = tl.load(states + where, mask=mask, other=0.0)
        tl.store(states + where, tl.cumsum(x, 0) + total[None, :], mask=mask)
        total += tl.sum(x, 0)

# %% Steps 1 to 3: the output
# A program takes one tile of queries. `first` is the first segment with something before it: 1, or 0 with an initial
# state. With T ≤ 512 this is the quadratic form and nothing else, so one path serves every T.
# den sums the *rounded* weights, those that multiply v: then they add up to 1 exactly, and o_0 is v_0.
@triton.jit
def output_kernel(q, k, v, o, inverse, table, states, weight, T, slots, first, sizes: tl.constexpr):
    scale, shift, floor = weight
    tiles = tl.cdiv(T, sizes.TILE)
    n, start = tl.program_id(0) // tiles, tl.program_id(0) % tiles * sizes.TILE
    segment, i = start // sizes.SEGMENT, start + tl.arange(0, sizes.TILE)
    qt = load(q, n, i, T, sizes.D, sizes.D_PAD, sizes.TYPE)
    num, den = tl.zeros((sizes.TILE, sizes.DV_PAD), tl.float32), tl.zeros((sizes.TILE,), tl.float32)
    # 2. Everything before: the state, read by φ(q), F features at a time.
    if segment >= first:
        for block in range(0, sizes.P_PAD, sizes.F):
            f = block + tl.arange(0, sizes.F)
            xa, xb, c, _, _ = factors(qt, table, f, sizes)
            S, z = load_state(states, n * slots + segment, f, sizes)
            phi = (xa * xb * c).to(sizes.TYPE)
            num = tl.dot(phi, S.to(sizes.TYPE), num, input_precision=sizes.PRECISION)
            den += tl.sum(phi.to(tl.float32) * z[None, :], 1)
    # 1. Inside the segment: the quadratic form, tile by tile. (Keys beyond T come after every query.)
    for past in range(segment * sizes.SEGMENT, start + sizes.TILE, sizes.TILE):
        j = past + tl.arange(0, sizes.TILE)
        kt = load(k, n, j, T, sizes.D, sizes.D_PAD, sizes.TYPE)
        vt = load(v, n, j, T, sizes.DV, sizes.DV_PAD, sizes.TYPE)
        u = tl.dot(qt, tl.trans(kt), input_precision=sizes.PRECISION) * scale + shift  # [TILE, TILE]
        w = tl.where(i[:, None] >= j[None, :], u * u + floor, 0.0).to(sizes.TYPE)
        num = tl.dot(w, vt, num, input_precision=sizes.PRECISION)
        den += tl.sum(w.to(tl.float32), 1)
    # 3. One division. For the backward, 1/den is kept: 4 bytes a token.
    den = 1 / (den + sizes.EPS)
    store(o, n, i, T, num * den[:, None], sizes.DV, sizes.DV_PAD)
    tl.store(inverse + n.to(tl.int64) * T + i, den, mask=i < T)

# %% Backward, the queries
# The division couples all weights of a row: dw_ij = (do_i·v_j − δ_i)/den_i. In the first rows both terms are all but
# equal and 1/den is large (4.7e5 was seen), so δ must not carry the rounding of o: a first pass sums it from the same
# weights and the same do·v that it is subtracted from. 1/den is applied last, in float32.
@triton.jit
def query_kernel(q, k, v, do, dq, inverse, delta, table, states, weight, T, slots, first, sizes: tl.constexpr):
    scale, shift, floor = weight
    tiles = tl.cdiv(T, sizes.TILE)
    n, start = tl.program_id(0) // tiles, tl.program_id(0) % tiles * sizes.TILE
    segment, i = start // sizes.SEGMENT, start + tl.arange(0, sizes.TILE)
    qt = load(q, n, i, T, sizes.D, sizes.D_PAD, sizes.TYPE)
    dot = load(do, n, i, T, sizes.DV, sizes.DV_PAD, sizes.TYPE)
    inv = load_row(inverse, n, i, T)
    dqt, d = tl.zeros((sizes.TILE, sizes.D_PAD), tl.float32), tl.zeros((sizes.TILE,), tl.float32)
    for with_d in tl.static_range(2):  # first δ, then dq with it
        if segment >= first:
            for block in range(0, sizes.P_PAD, sizes.F):
                f = block + tl.arange(0, sizes.F)
                xa, xb, c, A, B = factors(qt, table, f, sizes)
                S, z = load_state(states, n * slots + segment, f, sizes)
                dphi = tl.dot(dot, tl.trans(S.to(sizes.TYPE)), input_precision=sizes.PRECISION)  # [TILE, F]
                if with_d:
                    dqt = features_backward(dqt, (dphi - d[:, None] * z[None, :]) * c, xa, xb, A, B, sizes)
                else:
                    d += tl.sum((xa * xb * c).to(sizes.TYPE).to(tl.float32) * dphi, 1)
        for past in range(segment * sizes.SEGMENT, start + sizes.TILE, sizes.TILE):
            j = past + tl.arange(0, sizes.TILE)
            kt = load(k, n, j, T, sizes.D, sizes.D_PAD, sizes.TYPE)
            vt = load(v, n, j, T, sizes.DV, sizes.DV_PAD, sizes.TYPE)
            u = tl.dot(qt, tl.trans(kt), input_precision=sizes.PRECISION) * scale + shift
            dw, seen = tl.dot(dot, tl.trans(vt), input_precision=sizes.PRECISION), i[:, None] >= j[None, :]  # do_i·v_j
            if with_d:
                du = tl.where(seen, (dw - d[:, None]) * u * (2 * scale), 0.0).to(sizes.TYPE)
                dqt = tl.dot(du, kt, dqt, input_precision=sizes.PRECISION)
            else:
                d += tl.sum(tl.where(seen, u * u + floor, 0.0).to(sizes.TYPE).to(tl.float32) * dw, 1)
        if not with_d:
            d *= inv
    store(dq, n, i, T, dqt * inv[:, None], sizes.D, sizes.D_PAD)
    tl.store(delta + n.to(tl.int64) * T + i, d, mask=i < T)

# %% Backward, the keys and values
# A tile of keys meets the later queries: those of later segments through R, the others tile by tile. 1/den belongs to
# the index that is summed, so it goes in early, while the weights are float32. Queries beyond T read 1/den = 0.
@triton.jit
def key_kernel(q, k, v, do, dk, dv, inverse, delta, table, states, weight, T, slots, first, sizes: tl.constexpr):
    scale, shift, floor = weight
    tiles = tl.cdiv(T, sizes.TILE)
    n, start = tl.program_id(0) // tiles, tl.program_id(0) % tiles * sizes.TILE
    segment, j = start // sizes.SEGMENT, start + tl.arange(0, sizes.TILE)
    kt = load(k, n, j, T, sizes.D, sizes.D_PAD, sizes.TYPE)
    vt = load(v, n, j, T, sizes.DV, sizes.DV_PAD, sizes.TYPE)
    dkt, dvt = tl.zeros((sizes.TILE, sizes.D_PAD), tl.float32), tl.zeros((sizes.TILE, sizes.DV_PAD), tl.float32)
    after = slots - 2 - segment  # segments after this one: the slot of R, in the mirror
    if after >= first:
        for block in range(0, sizes.P_PAD, sizes.F):
            f = block + tl.arange(0, sizes.F)
            xa, xb, c, A, B = factors(kt, table, f, sizes)
            R, r = load_state(states, n * slots + after, f, sizes)
            R = R.to(sizes.TYPE)
            dvt = tl.dot((xa * xb * c).to(sizes.TYPE), R, dvt, input_precision=sizes.PRECISION)
            dphi = tl.dot(vt, tl.trans(R), input_precision=sizes.PRECISION) + r[None, :]
            dkt = features_backward(dkt, dphi * c, xa, xb, A, B, sizes)
    for later in range(start, min(segment * sizes.SEGMENT + sizes.SEGMENT, T), sizes.TILE):
        i = later + tl.arange(0, sizes.TILE)
        qt = load(q, n, i, T, sizes.D, sizes.D_PAD, sizes.TYPE)
        dot = load(do, n, i, T, sizes.DV, sizes.DV_PAD, sizes.TYPE)
        inv, d, seen = load_row(inverse, n, i, T), load_row(delta, n, i, T), i[None, :] >= j[:, None]  # [keys, queries]
        u = tl.dot(kt, tl.trans(qt), input_precision=sizes.PRECISION) * scale + shift
        w = tl.where(seen, (u * u + floor) * inv[None, :], 0.0).to(sizes.TYPE)
        dvt = tl.dot(w, dot, dvt, input_precision=sizes.PRECISION)
        dw = tl.dot(vt, tl.trans(dot), input_precision=sizes.PRECISION) - d[None, :]
        du = tl.where(seen, dw * u * (2 * scale * inv[None, :]), 0.0).to(sizes.TYPE)
        dkt = tl.dot(du, qt, dkt, input_precision=sizes.PRECISION)
    store(dk, n, j, T, dkt, sizes.D, sizes.D_PAD)
    store(dv, n, j, T, dvt, sizes.DV, sizes.DV_PAD)

# %% The launches: four warps a program, Triton's default; 64 × 64 float32 weights are then 32 registers a thread
def set_up(q, v, coefficients, segment):
    """-> table, (scale, shift, floor), sizes, segments, tiles over all heads."""
    (N, T, D), coefficients = q.shape, tuple(coefficients)
    sizes = sizes_for(D, v.shape[-1], len(feature_rows(coefficients, D)), v.dtype, segment)
    weight, table = tuple(linear.complete_square(coefficients, D))[:3], feature_table(coefficients, D, q.device)
    return table, weight, sizes, triton.cdiv(T, segment), N * triton.cdiv(T, sizes.TILE)


def on_chip(sizes):
    """The same as compile-time constants."""
    return Sizes(*map(tl.constexpr, sizes))


def summed_states(x, y, inverse, delta, table, edge, steps, segments, sizes, reverse):
    """float32 (N, segments + 1, STATE): `edge` or zeros in slot 0, then `steps` segments; scanned."""
    (N, T, _), slots = x.shape, segments + 1
    states = x.new_empty(N, slots, sizes.STATE, dtype=torch.float32)
    states[:, :, sizes.P * (sizes.DV + 1) :] = states[:, -1] = 0  # not written below: padding, a slot nobody asked for
    states[:, 0] = 0 if edge is None else edge
    if steps:
        state_kernel[(N * steps * (sizes.P_PAD // sizes.F),)](x, y, inverse, delta, table, states, T, steps, slots,
                                                              on_chip(sizes), reverse)
        scan_kernel[(N * triton.cdiv(sizes.STATE, COLUMNS),)](states, steps, slots, sizes.STATE, ROWS, COLUMNS)
    return states

# %% Two operations for PyTorch
# As custom operations, with a description of their outputs ("fake") and a gradient, they pass through `torch.compile`.
# States travel packed, (N, STATE). The backward keeps q, k, v, 1/den and the states: 81 bytes a token and head.
@torch.library.custom_op("rebased::triton_forward", mutates_args=())
def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, initial: torch.Tensor | None, coefficients: list[float],
            segment: int, keep: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Contiguous (N, T, size) -> o, the states (N, segments + 1, STATE), of which the final one only if `keep`, 1/den."""
    table, weight, sizes, segments, tiles = set_up(q, v, coefficients, segment)
    o, inverse, T = torch.empty_like(v), q.new_empty(q.shape[:2], dtype=torch.float32), q.shape[1]
    with torch.cuda.device_of(q):
        states = summed_states(k, v, inverse, inverse, table, initial, segments - 1 + keep, segments, sizes, False)
        output_kernel[(tiles,)](q, k, v, o, inverse, table, states, weight, T, segments + 1, int(initial is None),
                                on_chip(sizes))
    return o, states, inverse


@forward.register_fake
def _(q, k, v, initial, coefficients, segment, keep):
    (N, T, D), Dv = q.shape, v.shape[-1]
    P = len(feature_rows(tuple(coefficients), int(D)))  # int: a symbolic D becomes this one
    states = q.new_empty(N, -(-T // segment) + 1, -(-P * (Dv + 1) // 16) * 16, dtype=torch.float32)
    return torch.empty_like(v), states, states.new_empty(N, T)


@torch.library.custom_op("rebased::triton_backward", mutates_args=())
def backward(do: torch.Tensor, d_final: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
             states: torch.Tensor, inverse: torch.Tensor, coefficients: list[float], segment: int,
             has_initial: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> dq, dk, dv and all R; the last is the gradient of the initial state."""
    table, weight, sizes, segments, tiles = set_up(q, v, coefficients, segment)
    T, steps, do = q.shape[1], segments - 1 + has_initial, do.contiguous()
    dq, dk, dv, delta = map(torch.empty_like, (q, k, v, inverse))
    with torch.cuda.device_of(q):
        query_kernel[(tiles,)](q, k, v, do, dq, inverse, delta, table, states, weight, T, segments + 1,
                               int(not has_initial), on_chip(sizes))
        R = summed_states(q, do, inverse, delta, table, d_final, steps, segments, sizes, True)
        key_kernel[(tiles,)](q, k, v, do, dk, dv, inverse, delta, table, R, weight, T, segments + 1,
                             int(d_final is None), on_chip(sizes))
    return dq, dk, dv, R


@backward.register_fake
def _(do, d_final, q, k, v, states, inverse, coefficients, segment, has_initial):
    return tuple(map(torch.empty_like, (q, k, v, states)))


def remember(ctx, inputs, output):
    q, k, v, initial, coefficients, segment, keep = inputs
    ctx.set_materialize_grads(False)  # a gradient that is not there stays None, not a tensor of zeros
    ctx.save_for_backward(q, k, v, *output[1:])
    ctx.rest = list(coefficients), segment, initial is not None


def differentiate(ctx, do, d_states, _):
    do = torch.zeros_like(ctx.saved_tensors[2]) if do is None else do
    *grads, R = backward(do, None if d_states is None else d_states[:, -1], *ctx.saved_tensors, *ctx.rest)
    return *grads, R[:, -1] if ctx.rest[-1] else None, None, None, None


forward.register_autograd(differentiate, setup_context=remember)

# %% The function to call
def beyond_limits(q, k, v, kernel):
    """None, or in one line which limit these inputs exceed; `attention` of 02 then takes the chunked form."""
    if not all(isinstance(x, torch.Tensor) and x.ndim == 4 for x in (q, k, v)):
        return "q, k and v (B, H, T, size)"
    if kernel.coefficients is None or not kernel.coefficients[2]:
        return f"a kernel with coefficients (c0, c1, c2), c2 > 0; {type(kernel).__name__} has {kernel.coefficients}"
    if any(x.dtype not in (torch.float32, torch.bfloat16, torch.float16) for x in (q, k, v)):
        return f"float32, bfloat16 or float16 tensors, got {q.dtype}, {k.dtype}, {v.dtype}"
    if q.shape[-1] > 32 or v.shape[-1] > 128:
        return f"D at most 32 and Dv at most 128, got D = {q.shape[-1]} and Dv = {v.shape[-1]}"
    if not INTERPRETED and not all(x.is_cuda and x.device == q.device for x in (q, k, v)):
        return f"tensors on one NVIDIA GPU, got {q.device}, {k.device}, {v.device}"


def triton_attention(q, k, v, kernel, state=None, return_state=False, segment=SEGMENT):
    """q, k (B, H, T, D), v (B, H, T, Dv), State or None -> o (B, H, T, Dv), or (o, State) with return_state.

    Products are in the precision of v, sums in float32. Raises as `accept`; ValueError that names the limit beyond
    float32/bfloat16/float16, D ≤ 32, Dv ≤ 128, polynomial kernels, an NVIDIA GPU. segment: a multiple of 64.
    """
    shapes = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in (q, k, v)]  # `accept` converts: copy nothing
    linear.accept(*shapes, kernel, state)
    if problem := beyond_limits(q, k, v, kernel):
        raise ValueError(f"triton_attention needs {problem}")
    (B, H, _, _), Dv, P, initial = q.shape, v.shape[-1], kernel.num_features, None
    if state is not None:
        packed = torch.cat([state.S.flatten(2), state.z], -1).flatten(0, 1).float()  # (N, P·Dv + P)
        initial = F.pad(packed, (0, -packed.shape[-1] % 16))
    q, k, v = (x.flatten(0, 1).contiguous() for x in (q, k, v))  # (N, T, size): a transposed view is copied here
    o, states, _ = forward(q, k, v, initial, [float(c) for c in kernel.coefficients], segment, return_state)
    o = o.unflatten(0, (B, H))
    if not return_state:
        return o
    final = states[:, -1].clone().unflatten(0, (B, H))  # a copy: a slice would keep all states alive
    return o, linear.State(final[..., : P * Dv].unflatten(-1, (P, Dv)), final[..., P * Dv : P * Dv + P])

# %% Claims, on a GPU or in the interpreter
# Against the float64 definition on inputs whose normaliser is not near zero (01 shows what happens where it is), in
# segments short enough to cross several. The interpreter multiplies bfloat16 wrongly: that type waits for a GPU.
DEVICE = "cpu" if INTERPRETED else "cuda"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3} | ({} if INTERPRETED else {torch.bfloat16: 5e-3})


def inputs_away_from_zero(kernel, T, Dv=5, H=1, dtype=torch.float32):
    """q, k from U(0.1, 1.1) and v, as leaves, and an upstream gradient."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.rand(2, 1, H, T, kernel.dim, generator=generator) + 0.1
    v, upstream = torch.randn(2, 1, H, T, Dv, generator=generator)
    return *(x.to(DEVICE, dtype).requires_grad_() for x in (q, k, v)), upstream.to(DEVICE, dtype)


def errors(kernel, T, dtype, segment=128, **options):
    """Relative RMS distance from float64: of o, and of dq, dk, dv (of all together if T = 1, where dq = dk = 0)."""
    *inputs, upstream = inputs_away_from_zero(kernel, T, dtype=dtype, **options)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    o, expected = triton_attention(*inputs, kernel, segment=segment), linear.quadratic_attention(*exact, kernel)
    found, wanted = torch.autograd.grad(o, inputs, upstream), torch.autograd.grad(expected, exact, upstream.double())
    pairs = zip(found, wanted, strict=True) if T > 1 else [(torch.cat(x, -1) for x in (found, wanted))]
    return [linear.distance([a.double()], [b]) for a, b in [(o, expected), *pairs]]


def check_equals_the_definition():
    """Output and gradients, ReBased and Based, within TOLERANCE of the float64 quadratic form."""
    worst = {}
    for dtype, tolerance in TOLERANCE.items():
        for kernel in (kernels.ReBasedKernel(16), kernels.TaylorKernel(16)):
            worst[dtype] = max(worst.get(dtype, 0), *errors(kernel, 150, dtype))
        assert worst[dtype] <= tolerance, f"{dtype} is off by {worst[dtype]:.1e}"
    return ", ".join(f"{str(dtype)[6:]} {error:.0e}" for dtype, error in worst.items())


def main(argv=None):
    """The static table; with a GPU the benchmark; then the checks. Returns how many failed."""
    parser = argparse.ArgumentParser(description="02: linear attention as Triton kernels; timed on a GPU")
    parser.add_argument("--figure", type=kernels.writable, default="runs/02_linear_attention_triton.png",
                        help="where to draw the timings; only with a GPU (%(default)s)")
    options = kernels.parse_arguments(parser, argv)
    if INTERPRETED:
        return kernels.run_checks([check_equals_the_definition])
    sys.modules.setdefault("02_linear_attention_triton", sys.modules[__name__])  # the benchmark imports it: not twice
    failed = import_module("02_linear_attention_triton_benchmark").run(options.figure)
    if torch.cuda.is_available():
        return failed + kernels.run_checks([check_equals_the_definition])
    print("\nNo GPU here: the kernels run in Triton's interpreter, in a process of its own.", flush=True)
    return failed + subprocess.run([sys.executable, __file__], env=os.environ | {"TRITON_INTERPRET": "1"}).returncode


if __name__ == "__main__":
    if main():
        sys.exit(1)
