"""02 · Linear attention on a GPU: the chunked form as kernels, forward and backward

Aim: run the four steps of `chunked_attention` on chip, so that φ(q) and φ(k) never touch memory and time grows with T.

You will learn
  1. why a GPU wants long segments: count the bytes before writing a kernel;
  2. φ as a table, and two one-hot products that apply it; its gradient is the same two products, transposed;
  3. three kernels forward (state, scan, output), and how the backward reuses two of them in reverse;
  4. how to test kernels without a GPU: interpret them, compile them for a card that is not there.

Equations, for sim = c0 + c1·s + c2·s² = u² + floor with u = scale·q·k + shift (ReBased, Based; `complete_square` of 02)
  forward    o_i = Σ_j w_ij v_j / den_i,  den_i = Σ_j w_ij + ε
             the j of earlier segments through S = Σ φ(k_j) v_jᵀ, z = Σ φ(k_j)
  backward   δ_i = do_i·o_i = Σ_j w_ij (do_i·v_j)/den_i,  dw_ij = (do_i·v_j − δ_i)/den_i,  du_ij = 2 u_ij dw_ij
             dq_i = scale Σ_j du_ij k_j,  dk_j = scale Σ_i du_ij q_i,  dv_j = Σ_i (w_ij/den_i) do_i
             the i of later segments through R = Σ φ(q_i) do_iᵀ/den_i, r = −Σ φ(q_i) δ_i/den_i

Letters: as in 02; a segment is the chunk of 02, cut into tiles. On chip: [TILE, D], [TILE, DV], [F features, DV].
References: [P], [K] as in 01; tiles and δ: Dao, FlashAttention-2, arXiv 2307.08691.

Run: python 02_linear_attention_triton.py    (a minute without a GPU: what the compiler made of the kernels, and checks
     through Triton's interpreter; with one: speed and memory against other forms; --figure PATH draws them)
"""
# %%
import argparse
import functools
import math
import os
import re
import subprocess
import sys
import tempfile
from importlib import import_module
from typing import NamedTuple

import torch
import torch.nn.functional as F

MISSING = "02_linear_attention_triton needs Triton (Linux: pip install triton==3.7.1); every other file runs without it"
try:
    import triton
    import triton.language as tl
except ImportError:
    if __name__ == "__main__":
        sys.exit(MISSING)
    raise ImportError(MISSING) from None

kernels, linear = import_module("01_kernels"), import_module("02_linear_attention")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read by Triton when it is imported: kernels then run on a CPU

# %% Count first
# The state of one head is 35 KB, the k and v of 218 tokens. A chunk of 64 would write, scan and read it every 64
# tokens: eight times the bytes of q, k, v and o. So the chunk is a *segment* of 512 tokens, worked through in tiles of
# 64; inside it the quadratic form costs a query (512 + 64)/2 keys on average, still less than what 136 features cost.
# The sum of compute and memory, in ns per token and head on an H100: a perfect schedule in which nothing overlaps.
SEGMENT, TILE, FEATURES = 512, 64, 32  # tokens a state, tokens a tile, rows of the state a step
FLOPS, BYTES = 400e12, 3.0e12  # per second: half of a product's measured rate, and the measured rate of memory


def predicted_ns(T, D=16, Dv=64, P=136, size=2, segment=SEGMENT):
    """(forward, forward + backward) ns per token and head; size: bytes of an input element."""
    P = -(-P // FEATURES) * FEATURES  # the last block of features is padded
    keys, crossed = (min(T, segment) + TILE) / 2, T > segment  # keys a query meets in its segment; is there a state?
    qk, io, state = 2 * D * keys, size * (D + Dv), 4 * P * (Dv + 1) / segment  # FLOPs of a D product, bytes of (k, v)
    wv, phi, through = 2 * Dv * keys, 4 * D * P, 2 * P * Dv  # FLOPs: a Dv product, both one-hots, a product with S
    forward = qk + wv + 2 * crossed * (phi + through), 2 * io + crossed * (io + 4 * state)
    query = 2 * (qk + wv) + qk + crossed * (3 * phi + 2 * through), 2 * io + size * D + crossed * state
    later = crossed * (phi + through), crossed * (io + 3 * state)  # R, summed and scanned
    key = 2 * (qk + wv) + crossed * (2 * phi + 2 * through), 3 * io + crossed * state
    ns = [1e9 * (flops / FLOPS + moved / BYTES) for flops, moved in (forward, query, later, key)]
    return ns[0], sum(ns)

# %% φ as a table
# Every feature of 01 is a product of two coordinates: φ_f(x) = c_f · x[a_f] · x[b_f]; an index of −1 reads 1, for the
# linear and the constant features. So one table serves every D and every polynomial. Picking coordinates is a product
# with a one-hot matrix, exact and on the tensor cores: x A holds x[a_f] for all f. The cost is 4·D FLOPs a feature
# beside the 2·Dv of the product that uses it. Padded features have c = 0.
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
    """float32 (3, P padded): the rows a, b and c."""
    rows = feature_rows(coefficients, D)
    return torch.tensor(rows + [(-1, -1, 0.0)] * (-len(rows) % FEATURES), device=device).T.contiguous()


class Sizes(NamedTuple):
    """What the compiler must know. Blocks are powers of 2 and at least 16: a tensor core takes no less."""

    D: int
    DV: int
    P: int
    D_PAD: int
    DV_PAD: int
    P_PAD: int
    STATE: int  # numbers a state occupies: S, then z, then up to a multiple of 16, so that loads stay aligned
    SEGMENT: int
    TILE: int
    F: int  # features a step: the state passes through in blocks [F, DV], for all of it does not fit in registers
    TYPE: object  # of the factors of every product; sums are float32
    PRECISION: str
    EPS: float


def sizes_for(D, Dv, P, dtype, segment):
    """bfloat16 is multiplied as it is. float16 goes as tf32, which has its 10 bits and the range of float32: S
    overflows float16. float32 is multiplied as it is, off the tensor cores, in half tiles: its operands are twice as
    large. (Three tf32 products would do; they spill 700 bytes in the largest kernel.)"""
    pad = -(-P // FEATURES) * FEATURES
    return Sizes(D, Dv, P, triton.next_power_of_2(max(16, D)), triton.next_power_of_2(max(16, Dv)), pad,
                 -(-P * (Dv + 1) // 16) * 16, segment, TILE // 2 if dtype == torch.float32 else TILE, FEATURES,
                 tl.bfloat16 if dtype == torch.bfloat16 else tl.float32,
                 "ieee" if dtype == torch.float32 else "tf32", linear.EPS)


def on_chip(sizes):
    """The same as compile-time constants."""
    return Sizes(*map(tl.constexpr, sizes))

# %% On chip: small parts
# A tensor travels as (pointer, three strides): any layout whose rows are contiguous. `n` counts heads over the batch.
# Offsets within a tensor can pass 2³¹, hence int64. Rows beyond T and columns beyond the width read 0.
@triton.jit
def pointers(x, n, heads, t, T, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    d = tl.arange(0, PADDED)
    start = x[0] + (n // heads).to(tl.int64) * x[1] + (n % heads).to(tl.int64) * x[2]
    return start + t.to(tl.int64)[:, None] * x[3] + d[None, :], (t < T)[:, None] & (d < WIDTH)[None, :]


@triton.jit
def load(x, n, heads, t, T, WIDTH: tl.constexpr, PADDED: tl.constexpr, TYPE: tl.constexpr):
    where, mask = pointers(x, n, heads, t, T, WIDTH, PADDED)
    return tl.load(where, mask=mask, other=0.0).to(TYPE)


@triton.jit
def load_row(x, n, t, T):
    return tl.load(x + n.to(tl.int64) * T + t, mask=t < T, other=0.0)


@triton.jit
def store(x, n, heads, t, T, values, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    where, mask = pointers(x, n, heads, t, T, WIDTH, PADDED)
    tl.store(where, values.to(x[0].dtype.element_ty), mask=mask)


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
    """dx + the gradient of x: the product rule, and the one-hots carry each factor's share back to its column."""
    dx = tl.dot((dphi * xb).to(sizes.TYPE), tl.trans(A), dx, input_precision=sizes.PRECISION)
    return tl.dot((dphi * xa).to(sizes.TYPE), tl.trans(B), dx, input_precision=sizes.PRECISION)


@triton.jit
def load_state(states, slot, f, sizes: tl.constexpr):
    """Rows f of the state in a slot: S [F, DV] and z [F]."""
    d, states = tl.arange(0, sizes.DV_PAD), states + slot.to(tl.int64) * sizes.STATE
    mask = (f < sizes.P)[:, None] & (d < sizes.DV)[None, :]
    S = tl.load(states + f[:, None] * sizes.DV + d[None, :], mask=mask, other=0.0)
    return S, tl.load(states + sizes.P * sizes.DV + f, mask=f < sizes.P, other=0.0)

# %% Step 4 first: what a segment adds to the state
# In 02 the chunks follow each other. Here all segments run at once: each sums its own φ(k) vᵀ, and a scan makes
# prefixes of the sums. A program takes one segment and one block of F features, so that even few heads fill the card;
# k and v come once from memory and P/F − 1 times from cache, as neighbouring programs share a segment.
#
# There is one slot more than segments. Forward, the sum of segment s goes into slot s + 1 and slot 0 holds the
# initial state: after an *inclusive* scan slot s is what came before segment s, and the last slot is the final
# state. No shift, no subtraction. REVERSE is the mirror: x, y are q, do; segment s goes into slot s; the last
# slot holds the gradient of the final state; after the scan slot s + 1 is R after segment s, slot 0 the gradient of the
# initial state.
#
# S is summed transposed, [DV, F]: with DV = 64 rows Hopper's warpgroup instructions take it. z is summed
# per row of the tile and reduced once, at the end.
@triton.jit
def state_kernel(x, y, inverse, delta, table, states, heads, T, steps, slots,
                 sizes: tl.constexpr, REVERSE: tl.constexpr):
    program, BLOCKS = tl.program_id(0), sizes.P_PAD // sizes.F
    f = program % BLOCKS * sizes.F + tl.arange(0, sizes.F)
    step, n = program // BLOCKS % steps, program // BLOCKS // steps
    segment = slots - 2 - step if REVERSE else step
    S = tl.zeros((sizes.DV_PAD, sizes.F), tl.float32)
    z = tl.zeros((sizes.TILE, sizes.F), tl.float32)
    for start in range(segment * sizes.SEGMENT, min(segment * sizes.SEGMENT + sizes.SEGMENT, T), sizes.TILE):
        t = start + tl.arange(0, sizes.TILE)
        xt = load(x, n, heads, t, T, sizes.D, sizes.D_PAD, sizes.TYPE)
        yt = load(y, n, heads, t, T, sizes.DV, sizes.DV_PAD, sizes.TYPE)
        xa, xb, c, _, _ = factors(xt, table, f, sizes)
        phi = (xa * xb * c).to(sizes.TYPE)
        if REVERSE:  # rows do/den and −δ/den
            scale = load_row(inverse, n, t, T)
            yt, ones = (yt * scale[:, None]).to(sizes.TYPE), -scale * load_row(delta, n, t, T)
        else:  # rows v and 1; 0 beyond T, where the constant feature is not 0
            ones = (t < T).to(tl.float32)
        S = tl.dot(tl.trans(yt), phi, S, input_precision=sizes.PRECISION)
        z += phi.to(tl.float32) * ones[:, None]
    states += (n * slots + (segment if REVERSE else segment + 1)).to(tl.int64) * sizes.STATE
    d = tl.arange(0, sizes.DV_PAD)
    tl.store(states + f[None, :] * sizes.DV + d[:, None], S, mask=(f < sizes.P)[None, :] & (d < sizes.DV)[:, None])
    tl.store(states + sizes.P * sizes.DV + f, tl.sum(z, 0), mask=f < sizes.P)

# %% The scan: prefix sums over the slots, in place
# Sixteen slots at a time, so that sixteen loads are under way at once; 256 columns a program. Always the same order of
# additions: no atomics anywhere, and two runs give the same bits.
ROWS, COLUMNS = 16, 256


@triton.jit
def scan_kernel(states, steps, slots, STATE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                REVERSE: tl.constexpr):
    program, BLOCKS = tl.program_id(0), (STATE + COLUMNS - 1) // COLUMNS
    column = program % BLOCKS * COLUMNS + tl.arange(0, COLUMNS)
    states += (program // BLOCKS).to(tl.int64) * slots * STATE
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, steps + 1, ROWS):
        row = start + tl.arange(0, ROWS)
        slot = (slots - 1 - row if REVERSE else row).to(tl.int64)
        where = states + slot[:, None] * STATE + column[None, :]
        mask = (row <= steps)[:, None] & (column < STATE)[None, :]
        x = tl.load(where, mask=mask, other=0.0)
        tl.store(where, tl.cumsum(x, 0) + total[None, :], mask=mask)
        total += tl.sum(x, 0)

# %% Steps 1 to 3: the output
# A program takes one tile of queries: T/64 · B·H programs. S comes from memory once a segment, then from cache for its
# eight tiles. `first` is the first segment with something before it: 1, or 0 with an initial state. With T ≤ 512 the
# kernel is the quadratic form and nothing else, so one path serves every T.
#
# den sums the *rounded* weights, those that multiply v: then they add up to 1 exactly, and o_0 is v_0.
@triton.jit
def output_kernel(q, k, v, o, inverse, table, states, weight, heads, T, slots, first, sizes: tl.constexpr):
    scale, shift, floor = weight
    tiles = tl.cdiv(T, sizes.TILE)
    n, start = tl.program_id(0) // tiles, tl.program_id(0) % tiles * sizes.TILE
    segment, i = start // sizes.SEGMENT, start + tl.arange(0, sizes.TILE)
    qt = load(q, n, heads, i, T, sizes.D, sizes.D_PAD, sizes.TYPE)
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
        kt = load(k, n, heads, j, T, sizes.D, sizes.D_PAD, sizes.TYPE)
        vt = load(v, n, heads, j, T, sizes.DV, sizes.DV_PAD, sizes.TYPE)
        u = tl.dot(qt, tl.trans(kt), input_precision=sizes.PRECISION) * scale + shift  # [TILE, TILE]
        w = tl.where(i[:, None] >= j[None, :], u * u + floor, 0.0).to(sizes.TYPE)
        num = tl.dot(w, vt, num, input_precision=sizes.PRECISION)
        den += tl.sum(w.to(tl.float32), 1)
    # 3. One division. Of what the backward needs, only 1/den is kept: 4 bytes a token.
    den = 1 / (den + sizes.EPS)
    store(o, n, heads, i, T, num * den[:, None], sizes.DV, sizes.DV_PAD)
    tl.store(inverse + n.to(tl.int64) * T + i, den, mask=i < T)

# %% Backward, the queries
# The division couples all weights of a row: dw_ij = (do_i·v_j − δ_i)/den_i. In the first rows the two terms are all but
# equal and 1/den is large (4.7e5 was seen), so δ must not carry the rounding of o: it is summed from the same weights
# and the same do·v that it is subtracted from. That is a first pass over the row, at the price of one more forward; to
# keep a float32 o instead would cost 256 bytes a token where q, k, v and o are 320. 1/den is applied last, in float32.
@triton.jit
def query_kernel(q, k, v, do, dq, inverse, delta, table, states, weight, heads, T, slots, first, sizes: tl.constexpr):
    scale, shift, floor = weight
    tiles = tl.cdiv(T, sizes.TILE)
    n, start = tl.program_id(0) // tiles, tl.program_id(0) % tiles * sizes.TILE
    segment, i = start // sizes.SEGMENT, start + tl.arange(0, sizes.TILE)
    qt = load(q, n, heads, i, T, sizes.D, sizes.D_PAD, sizes.TYPE)
    dot = load(do, n, heads, i, T, sizes.DV, sizes.DV_PAD, sizes.TYPE)
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
            kt = load(k, n, heads, j, T, sizes.D, sizes.D_PAD, sizes.TYPE)
            vt = load(v, n, heads, j, T, sizes.DV, sizes.DV_PAD, sizes.TYPE)
            seen = i[:, None] >= j[None, :]
            u = tl.dot(qt, tl.trans(kt), input_precision=sizes.PRECISION) * scale + shift
            dw = tl.dot(dot, tl.trans(vt), input_precision=sizes.PRECISION)  # do_i·v_j
            if with_d:
                du = tl.where(seen, (dw - d[:, None]) * u * (2 * scale), 0.0).to(sizes.TYPE)
                dqt = tl.dot(du, kt, dqt, input_precision=sizes.PRECISION)
            else:
                d += tl.sum(tl.where(seen, u * u + floor, 0.0).to(sizes.TYPE).to(tl.float32) * dw, 1)
        if not with_d:
            d *= inv
    store(dq, n, heads, i, T, dqt * inv[:, None], sizes.D, sizes.D_PAD)
    tl.store(delta + n.to(tl.int64) * T + i, d, mask=i < T)

# %% Backward, the keys and values
# A program takes one tile of keys and meets the later queries: R for later segments, tiles to the end of its own.
# Here 1/den belongs to the index that is summed; it goes in while the weights are float32 (w/den ≤ 1). Queries beyond
# T read 1/den = 0. `last` is the number of segments with something after them.
@triton.jit
def key_kernel(q, k, v, do, dk, dv, inverse, delta, table, states, weight, heads, T, slots, last, sizes: tl.constexpr):
    scale, shift, floor = weight
    tiles = tl.cdiv(T, sizes.TILE)
    n, start = tl.program_id(0) // tiles, tl.program_id(0) % tiles * sizes.TILE
    segment, j = start // sizes.SEGMENT, start + tl.arange(0, sizes.TILE)
    kt = load(k, n, heads, j, T, sizes.D, sizes.D_PAD, sizes.TYPE)
    vt = load(v, n, heads, j, T, sizes.DV, sizes.DV_PAD, sizes.TYPE)
    dkt, dvt = tl.zeros((sizes.TILE, sizes.D_PAD), tl.float32), tl.zeros((sizes.TILE, sizes.DV_PAD), tl.float32)
    if segment < last:
        for block in range(0, sizes.P_PAD, sizes.F):
            f = block + tl.arange(0, sizes.F)
            xa, xb, c, A, B = factors(kt, table, f, sizes)
            R, r = load_state(states, n * slots + segment + 1, f, sizes)
            R = R.to(sizes.TYPE)
            dvt = tl.dot((xa * xb * c).to(sizes.TYPE), R, dvt, input_precision=sizes.PRECISION)
            dphi = tl.dot(vt, tl.trans(R), input_precision=sizes.PRECISION) + r[None, :]
            dkt = features_backward(dkt, dphi * c, xa, xb, A, B, sizes)
    for later in range(start, min(segment * sizes.SEGMENT + sizes.SEGMENT, T), sizes.TILE):
        i = later + tl.arange(0, sizes.TILE)
        qt = load(q, n, heads, i, T, sizes.D, sizes.D_PAD, sizes.TYPE)
        dot = load(do, n, heads, i, T, sizes.DV, sizes.DV_PAD, sizes.TYPE)
        inv, d = load_row(inverse, n, i, T), load_row(delta, n, i, T)
        seen = i[None, :] >= j[:, None]  # [keys, queries]
        u = tl.dot(kt, tl.trans(qt), input_precision=sizes.PRECISION) * scale + shift
        w = tl.where(seen, (u * u + floor) * inv[None, :], 0.0).to(sizes.TYPE)
        dvt = tl.dot(w, dot, dvt, input_precision=sizes.PRECISION)
        dw = tl.dot(vt, tl.trans(dot), input_precision=sizes.PRECISION) - d[None, :]
        du = tl.where(seen, dw * u * (2 * scale * inv[None, :]), 0.0).to(sizes.TYPE)
        dkt = tl.dot(du, qt, dkt, input_precision=sizes.PRECISION)
    store(dk, n, heads, j, T, dkt, sizes.D, sizes.D_PAD)
    store(dv, n, heads, j, T, dvt, sizes.DV, sizes.DV_PAD)

# %% The launches
# Four warps a program everywhere: 64 × 64 float32 weights are then 32 registers a thread. `static_table` below shows
# what the compiler makes of it.
def operand(x):
    """(x, its first three strides), rows made contiguous if they are not."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x, *x.stride()[:3]


def set_up(q, v, coefficients, segment):
    """-> table, (scale, shift, floor), sizes, number of segments, number of tiles over all heads."""
    (B, H, T, D), w = q.shape, linear.complete_square(coefficients, q.shape[-1])
    sizes = sizes_for(D, v.shape[-1], len(feature_rows(tuple(coefficients), D)), v.dtype, segment)
    table = feature_table(tuple(coefficients), D, q.device)
    return table, (w.scale, w.shift, w.floor), sizes, triton.cdiv(T, segment), B * H * triton.cdiv(T, sizes.TILE)


def summed_states(x, y, inverse, delta, table, edge, steps, segments, sizes, reverse):
    """float32 (N, segments + 1, STATE): `edge`, or zeros, in the slot at the edge, then `steps` segments, scanned."""
    B, H, T, _ = x.shape
    states = x.new_empty(B * H, segments + 1, sizes.STATE, dtype=torch.float32)
    states[:, :, sizes.P * (sizes.DV + 1) :] = 0  # what no kernel writes: the padding, and the slot nobody asked for
    states[:, 0 if reverse else -1] = 0
    states[:, -1 if reverse else 0] = 0 if edge is None else edge
    if steps:
        state_kernel[(B * H * steps * (sizes.P_PAD // sizes.F),)](
            operand(x), operand(y), inverse, delta, table, states, H, T, steps, segments + 1, on_chip(sizes), reverse)
        scan_kernel[(B * H * triton.cdiv(sizes.STATE, COLUMNS),)](
            states, steps, segments + 1, sizes.STATE, ROWS, COLUMNS, reverse)
    return states

# %% Two operations for PyTorch
# As custom operations with a description of their outputs ("fake") and a gradient they pass through `torch.compile` as
# they are. The states travel packed, (N, STATE). The backward keeps q, k, v, 1/den and the states (81 bytes a token and
# head in segments of 512; to sum them again would read k and v, 160).
@torch.library.custom_op("rebased::triton_forward", mutates_args=())
def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, initial: torch.Tensor | None, coefficients: list[float],
            segment: int, keep: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> o, the final state if `keep`, all states, 1/den."""
    table, weight, sizes, segments, tiles = set_up(q, v, coefficients, segment)
    (B, H, T, _), o = q.shape, torch.empty_like(v)
    inverse = q.new_empty(B * H, T, dtype=torch.float32)
    with torch.cuda.device_of(q):
        states = summed_states(k, v, inverse, inverse, table, initial, segments - 1 + keep, segments, sizes, False)
        output_kernel[(tiles,)](operand(q), operand(k), operand(v), operand(o), inverse, table, states, weight, H, T,
                                segments + 1, int(initial is None), on_chip(sizes))
    return o, states[:, -1].clone() if keep else states.new_empty(0), states, inverse


@forward.register_fake
def _(q, k, v, initial, coefficients, segment, keep):
    (B, H, T, D), c = q.shape, tuple(coefficients)
    P = len(feature_rows(c, int(D)))  # int: a symbolic D becomes this one
    states = q.new_empty(B * H, -(-T // segment) + 1, -(-P * (v.shape[-1] + 1) // 16) * 16, dtype=torch.float32)
    final = torch.empty_like(states[:, -1] if keep else states[:0, 0, 0])
    return torch.empty_like(v), final, states, states.new_empty(B * H, T)


@torch.library.custom_op("rebased::triton_backward", mutates_args=())
def backward(do: torch.Tensor, d_final: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
             states: torch.Tensor, inverse: torch.Tensor, coefficients: list[float], segment: int,
             has_initial: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> dq, dk, dv and, with has_initial, the gradient of the initial state."""
    table, weight, sizes, segments, tiles = set_up(q, v, coefficients, segment)
    T, H, (dq, dk, dv, delta) = q.shape[2], q.shape[1], [torch.empty_like(x) for x in (q, k, v, inverse)]
    inputs = operand(q), operand(k), operand(v), operand(do)
    with torch.cuda.device_of(q):
        query_kernel[(tiles,)](*inputs, operand(dq), inverse, delta, table, states, weight, H, T, segments + 1,
                               int(not has_initial), on_chip(sizes))
        R = summed_states(q, do, inverse, delta, table, d_final, segments - 1 + has_initial, segments, sizes, True)
        key_kernel[(tiles,)](*inputs, operand(dk), operand(dv), inverse, delta, table, R, weight, H, T, segments + 1,
                             segments - (d_final is None), on_chip(sizes))
    return dq, dk, dv, R[:, 0].clone() if has_initial else R.new_empty(0)


@backward.register_fake
def _(do, d_final, q, k, v, states, inverse, coefficients, segment, has_initial):
    d_initial = torch.empty_like(states[:, 0] if has_initial else states[:0, 0, 0])
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), d_initial


def remember(ctx, inputs, output):
    """What the forward leaves for the backward."""
    q, k, v, initial, coefficients, segment, keep = inputs
    ctx.set_materialize_grads(False)  # a gradient that is not there stays None, not a tensor of zeros
    ctx.save_for_backward(q, k, v, *output[2:])
    ctx.keep, ctx.rest = keep, (list(coefficients), segment, initial is not None)


def differentiate(ctx, do, d_final, *_):
    """Gradients for the arguments of `forward`."""
    do = torch.zeros_like(ctx.saved_tensors[2]) if do is None else do
    *grads, d_initial = backward(do, d_final if ctx.keep else None, *ctx.saved_tensors, *ctx.rest)
    return *grads, d_initial if ctx.rest[-1] else None, None, None, None


forward.register_autograd(differentiate, setup_context=remember)

# %% The function to call
def beyond_limits(q, k, v, kernel):
    """None, or in one line which limit these inputs exceed; `attention` of 02 then takes the chunked form."""
    types = (torch.float32, torch.bfloat16, torch.float16)
    if kernel.coefficients is None or not kernel.coefficients[2]:
        return f"a kernel with coefficients (c0, c1, c2), c2 > 0; {type(kernel).__name__} has {kernel.coefficients}"
    if any(x.dtype not in types for x in (q, k, v)):
        return f"float32, bfloat16 or float16 tensors, got {q.dtype}, {k.dtype}, {v.dtype}"
    if q.shape[-1] > 32 or v.shape[-1] > 128:
        return f"D at most 32 and Dv at most 128, got D = {q.shape[-1]} and Dv = {v.shape[-1]}"
    if not INTERPRETED and not all(x.is_cuda and x.device == q.device for x in (q, k, v)):
        return f"tensors on one NVIDIA GPU, got {q.device}, {k.device}, {v.device}"
    if not INTERPRETED and torch.cuda.get_device_capability(q.device) < (8, 0):
        return f"an NVIDIA GPU of capability 8.0 (Ampere) or later, got {torch.cuda.get_device_name(q.device)}"


def triton_attention(q, k, v, kernel, state=None, return_state=False):
    """q, k (B, H, T, D), v (B, H, T, Dv), State or None -> o (B, H, T, Dv), or (o, State) with return_state.

    Products are in the precision of v, sums in float32. Raises as `accept`; ValueError that names the limit beyond
    float32/bfloat16/float16, D ≤ 32, Dv ≤ 128, polynomial kernels, an NVIDIA GPU.
    """
    shapes = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in (q, k, v)]  # `accept` converts: copy nothing
    linear.accept(*shapes, kernel, state)
    if problem := beyond_limits(q, k, v, kernel):
        raise ValueError(f"triton_attention needs {problem}")
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    (B, H, _, _), Dv, coefficients = q.shape, v.shape[-1], [float(c) for c in kernel.coefficients]
    initial = None
    if state is not None:
        packed = torch.cat([state.S.flatten(2), state.z], -1).flatten(0, 1).float()  # (N, P·Dv + P)
        initial = F.pad(packed, (0, -packed.shape[-1] % 16))
    o, final, _, _ = forward(q, k, v, initial, coefficients, SEGMENT, return_state)
    if not return_state:
        return o
    P, final = kernel.num_features, final.unflatten(0, (B, H))
    return o, linear.State(final[..., : P * Dv].unflatten(-1, (P, Dv)), final[..., P * Dv : P * Dv + P])

# %% Claims, on a GPU or in the interpreter
# Against the float64 definition on inputs whose normaliser is not near zero (01 shows what happens where it is), in
# segments of 128 so that several are crossed. The interpreter multiplies bfloat16 wrongly: that type waits for a GPU.
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
    o, expected = attention_in(segment, *inputs, kernel), linear.quadratic_attention(*exact, kernel)
    found, wanted = torch.autograd.grad(o, inputs, upstream), torch.autograd.grad(expected, exact, upstream.double())
    pairs = zip(found, wanted, strict=True) if T > 1 else [(torch.cat(x, -1) for x in (found, wanted))]
    return [linear.distance([a.double()], [b]) for a, b in [(o, expected), *pairs]]


def attention_in(segment, *arguments):
    """triton_attention in segments of this many tokens."""
    global SEGMENT
    before, SEGMENT = SEGMENT, segment
    try:
        return triton_attention(*arguments)
    finally:
        SEGMENT = before


def check_table_is_the_features():
    """The table gives the features of 01, number by number."""
    x = torch.randn(3, 7, dtype=torch.float64)
    for kernel in (kernels.ReBasedKernel(7), kernels.TaylorKernel(7), kernels.ReBasedKernel(7, floor=0.5)):
        a, b, c = torch.tensor(feature_rows(kernel.coefficients, 7), dtype=torch.float64).T
        x1 = F.pad(x, (0, 1), value=1.0)  # column −1 reads 1
        assert torch.allclose(c * x1[:, a.long()] * x1[:, b.long()], kernel.features(x))


def check_equals_the_definition():
    """Output and gradients, ReBased and Based, within TOLERANCE of the float64 quadratic form."""
    worst = {}
    for dtype, tolerance in TOLERANCE.items():
        for kernel in (kernels.ReBasedKernel(16), kernels.TaylorKernel(16)):
            worst[dtype] = max(worst.get(dtype, 0), *errors(kernel, 150, dtype))
        assert worst[dtype] <= tolerance, f"{dtype} is off by {worst[dtype]:.1e}"
    return ", ".join(f"{str(dtype)[6:]} {error:.0e}" for dtype, error in worst.items())


def check_state_carries():
    """Three pieces equal one run, and so do their gradients."""
    kernel = kernels.ReBasedKernel(16)
    *inputs, upstream = inputs_away_from_zero(kernel, 150)
    whole, state, pieces = attention_in(64, *inputs, kernel), None, []
    for a, b in ((0, 70), (70, 71), (71, 150)):
        o, state = attention_in(64, *(x[:, :, a:b] for x in inputs), kernel, state, True)
        pieces.append(o)
    carried = torch.cat(pieces, 2)
    error = linear.distance([carried], [whole])
    error = max(error, linear.distance(*(torch.autograd.grad(o, inputs, upstream) for o in (carried, whole))))
    assert error < 1e-5, f"three pieces differ from one run by {error:.1e}"


def check_the_normaliser_has_a_gradient():
    """A gradient that takes den for a constant (δ = 0) is far outside every tolerance."""
    kernel = kernels.ReBasedKernel(16)
    *inputs, upstream = inputs_away_from_zero(kernel, 150)
    weights = linear.causal_weights(*inputs[:2], kernel)
    o = weights @ inputs[2] / (weights.sum(-1, keepdim=True).detach() + linear.EPS)
    wrong = torch.autograd.grad(o, inputs[:2], upstream)
    error = linear.distance(wrong, torch.autograd.grad(triton_attention(*inputs, kernel), inputs[:2], upstream))
    assert error > 0.1, f"without δ the gradient is off by {error:.1e} only: this input tests nothing"
    return f"without δ, dq and dk are off by {error:.0%}"


CHECKS = [check_table_is_the_features, check_equals_the_definition, check_state_carries,
          check_the_normaliser_has_a_gradient]

# %% What the compiler made of it
# Triton compiles for a card that is not there. Registers decide how many programs share a multiprocessor (65,536 of
# them, 128 threads a program); what does not fit in 255 goes to the stack, which is memory ("spills"): it must be 0.
# Shared memory must fit a consumer card, 99 KiB.
KERNELS = {"state": (state_kernel, False), "scan": (scan_kernel, False), "output": (output_kernel, False),
           "dq": (query_kernel, False), "state, reverse": (state_kernel, True), "dk, dv": (key_kernel, False)}


def compile_for(capability, kernel, reverse, dtype=torch.bfloat16, D=16, Dv=64, P=136):
    """(registers, stack bytes, shared memory bytes) of a kernel on sm_`capability`, every size a multiple of 16."""
    sizes, types, aligned = sizes_for(D, Dv, P, dtype, SEGMENT), {}, {}
    fixed = {"sizes": on_chip(sizes), "REVERSE": reverse, "STATE": sizes.STATE, "ROWS": ROWS, "COLUMNS": COLUMNS}
    fixed = {name: value for name, value in fixed.items() if name in kernel.arg_names}
    element = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    for place, name in enumerate(kernel.arg_names):  # what the launches above pass
        if name in fixed:
            types[name] = "constexpr"
        elif name in ("heads", "T", "steps", "slots", "first", "last"):
            types[name] = "i32"
        elif name == "weight":
            types[name] = ("fp32",) * 3
        else:
            single = name in ("inverse", "delta", "table", "states")
            types[name] = "*fp32" if single else (element, "i32", "i32", "i32")
            paths = [(place,)] if single else [(place, part) for part in range(4)]
            aligned |= dict.fromkeys(paths, [["tt.divisibility", 16]])
    source = triton.compiler.ASTSource(kernel, types, fixed, aligned)
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return registers, stack, compiled.metadata.shared


@functools.cache
def static_table():
    """[(kernel, capability, registers, stack, shared)] at D = 16, Dv = 64, bfloat16, for an A100 and an H100."""
    return [(name, capability, *compile_for(capability, *kernel)) for capability in (80, 90)
            for name, kernel in KERNELS.items()]


def check_nothing_spills():
    """No kernel uses the stack, and all fit the 99 KiB of shared memory of a consumer card."""
    for name, capability, _, stack, shared in static_table():
        assert stack == 0, f"{name} on sm_{capability} spills {stack} bytes"
        assert shared <= 99 * 1024, f"{name} on sm_{capability} needs {shared} bytes of shared memory"


def print_static_table():
    """The table, and a sentence that reads it."""
    print("bfloat16, D=16, Dv=64, ReBased, 4 warps a program; not run, only compiled.\n")
    print(f"{'kernel':16}{'target':>8}{'registers':>11}{'stack':>7}{'shared':>9}{'programs a multiprocessor':>27}")
    for name, capability, registers, stack, shared in static_table():
        programs = 65536 // (-(-registers // 8) * 8 * 128)
        print(f"{name:16}{f'sm_{capability}':>8}{registers:11}{stack:7}{shared:9,}{programs:27}")
    name, capability, most, *_ = max(static_table(), key=lambda row: row[2])
    spills = sum(row[3] > 0 for row in static_table())
    print(f"\n{name} on sm_{capability} needs most, {most} of the 255 registers a thread can have; "
          f"{spills or 'no'} kernel spills.")
    forward, both = predicted_ns(8192)
    print(f"Predicted for an H100 at T = 8,192: {forward:.2f} ns a token and head forward, {both:.2f} with backward.\n")

# %% On a GPU: speed and memory, against what one would run otherwise
# B·H·T = 2²⁰ at every T, or the launches would decide. ns per token and head, and the peak of memory above the inputs.
# flash-linear-attention is measured if it is installed; its chunk mode is given φ(q), φ(k) of 01, materialised in time.
def competitors():
    """Name -> (function of q, k, v, head dimension of q and k)."""
    kernel, sdpa = kernels.ReBasedKernel(16), F.scaled_dot_product_attention
    forms = {"this file": (functools.partial(triton_attention, kernel=kernel), 16),
             "quadratic": (functools.partial(linear.quadratic_attention, kernel=kernel), 16),
             "softmax, SDPA": (functools.partial(sdpa, is_causal=True), 64)}
    try:
        from fla.ops.linear_attn import chunk_linear_attn
        from fla.ops.rebased import parallel_rebased
    except ImportError:
        print("flash-linear-attention is not installed (pip install flash-linear-attention): its columns are left out")
        return forms

    def materialised(q, k, v):
        q, k = (kernel.features(x).transpose(1, 2) for x in (q, k))  # (B, T, H, P)
        return chunk_linear_attn(q, k, v.transpose(1, 2), normalize=True, scale=1)[0]

    def parallel(q, k, v):
        return parallel_rebased(*(x.transpose(1, 2) for x in (q, k, v)))

    return forms | {"fla parallel": (parallel, 16), "fla chunk": (materialised, 16)}


def measure(form, D, T, total=2**20):
    """[(ns per token and head, MiB)] forward and forward + backward; None where the card has no room."""
    results = []
    for backward in (False, True):
        q, k, v = (torch.rand(1, total // T, T, size, device="cuda").bfloat16() for size in (D, D, 64))
        upstream, inputs = torch.randn_like(v), [x.requires_grad_(backward) for x in (q, k, v)]

        def call():
            o = form(*inputs)  # noqa: B023
            return torch.autograd.grad(o, inputs, upstream.view_as(o)) if backward else o  # noqa: B023

        try:
            before = torch.cuda.memory_allocated()
            call()
            torch.cuda.reset_peak_memory_stats()
            call()
            peak = torch.cuda.max_memory_allocated() - before
            results.append((triton.testing.do_bench(call, return_mode="median") * 1e6 / total, peak / 2**20))
        except torch.cuda.OutOfMemoryError:
            results.append(None)
    return results


def print_benchmark(lengths=(256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)):
    """One line per form and length -> {(form, T): [forward, forward + backward]}, a pair of numbers or None each."""
    print(f"{torch.cuda.get_device_name()}, bfloat16, D=16 (softmax 64), Dv=64, B·H·T = 2²⁰; ns a token\n")
    print(f"{'form':16}{'T':>8}{'forward':>10}{'MiB':>8}{'with backward':>15}{'MiB':>8}")
    rows = {}
    for name, (form, D) in competitors().items():
        for T in lengths:
            if name == "quadratic" and T > 4096:  # T² weights in float32, several times over
                continue
            rows[name, T] = measure(form, D, T)
    rows |= {("predicted", T): [(ns, math.nan) for ns in predicted_ns(T)] for T in lengths}
    for (name, T), (forward, both) in rows.items():
        cells = [f"{x[0]:10.2f}{x[1]:8.0f}" if x else f"{'–':>10}{'–':>8}" for x in (forward, both)]
        print(f"{name:16}{T:8,}{cells[0]}{'':5}{cells[1]}")
    ours, soft, least = (rows[name, 8192][1][0] for name in ("this file", "softmax, SDPA", "predicted"))
    flat = rows["this file", 65536][1][0] / ours
    print(f"\nAt T = 8,192, forward and backward, softmax takes {soft / ours:.1f} times as long as this file,\n"
          f"which takes {ours / least:.1f} times what was predicted; at 65,536 it takes {flat:.2f} times as long.\n")
    return rows


def draw(rows, path):
    """ns per token and head, forward + backward, against T."""
    if (plt := kernels.pyplot()) is None:
        return
    figure, axis = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    for name in dict.fromkeys(name for name, _ in rows):
        points = [(T, both[0]) for (form, T), (_, both) in rows.items() if form == name and both]
        axis.plot(*zip(*points, strict=True), ":" if name == "predicted" else "o-", label=name)
    axis.set(xscale="log", yscale="log", xlabel="T", ylabel="ns a token and head, forward + backward")
    axis.legend(frameon=False)
    figure.savefig(path, dpi=120)
    print(f"figure: {path}\n")


def main(argv=None):
    """With a GPU the benchmark; without, the static table; then the checks. Returns how many failed."""
    parser = argparse.ArgumentParser(description="02: linear attention as Triton kernels; timed on a GPU")
    parser.add_argument("--figure", type=kernels.writable, default="runs/02_linear_attention_triton.png",
                        help="where to draw the timings; only with a GPU (%(default)s)")
    options = kernels.parse_arguments(parser, argv)
    if INTERPRETED:
        return kernels.run_checks(CHECKS)
    if torch.cuda.is_available():
        draw(print_benchmark(), options.figure)
        return kernels.run_checks([check_nothing_spills, *CHECKS])
    print_static_table()
    failed = kernels.run_checks([check_nothing_spills])
    print("\nNo GPU here: the kernels run in Triton's interpreter, in a process of its own.", flush=True)
    return failed + subprocess.run([sys.executable, __file__], env=os.environ | {"TRITON_INTERPRET": "1"}).returncode


if __name__ == "__main__":
    if main():
        sys.exit(1)
