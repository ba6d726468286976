"""02 · Linear attention on a GPU: the chunked form as five Triton kernels, forward and backward."""
# %%
import functools
import os
import sys
from importlib import import_module

import torch
import torch.nn.functional as F

MISSING = "02_linear_attention_triton needs Triton (on Linux: pip install triton==3.7.1); every other file runs without it"
try:
    import triton
    import triton.language as tl
except ImportError:
    if __name__ == "__main__":
        sys.exit(MISSING)
    raise ImportError(MISSING) from None

kernels = import_module("01_kernels")
linear = import_module("02_linear_attention")

SEGMENT = 512
TILE = tl.constexpr(64)
FEATURES = tl.constexpr(32)
EPS = tl.constexpr(linear.EPS)


@functools.lru_cache
def feature_table(coefficients, D, device):
    (c0, c1, c2), root_d = coefficients, D**0.5
    table = [(-1, -1, c0**0.5)] if c0 else []
    table += [(a, -1, (c1 / root_d) ** 0.5) for a in range(D)] if c1 else []
    for turn in range(D // 2 + 1):
        rows = D // 2 if 2 * turn == D else D
        table += [(a, (a + turn) % D, (c2 * (2 if turn else 1)) ** 0.5 / root_d) for a in range(rows)]
    P = len(table)
    table += [(-1, -1, 0.0)] * (-P % FEATURES.value)
    return P, torch.tensor(table, dtype=torch.float32, device=device).T.contiguous()


@triton.jit
def tile(ptr, strides, head, HEADS, t, T, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    d = tl.arange(0, PADDED)
    ptr += (head // HEADS).to(tl.int64) * strides[0] + (head % HEADS).to(tl.int64) * strides[1]
    return ptr + t.to(tl.int64)[:, None] * strides[2] + d[None, :], (t < T)[:, None] & (d < WIDTH)[None, :]


@triton.jit
def load(ptr, strides, head, HEADS, t, T, WIDTH: tl.constexpr, PADDED: tl.constexpr, TYPE: tl.constexpr):
    ptrs, mask = tile(ptr, strides, head, HEADS, t, T, WIDTH, PADDED)
    return tl.load(ptrs, mask=mask, other=0.0).to(TYPE)


@triton.jit
def one_hots(table, f, P_PAD: tl.constexpr, D_PAD: tl.constexpr, TYPE: tl.constexpr):
    a, b, c = tl.load(table + f), tl.load(table + P_PAD + f), tl.load(table + 2 * P_PAD + f)
    d = tl.arange(0, D_PAD).to(tl.float32)
    A, B = d[:, None] == a[None, :], d[:, None] == b[None, :]
    return A.to(TYPE), B.to(TYPE), (a < 0).to(tl.float32), (b < 0).to(tl.float32), c


@triton.jit
def factors(x, A, B, a1, b1, PRECISION: tl.constexpr):
    xa = tl.dot(x, A, input_precision=PRECISION) + a1[None, :]
    xb = tl.dot(x, B, input_precision=PRECISION) + b1[None, :]
    return xa, xb


@triton.jit
def load_state(states, slot, f, P: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr, SIZE: tl.constexpr):
    d = tl.arange(0, DV_PAD)
    states += slot.to(tl.int64) * SIZE
    S = tl.load(states + f[:, None] * DV + d[None, :], mask=(f < P)[:, None] & (d < DV)[None, :], other=0.0)
    return S, tl.load(states + P * DV + f, mask=f < P, other=0.0)


@triton.jit
def state_kernel(x, x_strides, y, y_strides, inverse, delta, table, states, HEADS, T, steps, slots,
                 D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
                 P: tl.constexpr, P_PAD: tl.constexpr, SIZE: tl.constexpr, SEGMENT: tl.constexpr,
                 TYPE: tl.constexpr, PRECISION: tl.constexpr, REVERSE: tl.constexpr):
    program = tl.program_id(0)
    BLOCKS: tl.constexpr = P_PAD // FEATURES
    f = program % BLOCKS * FEATURES + tl.arange(0, FEATURES)
    step, head = program // BLOCKS % steps, program // BLOCKS // steps
    segment = slots - 2 - step if REVERSE else step
    slot = segment if REVERSE else segment + 1
    A, B, a1, b1, c = one_hots(table, f, P_PAD, D_PAD, TYPE)
    S = tl.zeros((DV_PAD, FEATURES), tl.float32)
    z = tl.zeros((TILE, FEATURES), tl.float32)
    for start in range(segment * SEGMENT, min(segment * SEGMENT + SEGMENT, T), TILE):
        t = start + tl.arange(0, TILE)
        xt = load(x, x_strides, head, HEADS, t, T, D, D_PAD, TYPE)
        yt = load(y, y_strides, head, HEADS, t, T, DV, DV_PAD, TYPE)
        xa, xb = factors(xt, A, B, a1, b1, PRECISION)
        phi = (xa * xb * c[None, :]).to(TYPE)
        if REVERSE:
            inv = tl.load(inverse + head.to(tl.int64) * T + t, mask=t < T, other=0.0)
            y1 = -inv * tl.load(delta + head.to(tl.int64) * T + t, mask=t < T, other=0.0)
            yt = (yt * inv[:, None]).to(TYPE)
        else:
            y1 = (t < T).to(tl.float32)
        S = tl.dot(tl.trans(yt), phi, S, input_precision=PRECISION)
        z += phi.to(tl.float32) * y1[:, None]
    states += (head * slots + slot).to(tl.int64) * SIZE
    d = tl.arange(0, DV_PAD)
    tl.store(states + f[None, :] * DV + d[:, None], S, mask=(f < P)[None, :] & (d < DV)[:, None])
    tl.store(states + P * DV + f, tl.sum(z, 0), mask=f < P)


@triton.jit
def scan_kernel(states, slots, steps, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                REVERSE: tl.constexpr):
    BLOCKS: tl.constexpr = (SIZE + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    column = program % BLOCKS * COLUMNS + tl.arange(0, COLUMNS)
    states += (program // BLOCKS).to(tl.int64) * slots * SIZE + column
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, steps + 1, ROWS):
        row = start + tl.arange(0, ROWS)
        slot = slots - 1 - row if REVERSE else row
        mask = (row <= steps)[:, None] & (column < SIZE)[None, :]
        x = tl.load(states + slot.to(tl.int64)[:, None] * SIZE, mask=mask, other=0.0)
        tl.store(states + slot.to(tl.int64)[:, None] * SIZE, tl.cumsum(x, 0) + total[None, :], mask=mask)
        total += tl.sum(x, 0)


@triton.jit
def output_kernel(q, q_strides, k, k_strides, v, v_strides, table, states, o, o_strides, inverse,
                  scale, shift, floor, HEADS, T, slots, first,
                  D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
                  P: tl.constexpr, P_PAD: tl.constexpr, SIZE: tl.constexpr, SEGMENT: tl.constexpr,
                  TYPE: tl.constexpr, PRECISION: tl.constexpr):
    tiles = tl.cdiv(T, TILE)
    head, start = tl.program_id(0) // tiles, tl.program_id(0) % tiles * TILE
    segment = start // SEGMENT
    i = start + tl.arange(0, TILE)
    qt = load(q, q_strides, head, HEADS, i, T, D, D_PAD, TYPE)
    num = tl.zeros((TILE, DV_PAD), tl.float32)
    den = tl.zeros((TILE,), tl.float32)
    if segment >= first:
        for block in range(0, P_PAD, FEATURES):
            f = block + tl.arange(0, FEATURES)
            A, B, a1, b1, c = one_hots(table, f, P_PAD, D_PAD, TYPE)
            S, z = load_state(states, head * slots + segment, f, P, DV, DV_PAD, SIZE)
            xa, xb = factors(qt, A, B, a1, b1, PRECISION)
            phi = (xa * xb * c[None, :]).to(TYPE)
            num = tl.dot(phi, S.to(TYPE), num, input_precision=PRECISION)
            den += tl.sum(phi.to(tl.float32) * z[None, :], 1)
    for past in range(segment * SEGMENT, start + TILE, TILE):
        j = past + tl.arange(0, TILE)
        kt = load(k, k_strides, head, HEADS, j, T, D, D_PAD, TYPE)
        vt = load(v, v_strides, head, HEADS, j, T, DV, DV_PAD, TYPE)
        u = tl.dot(qt, tl.trans(kt), input_precision=PRECISION) * scale + shift
        w = tl.where(i[:, None] >= j[None, :], u * u + floor, 0.0).to(TYPE)
        num = tl.dot(w, vt, num, input_precision=PRECISION)
        den += tl.sum(w.to(tl.float32), 1)
    inv = 1 / (den + EPS)
    ptrs, mask = tile(o, o_strides, head, HEADS, i, T, DV, DV_PAD)
    tl.store(ptrs, (num * inv[:, None]).to(o.dtype.element_ty), mask=mask)
    tl.store(inverse + head.to(tl.int64) * T + i, inv, mask=i < T)


@triton.jit
def query_gradient_kernel(q, q_strides, k, k_strides, v, v_strides, do, do_strides, table, states, inverse,
                          delta, dq, dq_strides, scale, shift, floor, HEADS, T, slots, first,
                          D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
                          P: tl.constexpr, P_PAD: tl.constexpr, SIZE: tl.constexpr, SEGMENT: tl.constexpr,
                          TYPE: tl.constexpr, PRECISION: tl.constexpr):
    tiles = tl.cdiv(T, TILE)
    head, start = tl.program_id(0) // tiles, tl.program_id(0) % tiles * TILE
    segment = start // SEGMENT
    i = start + tl.arange(0, TILE)
    qt = load(q, q_strides, head, HEADS, i, T, D, D_PAD, TYPE)
    dot = load(do, do_strides, head, HEADS, i, T, DV, DV_PAD, TYPE)
    inv = tl.load(inverse + head.to(tl.int64) * T + i, mask=i < T, other=0.0)
    d = tl.zeros((TILE,), tl.float32)
    dqt = tl.zeros((TILE, D_PAD), tl.float32)
    for gradient in tl.static_range(2):
        if segment >= first:
            for block in range(0, P_PAD, FEATURES):
                f = block + tl.arange(0, FEATURES)
                A, B, a1, b1, c = one_hots(table, f, P_PAD, D_PAD, TYPE)
                S, z = load_state(states, head * slots + segment, f, P, DV, DV_PAD, SIZE)
                xa, xb = factors(qt, A, B, a1, b1, PRECISION)
                dphi = tl.dot(dot, tl.trans(S.to(TYPE)), input_precision=PRECISION)
                if gradient:
                    dphi = (dphi - d[:, None] * z[None, :]) * c[None, :]
                    dqt = tl.dot((dphi * xb).to(TYPE), tl.trans(A), dqt, input_precision=PRECISION)
                    dqt = tl.dot((dphi * xa).to(TYPE), tl.trans(B), dqt, input_precision=PRECISION)
                else:
                    phi = (xa * xb * c[None, :]).to(TYPE)
                    d += tl.sum(phi.to(tl.float32) * dphi, 1)
        for past in range(segment * SEGMENT, start + TILE, TILE):
            j = past + tl.arange(0, TILE)
            kt = load(k, k_strides, head, HEADS, j, T, D, D_PAD, TYPE)
            vt = load(v, v_strides, head, HEADS, j, T, DV, DV_PAD, TYPE)
            seen = i[:, None] >= j[None, :]
            u = tl.dot(qt, tl.trans(kt), input_precision=PRECISION) * scale + shift
            dw = tl.dot(dot, tl.trans(vt), input_precision=PRECISION)
            if gradient:
                du = tl.where(seen, (dw - d[:, None]) * u * (2 * scale), 0.0).to(TYPE)
                dqt = tl.dot(du, kt, dqt, input_precision=PRECISION)
            else:
                w = tl.where(seen, u * u + floor, 0.0).to(TYPE)
                d += tl.sum(w.to(tl.float32) * dw, 1)
        if not gradient:
            d *= inv
    ptrs, mask = tile(dq, dq_strides, head, HEADS, i, T, D, D_PAD)
    tl.store(ptrs, (dqt * inv[:, None]).to(dq.dtype.element_ty), mask=mask)
    tl.store(delta + head.to(tl.int64) * T + i, d, mask=i < T)


@triton.jit
def key_value_gradient_kernel(q, q_strides, k, k_strides, v, v_strides, do, do_strides, table, states, inverse,
                              delta, dk, dk_strides, dv, dv_strides, scale, shift, floor, HEADS, T, slots, last,
                              D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
                              P: tl.constexpr, P_PAD: tl.constexpr, SIZE: tl.constexpr, SEGMENT: tl.constexpr,
                              TYPE: tl.constexpr, PRECISION: tl.constexpr):
    tiles = tl.cdiv(T, TILE)
    head, start = tl.program_id(0) // tiles, tl.program_id(0) % tiles * TILE
    segment = start // SEGMENT
    j = start + tl.arange(0, TILE)
    kt = load(k, k_strides, head, HEADS, j, T, D, D_PAD, TYPE)
    vt = load(v, v_strides, head, HEADS, j, T, DV, DV_PAD, TYPE)
    dkt = tl.zeros((TILE, D_PAD), tl.float32)
    dvt = tl.zeros((TILE, DV_PAD), tl.float32)
    if segment < last:
        for block in range(0, P_PAD, FEATURES):
            f = block + tl.arange(0, FEATURES)
            A, B, a1, b1, c = one_hots(table, f, P_PAD, D_PAD, TYPE)
            R, r = load_state(states, head * slots + segment + 1, f, P, DV, DV_PAD, SIZE)
            xa, xb = factors(kt, A, B, a1, b1, PRECISION)
            phi = (xa * xb * c[None, :]).to(TYPE)
            dvt = tl.dot(phi, R.to(TYPE), dvt, input_precision=PRECISION)
            dphi = tl.dot(vt, tl.trans(R.to(TYPE)), input_precision=PRECISION)
            dphi = (dphi + r[None, :]) * c[None, :]
            dkt = tl.dot((dphi * xb).to(TYPE), tl.trans(A), dkt, input_precision=PRECISION)
            dkt = tl.dot((dphi * xa).to(TYPE), tl.trans(B), dkt, input_precision=PRECISION)
    for later in range(start, min(segment * SEGMENT + SEGMENT, T), TILE):
        i = later + tl.arange(0, TILE)
        qt = load(q, q_strides, head, HEADS, i, T, D, D_PAD, TYPE)
        dot = load(do, do_strides, head, HEADS, i, T, DV, DV_PAD, TYPE)
        inv = tl.load(inverse + head.to(tl.int64) * T + i, mask=i < T, other=0.0)
        d = tl.load(delta + head.to(tl.int64) * T + i, mask=i < T, other=0.0)
        seen = i[None, :] >= j[:, None]
        u = tl.dot(kt, tl.trans(qt), input_precision=PRECISION) * scale + shift
        w = tl.where(seen, (u * u + floor) * inv[None, :], 0.0).to(TYPE)
        dvt = tl.dot(w, dot, dvt, input_precision=PRECISION)
        dw = tl.dot(vt, tl.trans(dot), input_precision=PRECISION)
        du = tl.where(seen, (dw - d[None, :]) * u * (2 * scale * inv[None, :]), 0.0).to(TYPE)
        dkt = tl.dot(du, qt, dkt, input_precision=PRECISION)
    ptrs, mask = tile(dk, dk_strides, head, HEADS, j, T, D, D_PAD)
    tl.store(ptrs, dkt.to(dk.dtype.element_ty), mask=mask)
    ptrs, mask = tile(dv, dv_strides, head, HEADS, j, T, DV, DV_PAD)
    tl.store(ptrs, dvt.to(dv.dtype.element_ty), mask=mask)


def constants(D, DV, P, dtype, segment):
    return {
        "D": D, "DV": DV, "D_PAD": triton.next_power_of_2(max(16, D)), "DV_PAD": triton.next_power_of_2(max(16, DV)),
        "P": P, "P_PAD": triton.cdiv(P, FEATURES.value) * FEATURES.value, "SIZE": triton.cdiv(P * DV + P, 16) * 16,
        "SEGMENT": segment, "TYPE": tl.bfloat16 if dtype == torch.bfloat16 else tl.float32,
        "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
    }


def launch(kernel, programs, *arguments, warps=4, **meta):
    """Run `kernel` in that many programs; nothing to do for none."""
    names = kernel.arg_names
    meta = {name: value for name, value in meta.items() if name in names}
    if programs:
        kernel[(programs,)](*arguments, num_warps=warps, **meta)


def strides(x):
    return x.stride()[:3]


def set_up(q, v, coefficients, segment):
    (B, H, T, D), DV = q.shape, v.shape[-1]
    P, table = feature_table(tuple(coefficients), D, q.device)
    w = linear.complete_square(coefficients, D)
    return B * H, triton.cdiv(T, segment), table, (w.scale, w.shift, w.floor), constants(D, DV, P, v.dtype, segment)


def summed_states(x, y, inverse, delta, table, initial, steps, segments, meta, reverse):
    (B, H, T, _), size = x.shape, meta["SIZE"]
    states = x.new_empty(B * H, segments + 1, size, dtype=torch.float32)
    states[:, -1 if reverse else 0] = 0 if initial is None else initial
    launch(state_kernel, B * H * steps * (meta["P_PAD"] // FEATURES.value), x, strides(x), y, strides(y), inverse, delta,
           table, states, H, T, steps, segments + 1, REVERSE=reverse, **meta)
    launch(scan_kernel, B * H * triton.cdiv(size, 256) * (steps > 1 or initial is not None), states, segments + 1, steps,
           ROWS=16, COLUMNS=256, REVERSE=reverse, **meta)
    return states


@torch.library.custom_op("rebased::triton_forward", mutates_args=())
def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, initial: torch.Tensor | None, coefficients: list[float],
            segment: int, keep: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    N, segments, table, weight, meta = set_up(q, v, coefficients, segment)
    (_, H, T, _) = q.shape
    with torch.cuda.device_of(q):
        inverse = q.new_empty(N, T, dtype=torch.float32)
        states = summed_states(k, v, inverse, inverse, table, initial, segments - 1 + keep, segments, meta, False)
        o = torch.empty_like(v)
        launch(output_kernel, N * triton.cdiv(T, TILE.value), q, strides(q), k, strides(k), v, strides(v), table, states,
               o, strides(o), inverse, *weight, H, T, segments + 1, int(initial is None), **meta)
    return o, states[:, -1].clone() if keep else states.new_empty(0), states, inverse


@forward.register_fake
def _(q, k, v, initial, coefficients, segment, keep):
    (B, H, T, D), Dv = q.shape, v.shape[-1]
    P = linear.num_rows(coefficients, D)
    size = triton.cdiv(P * (Dv + 1), 16) * 16
    final = q.new_empty(B * H, size, dtype=torch.float32) if keep else q.new_empty(0, dtype=torch.float32)
    states = q.new_empty(B * H, (T + segment - 1) // segment + 1, size, dtype=torch.float32)
    return torch.empty_like(v), final, states, q.new_empty(B * H, T, dtype=torch.float32)


@torch.library.custom_op("rebased::triton_backward", mutates_args=())
def backward(do: torch.Tensor, d_final: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
             states: torch.Tensor, inverse: torch.Tensor, has_initial: bool, coefficients: list[float],
             segment: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    N, segments, table, weight, meta = set_up(q, v, coefficients, segment)
    (_, H, T, _) = q.shape
    with torch.cuda.device_of(q):
        dq, dk, dv, delta = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(inverse)
        inputs = q, strides(q), k, strides(k), v, strides(v), do, strides(do), table
        programs = N * triton.cdiv(T, TILE.value)
        launch(query_gradient_kernel, programs, *inputs, states, inverse, delta, dq, strides(dq), *weight, H, T,
               segments + 1, int(not has_initial), **meta)
        R = summed_states(q, do, inverse, delta, table, d_final, segments - 1 + has_initial, segments, meta, True)
        launch(key_value_gradient_kernel, programs, *inputs, R, inverse, delta, dk, strides(dk), dv, strides(dv), *weight,
               H, T, segments + 1, segments - (d_final is None), **meta)
    return dq, dk, dv, R[:, 0].clone() if has_initial else R.new_empty(0)


@backward.register_fake
def _(do, d_final, q, k, v, states, inverse, has_initial, coefficients, segment):
    d_initial = torch.empty_like(states[:, 0]) if has_initial else states.new_empty(0)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), d_initial


def remember(ctx, inputs, output):
    q, k, v, initial, coefficients, segment, keep = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output[2:])
    ctx.rest = initial is not None, coefficients, segment, keep


def differentiate(ctx, do, d_final, d_states, d_inverse):
    (q, k, v, states, inverse), (has_initial, coefficients, segment, keep) = ctx.saved_tensors, ctx.rest
    do = torch.zeros_like(v) if do is None else do if do.stride(-1) == 1 else do.contiguous()
    dq, dk, dv, d_initial = backward(do, d_final if keep else None, q, k, v, states, inverse, has_initial, coefficients,
                                     segment)
    return dq, dk, dv, d_initial if has_initial else None, None, None, None


forward.register_autograd(differentiate, setup_context=remember)


def triton_attention(q, k, v, kernel, state=None, return_state=False):
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    (B, H, T, D), Dv = q.shape, v.shape[-1]
    P = linear.num_rows(kernel.coefficients, D)
    initial = None
    if state is not None:
        initial = torch.cat([state.S.flatten(2), state.z], -1).flatten(0, 1).float()
        initial = F.pad(initial, (0, -P * (Dv + 1) % 16))
    o, final, *_ = forward(q, k, v, initial, list(kernel.coefficients), SEGMENT, return_state)
    if not return_state:
        return o
    S, z, _ = final.unflatten(0, (B, H)).split([P * Dv, P, final.shape[-1] - P * Dv - P], -1)
    return o, linear.State(S.unflatten(-1, (P, Dv)), z)
