"""Linear attention on a GPU: the chunked form as Triton kernels, forward and backward."""

import functools
import math
import os
from collections import namedtuple

import torch

from rebased import EPS

try:
    import triton
    import triton.language as tl
except ImportError:
    raise ImportError("rebased.triton_kernels needs Triton (Linux: pip install triton==3.7.1); "
                      "everything else runs without it") from None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read by Triton when it is imported: kernels then run on a CPU


def complete_square(coefficients, D):
    """c0 + c1 s + c2 s² with s = q·k/√D -> (scale, shift, floor) of u² + floor with u = scale·q·k + shift."""
    c0, c1, c2 = coefficients
    return math.sqrt(c2 / D), c1 / (2 * math.sqrt(c2)), c0 - c1 * c1 / (4 * c2)


def count_features(coefficients, D):
    """P: how many features these coefficients have."""
    c0, c1, c2 = coefficients
    return bool(c0) + bool(c1) * D + bool(c2) * D * (D + 1) // 2


# %% Sizes
# The state of a head is 35 KB, the k and v of 218 tokens: chunks of 64 would move eight times the bytes of q, k, v and o.
# So a segment is long. A program has one TILE of its queries (or keys) and meets the others STEP by STEP; it reads the
# state once, so a tile of 128 reads half as much as two of 64.
SEGMENT, TILE, STEP, FEATURES = 512, 128, 64, 32  # tokens a state, a program, a step; rows of the state at a time

# What the compiler must know. STATE: numbers of a state, S then z, up to a multiple of 16 (alignment). TYPE, PRECISION:
# of the factors of a product; sums are float32. WARPS of a program with a tile: two of Hopper's warpgroups.
Sizes = namedtuple("Sizes", "D DV P P_PAD STATE SEGMENT TILE STEP F WARPS TYPE PRECISION EPS")


def sizes_for(D, Dv, P, dtype, segment=SEGMENT):
    """bfloat16 is multiplied as it is, float16 as tf32, with its 10 bits and a range that S does not overflow, float32
    exactly ("ieee"), off the tensor cores. Operands of four bytes go in half tiles: registers would not suffice."""
    part = 1 if dtype == torch.bfloat16 else 2
    tile = min(TILE // part, segment)
    return Sizes(D, Dv, P, -(-P // FEATURES) * FEATURES, -(-P * (Dv + 1) // 16) * 16, segment, tile, STEP // part, FEATURES,
                 8, tl.bfloat16 if part == 1 else tl.float32, "ieee" if dtype == torch.float32 else "tf32", EPS)


@triton.constexpr_function
def padded(size):
    """A tensor core takes a power of 2, at least 16."""
    return triton.next_power_of_2(max(16, size))

# %% φ as a table
# Every feature of 01 is a product of two coordinates, φ_f(x) = c_f · x[a_f] · x[b_f], an index of −1 reading 1. On chip
# a product with a one-hot matrix picks coordinates, exactly, on the tensor cores; transposed, it carries a gradient back.
@functools.lru_cache
def feature_table(coefficients, D, device):
    """float32 (3, P_PAD): the rows a, b and c, in the order of 01's `features`; padding has c = 0."""
    (c0, c1, c2), root_d = coefficients, math.sqrt(D)
    rows = [(-1, -1, math.sqrt(c0))] if c0 else []
    rows += [(a, -1, math.sqrt(c1 / root_d)) for a in range(D)] if c1 else []
    for a in range(D):  # pairs a <= b, as torch.triu_indices lists them
        for b in range(a, D):
            rows.append((a, b, math.sqrt(c2 / D * (1 if a == b else 2))))
    return torch.tensor(rows + [(-1, -1, 0.0)] * (-len(rows) % FEATURES), device=device).T.contiguous()

# %% On chip: small parts
# Tensors are (N, T, size), N = B·H. Rows beyond T and columns beyond the size read 0; offsets can pass 2³¹.
@triton.jit
def place(n, t, T, SIZE: tl.constexpr):
    """Offsets and mask of rows t of head n: [rows, SIZE padded]."""
    d = tl.arange(0, padded(SIZE))
    return (tl.cast(n, tl.int64) * T + t)[:, None] * SIZE + d[None, :], (t < T)[:, None] & (d < SIZE)[None, :]


@triton.jit
def load(x, n, t, T, SIZE: tl.constexpr, TYPE: tl.constexpr):
    where, mask = place(n, t, T, SIZE)
    return tl.load(x + where, mask=mask, other=0.0).to(TYPE)


@triton.jit
def store(x, n, t, T, SIZE: tl.constexpr, values):
    where, mask = place(n, t, T, SIZE)
    tl.store(x + where, values.to(x.dtype.element_ty), mask=mask)


@triton.jit
def load_row(x, n, t, T):
    return tl.load(x + n.to(tl.int64) * T + t, mask=t < T, other=0.0)


@triton.jit
def product(a, b, sizes: tl.constexpr, total=None):
    """total + a @ b: factors in TYPE, the sum in float32."""
    return tl.dot(a.to(sizes.TYPE), b.to(sizes.TYPE), total, input_precision=sizes.PRECISION)


@triton.jit
def factors(x, table, f, sizes: tl.constexpr):
    """x [rows, D] -> x[a_f], x[b_f] [rows, F], c [1, F], and the one-hot matrices A, B [D, F]."""
    table += f[None, :]
    a, b, c = tl.load(table), tl.load(table + sizes.P_PAD), tl.load(table + 2 * sizes.P_PAD)
    d = tl.arange(0, padded(sizes.D)).to(tl.float32)[:, None]
    A, B = (d == a).to(sizes.TYPE), (d == b).to(sizes.TYPE)
    return product(x, A, sizes) + (a < 0).to(tl.float32), product(x, B, sizes) + (b < 0).to(tl.float32), c, A, B


@triton.jit
def features_and_state(x, table, states, slot, block, sizes: tl.constexpr):
    """For F features from `block` on: what `factors` gives, and their rows of a slot's state, S [F, DV] and z [1, F]."""
    f, states = block + tl.arange(0, sizes.F), states + slot.to(tl.int64) * sizes.STATE
    xa, xb, c, A, B = factors(x, table, f, sizes)
    z = tl.load(states + sizes.P * sizes.DV + f, mask=f < sizes.P, other=0.0)
    return xa, xb, c, A, B, load(states, 0, f, sizes.P, sizes.DV, tl.float32), z[None, :]

# %% Step 4 of 02 first: what a segment adds to the state
# In 02 the chunks follow each other. Here all segments sum their φ(k) vᵀ at once, a program for each and for each block
# of features, and a scan makes prefixes. Slot 0 holds the initial state, segment s goes into slot s + 1: after an
# *inclusive* scan slot s is what came before segment s, and the last slot is the final state. No shift, no subtraction.
# REVERSE is the mirror image: (x, y) is (q, do), slot 0 the gradient of the final state, the last segment comes first.
# S is summed transposed, [DV, F]: a warpgroup takes 64 rows.
@triton.jit
def state_kernel(x, y, inverse, delta, table, states, T, steps, slots, sizes: tl.constexpr, REVERSE: tl.constexpr):
    program, BLOCKS = tl.program_id(0), sizes.P_PAD // sizes.F
    f = program % BLOCKS * sizes.F + tl.arange(0, sizes.F)
    step, n = program // BLOCKS % steps, program // BLOCKS // steps
    first = (slots - 2 - step if REVERSE else step) * sizes.SEGMENT
    S, z = tl.zeros((padded(sizes.DV), sizes.F), tl.float32), tl.zeros((sizes.STEP, sizes.F), tl.float32)
    for start in range(first, min(first + sizes.SEGMENT, T), sizes.STEP):
        t = start + tl.arange(0, sizes.STEP)
        xa, xb, c, _, _ = factors(load(x, n, t, T, sizes.D, sizes.TYPE), table, f, sizes)
        if REVERSE:  # φ/den, which meets do and −δ
            phi, ones = (xa * xb * c * load_row(inverse, n, t, T)[:, None]).to(sizes.TYPE), -load_row(delta, n, t, T)
        else:  # φ, which meets v and 1; 0 beyond T, where the constant feature is not 0
            phi, ones = (xa * xb * c).to(sizes.TYPE), (t < T).to(tl.float32)
        S = product(tl.trans(load(y, n, t, T, sizes.DV, sizes.TYPE)), phi, sizes, S)
        z += phi.to(tl.float32) * ones[:, None]
    states += (n * slots + step + 1).to(tl.int64) * sizes.STATE
    store(states, 0, f, sizes.P, sizes.DV, tl.trans(S))
    tl.store(states + sizes.P * sizes.DV + f, tl.sum(z, 0), mask=f < sizes.P)

# %% The scan: prefix sums over the slots, in place; no atomics here or elsewhere, so two runs give the same bits
ROWS, COLUMNS = 16, 256  # slots at a time, so that sixteen loads are under way at once; numbers of a state a program


@triton.jit
def scan_kernel(states, steps, slots, STATE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(0) % tl.cdiv(STATE, COLUMNS) * COLUMNS + tl.arange(0, COLUMNS)
    states += (tl.program_id(0) // tl.cdiv(STATE, COLUMNS)).to(tl.int64) * slots * STATE
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, steps + 1, ROWS):
        slot = (start + tl.arange(0, ROWS)).to(tl.int64)
        where, mask = slot[:, None] * STATE + column[None, :], (slot <= steps)[:, None] & (column < STATE)[None, :]
        x = tl.load(states + where, mask=mask, other=0.0)
        tl.store(states + where, tl.cumsum(x, 0) + total[None, :], mask=mask)
        total += tl.sum(x, 0)

# %% Steps 1 to 3: the output
# A program takes a tile of queries. With T ≤ 512 and no initial state this is the quadratic form: one path for every T.
# den sums the *rounded* weights, those that multiply v: then they add up to 1 exactly, and o_0 is v_0. The sum is a
# product as well, with 16 columns of ones (02 has them in v). `first`: the first segment with something before it.
@triton.jit
def output_kernel(q, k, v, o, low, inverse, table, states, scale, shift, floor, T, slots, first, sizes: tl.constexpr):
    n, start = tl.program_id(0) // tl.cdiv(T, sizes.TILE), tl.program_id(0) % tl.cdiv(T, sizes.TILE) * sizes.TILE
    i, segment = start + tl.arange(0, sizes.TILE), start // sizes.SEGMENT
    qt, ones = load(q, n, i, T, sizes.D, sizes.TYPE), tl.full((sizes.STEP, 16), 1.0, sizes.TYPE)
    num, den = tl.zeros((sizes.TILE, padded(sizes.DV)), tl.float32), tl.zeros((sizes.TILE, 16), tl.float32)
    # 1. Inside the segment: the quadratic form, step by step. Keys after the query weigh 0, those beyond T among them.
    for past in range(segment * sizes.SEGMENT, start + sizes.TILE, sizes.STEP):
        j = past + tl.arange(0, sizes.STEP)
        u = product(qt, tl.trans(load(k, n, j, T, sizes.D, sizes.TYPE)), sizes) * scale + shift  # [TILE, STEP]
        w = u * u + floor
        if past >= start:
            w = tl.where(i[:, None] >= j[None, :], w, 0.0)
        num = product(w, load(v, n, j, T, sizes.DV, sizes.TYPE), sizes, num)
        den = product(w, ones, sizes, den)
    den = tl.sum(den, 1) / 16
    # 2. Everything before: the state, read by φ(q), F features at a time.
    if segment >= first:
        for block in range(0, sizes.P_PAD, sizes.F):
            xa, xb, c, _, _, S, z = features_and_state(qt, table, states, n * slots + segment, block, sizes)
            phi = (xa * xb * c).to(sizes.TYPE)
            num = product(phi, S, sizes, num)
            den += tl.sum(phi.to(tl.float32) * z, 1)
    # 3. One division. For the backward: 1/den, and `low`, what rounding took from o.
    den = 1 / (den + sizes.EPS)
    num *= den[:, None]
    store(o, n, i, T, sizes.DV, num)
    store(low, n, i, T, sizes.DV, num - num.to(o.dtype.element_ty).to(tl.float32))
    tl.store(inverse + n.to(tl.int64) * T + i, den, mask=i < T)

# %% Backward, the queries
# Where den is tiny, 1/den makes noise of a δ from a rounded o; summing δ anew from all weights takes as long as dq. So
# δ = do·(o + low). 1/den is the same for all terms of a query and comes last.
@triton.jit
def query_kernel(q, k, v, do, o, low, dq, inverse, delta, table, states, scale, shift, floor, T, slots, first,
                 sizes: tl.constexpr):
    n, start = tl.program_id(0) // tl.cdiv(T, sizes.TILE), tl.program_id(0) % tl.cdiv(T, sizes.TILE) * sizes.TILE
    i, segment = start + tl.arange(0, sizes.TILE), start // sizes.SEGMENT
    qt, dot = load(q, n, i, T, sizes.D, sizes.TYPE), load(do, n, i, T, sizes.DV, sizes.TYPE)
    o_exact = load(o, n, i, T, sizes.DV, tl.float32) + load(low, n, i, T, sizes.DV, tl.float32)
    d = tl.sum(dot.to(tl.float32) * o_exact, 1)[:, None]
    tl.store(delta + n.to(tl.int64) * T + i[:, None], d, mask=i[:, None] < T)
    dqt = tl.zeros((sizes.TILE, padded(sizes.D)), tl.float32)
    for past in range(segment * sizes.SEGMENT, start + sizes.TILE, sizes.STEP):
        j = past + tl.arange(0, sizes.STEP)
        kt = load(k, n, j, T, sizes.D, sizes.TYPE)
        u = product(qt, tl.trans(kt), sizes) * scale + shift
        du = (product(dot, tl.trans(load(v, n, j, T, sizes.DV, sizes.TYPE)), sizes) - d) * u
        if past >= start:
            du = tl.where(i[:, None] >= j[None, :], du, 0.0)
        dqt = product(du, kt, sizes, dqt)
    dqt *= 2 * scale
    if segment >= first:
        for block in range(0, sizes.P_PAD, sizes.F):
            xa, xb, c, A, B, S, z = features_and_state(qt, table, states, n * slots + segment, block, sizes)
            dphi = (product(dot, tl.trans(S), sizes) - d * z) * c  # [TILE, F]
            dqt = product(dphi * xa, tl.trans(B), sizes, product(dphi * xb, tl.trans(A), sizes, dqt))
    store(dq, n, i, T, sizes.D, dqt * load_row(inverse, n, i, T)[:, None])

# %% Backward, the keys and values
# A tile of keys meets later queries, those of its segment step by step, the others through R. 1/den belongs to the index
# that is summed and goes in early, while the weights are float32; queries beyond T read 1/den = 0.
@triton.jit
def key_kernel(q, k, v, do, dk, dv, inverse, delta, table, states, scale, shift, floor, T, slots, first, sizes: tl.constexpr):
    n, start = tl.program_id(0) // tl.cdiv(T, sizes.TILE), tl.program_id(0) % tl.cdiv(T, sizes.TILE) * sizes.TILE
    j, segment = start + tl.arange(0, sizes.TILE), start // sizes.SEGMENT
    kt, vt = load(k, n, j, T, sizes.D, sizes.TYPE), load(v, n, j, T, sizes.DV, sizes.TYPE)
    dkt, dvt = tl.zeros((sizes.TILE, padded(sizes.D)), tl.float32), tl.zeros((sizes.TILE, padded(sizes.DV)), tl.float32)
    for later in range(start, min(segment * sizes.SEGMENT + sizes.SEGMENT, T), sizes.STEP):
        i = later + tl.arange(0, sizes.STEP)
        qt, dot = load(q, n, i, T, sizes.D, sizes.TYPE), load(do, n, i, T, sizes.DV, sizes.TYPE)
        inv, d = load_row(inverse, n, i, T)[None, :], load_row(delta, n, i, T)[None, :]
        u = product(kt, tl.trans(qt), sizes) * scale + shift  # [keys, queries]
        u_inv = u * inv
        w, du = u * u_inv + floor * inv, (product(vt, tl.trans(dot), sizes) - d) * u_inv
        if later < start + sizes.TILE:
            w, du = tl.where(i[None, :] >= j[:, None], w, 0.0), tl.where(i[None, :] >= j[:, None], du, 0.0)
        dvt, dkt = product(w, dot, sizes, dvt), product(du, qt, sizes, dkt)
    dkt *= 2 * scale
    after = slots - 2 - segment  # segments after this one: the slot of R, in the mirror
    if after >= first:
        for block in range(0, sizes.P_PAD, sizes.F):
            xa, xb, c, A, B, R, r = features_and_state(kt, table, states, n * slots + after, block, sizes)
            dvt = product(xa * xb * c, R, sizes, dvt)
            dphi = (product(vt, tl.trans(R), sizes) + r) * c
            dkt = product(dphi * xa, tl.trans(B), sizes, product(dphi * xb, tl.trans(A), sizes, dkt))
    store(dk, n, j, T, sizes.D, dkt)
    store(dv, n, j, T, sizes.DV, dvt)

# %% The launches
def set_up(q, v, coefficients, segment):
    """Two functions that launch: on_tiles, a kernel on all tiles; sum_states, the state kernel and the scan."""
    (N, T, D), coefficients = q.shape, tuple(coefficients)
    sizes = sizes_for(D, v.shape[-1], count_features(coefficients, D), v.dtype, segment)
    fixed = Sizes(*map(tl.constexpr, sizes))  # known to the compiler
    table, (scale, shift, floor) = feature_table(coefficients, D, q.device), complete_square(coefficients, D)

    def on_tiles(kernel, tensors, states, first):
        kernel[(N * triton.cdiv(T, sizes.TILE),)](*tensors, table, states, scale, shift, floor, T, states.shape[1], first,
                                                  fixed, num_warps=sizes.WARPS)

    def sum_states(x, y, inverse, delta, states, edge, keep, reverse):  # edge: slot 0; keep: also the last slot
        slots, steps = states.shape[1], states.shape[1] - 2 + keep
        states[:, :, sizes.P * (sizes.DV + 1) :] = states[:, -1] = 0  # not written below: padding, a slot not asked for
        states[:, 0] = 0 if edge is None else edge
        if steps:
            state_kernel[(N * steps * (sizes.P_PAD // sizes.F),)](x, y, inverse, delta, table, states, T, steps, slots,
                                                                  fixed, reverse)
            scan_kernel[(N * triton.cdiv(sizes.STATE, COLUMNS),)](states, steps, slots, sizes.STATE, ROWS, COLUMNS)
    return on_tiles, sum_states

# %% Two operations for PyTorch
# As custom operations, with a description of their outputs ("fake") and a gradient, they pass through `torch.compile`.
# States travel packed, (N, STATE). For the backward stay q, k, v, o, low, 1/den and the states (69 bytes a token).
def room(q, v, coefficients, segment):
    """Empty o, low, 1/den (N, T) and states (N, segments + 1, STATE)."""
    (N, T, D), inverse = q.shape, q.new_empty(q.shape[:2], dtype=torch.float32)
    P = count_features(coefficients, int(D))  # int: a symbolic D becomes this one
    states = inverse.new_empty(N, -(-T // segment) + 1, sizes_for(D, int(v.shape[-1]), P, v.dtype).STATE)
    return torch.empty_like(v), torch.empty_like(v, dtype=torch.bfloat16), inverse, states


@torch.library.custom_op("rebased::triton_forward", mutates_args=())
def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, initial: torch.Tensor | None, coefficients: list[float],
            segment: int, keep: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Contiguous (N, T, size) -> o, low, 1/den, the states, of which the final one only if `keep`."""
    on_tiles, sum_states = set_up(q, v, coefficients, segment)
    o, low, inverse, states = room(q, v, coefficients, segment)
    with torch.cuda.device_of(q):
        sum_states(k, v, inverse, inverse, states, initial, keep, False)
        on_tiles(output_kernel, (q, k, v, o, low, inverse), states, int(initial is None))
    return o, low, inverse, states


@torch.library.custom_op("rebased::triton_backward", mutates_args=())
def backward(do: torch.Tensor, d_final: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
             o: torch.Tensor, low: torch.Tensor, inverse: torch.Tensor, states: torch.Tensor, coefficients: list[float],
             segment: int, initial: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> dq, dk, dv and all R; the last is the gradient of the initial state, if there is one."""
    on_tiles, sum_states = set_up(q, v, coefficients, segment)
    do, (dq, dk, dv, delta, R) = do.contiguous(), map(torch.empty_like, (q, k, v, inverse, states))
    with torch.cuda.device_of(q):
        on_tiles(query_kernel, (q, k, v, do, o, low, dq, inverse, delta), states, int(not initial))
        sum_states(q, do, inverse, delta, R, d_final, initial, True)
        on_tiles(key_kernel, (q, k, v, do, dk, dv, inverse, delta), R, int(d_final is None))
    return dq, dk, dv, R


def remember(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # a gradient that is not there stays None, not a tensor of zeros
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.rest = list(inputs[4]), inputs[5], inputs[3] is not None  # coefficients, segment, whether there is an initial state


def differentiate(ctx, do, _low, _inverse, d_states):
    do = torch.zeros_like(ctx.saved_tensors[2]) if do is None else do
    *grads, R = backward(do, None if d_states is None else d_states[:, -1], *ctx.saved_tensors, *ctx.rest)
    return *grads, R[:, -1] if ctx.rest[-1] else None, None, None, None


forward.register_fake(lambda q, k, v, initial, coefficients, segment, keep: room(q, v, coefficients, segment))
backward.register_fake(lambda do, d_final, q, k, v, o, low, inverse, states, *_: tuple(map(torch.empty_like, (q, k, v, states))))
forward.register_autograd(differentiate, setup_context=remember)

# %% The function to call
def why_not(q, k, v, coefficients):
    """None, or in one line which limit these inputs exceed; `attention` of 02 then takes another form."""
    if coefficients is None:
        return "the kernel is no polynomial of q·k (coefficients None)"
    if not coefficients[2]:
        return f"the kernel needs coefficients (c0, c1, c2) with c2 > 0, got {tuple(coefficients)}"
    if any(x.dtype not in (torch.float32, torch.bfloat16, torch.float16) for x in (q, k, v)):
        return f"the tensors must be float32, bfloat16 or float16, got {q.dtype}, {k.dtype}, {v.dtype}"
    if q.shape[-1] > 32 or v.shape[-1] > 128:
        return f"D can be at most 32 and Dv at most 128, got D = {q.shape[-1]} and Dv = {v.shape[-1]}"
    if INTERPRETED:
        return None
    if not all(x.is_cuda and x.device == q.device for x in (q, k, v)):
        return f"the tensors must be on one NVIDIA GPU, got {q.device}, {k.device}, {v.device}"
    if torch.version.hip is not None:
        return "the GPU must be one of NVIDIA (ROCm is not supported)"
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return "the GPU must be Ampere or newer (compute capability 8.0)"
    return None


def chunked_attention(q, k, v, coefficients, S=None, z=None, return_state=False, segment=SEGMENT):
    """q, k (B, H, T, D), v (B, H, T, Dv) -> o (B, H, T, Dv), or (o, S, z) with return_state.

    S (B, H, P, Dv), z (B, H, P). Raises ValueError that names the limit (`why_not`).
    """
    if problem := why_not(q, k, v, coefficients):
        raise ValueError(f"no Triton kernel for these inputs: {problem}")
    B, H, _, D = q.shape
    Dv = v.shape[-1]
    P = count_features(coefficients, D)
    initial = None
    if S is not None:
        packed = torch.cat([S.flatten(2), z], -1).flatten(0, 1).float()  # (N, P·Dv + P)
        initial = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % 16))
    q, k, v = (x.flatten(0, 1).contiguous() for x in (q, k, v))  # (N, T, size): a transposed view is copied here
    o, _, _, states = forward(q, k, v, initial, [float(c) for c in coefficients], segment, return_state)
    o = o.unflatten(0, (B, H))
    if not return_state:
        return o
    S, z, _ = states[:, -1].clone().unflatten(0, (B, H)).tensor_split((P * Dv, P * Dv + P), -1)  # a copy frees the rest
    return o, S.unflatten(-1, (P, Dv)), z
