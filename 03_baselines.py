"""03 · Baselines: Mamba and RWKV, two recurrences and one way to run them in parallel

Aim: the two recurrent systems that the paper compares with, in plain PyTorch, so that its figure can be drawn.

You will learn
  1. that both are one equation, h_t = a_t ⊙ h_{t−1} + b_t: they differ in who chooses a_t;
  2. how pairs of steps make T steps log T deep, with no quotient that could overflow;
  3. how RWKV's exponentials stay finite: a running maximum, the same recurrence with max for + and + for ×;
  4. what separates them from 02: each channel has its own state of 2 or 16 numbers, and a decay that forgets.

Equations
  recurrence   h_t = a_t ⊙ h_{t−1} + b_t, 0 ≤ a_t ≤ 1;   two steps are one:  (a, b) then (a', b') = (a'a, a'b + b')
  Mamba        h_t = exp(Δ_t A) ⊙ h_{t−1} + Δ_t u_t B_t,   y_t = C_t·h_t + D u_t;  Δ, B, C depend on u     [G 2, 3.2]
  RWKV-4       y_t = (Σ_{j<t} e^{(t−1−j)w + k_j} v_j + e^{c + k_t} v_t) / (the same with 1 for v),         [R 3.1.2]
               w = −e^decay, c = first: two such recurrences, h = num and h = den with a = e^w

Letters: B batch, T time, d_model; E channels inside the layer (2·d_model, or d_model), N numbers of state a channel,
  R rank of Δ. B and C being taken, Mamba's B, C, D are `write`, `read`, `skip`, its Δ is `dt`; RWKV's u is `first`.
  Inside this file time comes first, (T, B, ...): a step, or every second step, is then a run of memory.

References: [P], [C] as in 01; [G] Gu and Dao, Mamba, COLM 2024, arXiv 2312.00752, its code github state-spaces/mamba;
  [R] Peng et al., RWKV, EMNLP Findings 2023, arXiv 2305.13048, its code github BlinkDL/RWKV-LM, RWKV-v4neo;
  the recursion over pairs: Blelloch, Prefix Sums and Their Applications, 1990.

Run: python 03_baselines.py      (15 seconds: milliseconds of a training step, bytes of state, checks)
"""
# %%
import argparse
import math
import sys
from importlib import import_module

import torch
import torch.nn as nn
import torch.nn.functional as F

kernels = import_module("01_kernels")
linear_attention = import_module("02_linear_attention")
cost = import_module("02_linear_attention_cost")

# %% One recurrence, log T deep
# Step 2i+1 swallows step 2i: T/2 steps remain, for the odd rows. Solve those, the same way; each even row is then one
# step away from the odd row before it. Three multiplications a row in all, in place, three calls a level instead of T.
# The usual shortcut divides by a running product of a, 0 in float32 after a few tokens; nothing is divided here.
def sweep(a, h, times=torch.mul, plus=torch.addcmul):
    """In place: row t of h (T+1, ...) becomes h_t + a_t · (row t−1), t = 1..T. a (T, ...) has a_t at index t−1."""
    T, odd, even = len(a), h[1::2], h[2::2]
    plus(odd, a[::2], h[:T:2], out=odd)
    if T > 2:
        sweep(times(a[1 : T - 1 : 2], a[2::2]), odd, times, plus)
    if T > 1:
        plus(even, a[1::2], h[1:T:2], out=even)


# A gradient runs the other way: g_t = dh_t + a_{t+1} g_{t+1}. The mirror image, pairs counted from the end.
def sweep_back(a, g):
    """In place: row t of g (T+1, ...) becomes g_t + a_{t+1} · (row t+1), t = T−1..0."""
    T, s = len(a), (len(a) - 1) % 2
    odd, even = g[s:T:2], g[1 - s : T - 1 : 2]  # odd and even distance from the end
    torch.addcmul(odd, a[s::2], g[s + 1 :: 2], out=odd)
    if T > 2:
        sweep_back(a[s : T - 2 : 2] * a[s + 1 : T - 1 : 2], odd)
    if T > 1:
        torch.addcmul(even, a[1 - s : T - 1 : 2], g[2 - s : T : 2], out=even)


class Recurrence(torch.autograd.Function):
    """a (T, B, 1, E), b (T, B, N, E), h (B, N, E) -> H (T+1, B, N, E): row 0 is h, row t is h_t."""

    @staticmethod
    def forward(ctx, a, b, h):
        H = torch.cat([h.unsqueeze(0), b])
        sweep(a, H)
        ctx.save_for_backward(a, H)
        return H

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dH):
        (a, H), G = ctx.saved_tensors, dH.clone()
        sweep_back(a, G)
        return (G[1:] * H[:-1]).sum(2, keepdim=True), G[1:], G[0]

# %% Mamba's scan: 16 numbers of state a channel
# All h_t at once are (T, B, 16, E), 32 times the layer's input: written out they would not fit a cache, and autograd
# would keep four such tensors. So a block of 16 tokens of a few sequences at a time, in room that is reserved once, and
# backwards each block is computed again from the state before it, as 02's chunked form does.
TOKENS, NUMBERS = 16, 2**18  # tokens of a block; numbers in each of a block's tensors, per core


def blocks(u, N):
    """Slices of sequences, slices of time, and three rooms that hold a block's (c+1, B, N, E): u (T, B, E)."""
    T, B, E = u.shape
    together = B if u.is_cuda else max(1, NUMBERS * torch.get_num_threads() // (TOKENS * N * E))
    cut = ([slice(i, min(i + size, end)) for i in range(0, end, size)] for size, end in ((together, B), (TOKENS, T)))
    return *cut, u.new_empty(3, (min(TOKENS, T) + 1) * min(together, B) * N * E)


def block_states(u, dt, A, write, h, rooms):
    """The decays a (c, B, N, E) of a block of c tokens and its states H (c+1, B, N, E), row 0 being h."""
    shape = (len(u) + 1, *h.shape)
    H, a = (room[: math.prod(shape)].view(shape) for room in rooms[:2])
    a = torch.mul(dt.unsqueeze(2), A, out=a[1:]).exp_()  # A < 0 < dt: never above 1
    H[0] = h
    torch.mul(write.unsqueeze(3), (dt * u).unsqueeze(2), out=H[1:])
    sweep(a, H)
    return a, H


def over_channels(x, H):
    """Σ_E: x (T, B, E), H (T, B, N, E) -> (T, B, N)."""
    return (x.unsqueeze(2) @ H.mT).squeeze(2)


def over_states(x, H):
    """Σ_N: x (T, B, N), H (T, B, N, E) -> (T, B, E)."""
    return (x.unsqueeze(2) @ H).squeeze(2)


class SelectiveScan(torch.autograd.Function):
    """u, dt (T, B, E), A (N, E), write, read (T, B, N), h (B, N, E) -> y (T, B, E) and the last state."""

    @staticmethod
    def forward(ctx, u, dt, A, write, read, h):
        y, last, past = torch.empty_like(u), torch.empty_like(h), {}
        groups, times, rooms = blocks(u, len(A))
        for some in groups:
            state = h[some]
            for now in times:
                at, past[some.start, now.start] = (now, some), state
                _, H = block_states(u[at], dt[at], A, write[at], state, rooms)
                y[at], state = over_states(read[at], H[1:]), H[-1].clone()
            last[some] = state
        ctx.save_for_backward(u, dt, A, write, read)
        ctx.past = past if any(ctx.needs_input_grad) else None
        return y, last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dlast):
        u, dt, A, write, read = saved = ctx.saved_tensors
        (du, ddt, dA, dwrite, dread), dh = (torch.zeros_like(x) for x in saved), torch.empty_like(dlast)
        groups, times, rooms = blocks(u, len(A))
        for some in groups:
            later = dlast[some]
            for now in reversed(times):
                at = (now, some)
                a, H = block_states(u[at], dt[at], A, write[at], ctx.past[some.start, now.start], rooms)
                G = rooms[2, : H.numel()].view_as(H)  # the gradient of each row of H
                torch.mul(read[at].unsqueeze(3), dy[at].unsqueeze(2), out=G[1:])
                G[0] = 0
                G[-1] += later
                sweep_back(a, G)
                later, G = G[0].clone(), G[1:]
                dread[at], dwrite[at] = over_channels(dy[at], H[1:]), over_channels(dt[at] * u[at], G)
                written = over_states(write[at], G)  # the gradient of dt·u
                exponent = a.mul_(G).mul_(H[:-1])  # the gradient of dt·A, where a = exp(dt·A)
                du[at], ddt[at] = written * dt[at], written * u[at] + torch.mul(exponent, A, out=G).sum(2)
                dA += exponent.mul_(dt[at].unsqueeze(2)).sum((0, 1))
            dh[some] = later
        return du, ddt, dA, dwrite, dread, dh


@linear_attention.without_autocast
def selective_scan(u, dt, A, write, read, h):
    """`SelectiveScan` in float32, or float64 if u is; the shapes are its own."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    y, h = SelectiveScan.apply(*(x.to(dtype) for x in (u, dt, A, write, read, h)))
    return y.to(u.dtype), h

# %% The layer
# The signature of every mixer of 03_model: forward(x, state=None, keep=False, positions=None) -> (y, state).
# x (B, T, d_model) continues after `state`; the state after x comes back if `keep`. With positions (B, n), y has those
# rows only.
def rows(x, positions):
    """x (T, B, d) at positions (B, n) -> (n, B, d); all of x if positions is None."""
    return x if positions is None else x.gather(0, positions.mT.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def causal_conv(x, conv, last):
    """Each channel sees itself and the 3 rows before it: x (T, B, E), last (3, B, E) -> y, the new last."""
    T, x = len(x), torch.cat([last, x])
    y = conv.bias
    for i, w in enumerate(conv.weight.squeeze(1).unbind(-1)):
        y = torch.addcmul(y, x[i : i + T], w)
    return y, x[T:]


class Mamba(nn.Module):
    """A gated selective state space. State: the last 3 inputs of the convolution, and h: 19 numbers a channel. [G 3.4]

    6d² + 110d + 4Rd parameters at E = 2d, R = ⌈d/16⌉: input and gate 4d², convolution 10d, select 2d(R + 32),
    dt 2dR + 2d, A 32d, skip 2d, out 2d². Twice that, the tables and 4d of norms are the paper's count. [P tab 6]
    """

    N = 16

    def __init__(self, config):
        super().__init__()
        d_model, E, self.R = config.d_model, 2 * config.d_model, math.ceil(config.d_model / 16)
        self.input, self.gate = nn.Linear(d_model, E, bias=False), nn.Linear(d_model, E, bias=False)
        self.conv = nn.Conv1d(E, E, 4, groups=E)  # holds weight and bias
        self.select = nn.Linear(E, self.R + 2 * self.N, bias=False)
        self.out = nn.Linear(E, d_model, bias=False)
        # `LanguageModel._initialise` draws every nn.Linear anew and sets its bias to 0. These four are parameters, no
        # nn.Linear, to outlive that: Δ starts between .001 and .1, a memory of 10 to 1,000 tokens where A = −1. [G 3.6]
        # ([C src/model.py] sets that bias to 0, hence Δ ≈ .69, a memory of two tokens; the code of [G] prevents it.)
        dt = torch.exp(torch.rand(E) * math.log(0.1 / 0.001) + math.log(0.001))
        self.dt_weight = nn.Parameter((torch.rand(E, self.R) * 2 - 1) * self.R**-0.5)
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus⁻¹
        self.A_log = nn.Parameter(torch.arange(1.0, self.N + 1).log().unsqueeze(1).repeat(1, E))  # A = −1..−16
        self.skip = nn.Parameter(torch.ones(E))

    def forward(self, x, state=None, keep=False, positions=None):
        x = x.transpose(0, 1)  # (T, B, d_model)
        u = self.input(x)
        if state is None:
            state = u.new_zeros(3, *u.shape[1:]), u.new_zeros(u.shape[1], self.N, u.shape[2])
        u, last = causal_conv(u, self.conv, state[0])
        u = F.silu(u)
        dt, write, read = self.select(u).split([self.R, self.N, self.N], dim=-1)
        dt = F.softplus(F.linear(dt, self.dt_weight, self.dt_bias))
        y, h = selective_scan(u, dt, -self.A_log.exp(), write, read, state[1])
        y = rows(torch.addcmul(y, u, self.skip), positions) * F.silu(self.gate(rows(x, positions)))
        return self.out(y).transpose(0, 1), (last.clone(), h) if keep else None  # a clone, lest it hold all T rows

# %% RWKV's scan: a quotient of two sums per channel
# num and den decay alike, by e^w: two rows of the recurrence. e^k overflows float32 at k = 89, so the sums are kept as
# e^{−m}·num and e^{−m}·den with m_t = max(m_{t−1} + w, k_t), the largest exponent so far. Any m gives the same
# quotient, so no gradient flows through it; and when they are read den ≥ 1, whatever the inputs.
def max_plus(h, a, before, out):
    """`addcmul` where + is max and × is +."""
    return torch.maximum(h, a + before, out=out)


@linear_attention.without_autocast
def wkv(k, v, decay, first, h, m):
    """k, v (T, B, E), decay, first (E,), h (B, 2, E), m (B, E) -> y (T, B, E), and h, m after token T. [R 3.1.2]"""
    given, dtype = k.dtype, torch.promote_types(k.dtype, torch.float32)
    k, v, w, first, h, m = (x.to(dtype) for x in (k, v, -decay.exp(), first, h, m))
    with torch.no_grad():
        m = torch.cat([m.unsqueeze(0), k])  # (T+1, B, E)
        sweep(w.expand(len(k), 1, -1), m, torch.add, max_plus)
        largest = torch.maximum(m[:-1], first + k)
    a, scale = torch.exp(m[:-1] + w - m[1:]), torch.exp(k - m[1:])  # both at most 1
    H = Recurrence.apply(a.unsqueeze(2), torch.stack([scale * v, scale], dim=2), h)
    num, den = H[:-1].unbind(2)  # before token t: it comes in by its own weight, `first`
    old, new = torch.exp(m[:-1] - largest), torch.exp(first + k - largest)
    return ((old * num + new * v) / (old * den + new)).to(given), H[-1], m[-1]


class RWKV(nn.Module):
    """Time mixing of RWKV, version 4. State: the last input, num, den, and m: 4 numbers a channel. [R 3.1]

    4d² + 5d parameters: four projections; decay, first, and a share of the token before in key, value and receptance.
    How a channel starts depends on `layer` (0 is the lowest), as in [R]'s code: lower layers look less far back.
    """

    def __init__(self, config, layer=0):
        super().__init__()
        d, layers = config.d_model, len(config.mixers)
        self.key, self.value, self.receptance, self.out = (nn.Linear(d, d, bias=False) for _ in range(4))
        depth, left = layer / max(1, layers - 1), 1 - layer / layers  # 0 to 1, and 1 to nearly 0
        channel = torch.arange(d) / d
        # None of these five is an nn.Linear: `_initialise` leaves them as they are.
        self.decay = nn.Parameter(-5 + 8 * torch.linspace(0, 1, d) ** (0.7 + 1.3 * depth))  # e^w from .993 to e^−20
        self.first = nn.Parameter(math.log(0.3) + ((torch.arange(d) + 1) % 3 - 1) * 0.5)
        self.mix_k = nn.Parameter(channel**left)
        self.mix_v = nn.Parameter(channel**left + 0.3 * depth)
        self.mix_r = nn.Parameter(channel ** (0.5 * left))

    def forward(self, x, state=None, keep=False, positions=None):
        x = x.transpose(0, 1)  # (T, B, d_model)
        if state is None:
            state = torch.zeros_like(x[0]), x.new_zeros(x.shape[1], 2, x.shape[2]), x.new_full(x.shape[1:], -math.inf)
        last, h, m = state
        before = torch.cat([last.unsqueeze(0), x[:-1]])
        k, v = self.key(torch.lerp(before, x, self.mix_k)), self.value(torch.lerp(before, x, self.mix_v))
        r = self.receptance(torch.lerp(rows(before, positions), rows(x, positions), self.mix_r))
        y, h, m = wkv(k, v, self.decay, self.first, h, m)
        y = self.out(torch.sigmoid(r) * rows(y, positions)).transpose(0, 1)
        return y, (x[-1].clone(), h.clone(), m.clone()) if keep else None  # clones, lest a state hold all T rows

# %% What 03_model has to know
# Both stand in both layers of the paper's model, RWKV in its usual block (five LayerNorms: 10d), Mamba in its own:
# x + mixer(RMSNorm(x)), one weight vector a layer, no second line; then the model's LayerNorm: 4d. [C src/model.py]
LAYERS = {"mamba": Mamba, "rwkv": RWKV}
NORMS = {"mamba": 4, "rwkv": 10}


class Shape:
    """What the layers read of 03_model's ModelConfig, which comes later."""

    def __init__(self, name, d_model):
        self.mixers, self.d_model = (name, name), d_model


def paper_count(name, d_model, seq_len):
    """Parameters of the paper's MQAR model: token and position tables, two layers, norms. [P tab 6]"""
    with torch.device("meta"):  # shapes only
        layer = sum(p.numel() for p in LAYERS[name](Shape(name, d_model)).parameters())
    return 8192 * d_model + seq_len * d_model + 2 * layer + NORMS[name] * d_model

# %% Claims
def mamba_loop(layer, x):
    """The equations read aloud, token by token: x (B, T, d_model) -> y."""
    u, outputs = F.pad(layer.input(x), (0, 0, 3, 0)), []
    A, h = -layer.A_log.exp(), 0
    for t in range(x.shape[1]):
        c = F.silu((u[:, t : t + 4] * layer.conv.weight.squeeze(1).T).sum(1) + layer.conv.bias)  # (B, E)
        dt, write, read = layer.select(c).split([layer.R, layer.N, layer.N], dim=-1)
        dt = F.softplus(dt @ layer.dt_weight.T + layer.dt_bias)
        h = torch.exp(dt.unsqueeze(1) * A) * h + write.unsqueeze(2) * (dt * c).unsqueeze(1)
        outputs.append(layer.out(((read.unsqueeze(2) * h).sum(1) + layer.skip * c) * F.silu(layer.gate(x[:, t]))))
    return torch.stack(outputs, dim=1)


def rwkv_loop(layer, x):
    """The same for RWKV, with exponentials as they stand: float64 and moderate k only."""
    last, num, den, outputs = torch.zeros_like(x[:, 0]), 0, 0, []
    for now in x.unbind(1):
        k, v, r = (linear(mix * now + (1 - mix) * last) for linear, mix in (
            (layer.key, layer.mix_k), (layer.value, layer.mix_v), (layer.receptance, layer.mix_r)))
        own = torch.exp(layer.first + k)
        outputs.append(layer.out(torch.sigmoid(r) * (num + own * v) / (den + own)))
        fade, last = torch.exp(-torch.exp(layer.decay)), now
        num, den = fade * num + torch.exp(k) * v, fade * den + torch.exp(k)
    return torch.stack(outputs, dim=1)


LOOPS = {"mamba": mamba_loop, "rwkv": rwkv_loop}


def example(name, T=37, B=3, d_model=12, seed=0):
    """A layer and x (B, T, d_model) in float64. 37 tokens are two blocks of Mamba's scan and a bit."""
    torch.manual_seed(seed)
    layer = LAYERS[name](Shape(name, d_model)).double()
    return layer, torch.randn(B, T, d_model, dtype=torch.float64, requires_grad=True)


def check_scan_equals_loop():
    """Outputs and all gradients are those of the recurrence token by token, within 1e-9."""
    for name, loop in LOOPS.items():
        layer, x = example(name)
        inputs = [x, *layer.parameters()]
        y, expected = layer(x)[0], loop(layer, x)
        upstream = torch.randn_like(y)
        found, gradients = (torch.autograd.grad(out, inputs, upstream) for out in (y, expected))
        for ours, theirs in zip((y, *found), (expected, *gradients), strict=True):
            error = linear_attention.distance([ours], [theirs])
            assert error < 1e-9, f"{name}: off by {error:.1e}"


@torch.no_grad()
def check_cut_anywhere():
    """In two parts at every place, or token by token: the same output, and a state of the same size."""
    for name in LAYERS:
        layer, x = example(name)
        whole, state, steps = layer(x)[0], None, []
        for t in range(x.shape[1]):
            y, state = layer(x[:, t : t + 1], state, keep=True)
            steps.append(y)
            rest = [layer(x[:, t + 1 :], state)[0]] if t + 1 < x.shape[1] else []
            error = linear_attention.distance([torch.cat(steps + rest, dim=1)], [whole])
            assert error < 1e-9, f"{name}: cut after {t + 1} tokens, off by {error:.1e}"


def check_the_papers_parameter_counts():
    """Table 6 of [P]: counted at L = 1024, Mamba's last at 512."""
    mamba, rwkv = (655_360, 1_413_120, 3_235_840, 7_847_936), (623_872, 1_313_280, 2_888_704, 6_825_984)
    for name, counts in (("mamba", mamba), ("rwkv", rwkv)):
        for d_model, count in zip((64, 128, 256, 512), counts, strict=True):
            found = paper_count(name, d_model, 512 if (name, d_model) == ("mamba", 512) else 1024)
            assert found == count, f"{name} at {d_model}: {found:,}, the paper has {count:,}"


@torch.no_grad()
def check_long_and_loud():
    """20,000 tokens, some of them 1,000 times too loud: finite in float32, and near float64."""
    worst = 0.0
    for name in LAYERS:
        layer, x = example(name, T=20_000, B=1)
        x[:, ::97] *= 1000
        expected, y = layer(x)[0], layer.float()(x.float())[0]
        assert y.isfinite().all(), name
        worst = max(worst, linear_attention.distance([y.double()], [expected]))
    assert worst < 1e-3, f"off by {worst:.1e}"
    return f"off by {worst:.0e} of the output"


CHECKS = [check_scan_equals_loop, check_cut_anywhere, check_the_papers_parameter_counts, check_long_and_loud]

# %% The table: a training step of one layer, at the paper's d_model 64
def rebased(d_model=64, heads=12, D=16):
    """ReBased's layer as 03_model has it, to compare with: a function of x (B, T, d_model), and its state's numbers."""
    kernel, Dv = kernels.ReBasedKernel(D, heads), d_model // heads
    q, k, v = (nn.Linear(d_model, heads * size, bias=False) for size in (D, D, Dv))
    out = nn.Linear(heads * Dv, d_model, bias=False)

    def layer(x):
        parts = (*kernel.prepare(q(x), k(x)), v(x))
        parts = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in parts)
        return out(linear_attention.attention(*parts, kernel).transpose(1, 2).flatten(2))

    return layer, heads * kernel.num_features * (Dv + 1)


LENGTHS = (32, 128, 512)


def step_seconds(call, T, tokens=2048):
    """Median seconds of forward and backward over `tokens` tokens, in sequences of T."""
    x = torch.randn(tokens // T, T, 64, requires_grad=True)
    return cost.interleaved({"step": lambda: call(x).sum().backward()}, 3)["step"]


def main(argv=None):
    """The table, its reading, the checks; returns how many checks failed."""
    parser = argparse.ArgumentParser(description="03: Mamba and RWKV beside ReBased, one layer each (15 seconds)")
    kernels.parse_arguments(parser, argv)
    torch.manual_seed(0)
    layer, numbers = rebased()
    table = {"rebased": (layer, numbers)}
    for name in LAYERS:
        mixer = LAYERS[name](Shape(name, 64))
        state = mixer(torch.randn(1, 5, 64), keep=True)[1]
        table[name] = (lambda x, mixer=mixer: mixer(x)[0]), sum(part.numel() for part in state)
        table[name + ", token by token"] = (lambda x, name=name, mixer=mixer: LOOPS[name](mixer, x)), table[name][1]
    print("One layer, d_model 64, forward and backward over 2,048 tokens in sequences of T, ms; state of a sequence.\n")
    print(f"{'layer':24}{'state':>10}" + "".join(f"{f'T = {T:,}':>12}" for T in LENGTHS))
    ms = {}
    for name, (call, numbers) in table.items():
        ms[name] = [step_seconds(call, T) * 1e3 for T in LENGTHS]
        print(f"{name:24}{4 * numbers:8,} B" + "".join(f"{each:12.1f}" for each in ms[name]))
    slower = [ms[name][1] / ms["rebased"][1] for name in LAYERS]
    faster = [ms[f"{name}, token by token"][2] / ms[name][2] for name in LAYERS]
    fewer = [table["rebased"][1] / table[name][1] for name in LAYERS]
    print(f"\nAt T = {LENGTHS[1]} Mamba takes {slower[0]:.1f} times as long as ReBased, RWKV {slower[1]:.1f} times; "
          f"at {LENGTHS[2]} their scans are")
    print(f"{faster[0]:.0f} and {faster[1]:.0f} times as fast as a loop over tokens. Of the whole past they keep "
          f"{fewer[0]:.0f} and {fewer[1]:.0f} times")
    print("fewer numbers than ReBased: all that they can recall must fit in there.\n")
    return kernels.run_checks(CHECKS)


if __name__ == "__main__":
    if main():
        sys.exit(1)
