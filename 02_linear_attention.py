"""02 · Linear attention: one layer, four ways

Aim: compute the same causal attention as a quadratic form, as cumulative sums, as a recurrence with a state of
constant size, and chunk by chunk; know what each costs before timing it.

You will learn
  1. how features let the sums over keys be formed once, and why cost then grows with T instead of T²;
  2. why the textbook linear form is slow all the same, and what a chunk repairs;
  3. the state: cut a sequence anywhere, carry S and z, go on; the bytes do not depend on T;
  4. which of the four to train with, to read a prompt with, to speak with.

Equations
  quadratic    o_i = Σ_{j≤i} w_ij v_j / Σ_{j≤i} w_ij,   w_ij = sim(q_i, k_j)                       [P 3]
  linear       o_i = φ(q_i)ᵀ Σ_{j≤i} φ(k_j) v_jᵀ / φ(q_i)ᵀ Σ_{j≤i} φ(k_j)                          [P 3, K 3.2]
  recurrent    S_i = S_{i−1} + φ(k_i) v_iᵀ,  z_i = z_{i−1} + φ(k_i),  o_i = φ(q_i)ᵀ S_i / φ(q_i)ᵀ z_i   [K 3.3]
  chunked      quadratic for j in the chunk of i, linear through S and z for all chunks before

Letters: B batch, H heads, T time, D query/key dimension, Dv value dimension, P features after φ, C chunk length; S the
  state (B, H, P, Dv), z its normaliser (B, H, P); num, den the two sums whose quotient is o; w = sim.
  q, k are prepared and split: `kernel.prepare` of 01 first, then (B, T, H·D) -> (B, H, T, D).

References: [P], [K] as in 01; chunks: Hua et al., Transformer Quality in Linear Time, ICML 2022, arXiv 2202.10447.

Run: python 02_linear_attention.py     (20 seconds: predicted and measured cost, runs/02_linear_attention.png, checks)
     python 02_linear_attention.py --benchmark --threads 1     (15 minutes: against softmax, up to 65,536 tokens)
"""
# %%
import argparse
import functools
import io
import sys
from importlib import import_module
from typing import NamedTuple

import torch

kernels = import_module("01_kernels")  # a name that starts with a digit cannot follow `import`

EPS = 1e-12  # added to every normaliser; 01 shows how small those can be: a larger ε pulls first rows towards 0

# %% The state
# All that the past can still say: S = Σ φ(k_j) v_jᵀ and z = Σ φ(k_j). At D = 16, Dv = 64 it is 35 KB per head
# in float32, the size of 69 keys and values of a softmax cache with heads of 64. Sums over 64k tokens overflow half precision, so
# it is float32 at least, whatever the inputs are. It is a value: keep it, copy it, save it, go on from it twice.
class State(NamedTuple):
    """S (B, H, P, Dv) and z (B, H, P), float32 or float64."""

    S: torch.Tensor
    z: torch.Tensor


def accept(q, k, v, kernel, state=None, T=None):
    """Check shapes and types; return q, k, v as float32 (float64 if one of them is).

    T: the number of queries; None if there are as many as keys.

    Raises TypeError for what is not a floating-point tensor, ValueError for shapes that do not fit.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        free = name == "v" and isinstance(x, torch.Tensor) and x.ndim > 0  # Dv may be anything
        kernels.check_last_dim(x, x.shape[-1] if free else kernel.dim, name)
        if x.ndim != 4 or 0 in x.shape:
            raise ValueError(f"{name} must be (B, H, T, size) with every size at least 1, got {tuple(x.shape)}")
    if q.shape[:2] != k.shape[:2] or k.shape[:3] != v.shape[:3] or q.shape[2] != (T or k.shape[2]):
        raise ValueError(f"q, k and v disagree in B, H or T: {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    if state is not None:
        if not isinstance(state, State):
            raise TypeError(f"state must be a State(S, z) as another call returned it, got {type(state).__name__}")
        expected = (*k.shape[:2], kernel.num_features, v.shape[-1])
        if state.S.shape != expected or state.z.shape != expected[:3]:
            raise ValueError(f"state must be S {expected} and z {expected[:3]} (B, H, P, Dv), "
                             f"got {tuple(state.S.shape)} and {tuple(state.z.shape)}")
    dtype = torch.float64 if torch.float64 in (q.dtype, k.dtype, v.dtype) else torch.float32
    return q.to(dtype), k.to(dtype), v.to(dtype)


def without_autocast(form):
    """Keep autocast out of a form: its sums are float32 or better however the rest of the model runs."""

    @functools.wraps(form)
    def wrapped(q, *args, **options):
        device = q.device.type if isinstance(q, torch.Tensor) else "cpu"
        with torch.autocast(device, enabled=False):
            return form(q, *args, **options)

    return wrapped

# %% 1. Quadratic: the definition, and the oracle of every test
# Every query meets every key before it: T² weights per head, computed, masked, multiplied. With `positions` only
# some rows are computed: if a loss looks at 16 positions, 16 rows are enough.
@without_autocast
def quadratic_attention(q, k, v, kernel, positions=None):
    """q, k (B, H, T, D), v (B, H, T, Dv) -> o (B, H, T, Dv). Needs no features. [P 3]

    With positions (B, n): q (B, H, n, D) holds the queries of those places only, o is (B, H, n, Dv).
    Raises TypeError, ValueError as `accept` does, and for positions that are not places of the sequence.
    """
    dtype = v.dtype if isinstance(v, torch.Tensor) else None
    q, k, v = accept(q, k, v, kernel, T=None if positions is None else check_positions(positions, k))
    weights = causal_weights(q, k, kernel, positions)  # (B, H, T or n, T)
    return (weights @ v / (weights.sum(-1, keepdim=True) + EPS)).to(dtype)


def check_positions(positions, k):
    """The number n of positions (B, n), int64, each from 0 to T − 1 (read on a CPU only: a GPU would have to wait)."""
    if not isinstance(positions, torch.Tensor) or positions.dtype != torch.int64:
        raise TypeError(f"positions must be an int64 tensor, got {getattr(positions, 'dtype', type(positions).__name__)}")
    B, T = (k.shape[0], k.shape[2]) if isinstance(k, torch.Tensor) and k.ndim == 4 else (None, None)
    if positions.ndim != 2 or positions.shape[0] != (B or positions.shape[0]):
        raise ValueError(f"positions must be (B, n) with B = {B}, got shape {tuple(positions.shape)}")
    if T and positions.numel() and not positions.is_cuda and not 0 <= positions.min() <= positions.max() < T:
        raise ValueError(f"positions must lie from 0 to {T - 1}, got {positions.min().item()} to {positions.max().item()}")
    return positions.shape[1]


def causal_weights(q, k, kernel, positions=None):
    """sim(q_i, k_j), 0 for j > i: q (B, H, n, D), k (B, H, T, D) -> (B, H, n, T). Not yet normalised."""
    if positions is None:
        return kernel.scores(q, k).tril()
    seen = torch.arange(k.shape[2], device=k.device) <= positions.unsqueeze(-1)  # (B, n, T)
    return kernel.scores(q, k) * seen.unsqueeze(1)

# %% 2. Linear: the textbook form
# Sums instead of meetings: one cumulative sum over time of φ(k_j) v_jᵀ. No T², but every prefix is written out,
# P·Dv = 8,704 numbers a token: linear in T, and yet the slowest of all as far as it was timed. Read it; do not use it.
@without_autocast
def linear_attention(q, k, v, kernel):
    """q, k (B, H, T, D), v (B, H, T, Dv) -> o (B, H, T, Dv), in memory T·P·Dv. [P 3, K 3.2]"""
    dtype = v.dtype if isinstance(v, torch.Tensor) else None
    q, k, v = accept(q, k, v, kernel)
    phi_q, phi_k = kernel.features(q), kernel.features(k)  # (B, H, T, P)
    S = torch.einsum("bhtp,bhtd->bhtpd", phi_k, v).cumsum(2)  # (B, H, T, P, Dv)
    num = torch.einsum("bhtp,bhtpd->bhtd", phi_q, S)
    den = (phi_q * phi_k.cumsum(2)).sum(-1, keepdim=True)  # (B, H, T, 1)
    return (num / (den + EPS)).to(dtype)

# %% 3. Recurrent: one token at a time
# The prefix need not be written out if it is used at once. This is how a trained model speaks: constant time and
# memory per token, however long the context. For training it is serial, one tiny product after another.
@without_autocast
def recurrent_step(q, k, v, kernel, state=None):
    """One token: q, k (B, H, D), v (B, H, Dv), state or None -> o (B, H, Dv) and the next State. [K 3.3]"""
    dtype = v.dtype if isinstance(v, torch.Tensor) else None
    for name, x in (("q", q), ("k", k), ("v", v)):
        if isinstance(x, torch.Tensor) and x.ndim != 3:
            raise ValueError(f"{name} must be one token, (B, H, size), got shape {tuple(x.shape)}")
    q, k, v = (x.unsqueeze(2) if isinstance(x, torch.Tensor) else x for x in (q, k, v))
    q, k, v = (x.squeeze(2) for x in accept(q, k, v, kernel, state))
    phi_q, phi_k = kernel.features(q), kernel.features(k)  # (B, H, P)
    S, z = phi_k.unsqueeze(-1) * v.unsqueeze(-2), phi_k
    if state is not None:
        S, z = state.S + S, state.z + z
    num = (phi_q.unsqueeze(-2) @ S).squeeze(-2)  # (B, H, Dv)
    den = (phi_q * z).sum(-1, keepdim=True)
    return (num / (den + EPS)).to(dtype), State(S, z)


@without_autocast
def recurrent_attention(q, k, v, kernel, state=None, return_state=False):
    """The recurrence over T tokens: shapes as in `quadratic_attention`; (o, State) with return_state."""
    dtype = v.dtype if isinstance(v, torch.Tensor) else None
    q, k, v = accept(q, k, v, kernel, state)
    outputs = []
    for t in range(q.shape[2]):
        o, state = recurrent_step(q[:, :, t], k[:, :, t], v[:, :, t], kernel, state)
        outputs.append(o)
    o = torch.stack(outputs, dim=2).to(dtype)  # (B, H, T, Dv)
    return (o, state) if return_state else o

# %% 4. Chunked: quadratic where that is cheap, a state for the rest
# Cut T into chunks of C. Inside a chunk the quadratic form is one good matrix product; all earlier chunks come in
# through S and z. Prefixes are written out T/C times instead of T, and all work is matrix products.
@without_autocast
def chunked_in_four_steps(q, k, v, kernel, state=None, return_state=False, chunk_size=64):
    """The chunked form, to be read: shapes as in `quadratic_attention`; (o, State) with return_state."""
    dtype = v.dtype if isinstance(v, torch.Tensor) else None
    q, k, v = accept(q, k, v, kernel, state)
    P, Dv, outputs = kernel.num_features, v.shape[-1], []
    S, z = state or (q.new_zeros(*q.shape[:2], P, Dv), q.new_zeros(*q.shape[:2], P))
    for q_c, k_c, v_c in zip(*(x.split(chunk_size, dim=2) for x in (q, k, v)), strict=True):  # (B, H, C, ...)
        phi_q, phi_k = kernel.features(q_c), kernel.features(k_c)  # (B, H, C, P)
        # 1. Inside the chunk: the quadratic form, C² weights.
        weights = causal_weights(q_c, k_c, kernel)  # (B, H, C, C)
        num, den = weights @ v_c, weights.sum(-1, keepdim=True)
        # 2. All chunks before: the state, read by φ(q).
        num, den = num + phi_q @ S, den + phi_q @ z.unsqueeze(-1)
        # 3. One division.
        outputs.append(num / (den + EPS))
        # 4. The chunk joins the state.
        S, z = S + phi_k.mT @ v_c, z + phi_k.sum(2)
    o = torch.cat(outputs, dim=2).to(dtype)  # (B, H, T, Dv)
    return (o, State(S, z)) if return_state else o


# For training, autograd would keep φ(q) and φ(k) of every chunk: 272 numbers a token where q and k have 32. The
# next file takes the same four steps in place and computes features again on the way back: on a CPU this is the form to
# train with and to read a prompt with; `recurrent_step` then speaks, token by token, from the state that it leaves.
@torch.compiler.disable  # torch.compile cannot follow products written into reserved room, and would gain nothing here
@without_autocast
def chunked_attention(q, k, v, kernel, state=None, return_state=False, chunk_size=None):
    """q, k (B, H, T, D), v (B, H, T, Dv), State or None -> o (B, H, T, Dv), or (o, State) with return_state.

    Any T. Memory beyond inputs and outputs: one state a chunk. chunk_size None takes the chunk of least predicted
    cost. Raises as `accept`; ValueError for chunk_size < 1.
    """
    dtype = v.dtype if isinstance(v, torch.Tensor) else None
    q, k, v = accept(q, k, v, kernel, state)
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"chunk_size must be a positive integer or None, got {chunk_size!r}")
    chunked = import_module("02_linear_attention_chunked")
    o, S, z = chunked.sweep(q, k, v, kernel, *(state or (None, None)), chunk_size, return_state)
    return (o.to(dtype), State(S, z)) if return_state else o.to(dtype)


@torch.compiler.assume_constant_result  # torch.compile cannot trace an import: it asks once and keeps the answer
def has_triton_form():
    """Whether the GPU kernels are in sys.modules now; not without Triton, nor on a GPU older than it takes (Ampere)."""
    try:
        return bool(import_module("02_linear_attention_triton")) and torch.cuda.get_device_capability() >= (8, 0)
    except ImportError:
        return False


def attention(q, k, v, kernel, state=None, return_state=False):
    """What 03 calls: the fastest form at hand. Arguments and result as in `chunked_attention`."""
    if isinstance(q, torch.Tensor) and q.is_cuda and has_triton_form():
        gpu = sys.modules["02_linear_attention_triton"]
        if gpu.beyond_limits(q, k, v, kernel) is None:
            return gpu.triton_attention(q, k, v, kernel, state, return_state)
    return chunked_attention(q, k, v, kernel, state, return_state)

# %% Claims: all forms are one function, and a sequence can be cut anywhere
def example(kernel, T, B=2, H=3, Dv=5, seed=0):
    """Prepared, split q, k and v in float64, from normal projections, ready for gradients."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, B, T, H * kernel.dim, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        q, k = (y.unflatten(-1, (H, kernel.dim)).transpose(1, 2).contiguous() for y in kernel.double().prepare(*x))
    v = torch.randn(B, H, T, Dv, generator=generator, dtype=torch.float64)
    return [y.requires_grad_() for y in (q, k, v)]


def distance(found, expected):
    """‖found − expected‖ / ‖expected‖ over lists of tensors."""
    found, expected = (torch.cat([x.flatten() for x in y]) for y in (found, expected))
    return ((found - expected).norm() / expected.norm()).item()


def check_forms_agree():
    """Linear, recurrent and both chunked forms equal the quadratic one, outputs and gradients, every kernel, within 1e-9."""
    forms = (linear_attention, recurrent_attention,
             *(functools.partial(form, chunk_size=8) for form in (chunked_in_four_steps, chunked_attention)))
    for name, kernel in kernels.all_kernels(4, heads=3).items():
        inputs = example(kernel, T=29)
        expected = quadratic_attention(*inputs, kernel)
        upstream = torch.randn_like(expected)
        gradients = torch.autograd.grad(expected, inputs, upstream)
        for form in forms:
            o = form(*inputs, kernel)
            error = max(distance([o], [expected]), distance(torch.autograd.grad(o, inputs, upstream), gradients))
            assert error < 1e-9, f"{name}: {form} is off by {error:.1e}"


def check_first_row_is_v0():
    """At position 0 there is one value to look at, so the output is v_0, whatever the kernel."""
    for name, kernel in kernels.all_kernels(16, heads=3).items():
        q, k, v = example(kernel, T=20)
        error = (chunked_attention(q, k, v, kernel)[:, :, 0] - v[:, :, 0]).abs().max()
        assert error < 1e-5, f"{name}: o_0 differs from v_0 by {error:.1e}"


def check_the_future_is_not_seen():
    """Other tokens from 13 on change nothing before 13."""
    kernel = kernels.ReBasedKernel(8, heads=3)
    q, k, v = example(kernel, T=30)
    others = [torch.cat([x[:, :, :13], y[:, :, 13:]], 2) for x, y in zip((q, k, v), example(kernel, 30, seed=1), strict=True)]
    for form in (quadratic_attention, linear_attention, recurrent_attention, chunked_attention):
        assert torch.equal(form(q, k, v, kernel)[:, :, :13], form(*others, kernel)[:, :, :13]), form.__name__


def check_cut_save_resume():
    """Cut at 11, write the state to a file, load it, go on with another form: the same output."""
    kernel = kernels.ReBasedKernel(16, heads=3)
    q, k, v = example(kernel, T=40)
    first, state = chunked_attention(*(x[:, :, :11] for x in (q, k, v)), kernel, return_state=True)
    file = io.BytesIO()
    torch.save(state._asdict(), file)  # a plain dict of tensors, so that loading needs no pickled code
    file.seek(0)
    state = State(**torch.load(file, weights_only=True))
    second = recurrent_attention(*(x[:, :, 11:] for x in (q, k, v)), kernel, state)
    assert distance([torch.cat([first, second], 2)], [quadratic_attention(q, k, v, kernel)]) < 1e-9
    return f"{state.S[0, 0].numel()} + {state.z[0, 0].numel()} numbers a head, at any T"


CHECKS = [check_forms_agree, check_first_row_is_v0, check_the_future_is_not_seen, check_cut_save_resume]

# %%
def main(argv=None):
    """The table, its reading, the figure, the checks; returns how many checks failed."""
    parser = argparse.ArgumentParser(description="02: one layer as four forms, predicted and measured (20 seconds)")
    parser.add_argument("--figure", type=kernels.writable, default="runs/02_linear_attention.png",
                        help="where to draw it (%(default)s)")
    parser.add_argument("--benchmark", action="store_true",
                        help="all forms and softmax, T from 256 to 65,536, forward and backward (15 minutes on one core)")
    parser.add_argument("--threads", type=kernels.positive, metavar="N", help="threads of PyTorch (all cores)")
    options = kernels.parse_arguments(parser, argv)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    cost = import_module("02_linear_attention_cost")  # the tables: what each form costs
    (cost.benchmark if options.benchmark else cost.compare)(options.figure)
    return kernels.run_checks(CHECKS)


if __name__ == "__main__":
    if main():
        sys.exit(1)
