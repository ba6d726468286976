"""What 05 can be told: its settings, the paper's and the laptop's values for them, and the command line.

    python 05_train_pile.py --set steps=400 lr=0.002
    python 05_train_pile.py --preset paper --data FOLDER --mixers rebased
"""

import argparse
import math
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from rebased import lesson
from rebased.lesson import Refusal
from rebased.tokens import TOKENIZERS

AT_LEAST = {
    "seq_len": 2,
    "batch_tokens": 1,
    "micro_batch": 1,
    "steps": 1,
    "warmup": 0,
    "weight_decay": 0,
    "seed": 0,
    "save_every": 1,
    "eval_tokens": 1,
    "eval_length": 1,
}
MOST = 2**31  # whole numbers are below: seeds as in 04, and nothing overflows in NumPy or PyTorch
# These may be other ones when a run is continued: they change neither the model nor the data it sees.
FREE = {"micro_batch", "save_every", "eval_tokens", "eval_length", "compile", "recompute"}


@dataclass(frozen=True)
class Settings:
    """Everything that decides what is trained and how it is measured. Raises Refusal for values that cannot be run."""

    model: str = "laptop"  # laptop: 0.7 million parameters; paper: the paper's 150 million
    tokenizer: str = "bytes"  # or gpt2, gpt-neox
    valid_share: float = 0.05  # of the documents, kept for validation
    seq_len: int = 512  # T, tokens in a training sequence
    batch_tokens: int = 4096  # tokens behind one update, in all processes together
    micro_batch: int = 4  # sequences in one forward pass
    steps: int = 120  # updates
    warmup: int = 20  # updates until the learning rate is reached
    lr: float = 4e-3
    weight_decay: float = 0.1
    clip: float = 1.0  # the largest norm of a gradient
    seed: int = 0  # of the first weights and of the order of the data
    save_every: int = 1000  # updates between two checkpoints
    eval_tokens: int = 150_000  # validation tokens to score, rounded to whole documents
    eval_length: int = 2048  # the longest context of the loss by position
    compile: bool = False  # torch.compile
    recompute: bool = False  # compute activations again in the backward pass: less memory, a third more time

    def __post_init__(self):
        for name, least in AT_LEAST.items():
            if not least <= getattr(self, name) < MOST:
                raise Refusal(f"{name} must be at least {least} and below 2**31, got {getattr(self, name)}")
        if self.model not in PRESETS:
            raise Refusal(f"model must be one of {', '.join(PRESETS)}, got {self.model!r}")
        if self.tokenizer not in TOKENIZERS:
            raise Refusal(f"tokenizer must be one of {', '.join(TOKENIZERS)}, got {self.tokenizer!r}")
        if not 0 < self.valid_share < 1:
            raise Refusal(f"valid_share must lie between 0 and 1, got {self.valid_share}")
        if not 0 < self.lr < math.inf or not self.clip > 0:
            raise Refusal(f"lr and clip must be positive, got {self.lr} and {self.clip}")
        if self.batch_tokens % self.seq_len:
            raise Refusal(f"batch_tokens = {self.batch_tokens} is no multiple of seq_len = {self.seq_len}")


# The paper's values: appendix C of arXiv 2402.10644. Its "effective batch 1024" has no unit; taken as sequences it is
# 4.2 million tokens.
PRESETS = {
    "laptop": {},
    "paper": {
        "model": "paper",
        "tokenizer": "gpt-neox",
        "valid_share": 0.001,
        "seq_len": 4096,
        "batch_tokens": 1024 * 4096,
        "micro_batch": 8,
        "steps": 20_000,
        "warmup": 200,
        "lr": 1e-3,
        "save_every": 500,
        "eval_tokens": 2_000_000,
        "eval_length": 16_384,
    },
}


def read_options(mixers, argv=None):
    """(options, Settings) of the command line; mixers: the names to choose from. Raises Refusal."""
    defaults = " ".join(f"{field.name}={field.default}" for field in fields(Settings))
    parser = argparse.ArgumentParser(
        description="05: train, evaluate and sample language models",
        epilog=f"settings and their values in the laptop preset: {defaults}",
    )
    what = parser.add_argument_group("what to train")
    what.add_argument("--mixers", nargs="+", choices=mixers, default=["rebased", "based", "attention"], metavar="MIXER",
                      help="attention, or a kernel of 01 (rebased based attention)")
    what.add_argument("--preset", choices=PRESETS, default="laptop", help="where the settings start (%(default)s)")
    what.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="change settings")
    text = parser.add_argument_group("on which text")
    text.add_argument("--data", nargs="+", help="files or folders in the Pile's format (what comes with Python)")
    text.add_argument("--tokens", type=Path, help="folder for the tokenised data (one in runs/tokens)")
    text.add_argument("--tokenizer-file", type=Path, help="a tokenizer.json, for a machine without network")
    where = parser.add_argument_group("where")
    where.add_argument("--out", type=Path, help="folder for checkpoints, logs and rows (runs/pile, replaced each time)")
    where.add_argument("--resume", action="store_true", help="go on from the checkpoints in --out; begin what has none")
    where.add_argument("--device", help="cpu, cuda, cuda:1, ... (cuda if there is one)")
    where.add_argument("--figure", type=lesson.figure_path, default="runs/05_train_pile.png", help="(%(default)s)")
    options = lesson.parse_arguments(parser, argv)
    preset = [f"{name}={value}" for name, value in PRESETS[options.preset].items()]
    return options, lesson.change(Settings(), preset + options.set)


def show(settings):
    """Print all settings, some in a line."""
    texts = [f"{name}={value}" for name, value in asdict(settings).items()]
    for i in range(0, len(texts), 6):
        print("  ".join(texts[i : i + 6]))
    print()


def differing_setting(old, new):
    """The name of a setting that a run must not change when it goes on, of two dictionaries; None if all agree."""
    for name in sorted(new.keys() - FREE):
        if old.get(name) != new[name]:
            return name
    return None


def find_device(name):
    """The device of this process. Raises Refusal for one that is not there."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise Refusal(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device
