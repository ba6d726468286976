"""The CPU's ratios in one run: softmax, idiap's compiled causal product if it is installed, and the chunked form, one
core and two, taking turns; medians of five (of 25 up to 1,024 tokens).

Run: OMP_PROC_BIND=true python results/cpu_ratios.py     (7 minutes on two cores; rows go to runs/cpu_ratios.jsonl)

idiap's kernel: pip install --no-build-isolation pytorch-fast-transformers, with "-O3", "-march=native" added to the
flags in its setup.py (as it comes it is compiled for no particular machine).
"""
import json
import os
import sys
from importlib import import_module
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
kernels = import_module("01_kernels")
la = import_module("02_linear_attention")
cost = import_module("02_linear_attention_cost")

try:
    from fast_transformers.causal_product import causal_dot_product
except ImportError:
    causal_dot_product = None


def idiap_attention(q, k, v, kernel):
    """ReBased through the compiled product Σ_{j≤i} φ(q_i)·φ(k_j) v_j; the normaliser as its authors form it, by cumsum."""
    phi_q, phi_k = kernel.features(q), kernel.features(k)
    den = (phi_q * phi_k.cumsum(2)).sum(-1, keepdim=True)
    return causal_dot_product(phi_q, phi_k, v) / (den + la.EPS)


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
    for name in ("softmax", "chunked", *(["idiap"] if causal_dot_product else [])):
        calls[name] = cost.make_call(name, T, backward)
    return {(name, n): on(n, call) for name, call in calls.items() for n in (1, 2)}


def measure(T, backward):
    """One row: seconds of every contender, each one's time over that of the chunked form, one core over two."""
    times = cost.interleaved(contenders(T, backward), 25 if T <= 1024 else 5)
    names = dict.fromkeys(name for name, _ in times)
    return {
        "T": T,
        "backward": backward,
        "seconds": {f"{name}, {n}": t for (name, n), t in times.items()},
        "over_chunked": {f"{name}, {n}": t / times["chunked", n] for (name, n), t in times.items()},
        "one_core_over_two": {name: times[name, 1] / times[name, 2] for name in names},
    }


def main():
    """Rows printed as they come and written at the end."""
    if causal_dot_product is None:
        print("idiap's kernel is not installed: left out")
    cost.FORMS["idiap"] = idiap_attention
    rows = []
    for T in tqdm((512, 1024, 4096, 8192, 32_768), disable=None, leave=False):
        for backward in (False, True):
            rows.append(measure(T, backward))
            tqdm.write(f"T = {T:,}, {'forward + backward' if backward else 'forward'}")
            for key in ("seconds", "over_chunked", "one_core_over_two"):
                tqdm.write(f"  {key:18}" + "   ".join(f"{name} {value:.4g}" for name, value in rows[-1][key].items()))
    origin = cost.provenance(__file__, []) | {"OMP_PROC_BIND": os.environ.get("OMP_PROC_BIND")}
    with kernels.writable("runs/cpu_ratios.jsonl").open("a") as file:
        file.writelines(json.dumps(row | origin) + "\n" for row in rows)


if __name__ == "__main__":
    main()
