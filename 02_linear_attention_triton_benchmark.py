"""02 · Benchmark of the GPU kernels: what the compiler made of them, how fast they must be, and how fast they are

Aim: judge the kernels by numbers that a machine without a GPU can give, then by a clock, beside what one would run
otherwise and beside a floor that was counted first.

You will learn
  1. to read registers, stack and shared memory of a kernel that was compiled for a card that is not there;
  2. to count a floor from FLOPs and bytes, so that a time means something;
  3. how to time attention fairly: B·H·T constant, all in one run, memory beside it.

Letters: as in 02_linear_attention_triton. References: as there.

Run: python 02_linear_attention_triton.py    (a minute without a GPU, some minutes with one; rows go to runs/)
"""
# %%
import functools
import json
import math
import re
import subprocess
import tempfile
from importlib import import_module

import torch
import torch.nn.functional as F

kernels, linear = import_module("01_kernels"), import_module("02_linear_attention")
gpu = import_module("02_linear_attention_triton")  # says in one line that Triton is missing, where it is
triton = gpu.triton

# %% What the compiler made of it
# Triton compiles for any card. Registers decide how many programs share a multiprocessor (it has 65,536, a program 128
# threads); what does not fit in 255 a thread goes to the stack, which is memory ("spills"). Shared memory must fit a
# consumer card, 99 KiB.
KERNELS = {"state": (gpu.state_kernel, False), "scan": (gpu.scan_kernel, False), "output": (gpu.output_kernel, False),
           "dq": (gpu.query_kernel, False), "state, reverse": (gpu.state_kernel, True), "dk, dv": (gpu.key_kernel, False)}
ELEMENT = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


def compile_for(capability, kernel, reverse, dtype=torch.bfloat16, D=16, Dv=64, P=136):
    """(registers, stack bytes, shared memory bytes) of a kernel on sm_`capability`; pointers aligned to 16 bytes."""
    sizes, types, aligned = gpu.sizes_for(D, Dv, P, dtype), {}, {}
    fixed = {"sizes": gpu.on_chip(sizes), "REVERSE": reverse, "STATE": sizes.STATE, "ROWS": gpu.ROWS, "COLUMNS": gpu.COLUMNS}
    fixed = {name: value for name, value in fixed.items() if name in kernel.arg_names}
    for place, name in enumerate(kernel.arg_names):  # what the launches pass
        if name in fixed:
            types[name] = "constexpr"
        elif name in ("T", "steps", "slots", "first"):
            types[name] = "i32"
        elif name == "weight":
            types[name] = ("fp32",) * 3
        else:
            types[name] = "*fp32" if name in ("inverse", "delta", "table", "states") else ELEMENT[dtype]
            aligned[place,] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(kernel, types, fixed, aligned)
    compiled = triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", capability, 32))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return registers, stack, compiled.metadata.shared


@functools.cache
def static_table(dtype=torch.bfloat16):
    """[(kernel, capability, registers, stack, shared)] at D = 16, Dv = 64, for an A100 and an H100."""
    return [(name, capability, *compile_for(capability, *kernel, dtype)) for capability in (80, 90)
            for name, kernel in KERNELS.items()]


def check_nothing_spills(dtype=torch.bfloat16):
    """No kernel uses the stack, and all fit the 99 KiB of shared memory of a consumer card."""
    for name, capability, _, stack, shared in static_table(dtype):
        assert stack == 0, f"{name} on sm_{capability}, {dtype}, spills {stack} bytes"
        assert shared <= 99 * 1024, f"{name} on sm_{capability}, {dtype}, needs {shared} bytes of shared memory"


def print_static_table():
    """The table, a sentence that reads it, and its rows in runs/02_triton_static.jsonl."""
    print("bfloat16, D=16, Dv=64, ReBased, 4 warps a program; not run, only compiled.\n")
    print(f"{'kernel':16}{'target':>8}{'registers':>11}{'stack':>7}{'shared':>9}{'programs a multiprocessor':>27}")
    for name, capability, registers, stack, shared in static_table():
        programs = 65536 // (-(-registers // 8) * 8 * 128)
        print(f"{name:16}{f'sm_{capability}':>8}{registers:11}{stack:7}{shared:9,}{programs:27}")
    name, capability, most, *_ = max(static_table(), key=lambda row: row[2])
    print(f"\n{name} on sm_{capability} needs most, {most} of the 255 registers a thread can have; "
          f"{sum(row[3] > 0 for row in static_table()) or 'no'} kernel spills.")
    names = "kernel", "capability", "registers", "stack", "shared"
    write_rows("02_triton_static", [{"dtype": "bfloat16", "D": 16, "Dv": 64, **dict(zip(names, row, strict=True)),
                                     "triton": triton.__version__, "hardware": "none: compiled, not run"}
                                    for row in static_table()])


def write_rows(name, rows):
    """Append to runs/{name}.jsonl what was found and where."""
    path = kernels.writable(f"runs/{name}.jsonl")
    with path.open("a") as file:
        file.writelines(json.dumps(kernels.provenance(gpu.__file__, []) | row) + "\n" for row in rows)
    print(f"rows: {path}\n")

# %% The floor: what segments of 512 must cost
# Bytes at 3.0 TB/s and FLOPs at 400 TFLOP/s (an H100's measured rate of memory, half that of its products), added as if
# nothing overlapped. At D = 16, Dv = 64 in bfloat16, ns a token and head: forward .49 (.22 of products, .27 of memory,
# .11 of that for states), backward 1.10. Left out is what these kernels choose to add: one-hot products (.05 forward,
# .08 backward) and the pass that sums δ (.19). No form does with less than its inputs and outputs: .11 and .21.
FLOPS, BYTES = 400e12, 3.0e12  # per second


def floor_ns(T, D=16, Dv=64, P=160, size=2, segment=gpu.SEGMENT):
    """(forward, forward + backward) ns per token and head; P with its padding; size: bytes of an input element."""
    keys, crossed = (min(T, segment) + gpu.TILE) / 2, T > segment  # keys a query meets; is there a state?
    product, state = 2 * P * (Dv + 1), crossed * 4 * P * (Dv + 1) / segment  # FLOPs through a state; bytes of one
    qk, v = size * D, size * Dv  # bytes of a row
    # Forward: q·k and w·v; build S, read S. q, k, v, o; k, v for S; S written, read and written by the scan, read.
    forward = (2 * keys * (D + Dv) + crossed * 2 * product, 2 * (qk + v) + crossed * (qk + v) + 4 * state)
    # Backward: q·k and do·v twice, du·k, du·q, w·do; R, dq, dk, dv through states, and both one-hots for dq and dk.
    # q, k, v, do in both passes, once more q, do for R; dq, dk, dv; δ and 1/den a few times; R as S, and S read.
    flops = 2 * keys * (4 * D + 3 * Dv) + crossed * (4 * product + 8 * D * P)
    moved = 4 * (qk + v) + crossed * (qk + v) + 2 * qk + v + 24 + 5 * state
    forward, backward = (1e9 * (flops / FLOPS + moved / BYTES) for flops, moved in (forward, (flops, moved)))
    return forward, forward + backward

# %% The clock
# ns per token and head at B·H·T = 2²⁰, or the launches would decide; the peak of memory above the inputs.
# flash-linear-attention is measured if it is installed; its chunk mode is given φ(q), φ(k) of 01, materialised in time.
LENGTHS = [2**n for n in range(8, 17)]


def competitors():
    """Name -> (function of q, k, v, head dimension of q and k)."""
    kernel, sdpa = kernels.ReBasedKernel(16), F.scaled_dot_product_attention
    forms = {"this file": (functools.partial(gpu.triton_attention, kernel=kernel), 16),
             "quadratic": (functools.partial(linear.quadratic_attention, kernel=kernel), 16),
             "softmax, SDPA": (functools.partial(sdpa, is_causal=True), 64)}
    try:
        from fla.ops.linear_attn import chunk_linear_attn
        from fla.ops.rebased import parallel_rebased
    except ImportError:
        print("flash-linear-attention is not installed (pip install flash-linear-attention): its rows are left out")
        return forms

    def materialised(q, k, v):
        q, k = (kernel.features(x).transpose(1, 2) for x in (q, k))  # (B, T, H, P)
        return chunk_linear_attn(q, k, v.transpose(1, 2), normalize=True, scale=1)[0]

    def parallel(q, k, v):
        return parallel_rebased(*(x.transpose(1, 2) for x in (q, k, v)))

    return forms | {"fla parallel": (parallel, 16), "fla chunk": (materialised, 16)}


def measure(form, D, T, backward, total=2**20):
    """(ns per token and head, MiB); None where the card has no room."""
    q, k, v = (torch.rand(1, total // T, T, size, device="cuda").bfloat16() for size in (D, D, 64))
    upstream, inputs = torch.randn_like(v), [x.requires_grad_(backward) for x in (q, k, v)]

    def call():
        o = form(*inputs)
        return torch.autograd.grad(o, inputs, upstream.view_as(o)) if backward else o

    try:
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.reset_peak_memory_stats()
        call()
        peak = torch.cuda.max_memory_allocated() - before
        return triton.testing.do_bench(call, return_mode="median") * 1e6 / total, peak / 2**20
    except torch.cuda.OutOfMemoryError:
        return None


def benchmark():
    """{(form, T): [forward, forward + backward]}, each (ns, MiB) or None; the floor has no memory."""
    rows = {}
    for name, (form, D) in competitors().items():
        for T in LENGTHS:
            if name != "quadratic" or T <= 4096:  # T² weights in float32, several times over
                rows[name, T] = [measure(form, D, T, backward) for backward in (False, True)]
    return rows | {("floor", T): [(ns, math.nan) for ns in floor_ns(T)] for T in LENGTHS}


def print_benchmark(rows):
    """One line per form and length, and the sentence that reads them."""
    print(f"{torch.cuda.get_device_name()}, bfloat16, D=16 (softmax 64), Dv=64, B·H·T = 2²⁰; ns a token and head\n")
    print(f"{'form':16}{'T':>8}{'forward':>10}{'MiB':>8}{'with backward':>15}{'MiB':>8}")
    for (name, T), (forward, both) in rows.items():
        cells = [f"{x[0]:10.2f}{x[1]:8.0f}" if x else f"{'–':>10}{'–':>8}" for x in (forward, both)]
        print(f"{name:16}{T:8,}{cells[0]}{'':5}{cells[1]}")
    ours, soft, least = (rows[name, 8192][1][0] for name in ("this file", "softmax, SDPA", "floor"))
    flat = rows["this file", 65536][1][0] / ours
    print(f"\nAt T = 8,192, forward and backward, softmax takes {soft / ours:.1f} times as long as this file, which takes\n"
          f"{ours / least:.1f} times the floor of {least:.2f} ns; at 65,536 a token costs {flat:.2f} times as much.\n")


def draw(rows, path):
    """ns per token and head, forward + backward, against T."""
    if (plt := kernels.pyplot()) is None:
        return
    figure, axis = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    for name in dict.fromkeys(name for name, _ in rows):
        points = [(T, both[0]) for (form, T), (_, both) in rows.items() if form == name and both]
        axis.plot(*zip(*points, strict=True), ":" if name == "floor" else "o-", label=name)
    axis.set(xscale="log", yscale="log", xlabel="T", ylabel="ns a token and head, forward + backward")
    axis.legend(frameon=False)
    figure.savefig(path, dpi=120)
    print(f"figure: {path}\n")


def run(figure):
    """The static table; with a GPU the timings; then its check. Returns how many failed."""
    print_static_table()
    print("Floor for an H100 at T = 8,192: {:.2f} ns a token and head forward, {:.2f} with backward.\n".format(*floor_ns(8192)))
    if torch.cuda.is_available():
        rows = benchmark()
        print_benchmark(rows)
        card = torch.cuda.get_device_name()
        write_rows("02_triton_benchmark", [{"form": name, "T": T, "forward": row[0], "forward+backward": row[1], "card": card}
                                           for (name, T), row in rows.items() if name != "floor"])
        draw(rows, figure)
    return kernels.run_checks([check_nothing_spills])
