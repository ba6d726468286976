"""02 · What the forms cost: predicted, then measured

Aim: count the FLOPs and bytes of each form before timing it, and say honestly how fast the chunked one is: beside the
fused softmax of PyTorch, and as a share of what the machine can do.

You will learn
  1. which form is bound by arithmetic, which by memory, which by calls, and how well a prediction from three numbers
     of the machine holds;
  2. from which length on linear attention is ahead of softmax on a CPU;
  3. how to time on a noisy machine: contenders in turns, medians; memory in a process of its own; and what a number
     must carry with it: command, commit, machine, day.

Letters: as in 02. References: as in 02; softmax is torch.nn.functional.scaled_dot_product_attention.

Run: python 02_linear_attention.py                               (prints the first table, 20 seconds)
     python 02_linear_attention.py --benchmark --threads 1       (15 minutes; rows go to runs/02_benchmark.jsonl)
"""
# %%
import argparse
import functools
import json
import math
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

kernels = import_module("01_kernels")
la = import_module("02_linear_attention")
chunked = import_module("02_linear_attention_chunked")

# %% What each form must cost, before it is timed
# Forward, per head. FLOPs are multiplications and additions; bytes are those that cannot stay in cache: every pass of
# the quadratic form over its T² weights, every prefix of the linear one, the state of the recurrent one at each token.
HEADS, SIZE, VALUE_SIZE = 4, 16, 64  # B = 1; softmax gets heads of 64 for q, k and v, as a transformer would


def predicted_cost(form, T, D=16, Dv=64, P=136):
    """(FLOPs, bytes moved, bytes held, calls) of one head in float32. softmax: PyTorch's fused kernel, head size Dv."""
    if form == "softmax":
        return 2 * T * T * Dv, 16 * T * Dv, 4 * T * Dv, 1
    if form == "quadratic":
        return 2 * T * T * (D + Dv), 4 * 9 * T * T, 4 * 3 * T * T, 10
    if form == "linear":
        return 4 * T * P * Dv, 4 * 4 * T * P * Dv, 4 * 3 * T * P * Dv, 10
    if form == "recurrent":
        return 4 * T * P * Dv, 4 * 5 * T * P * Dv, 4 * P * Dv, 25 * T
    C = chunked.best_chunk(HEADS, T, D, chunked.width(Dv), P)
    return T * (4 * P * Dv + 2 * C * (D + Dv)), 8 * T * (D + Dv) + 8 * P * Dv * T // C, 4 * T * Dv, 8 * T // C


def machine_speed():
    """(FLOP/s of a matrix product, bytes/s of a copy, seconds of an empty call) of this machine, now."""
    a, b, tiny = torch.randn(1024, 1024), torch.randn(2**24), torch.zeros(1)
    times = interleaved({"product": lambda: a @ a, "copy": b.clone, "call": lambda: tiny + 1}, repeats=9)
    return 2 * 1024**3 / times["product"], 8 * 2**24 / times["copy"], times["call"]


def interleaved(calls, repeats=5):
    """{name: median seconds} of calls that take turns, so that a slow moment of the machine meets all; one warm-up."""
    times = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name] += [time.perf_counter() - start] if turn else []
    return {name: sorted(values)[repeats // 2] for name, values in times.items()}

# %% Where a number comes from
def provenance(file, argv):
    """What a reader of a result must know: command, commit, day, machine, version."""
    file = Path(file)
    git = ["git", "-C", str(file.parent.resolve()), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    cpuinfo = Path("/proc/cpuinfo")  # Linux; elsewhere platform knows the model
    models = [line.split(": ")[1] for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] \
        if cpuinfo.exists() else []
    hardware = f"{models[0] if models else platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    return {"command": " ".join(["python", file.name, *argv]), "commit": commit, "date": date.today().isoformat(),
            "hardware": hardware, "torch": torch.__version__}

# %% Timing the forms
FORMS = {
    "quadratic": la.quadratic_attention,
    "linear": la.linear_attention,
    "recurrent": la.recurrent_attention,
    "chunked": la.chunked_attention,
}


def make_call(form, T, backward):
    """A function of no arguments that runs the form once, forward or forward and backward, on inputs of its own."""
    size = VALUE_SIZE if form == "softmax" else SIZE
    inputs = [*torch.rand(2, 1, HEADS, T, size).add_(0.1).unbind(), torch.randn(1, HEADS, T, VALUE_SIZE)]
    inputs = [x.requires_grad_(backward) for x in inputs]
    if form == "softmax":
        forward = functools.partial(F.scaled_dot_product_attention, *inputs, is_causal=True)
    else:
        forward = functools.partial(FORMS[form], *inputs, kernels.ReBasedKernel(SIZE))
    upstream = torch.randn_like(inputs[2])
    return (lambda: torch.autograd.grad(forward(), inputs, upstream)) if backward else forward


class Prediction(NamedTuple):
    """Of all heads; bound: what takes most of the seconds."""

    gflop: float
    gb_moved: float
    gb_held: float
    seconds: float
    bound: str


def predict(form, T, speed, backward=False):
    """The prediction for this form at T; a backward pass takes two to three times the forward."""
    (flops, moved, held, calls), (flop_rate, byte_rate, call) = predicted_cost(form, T), speed
    took = {"arithmetic": HEADS * flops / flop_rate, "memory": HEADS * moved / byte_rate, "calls": calls * call}
    seconds = sum(took.values()) * (3.5 if backward else 1)
    return Prediction(HEADS * flops / 1e9, HEADS * moved / 1e9, HEADS * held / 1e9, seconds, max(took, key=took.get))


def print_table(lengths):
    """Forward: predicted and measured milliseconds, a line per form and length; returns rows (form, T, predicted, measured)."""
    speed, rows = machine_speed(), []
    print(f"ReBased, float32, forward, B=1 H={HEADS} D={SIZE} Dv={VALUE_SIZE}, {torch.get_num_threads()} threads.\n")
    print(f"{'form':12}{'T':>7}{'GFLOP':>10}{'GB moved':>10}{'bound by':>12}{'predicted':>12}{'measured':>12}")
    for form in FORMS:
        for T in lengths:
            cost = predict(form, T, speed)
            fits = cost.gb_held < 2 and cost.seconds < 1
            measured = interleaved({form: make_call(form, T, False)}, 3)[form] if fits else None
            shown = f"{measured * 1e3:9.2f} ms" if fits else f"{'–':>12}"
            print(f"{form:12}{T:7,}{cost.gflop:10.3f}{cost.gb_moved:10.3f}{cost.bound:>12}{cost.seconds * 1e3:9.2f} ms{shown}")
            rows.append((form, T, cost.seconds, measured))
    print("– not run: it would hold more than 2 GB, or take more than a second.\n")
    return rows


def read_table(rows):
    """The sentences under the table, from its numbers."""
    time_of = {(form, T): measured for form, T, _, measured in rows if measured}
    for form in ("quadratic", "linear", "recurrent"):
        T = max((T for name, T in time_of if name == form), default=None)
        if T and ("chunked", T) in time_of:
            ratio = time_of[form, T] / time_of["chunked", T]
            print(f"At T = {T:,} the {form} form takes {ratio:.0f} times as long as the chunked one.")
    if ("chunked", 2048) in time_of and ("chunked", 8192) in time_of:
        growth = time_of["chunked", 8192] / time_of["chunked", 2048]
        print(f"From 2,048 to 8,192 tokens the chunked form takes {growth:.1f} times as long (linear time: 4, quadratic: 16).")
    off = [measured / predicted for *_, predicted, measured in rows if measured]
    print(f"Measured over predicted: {min(off):.1f} to {max(off):.1f}.\n" if off else "")

# %% The figure
def draw(curves, path, title):
    """Milliseconds against T on logarithmic axes. curves: [(label, colour number, line style, [(T, seconds)])]."""
    plt = kernels.pyplot()
    if plt is None:
        return
    figure, axis = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    for label, colour, style, points in curves:
        lengths, times = zip(*points, strict=True)
        axis.plot(lengths, [x * 1e3 for x in times], style, color=f"C{colour}", label=label)
    axis.set(xscale="log", yscale="log", xlabel="T", ylabel="milliseconds", title=title)
    axis.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)
    print(f"figure: {path}\n")


def compare(figure):
    """The table that 02 prints, its reading, its figure."""
    rows = print_table((128, 512, 2048, 8192))
    read_table(rows)
    draw(table_curves(rows), figure, "one layer, four ways (dotted: predicted)")


def table_curves(rows):
    """The predictions dotted, the measurements solid."""
    for i, form in enumerate(FORMS):
        yield None, i, ":", [(T, predicted) for name, T, predicted, _ in rows if name == form]
        yield form, i, "o-", [(T, measured) for name, T, _, measured in rows if name == form and measured]


# %% Against softmax
# Softmax and the chunked form take turns, medians of five (of 25 up to 2,048 tokens); the other forms come after
# them, for they need so much memory that what follows starts cold.
# Needed FLOPs are what a chunk of 64 would compute, whatever chunk is taken: P·Dv for each of building and reading the
# state, 64 weights a token. Their share of the rate of a plain matrix product, measured in the same run, says how much
# room is left.
CONTENDERS = ("softmax", *FORMS)
LENGTHS = [2**n for n in range(8, 17)]


def needed_flops(T, D=16, Dv=64, P=136):
    """Per head, forward: 4·P·Dv + 128·(D + Dv) a token."""
    return T * (4 * P * Dv + 128 * (D + Dv))


def measure(lengths, backward):
    """Rows of results: seconds of every form that fits, medians of five turns (softmax and chunked up to 2,048: of 25)."""
    rows = []
    for T in lengths:
        speed = machine_speed()
        forecasts = {form: predict(form, T, speed, backward) for form in CONTENDERS}
        calls = {form: make_call(form, T, backward) for form, cost in forecasts.items()
                 if cost.seconds < 20 and cost.gb_held * (3 if backward else 1) < 2}
        pair = {form: calls.pop(form) for form in ("softmax", "chunked") if form in calls}
        times = interleaved(pair, 25 if T <= 2048 else 5) | interleaved(calls)
        rate = HEADS * needed_flops(T) / times["chunked"]
        rows.append({"T": T, "backward": backward, "threads": torch.get_num_threads(), "seconds": times,
                     "peak_bytes": {form: peak_bytes(form, T) for form in times} if backward else None,
                     "gflop_rate": None if backward else rate / 1e9, "share": None if backward else rate / speed[0]})
        print_row(rows[-1])
    return rows


def print_row(row):
    """One line: milliseconds of each form, softmax as a multiple of chunked, then share of the rate or peak memory."""
    times = row["seconds"]
    cells = "".join(f"{times[form] * 1e3:11.1f}" if form in times else f"{'–':>11}" for form in CONTENDERS)
    ratio = f"{times['softmax'] / times['chunked']:9.2f}×" if "softmax" in times else f"{'–':>10}"
    if row["backward"]:
        peaks = [row["peak_bytes"].get(form) for form in ("softmax", "chunked")]
        rest = "".join(f"{peak / 1e6:9.0f}" if peak else f"{'–':>9}" for peak in peaks)
    else:
        rest = f"{row['gflop_rate']:9.1f}{row['share']:9.0%}"
    print(f"{row['T']:7,}{cells}{ratio}{rest}", flush=True)


def peak_bytes(form, T):
    """Memory of forward and backward beyond the inputs, measured in a process of its own; None where it cannot be."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(measure_peak, (form, T, torch.get_num_threads()))


def measure_peak(form, T, threads):
    """In the child: reset Linux's high-water mark, run once, read it."""
    torch.set_num_threads(threads)
    make_call(form, 64, True)()
    call = make_call(form, T, True)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def resident(field):
    """A size in bytes from /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def benchmark(figure):
    """Print both tables and the crossover, write the rows, draw the figure."""
    path = kernels.writable("runs/02_benchmark.jsonl")
    rows = []
    for backward in (False, True):
        rows += print_part(backward)
    origin = provenance(la.__file__, ["--benchmark", "--threads", str(torch.get_num_threads())])
    with path.open("a") as file:
        file.writelines(json.dumps(row | origin) + "\n" for row in rows)
    print(f"rows: {path}")
    draw(curves(rows), figure, "attention on a CPU (dotted: forward; solid: forward and backward)")


def print_part(backward):
    """The table of one direction, and from which length on the chunked form is ahead; its rows."""
    what = "forward + backward" if backward else "forward"
    print(f"{what}, ms, B=1 H={HEADS} D={SIZE} Dv={VALUE_SIZE}, {torch.get_num_threads()} threads; – over 20 s or 2 GB")
    last = "   peak MB: softmax, chunked" if backward else "  GFLOP/s    share"
    print(f"{'T':>7}" + "".join(f"{form:>11}" for form in CONTENDERS) + f"{'ratio':>10}{last}")
    rows = measure(LENGTHS, backward)
    slower = [row["T"] for row in rows if row["seconds"].get("softmax", math.inf) <= row["seconds"]["chunked"]]
    ahead = [T for T in LENGTHS if T > max(slower, default=0)]
    print(f"The chunked form is ahead of softmax {f'from T = {ahead[0]:,} on' if ahead else 'at no length here'}.\n")
    return rows


def curves(rows):
    """Forward dotted, forward and backward solid."""
    for i, form in enumerate(CONTENDERS):
        for backward, style in ((False, "o:"), (True, "o-")):
            points = [(r["T"], r["seconds"][form]) for r in rows if r["backward"] == backward and form in r["seconds"]]
            yield form if backward else None, i, style, points


# %% Claim: the FLOPs are those that PyTorch counts
def check_flops():
    """Those of the quadratic form and of the four steps, against PyTorch's own counter, within 1 %."""
    q, k, v = *torch.rand(2, 1, HEADS, 512, SIZE), torch.rand(1, HEADS, 512, VALUE_SIZE)
    C = chunked.best_chunk(HEADS, 512, SIZE, chunked.width(VALUE_SIZE), 136)
    steps = functools.partial(la.chunked_in_four_steps, chunk_size=C)
    for form, call in (("quadratic", la.quadratic_attention), ("chunked", steps)):
        with FlopCounterMode(display=False) as counter:
            call(q, k, v, kernels.ReBasedKernel(SIZE))
        ratio = counter.get_total_flops() / (HEADS * predicted_cost(form, 512)[0])
        assert abs(ratio - 1) < 0.01, f"{form}: PyTorch counts {ratio:.3f} times the predicted FLOPs"


CHECKS = [check_flops]


def main(argv=None):
    """The table that 02 prints, the check; returns how many checks failed."""
    parser = argparse.ArgumentParser(description="02: what each form costs, predicted and measured (15 seconds)")
    parser.add_argument("--figure", type=kernels.writable, default="runs/02_linear_attention.png",
                        help="where to draw it (%(default)s)")
    compare(kernels.parse_arguments(parser, argv).figure)
    return kernels.run_checks(CHECKS)


if __name__ == "__main__":
    if main():
        sys.exit(1)
