"""02 · Benchmark: the four forms against the fused softmax of PyTorch, on a CPU

Aim: say honestly how fast the chunked form is, what share of the machine it reaches, and from which length on it is
ahead of softmax attention.

You will learn how the numbers in the README were taken: softmax and the chunked form in turns, medians of five (of 25
up to 2,048 tokens), the other forms after them, for they need so much memory that what follows starts cold;
memory in a process of its own, as the high-water mark beyond the inputs.

Letters: as in 02. References: as in 02; softmax is torch.nn.functional.scaled_dot_product_attention.

Run: python 02_linear_attention.py --benchmark --threads 1       (15 minutes; rows go to runs/02_benchmark.jsonl)
"""
# %%
import json
import math
import multiprocessing
from importlib import import_module
from pathlib import Path

import torch

kernels = import_module("01_kernels")
la = import_module("02_linear_attention")

# %% What is measured
# Needed FLOPs are what a chunk of 64 would compute, whatever chunk is taken: P·Dv for each of building and reading the
# state, 64 weights a token. Their share of the rate of a plain matrix product, measured in the same run, says how much
# room is left.
CONTENDERS = ("softmax", *la.FORMS)
LENGTHS = [2**n for n in range(8, 17)]


def needed_flops(T, D=16, Dv=64, P=136):
    """Per head, forward: 4·P·Dv + 128·(D + Dv) a token."""
    return T * (4 * P * Dv + 128 * (D + Dv))


def benchmark(lengths, backward):
    """Rows of results: seconds of every form that fits, medians of five turns."""
    rows = []
    for T in lengths:
        speed = la.machine_speed()
        forecasts = {form: la.prediction(form, T, speed, backward)[2:] for form in CONTENDERS}
        calls = {form: la.make_call(form, T, backward) for form, (took, held) in forecasts.items()
                 if took < 20 and held * (3 if backward else 1) < 2}
        pair = {form: calls.pop(form) for form in ("softmax", "chunked") if form in calls}
        times = la.interleaved(pair, 25 if T <= 2048 else 5) | la.interleaved(calls)
        rate = la.HEADS * needed_flops(T) / times["chunked"]
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
    la.make_call(form, 64, True)()
    call = la.make_call(form, T, True)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def resident(field):
    """A size in bytes from /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def run(figure):
    """Print both tables and the crossover, write the rows, draw the figure."""
    path = kernels.writable("runs/02_benchmark.jsonl")
    rows = []
    for backward in (False, True):
        rows += print_part(backward)
    with path.open("a") as file:
        file.writelines(json.dumps(row | kernels.provenance(la.__file__, ["--benchmark"])) + "\n" for row in rows)
    print(f"rows: {path}")
    la.draw(curves(rows), figure, "attention on a CPU (dotted: forward; solid: forward and backward)")


def print_part(backward):
    """The table of one direction, and from which length on the chunked form is ahead; its rows."""
    what = "forward + backward" if backward else "forward"
    print(f"{what}, ms, B=1 H={la.HEADS} D={la.SIZE} Dv={la.VALUE_SIZE}, {torch.get_num_threads()} threads; – over 20 s or 2 GB")
    last = "   peak MB: softmax, chunked" if backward else "  GFLOP/s    share"
    print(f"{'T':>7}" + "".join(f"{form:>11}" for form in CONTENDERS) + f"{'ratio':>10}{last}")
    rows = benchmark(LENGTHS, backward)
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


if __name__ == "__main__":
    run(kernels.writable("runs/02_linear_attention.png"))
