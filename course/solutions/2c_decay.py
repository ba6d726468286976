"""Solution of 2c: decay bounds what filler weighs, and takes the far right key with it."""

import torch

from rebased import EPS, linear_attention  # 02_linear_attention.py

def decayed_quadratic(q, k, v, kernel, decay):
    """w_ij = sim(q_i, k_j) · λ^(i−j)."""
    T = q.shape[2]
    places = torch.arange(T, dtype=q.dtype)
    distance = (places.unsqueeze(1) - places).clamp(min=0)  # (T, T); above the diagonal unused
    weights = (kernel.scores(q, k) * decay**distance).tril()  # (B, H, T, T)
    return weights @ v / (weights.sum(-1, keepdim=True) + EPS)


def decayed_recurrent(q, k, v, kernel, decay, state=None):
    """The recurrence of 02 with one factor more."""
    S, z = state or linear_attention.empty_state(k, v, kernel)
    phi_q = kernel.features(q)  # (B, H, T, P)
    phi_k = kernel.features(k)
    outputs = []
    for t in range(q.shape[2]):
        S = decay * S + phi_k[:, :, t, :, None] * v[:, :, t, None, :]  # (B, H, P, Dv)
        z = decay * z + phi_k[:, :, t]  # (B, H, P)
        num = (phi_q[:, :, t, None, :] @ S).squeeze(2)  # (B, H, Dv)
        den = (phi_q[:, :, t] * z).sum(-1, keepdim=True)  # (B, H, 1)
        outputs.append(num / (den + EPS))
    return torch.stack(outputs, dim=2), linear_attention.State(S, z)


def share_on_filler(floor, right, decay, T):
    """Of 1,000 fillers and Based: .975 at λ = 1, .985 at .999, and above .99999 at .99."""
    filler = floor * T
    if decay < 1:
        filler = floor * (1 - decay**T) / (1 - decay)
    return filler / (filler + right * decay**T)
