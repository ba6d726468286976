"""02 · Linear attention: one layer, four ways

Aim: compute the same causal attention as a quadratic form, by cumulative sums, as a recurrence with
a state of constant size, and chunk by chunk; and know what each costs before it is timed.

You will learn
  1. how features turn T² meetings of queries and keys into sums that are carried along;
  2. what a state is: cut a sequence anywhere, keep S and z, go on; its size does not depend on T;
  3. why the textbook form is slow all the same, and what a chunk repairs;
  4. what a backward pass through the normaliser must not forget.

Equations
  quadratic   o_i = Σ_{j≤i} w_ij v_j / Σ_{j≤i} w_ij   with w_ij = sim(q_i, k_j)     [1, section 3]
  linear      o_i = φ(q_i)ᵀ Σ_{j≤i} φ(k_j) v_jᵀ / φ(q_i)ᵀ Σ_{j≤i} φ(k_j)           [3, section 3.2]
  recurrent   S_i = S_{i−1} + φ(k_i) v_iᵀ,   z_i = z_{i−1} + φ(k_i),
              o_i = φ(q_i)ᵀ S_i / φ(q_i)ᵀ z_i                                       [3, section 3.3]
  chunked     quadratic inside the chunk of i, S and z for all chunks before        [5, section 3]

Letters
  B batch, H heads, T time, D size of a query or key, Dv size of a value, P features after φ,
  C chunk length; S the state (B, H, P, Dv), z its normaliser (B, H, P); num and den: the two sums
  whose quotient is the output o. q and k are already prepared (`prepare` of 01) and split into
  heads: (B, T, H·D) -> (B, H, T, D). Every den has ε = 1e-12 added to it (01 says why).

References
  [1] Aksenov et al., ReBased, and [3] Katharopoulos et al., Transformers are RNNs: as in 01.
  [5] Hua et al., Transformer Quality in Linear Time, ICML 2022, arXiv 2202.10447.

Run: python 02_linear_attention.py      (20 seconds; draws runs/02_linear_attention.png)
"""

# %%
import io
import math
import sys
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from rebased import EPS, chunked_cpu, kernels, lesson  # kernels: 01_kernels.py
from rebased.autograd import detached
from rebased.checks import (
    attention_form,
    check_attention,
    check_one_token,
    check_positive_integers,
)

# %% [markdown]
# ## 1. Quadratic: the definition
#
# Every query meets every key up to its own. The similarities make a T × T matrix, and causality
# keeps its lower triangle: $w_{ij} = 0$ for $j > i$. The output is the mean of the values, weighted
# by a row of this matrix.
#
# This form is the definition: whatever else we write must give the same numbers, and the same
# gradients.
#
# (`@attention_form` is the same for every form and no part of the idea: it checks shapes, computes
# in float32 at least, and returns o in the type of v. See `rebased/checks.py`.)

# %%
@attention_form
def quadratic_attention(q, k, v, kernel):
    """q, k (B, H, T, D), v (B, H, T, Dv) -> o (B, H, T, Dv). Needs no features. [1, section 3]"""
    weights = kernel.scores(q, k).tril()  # (B, H, T, T)
    num = weights @ v  # (B, H, T, Dv)
    den = weights.sum(-1, keepdim=True)  # (B, H, T, 1)
    return num / (den + EPS)

# %% [markdown]
# ## 2. Linear: the textbook form
#
# With features the sums over keys can be formed once, for all queries. The sum up to token i is a
# cumulative sum over time, and φ(q) reads it:
#
# $$\mathrm{num}_i = \varphi(q_i)^\top S_i, \quad S_i = \sum_{j \le i} \varphi(k_j) v_j^\top \qquad
#   \mathrm{den}_i = \varphi(q_i)^\top z_i, \quad z_i = \sum_{j \le i} \varphi(k_j)$$
#
# No T × T matrix is left. But *every* S_i is written out, P · Dv numbers for each token: 8,704 at P
# = 136 and Dv = 64, where the token itself has 64 values. Linear in T, and yet slow, because memory
# is. Read it; do not use it.

# %%
@attention_form
def linear_attention(q, k, v, kernel):
    """q, k (B, H, T, D), v (B, H, T, Dv) -> o (B, H, T, Dv), in memory T·P·Dv. [3, section 3.2]"""
    phi_q = kernel.features(q)  # (B, H, T, P)
    phi_k = kernel.features(k)  # (B, H, T, P)
    S = torch.einsum("bhtp,bhtd->bhtpd", phi_k, v).cumsum(2)  # (B, H, T, P, Dv)
    z = phi_k.cumsum(2)  # (B, H, T, P)
    num = torch.einsum("bhtp,bhtpd->bhtd", phi_q, S)  # (B, H, T, Dv)
    den = (phi_q * z).sum(-1, keepdim=True)  # (B, H, T, 1)
    return num / (den + EPS)

# %% [markdown]
# ## 3. Recurrent: one token at a time
#
# S_i need not be written out if it is used at once. Keep one S and one z, add the new token, read
# the output:
#
# $$S \leftarrow S + \varphi(k) v^\top \qquad z \leftarrow z + \varphi(k) \qquad
#   o = \frac{\varphi(q)^\top S}{\varphi(q)^\top z}$$
#
# S and z are the *state*: all that the past can still say. A state is a value. Keep it, copy it,
# save it to a file, go on from it twice. It holds P · (Dv + 1) numbers a head however long the past
# was, while the keys and values that softmax must keep grow with every token. This is how a trained
# model speaks. For training it is serial: one tiny product after another.
#
# The state is float32 at least, whatever the inputs are. A sum in float16 overflows at 65,504, and
# one in bfloat16 stands still at 256, where adding 1 no longer changes it.

# %%
class State(NamedTuple):
    """S (B, H, P, Dv) and z (B, H, P), float32 or float64."""

    S: torch.Tensor
    z: torch.Tensor

    def __deepcopy__(self, memo):
        return detached(self)  # the numbers; a graph cannot be copied


def empty_state(k, v, kernel):
    """The state before the first token: zeros, of the sizes, type and device of k and v."""
    B, H, _, Dv = v.shape
    P = kernel.num_features
    return State(v.new_zeros(B, H, P, Dv), v.new_zeros(B, H, P))


@attention_form
def recurrent_attention(q, k, v, kernel, state=None, return_state=False):
    """q, k (B, H, T, D), v (B, H, T, Dv), State or None -> o (B, H, T, Dv). [3, section 3.3]

    With return_state: (o, State), the state after the last token.
    """
    S, z = state or empty_state(k, v, kernel)
    phi_q = kernel.features(q)  # (B, H, T, P)
    phi_k = kernel.features(k)
    outputs = []
    for t in range(q.shape[2]):
        S = S + phi_k[:, :, t, :, None] * v[:, :, t, None, :]  # (B, H, P, Dv), an outer product
        z = z + phi_k[:, :, t]  # (B, H, P)
        num = (phi_q[:, :, t, None, :] @ S).squeeze(2)  # (B, H, Dv)
        den = (phi_q[:, :, t] * z).sum(-1, keepdim=True)  # (B, H, 1)
        outputs.append(num / (den + EPS))
    o = torch.stack(outputs, dim=2)  # (B, H, T, Dv)
    return (o, State(S, z)) if return_state else o


def recurrent_step(q, k, v, kernel, state=None):
    """One token: q, k (B, H, D), v (B, H, Dv), State or None -> o (B, H, Dv), the next State."""
    check_one_token(q, k, v)
    q = q.unsqueeze(2)  # (B, H, 1, D)
    k = k.unsqueeze(2)
    v = v.unsqueeze(2)
    o, state = recurrent_attention(q, k, v, kernel, state, return_state=True)
    return o.squeeze(2), state

# %% [markdown]
# ## 4. Chunked: quadratic where that is cheap, a state for the rest
#
# The quadratic form wastes nothing on short sequences: a small matrix product is what processors do
# best. The work of the recurrence, for one token, does not grow with what stands before it. So cut
# time into chunks of C tokens:
#
# ```
#                 keys j
#               ┌───┐
#               │ ■ │               ■  inside a chunk: C × C weights, the quadratic form
#   queries i   ├───┼───┐
#               │ □ │ ■ │           □  all chunks before: never written out;
#               ├───┴───┼───┐          φ(q) reads them from one state, S and z
#               │ □   □ │ ■ │
#               ├───────┼───┼───┐
#               │ □   □   □ │ ■ │
#               └───────────┴───┘
# ```
#
# All the work is matrix products, and S is written T/C times instead of T times.

# %%
@attention_form
def chunked_attention(q, k, v, kernel, state=None, return_state=False, chunk_size=64):
    """The chunked form, to be read: shapes as in `recurrent_attention`, any T. [5, section 3]"""
    check_positive_integers(chunk_size=chunk_size)
    S, z = state or empty_state(k, v, kernel)
    outputs = []
    for start in range(0, q.shape[2], chunk_size):
        chunk = slice(start, start + chunk_size)
        q_c = q[:, :, chunk]  # (B, H, C, D)
        k_c = k[:, :, chunk]
        v_c = v[:, :, chunk]  # (B, H, C, Dv)
        phi_q = kernel.features(q_c)  # (B, H, C, P)
        phi_k = kernel.features(k_c)

        # 1. Inside the chunk: the quadratic form.
        weights = kernel.scores(q_c, k_c).tril()  # (B, H, C, C)
        num = weights @ v_c  # (B, H, C, Dv)
        den = weights.sum(-1, keepdim=True)  # (B, H, C, 1)

        # 2. All chunks before: the state, read by φ(q).
        num = num + phi_q @ S
        den = den + phi_q @ z.unsqueeze(-1)

        # 3. One division.
        outputs.append(num / (den + EPS))

        # 4. The chunk joins the state.
        S = S + phi_k.mT @ v_c  # (B, H, P, Dv)
        z = z + phi_k.sum(2)  # (B, H, P)
    o = torch.cat(outputs, dim=2)  # (B, H, T, Dv)
    return (o, State(S, z)) if return_state else o

# %% [markdown]
# Step 2 reads the state *before* the chunk, step 4 comes last. If all chunk sums are formed at
# once, as a GPU likes it, the states before each chunk are an *exclusive* prefix sum: without the
# term itself. It is tempting to write `cumsum(x) - x`. In float32 that is wrong wherever x is large
# beside what came before it: adding it pushes the small digits out, and subtracting it does not
# bring them back. Shift the inclusive sum by one place instead.

# %%
def show_exclusive_prefix():
    """The relative error of both ways on random squares, in float32."""
    big = torch.tensor([0.1, 1e8])
    print(f"(0.1 + 1e8) − 1e8 in float32: {(big.cumsum(0) - big)[1]:g}")
    torch.manual_seed(0)
    x = torch.randn(1000, 136).square()  # (T, P)
    exact = x.double().cumsum(0)[:-1]  # before tokens 1, 2, ...
    subtracted = (x.cumsum(0) - x)[1:]
    shifted = x.cumsum(0)[:-1]
    for name, found in (("cumsum(x) − x", subtracted), ("shifted", shifted)):
        errors = ((found - exact) / exact).abs().amax(1)  # (T − 1,)
        place = errors.argmax() + 1
        print(f"{name:14} largest relative error {errors.max():.1e}, before token {place}")
    print()


if __name__ == "__main__":
    show_exclusive_prefix()

# %% [markdown]
# ## What models call
#
# `attention` is the door for everybody else. It checks what comes in and takes the fastest form at
# hand:
#
# - on an NVIDIA GPU with Triton, the same four steps as kernels: `rebased/triton_kernels.py`;
# - everywhere else, the same four steps in place, with a backward pass that computes the features a
#   second time instead of keeping them (2 · 136 numbers a token, where q and k have 2 · 16):
#   `rebased/chunked_cpu.py`.
#
# Both know a kernel by its three coefficients alone. A kernel that is no polynomial of s hands in
# its features.

# %%
@attention_form
def attention_on_cpu(q, k, v, kernel, state=None, return_state=False):
    """The fast chunked form in plain PyTorch; runs on any device."""
    if kernel.coefficients is None:
        q = kernel.features(q)  # (B, H, T, P)
        k = kernel.features(k)
    S, z = state or (None, None)
    result = chunked_cpu.chunked_attention(q, k, v, kernel.coefficients, S, z, return_state)
    if not return_state:
        return result
    o, S, z = result
    return o, State(S, z)


@torch.compiler.assume_constant_result  # torch.compile cannot trace an import: it asks once
def has_triton():
    """Whether the GPU kernels can be loaded. Triton is imported here, and not before."""
    try:
        from rebased import triton_kernels  # noqa: F401
    except ImportError:
        return False
    return True


def attention(q, k, v, kernel, state=None, return_state=False):
    """q, k (B, H, T, D), v (B, H, T, Dv), State or None -> o (B, H, T, Dv); any T.

    With return_state: (o, State). q and k are prepared by the kernel and split into heads. Raises
    TypeError for what is not a floating-point tensor, ValueError for shapes that do not fit.
    """
    if isinstance(q, torch.Tensor) and q.is_cuda and has_triton():
        check_attention(q, k, v, kernel, state)
        gpu = sys.modules["rebased.triton_kernels"]
        if gpu.why_not(q, k, v, kernel.coefficients) is None:
            S, z = state or (None, None)
            result = gpu.chunked_attention(q, k, v, kernel.coefficients, S, z, return_state)
            return (result[0], State(result[1], result[2])) if return_state else result
    return attention_on_cpu(q, k, v, kernel, state, return_state)

# %% [markdown]
# ## All forms are one function
#
# For every kernel of 01, in float64, outputs and gradients of all forms equal those of the
# quadratic one. The first output of `attention` is the first value. With ReBased, no output of any
# form depends on later tokens, and a sequence can be cut: save the state to a file, load it, go on
# with another form. (The tests do the same for every kernel, and cut in many places.)

# %%
def example(kernel, T, B=2, H=3, Dv=5, seed=0):
    """Prepared q, k (B, H, T, D) and v (B, H, T, Dv): float64, random, ready for gradients."""
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, B, T, H * kernel.dim, generator=generator, dtype=torch.float64)
    v = torch.randn(B, H, T, Dv, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        q, k = kernel.double().prepare(q, k)
    q = q.unflatten(-1, (H, kernel.dim)).transpose(1, 2).contiguous()  # (B, H, T, D)
    k = k.unflatten(-1, (H, kernel.dim)).transpose(1, 2).contiguous()
    return [q.requires_grad_(), k.requires_grad_(), v.requires_grad_()]


def relative_error(found, expected):
    """‖found − expected‖ / ‖expected‖ over two lists of tensors."""
    found = torch.cat([x.flatten() for x in found])
    expected = torch.cat([x.flatten() for x in expected])
    return ((found - expected).norm() / expected.norm()).item()


FORMS = {
    "linear": linear_attention,
    "recurrent": recurrent_attention,
    "chunked": partial(chunked_attention, chunk_size=8),
    "attention": attention,
}


def check_forms_agree():
    """Every form equals the quadratic one within 1e-9, outputs and gradients, for every kernel."""
    for name, make in kernels.KERNELS.items():
        kernel = make(4, heads=3)
        inputs = example(kernel, T=29)
        expected = quadratic_attention(*inputs, kernel)
        upstream = torch.randn_like(expected)
        gradients = torch.autograd.grad(expected, inputs, upstream)
        for form_name, form in FORMS.items():
            o = form(*inputs, kernel)
            found = torch.autograd.grad(o, inputs, upstream)
            error = max(relative_error([o], [expected]), relative_error(found, gradients))
            assert error < 1e-9, f"{name}: the {form_name} form is off by {error:.1e}"


def check_first_row_is_v0():
    """At position 0 there is one value to look at, so the output is v_0, whatever the kernel."""
    for name, make in kernels.KERNELS.items():
        kernel = make(16, heads=3)
        q, k, v = example(kernel, T=20)
        error = (attention(q, k, v, kernel)[:, :, 0] - v[:, :, 0]).abs().max()
        assert error < 1e-5, f"{name}: o_0 differs from v_0 by {error:.1e}"


def check_the_future_is_not_seen():
    """Other tokens from place 13 on change nothing before it."""
    kernel = kernels.ReBasedKernel(8, heads=3)
    inputs = example(kernel, T=30)
    changed = []
    for x, other in zip(inputs, example(kernel, T=30, seed=1), strict=True):
        changed.append(torch.cat([x[:, :, :13], other[:, :, 13:]], dim=2))
    for name, form in FORMS.items():
        before = form(*inputs, kernel)
        after = form(*changed, kernel)
        assert torch.equal(before[:, :, :13], after[:, :, :13]), name


def check_cut_save_resume():
    """Cut at 11, save the state, load it, go on with another form: the same output."""
    kernel = kernels.ReBasedKernel(16, heads=3)
    q, k, v = example(kernel, T=40, Dv=64)
    first, state = attention(q[:, :, :11], k[:, :, :11], v[:, :, :11], kernel, return_state=True)
    file = io.BytesIO()
    torch.save({"S": state.S, "z": state.z}, file)  # plain tensors: loading them runs no code
    file.seek(0)
    state = State(**torch.load(file, weights_only=True))
    second = recurrent_attention(q[:, :, 11:], k[:, :, 11:], v[:, :, 11:], kernel, state)
    whole = quadratic_attention(q, k, v, kernel)
    assert relative_error([torch.cat([first, second], dim=2)], [whole]) < 1e-9
    return f"{state.S[0, 0].numel()} + {state.z[0, 0].numel()} numbers a head, at any T"


if __name__ == "__main__":
    lesson.check(check_forms_agree)
    lesson.check(check_first_row_is_v0)
    lesson.check(check_the_future_is_not_seen)
    lesson.check(check_cut_save_resume)
    print()

# %% [markdown]
# ## Backwards: what the normaliser adds
#
# Gradients of the readable forms come from autograd. The fast forms have a backward pass written by
# hand, and there is one term in it that is easily forgotten. Write $do_i$ for the gradient of the
# loss by the output o_i, and likewise for others. A weight w_ij enters o_i twice, through num and
# through den. With $\delta_i = do_i \cdot o_i$:
#
# $$dw_{ij} = \frac{do_i \cdot v_j - \delta_i}{\mathrm{den}_i}
#           = \frac{do_i \cdot (v_j - o_i)}{\mathrm{den}_i}$$
#
# The second way of writing it says why δ must be there: o_i is a *mean* of values, and to give a
# value more weight moves the mean only as far as the value differs from it. dq and dk need δ, for
# they act through the weights; dv does not. Here is dq of the kernel s² by hand, with δ and
# without.

# %%
def gradient_of_q(q, k, v, do, with_delta):
    """dq of the quadratic form, sim = s². q, k (..., T, D), v, do (..., T, Dv) -> (..., T, D)."""
    s = kernels.scaled_dot(q, k).tril()  # (..., T, T)
    weights = s.square()
    den = weights.sum(-1, keepdim=True) + EPS  # (..., T, 1)
    o = weights @ v / den  # (..., T, Dv)
    delta = (do * o).sum(-1, keepdim=True)  # (..., T, 1)
    if not with_delta:
        delta = torch.zeros_like(delta)
    dw = (do @ v.mT - delta) / den  # (..., T, T)
    ds = 2 * s * dw  # through the square; s is 0 above the diagonal
    return ds @ k / math.sqrt(q.shape[-1])  # through s = q·k/√D


def check_delta_is_needed():
    """With δ dq is that of autograd; without it, it is not even near."""
    kernel = kernels.ReBasedKernel(8, norm=False, gamma=False, beta=False)
    q, k, v = example(kernel, T=50, H=1)
    o = quadratic_attention(q, k, v, kernel)
    do = torch.randn_like(o)
    (expected,) = torch.autograd.grad(o, q, do)
    right = relative_error([gradient_of_q(q, k, v, do, with_delta=True)], [expected])
    wrong = relative_error([gradient_of_q(q, k, v, do, with_delta=False)], [expected])
    assert right < 1e-9 and wrong > 0.1
    return f"dq is off by {right:.0e} with δ, by {wrong:.1f} times its size without"


if __name__ == "__main__":
    lesson.check(check_delta_is_needed)
    print()

# %% [markdown]
# ## What each form costs
#
# Count before timing. Three things can hold a form up: arithmetic (multiplications and additions),
# memory (every tensor too large for the cache is written and read again at each step), and calls
# (each tensor operation takes some microseconds before it does anything). Forward, for one head,
# with T tokens:
#
# | form | arithmetic | memory, numbers moved | calls |
# |---|---|---|---|
# | quadratic | 2T²(D + Dv): two products | 11 T²: passes over the weights, see code | 10 |
# | linear | 4 T P Dv: make and read S_i | 4 T P Dv: make, sum (read, write), read | 10 |
# | recurrent | 4 T P Dv | 5 T P Dv: make φ(k)vᵀ, add (read 2, write), read | 25 a token |
# | chunked | T (4 P Dv + 2C(D + Dv)) | 2T(D + Dv) for q, k, v, o and 2 P Dv T/C for S | 8 a chunk |
#
# (Calls were counted by reading the code: about 10 for a form without a loop, 25 for each turn of
# the recurrence, views included, and 8 for each chunk.)
#
# The chunk of the fast form is the one of least predicted cost (`best_chunk` of
# `rebased/chunked_cpu.py`).

# %%
HEADS = 4
D = 16
Dv = 64
P = 136
BYTES = 4  # of a float32


def chunk_of(T):
    """The chunk that `attention` takes here."""
    return chunked_cpu.best_chunk(HEADS, T, D, Dv, P)


def predicted_cost(form, T):
    """(floating-point operations, bytes moved, calls) of one head, forward."""
    if form == "quadratic":
        # Passes over the T × T matrix: q·k writes it (1); the division by √D, the square, the floor
        # and the mask each read and write it (8); the product with v and the sum read it (2).
        return 2 * T * T * (D + Dv), 11 * T * T * BYTES, 10
    if form == "linear":
        return 4 * T * P * Dv, 4 * T * P * Dv * BYTES, 10
    if form == "recurrent":
        return 4 * T * P * Dv, 5 * T * P * Dv * BYTES, 25 * T
    C = chunk_of(T)  # the form "chunked"
    moved = 2 * T * (D + Dv) + 2 * P * Dv * T / C
    return T * (4 * P * Dv + 2 * C * (D + Dv)), moved * BYTES, 8 * T / C


def predicted_seconds(form, T, speed):
    """(seconds of all heads, what most of them go to), as if the three did not overlap."""
    flops, moved, calls = predicted_cost(form, T)
    flop_rate, byte_rate, call = speed
    parts = {
        "arithmetic": HEADS * flops / flop_rate,
        "memory": HEADS * moved / byte_rate,
        "calls": calls * call,  # all heads share a call
    }
    return sum(parts.values()), max(parts, key=parts.get)


def check_counts():
    """The operations of two forms are those that PyTorch counts, within 1 %."""
    q, k = torch.rand(2, 1, HEADS, 512, D)
    v = torch.rand(1, HEADS, 512, Dv)
    steps = partial(chunked_attention, chunk_size=chunk_of(512))
    for name, form in (("quadratic", quadratic_attention), ("chunked", steps)):
        with FlopCounterMode(display=False) as counter:
            form(q, k, v, kernels.ReBasedKernel(D))
        ratio = counter.get_total_flops() / (HEADS * predicted_cost(name, 512)[0])
        assert abs(ratio - 1) < 0.01, f"{name}: PyTorch counts {ratio:.3f} times as many"


if __name__ == "__main__":
    lesson.check(check_counts)
    print()

# %% [markdown]
# Now time them: float32, forward, ReBased. Softmax stands beside them, as PyTorch's fused kernel
# with heads of 64. A length is left out where a form would take over two seconds, judged by the
# length before it, or hold more than 2 GB.

# %%
TIMED = {
    "softmax": None,
    "quadratic": quadratic_attention,
    "linear": linear_attention,
    "recurrent": recurrent_attention,
    "chunked": attention,
}


def make_call(form, T):
    """A function without arguments that runs a form once."""
    if form == "softmax":
        q, k, v = torch.randn(3, 1, HEADS, T, Dv)
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    q, k = torch.rand(2, 1, HEADS, T, D)
    v = torch.randn(1, HEADS, T, Dv)
    kernel = kernels.ReBasedKernel(D)
    return lambda: TIMED[form](q, k, v, kernel)


GROWTH = {"softmax": 16, "quadratic": 16, "linear": 4, "recurrent": 4, "chunked": 4}  # at 4 T
HELD = {"quadratic": 3, "linear": 3 * P * Dv}  # numbers: times T² and times T


def fits(form, T, last):
    """Whether a form is timed at T; last: its seconds at T/4, or None at the first length."""
    numbers = HELD.get(form, 0) * T
    if form == "quadratic":
        numbers = numbers * T
    return HEADS * numbers * BYTES < 2e9 and (last is None or last * GROWTH[form] < 2)


@torch.no_grad()
def time_forms(lengths=(128, 512, 2048, 8192)):
    """Print a line for each form and length -> {(form, T): seconds measured}, {...: predicted}."""
    speed = lesson.machine_speed()
    measured = {}
    predicted = {}
    threads = torch.get_num_threads()
    print(f"forward, float32, B = 1, H = {HEADS}, D = {D}, Dv = {Dv}, {threads} threads\n")
    print("form                 T     bound by   predicted    measured   ratio")
    for form in TIMED:
        last = None
        for T in lengths:
            name = f"{form}, C = {chunk_of(T)}" if form == "chunked" else form
            line = f"{name:16}{T:6,}"
            if form == "softmax":
                line += " " * 25
            else:
                predicted[form, T], bound = predicted_seconds(form, T, speed)
                line += f"{bound:>13}{predicted[form, T] * 1e3:9.2f} ms"
            if not fits(form, T, last):
                print(line + f"{'–':>12}")
                break
            last = lesson.median_seconds({form: make_call(form, T)}, repeats=3)[form]
            measured[form, T] = last
            line += f"{last * 1e3:9.2f} ms"
            if (form, T) in predicted:
                line += f"{last / predicted[form, T]:8.2f}"
            print(line)
    return measured, predicted


def read_times(measured, predicted):
    """The sentences under the table, from its numbers."""
    print()
    lengths = [T for form, T in measured if form == "chunked"]
    for form in ("softmax", "quadratic", "linear", "recurrent"):
        longest = max(T for name, T in measured if name == form and T in lengths)
        ratio = measured[form, longest] / measured["chunked", longest]
        print(f"At T = {longest:,} {form} takes {ratio:.1f} times as long as the chunked form.")
    growth = measured["chunked", lengths[-1]] / measured["chunked", lengths[-2]]
    print(f"Four times the tokens take the chunked form {growth:.1f} times as long.")
    ratios = [measured[key] / predicted[key] for key in predicted if key in measured]
    print(f"Measured over predicted: from {min(ratios):.2f} to {max(ratios):.1f}. The count says")
    print("how a form grows; what fits into a cache is faster than it says.\n")


def draw(measured, predicted):
    """Milliseconds against T; the predictions dotted."""
    figure = lesson.new_figure(width=7, height=4.5)
    if figure is None:
        return
    axis = figure.subplots()
    for number, form in enumerate(TIMED):
        color = f"C{number}"
        for seconds, style in ((predicted, ":"), (measured, "o-")):
            lengths = [T for name, T in seconds if name == form]
            times = [seconds[form, T] * 1e3 for T in lengths]
            axis.plot(lengths, times, style, color=color)
        end = (lengths[-1], times[-1])
        axis.annotate(form, end, xytext=(6, 0), textcoords="offset points", color=color)
    axis.set(xscale="log", yscale="log", xlabel="T", ylabel="milliseconds (dotted: predicted)")
    axis.margins(x=0.25)
    lesson.save_figure(
        figure,
        "runs/02_linear_attention.png",
        "Milliseconds of each form against the length, on logarithmic axes: the chunked form grows "
        "in proportion to the length, softmax and the quadratic form with its square.",
    )


if __name__ == "__main__":
    measured, predicted = time_forms()
    read_times(measured, predicted)
    draw(measured, predicted)

# %% [markdown]
# ## Which one to use
#
# Train, and read a prompt, with `attention`: it is the chunked form. Speak with `recurrent_step`,
# one token at a time, from the state that `attention` returns. Hold everything against
# `quadratic_attention`. The textbook form explains the recurrent and the chunked one.

# %%
if __name__ == "__main__":
    lesson.finish()
