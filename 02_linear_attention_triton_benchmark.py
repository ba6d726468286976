"""02 · Benchmark of the GPU kernels: what the compiler made of them, how fast they should be, and how fast they are

Aim: judge the kernels by numbers that a machine without a GPU can give, then by a clock, beside what one would run
otherwise and beside a floor that was counted first.

You will learn
  1. to read registers, stack, shared memory and instructions of a kernel compiled for a card that is not there;
  2. to count FLOPs and bytes, of the floor and of the kernels as written, so that a time means something;
  3. how to time attention fairly: B·H·T constant, all in one run, memory beside it;
  4. to test kernels against the definition in float64.

Letters: as in 02_linear_attention_triton. References: as there.

Run: python 02_linear_attention_triton.py    (a minute without a GPU, some minutes with one; rows go to runs/)
"""
# %%
import argparse
import functools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import namedtuple
from importlib import import_module

import torch
import torch.nn.functional as F

kernels, linear = import_module("01_kernels"), import_module("02_linear_attention")
cost = import_module("02_linear_attention_cost")
gpu = import_module("02_linear_attention_triton")  # says in one line that Triton is missing, where it is
triton = gpu.triton

# %% What the compiler made of it
# Triton compiles for any card. Registers and shared memory decide how many programs share a multiprocessor; what does
# not fit in 255 registers a thread goes to the stack, which is memory ("spills"). Shared memory must fit a consumer
# card, 99 KiB. Instructions are counted outside of loops and in each loop: a loop ends in a branch to a lower address.
KERNELS = {"state": (gpu.state_kernel, False), "scan": (gpu.scan_kernel, False), "output": (gpu.output_kernel, False),
           "dq": (gpu.query_kernel, False), "state, reverse": (gpu.state_kernel, True), "dk, dv": (gpu.key_kernel, False)}
ELEMENT = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
Compiled = namedtuple("Compiled", "registers stack shared warps straight loops tensor_core")


def argument_types(kernel, fixed, dtype):
    """Type of every argument, as the launches pass it."""
    kinds = dict.fromkeys(("T", "steps", "slots", "first"), "i32") | dict.fromkeys(("scale", "shift", "floor"), "fp32")
    kinds |= dict.fromkeys(("inverse", "delta", "table", "states"), "*fp32") | dict.fromkeys(fixed, "constexpr")
    return {name: (kinds | {"low": "*bf16"}).get(name, ELEMENT[dtype]) for name in kernel.arg_names}


def compile_for(capability, kernel, reverse, dtype=torch.bfloat16, D=16, Dv=64, P=136):
    """What became of a kernel on sm_`capability`; pointers aligned to 16 bytes."""
    sizes = gpu.sizes_for(D, Dv, P, dtype)
    fixed = {"sizes": gpu.Sizes(*map(triton.language.constexpr, sizes)), "REVERSE": reverse, "STATE": sizes.STATE,
             "ROWS": gpu.ROWS, "COLUMNS": gpu.COLUMNS}
    fixed = {name: value for name, value in fixed.items() if name in kernel.arg_names}
    types = argument_types(kernel, fixed, dtype)
    aligned = {(place,): [["tt.divisibility", 16]] for place, kind in enumerate(types.values()) if kind[0] == "*"}
    warps = sizes.WARPS if "first" in types else 4  # tile kernels; Triton's default
    compiled = triton.compile(triton.compiler.ASTSource(kernel, types, fixed, aligned),
                              triton.backends.compiler.GPUTarget("cuda", capability, 32), {"num_warps": warps})
    usage, code = (disassemble(compiled.asm["cubin"], what) for what in ("--dump-resource-usage", "--dump-sass"))
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return Compiled(registers, stack, compiled.metadata.shared, warps, *count_instructions(code))


def disassemble(cubin, what):
    """What cuobjdump, which comes with Triton, says of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, what, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def count_instructions(code):
    """-> instructions outside of loops, those of each loop in the order of the source, tensor core instructions."""
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", code)]
    jumps = [(int(m[1], 16), at) for at, text in lines if (m := re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text))]
    loops = [sum(first <= at <= last for at, _ in lines) for first, last in jumps if first < last]
    return len(lines) - sum(loops), loops, sum("MMA" in text for _, text in lines)


@functools.cache
def static_table(dtype=torch.bfloat16):
    """{(kernel, capability): Compiled} at D = 16, Dv = 64, for an A100 and an H100."""
    return {(name, capability): compile_for(capability, *kernel, dtype) for capability in (80, 90)
            for name, kernel in KERNELS.items()}


def check_nothing_spills(dtype=torch.bfloat16):
    """No kernel uses the stack, and all fit the 99 KiB of shared memory of a consumer card."""
    for (name, capability), made in static_table(dtype).items():
        assert made.stack == 0, f"{name} on sm_{capability}, {dtype}, spills {made.stack} bytes"
        assert made.shared <= 99 * 1024, f"{name} on sm_{capability}, {dtype}, needs {made.shared} bytes of shared memory"


def resident_warps(made, capability):
    """Warps that share a multiprocessor: 65,536 registers, 163 or 227 KiB of shared memory, 1 KiB of it a program's own."""
    registers, memory = -(-made.registers // 8) * 8 * 32 * made.warps, {80: 163, 90: 227}[capability] * 1024
    return made.warps * min(65536 // registers, memory // (made.shared + 1024), 64 // made.warps)


def print_static_table():
    """The table, a sentence that reads it, and its rows in runs/02_triton_static.jsonl."""
    print("bfloat16, D=16, Dv=64, ReBased; not run, only compiled.\n")
    print(f"{'kernel':16}{'target':>7}{'registers':>11}{'stack':>7}{'shared':>9}{'warps: program':>16}{'resident':>10}"
          f"{'instructions':>14} (each loop)")
    for (name, capability), made in static_table().items():
        print(f"{name:16}{f'sm_{capability}':>7}{made.registers:11}{made.stack:7}{made.shared:9,}{made.warps:16}"
              f"{resident_warps(made, capability):10}{made.straight + sum(made.loops):14,} {made.loops}")
    (name, capability), most = max(static_table().items(), key=lambda item: item[1].registers)
    print(f"\n{name} on sm_{capability} needs most, {most.registers} of the 255 registers a thread can have; "
          f"{sum(made.stack > 0 for made in static_table().values()) or 'no'} kernel spills.")
    write_rows("02_triton_static", [{"kernel": name, "capability": capability, **made._asdict(), **NOT_RUN}
                                    for (name, capability), made in static_table().items()])


NOT_RUN = {"dtype": "bfloat16", "D": 16, "Dv": 64, "triton": triton.__version__, "hardware": "none: compiled, not run"}


def write_rows(name, rows):
    """Append to runs/{name}.jsonl what was found and where."""
    path = kernels.writable(f"runs/{name}.jsonl")
    with path.open("a") as file:
        file.writelines(json.dumps(cost.provenance(gpu.__file__, []) | row) + "\n" for row in rows)
    print(f"rows: {path}\n")

# %% The floor: what segments of 512 must cost
# Bytes at 3.0 TB/s and FLOPs at 400 TFLOP/s (an H100's measured rate of memory, half that of its products), added as if
# nothing overlapped. At D = 16, Dv = 64 in bfloat16, ns a token and head: forward .49 (.22 of products, .27 of memory,
# .11 of that for states), backward 1.10. Left out is what these kernels choose to add: see the prediction below. No
# form does with less than its inputs and outputs: .11 and .21.
FLOPS, BYTES = 400e12, 3.0e12  # per second


def floor_ns(T, D=16, Dv=64, P=160, size=2, segment=gpu.SEGMENT):
    """(forward, forward + backward) ns per token and head; P with its padding; size: bytes of an input element."""
    keys, crossed = (min(T, segment) + 64) / 2, T > segment  # keys a query meets in tiles of 64; is there a state?
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

# %% The prediction: what these kernels do, counted
# Four resources can hold a kernel up: products; memory, where every tensor counts once a kernel; the L2 cache, where it
# counts as often as programs ask for it; and the issue of instructions, one a cycle for each of the 4 × 132 schedulers.
# If all overlap, the slowest decides; if none does, they add up. A measured time below the first bound says that the
# count is wrong, one above the second that something else holds the kernel up (latency, with few warps resident).
L2, ISSUE = 5.5e12, 4 * 132 * 1.7e9  # bytes a second (assumed, not measured here), instructions of a warp a second
RATES = FLOPS, BYTES, L2, ISSUE


def counted(T, sizes, size=2):
    """Kernel -> (FLOPs of products, bytes of memory, bytes asked of L2) per token and head; size: bytes of an element."""
    M, tile, blocks = sizes.SEGMENT, sizes.TILE, sizes.P_PAD // sizes.F
    crossed = max(0, 1 - M / T)  # the share of tokens with a segment before (or after) theirs
    d, dv, qk, v = gpu.padded(sizes.D), gpu.padded(sizes.DV), size * sizes.D, size * sizes.DV  # as on chip; bytes of rows
    low, state = 2 * sizes.DV, crossed * 4 * sizes.P * (sizes.DV + 1)  # bytes a row, bytes where there is a state
    keys = (min(max(T, tile), M) + tile) / 2  # keys a query meets
    pick, through = crossed * 4 * d * sizes.P_PAD, crossed * 2 * sizes.P_PAD * dv  # one-hot products; product with S
    met = keys / tile * (qk + v) + state / tile  # a tile's keys and values (or queries and do), its state

    def summed(row):  # a row of x and y, and 1/den and δ in reverse; every block of features reads them
        return pick + through, crossed * row + state / M, crossed * blocks * row + state / M

    scan = 0, 2 * (state / M + (crossed > 0) * 4 * sizes.STATE / T), 2 * (state / M + (crossed > 0) * 4 * sizes.STATE / T)
    return {
        "state": summed(qk + v), "scan": scan,
        "output": (2 * keys * (d + dv + 16) + pick + through, 2 * qk + 2 * v + low + 4 + state / M, qk + v + low + 4 + met),
        "dq": (2 * keys * (2 * d + dv) + 2 * pick + through, 3 * qk + 3 * v + low + 8 + state / M,
               2 * qk + 2 * v + low + 8 + met),
        "state, reverse": summed(qk + v + 8), "scan, reverse": scan,
        "dk, dv": (2 * keys * (2 * d + 2 * dv) + 2 * pick + 2 * through, 3 * qk + 3 * v + 8 + state / M,
                   2 * qk + 2 * v + 8 * keys / tile + met)}


def issued(T, sizes, capability=90):
    """Kernel -> instructions of warps per token and head, from the compiled code and how often its loops turn."""
    blocks, crossed, slots = sizes.P_PAD // sizes.F, max(0, 1 - sizes.SEGMENT / T), -(-T // sizes.SEGMENT)
    inside = (min(max(T, sizes.TILE), sizes.SEGMENT) + sizes.TILE) / 2 / sizes.STEP
    sums, scan = (crossed * blocks / sizes.SEGMENT, sizes.SEGMENT / sizes.STEP), -(-sizes.STATE // gpu.COLUMNS)
    turns = {"state": sums, "scan": ((crossed > 0) * scan / T, -(-slots // gpu.ROWS)), "state, reverse": sums}  # programs, turns

    def count(name):
        made = static_table()[name.replace("scan, reverse", "scan"), capability]
        programs, *trips = turns.get(name.replace("scan, reverse", "scan"), (1 / sizes.TILE, inside, crossed * blocks))
        instructions = made.straight + sum(n * loop for n, loop in zip(trips, made.loops, strict=True))
        return programs * made.warps * instructions

    return {name: count(name) for name in counted(T, sizes)}


def work(T, D=16, Dv=64, P=136):
    """Kernel -> [FLOPs, bytes of memory, bytes asked of L2, instructions] per token and head in bfloat16 on an H100."""
    sizes = gpu.sizes_for(D, Dv, P, torch.bfloat16)
    instructions = issued(T, sizes)
    return {name: [*row, instructions[name]] for name, row in counted(T, sizes).items()}


def predicted_ns(T):
    """((least, most) forward, (least, most) forward + backward): all resources of a kernel overlap, or none."""
    ns = [[1e9 * amount / rate for amount, rate in zip(row, RATES, strict=True)] for row in work(T).values()]
    least, most = [max(row) for row in ns], [sum(row) for row in ns]
    return (sum(least[:3]), sum(most[:3])), (sum(least), sum(most))


def print_prediction(T=8192):
    """Per kernel at one T; in sum for every T, beside the floor and the products of softmax attention."""
    print(f"Counted for an H100, per token and head at T={T:,} (4 bounds in ns: products, memory, L2, issue)\n")
    print(f"{'kernel':16}{'FLOPs':>8}{'bytes':>7}{'of L2':>9}{'warp instr.':>13}"
          f"{'ns: products':>14}{'memory':>8}{'L2':>6}{'issue':>7}")
    table = work(T)
    for name, row in (table | {"all": [sum(column) for column in zip(*table.values(), strict=True)]}).items():
        products, memory, cache, issue = (1e9 * amount / rate for amount, rate in zip(row, RATES, strict=True))
        print(f"{name:16}{row[0]:8,.0f}{row[1]:7,.0f}{row[2]:9,.0f}{row[3]:13,.0f}"
              f"{products:14.3f}{memory:8.3f}{cache:6.2f}{issue:7.2f}")
    print(f"\n{'T':>7}{'forward: floor':>16}{'predicted':>14}{'softmax':>9}"
          f"{'with backward: floor':>22}{'predicted':>14}{'softmax':>9}")
    rows = []
    for length in LENGTHS:
        floor, (forward, both), softmax = floor_ns(length), predicted_ns(length), 1e9 * 4 * 64 * length / 2 / FLOPS
        ranges = [f"{least:.2f}–{most:.2f}" for least, most in (forward, both)]
        print(f"{length:7,}{floor[0]:16.2f}{ranges[0]:>14}{softmax:9.2f}{floor[1]:22.2f}{ranges[1]:>14}{3.5 * softmax:9.2f}")
        rows.append({"predicted": "ns per token and head", "T": length, "floor": floor, "forward": forward,
                     "forward+backward": both, "softmax": [softmax, 3.5 * softmax], **NOT_RUN})
    (low, high), floor = predicted_ns(T)[1], floor_ns(T)[1]
    print(f"\nsoftmax: products only, at head dimension 64, backward 2.5 times forward. At T={T:,}, forward and backward, the\n"
          f"kernels should take {low / floor:.1f} to {high / floor:.1f} times the floor of {floor:.2f} ns.")
    write_rows("02_triton_static", rows)

# %% The clock
# ns per token and head at B·H·T = 2²⁰, or the launches would decide; the peak of memory above the inputs. Events of
# the card, after a warm-up, with L2 emptied between calls; the median of as many calls as fit half a second.
# flash-linear-attention is measured if it is installed (calls as in 0.6.0); its chunk mode is given φ(q), φ(k) of 01,
# materialised in time, as its own ReBased layer does.
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
    """(ns per token and head, MiB); None, after a line that says why, where a form has no room or fails."""
    try:
        q, k, v = (torch.rand(total // T, 1, T, size, device="cuda").bfloat16() for size in (D, D, 64))
        upstream, inputs = torch.randn_like(v), [x.requires_grad_(backward) for x in (q, k, v)]

        def call():
            o = form(*inputs)
            return torch.autograd.grad(o, inputs, upstream.view_as(o)) if backward else o

        before = torch.cuda.memory_allocated()
        call()  # compiles, fills caches
        torch.cuda.reset_peak_memory_stats()
        call()
        peak = torch.cuda.max_memory_allocated() - before
        return triton.testing.do_bench(call, warmup=100, rep=500, return_mode="median") * 1e6 / total, peak / 2**20
    except Exception as error:  # of one form: the table goes on
        print(f"\rT={T:,}{', with backward' * backward}: {type(error).__name__} {str(error).strip().partition(chr(10))[0]}")
        return None


def benchmark():
    """{(form, T): [forward, forward + backward]}, each (ns, MiB) or None; the floor has no memory."""
    rows = {}
    for name, (form, D) in competitors().items():
        for T in LENGTHS:
            if name != "quadratic" or T <= 4096:  # T² weights in float32, several times over
                print(f"\r{name}, T={T:,}  ", end="", flush=True)
                rows[name, T] = [measure(form, D, T, backward) for backward in (False, True)]
                torch.cuda.empty_cache()
    return rows | {("floor", T): [(ns, math.nan) for ns in floor_ns(T)] for T in LENGTHS}


def print_benchmark(rows):
    """One line per form and length, and the sentence that reads them."""
    print(f"\r{torch.cuda.get_device_name()}, bfloat16, D=16 (softmax 64), Dv=64, B·H·T = 2²⁰; ns a token and head\n")
    print(f"{'form':16}{'T':>8}{'forward':>10}{'MiB':>8}{'with backward':>15}{'MiB':>8}")
    for (name, T), (forward, both) in rows.items():
        cells = [f"{x[0]:10.2f}{x[1]:8.0f}" if x else f"{'–':>10}{'–':>8}" for x in (forward, both)]
        print(f"{name:16}{T:8,}{cells[0]}{'':5}{cells[1]}")
    needed = [rows[name, T][1] for name, T in (("this file", 8192), ("softmax, SDPA", 8192), ("this file", 65536))]
    if all(needed):
        (ours, soft, far), least = (x[0] for x in needed), floor_ns(8192)[1]
        print(f"\nAt T = 8,192, forward and backward, softmax takes {soft / ours:.1f} times as long as this file, which takes\n"
              f"{ours / least:.1f} times the floor of {least:.2f} ns; at 65,536 a token costs {far / ours:.2f} times as much.\n")
    card = torch.cuda.get_device_name()
    write_rows("02_triton_benchmark", [{"form": name, "T": T, "forward": row[0], "forward+backward": row[1], "card": card}
                                       for (name, T), row in rows.items() if name != "floor"])


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

# %% Claims, on a GPU or in the interpreter
# Against the float64 definition on inputs whose normaliser is not near zero (01 shows what happens where it is), in
# segments short enough to cross several. The interpreter multiplies bfloat16 wrongly: that type waits for a GPU.
DEVICE = "cpu" if gpu.INTERPRETED else "cuda"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3} | ({} if gpu.INTERPRETED else {torch.bfloat16: 5e-3})


def inputs_away_from_zero(kernel, T, Dv=5, H=1, dtype=torch.float32):
    """q, k from U(0.1, 1.1) and v, as leaves, and an upstream gradient."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.rand(2, 1, H, T, kernel.dim, generator=generator) + 0.1
    v, upstream = torch.randn(2, 1, H, T, Dv, generator=generator)
    return *(x.to(DEVICE, dtype).requires_grad_() for x in (q, k, v)), upstream.to(DEVICE, dtype)


def errors(kernel, T, dtype, segment=128, **options):
    """Relative RMS distance from float64: of o, and of dq, dk, dv (of all together if T = 1, where dq = dk = 0)."""
    *inputs, upstream = inputs_away_from_zero(kernel, T, dtype=dtype, **options)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    o, expected = gpu.triton_attention(*inputs, kernel, segment=segment), linear.quadratic_attention(*exact, kernel)
    found, wanted = torch.autograd.grad(o, inputs, upstream), torch.autograd.grad(expected, exact, upstream.double())
    pairs = zip(found, wanted, strict=True) if T > 1 else [(torch.cat(x, -1) for x in (found, wanted))]
    return [linear.distance([a.double()], [b]) for a, b in [(o, expected), *pairs]]


def check_equals_the_definition():
    """Output and gradients, ReBased and Based, within TOLERANCE of the float64 quadratic form."""
    worst = {}
    for dtype, tolerance in TOLERANCE.items():
        for kernel in (kernels.ReBasedKernel(16), kernels.TaylorKernel(16)):
            worst[dtype] = max(worst.get(dtype, 0), *errors(kernel, 150, dtype))
        assert worst[dtype] <= tolerance, f"{dtype} is off by {worst[dtype]:.1e}"
    return ", ".join(f"{str(dtype)[6:]} {error:.0e}" for dtype, error in worst.items())


def main(argv=None):
    """The static table; with a GPU the timings; then the checks. Returns how many failed."""
    parser = argparse.ArgumentParser(description="02: linear attention as Triton kernels; timed on a GPU")
    parser.add_argument("--figure", type=kernels.writable, default="runs/02_linear_attention_triton.png",
                        help="where to draw the timings; only with a GPU (%(default)s)")
    options = kernels.parse_arguments(parser, argv)
    if gpu.INTERPRETED:
        return kernels.run_checks([check_equals_the_definition])
    print_static_table()
    print_prediction()
    if torch.cuda.is_available():
        rows = benchmark()
        print_benchmark(rows)
        draw(rows, options.figure)
        return kernels.run_checks([check_nothing_spills, check_equals_the_definition])
    failed = kernels.run_checks([check_nothing_spills])
    print("\nNo GPU here: the kernels run in Triton's interpreter, in a process of its own.", flush=True)
    return failed + subprocess.run([sys.executable, gpu.__file__], env=os.environ | {"TRITON_INTERPRET": "1"}).returncode
