"""Where a training step goes: in 04 data, first layer, mixer layer, ...; in 05 data, convolutions, mixers, MLPs, ...

Every stage is cut off with `detach`, so that its backward pass can be timed by itself.
Run from the project's root: python results/training_profile.py > results/training_profile.txt   (2 minutes, one thread)
     python results/training_profile.py pile     (the part of 05 only; "mqar": that of 04)
"""
import sys
import time
from importlib import import_module
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
models, mqar, pile = import_module("03_model"), import_module("04_train_mqar"), import_module("05_train_pile")
torch.set_num_threads(1)

SETTINGS = {  # name: (config of a mixer, length, pairs, vocabulary, batch, rows only)
    "04, laptop": (models.recall_config, 128, 16, 256, 32, True),
    "paper's MQAR, 16 rows of 128": (lambda mixer: models.mqar_config(mixer, 64, 128), 128, 16, 8192, 64, True),
    "paper's MQAR, all rows": (lambda mixer: models.mqar_config(mixer, 64, 128), 128, 16, 8192, 64, False),
}
MQAR_STAGES = ("data", "embedding and first layer", "mixer layer", "logits and loss", "optimiser")
PILE_STAGES = ("data", "embedding", "convolutions", "mixers", "MLPs", "logits and loss", "sums and clipping", "optimiser")


def mqar_step(model, optimizer, settings, seed, clock):
    """One training step in stages; clock(stage) adds the time since the last call to it."""
    _, length, pairs, vocabulary, batch, some = settings
    tokens, labels = mqar.make_mqar(batch, length, pairs, vocabulary, seed=seed)
    positions = mqar.query_positions(labels) if some else torch.arange(length).expand(batch, length)
    targets = labels.gather(1, positions)
    clock("data")
    x = model.trunk(tokens)
    clock("embedding and first layer")
    below = x.detach().requires_grad_()
    y, _ = model.blocks[-1](below, positions=positions if some else None)
    clock("mixer layer")
    top = y.detach().requires_grad_()
    logits = F.linear(model.norm(top), model.embedding.weight)
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    clock("logits and loss")
    y.backward(top.grad)
    clock("mixer layer")
    x.backward(below.grad)
    clock("embedding and first layer")
    optimizer.step()
    optimizer.zero_grad()
    clock("optimiser")


def layers(model):
    """(stage, function) of every half block, from below."""
    for name, block in zip(model.config.mixers, model.blocks, strict=True):
        yield ("convolutions" if name == "gated_conv" else "mixers",
               lambda x, block=block: x + block.mixer(block.norm1(x))[0])
        yield "MLPs", lambda x, block=block: x + block.mlp(block.norm2(x))


def micro_batch(model, tokens, share, clock):
    """Forward and backward of one micro-batch; the gradients are added to those of the parameters."""
    x, tape = model.embed(tokens[:, :-1]), []
    embedded = x
    clock("embedding")
    for stage, layer in layers(model):
        below = x.detach().requires_grad_()
        x = layer(below)
        tape.append((stage, below, x))
        clock(stage)
    top = x.detach().requires_grad_()
    logits = F.linear(model.norm(top), model.embedding.weight)
    (F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:]) * share).backward()
    clock("logits and loss")
    grad = top.grad
    for stage, below, y in reversed(tape):
        y.backward(grad)
        grad = below.grad
        clock(stage)
    embedded.backward(grad)
    clock("embedding")


def pile_step(model, optimizer, settings, data, n, clock):
    """One training step of 05 in stages."""
    parts, sums = pile.pile_data.training_batch(data.train, settings, n), []
    clock("data")
    for tokens in parts:
        micro_batch(model, tokens, len(tokens) * settings.seq_len / settings.batch_tokens, clock)
        sums.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        optimizer.zero_grad()
        clock("sums and clipping")
    total = sum(sums)
    for p, grad in zip(model.parameters(), total.split([p.numel() for p in model.parameters()]), strict=True):
        p.grad = grad.view_as(p)
    torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip).item()
    clock("sums and clipping")
    optimizer.step()
    clock("optimiser")


def profile(step, stages, steps=12, warmup=3):
    """Milliseconds of each stage, medians over steps; step(n, clock) is one."""
    times = []
    for n in range(steps + warmup):
        spent, last = dict.fromkeys(stages, 0.0), time.perf_counter()

        def clock(stage, spent=spent):
            nonlocal last
            spent[stage] += time.perf_counter() - last
            last = time.perf_counter()

        step(n, clock)
        times.append(spent)
    return {stage: sorted(t[stage] for t in times[warmup:])[steps // 2] * 1e3 for stage in stages}


def print_profiles(name, steps, stages, width):
    """A row for each (mixer, step)."""
    print(f"\n{name}: ms a step (share), one thread\n{'':16}" + "".join(f"{stage:>{width}}" for stage in stages) + f"{'sum':>9}")
    for mixer, step in steps:
        times = profile(step, stages)
        total = sum(times.values())
        print(f"{mixer:16}" + "".join(f"{f'{ms:.1f} ({ms / total:.0%})':>{width}}" for ms in times.values()) + f"{total:9.1f}")


def mqar_profiles():
    for name, settings in SETTINGS.items():
        steps = []
        for mixer in ("conv_attention", "based", "rebased"):
            torch.manual_seed(0)
            model = models.LanguageModel(settings[0](mixer))
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
            steps.append((mixer, lambda n, clock, m=model, o=optimizer, s=settings: mqar_step(m, o, s, n, clock)))
        print_profiles(name, steps, MQAR_STAGES, 28)


def pile_profiles():
    settings, place = pile.Settings(), pile.Place(torch.device("cpu"))
    data, steps = pile.pile_data.load_data(None, pile.pile_data.Bytes(), settings.valid_share), []
    for mixer in ("attention", "based", "rebased"):
        model = pile.make_model(mixer, settings, data, place)
        optimizer = pile.make_optimizer(model, settings, place.device)
        steps.append((mixer, lambda n, clock, m=model, o=optimizer: pile_step(m, o, settings, data, n, clock)))
    print_profiles("05, laptop", steps, PILE_STAGES, 18)


PARTS = {"mqar": mqar_profiles, "pile": pile_profiles}
for part in sys.argv[1:] or PARTS:
    if part not in PARTS:
        sys.exit(f"{part!r} is no part; choose from {', '.join(PARTS)}")
    PARTS[part]()
