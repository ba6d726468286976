"""The forms of 02 on a CPU by numbers: how fast, in how much memory, beside softmax and beside another's kernel.

  python -m experiments.benchmark_cpu forms --threads 1
      every form and softmax, 256 to 65,536 tokens: times, peak memory, share of the matrix-multiply rate (15 minutes)
  OMP_PROC_BIND=true python -m experiments.benchmark_cpu ratios
      softmax, idiap's kernel [1] and the chunked form, on one core and on two, in one run (7 minutes)
  python -m experiments.benchmark_cpu chunks
      the fast form by chunk: predicted cost, times, what is kept for the backward pass (20 seconds)

Rows go to runs/cpu_benchmark.jsonl and runs/cpu_ratios.jsonl as soon as they are there, the figure to runs/. A shared
machine is noisy: contenders take turns, medians are printed, and a number counts beside others of its run only.

Softmax is PyTorch's fused kernel with heads of 64 for q, k and v, as a transformer would have them.
idiap's kernel: pip install --no-build-isolation pytorch-fast-transformers, with "-O3", "-march=native" added to the
flags in its setup.py (as it comes it is compiled for no particular machine). Without it `ratios` leaves it out.

Letters as in rebased/chunked_cpu.py. [1] Katharopoulos et al., Transformers are RNNs, ICML 2020, arXiv 2006.16236;
github.com/idiap/fast-transformers.
"""

import argparse
import functools
import math
import multiprocessing
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from rebased import EPS, chunked_cpu, files, kernels, lesson, linear_attention

try:
    from fast_transformers.causal_product import causal_dot_product
except ImportError:
    causal_dot_product = None

HEADS = 4  # B = 1
D = 16
DV = 64
P = 136  # of ReBased


# What is timed
def softmax_attention(q, k, v, kernel):
    """PyTorch's fused kernel; `kernel` is not used."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def idiap_attention(q, k, v, kernel):
    """ReBased through the compiled Σ_{j≤i} φ(q_i)·φ(k_j) v_j; the normaliser as its authors form it, by cumsum."""
    phi_q = kernel.features(q)
    phi_k = kernel.features(k)
    den = (phi_q * phi_k.cumsum(2)).sum(-1, keepdim=True)
    return causal_dot_product(phi_q, phi_k, v) / (den + EPS)


FORMS = {
    "softmax": softmax_attention,
    "quadratic": linear_attention.quadratic_attention,
    "linear": linear_attention.linear_attention,
    "recurrent": linear_attention.recurrent_attention,
    "chunked": linear_attention.attention,
    "idiap": idiap_attention,
}


def make_inputs(form, T, backward):
    """q, k from U(0.1, 1.1), so that no normaliser is near 0, and v: float32, (1, HEADS, T, size)."""
    size = DV if form == "softmax" else D
    q = torch.rand(1, HEADS, T, size) + 0.1
    k = torch.rand(1, HEADS, T, size) + 0.1
    v = torch.randn(1, HEADS, T, DV)
    return [x.requires_grad_(backward) for x in (q, k, v)]


def make_call(form, T, backward):
    """A function without arguments that runs a form once, forward or forward and backward, on inputs of its own."""
    inputs = make_inputs(form, T, backward)
    forward = functools.partial(FORMS[form], *inputs, kernels.ReBasedKernel(D))
    if not backward:
        return forward
    upstream = torch.randn_like(inputs[2])
    return lambda: torch.autograd.grad(forward(), inputs, upstream)


# Every form and softmax
# The forms that need much time or memory are left out where the count of 02 says so. Softmax and the chunked form take
# turns; the other forms come after them, for they use so much memory that what follows starts cold.
COMPARED = ("softmax", "quadratic", "linear", "recurrent", "chunked")
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536)
MOST_SECONDS = 20
MOST_BYTES = 2e9


def predicted_seconds(form, T, backward, speed):
    """By the count of 02; a backward pass takes two to three times the forward."""
    if form == "softmax":
        seconds = HEADS * 2 * T * T * DV / speed[0]  # two products, of which causality needs one half
    else:
        seconds, _ = linear_attention.predicted_seconds(form, T, speed)
    return 3.5 * seconds if backward else seconds


def held_bytes(form, T, backward):
    """What is in memory at once, of the two forms that write out T × T weights or T states, and of the states that
    autograd keeps of the recurrence. (The factors were measured.)"""
    weights = T * T
    states = T * P * DV
    numbers = {"quadratic": 3 * weights, "linear": 3 * states}
    if backward:
        numbers = {"quadratic": 9 * weights, "linear": 4 * states, "recurrent": 2 * states}
    return HEADS * 4 * numbers.get(form, 0)


def fits(form, T, backward, speed):
    """Whether a form is timed at this length."""
    if held_bytes(form, T, backward) > MOST_BYTES:
        return False
    return predicted_seconds(form, T, backward, speed) < MOST_SECONDS


def needed_flops(T):
    """Of all heads, forward, with a chunk of 64, whatever chunk is taken: P·Dv for each of building and reading the
    state, 64 weights a token."""
    return HEADS * T * (4 * P * DV + 2 * 64 * (D + DV))


def measure(T, backward):
    """One row of results: seconds of every form that fits. Medians of five turns for softmax and the chunked form (up
    to 2,048 tokens of 25), of three for the others."""
    speed = lesson.machine_speed()
    calls = {form: make_call(form, T, backward) for form in COMPARED if fits(form, T, backward, speed)}
    turns = 25 if T <= 2048 else 5
    pair = {form: calls.pop(form) for form in ("softmax", "chunked") if form in calls}
    seconds = lesson.median_seconds(pair, turns)
    seconds |= lesson.median_seconds(calls, 3)
    row = {"T": T, "backward": backward, "threads": torch.get_num_threads(), "seconds": seconds}
    row |= {"peak_bytes": None, "gflop_rate": None, "share": None}
    if backward:
        row["peak_bytes"] = {form: peak_bytes(form, T) for form in seconds}
    else:
        rate = needed_flops(T) / seconds["chunked"]
        row["gflop_rate"] = rate / 1e9
        row["share"] = rate / speed[0]  # of the rate of a plain matrix product, measured in the same minute
    return row


def print_row(row):
    """One line: milliseconds of each form, softmax as a multiple of chunked, then rate and share, or memory."""
    seconds = row["seconds"]
    line = f"{row['T']:7,}"
    for form in COMPARED:
        line += f"{seconds[form] * 1e3:11.1f}" if form in seconds else f"{'–':>11}"
    line += f"{seconds['softmax'] / seconds['chunked']:9.2f}×" if "softmax" in seconds else f"{'–':>10}"
    if row["backward"]:
        for form in ("softmax", "chunked"):
            peak = row["peak_bytes"].get(form)
            line += f"{peak / 1e6:9.0f}" if peak else f"{'–':>9}"
    else:
        line += f"{row['gflop_rate']:9.1f}{row['share']:9.0%}"
    print(line, flush=True)


def print_direction(backward, lengths, path, origin):
    """The table of one direction, each row also appended to `path`; from which length on chunked is ahead; the rows."""
    what = "forward + backward" if backward else "forward"
    threads = torch.get_num_threads()
    print(f"{what}, ms, B=1 H={HEADS} D={D} Dv={DV}, {threads} threads; – over {MOST_SECONDS} s or 2 GB")
    last = "   peak MB: softmax, chunked" if backward else "  GFLOP/s    share"
    print(f"{'T':>7}" + "".join(f"{form:>11}" for form in COMPARED) + f"{'ratio':>10}{last}")
    rows = []
    for T in lengths:
        rows.append(measure(T, backward))
        print_row(rows[-1])
        files.append_row(path, rows[-1] | origin)
    print(ahead_of_softmax(rows) + "\n")
    return rows


def ahead_of_softmax(rows):
    """A sentence: from which length on the chunked form takes less time than softmax at every length measured."""
    behind = [row["T"] for row in rows if row["seconds"].get("softmax", math.inf) <= row["seconds"]["chunked"]]
    ahead = [row["T"] for row in rows if row["T"] > max(behind, default=0)]
    return f"The chunked form is ahead of softmax {f'from T = {min(ahead):,} on' if ahead else 'at no length here'}."


# Peak memory
# Measured in a process of its own, so that nothing that ran before is in it.
def peak_bytes(form, T):
    """Memory of forward and backward beyond the inputs; None where the system does not tell."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure_peak, (form, T, torch.get_num_threads()))


def measure_peak(form, T, threads):
    """In the child: reset Linux's high-water mark, run once, read it."""
    torch.set_num_threads(threads)
    make_call(form, 64, True)()  # what is loaded and reserved once for all
    call = make_call(form, T, True)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def resident(field):
    """A size in bytes from /proc/self/status."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise ValueError(f"no {field} in /proc/self/status")


# The figure
MARKERS = {"softmax": "s", "quadratic": "^", "linear": "v", "recurrent": "D", "chunked": "o"}


def draw(rows, path):
    """Milliseconds against T on logarithmic axes, forward on the left, with backward on the right."""
    figure = lesson.new_figure(width=10, height=4.2)
    if figure is None:
        return
    panels = figure.subplots(1, 2, sharey=True)
    for axis, backward in zip(panels, (False, True), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="T", title="forward and backward" if backward else "forward")
        ends = [draw_line(axis, form, rows, backward) for form in COMPARED]
        label([end for end in ends if end])
        axis.margins(x=0.25)
    panels[0].set(ylabel="milliseconds")
    threads = rows[0]["threads"]
    lesson.save_figure(
        figure,
        path,
        f"Milliseconds of every form and of softmax against the length, {threads} threads, logarithmic axes. The "
        "chunked form grows in proportion to the length, softmax and the quadratic form with its square; the linear "
        f"and the recurrent form lie far above. {ahead_of_softmax([row for row in rows if row['backward']])}",
    )


def draw_line(axis, form, rows, backward):
    """One form; returns (T, ms, line), its last point, or None if it was not run."""
    timed = [row for row in rows if row["backward"] == backward and form in row["seconds"]]
    if not timed:
        return None
    lengths = [row["T"] for row in timed]
    times = [row["seconds"][form] * 1e3 for row in timed]
    (line,) = axis.plot(lengths, times, MARKERS[form] + "-", markersize=4, label=form)
    return lengths[-1], times[-1], line


def label(ends):
    """Each name beside its last point, in its colour; higher if it would cover the one below."""
    from matplotlib.patheffects import withStroke

    below = None
    for T, time, line in sorted(ends, key=lambda end: end[:2]):
        covers = below is not None and below[0] == T and time < 1.5 * below[1]
        name = line.axes.annotate(line.get_label(), (T, time), xytext=(6, 6 if covers else -3), color=line.get_color(),
                                  textcoords="offset points")
        name.set_path_effects([withStroke(linewidth=4, foreground="white")])  # so that it can be read across a line
        below = (T, time)


def run_forms(options):
    """Both tables, the rows, the figure."""
    origin = lesson.provenance(__file__)
    rows = []
    for backward in (False, True):
        rows += print_direction(backward, options.lengths, options.rows, origin)
    print(f"rows: {options.rows}")
    draw(rows, options.figure)


# Ratios: one core and two, in one run
def on(threads, call):
    """The call on so many threads."""

    def timed():
        torch.set_num_threads(threads)
        call()

    return timed


def contenders(T, backward):
    """{(name, threads): call}; `product`, a plain matrix product, shows what a second core can give on this machine."""
    a = torch.randn(2048, 2048)
    calls = {"product": lambda: a @ a}
    names = ("softmax", "chunked", "idiap") if causal_dot_product else ("softmax", "chunked")
    for name in names:
        calls[name] = make_call(name, T, backward)
    return {(name, threads): on(threads, call) for name, call in calls.items() for threads in (1, 2)}


def ratios(T, backward, seconds):
    """One row: seconds {(name, threads): ...}, each one's time over that of the chunked form, one core over two."""
    row = {"T": T, "backward": backward, "seconds": {}, "over_chunked": {}, "one_core_over_two": {}}
    for (name, threads), time in seconds.items():
        row["seconds"][f"{name}, {threads}"] = time
        row["over_chunked"][f"{name}, {threads}"] = time / seconds["chunked", threads]
        row["one_core_over_two"][name] = seconds[name, 1] / seconds[name, 2]
    return row


def run_ratios(options):
    """Rows, printed and written as they come; medians of five turns (of 25 up to 1,024 tokens)."""
    if causal_dot_product is None:
        print("idiap's kernel is not installed: left out")
    if lesson.usable_cores() < 2:
        print("one core only: what stands under two threads is no speed-up")
    origin = lesson.provenance(__file__) | {"OMP_PROC_BIND": os.environ.get("OMP_PROC_BIND")}
    for T in options.lengths:
        for backward in (False, True):
            seconds = lesson.median_seconds(contenders(T, backward), 25 if T <= 1024 else 5)
            row = ratios(T, backward, seconds)
            print(f"T = {T:,}, {'forward + backward' if backward else 'forward'}")
            for key in ("seconds", "over_chunked", "one_core_over_two"):
                cells = [f"{name} {value:.4g}" for name, value in row[key].items()]
                print(f"  {key:18}" + "   ".join(cells), flush=True)
            files.append_row(options.rows, row | origin)
    print(f"rows: {options.rows}")


# By chunk: what is kept, and how long it takes
def kept_bytes(forward):
    """Bytes that autograd holds between forward and backward: the storages it saves, each counted once."""
    storages = {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        o = forward()  # the result holds the graph, so that no address is given twice
    return sum(storages.values()) if o.requires_grad else 0


def by_chunk(q, k, v, kernel):
    """{(name, C): form of q, k, v}: the readable form of 02 as autograd runs it, then the fast one by C."""
    readable = functools.partial(linear_attention.chunked_attention, kernel=kernel, chunk_size=64)
    forms = {("02, to be read", 64): readable}
    for C in (16, 32, 64, 128, 256, 512):
        forms["chunked_cpu", C] = functools.partial(
            chunked_cpu.chunked_attention, coefficients=kernel.coefficients, chunk_size=C
        )
    return forms


def print_chunks(T):
    """A line for each form and chunk; returns {C: (predicted cost, seconds forward)} of the fast form."""
    kernel = kernels.ReBasedKernel(D)
    inputs = make_inputs("chunked", T, backward=True)
    values = [x.detach() for x in inputs]
    forms = by_chunk(*inputs, kernel)
    forward = {name: functools.partial(form, *values) for name, form in forms.items()}
    both = {name: lambda form=form: torch.autograd.grad(form(*inputs).sum(), inputs) for name, form in forms.items()}
    forward_seconds = lesson.median_seconds(forward, repeats=9)
    both_seconds = lesson.median_seconds(both, repeats=9)
    threads = torch.get_num_threads()
    print(f"ReBased, float32, B=1 H={HEADS} T={T:,} D={D} Dv={DV}, {threads} threads.")
    print("Predicted cost: FLOPs a token, head and thread, passes and calls charged as FLOPs.\n")
    print(f"{'form':16}{'C':>5}{'predicted cost':>16}{'forward':>12}{'+ backward':>13}{'kept':>10}")
    costs = {}
    for (name, C), form in forms.items():
        cell = ""
        if name == "chunked_cpu":
            cost = chunked_cpu.predicted_chunk_cost(C, HEADS, T, D, DV + 1, P, threads)
            costs[C] = (cost, forward_seconds[name, C])
            cell = f"{cost:,.0f}"
        kept = kept_bytes(functools.partial(form, *inputs)) / 1e6
        times = f"{forward_seconds[name, C] * 1e3:9.1f} ms{both_seconds[name, C] * 1e3:10.1f} ms"
        print(f"{name:16}{C:5}{cell:>16}{times}{kept:7.0f} MB")
    return costs


def print_layouts(T):
    """Features of T tokens as rows (01) and as chunked_cpu lays them out."""
    x = torch.randn(HEADS * T // 64, 64, D)
    kernel = kernels.ReBasedKernel(D)
    laid_out = chunked_cpu.PolynomialFeatures(x, kernel.coefficients, len(x), 64)
    calls = {"rows": lambda: kernel.features(x), "laid out": lambda: laid_out(x)}
    seconds = lesson.median_seconds(calls, repeats=25)
    print(f"φ of {HEADS} × {T:,} keys: {seconds['rows'] * 1e3:.2f} ms as rows of {P} (01), "
          f"{seconds['laid out'] * 1e3:.2f} ms as chunked_cpu lays them out.")


def run_chunks(options):
    """The table, its reading, the two layouts."""
    for T in options.lengths:
        costs = print_chunks(T)
        read_chunks(costs)
        print_layouts(T)


def read_chunks(costs):
    """The sentence under the table. costs {C: (predicted cost, seconds)}."""
    chosen = min(costs, key=lambda C: costs[C][0])
    best = min(costs, key=lambda C: costs[C][1])
    factor = costs[chosen][1] / costs[best][1]
    print(f"\nThe chunk of least predicted cost is {chosen}, the fastest measured {best}: the choice costs a factor of "
          f"{factor:.2f}.")


# The command line
def main(argv=None):
    parser = argparse.ArgumentParser(
        description="The forms of 02 on a CPU: times, memory, ratios. Contenders take turns; medians.",
        epilog="Compare numbers of one run only: a shared machine is noisy. Another part's options: PART --help.",
    )
    parts = parser.add_subparsers(title="parts", metavar="PART", required=True)
    add_part(parts, "forms", run_forms, LENGTHS, "runs/cpu_benchmark.jsonl",
             "every form and softmax, forward and with backward, peak memory, share of the matrix-multiply rate")
    add_part(parts, "ratios", run_ratios, (512, 1024, 4096, 8192, 32_768), "runs/cpu_ratios.jsonl",
             "softmax, idiap's kernel and the chunked form, on one core and on two, in one run")
    add_part(parts, "chunks", run_chunks, (4096,), None,
             "the fast form by chunk: predicted cost, times, what is kept for the backward pass")
    options = lesson.parse_arguments(parser, argv)
    if getattr(options, "threads", None):
        torch.set_num_threads(options.threads)
    lesson.obey(lambda: options.run(options), "rows that were printed are written")


def add_part(parts, name, run, lengths, rows, help):
    """A subcommand and its options."""
    part = parts.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
    part.set_defaults(run=run)
    shown = ", ".join(f"{T:,}" for T in lengths)
    part.add_argument("--lengths", nargs="+", type=lesson.positive_integer, default=lengths, metavar="T",
                      help=f"tokens ({shown})")
    if name != "ratios":
        part.add_argument("--threads", type=lesson.positive_integer, metavar="N", help="of PyTorch (all cores)")
    if rows:
        part.add_argument("--rows", type=lesson.writable_path, default=rows, help="where rows are added (%(default)s)")
    if name == "forms":
        part.add_argument("--figure", type=lesson.figure_path, default="runs/cpu_benchmark.png",
                          help="where to draw the times (%(default)s)")


if __name__ == "__main__":
    main()
