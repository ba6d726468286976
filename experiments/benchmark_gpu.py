"""The GPU kernels by numbers: what the compiler made of them, how fast they can be, whether they are right, how fast.

  python -m experiments.benchmark_gpu                      all parts; without a GPU the third in the interpreter
  python -m experiments.benchmark_gpu compiled             registers, stack, shared memory, for cards that are not there
  python -m experiments.benchmark_gpu predicted            FLOPs, bytes and the floor below which no time can be
  python -m experiments.benchmark_gpu correct              outputs, gradients, states against float64; moved bits
  python -m experiments.benchmark_gpu speed                ns a token and head, beside softmax and fla [2]
  python -m experiments.benchmark_gpu speed --variants     and the three variants of experiments/gpu_variants.py
  python -m experiments.benchmark_gpu step                 a training step of the paper's language models

(Two minutes without a GPU; ten with one.) Rows go to runs/gpu_*.jsonl as soon as they are there, the figure to runs/.
TRITON_INTERPRET=1 runs `correct`, `speed` and `step` on a CPU, at small sizes: slow, but the same code (--tokens 256).

Letters as in rebased/triton_kernels.py. [1] Dao, FlashAttention-2, arXiv 2307.08691. [2] flash-linear-attention 0.6.0,
github.com/fla-org/flash-linear-attention.
"""

import argparse
import dataclasses
import functools
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from rebased import files, kernels, lesson, linear_attention, model

try:
    from rebased import triton_kernels as gpu
except ImportError as error:
    if __name__ == "__main__":
        raise SystemExit(str(error)) from None
    raise

ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / "runs"  # --rows chooses another folder
triton = gpu.triton
DEVICE = "cpu" if gpu.INTERPRETED or not torch.cuda.is_available() else "cuda"
CAN_RUN = gpu.INTERPRETED or DEVICE == "cuda"

# What the compiler made of them
# Triton compiles for any card. What does not fit into 255 registers a thread goes to the stack, which is memory
# ("spills"). Registers and shared memory decide how many programs share a multiprocessor.
KERNELS = {  # name: kernel, REVERSE
    "state": (gpu.state_kernel, False),
    "scan": (gpu.scan_kernel, False),
    "output": (gpu.output_kernel, False),
    "dq": (gpu.query_kernel, False),
    "state, reverse": (gpu.state_kernel, True),
    "dk, dv": (gpu.key_kernel, False),
}
POINTER = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB that one program may have, by capability
SHARED = {capability: 1024 * size for capability, size in SHARED.items()}
WARPS = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}  # that a multiprocessor has room for


class Compiled(NamedTuple):
    """What a kernel takes: registers a thread, bytes of stack a thread, bytes of shared memory, warps a program."""

    registers: int
    stack: int
    shared: int
    warps: int


def argument_types(kernel, fixed, dtype, qk_dtype):
    """Triton's name for the type of every argument, as the launches pass it."""
    types = {}
    for name in kernel.arg_names:
        if name in fixed:
            types[name] = "constexpr"
        elif name in ("T", "slots", "first"):
            types[name] = "i32"
        elif name in ("scale", "shift", "floor"):
            types[name] = "fp32"
        elif name in ("inv_den", "delta", "table", "states"):
            types[name] = "*fp32"
        elif name == "rounding_error":
            types[name] = "*bf16"
        elif name in ("q", "k", "dq", "dk", "x"):
            types[name] = POINTER[qk_dtype]
        else:
            types[name] = POINTER[dtype]
    return types


def compile_for(
    capability, name, dtype=torch.bfloat16, qk_dtype=None, D=16, DV=64, coefficients=(0, 0, 1), segment=512
):
    """Compile KERNELS[name] for sm_`capability` -> Compiled. dtype: of v and o. Pointers are aligned to 16 bytes."""
    kernel, reverse = KERNELS[name]
    P_PAD = gpu.make_table(coefficients, D, torch.device("cpu")).shape[1]
    if kernel is gpu.scan_kernel:
        fixed = {"STATE": P_PAD * (DV + 1), "ROWS": gpu.ROWS, "COLUMNS": gpu.COLUMNS}
        options = {}
    else:
        fixed = gpu.compiler_arguments(kernel, D, DV, P_PAD, dtype, segment, gpu.reads_ones(coefficients))
        options = {option: fixed.pop(option) for option in ("num_warps", "num_stages")}
        if "REVERSE" in kernel.arg_names:
            fixed["REVERSE"] = reverse
    types = argument_types(kernel, fixed, dtype, qk_dtype or dtype)
    aligned = {}
    for place, kind in enumerate(types.values()):
        if kind.startswith("*"):
            aligned[(place,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(kernel, types, fixed, aligned)
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    made = triton.compile(source, target, options)
    registers, stack = registers_and_stack(made.asm["cubin"])
    return Compiled(registers, stack, made.metadata.shared, made.metadata.num_warps)


def registers_and_stack(cubin):
    """What cuobjdump, which comes with Triton, reads from a compiled kernel: registers and bytes of stack a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return int(registers), int(stack)


@functools.cache
def static_table(dtype=torch.bfloat16, qk_dtype=None, capabilities=(80, 90)):
    """{(kernel, capability): Compiled} at D = 16, DV = 64; as it is, for an A100 (80) and an H100 (90)."""
    return {(name, capability): compile_for(capability, name, dtype, qk_dtype)
            for capability in capabilities for name in KERNELS}


def check_nothing_spills(dtype=torch.bfloat16, qk_dtype=None, capabilities=(80, 90)):
    """No kernel uses the stack, and all fit the 99 KiB of shared memory of a consumer card."""
    for (name, capability), made in static_table(dtype, qk_dtype, capabilities).items():
        assert made.stack == 0, f"{name} on sm_{capability}, {dtype}, spills {made.stack} bytes"
        assert made.shared <= 99 * 1024, f"{name} on sm_{capability}, {dtype}, needs {made.shared} bytes"


def check_two_programs_fit():
    """On an H100 output and dq take at most 128 registers, also with float32 q and k, so that two programs share a
    multiprocessor: 65,536 registers / (256 threads · 128)."""
    for qk_dtype in (None, torch.float32):
        for name in ("output", "dq"):
            made = static_table(torch.bfloat16, qk_dtype)[name, 90]
            assert made.registers <= 128, f"{name} takes {made.registers} registers"


def resident_programs(made, capability):
    """How many programs share a multiprocessor: 65,536 registers, its shared memory, its warps."""
    registers = math.ceil(made.registers / 8) * 8 * 32 * made.warps
    room = SHARED[capability] + 1024  # each program takes 1 KiB more than it asks for
    return min(65536 // registers, room // (made.shared + 1024), WARPS[capability] // made.warps)


def print_compiled():
    """A table for each type of q and k, six cards in its columns; its rows in runs/gpu_compiled.jsonl."""
    print("\nCompiled, not run: D=16, Dv=64, ReBased. Registers a thread (+ bytes of stack), KiB of shared memory,\n"
          "programs that share a multiprocessor. A100 sm_80, H100 sm_90, B200 sm_100; consumer cards 86, 89, 120\n")
    print(f"{'q, k':9}{'kernel':15}" + "".join(f"{f'sm_{capability}':>15}" for capability in SHARED))
    for qk_dtype in (torch.bfloat16, torch.float32):
        type_name = str(qk_dtype).removeprefix("torch.")
        for name in KERNELS:
            cells = [print_and_write(name, capability, qk_dtype, type_name) for capability in SHARED]
            print(f"{type_name:9}{name:15}" + "".join(f"{cell:>15}" for cell in cells), flush=True)
    print()


def print_and_write(name, capability, qk_dtype, type_name):
    """Compile, write a row, and give the cell of the table: registers, shared memory, programs."""
    made = compile_for(capability, name, torch.bfloat16, qk_dtype)
    programs = resident_programs(made, capability)
    row = {"kernel": name, "q, k": type_name, "capability": capability, **made._asdict(), "programs": programs}
    write_row("compiled", row)
    registers = f"{made.registers}+{made.stack}" if made.stack else made.registers
    return f"{registers} {made.shared / 1024:.0f} {programs}"


def write_row(part, row):
    """Append a row to gpu_{part}.jsonl in the folder of --rows, with where it comes from."""
    if DEVICE == "cuda":
        where = torch.cuda.get_device_name()
    else:
        where = "the interpreter" if gpu.INTERPRETED else "none"
    row = {**row, "gpu": where, "triton": triton.__version__, **lesson.provenance(__file__, sys.argv[1:])}
    files.append_row(ROWS / f"gpu_{part}.jsonl", row)


# The floor
# What these kernels must cost in segments of 512 at D = 16, DV = 64 in bfloat16: FLOPs and bytes, each tensor counted
# once for each kernel that reads or writes it, added as if nothing overlapped. A time below it means that the count is
# wrong; how far above it a time lies is what latency, issue and imperfect overlap cost. `rounding_error` is counted
# too, 128 bytes in each pass: another design might do without it, this one moves it.
FLOPS = 400e12  # a second: half the rate of products measured on an H100
BYTES = 3.0e12  # a second: its measured rate of memory
SOFTMAX_D = 64  # head dimension of the attention that one would run otherwise


def floor(T, D=16, DV=64, P=160, size=2, segment=gpu.SEGMENT):
    """((FLOPs, bytes) forward, (FLOPs, bytes) backward) per token and head. size: bytes of an element."""
    keys = (min(T, segment) + 64) / 2  # that a query meets inside its segment, in tiles of 64
    crossed = T > segment  # is there a state?
    through = crossed * 2 * P * (DV + 1)  # FLOPs of one product with a state
    state = crossed * 4 * P * (DV + 1) / segment  # bytes of a state, for each token
    qk = size * D  # bytes of a row of q or k
    v = size * DV

    forward_flops = 2 * keys * (D + DV) + 2 * through  # q·k and w·v; the state is built and read
    rounding_error = 2 * DV  # bytes of a row; bfloat16, whatever the type of o
    forward_bytes = 2 * qk + 2 * v + rounding_error + 4  # q, k, v; o, what rounding took from it, 1/den
    forward_bytes += crossed * (qk + v) + 4 * state  # k, v again; written, read and written by the scan, read

    backward_flops = 2 * keys * (4 * D + 3 * DV)  # q·k and do·v twice, du·k, du·q, w·do
    backward_flops += 4 * through + crossed * 8 * D * P  # R; dq, dk and dv through states; the one-hot products
    backward_bytes = 4 * (qk + v) + 2 * qk + v + 16  # q, k, v, do in both passes; dq, dk, dv; δ and 1/den
    backward_bytes += v + rounding_error  # o, for δ
    backward_bytes += crossed * (qk + v + 8) + 5 * state  # q, do, δ, 1/den again; R as S above, and S is read
    return (forward_flops, forward_bytes), (backward_flops, backward_bytes)


def floor_ns(T, **sizes):
    """(forward, forward + backward) in ns per token and head."""
    forward, backward = (1e9 * (flops / FLOPS + moved / BYTES) for flops, moved in floor(T, **sizes))
    return forward, forward + backward


def print_predicted():
    """The floor at every T, beside the products of softmax attention at head dimension 64. [1, section 4]"""
    print(f"\nThe floor on an H100, per token and head: {FLOPS / 1e12:.0f} TFLOP/s, {BYTES / 1e12:.0f} TB/s; "
          "bfloat16, D=16, Dv=64\n")
    print(f"{'T':>7}{'FLOPs':>9}{'bytes':>7}{'ns forward':>12}{'softmax':>9}{'with backward':>15}{'softmax':>9}")
    for T in LENGTHS:
        (flops, moved), _ = floor(T)
        forward, both = floor_ns(T)
        softmax = 1e9 * 4 * SOFTMAX_D * (T / 2) / FLOPS  # two products, half of the square
        print(f"{T:7,}{flops:9,.0f}{moved:7,.0f}{forward:12.2f}{softmax:9.2f}{both:15.2f}{3.5 * softmax:9.2f}")
    print("\nsoftmax: its products only, backward 2.5 times forward. From the T where its column passes ours,\n"
          "a linear form can win; by how much, only a clock can say.\n")


# Right or wrong
# Against the definition in float64, on inputs whose normaliser is not near zero (01 shows what happens where it is).
# In bfloat16 dq is off by 5e-3 to 6e-3 in a kernel that is right, since du is rounded after a subtraction: its
# gradients are held to 1e-2. The interpreter multiplies bfloat16 wrongly, so that type waits for a GPU.
BF16 = torch.bfloat16
FP16 = torch.float16
FP32 = torch.float32
TYPES = {  # name: type of q and k, type of v and o. Two types are what autocast makes in training
    "float32": (FP32, FP32),
    "float16": (FP16, FP16),
    "float32 with float16": (FP32, FP16),
}
TOLERANCE = {FP32: (1e-5, 1e-5), FP16: (2e-3, 2e-3), BF16: (5e-3, 1e-2)}  # of outputs, of gradients
if not gpu.INTERPRETED:
    TYPES |= {"bfloat16": (BF16, BF16), "float32 with bfloat16": (FP32, BF16)}


def make_inputs(D, T, Dv=5, H=1, dtypes=(FP32, FP32), centred=False):
    """q, k (1, H, T, D) from U(0.1, 1.1), or centred from N(0, 1), and v as leaves, and an upstream gradient."""
    generator = torch.Generator().manual_seed(0)
    draw_numbers = torch.randn if centred else torch.rand
    q, k = draw_numbers(2, 1, H, T, D, generator=generator) + (0.0 if centred else 0.1)
    v, upstream = torch.randn(2, 1, H, T, Dv, generator=generator)
    inputs = []
    for x, dtype in ((q, dtypes[0]), (k, dtypes[0]), (v, dtypes[1])):
        inputs.append(x.to(DEVICE, dtype).requires_grad_())
    return *inputs, upstream.to(DEVICE, dtypes[1])


def as_double(tensors):
    """The same numbers in float64, as leaves."""
    return [x.detach().double().requires_grad_() for x in tensors]


def errors(kernel, T, type_name="float32", segment=128, form=gpu.chunked_attention, **sizes):
    """{"o", "dq", "dk", "dv": relative distance from float64}; all gradients together if T = 1, where dq = dk = 0."""
    *inputs, upstream = make_inputs(kernel.dim, T, dtypes=TYPES[type_name], **sizes)
    exact = as_double(inputs)
    o = form(*inputs, kernel.coefficients, segment=segment)
    expected = linear_attention.quadratic_attention(*exact, kernel)
    found = torch.autograd.grad(o, inputs, upstream)
    wanted = torch.autograd.grad(expected, exact, upstream.double())
    result = {"o": linear_attention.relative_error([o.double()], [expected])}
    if T == 1:
        result["gradients"] = linear_attention.relative_error([x.double() for x in found], wanted)
        return result
    for name, a, b in zip(("dq", "dk", "dv"), found, wanted, strict=True):
        result[name] = linear_attention.relative_error([a.double()], [b])
    return result


def too_large(found, type_name):
    """The errors that exceed the tolerance of the type, by name; NaN exceeds it too."""
    of_output, of_gradients = TOLERANCE[TYPES[type_name][1]]
    return {name: error for name, error in found.items() if not error <= (of_output if name == "o" else of_gradients)}


def check_equals_the_definition():
    """Outputs and gradients, ReBased and Based, in every type, across segments."""
    worst = {}
    for type_name in TYPES:
        for kernel in (kernels.ReBasedKernel(16), kernels.TaylorKernel(16)):
            found = errors(kernel, 150, type_name)
            worst[type_name] = max(worst.get(type_name, 0.0), *found.values())
            assert not too_large(found, type_name), f"{type_name}, {type(kernel).__name__}: {found}"
    return ", ".join(f"{name} {error:.0e}" for name, error in worst.items())


def correctness_cases():
    """(T, DV, segment, type): odd sizes, a last segment of one token, long ones on a GPU."""
    if gpu.INTERPRETED:
        lengths, long_ones = (1, 63, 150), ()
    else:
        lengths, long_ones = (1, 63, 1000, 1025, 4095), (16384, 65536)
    for type_name in TYPES:
        for T in lengths:
            for Dv in (64, 21):
                yield T, Dv, 512 if Dv == 64 else 128, type_name
        yield lengths[1], 64, 64, type_name
        for T in long_ones:
            yield T, 64, 512, type_name


def exact_by_chunks(q, k, v, kernel):
    """The definition for lengths whose T² weights do not fit: 02's chunked form, in float64."""
    return linear_attention.chunked_attention(q, k, v, kernel, chunk_size=512)


def print_correct():
    """A line for every case, then bits that moved between runs of the same inputs: 0, or there is a race."""
    print("\nRelative distance from float64: o; dq, dk, dv\n")
    bad = 0
    kernel = kernels.ReBasedKernel(16)
    for T, Dv, segment, type_name in correctness_cases():
        *inputs, upstream = make_inputs(16, T, Dv=Dv, H=2, dtypes=TYPES[type_name])
        exact = as_double(inputs)
        o = gpu.chunked_attention(*inputs, kernel.coefficients, segment=segment)
        expected = exact_by_chunks(*exact, kernel)
        found = {"o": linear_attention.relative_error([o.double()], [expected])}
        pairs = zip(torch.autograd.grad(o, inputs, upstream),
                    torch.autograd.grad(expected, exact, upstream.double()), strict=True)
        for name, (a, b) in zip(("dq", "dk", "dv"), pairs, strict=True):
            if T > 1 or name == "dv":  # after a single token dq and dk are 0
                found[name] = linear_attention.relative_error([a.double()], [b])
        wrong = too_large(found, type_name)
        bad += bool(wrong)
        verdict = "BAD" if wrong else "ok "
        print(f"  {verdict} {type_name:21} T={T:<6,} Dv={Dv:<3} segment={segment:<4}",
              "  ".join(f"{error:.1e}" for error in found.values()), flush=True)
        write_row("correct", {"T": T, "Dv": Dv, "segment": segment, "type": type_name, "errors": found})
    for type_name in TYPES:
        moved, runs = moved_bits(type_name)
        bad += moved > 0
        print(f"  {'BAD' if moved else 'ok '} {type_name:21} {moved} of {runs} runs gave other bits", flush=True)
        write_row("correct", {"type": type_name, "moved": moved, "runs": runs})
    print(f"\n{bad} bad\n")
    return bad


def moved_bits(type_name):
    """How many of 100 runs on a full card gave other bits than the first, outputs or gradients."""
    heads, T, runs = (256, 2048, 100) if DEVICE == "cuda" else (1, 100, 1)
    *inputs, upstream = make_inputs(16, T, Dv=64, H=heads, dtypes=TYPES[type_name])

    def run():
        o = gpu.chunked_attention(*inputs, (0, 0, 1))
        return [o, *torch.autograd.grad(o, inputs, upstream)]

    first = run()
    moved = 0
    for _ in range(runs):
        moved += not all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    return moved, runs


# The clock
# ns per token and head at B·H·T = 2²⁰, or the launches would decide; beside it the peak of memory above the inputs.
# triton.testing.do_bench: events of the card, after a warm-up, L2 emptied between calls, the median of half a second.
LENGTHS = [2**n for n in range(8, 17)]


def competitors():
    """{name: (function of q, k, v, head dimension of q and k, their type)}. v is bfloat16."""
    coefficients = (0, 0, 1)
    kernel = kernels.ReBasedKernel(16)
    ours = functools.partial(gpu.chunked_attention, coefficients=coefficients)
    sdpa = functools.partial(F.scaled_dot_product_attention, is_causal=True)
    forms = {
        "triton_kernels": (ours, 16, BF16),
        "the same, q and k float32": (ours, 16, FP32),  # as under autocast
        "quadratic": (functools.partial(linear_attention.quadratic_attention, kernel=kernel), 16, BF16),
        "softmax, SDPA": (sdpa, SOFTMAX_D, BF16),
    }
    if DEVICE == "cuda":
        forms["softmax, cuDNN"] = (softmax_by_cudnn, SOFTMAX_D, BF16)
    try:
        from fla.ops.linear_attn import chunk_linear_attn
        from fla.ops.rebased import parallel_rebased
    except ImportError:
        print("flash-linear-attention is not installed (pip install flash-linear-attention==0.6.0): no rows of it\n")
        return forms

    def materialised(q, k, v):  # φ is written to memory, in time, as in its own ReBased layer
        q = kernel.features(q).transpose(1, 2)  # (B, T, H, P)
        k = kernel.features(k).transpose(1, 2)
        o, _ = chunk_linear_attn(q, k, v.transpose(1, 2), normalize=True, scale=1)
        return o.transpose(1, 2)

    def parallel(q, k, v):
        o = parallel_rebased(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return o.transpose(1, 2)

    return forms | {"fla, parallel": (parallel, 16, BF16), "fla, chunk": (materialised, 16, BF16)}


def softmax_by_cudnn(q, k, v):
    """SDPA with cuDNN's kernel or not at all: on Hopper about twice as fast as the default."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def milliseconds(call):
    """The median time of a call; in the interpreter, of one."""
    if DEVICE == "cuda":
        return triton.testing.do_bench(call, warmup=100, rep=500, return_mode="median")
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def measure(form, D, dtype, T, backward, tokens):
    """(ns per token and head, MiB), or None, after a line that says why, where a form has no room or fails."""
    try:
        heads = max(1, tokens // T)
        v_dtype = BF16
        if DEVICE == "cpu":  # the interpreter multiplies bfloat16 wrongly
            dtype = v_dtype = FP32
        q = torch.rand(heads, 1, T, D, device=DEVICE).to(dtype).requires_grad_(backward)
        k = torch.rand(heads, 1, T, D, device=DEVICE).to(dtype).requires_grad_(backward)
        v = torch.rand(heads, 1, T, 64, device=DEVICE).to(v_dtype).requires_grad_(backward)
        upstream = torch.randn_like(v)
        inputs = [q, k, v]

        def call():
            o = form(*inputs)
            return torch.autograd.grad(o, inputs, upstream) if backward else o

        peak = 0
        if DEVICE == "cuda":
            call()  # compiles, fills caches
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            call()
            peak = torch.cuda.max_memory_allocated() - before
        return milliseconds(call) * 1e6 / (heads * T), peak / 2**20
    except Exception as error:  # of one form: the table goes on
        line = str(error).strip().partition("\n")[0]
        print(f"  {'with backward' if backward else 'forward'}: {type(error).__name__} {line[:100]}", flush=True)
        return None


def print_speed(lengths, tokens, variants, figure):
    """A line for each length and form, its row at once, the sentence that reads them, the figure."""
    type_name = "bfloat16" if DEVICE == "cuda" else "float32, in the interpreter"
    print(f"\nns a token and head, MiB above the inputs; {type_name}, D=16 (softmax 64), Dv=64\n")
    print(f"{'T':>7}  {'form':30}{'forward':>9}{'MiB':>8}{'with backward':>15}{'MiB':>8}")
    forms = competitors()
    rows = {}
    for T in sorted(lengths, key=lambda T: abs(math.log(T / 8192))):  # the most telling length first
        for name, (form, D, dtype) in forms.items():
            if name == "quadratic" and T > 4096:  # T² weights in float32, several times over
                continue
            timed_row(rows, name, form, D, dtype, T, tokens)
    read_speed(rows)
    draw(rows, figure)
    if variants:
        print_variants(min(8192, max(lengths)), tokens, {})


def timed_row(rows, name, form, D, dtype, T, tokens):
    """Measure, print, write and remember one form at one length."""
    forward, both = (measure(form, D, dtype, T, backward, tokens) for backward in (False, True))
    rows[name, T] = forward, both
    cells = [f"{x[0]:9.2f}{x[1]:8.0f}" if x else f"{'–':>9}{'–':>8}" for x in (forward, both)]
    print(f"{T:7,}  {name:30}{cells[0]}{'':6}{cells[1]}", flush=True)
    write_row("speed", {"form": name, "T": T, "tokens": tokens, "forward": forward, "forward+backward": both,
                        "floor": floor_ns(T)})
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def read_speed(rows):
    """What the table says of this file, in a sentence."""
    ours = rows.get(("triton_kernels", 8192), (None, None))[1]
    softmax = rows.get(("softmax, SDPA", 8192), (None, None))[1]
    far = rows.get(("triton_kernels", 65536), (None, None))[1]
    if ours and softmax and far:
        floor_here = floor_ns(8192)[1]
        print(f"\nAt T = 8,192, forward and backward, softmax takes {softmax[0] / ours[0]:.1f} times as long as these")
        print(f"kernels, which take {ours[0] / floor_here:.1f} times the floor of {floor_here:.2f} ns.")
        print(f"At 65,536 a token costs {far[0] / ours[0]:.2f} times as much as at 8,192.")
    print()


def print_variants(T, tokens, rows):
    """Each variant of the kernels beside the kernels themselves: its times, and what it does to the errors."""
    from experiments import gpu_variants

    forms = {"triton_kernels": gpu.chunked_attention}
    for name in gpu_variants.VARIANTS:
        forms[name] = gpu_variants.load(name).chunked_attention
    print("\nVariants, in turns, so that the clock of the card does not decide\n")
    for _ in range(2):
        for name, form in forms.items():
            timed_row(rows, name, functools.partial(form, coefficients=(0, 0, 1)), 16, BF16, T, tokens)
    print("\nand their relative distance from float64: o; dq, dk, dv; q, k from U(0.1, 1.1), then from N(0, 1),\n"
          "where normalisers are tiny now and then\n")
    type_name = "bfloat16" if DEVICE == "cuda" else "float32"
    for name, form in forms.items():
        for centred in (False, True):
            found = errors(kernels.ReBasedKernel(16), min(T, 2048), type_name, segment=512, form=form,
                           Dv=64, H=2, centred=centred)
            print(f"  {name:30}{'N(0, 1)' if centred else 'U(0.1, 1.1)':13}",
                  "  ".join(f"{error:.1e}" for error in found.values()), flush=True)
            write_row("variants", {"form": name, "T": T, "type": type_name, "centred": centred, "errors": found})


def draw(rows, path):
    """ns per token and head, forward + backward, against T."""
    figure = lesson.new_figure(6.5, 4.2)
    if figure is None:
        return
    axis = figure.add_subplot()
    for name in dict.fromkeys(name for name, _ in rows):
        points = sorted((T, both[0]) for (form, T), (_, both) in rows.items() if form == name and both)
        if points:
            axis.plot([T for T, _ in points], [ns for _, ns in points], "o-", label=name)
    axis.plot(LENGTHS, [floor_ns(T)[1] for T in LENGTHS], ":", label="floor (H100)")
    axis.set(xscale="log", yscale="log", xlabel="T", ylabel="ns a token and head, forward + backward")
    axis.legend(frameon=False)
    lesson.save_figure(figure, path, "Time per token and head, forward and backward, against the sequence length.")


# A training step of the paper's language models, 147 M parameters, at T = 4,096 under autocast, as 05 trains them
def print_step():
    """Milliseconds and MiB of forward, backward and no update, for each mixer."""
    print("\nA training step of the language models, forward and backward, bfloat16 under autocast\n")
    print(f"{'mixer':12}{'parameters':>14}{'batch':>7}{'T':>7}{'ms':>9}{'tokens a second':>17}{'MiB':>9}")
    for mixer in ("rebased", "based", "attention"):
        row = time_step(mixer)
        if row:
            print(f"{mixer:12}{row['parameters']:14,}{row['batch']:7}{row['T']:7,}{row['ms']:9.1f}"
                  f"{row['batch'] * row['T'] / row['ms'] * 1e3:17,.0f}{row['MiB']:9,.0f}", flush=True)
            write_row("step", row)
    print()


def time_step(mixer):
    """One row, or None after a line that says why. Without a GPU: the first and last layer, narrow, on 32 tokens."""
    config = model.pile_config(mixer)
    batch, T = 4, 4096
    if DEVICE == "cpu":
        ends = (config.mixers[0], config.mixers[-1])
        config = dataclasses.replace(config, mixers=ends, vocab_size=256, d_model=32, heads=2, mlp=32)
        batch, T = 1, 32
    try:
        torch.manual_seed(0)
        lm = model.LanguageModel(config).to(DEVICE)
        tokens = torch.randint(config.vocab_size, (batch, T + 1), device=DEVICE)

        def call():
            with torch.autocast(DEVICE, BF16, enabled=DEVICE == "cuda"):
                logits = lm(tokens[:, :-1])
            F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
            lm.zero_grad()

        call()
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        ms = milliseconds(call)
        peak = torch.cuda.max_memory_allocated() / 2**20 if DEVICE == "cuda" else 0
        parameters = sum(p.numel() for p in lm.parameters())
        return {"mixer": mixer, "parameters": parameters, "batch": batch, "T": T, "ms": ms, "MiB": peak}
    except torch.OutOfMemoryError as error:
        print(f"{mixer}: {str(error).partition(chr(10))[0]}")
        return None


# The command line
PARTS = ("compiled", "predicted", "correct", "speed", "step")


def in_the_interpreter():
    """The checks, in a process in which Triton interprets: one that does cannot compile."""
    print("No GPU here: the kernels run in Triton's interpreter, in a process of its own.", flush=True)
    command = [sys.executable, __file__, "correct", "--rows", str(ROWS)]
    return subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}).returncode


def run(parts, options):
    """Run the parts; exit status 1 if a check failed or a number is wrong."""
    failed = 0
    if "compiled" in parts and not gpu.INTERPRETED:
        print_compiled()
        lesson.check(check_nothing_spills)
        lesson.check(check_two_programs_fit)
    if "predicted" in parts:
        print_predicted()
    if "correct" in parts and CAN_RUN:
        lesson.check(check_equals_the_definition)
        failed += print_correct()
    elif "correct" in parts:
        failed += in_the_interpreter()
    if "speed" in parts and CAN_RUN:
        print_speed(options.lengths, options.tokens, options.variants, options.figure)
    elif "speed" in parts:
        print("No GPU here: no times.\n")
    if "step" in parts and CAN_RUN:
        print_step()
    lesson.finish()
    if failed:
        raise SystemExit(1)


def main(argv=None):
    global ROWS
    parser = argparse.ArgumentParser(description="The GPU kernels: compiled, predicted, checked, timed.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"what to do: {', '.join(PARTS)} (all)")
    parser.add_argument("--lengths", nargs="+", type=lesson.positive_integer, default=LENGTHS, metavar="T",
                        help="sequence lengths of `speed` (256 to 65,536)")
    parser.add_argument("--tokens", type=lesson.positive_integer, default=2**20,
                        help="B·H·T of `speed` (%(default)s)")
    parser.add_argument("--variants", action="store_true", help="also time the variants of the same kernels")
    parser.add_argument("--rows", type=Path, default=ROWS, metavar="FOLDER", help="where rows go (runs)")
    parser.add_argument("--figure", type=lesson.figure_path, default="runs/gpu_speed.png",
                        help="where to draw the times (%(default)s)")
    options = lesson.parse_arguments(parser, argv)
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}; choose from {', '.join(PARTS)}")
    parts = options.parts or PARTS
    ROWS = options.rows
    lesson.obey(lambda: run(parts, options), f"rows that were printed are in {ROWS}")


if __name__ == "__main__":
    main()
