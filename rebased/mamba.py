"""Mamba: a state space whose decay, input and output depend on the token. First as a loop, then fast.

Equations                                                                                      [1, sections 2 and 3.2]
  h_t = exp(Δ_t A) ⊙ h_{t−1} + Δ_t u_t B_t,   y_t = C_t·h_t + D u_t;   Δ, B and C are linear maps of u

Letters: B batch, T time, d_model; E = 2·d_model channels inside the layer, N = 16 numbers of state a channel,
  R rank of Δ. B and C being taken, Mamba's B, C, D are called `write`, `read`, `skip`, and its Δ is `dt`.
  In the scan time comes first, (T, B, ...): one step is then a run of memory.

References
  [1] Gu and Dao, Mamba: Linear-Time Sequence Modeling with Selective State Spaces, COLM 2024, arXiv 2312.00752;
      their code: github.com/state-spaces/mamba.
  [2] github.com/corl-team/rebased: the block that the paper on ReBased compares with.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from rebased.autograd import first_order_only, refuse_transforms, without_autocast
from rebased.scan import solve, solve_back

# The layer as a loop: the equations read aloud, and the oracle of the tests
def mamba_loop(layer, x):
    """What `layer`, a Mamba, computes, token by token: x (B, T, d_model) -> y of the same shape."""
    A = -layer.A_log.exp()  # (N, E), negative
    u = F.pad(layer.input(x), (0, 0, 3, 0))  # (B, 3 + T, E)
    h = torch.zeros(len(x), *A.shape, dtype=x.dtype)  # (B, N, E)
    outputs = []
    for t in range(x.shape[1]):
        # The convolution: a token and the three before it, each channel by itself.
        window = u[:, t : t + 4]  # (B, 4, E)
        c = F.silu((window * layer.conv.weight.squeeze(1).T).sum(1) + layer.conv.bias)  # (B, E)
        # Δ, B and C of this token.
        dt, write, read = layer.select(c).split([layer.R, layer.N, layer.N], dim=-1)
        dt = F.softplus(dt @ layer.dt_weight.T + layer.dt_bias)  # (B, E), positive
        # h_t = exp(Δ_t A) ⊙ h_{t−1} + Δ_t u_t B_t
        decay = torch.exp(dt.unsqueeze(1) * A)  # (B, N, E), between 0 and 1
        h = decay * h + write.unsqueeze(2) * (dt * c).unsqueeze(1)
        # y_t = C_t·h_t + D u_t, times a gate
        y = (read.unsqueeze(2) * h).sum(1) + layer.skip * c  # (B, E)
        outputs.append(layer.out(y * F.silu(layer.gate(x[:, t]))))
    return torch.stack(outputs, dim=1)


# The fast scan
# All h_t at once are (T, B, 16, E), 32 times the layer's input: written out they would not fit a cache, and autograd
# would keep four such tensors. So 16 tokens of a few sequences at a time, and backwards each block is computed again
# from the state before it, as the chunked form of attention does.
#
# The big tensors of a block are written into rooms that all blocks share (`out=`). Where each block asks for fresh
# memory, a training step of the layer takes up to 14 per cent longer.
TOKENS = 16  # of a block
NUMBERS = 2**18  # in each of a block's tensors, per core


def blocks_of(u, N):
    """Slices of sequences and slices of time: u (T, B, E) is worked through block by block."""
    T, B, E = u.shape
    together = B if u.is_cuda else max(1, NUMBERS * torch.get_num_threads() // (TOKENS * N * E))
    sequences = [slice(i, min(i + together, B)) for i in range(0, B, together)]
    times = [slice(i, min(i + TOKENS, T)) for i in range(0, T, TOKENS)]
    return sequences, times


def make_rooms(u, N):
    """Three rooms for a block's (c+1, B, N, E) each: decays, states, and the gradient of states."""
    sequences, times = blocks_of(u, N)
    largest = (times[0].stop + 1) * sequences[0].stop * N * u.shape[2]
    return u.new_empty(3, largest)


def block_states(u, dt, A, write, h, rooms):
    """A block of c tokens: its decays a (c, B, N, E), and its states H (c+1, B, N, E), of which row 0 is h."""
    c = len(u)
    a = rooms[0, : c * h.numel()].view(c, *h.shape)
    H = rooms[1, : (c + 1) * h.numel()].view(c + 1, *h.shape)
    torch.mul(dt.unsqueeze(2), A, out=a).exp_()  # A < 0 < dt: never above 1
    torch.mul(one_before(write).unsqueeze(3), one_before(dt * u).unsqueeze(2), out=H)  # row t is b_t
    H[0] = h
    solve(a, H)
    return a, H


def one_before(x):
    """x (T, B, d) with a row of zeros before it: room for what comes before a block, without copying (T, B, N, E)."""
    return F.pad(x, (0, 0, 0, 0, 1, 0))


def over_channels(x, H):
    """Σ_E: x (T, B, E), H (T, B, N, E) -> (T, B, N)."""
    return (x.unsqueeze(2) @ H.mT).squeeze(2)


def over_states(x, H):
    """Σ_N: x (T, B, N), H (T, B, N, E) -> (T, B, E)."""
    return (x.unsqueeze(2) @ H).squeeze(2)


class SelectiveScan(torch.autograd.Function):
    """u, dt (T, B, E), A (N, E), write, read (T, B, N), h (B, N, E) -> y (T, B, E) and the last state (B, N, E)."""

    @staticmethod
    def forward(ctx, u, dt, A, write, read, h):
        sequences, times = blocks_of(u, len(A))
        rooms = make_rooms(u, len(A))
        y = torch.empty_like(u)
        last = torch.empty_like(h)
        past = u.new_empty(len(times), *h.shape) if any(ctx.needs_input_grad) else None  # the state before each block
        for some in sequences:
            state = h[some]
            for i, now in enumerate(times):
                if past is not None:
                    past[i, some] = state
                _, H = block_states(u[now, some], dt[now, some], A, write[now, some], state, rooms)
                y[now, some] = over_states(read[now, some], H[1:])
                state = H[-1].clone()
            last[some] = state
        ctx.save_for_backward(u, dt, A, write, read, past)
        return y, last

    @staticmethod
    def backward(ctx, dy, dlast):
        return first_order_only(gradients, (dy, dlast, *ctx.saved_tensors), instead="mamba_loop of rebased/mamba.py")


def gradients(dy, dlast, u, dt, A, write, read, past):
    """Of u, dt, A, write, read and h."""
    du, ddt, dA, dwrite, dread = (torch.zeros_like(x) for x in (u, dt, A, write, read))
    dh = torch.empty_like(dlast)
    sequences, times = blocks_of(u, len(A))
    rooms = make_rooms(u, len(A))
    for some in sequences:
        later = dlast[some]  # the gradient of the state after a block
        for i in reversed(range(len(times))):
            at = (times[i], some)
            block = u[at], dt[at], A, write[at]
            found = block_gradients(dy[at], later, block, read[at], past[i, some], rooms)
            du[at], ddt[at], dA_of_block, dwrite[at], dread[at], later = found
            dA += dA_of_block
        dh[some] = later
    return du, ddt, dA, dwrite, dread, dh


def block_gradients(dy, later, block, read, h, rooms):
    """Of u, dt, A, write = block, of read, and of the state h before it; later: the gradient of the state after it."""
    u, dt, A, write = block
    a, H = block_states(*block, h, rooms)
    # The gradient G of each row of H: what y reads of it, and what later rows make of it.
    G = rooms[2, : H.numel()].view_as(H)
    torch.mul(one_before(read).unsqueeze(3), one_before(dy).unsqueeze(2), out=G)
    G[-1] += later
    solve_back(a, G)
    dh = G[0].clone()
    G = G[1:]
    dread = over_channels(dy, H[1:])
    dwrite = over_channels(dt * u, G)
    written = over_states(write, G)  # the gradient of dt·u
    exponent = a.mul_(G).mul_(H[:-1])  # the gradient of dt·A, where a = exp(dt·A)
    du = written * dt
    ddt = written * u + torch.mul(exponent, A, out=G).sum(2)
    dA = exponent.mul_(dt.unsqueeze(2)).sum((0, 1))
    return du, ddt, dA, dwrite, dread, dh


@torch.compiler.disable  # its passes in place are no graph that torch.compile could follow
def selective_scan(u, dt, A, write, read, h):
    """`SelectiveScan` in float32, or float64 if u is, whatever autocast says; y comes back in the type of u."""
    refuse_transforms("mamba_loop of rebased/mamba.py")
    dtype = torch.promote_types(u.dtype, torch.float32)
    with without_autocast(u.device):
        y, h = SelectiveScan.apply(*[x.to(dtype) for x in (u, dt, A, write, read, h)])
    return y.to(u.dtype), h


# The layer
def causal_conv4(x, conv, last):
    """Each channel sees itself and the 3 rows before it: x (T, B, E), last (3, B, E) -> y, the last 3 rows."""
    T = len(x)
    x = torch.cat([last, x])  # (3 + T, B, E)
    y = conv.bias
    for i, w in enumerate(conv.weight.squeeze(1).unbind(-1)):
        y = torch.addcmul(y, x[i : i + T], w)
    return y, x[T:].clone()  # a clone: a view would keep all T rows in memory


class Mamba(nn.Module):
    """A gated selective state space: x (B, T, d_model) -> y of the same shape. [1, section 3.4]

    State: the last 3 inputs of the convolution, (3, B, E), and h, (B, N, E): 19 numbers a channel, at any T.
    6d² + 110d + 4Rd parameters at E = 2d, R = ⌈d/16⌉: input and gate 4d², convolution 10d, select 2d(R + 32),
    dt 2dR + 2d, A 32d, skip 2d, out 2d².
    """

    N = 16

    def __init__(self, config):
        super().__init__()
        d_model = config.d_model
        E = 2 * d_model
        self.R = math.ceil(d_model / 16)
        self.input = nn.Linear(d_model, E, bias=False)
        self.gate = nn.Linear(d_model, E, bias=False)
        self.conv = nn.Conv1d(E, E, 4, groups=E)  # only holds weight and bias
        self.select = nn.Linear(E, self.R + 2 * self.N, bias=False)
        self.out = nn.Linear(E, d_model, bias=False)
        # A model draws every nn.Linear anew and sets its bias to 0. These four are parameters and no nn.Linear, to
        # outlive that: Δ starts between .001 and .1, a memory of 10 to 1,000 tokens where A = −1. [1, section 3.6]
        # (In [2] that bias does become 0, hence Δ ≈ .69, a memory of two tokens; the code of [1] prevents it.)
        dt = torch.exp(torch.rand(E) * math.log(0.1 / 0.001) + math.log(0.001))
        self.dt_weight = nn.Parameter((torch.rand(E, self.R) * 2 - 1) * self.R**-0.5)
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        self.A_log = nn.Parameter(torch.arange(1.0, self.N + 1).log().unsqueeze(1).repeat(1, E))  # A = −1 .. −16
        self.skip = nn.Parameter(torch.ones(E))

    def forward(self, x, state=None, return_state=False):
        x = x.transpose(0, 1)  # (T, B, d_model)
        u = self.input(x)
        if state is None:
            _, B, E = u.shape
            state = u.new_zeros(3, B, E), u.new_zeros(B, self.N, E)
        u, last = causal_conv4(u, self.conv, state[0])
        u = F.silu(u)
        dt, write, read = self.select(u).split([self.R, self.N, self.N], dim=-1)
        dt = F.softplus(F.linear(dt, self.dt_weight, self.dt_bias))
        y, h = selective_scan(u, dt, -self.A_log.exp(), write, read, state[1])
        y = torch.addcmul(y, u, self.skip) * F.silu(self.gate(x))
        y = self.out(y).transpose(0, 1)
        return (y, (last, h)) if return_state else y


class MambaBlock(nn.Module):
    """x + Mamba(RMSNorm(x)), and nothing else: no second line, no MLP, whatever the config says. [2, src/mixers]

    For `BLOCKS` of 03_model.py; of the config it reads d_model. State: that of `Mamba`.
    """

    def __init__(self, config, layer):
        super().__init__()
        self.norm1 = nn.RMSNorm(config.d_model, eps=1e-5)
        self.mixer = Mamba(config)

    def forward(self, x, state=None, return_state=False):
        if not return_state:
            return x + self.mixer(self.norm1(x), state)
        y, state = self.mixer(self.norm1(x), state, return_state=True)
        return x + y, state
