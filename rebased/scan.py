"""One recurrence, h_t = a_t ⊙ h_{t−1} + b_t, in log T rounds instead of T steps: what Mamba and RWKV share.

Equations
  two steps are one    h_{t+1} = a_{t+1} (a_t h_{t−1} + b_t) + b_{t+1}
                               = (a_{t+1} a_t) h_{t−1} + (a_{t+1} b_t + b_{t+1})
  for the gradient     g_t = ∂L/∂h_t + a_{t+1} g_{t+1}: the same, from the end

Letters: T time, B batch, N numbers of state a channel, E channels. Time comes first, (T, B, ...): one step, or every
  second step, is then a run of memory.

Reference: Blelloch, Prefix Sums and Their Applications, 1990. The usual shortcut divides by a running product of a,
which is 0 in float32 after a few tokens. Nothing is divided here.
"""

import torch

from rebased.autograd import first_order_only

def solve(a, h):
    """In place: row t of h (T+1, ...) becomes h_t + a_t ⊙ (row t−1), for t = 1..T; a (T, ...) has a_t at index t−1.

    Every odd step swallows the even one before it: T/2 steps remain, for the odd rows. They are solved the same way.
    Then each even row is one step away from the odd row before it. Three multiplications a row in all.
    """
    T = len(a)
    odd = h[1::2]
    odd.addcmul_(a[::2], h[:T:2])
    if T > 2:
        two_steps = a[1 : T - 1 : 2] * a[2::2]
        solve(two_steps, odd)
    if T > 1:
        h[2::2].addcmul_(a[1::2], h[1:T:2])


def solve_back(a, g):
    """In place: row t of g (T+1, ...) becomes g_t + a_{t+1} ⊙ (row t+1), for t = T−1..0: `solve`, seen in a mirror.

    Pairs are counted from the end. (Flipping a and g in time instead would copy them.)
    """
    T = len(a)
    first = (T - 1) % 2
    odd = g[first:T:2]  # rows at an odd distance from the end
    odd.addcmul_(a[first::2], g[first + 1 :: 2])
    if T > 2:
        two_steps = a[first : T - 2 : 2] * a[first + 1 : T - 1 : 2]
        solve_back(two_steps, odd)
    if T > 1:
        even = g[1 - first : T - 1 : 2]
        even.addcmul_(a[1 - first : T - 1 : 2], g[2 - first : T : 2])


class Recurrence(torch.autograd.Function):
    """a (T, B, 1, E), b (T, B, N, E), h (B, N, E) -> H (T+1, B, N, E): row 0 is h, row t is h_t."""

    @staticmethod
    def forward(ctx, a, b, h):
        H = torch.cat([h.unsqueeze(0), b])
        solve(a, H)
        ctx.save_for_backward(a, H)
        return H

    @staticmethod
    def backward(ctx, dH):
        a, H = ctx.saved_tensors
        return first_order_only(gradients, (dH, a, H), instead="rwkv_loop of rebased/rwkv.py")


def gradients(dH, a, H):
    """Of a, b and h."""
    G = dH.clone()
    solve_back(a, G)
    da = (G[1:] * H[:-1]).sum(2, keepdim=True)
    return da, G[1:], G[0]
