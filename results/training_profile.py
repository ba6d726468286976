"""Where a training step goes: data, first layer, mixer layer, logits and loss, optimiser.

Every stage is cut off with `detach`, so that its backward pass can be timed by itself.
Run from the project's root: python results/training_profile.py > results/training_profile.txt   (1 minute, one thread)
"""
import sys
import time
from importlib import import_module
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
models, mqar = import_module("03_model"), import_module("04_train_mqar")
torch.set_num_threads(1)

SETTINGS = {  # name: (config of a mixer, length, pairs, vocabulary, batch, rows only)
    "04, laptop": (models.recall_config, 128, 16, 256, 32, True),
    "paper's MQAR, 16 rows of 128": (lambda mixer: models.mqar_config(mixer, 64, 128), 128, 16, 8192, 64, True),
    "paper's MQAR, all rows": (lambda mixer: models.mqar_config(mixer, 64, 128), 128, 16, 8192, 64, False),
}
STAGES = ("data", "embedding and first layer", "mixer layer", "logits and loss", "optimiser")


def step(model, optimizer, settings, seed, clock):
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


def profile(mixer, settings, steps=12, warmup=3):
    """Milliseconds of each stage, medians over steps."""
    torch.manual_seed(0)
    model, times = models.LanguageModel(settings[0](mixer)), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    for seed in range(steps + warmup):
        spent, last = dict.fromkeys(STAGES, 0.0), time.perf_counter()

        def clock(stage, spent=spent):
            nonlocal last
            spent[stage] += time.perf_counter() - last
            last = time.perf_counter()

        step(model, optimizer, settings, seed, clock)
        times.append(spent)
    return {stage: sorted(t[stage] for t in times[warmup:])[steps // 2] * 1e3 for stage in STAGES}


for name, settings in SETTINGS.items():
    print(f"\n{name}: ms a step (share), one thread\n{'':18}" + "".join(f"{stage:>28}" for stage in STAGES) + f"{'sum':>9}")
    for mixer in ("conv_attention", "based", "rebased"):
        times = profile(mixer, settings)
        total = sum(times.values())
        print(f"{mixer:18}" + "".join(f"{f'{ms:.1f} ({ms / total:.0%})':>28}" for ms in times.values()) + f"{total:9.1f}")
