"""Mamba and RWKV beside ReBased: milliseconds of a training step of one layer, bytes of its state.

  python -m experiments.baselines_cost      20 seconds

d_model 64 as in the paper's smallest models, 2,048 tokens in sequences of T; beside the scans, the loops over tokens.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from rebased import lesson, model
from rebased.mamba import Mamba, mamba_loop
from rebased.rwkv import RWKV, rwkv_loop

LENGTHS = (32, 128, 512)
TOKENS = 2048


def layers():
    """{name: (a function of x (B, T, 64), numbers of the state of one sequence)}."""
    torch.manual_seed(0)
    rebased = model.KernelAttention(model.mqar_config("rebased", 64, 128), "rebased")
    mamba = Mamba(SimpleNamespace(d_model=64))
    rwkv = RWKV(64, layer=0, layers=2)
    return {
        "rebased": (rebased, state_numbers(rebased)),
        "mamba": (mamba, state_numbers(mamba)),
        "mamba, token by token": (partial(mamba_loop, mamba), state_numbers(mamba)),
        "rwkv": (rwkv, state_numbers(rwkv)),
        "rwkv, token by token": (partial(rwkv_loop, rwkv), state_numbers(rwkv)),
    }


def state_numbers(layer):
    _, state = layer(torch.randn(1, 5, 64), return_state=True)
    return sum(part.numel() for part in state)


def train_step(layer, x):
    layer(x).sum().backward()


def step_seconds(table, T, repeats=3):
    """{name: median seconds} of forward and backward over TOKENS tokens in sequences of T; layers take turns."""
    x = torch.randn(TOKENS // T, T, 64, requires_grad=True)
    return lesson.median_seconds({name: partial(train_step, layer, x) for name, (layer, _) in table.items()}, repeats)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Mamba and RWKV beside ReBased, one layer each")
    lesson.parse_arguments(parser, argv)
    table = layers()
    print(f"One layer, d_model 64, forward and backward over {TOKENS:,} tokens in sequences of T.")
    print("Milliseconds, and the state of one sequence.\n")
    print(f"{'layer':24}{'state':>10}" + "".join(f"{f'T = {T:,}':>12}" for T in LENGTHS))
    seconds = {T: step_seconds(table, T) for T in LENGTHS}
    for name, (_, numbers) in table.items():
        cells = "".join(f"{seconds[T][name] * 1e3:12.1f}" for T in LENGTHS)
        print(f"{name:24}{4 * numbers:8,} B{cells}")
    print()
    _, middle, long = LENGTHS
    for name in ("mamba", "rwkv"):
        slower = seconds[middle][name] / seconds[middle]["rebased"]
        faster = seconds[long][f"{name}, token by token"] / seconds[long][name]
        fewer = table["rebased"][1] / table[name][1]
        print(f"{name}: {slower:.1f} times the time of ReBased at T = {middle}; its scan is {faster:.0f} times as fast")
        print(f"as its loop at T = {long}; it keeps {fewer:.0f} times fewer numbers of the past than ReBased")


if __name__ == "__main__":
    lesson.obey(main, "there is nothing to go on from: the same command starts anew")
