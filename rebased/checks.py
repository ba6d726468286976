"""What can be wrong with the tensors that a user hands in, said in one line where they enter."""

from functools import wraps

import torch

from rebased.autograd import inside_torch_func, without_autocast

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


def check_one_token(q, k, v):
    """Raise TypeError or ValueError unless q, k and v are one token each, (B, H, size)."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            check_last_dim(x, 1, name)
        if x.ndim != 3:
            raise ValueError(f"{name} must be one token, (B, H, size), got shape {tuple(x.shape)}")


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
        with without_autocast(q.device):
            result = form(q.to(dtype), k.to(dtype), v.to(dtype), kernel, *args, **options)
        if isinstance(result, torch.Tensor):
            return result.to(v.dtype)
        o, state = result
        return o.to(v.dtype), state

    return wrapped


def numbers_are_at_hand(x):
    """A GPU would have to wait for them, and torch.func does not let them be seen."""
    return x.device.type == "cpu" and not inside_torch_func()


def check_tokens(tokens, vocab_size):
    """Raise ValueError unless tokens are (B, T) int64, below vocab_size (not where numbers cannot be read at once)."""
    if tokens.ndim != 2 or tokens.dtype != torch.int64 or 0 in tokens.shape:
        raise ValueError(f"tokens must be int64 of shape (B, T), got {tokens.dtype} {tuple(tokens.shape)}")
    if numbers_are_at_hand(tokens) and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        raise ValueError(f"tokens must lie in 0 and below {vocab_size}, got {tokens.min()} to {tokens.max()}")


def check_length(length, positions):
    """Raise ValueError for more tokens than a model has learned positions."""
    if length > positions:
        raise ValueError(
            f"{length} tokens, but this model has {positions} learned positions; "
            "shorten the input or build it with positions=0"
        )


def check_positions(positions, tokens):
    """Raise ValueError unless positions are (B, n) int64, places of tokens (B, T)."""
    if positions.dtype != torch.int64 or positions.ndim != 2 or len(positions) != len(tokens):
        got = f"{positions.dtype} {tuple(positions.shape)}"
        raise ValueError(f"positions must be int64 of shape (B, n) with B = {len(tokens)}, got {got}")
    T = tokens.shape[1]
    if numbers_are_at_hand(positions) and positions.numel() and not 0 <= positions.min() <= positions.max() < T:
        raise ValueError(f"positions must lie in 0 and below {T}, got {positions.min()} to {positions.max()}")


def check_model_config(config, known):
    """Raise ValueError for a ModelConfig of 03 that cannot be built. known: the names that `mixers` may hold."""
    for name in config.mixers:
        if name not in known:
            raise ValueError(f"unknown mixer {name!r}; choose from {', '.join(known)}")
    for field in ("vocab_size", "d_model", "heads", "feature_dim"):
        if getattr(config, field) < 1:
            raise ValueError(f"{field} must be at least 1, got {getattr(config, field)}")
    if not config.mixers or config.positions < 0 or config.mlp < 0:
        raise ValueError("a model needs at least one mixer, and positions and mlp must not be negative")
    if config.norm not in ("layer", "rms") or config.init not in ("paper", "wide"):
        raise ValueError(f"norm is 'layer' or 'rms', init 'paper' or 'wide'; got {config.norm!r}, {config.init!r}")
    if config.d_model < config.heads or ("attention" in config.mixers and config.d_model % config.heads):
        raise ValueError(f"{config.heads} heads do not fit into d_model {config.d_model}")
    if not (0 <= config.dropout < 1 and 0 <= config.attention_dropout < 1):
        raise ValueError("dropout and attention_dropout must lie in [0, 1)")


def check_recall_task(num_examples, seq_len, num_pairs, vocab_size, power_a, seed):
    """Raise ValueError, in one line, for a task that cannot be made."""
    if num_examples < 1 or num_pairs < 1 or power_a <= 0:
        given = f"got {num_examples}, {num_pairs}, {power_a}"
        raise ValueError(f"need num_examples >= 1, num_pairs >= 1 and power_a > 0; {given}")
    if seq_len < 4 * num_pairs:
        needed = f"need 4·{num_pairs} = {4 * num_pairs} places"
        raise ValueError(f"{num_pairs} pairs and their queries {needed}, seq_len is {seq_len}")
    if num_pairs > vocab_size // 2 - 1:
        needed = f"need a vocabulary of {2 * num_pairs + 2}"
        raise ValueError(f"{num_pairs} distinct keys {needed} or more, got {vocab_size}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"a seed of examples is at least 0 and below 2**32, got {seed}")
