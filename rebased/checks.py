"""What can be wrong with the tensors that a user hands in, said in one line where they enter."""

from functools import wraps

import torch

def check_last_dim(x, size, name):
    """Raise TypeError or ValueError unless x is a floating-point tensor whose last dimension is `size`."""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {kind}; convert it with .float()")
    if x.ndim == 0 or x.shape[-1] != size or size == 0:
        raise ValueError(f"{name} must have last dimension {size or '1 or more'}, got shape {tuple(x.shape)}")


def check_positive_integers(**sizes):
    """Raise ValueError, with its name, for a size that is not an integer of at least 1."""
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")


def check_attention(q, k, v, kernel, state=None):
    """Raise TypeError or ValueError unless these are inputs of an attention with this kernel.

    q, k (B, H, T, D), v (B, H, T, Dv), each size at least 1; state: a pair S (B, H, P, Dv), z (B, H, P), or None.
    """
    check_last_dim(q, kernel.dim, "q")
    check_last_dim(k, kernel.dim, "k")
    check_last_dim(v, v.shape[-1] if isinstance(v, torch.Tensor) and v.ndim else 1, "v")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or 0 in x.shape:
            raise ValueError(f"{name} must be (B, H, T, size) with every size at least 1, got {tuple(x.shape)}")
    if q.shape != k.shape or k.shape[:3] != v.shape[:3]:
        raise ValueError(f"q, k and v disagree in B, H or T: {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v are on different devices: {q.device}, {k.device}, {v.device}")
    if state is not None:
        check_state(state, (*k.shape[:2], kernel.num_features, v.shape[-1]))


def check_state(state, shape):
    """Raise TypeError or ValueError unless state is a State(S, z) with S of this shape, (B, H, P, Dv)."""
    if not isinstance(state, tuple) or not hasattr(state, "S") or not hasattr(state, "z"):
        raise TypeError(f"state must be a State(S, z) as another call returned it, got {type(state).__name__}")
    if state.S.shape != shape or state.z.shape != shape[:3]:
        raise ValueError(
            f"state must be S {tuple(shape)} and z {tuple(shape[:3])} (B, H, P, Dv), "
            f"got {tuple(state.S.shape)} and {tuple(state.z.shape)}"
        )


def attention_form(form):
    """Decorator for form(q, k, v, kernel, ...) -> o or (o, State): the edges that all forms of attention share.

    Inputs are checked (see `check_attention`). The form itself runs in float32, or float64 if one input is, and outside
    autocast, since sums of thousands of terms need the digits. o comes back in the type of v; states stay as they are.
    """

    @wraps(form)
    def wrapped(q, k, v, kernel, *args, **options):
        check_attention(q, k, v, kernel, args[0] if args else options.get("state"))
        dtype = torch.float64 if torch.float64 in (q.dtype, k.dtype, v.dtype) else torch.float32
        with torch.autocast(q.device.type, enabled=False):
            result = form(q.to(dtype), k.to(dtype), v.to(dtype), kernel, *args, **options)
        if isinstance(result, torch.Tensor):
            return result.to(v.dtype)
        o, state = result
        return o.to(v.dtype), state

    return wrapped
