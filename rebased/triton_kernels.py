"""Linear attention on a GPU: the chunked form of 02_linear_attention.py as Triton kernels.

Whoever has read Triton's tutorials on matrix multiplication and fused attention can read this file
from top to bottom. Beside each kernel stands the same computation in a few lines of PyTorch, and
the tests hold the two equal. 01 and 02 are 01_kernels.py, where the features come from, and
02_linear_attention.py, whose chunked form takes four steps with each chunk: its own keys, the state
of the past, one division, and the chunk joins the state. Sections 3 and 4 here are these steps.
"Kernel" means a Triton kernel here; the kernel function of 01 is called the similarity.

Equations, with s = q·k/√D and sim = c0 + c1·s + c2·s² = u² + floor, where u = scale·(q·k) + shift,
             scale = √(c2/D),  shift = c1/(2√c2),  floor = c0 − c1²/(4·c2),  and with ε = 1e-12
  forward    w_ij = u_ij² + floor,  den_i = Σ_{j≤i} w_ij + ε,  o_i = Σ_{j≤i} w_ij v_j / den_i
  backward   with dx for ∂loss/∂x, so do for the gradient of o, which is given; from o = num/den
             δ_i = do_i·o_i,  dw_ij = (do_i·v_j − δ_i)/den_i,  du_ij = 2 u_ij dw_ij
             dq_i = scale Σ_{j≤i} du_ij k_j,  dk_j = scale Σ_{i≥j} du_ij q_i
             dv_j = Σ_{i≥j} w_ij do_i/den_i
In segments, these sums go over tokens of the same segment only. All others come in through states:
  forward    S = Σ φ(k_j) v_jᵀ and z = Σ φ(k_j) of all earlier segments
             add φ(q_i)ᵀS to Σ w_ij v_j, and φ(q_i)ᵀz to den_i
  backward   earlier segments give dφ(q_i) = (S do_i − δ_i z)/den_i
             R = Σ φ(q_i) do_iᵀ/den_i and r = −Σ φ(q_i) δ_i/den_i of all later segments,
             the gradients of S and z,
             give dφ(k_j) = R v_j + r, and add Rᵀφ(k_j) to dv_j
             section 2 turns dφ(q) and dφ(k) into what they add to dq and dk

Letters
  N = B·H heads, T tokens, M tokens of a segment, D columns of q and k, DV of v. P features, P_PAD
  with padding, of which F = BLOCK_F are made at a time. STATE = P_PAD·(DV + 1): the numbers of a
  state, S and z.
  q_i, k_j, v_j, o_i and φ are columns in the equations above, and rows of tensors in the code.
  i counts queries, j keys, t tokens that may be either; f counts features, d columns of q and k,
  e columns of v. In section 2, a and b are the d's of a feature.
  A step of a loop begins at `past` if the loop walks over earlier keys, at `later` if it walks over
  later queries.
  Tensors in memory are (N, T, size). On chip, shapes stand in brackets: [TILE, DV]. There D and DV
  are padded to BLOCK_D and BLOCK_DV.

References
  [1] Katharopoulos et al., Transformers are RNNs, arXiv 2006.16236: features, S and z (sections
      3.2, 3.3).
  [2] Aksenov et al., Linear Transformers with Learnable Kernel Functions, arXiv 2402.10644: ReBased
      (section 4).
  [3] Dao, FlashAttention-2, arXiv 2307.08691: tiles, δ, and two passes backward (section 3.1).
"""

import functools
import math
import os

import torch
from torch.fx.experimental.symbolic_shapes import guard_scalar  # for torch.compile, see section 9

from rebased import EPS
from rebased.chunked_cpu import (
    complete_square,  # -> scale, shift, floor, and True: u is squared
    count_features,  # -> P
)

MISSING = (
    "rebased.triton_kernels needs Triton (Linux: pip install triton==3.7.1); "
    "everything else runs without it"
)
TOO_OLD = (
    "rebased.triton_kernels needs PyTorch 2.7 or a newer one, which can read the signatures of its "
    f"operations; this one is {torch.__version__}, and everything else runs with it"
)
if torch.__version__ < "2.7":  # it is no string, but compares as versions do
    raise ImportError(TOO_OLD)
try:
    import triton
    import triton.language as tl
except ImportError:
    raise ImportError(MISSING) from None

# With TRITON_INTERPRET=1 in the environment Triton runs kernels on the CPU, in NumPy: slowly, but
# without a GPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# 1. Sizes
#
# The textbook's chunk of 64 tokens is wrong on a GPU. At D = 16, DV = 64 a state has 136 features,
# padded to 160, times DV + 1 numbers of float32: 42 KB (35 without padding), as much as the k and v
# of 260 tokens in bfloat16. With a state every 64 tokens, states would be most of the traffic. So a
# *segment* is long, and inside it the quadratic form runs in *tiles*, as in FlashAttention:
#
#     segments before      keys of this segment of 512, STEP = 64 at a time ->
#     ..-----------------+------+------+
#       the state,       | \  0 |   0  |  64 queries    program 0 owns
#       F features       |   \  |      |                TILE = 128 queries,
#       at a time:       +------+------+                two rows of cells
#       [TILE, F]        |      | \  0 |  64 queries
#       x [F, DV],       |      |   \  |
#       P_PAD/F times    +------+------+------+------+
#                        |      |      | \  0 |   0  |  64 queries    program 1
#                        |      |      |   \  |      |
#                        +------+------+------+------+
#                        |      |      |      | \  0 |  64 queries
#                        |      |      |      |   \  |
#     ..-----------------+------+------+------+------+     ... and programs 2 and 3
#
# A program walks over the keys of its segment, up to its own last query. Only its last two steps
# meet the diagonal (\) and need a mask, which writes the 0. A step multiplies all 128 rows, so in
# the last one the upper 64 are computed and thrown away.
#
# Why 512? A state every 512 tokens is 81 bytes a token, and they are moved four times: written,
# read and written by the scan, and read (by one program from memory; the other three of a segment
# should find it in the cache). With 612 bytes of inputs and outputs, q, k, v and o 320, k and v
# once more for the states 160, rounding_error 128 and 1/den 4, that makes 937 bytes a token in the
# forward pass (experiments/benchmark_gpu.py counts them). With 256 tokens, states would be half of
# all bytes; 1,024 would halve theirs and nearly double the work in tiles.
#
# Why 128 and 64? On Hopper four warps, a *warpgroup*, multiply 64 rows together. A tile of 128 rows
# is two of them, and both use what was loaded of a state. Its program has 8 warps, 256 threads of
# at most 255 registers. Weights [TILE, STEP] = [128, 64] take 32 registers of each thread, and
# features [TILE, BLOCK_F] = [128, 32] take 16; 64 features at a time gave no better compiled code.
#
# A kernel may read a global only if it is a tl.constexpr; outside of kernels, .value is its number.
SEGMENT = 512  # tokens between two states
TILE = 128  # queries (or keys) that a program owns
STEP = 64  # keys (or queries) that it meets at a time
BLOCK_F = tl.constexpr(32)  # features at a time
EPS_ON_CHIP = tl.constexpr(EPS)


# What the compiler must know, the tl.constexpr arguments of the kernels (`compiler_arguments` in
# section 7 sets all of these but REVERSE; the scan has its own three):
#   D, DV                 columns of q and k, and of v
#   P_PAD                 features, padded to a multiple of BLOCK_F
#   BLOCK_D, BLOCK_DV     D and DV as tl.dot wants them, powers of two from 16 on; loads fill with 0
#   SEGMENT, TILE, STEP   as above by default: the caller may choose another SEGMENT, and section 7
#                         halves TILE and STEP where factors have four bytes
#   DTYPE                 of the two factors of every tl.dot; sums are always float32
#   PRECISION             how tl.dot multiplies float32 factors: "ieee" with all their digits and
#                         without tensor cores, "tf32" with 10 bits and on them
#   ONES                  whether some feature needs a factor 1, see section 2
#   REVERSE               whether sums run from the end, for the backward pass, see section 3
#
# In the kernels, a name that ends in _tile holds rows that were loaded, or are to be stored. The
# shape behind a line is that on chip. tl.dot(a, b, c) is a @ b + c.


# 2. φ as a table
#
# Every feature of 01 is a constant times two coordinates, φ_f(x) = root_f · x[a_f] · x[b_f], if an
# index of −1 reads 1. The constant is the square root of what the pair weighs in the similarity. At
# D = 2, for 1 + s + s²/2:
#
#     f        0      1      2      3      4      5
#     a       −1      0      1      0      0      1
#     b       −1     −1     −1      0      1      1
#     root   1.00   0.84   0.84   0.50   0.71   0.50
#
#     φ(x) = [1, 0.84 x₀, 0.84 x₁, 0.5 x₀x₀, 0.71 x₀x₁, 0.5 x₁x₁]
#
# So one kernel serves every polynomial of degree two and every D: a similarity is a table and the
# three numbers scale, shift and floor. All three rows are float32: indices that small are exact,
# and one tensor needs one type.
#
# Tables are kept for good, a few KB for each similarity. A cache that dropped the oldest would free
# memory that a CUDA graph may still read.
@functools.cache
def make_table(coefficients, D, device):
    """float32 (3, P_PAD): the rows a, b, root, ordered as 01's features; padding has root 0."""
    if torch.device(device).type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "call chunked_attention once before a CUDA graph records it: "
            "the first call makes a table"
        )
    c0, c1, c2 = coefficients
    once = 1 + D * torch.finfo(torch.float32).eps  # 01: so no weight comes out below 0
    columns = []
    if c0:
        columns.append((-1, -1, math.sqrt(c0 * once)))
    if c1:
        for a in range(D):
            columns.append((a, -1, math.sqrt(c1 / math.sqrt(D))))
    for a in range(D):
        for b in range(a, D):
            times = once if a == b else 2  # (q·k)² has x_a x_b and x_b x_a, one feature for both
            columns.append((a, b, math.sqrt(c2 / D * times)))
    while len(columns) % BLOCK_F.value:
        columns.append((0, 0, 0.0))
    with torch.inference_mode(False):  # made for good, also if the first call is inference
        return torch.tensor(columns, dtype=torch.float32, device=device).T.contiguous()


@torch.compiler.assume_constant_result
def feature_table(coefficients, D, device):
    """What `make_table` made when it was first asked: the copy to the GPU happens once.

    A CUDA graph must not record that copy. torch.compile calls this function while it compiles and
    keeps the tensor as a constant, so its graphs are safe; whoever records a graph of their own
    makes a usual call before, or gets the RuntimeError above. Two functions, because torch.compile
    looks through functools.cache at what is inside: a mark on a cached function goes unseen.
    """
    return make_table(coefficients, D, device)


def reads_ones(coefficients):
    """Whether an index of −1 occurs in the table: the constexpr ONES."""
    return bool(coefficients[0]) or bool(coefficients[1])


def features_reference(x, table):
    """x (N, T, D) -> φ(x) (N, T, P_PAD)."""
    a, b, root = table
    x_and_1 = torch.nn.functional.pad(x, (0, 1), value=1.0)  # column −1 reads 1
    return root * x_and_1[..., a.long()] * x_and_1[..., b.long()]


# A GPU cannot index registers: x[a_f] would be a trip to memory. A product can: with the one-hot
# matrix A, whose column f has its 1 in row a_f, x @ A puts x[a_f] into column f. All other terms of
# that sum are 0: the product loses no digit but those that it takes from every factor (section 7
# says which). The same matrices, transposed, carry the gradient back, since
# d(root x_a x_b) = root x_b dx_a + root x_a dx_b. With rows x, ⊙ for products element by element,
# and a 1 added to x A or x B wherever the index is −1:
#
#     φ(x) = root ⊙ (x A) ⊙ (x B)
#     dx   = (dφ ⊙ root ⊙ (x B)) Aᵀ + (dφ ⊙ root ⊙ (x A)) Bᵀ
#
# For the a of the table above:
#
#     A = 0  1  0  1  1  0          x A = [0, x₀, x₁, x₀, x₀, x₁], and the first 0 becomes a 1
#         0  0  1  0  0  1
#
# The constexpr ONES says whether any index is −1; without one, nothing need be added.
@triton.jit
def factors(
    x, table, f,
    P_PAD: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    ONES: tl.constexpr,
):
    """x [rows, D] -> x[a_f], x[b_f] [rows, F], root [1, F]; and for the way back A and B [D, F].

    f [F]: which features.
    """
    a = tl.load(table + f)[None, :]  # [1, F]
    b = tl.load(table + P_PAD + f)[None, :]
    root = tl.load(table + 2 * P_PAD + f)[None, :]
    d = tl.arange(0, BLOCK_D)[:, None].to(tl.float32)  # as the table has them
    A = (d == a).to(DTYPE)  # [D, F]
    B = (d == b).to(DTYPE)
    xa = tl.dot(x, A, input_precision=PRECISION)  # [rows, F]
    xb = tl.dot(x, B, input_precision=PRECISION)
    if ONES:  # the column of an index −1 is all 0: here it gets its 1
        xa += (a < 0).to(tl.float32)
        xb += (b < 0).to(tl.float32)
    return xa, xb, root, A, B


def features_backward_reference(x, dphi, table):
    """The gradient of x (N, T, D), from that of φ(x) (N, T, P_PAD)."""
    a, b, root = table
    x_and_1 = torch.nn.functional.pad(x, (0, 1), value=1.0)
    d = torch.arange(x.shape[-1], device=x.device)[:, None]
    A = (d == a).to(x.dtype)  # (D, P_PAD), as on chip
    B = (d == b).to(x.dtype)
    dxa = dphi * root * x_and_1[..., b.long()]
    dxb = dphi * root * x_and_1[..., a.long()]
    return dxa @ A.mT + dxb @ B.mT


# 3. The states: the last step of 02, "the chunk joins the state", comes first
#
# In 02 the chunks follow each other, each adding to S. Here every segment sums its own φ(k) vᵀ, all
# at the same time, and a scan then makes prefixes of the sums. They lie in *slots*, one state each;
# slot 0 holds the initial state (or 0):
#
#     segment           0           1           2           3
#                 +-----------+-----------+-----------+-----------+
#     tokens      |  0 - 511  | 512 -1023 | 1024-1535 | 1536-2047 |
#                 +-----------+-----------+-----------+-----------+
#     state_kernel      \           \           \           \           Σ φ(k) vᵀ of one segment
#     slot        0      `---> 1     `---> 2     `---> 3     `---> 4
#               [init]       [Σ₀]        [Σ₁]        [Σ₂]        [Σ₃]
#     scan_kernel  ------------------ prefix sums ----------------->
#               [init]  [init+Σ₀]  [init+Σ₀+Σ₁]     ...      [init+Σ₀+...+Σ₃]
#     read by   segment 0    segment 1   segment 2   segment 3    (the final state)
#
# A segment needs the sum of what came *before* it. 02 warns of cumsum(x) − x and moves the sums by
# one place instead; here that is in the numbering: segment s writes slot s + 1. So after an
# *inclusive* scan slot s is what came before segment s, and nothing is ever subtracted. The last
# slot is made only if the final state is asked for. One segment without a state at either end has
# no slots at all, and what is left is the quadratic form; the same kernels serve it, their
# `if segment >= first` is then false, and the empty tensor of states is never read.
#
# The backward pass needs the same sums the other way around, over the queries *after* a segment.
# REVERSE is the mirror image: x, y are q, do instead of k, v; segments are counted from the end:
#
#     segment           3           2           1           0
#     slot        0      `---> 1     `---> 2     `---> 3     `---> 4
#             [d final]      [Σ₃]        [Σ₂]        [Σ₁]        [Σ₀]
#     read by   segment 3    segment 2   segment 1   segment 0    (gradient of the initial state)
#
# In memory a slot is S [P_PAD, DV], then z [P_PAD]; in the mirror R, then r. Features that are
# padding are 0 in both.
def count_slots(T, segment, edge, keep):
    """How many slots there are.

    edge: whether slot 0 holds something: an initial state, in the mirror the gradient of a final
    one.
    keep: whether the sum of all segments is asked for: the final state, in the mirror the gradient
    of an initial one.
    """
    slots = -(-T // segment)
    if keep:
        slots += 1
    if slots == 1 and not edge:
        return 0  # slot 0 alone, and nothing in it
    return slots


@triton.jit
def state_kernel(
    x, y, inv_den, delta, table, states, T, slots,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    P_PAD: tl.constexpr, SEGMENT: tl.constexpr, STEP: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, ONES: tl.constexpr, REVERSE: tl.constexpr,
):
    """A program sums BLOCK_F features over one segment of one head, and writes them into its slot.

    inv_den and delta are read only if REVERSE.
    """
    # Only the first axis of a grid may exceed 65,535, so block, segment and head share it. A head
    # may start beyond 2³¹ numbers: its offset has 64 bits. `turn` is the slot less 1: the segment,
    # or in the mirror the segment counted from the end. (With no slot but 0 nothing is launched.)
    blocks = P_PAD // BLOCK_F
    block = tl.program_id(0) % blocks
    turn = tl.program_id(0) // blocks % (slots - 1)
    n = (tl.program_id(0) // blocks // (slots - 1)).to(tl.int64)
    segment = turn
    if REVERSE:
        segment = tl.cdiv(T, SEGMENT) - 1 - turn
    x += n * T * D
    y += n * T * DV
    inv_den += n * T
    delta += n * T
    states += (n * slots + turn + 1) * P_PAD * (DV + 1)
    d = tl.arange(0, BLOCK_D)[None, :]  # [1, BLOCK_D]
    e = tl.arange(0, BLOCK_DV)[None, :]
    f = block * BLOCK_F + tl.arange(0, BLOCK_F)

    # S is summed transposed, with BLOCK_DV rows, 64 in the paper's models: Hopper's warpgroups
    # multiply 64 rows at a time, and F is only 32. If y had one more column, of 1 for z and of −δ
    # for r, then z would be the last column of S. But a product with one column is no task for
    # tl.dot: z is summed row by row, [STEP, F], and the STEP rows are added once, at the end.
    S_transposed = tl.zeros((BLOCK_DV, BLOCK_F), tl.float32)
    z = tl.zeros((STEP, BLOCK_F), tl.float32)
    for start in range(segment * SEGMENT, min(segment * SEGMENT + SEGMENT, T), STEP):
        t = start + tl.arange(0, STEP)[:, None]  # [STEP, 1]
        x_tile = tl.load(x + t * D + d, mask=(t < T) & (d < D), other=0.0).to(DTYPE)
        y_tile = tl.load(y + t * DV + e, mask=(t < T) & (e < DV), other=0.0).to(DTYPE)
        xa, xb, root, _, _ = factors(x_tile, table, f, P_PAD, BLOCK_D, DTYPE, PRECISION, ONES)
        phi = xa * xb * root  # [STEP, F]
        if REVERSE:
            # φ(q)/den meets do for R, and −δ for r. 1/den goes into φ, and bfloat16 rounds that
            # once for both: what they later add up to, R v + r, is then a sum of do·v − δ with the
            # same factors. (tf32 rounds inside tl.dot, for R only.) Beyond T the load of 1/den
            # gives 0.
            phi *= tl.load(inv_den + t, mask=t < T, other=0.0)
            y_column = -tl.load(delta + t, mask=t < T, other=0.0)  # [STEP, 1]
        else:
            # φ(k) meets v for S, and 1 for z. Beyond T that must be a 0, since the constant
            # feature is not 0 there.
            y_column = (t < T).to(tl.float32)
        phi = phi.to(DTYPE)
        S_transposed = tl.dot(tl.trans(y_tile), phi, S_transposed, input_precision=PRECISION)
        z += phi.to(tl.float32) * y_column

    tl.store(states + f[:, None] * DV + e, tl.trans(S_transposed), mask=e < DV)
    tl.store(states + P_PAD * DV + f, tl.sum(z, 0))


def state_reference(x, y, column, table):
    """What one segment adds: x (N, M, D), y (N, M, DV), column (N, M, 1) -> (N, P_PAD, DV + 1).

    That is S and z side by side. Forward: k, v and ones. In reverse: q, do/den and −δ/den; in a
    product it does not matter which factor is divided by den, and the kernel divides φ.
    """
    return features_reference(x, table).mT @ torch.cat([y, column], dim=-1)


# The scan. A program carries COLUMNS numbers of a head's state through all its slots, ROWS slots at
# a time: tl.cumsum inside those, a running total from one set to the next. A state is then spread
# over 41 programs, so that few heads should do to fill a card. As Triton lays it out for an H100,
# each of its 128 threads holds four columns of eight rows: eight loads of 16 bytes under way at
# once.
#
# No atomics here or elsewhere: an atomic addition takes its terms in the order in which programs
# happen to end, and a float32 sum depends on the order. Without them, and with sizes that are never
# tuned while running, two runs give the same bits. Hence two kernels of tiles backward, one that
# owns queries and one that owns keys, not one that adds into dq.
COLUMNS = 256
ROWS = 16


@triton.jit
def scan_kernel(states, slots, STATE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Prefix sums over the slots (N, slots, STATE), in place."""
    blocks = tl.cdiv(STATE, COLUMNS)
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    states += n * slots * STATE
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, slots, ROWS):
        slot = (start + tl.arange(0, ROWS)).to(tl.int64)  # slot · STATE may exceed 2³¹
        where = states + slot[:, None] * STATE + column[None, :]
        mask = (slot[:, None] < slots) & (column[None, :] < STATE)
        x = tl.load(where, mask=mask, other=0.0)  # [ROWS, COLUMNS]
        tl.store(where, tl.cumsum(x, 0) + total[None, :], mask=mask)
        total += tl.sum(x, 0)


def scan_reference(states):
    """states (N, slots, ...) -> the same, summed up."""
    return states.cumsum(1)


# 4. The output: the other three steps of 02
#
# den sums the *rounded* weights, those that multiply v. Inside a segment the weights w/den then add
# up to 1 exactly (as float32 goes), and o_0 is v_0; with a state they do so to the precision of
# products, for S is rounded for num, and z is not for den. The sum is a tl.dot as well, with
# columns of ones, 16 of them because tl.dot takes no fewer. This is what makes den see rounded
# weights where tf32 rounds them, inside tl.dot; and tensor cores should add faster than a reduction
# over [TILE, STEP].
#
# What rounding takes from o. The backward pass subtracts δ_i = do_i·o_i from do_i·v_j and divides
# by den_i. Where o is close to v_j, as in the first rows of a sequence, which have few keys to
# choose from, the two nearly cancel, and den can be 1e-6 there. An o rounded to bfloat16 is right
# to three digits: the difference would be noise, and 1/den would make it large. So this kernel
# stores o for the model, and `rounding_error`, what rounding took from o, for the backward pass:
# their sum is o to five digits. (With values that differ in their last bit only, dq is off by a
# factor of 9 without it and by 2 % with it.) It costs a tenth of the bytes that both passes move;
# to sum δ anew from all weights would take as long as dq. In float32 it is all 0, and stored
# nevertheless: one case less to write and to test.
#
# Earlier segments have the same difference, S do − δ z, and there S is rounded to DTYPE while z is
# not; likewise R, but not r, in R v + r. After a segment or more no den is tiny any longer: in
# bfloat16 the relative error of dq is 5e-3 in all, and of that the rounded S alone makes 1e-3 to
# 2e-3; in dk the rounded R makes less. But this rounding is a limit. If all values of a long
# sequence agree up to the last bit of bfloat16, what comes to dq through states is noise, and dk is
# off by 5 %. And behind an *initial* state of one or two tokens there are few keys, too: the
# rounded S alone then puts most rows of dq off by 2e-3, as ever, but rows whose den is tiny are
# noise, and just these rows of dq are large. (Emulated on random inputs; behind eight tokens
# nothing of it is left.) Hand in such a beginning as tokens, or give v in float32, which sets the
# type of products.
@triton.jit
def output_kernel(
    q, k, v, o, rounding_error, inv_den, table, states, scale, shift, floor, T, slots, first,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    P_PAD: tl.constexpr, SEGMENT: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, ONES: tl.constexpr,
):
    """A program makes TILE rows of o.

    first: the first segment with something before it, 0 if there is an initial state, else 1.
    """
    tiles = tl.cdiv(T, TILE)
    start = tl.program_id(0) % tiles * TILE
    n = (tl.program_id(0) // tiles).to(tl.int64)
    segment = start // SEGMENT
    q += n * T * D
    k += n * T * D
    v += n * T * DV
    o += n * T * DV
    rounding_error += n * T * DV
    inv_den += n * T
    states += (n * slots + segment) * P_PAD * (DV + 1)
    i = start + tl.arange(0, TILE)[:, None]  # [TILE, 1]
    d = tl.arange(0, BLOCK_D)[None, :]  # [1, BLOCK_D]
    e = tl.arange(0, BLOCK_DV)[None, :]
    q_tile = tl.load(q + i * D + d, mask=(i < T) & (d < D), other=0.0).to(DTYPE)
    ones = tl.full((STEP, 16), 1.0, DTYPE)
    num = tl.zeros((TILE, BLOCK_DV), tl.float32)
    den_16_times = tl.zeros((TILE, 16), tl.float32)

    # Step 1. Inside the segment: the quadratic form. SEGMENT is a multiple of TILE, and TILE of
    # STEP: a tile lies in one segment, and a step is either before the tile or inside it. (In the
    # last tile of a sequence a step may lie beyond T; its loads give 0.)
    for past in range(segment * SEGMENT, start + TILE, STEP):
        j = past + tl.arange(0, STEP)
        rows = j[:, None]  # [STEP, 1]
        k_tile = tl.load(k + rows * D + d, mask=(rows < T) & (d < D), other=0.0).to(DTYPE)
        v_tile = tl.load(v + rows * DV + e, mask=(rows < T) & (e < DV), other=0.0).to(DTYPE)
        # u = scale·(q·k) + shift,  w = u² + floor
        u = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale + shift
        w = u * u + floor  # [TILE, STEP]
        if past >= start:
            # On the diagonal: keys after the query weigh 0. A key beyond T comes after every query
            # that is stored.
            w = tl.where(i >= j[None, :], w, 0.0)
        w = w.to(DTYPE)
        num = tl.dot(w, v_tile, num, input_precision=PRECISION)
        den_16_times = tl.dot(w, ones, den_16_times, input_precision=PRECISION)
    # One of the 16 equal columns; registers cannot be indexed, but their maximum can be taken.
    den = tl.max(den_16_times, 1, keep_dims=True)  # [TILE, 1]

    # Step 2. All segments before: the state, read by φ(q), BLOCK_F features at a time.
    if segment >= first:
        for block in range(0, P_PAD, BLOCK_F):
            f = block + tl.arange(0, BLOCK_F)
            S = tl.load(states + f[:, None] * DV + e, mask=e < DV, other=0.0).to(DTYPE)
            z = tl.load(states + P_PAD * DV + f)
            xa, xb, root, _, _ = factors(q_tile, table, f, P_PAD, BLOCK_D, DTYPE, PRECISION, ONES)
            phi = (xa * xb * root).to(DTYPE)  # [TILE, F]
            num = tl.dot(phi, S, num, input_precision=PRECISION)
            den += tl.sum(phi.to(tl.float32) * z[None, :], 1, keep_dims=True)

    # Step 3. One division. Rows beyond T are divided too, and not stored.
    inv = 1 / (den + EPS_ON_CHIP)
    exact = num * inv
    rounded = exact.to(o.dtype.element_ty)
    lost = (exact - rounded.to(tl.float32)).to(rounding_error.dtype.element_ty)
    mask = (i < T) & (e < DV)
    tl.store(o + i * DV + e, rounded, mask=mask)
    tl.store(rounding_error + i * DV + e, lost, mask=mask)
    tl.store(inv_den + i, inv, mask=i < T)


def output_reference(q, k, v, state, table, coefficients):
    """One segment: q, k, v (N, M, size), the state before it (N, P_PAD, DV + 1).

    -> o (N, M, DV), 1/den (N, M, 1).
    """
    scale, shift, floor, _ = complete_square(coefficients, q.shape[-1])
    u = scale * q @ k.mT + shift  # (N, M, M)
    w = (u.square() + floor).tril()
    past = features_reference(q, table) @ state  # (N, M, DV + 1): for num; the last column for den
    inv_den = 1 / (w.sum(-1, keepdim=True) + past[..., -1:] + EPS)
    return (w @ v + past[..., :-1]) * inv_den, inv_den


# 5. Backward, the queries
#
# The same walk as in the output: the keys before a query, then the state. 1/den is the same for
# every term of a query, so the sum is multiplied by it once, at the end; until then dw_den,
# half_du_den and dphi_den are dw, du/2 and dφ times den, and so are dxa, dxb and dq_tile. 2·scale
# is the same for every term inside the segment; the sum is multiplied by it before what comes from
# the state is added, where the roots of the features do its work. δ is stored on the way, for the
# state kernel in reverse and for that of section 6. (floor has no gradient; it is there because all
# three kernels of tiles are launched alike.)
@triton.jit
def query_kernel(
    q, k, v, do, o, rounding_error, dq, inv_den, delta, table, states,
    scale, shift, floor, T, slots, first,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    P_PAD: tl.constexpr, SEGMENT: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, ONES: tl.constexpr,
):
    """A program makes TILE rows of dq and of δ. first: as in `output_kernel`."""
    tiles = tl.cdiv(T, TILE)
    start = tl.program_id(0) % tiles * TILE
    n = (tl.program_id(0) // tiles).to(tl.int64)
    segment = start // SEGMENT
    q += n * T * D
    k += n * T * D
    v += n * T * DV
    do += n * T * DV
    o += n * T * DV
    rounding_error += n * T * DV
    dq += n * T * D
    inv_den += n * T
    delta += n * T
    states += (n * slots + segment) * P_PAD * (DV + 1)
    i = start + tl.arange(0, TILE)[:, None]  # [TILE, 1]
    d = tl.arange(0, BLOCK_D)[None, :]  # [1, BLOCK_D]
    e = tl.arange(0, BLOCK_DV)[None, :]
    row_mask = (i < T) & (e < DV)
    q_tile = tl.load(q + i * D + d, mask=(i < T) & (d < D), other=0.0).to(DTYPE)
    do_tile = tl.load(do + i * DV + e, mask=row_mask, other=0.0).to(DTYPE)

    # δ_i = do_i·o_i, with what rounding took from o
    o_tile = tl.load(o + i * DV + e, mask=row_mask, other=0.0).to(tl.float32)
    o_tile += tl.load(rounding_error + i * DV + e, mask=row_mask, other=0.0).to(tl.float32)
    delta_tile = tl.sum(do_tile.to(tl.float32) * o_tile, 1, keep_dims=True)  # [TILE, 1]
    tl.store(delta + i, delta_tile, mask=i < T)

    # Inside the segment: dw den = do·v − δ, and du den/2 = u dw den
    dq_tile = tl.zeros((TILE, BLOCK_D), tl.float32)
    for past in range(segment * SEGMENT, start + TILE, STEP):
        j = past + tl.arange(0, STEP)
        rows = j[:, None]  # [STEP, 1]
        k_tile = tl.load(k + rows * D + d, mask=(rows < T) & (d < D), other=0.0).to(DTYPE)
        v_tile = tl.load(v + rows * DV + e, mask=(rows < T) & (e < DV), other=0.0).to(DTYPE)
        u = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale + shift
        dw_den = tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION) - delta_tile
        half_du_den = dw_den * u  # [TILE, STEP]
        if past >= start:
            half_du_den = tl.where(i >= j[None, :], half_du_den, 0.0)
        dq_tile = tl.dot(half_du_den.to(DTYPE), k_tile, dq_tile, input_precision=PRECISION)
    dq_tile *= 2 * scale

    # All segments before: dφ(q) den = S do − δ z, times root for the product rule; then the one-hot
    # matrices carry it back to q.
    if segment >= first:
        for block in range(0, P_PAD, BLOCK_F):
            f = block + tl.arange(0, BLOCK_F)
            S = tl.load(states + f[:, None] * DV + e, mask=e < DV, other=0.0).to(DTYPE)
            z = tl.load(states + P_PAD * DV + f)
            xa, xb, root, A, B = factors(q_tile, table, f, P_PAD, BLOCK_D, DTYPE, PRECISION, ONES)
            dphi_den = tl.dot(do_tile, tl.trans(S), input_precision=PRECISION)  # [TILE, F]
            dphi_den = (dphi_den - delta_tile * z[None, :]) * root
            dxa = (dphi_den * xb).to(DTYPE)
            dxb = (dphi_den * xa).to(DTYPE)
            dq_tile = tl.dot(dxa, tl.trans(A), dq_tile, input_precision=PRECISION)
            dq_tile = tl.dot(dxb, tl.trans(B), dq_tile, input_precision=PRECISION)

    dq_tile *= tl.load(inv_den + i, mask=i < T, other=0.0)
    tl.store(dq + i * D + d, dq_tile.to(dq.dtype.element_ty), mask=(i < T) & (d < D))


def query_reference(q, k, v, do, o, inv_den, state, table, coefficients):
    """One segment, shapes as in `output_reference` -> dq (N, M, D) and δ (N, M, 1)."""
    scale, shift, _, _ = complete_square(coefficients, q.shape[-1])
    delta = (do * o).sum(-1, keepdim=True)
    u = scale * q @ k.mT + shift
    du = (2 * u * (do @ v.mT - delta) * inv_den).tril()
    d_num_and_den = torch.cat([do, -delta], dim=-1) * inv_den  # (N, M, DV + 1)
    dphi = d_num_and_den @ state.mT  # (N, M, P_PAD)
    return scale * du @ k + features_backward_reference(q, dphi, table), delta


# 6. Backward, the keys and values
#
# A program owns TILE keys and walks over the queries *after* them in its segment; those of later
# segments come in through R and r, the states of the mirror. Here 1/den belongs to the index that
# is summed over, so it cannot come last. It goes into the weights, while these are float32: with no
# weight below 0, w/den is at most 1, where 1/den alone can reach 1/ε; and du gets it after its
# subtraction. In do it would be rounded once more, and the nearly equal do·v and δ would no longer
# fit each other. Queries beyond T have 1/den = 0.
@triton.jit
def key_kernel(
    q, k, v, do, dk, dv, inv_den, delta, table, states, scale, shift, floor, T, slots, first,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    P_PAD: tl.constexpr, SEGMENT: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, ONES: tl.constexpr,
):
    """A program makes TILE rows of dk and dv.

    first: counted from the end, the first segment with something after it: 0 if the final state has
    a gradient, else 1.
    """
    tiles = tl.cdiv(T, TILE)
    start = tl.program_id(0) % tiles * TILE
    n = (tl.program_id(0) // tiles).to(tl.int64)
    segment = start // SEGMENT
    after = tl.cdiv(T, SEGMENT) - 1 - segment  # segments after this one; in the mirror, its slot
    q += n * T * D
    k += n * T * D
    v += n * T * DV
    do += n * T * DV
    dk += n * T * D
    dv += n * T * DV
    inv_den += n * T
    delta += n * T
    states += (n * slots + after) * P_PAD * (DV + 1)
    j = start + tl.arange(0, TILE)[:, None]  # [TILE, 1]
    d = tl.arange(0, BLOCK_D)[None, :]  # [1, BLOCK_D]
    e = tl.arange(0, BLOCK_DV)[None, :]
    k_mask = (j < T) & (d < D)
    v_mask = (j < T) & (e < DV)
    k_tile = tl.load(k + j * D + d, mask=k_mask, other=0.0).to(DTYPE)
    v_tile = tl.load(v + j * DV + e, mask=v_mask, other=0.0).to(DTYPE)
    dk_tile = tl.zeros((TILE, BLOCK_D), tl.float32)
    dv_tile = tl.zeros((TILE, BLOCK_DV), tl.float32)

    # Inside the segment; rows are keys and columns queries, [TILE, STEP]
    for later in range(start, min(segment * SEGMENT + SEGMENT, T), STEP):
        i = later + tl.arange(0, STEP)
        rows = i[:, None]  # [STEP, 1]
        q_tile = tl.load(q + rows * D + d, mask=(rows < T) & (d < D), other=0.0).to(DTYPE)
        do_tile = tl.load(do + rows * DV + e, mask=(rows < T) & (e < DV), other=0.0).to(DTYPE)
        inv = tl.load(inv_den + i, mask=i < T, other=0.0)[None, :]
        delta_tile = tl.load(delta + i, mask=i < T, other=0.0)[None, :]
        u = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * scale + shift
        # w/den = (u² + floor)/den
        u_inv = u * inv
        w_inv = u * u_inv + floor * inv
        # du/2 = u (do·v − δ)/den
        dw_den = tl.dot(v_tile, tl.trans(do_tile), input_precision=PRECISION) - delta_tile
        half_du = dw_den * u_inv
        if later < start + TILE:  # on the diagonal: a key does not reach the queries before it
            w_inv = tl.where(i[None, :] >= j, w_inv, 0.0)
            half_du = tl.where(i[None, :] >= j, half_du, 0.0)
        dv_tile = tl.dot(w_inv.to(DTYPE), do_tile, dv_tile, input_precision=PRECISION)
        dk_tile = tl.dot(half_du.to(DTYPE), q_tile, dk_tile, input_precision=PRECISION)
    dk_tile *= 2 * scale

    # All segments after: dv = Rᵀφ(k) and dφ(k) = R v + r, times root for the product rule
    if after >= first:
        for block in range(0, P_PAD, BLOCK_F):
            f = block + tl.arange(0, BLOCK_F)
            R = tl.load(states + f[:, None] * DV + e, mask=e < DV, other=0.0).to(DTYPE)
            r = tl.load(states + P_PAD * DV + f)
            xa, xb, root, A, B = factors(k_tile, table, f, P_PAD, BLOCK_D, DTYPE, PRECISION, ONES)
            phi = (xa * xb * root).to(DTYPE)  # [TILE, F]
            dv_tile = tl.dot(phi, R, dv_tile, input_precision=PRECISION)
            dphi = (tl.dot(v_tile, tl.trans(R), input_precision=PRECISION) + r[None, :]) * root
            dxa = (dphi * xb).to(DTYPE)
            dxb = (dphi * xa).to(DTYPE)
            dk_tile = tl.dot(dxa, tl.trans(A), dk_tile, input_precision=PRECISION)
            dk_tile = tl.dot(dxb, tl.trans(B), dk_tile, input_precision=PRECISION)

    tl.store(dk + j * D + d, dk_tile.to(dk.dtype.element_ty), mask=k_mask)
    tl.store(dv + j * DV + e, dv_tile.to(dv.dtype.element_ty), mask=v_mask)


def key_reference(q, k, v, do, inv_den, delta, state_after, table, coefficients):
    """One segment, with R and r of what comes after it -> dk (N, M, D) and dv (N, M, DV)."""
    scale, shift, floor, _ = complete_square(coefficients, q.shape[-1])
    u = scale * q @ k.mT + shift  # rows are queries here
    w = (u.square() + floor).tril()
    du = (2 * u * (do @ v.mT - delta) * inv_den).tril()
    dphi = torch.nn.functional.pad(v, (0, 1), value=1.0) @ state_after.mT  # (N, M, P_PAD)
    dk = scale * du.mT @ q + features_backward_reference(k, dphi, table)
    dv = w.mT @ (do * inv_den) + (features_reference(k, table) @ state_after)[..., :-1]
    return dk, dv


# 7. The launches
#
# bfloat16 is multiplied as it is. float16 is multiplied as tf32: a state is a sum over up to all
# tokens and itself a factor, and as float16 it would overflow near 64k tokens; tf32 has float16's
# 10 bits and float32's range. float32 is multiplied exactly. Factors of four bytes take twice the
# room, so tiles have half as many rows then, and steps are half as long.
def compiler_arguments(kernel, D, DV, P_PAD, dtype, segment, ones):
    """The tl.constexpr arguments of a kernel by name, num_warps, num_stages. dtype: that of v."""
    is_bfloat16 = dtype == torch.bfloat16
    tile = min(TILE if is_bfloat16 else TILE // 2, segment)
    known = {
        "D": D,
        "DV": DV,
        "P_PAD": P_PAD,
        "BLOCK_D": max(16, triton.next_power_of_2(D)),
        "BLOCK_DV": max(16, triton.next_power_of_2(DV)),
        "SEGMENT": segment,
        "TILE": tile,
        "STEP": STEP if is_bfloat16 else STEP // 2,
        "DTYPE": tl.bfloat16 if is_bfloat16 else tl.float32,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "ONES": ones,
    }
    arguments = {name: known[name] for name in kernel.arg_names if name in known}

    # Tensor cores want 16 rows of a tile for each warp: 8 warps (256 threads) for 128 rows, 4 for
    # 64. Exact float32 does without tensor cores, and 8 warps give it registers for what it holds.
    arguments["num_warps"] = 8 if tile == 128 or dtype == torch.float32 else 4

    # num_stages is the number of a loop's steps that are in work at once: while one is computed,
    # the loads of the others are under way, and the addresses of each take registers. (Registers
    # and spills as Triton 3.7.1 compiles; `python -m experiments.benchmark_gpu compiled` prints
    # them.)
    arguments["num_stages"] = 3
    if D > 16 and DV > 64:
        # With three stages the factors of the largest sizes take 104 KB of shared memory, if q and
        # k are float32 and v is bfloat16. A data center's card has that, others have 99 KB.
        arguments["num_stages"] = 2
    if kernel is state_kernel:
        # At DV = 64 the transposed S has 64 rows: 4 warps, 128 threads. By their registers, four
        # such programs share a multiprocessor of an H100. Each loads 10 KB a step in bfloat16, so
        # two stages should keep memory busy.
        arguments["num_warps"] = 4
        arguments["num_stages"] = 2
    if kernel is key_kernel and dtype == torch.float16:
        # Two tiles of four-byte factors in 128 threads use up an A100's registers: with two stages,
        # 24 bytes of each thread would spill to memory, with three 88.
        arguments["num_stages"] = 1
    return arguments


def launch_states(x, y, inv_den, delta, table, states, edge, coefficients, segment, reverse):
    """Fill all slots (N, slots, STATE): what came before a segment, in reverse what comes after.

    edge: (N, STATE) for slot 0, or None for zeros; reverse: the constexpr REVERSE.
    """
    N, T, D = x.shape
    slots = states.shape[1]
    if slots == 0:
        return
    if edge is None:
        states[:, 0] = 0
    else:
        states[:, 0] = edge
    if slots == 1:
        return
    P_PAD = table.shape[1]
    ones = reads_ones(coefficients)
    arguments = compiler_arguments(state_kernel, D, y.shape[2], P_PAD, y.dtype, segment, ones)
    grid = (N * (slots - 1) * (P_PAD // BLOCK_F.value),)
    state_kernel[grid](
        x, y, inv_den, delta, table, states, T, slots, REVERSE=reverse, **arguments
    )
    STATE = states.shape[2]
    grid = (N * triton.cdiv(STATE, COLUMNS),)
    scan_kernel[grid](states, slots, STATE=STATE, ROWS=ROWS, COLUMNS=COLUMNS)


def launch_tiles(kernel, tensors, table, states, first, coefficients, segment):
    """Run a kernel on all tiles of all heads.

    tensors: what its signature has before `table`, in the same order, for they are passed by
    position: q, k, v first.
    """
    q = tensors[0]
    v = tensors[2]
    N, T, D = q.shape
    P_PAD = table.shape[1]
    ones = reads_ones(coefficients)
    arguments = compiler_arguments(kernel, D, v.shape[2], P_PAD, v.dtype, segment, ones)
    scale, shift, floor, _ = complete_square(coefficients, D)
    grid = (N * triton.cdiv(T, arguments["TILE"]),)
    slots = states.shape[1]
    kernel[grid](*tensors, table, states, scale, shift, floor, T, slots, first, **arguments)


# 8. Two operations for PyTorch
#
# As custom operations, with a description of their outputs ("fake") and a gradient, they pass
# through torch.compile. For the backward pass stay q, k, v, o, what rounding took from o, 1/den,
# and the states: in bfloat16 at D = 16, DV = 64 these are 533 bytes a token and head, 81 of them
# states.
def empty_states(q, v, table, edge, segment, keep):
    """Room for states (N, slots, STATE) and for the whole sum (N, STATE; N, 0 if not kept)."""
    N, T, _ = q.shape
    STATE = table.shape[1] * (v.shape[2] + 1)
    slots = count_slots(T, segment, edge is not None, keep)
    states = q.new_empty(N, slots, STATE, dtype=torch.float32)
    whole = q.new_empty(N, STATE if keep else 0, dtype=torch.float32)
    return states, whole


def empty_outputs(q, k, v, initial, table, coefficients, segment, keep):
    """Room for o, rounding_error, 1/den (N, T), the states and the final one.

    It has the arguments of `forward`, since it is its "fake", too.
    """
    o = torch.empty_like(v)
    rounding_error = torch.empty_like(v, dtype=torch.bfloat16)
    inv_den = q.new_empty(q.shape[:2], dtype=torch.float32)
    states, final = empty_states(q, v, table, initial, segment, keep)
    return o, rounding_error, inv_den, states, final


@torch.library.custom_op("rebased::triton_forward", mutates_args=())
def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, initial: torch.Tensor | None,
    table: torch.Tensor, coefficients: list[float], segment: int, keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Contiguous (N, T, size), initial (N, STATE) -> what `empty_outputs` lists, filled.

    keep: whether to make the final state.
    """
    outputs = empty_outputs(q, k, v, initial, table, coefficients, segment, keep)
    o, rounding_error, inv_den, states, final = outputs
    first = 1 if initial is None else 0
    with torch.cuda.device_of(q):
        # Without REVERSE, 1/den and δ are not read: inv_den, still empty, only fills their places.
        launch_states(
            k, v, inv_den, inv_den, table, states, initial, coefficients, segment, reverse=False
        )
        tensors = (q, k, v, o, rounding_error, inv_den)
        launch_tiles(output_kernel, tensors, table, states, first, coefficients, segment)
        if keep:
            # A copy: outputs of an operation may not share memory, and a view would keep all slots
            # alive.
            final.copy_(states[:, -1])
    return outputs


@torch.library.custom_op("rebased::triton_backward", mutates_args=())
def backward(
    do: torch.Tensor, d_final: torch.Tensor | None,
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor,
    o: torch.Tensor, rounding_error: torch.Tensor, inv_den: torch.Tensor, states: torch.Tensor,
    coefficients: list[float], segment: int, had_initial: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> dq, dk, dv, and the gradient of the initial state (N, STATE; N, 0 if there was none)."""
    do = do.contiguous()
    dq = torch.empty_like(q)
    dk = torch.empty_like(k)
    dv = torch.empty_like(v)
    delta = torch.empty_like(inv_den)
    mirror, d_initial = empty_states(q, v, table, d_final, segment, had_initial)  # R and r
    first = 0 if had_initial else 1
    first_in_mirror = 1 if d_final is None else 0
    with torch.cuda.device_of(q):
        # The queries come first: their kernel makes the δ that the other two read.
        queries = (q, k, v, do, o, rounding_error, dq, inv_den, delta)
        launch_tiles(query_kernel, queries, table, states, first, coefficients, segment)
        launch_states(
            q, do, inv_den, delta, table, mirror, d_final, coefficients, segment, reverse=True
        )
        keys = (q, k, v, do, dk, dv, inv_den, delta)
        launch_tiles(key_kernel, keys, table, mirror, first_in_mirror, coefficients, segment)
        if had_initial:
            d_initial.copy_(mirror[:, -1])
    return dq, dk, dv, d_initial


def setup_context(ctx, inputs, output):
    """Keep what the backward pass reads."""
    q, k, v, initial, table, coefficients, segment, keep = inputs
    o, rounding_error, inv_den, states, _ = output
    ctx.set_materialize_grads(False)  # a gradient that is not there stays None, not zeros
    ctx.save_for_backward(q, k, v, table, o, rounding_error, inv_den, states)
    ctx.coefficients = list(coefficients)
    ctx.segment = segment
    ctx.had_initial = initial is not None
    ctx.kept_final = keep


def differentiate(ctx, do, d_rounding_error, d_inv_den, d_states, d_final):
    """The gradients of forward's inputs; only o and the final state are ever used by others."""
    q, k, v, table, o, rounding_error, inv_den, states = ctx.saved_tensors
    if do is None:
        do = torch.zeros_like(v)
    if not ctx.kept_final:  # then it was empty, and so is its gradient
        d_final = None
    dq, dk, dv, d_initial = backward(
        do, d_final, q, k, v, table, o, rounding_error, inv_den, states,
        ctx.coefficients, ctx.segment, ctx.had_initial,
    )
    if not ctx.had_initial:
        d_initial = None
    return dq, dk, dv, d_initial, None, None, None, None


def fake_backward(
    do, d_final, q, k, v, table, o, rounding_error, inv_den, states,
    coefficients, segment, had_initial,
):
    """Tensors of the shapes that `backward` returns."""
    STATE = table.shape[1] * (v.shape[2] + 1)
    d_initial = q.new_empty(q.shape[0], STATE if had_initial else 0, dtype=torch.float32)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), d_initial


def no_second_derivative(ctx, *gradients):
    raise RuntimeError(
        "a backward pass written by hand has no derivative of its own: for a Hessian, or a penalty "
        "on a gradient, use quadratic_attention of 02_linear_attention.py, which autograd follows"
    )


forward.register_fake(empty_outputs)
forward.register_autograd(differentiate, setup_context=setup_context)
backward.register_fake(fake_backward)
backward.register_autograd(no_second_derivative)


# 9. The function to call
def why_not(q, k, v, coefficients):
    """None, or one line that says which limit these inputs exceed.

    `attention` of 02 then takes another form.
    """
    D = q.shape[-1]
    DV = v.shape[-1]
    if coefficients is None:
        return (
            "the similarity is no polynomial of q·k (coefficients None): elu, element-wise and "
            "others have features only"
        )
    if not coefficients[2] > 0:
        return (
            "the similarity must be of degree two, coefficients (c0, c1, c2) with c2 > 0; "
            f"c2 is {coefficients[2]}"
        )
    if coefficients[0] < 0 or coefficients[1] < 0:
        return "no coefficient may be negative: features multiply their square roots"
    # A floor c0 − c1²/(4·c2) below 0, some weights then being negative, is allowed, as in the
    # quadratic form of 02. The classes of 01 never ask for it: they refuse a floor below 0.
    for x in (q, k, v):
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"products run in float32, bfloat16 or float16, not in {x.dtype}"
    if D > 32:
        return f"D may be at most 32, or registers do not suffice; it is {D}"
    if DV > 128:
        return f"DV may be at most 128, or registers do not suffice; it is {DV}"
    # 2¹⁶ to spare, since a tile also computes the offsets of rows beyond T, which it then masks.
    if q.shape[-2] * max(D, DV) >= 2**31 - 2**16:
        return "offsets inside a head have 32 bits; T·D or T·DV exceeds them"
    if INTERPRETED:
        return None
    if not q.is_cuda or k.device != q.device or v.device != q.device:
        places = f"{q.device}, {k.device} and {v.device}"
        return f"the tensors must lie on one NVIDIA GPU, not on {places}"
    return card_problem(q.device)


@torch.compiler.assume_constant_result  # a question to the driver, which torch.compile cannot trace
def card_problem(device):
    """None, or what keeps this GPU from running the kernels."""
    if torch.version.hip is not None:
        return "the kernels are compiled and tested for NVIDIA only, not for ROCm"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return (
            "bfloat16 and tf32 products need an Ampere GPU or a newer one (8.0); "
            f"this one is {major}.{minor}"
        )
    return None


def check_shapes(q, k, v):
    """ValueError, in one line, where a kernel would read beyond the end of a tensor."""
    fit = k.shape == q.shape and v.shape[:3] == q.shape[:3] and q.dim() == v.dim() == 4
    if not fit or q.shape[2] < 1:
        sizes = f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        raise ValueError(
            f"q, k must be (B, H, T, D) and v (B, H, T, DV), with T of 1 or more; they are {sizes}"
        )


def check_state(S, z, B, H, P, DV):
    """ValueError, in one line, for half a state or one of another shape."""
    if S is None and z is None:
        return
    if S is None or z is None:
        raise ValueError("S and z are one state: give both or neither")
    expected = (B, H, P, DV)
    if S.shape != expected or z.shape != expected[:3]:
        sizes = f"{tuple(S.shape)} and {tuple(z.shape)}"
        raise ValueError(f"S must be {expected} and z {expected[:3]}; they are {sizes}")


def chunked_attention(q, k, v, coefficients, S=None, z=None, return_state=False, segment=SEGMENT):
    """The chunked form: q, k (B, H, T, D), v (B, H, T, DV) -> o (B, H, T, DV).

    With return_state: (o, S, z). coefficients: (c0, c1, c2), sim = c0 + c1·s + c2·s² with
    s = q·k/√D. S (B, H, P, DV) and z (B, H, P): what an earlier part of the sequence left, or None;
    features in the order of 01. segment: tokens between two states, 64 or a multiple of 128.
    Products are in the precision of v, sums in float32. First derivatives only.

    Raises ValueError, in one line, for inputs beyond the limits that `why_not` names, for shapes
    that do not fit, and for another segment. [2, section 4; 1, section 3.2]
    """
    check_shapes(q, k, v)
    problem = why_not(q, k, v, coefficients)
    if problem:
        raise ValueError(f"no Triton kernel for these inputs: {problem}")
    if segment != 64 and (segment < 128 or segment % 128):
        raise ValueError(f"segment must be 64 or a multiple of 128 (whole tiles), got {segment}")
    B, H, T, D = q.shape
    DV = v.shape[-1]
    P = count_features(coefficients, D)
    check_state(S, z, B, H, P, DV)
    # Numbers, not symbols of torch.compile, since the table is made of them: another floor gives
    # another graph.
    coefficients = tuple(guard_scalar(float(c)) for c in coefficients)
    table = feature_table(coefficients, D, q.device)
    P_PAD = table.shape[1]

    initial = None
    if S is not None:
        S = torch.nn.functional.pad(S.float(), (0, 0, 0, P_PAD - P))  # (B, H, P_PAD, DV)
        z = torch.nn.functional.pad(z.float(), (0, P_PAD - P))
        initial = torch.cat([S.flatten(2), z], dim=-1).flatten(0, 1)  # (N, STATE)
    q = q.flatten(0, 1).contiguous()  # (N, T, D): a transposed view is copied here
    k = k.flatten(0, 1).contiguous()
    v = v.flatten(0, 1).contiguous()
    o, _, _, _, final = forward(q, k, v, initial, table, list(coefficients), segment, return_state)
    o = o.unflatten(0, (B, H))
    if not return_state:
        return o

    final = final.unflatten(0, (B, H))
    S = final[..., : P * DV].unflatten(-1, (P, DV))  # rows of padding lie behind those of features
    z = final[..., P_PAD * DV : P_PAD * DV + P]
    return o, S, z
