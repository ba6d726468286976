"""What one more token costs after a long context: bytes of all states, milliseconds of a step.

  python -m experiments.decoding                           contexts to 65,536, batch 1 and 32: 3 minutes, 9 GB
  python -m experiments.decoding --contexts 256 1024 --batches 1

Two tables: the two-layer models of 03 (d_model 128, 2 heads), which differ in one layer; and the four-layer models of
05 with batch 1. The states are filled with random numbers instead of by a prefill: what a step costs does not depend
on what they hold. For quiet numbers set OMP_PROC_BIND=true and leave the machine alone.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from rebased import kernels, lesson, model, train_pile

CONTEXTS = (1024, 4096, 16_384, 65_536)


def states_after(language_model, context, batch):
    """States as they are after `context` tokens: of constant size, but for a softmax cache."""
    _, states = language_model.prefill(torch.zeros(batch, 1, dtype=torch.int64))
    layers = []
    for name, state in zip(language_model.config.mixers, states.layers, strict=True):
        if name == "attention":
            B, H, _, D = state[0].shape
            state = (torch.randn(B, H, context, D), torch.randn(B, H, context, D))
        layers.append(state)
    return model.States(layers, context)


@torch.no_grad()
def recall_cost(mixer, context, batch, repeats=21):
    """(bytes of all states, seconds of a step, seconds of its attention alone or None) of a model of 03.

    Its attention alone: what a softmax step would cost at least if the cache grew in place.
    """
    torch.manual_seed(0)
    language_model = model.LanguageModel(model.recall_config(mixer, d_model=128, heads=2)).eval()
    states = states_after(language_model, context, batch)
    calls = {"step": partial(language_model.step, torch.zeros(batch, dtype=torch.int64), states)}
    if mixer == "conv_attention":
        k, v = states.layers[1]
        q = torch.randn_like(k[:, :, :1])
        calls["attention"] = partial(F.scaled_dot_product_attention, q, k, v)
    seconds = lesson.median_seconds(calls, repeats)
    return model.state_bytes(states.layers), seconds["step"], seconds.get("attention")


def print_recall(mixers, contexts, batches):
    """A row for each batch and mixer, and how softmax and the first kernel grew."""
    print("One more token after a context of T: size of all states, milliseconds a step.")
    print("Two layers, d_model 128, 2 heads (03).\n")
    print(f"{'batch':6}{'mixer':24}" + "".join(f"{f'T = {T:,}':>24}" for T in contexts))
    growth = []
    for batch in batches:
        for mixer in mixers:
            costs = [recall_cost(mixer, T, batch) for T in contexts]
            cells = "".join(f"{size / 2**20:10.2f} MB {seconds * 1e3:7.2f} ms" for size, seconds, _ in costs)
            print(f"{batch:<6}{mixer:24}{cells}", flush=True)
            if costs[0][2] is not None:
                alone = "".join(f"{seconds * 1e3:21.2f} ms" for _, _, seconds in costs)
                print(f"{'':6}{'  its attention alone':24}{alone}")
            growth.append((batch, mixer, costs[-1][0] / costs[0][0], costs[-1][1] / costs[0][1]))
    print("The softmax cache is a value here, copied to grow at each step; in place it would cost its attention alone.")
    print(f"\nFrom T = {contexts[0]:,} to {contexts[-1]:,} states and the time of a step grow by these factors:")
    for batch, mixer, size, seconds in growth:
        print(f"  batch {batch:<4}{mixer:24}{size:8.1f}{seconds:8.1f}")
    print()


@torch.no_grad()
def pile_costs(mixer, contexts, repeats=101):
    """[(bytes of all states, seconds of a step)] of the laptop model of 05 after these contexts, which take turns."""
    torch.manual_seed(0)
    language_model = model.LanguageModel(train_pile.laptop_config(mixer, 256)).eval()
    token = torch.tensor([65])
    states = {T: states_after(language_model, T, batch=1) for T in contexts}
    calls = {T: partial(language_model.step, token, states[T]) for T in contexts}
    seconds = lesson.median_seconds(calls, repeats)
    return [(model.state_bytes(states[T].layers), seconds[T]) for T in contexts]


def print_pile(mixers, contexts):
    print("Four layers, d_model 128, 4 heads (05), batch 1: kilobytes of state, milliseconds (contexts take turns).\n")
    print(f"{'':16}" + "".join(f"{T:>22,}" for T in contexts))
    for mixer in mixers:
        costs = pile_costs(mixer, contexts)
        print(f"{mixer:16}" + "".join(f"{size / 1024:10,.0f} KB{s * 1e3:6.2f} ms" for size, s in costs), flush=True)
    print()


def main(argv=None):
    parser = argparse.ArgumentParser(description="what one more token costs after a long context")
    parser.add_argument("--contexts", type=lesson.positive_integer, nargs="+", default=CONTEXTS, metavar="T")
    parser.add_argument("--batches", type=lesson.positive_integer, nargs="+", default=(1, 32), metavar="B")
    parser.add_argument(
        "--kernels", nargs="+", default=["based", "rebased"], choices=tuple(kernels.KERNELS), metavar="KERNEL"
    )
    options = lesson.parse_arguments(parser, argv)
    print_recall(["conv_attention", *options.kernels], options.contexts, options.batches)
    print_pile(["attention", *options.kernels], options.contexts)
    source = lesson.provenance(__file__, argv)
    print(f"{source['hardware']}, torch {source['torch']}, commit {source['commit']}, {source['date']}; ", end="")
    print(f"{torch.get_num_threads()} threads; {source['command']}")


if __name__ == "__main__":
    lesson.obey(main, "there is nothing to go on from: the same command starts anew")
