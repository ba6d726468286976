"""A model's output at a few places only: a loss on 16 queries of 128 tokens, or a table of where they look.

The functions are methods of the classes of 03_model.py, which name them; the first argument is that object. n is the
number of places, and positions (B, n) int64 says which: each sequence may ask for others.
"""

import math

import torch
import torch.nn.functional as F

from rebased import EPS
from rebased.autograd import without_autocast
from rebased.checks import check_positions

def rows(x, positions):
    """The rows of x (B, T, d) at positions (B, n): (B, n, d)."""
    return x.gather(1, positions.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def split_heads(x, heads):
    """(B, T, H·D) -> (B, H, T, D), as in 03."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def places_before(positions, T):
    """Which of T places a query at positions (B, n) may see, with its own: (B, 1, n, T) bool."""
    places = torch.arange(T, device=positions.device)
    return (places <= positions.unsqueeze(-1)).unsqueeze(1)


# Shares of attention: (B, H, n, T), each row sums to 1
def softmax_weights(attention, x, positions):
    """The shares that the queries at positions (B, n) of x (B, T, d_model) give: (B, H, n, T)."""
    check_positions(positions, x)
    q = split_heads(attention.q(rows(x, positions)), attention.heads)  # (B, H, n, Dv)
    k = split_heads(attention.k(x), attention.heads)  # (B, H, T, Dv)
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    hidden = ~places_before(positions, x.shape[1])
    return scores.masked_fill(hidden, -math.inf).softmax(-1)


def kernel_weights(attention, x, positions):
    """The same for a kernel: its scores, divided by their sum. In float32 at least: the sum needs the digits."""
    check_positions(positions, x)
    q, k = attention.kernel.prepare(attention.q(rows(x, positions)), attention.k(x))
    dtype = torch.promote_types(q.dtype, torch.float32)
    q = split_heads(q, attention.heads).to(dtype)  # (B, H, n, D)
    k = split_heads(k, attention.heads).to(dtype)  # (B, H, T, D)
    with without_autocast(x.device):
        weights = attention.kernel.scores(q, k) * places_before(positions, x.shape[1])
        return weights / (weights.sum(-1, keepdim=True) + EPS)


# What attention(x) has at these places: (B, n, d_model)
def project_mean(attention, x, weights):
    """The mean of the values by weights (B, H, n, T), heads joined, projected: (B, n, d_model)."""
    v = split_heads(attention.v(x), attention.heads)  # (B, H, T, Dv)
    o = weights.to(v.dtype) @ v  # (B, H, n, Dv)
    return attention.out(o.transpose(1, 2).flatten(2))


def softmax_at(attention, x, positions):
    """The rows of attention(x) at positions (B, n), and nothing else: (B, n, d_model)."""
    weights = attention.weights(x, positions)
    weights = F.dropout(weights, attention.dropout, attention.training)
    return project_mean(attention, x, weights)


def kernel_at(attention, x, positions):
    """The same for a kernel, by whichever form is cheaper."""
    check_positions(positions, x)
    if positions.shape[1] > attention.kernel.num_features:
        return rows(attention(x), positions)  # n·T weights would cost more than P·T features
    return project_mean(attention, x, attention.weights(x, positions))


def logits_at(model, tokens, positions, return_weights=False):
    """Logits at positions (B, n) int64 only: (B, n, V).

    With return_weights also the shares of attention that the last layer gives from there,
    (B, H, n, T); ValueError if it has none.
    """
    check_positions(positions, tokens)
    last = model.blocks[-1]
    attends = hasattr(getattr(last, "mixer", None), "at")
    if return_weights and not attends:
        raise ValueError(f"a last layer {model.config.mixers[-1]!r} has no attention weights")
    x = model.trunk(tokens)
    if attends:
        y = last.mixer.at(last.norm1(x), positions)  # (B, n, d_model)
        logits = model.head(last.second_line(rows(x, positions) + y))
    else:
        logits = model.head(rows(last(x), positions))
    if not return_weights:
        return logits
    return logits, last.mixer.weights(last.norm1(x), positions)
