"""Where a training step goes: in 04 data, first layer, mixer layer, ...; in 05 data, convolutions, mixers, MLPs, ...

  python -m experiments.training_profile                2 minutes, one thread
  python -m experiments.training_profile --parts pile   the part of 05 only; "mqar": that of 04

Every stage is cut off from the next with `detach`, so that its backward pass can be timed by itself.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from rebased import lesson, model, train_mqar, train_pile
from rebased.pile_settings import Settings
from rebased.tokens import load_data, make_vocabulary

STEPS = 12  # that count
WARMUP = 3  # before them


class Clock:
    """clock(stage) adds the time since the last call to this stage."""

    def __init__(self, stages):
        self.spent = dict.fromkeys(stages, 0.0)
        self.last = time.perf_counter()

    def __call__(self, stage):
        now = time.perf_counter()
        self.spent[stage] += now - self.last
        self.last = now


def profile(step, stages):
    """{stage: median milliseconds} over steps; step(n, clock) is one."""
    times = []
    for n in range(WARMUP + STEPS):
        clock = Clock(stages)
        step(n, clock)
        times.append(clock.spent)
    medians = {}
    for stage in stages:
        values = sorted(spent[stage] for spent in times[WARMUP:])
        medians[stage] = values[STEPS // 2] * 1e3
    return medians


def print_profile(mixer, times, width):
    total = sum(times.values())
    cells = "".join(f"{f'{ms:.1f} ({ms / total:.0%})':>{width}}" for ms in times.values())
    print(f"{mixer:16}{cells}{total:9.1f}", flush=True)


def print_head(name, stages, width):
    print(f"\n{name}: ms a step (share), one thread")
    print(f"{'':16}" + "".join(f"{stage:>{width}}" for stage in stages) + f"{'sum':>9}")


# 04
MQAR_STAGES = ("data", "embedding and first layer", "mixer layer", "logits and loss", "optimiser")


def paper_config(mixer):
    return model.mqar_config(mixer, 64, 128)


SETTINGS = {  # name: (config of a mixer, vocabulary, batch, the queries only); 16 pairs in 128 tokens
    "04, laptop": (model.recall_config, 256, 32, True),
    "paper's MQAR, 16 rows of 128": (paper_config, 8192, 64, True),
    "paper's MQAR, all rows": (paper_config, 8192, 64, False),
}


def last_layer(language_model, x, positions):
    """What `logits_at` does between the layers below and the head: x (B, T, d_model) -> (B, n, d_model)."""
    last = language_model.blocks[-1]
    if positions is None:
        return last(x)
    y = last.mixer.at(last.norm1(x), positions)
    return last.second_line(model.rows(x, positions) + y)


def mqar_step(language_model, optimizer, vocabulary, batch, queries_only, n, clock):
    """One training step in stages."""
    tokens, labels = train_mqar.make_mqar(batch, 128, 16, vocabulary, seed=n)
    positions = train_mqar.query_positions(labels) if queries_only else None
    targets = labels.gather(1, positions) if queries_only else labels
    clock("data")
    x = language_model.trunk(tokens)
    clock("embedding and first layer")
    below = x.detach().requires_grad_()
    y = last_layer(language_model, below, positions)
    clock("mixer layer")
    top = y.detach().requires_grad_()
    logits = language_model.head(top)
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    clock("logits and loss")
    y.backward(top.grad)
    clock("mixer layer")
    x.backward(below.grad)
    clock("embedding and first layer")
    optimizer.step()
    optimizer.zero_grad()
    clock("optimiser")


def mqar_profiles(mixers):
    for name, (config, vocabulary, batch, queries_only) in SETTINGS.items():
        print_head(name, MQAR_STAGES, width=28)
        for mixer in ("conv_attention", *mixers):
            torch.manual_seed(0)
            language_model = model.LanguageModel(config(mixer))
            optimizer = torch.optim.AdamW(language_model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
            step = partial(mqar_step, language_model, optimizer, vocabulary, batch, queries_only)
            print_profile(mixer, profile(step, MQAR_STAGES), width=28)


# 05
PILE_STAGES = ("data", "embedding", "convolutions", "mixers", "MLPs", "logits and loss", "clipping", "optimiser")


def half_blocks(language_model):
    """(stage, function) of both lines of every block, from below."""
    for name, block in zip(language_model.config.mixers, language_model.blocks, strict=True):
        stage = "convolutions" if name == "gated_conv" else "mixers"
        yield stage, lambda x, block=block: x + block.mixer(block.norm1(x))
        yield "MLPs", block.second_line


def micro_batch(language_model, tokens, share, clock):
    """Forward and backward of one micro-batch; the gradients are added to those of the parameters."""
    x = language_model.embed(tokens[:, :-1])
    embedded = x
    tape = []
    clock("embedding")
    for stage, layer in half_blocks(language_model):
        below = x.detach().requires_grad_()
        x = layer(below)
        tape.append((stage, below, x))
        clock(stage)
    top = x.detach().requires_grad_()
    logits = language_model.head(top)
    (F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:]) * share).backward()
    clock("logits and loss")
    grad = top.grad
    for stage, below, y in reversed(tape):
        y.backward(grad)
        grad = below.grad
        clock(stage)
    embedded.backward(grad)
    clock("embedding")


def pile_step(language_model, optimizer, settings, train, n, clock):
    """One training step in stages."""
    parts = train_pile.micro_batches(train, settings, n, rank=0, world=1)
    clock("data")
    for tokens in parts:
        micro_batch(language_model, tokens, len(tokens) * settings.seq_len / settings.batch_tokens, clock)
    torch.nn.utils.clip_grad_norm_(language_model.parameters(), settings.clip)
    clock("clipping")
    optimizer.step()
    optimizer.zero_grad()
    clock("optimiser")


def pile_profiles(mixers):
    settings = Settings()
    data = load_data(None, make_vocabulary(settings.tokenizer, None), settings.valid_share)
    print_head("05, laptop", PILE_STAGES, width=18)
    for mixer in ("attention", *mixers):
        language_model = train_pile.make_model(mixer, settings, data.vocabulary.size)
        optimizer = train_pile.make_optimizer(language_model, settings)
        step = partial(pile_step, language_model, optimizer, settings, data.train)
        print_profile(mixer, profile(step, PILE_STAGES), width=18)


PARTS = {"mqar": mqar_profiles, "pile": pile_profiles}


def main(argv=None):
    parser = argparse.ArgumentParser(description="where a training step of 04 and of 05 goes")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
    options = lesson.parse_arguments(parser, argv)
    torch.set_num_threads(1)
    source = lesson.provenance(__file__, argv)
    print(", ".join(source[key] for key in ("hardware", "torch", "commit", "date", "command")))
    for part in options.parts:
        PARTS[part](["based", "rebased"])


if __name__ == "__main__":
    lesson.obey(main, "there is nothing to go on from: the same command starts anew")
