"""What a run of 05 has around its lesson: processes, data, a folder of its own, and how a checkpoint knows its run."""

import json
import os
import platform
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm

from rebased import files, lesson, pile_settings
from rebased.lesson import Refusal
from rebased.tokens import first_documents, identity, load_data, make_vocabulary

# torchrun gives every process its number; a process that was started alone is number 0 of 1
def is_number(text):
    return text.isascii() and text.isdecimal() and len(text) < 10


def number_of(name, default):
    """A number that torchrun gives; the default for what is none, which `refuse_half_a_launch` names."""
    text = os.environ.get(name, "")
    return int(text) if is_number(text) else default


RANK = number_of("RANK", 0)
WORLD = number_of("WORLD_SIZE", 1)
GO_ON = "the same command with --resume goes on from the last checkpoint"
FORMAT = 3  # of checkpoints
PARTS = {"mixer": str, "config": dict, "settings": dict, "tokenizer": dict, "data": list, "model": dict,
         "optimizer": dict, "log": list}  # what a checkpoint holds


# Before and after the work
LAUNCH = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def refuse_half_a_launch():
    """Raises Refusal where only some of torchrun's variables are set, or to what cannot be: a job's leftovers."""
    given = [name for name in LAUNCH if name in os.environ]
    wrong = wrong_launch(given)
    if wrong and {"RANK", "WORLD_SIZE"} & set(given):
        raise Refusal(f"{', '.join(given)} set as by torchrun, but {wrong}: start with torchrun, or unset them")


def wrong_launch(given):
    """What is wrong with those of torchrun's variables that are set, in words; None if they can be used."""
    for name in given:
        if name != "MASTER_ADDR" and not is_number(os.environ[name]):
            return f"{name}={os.environ[name]} is no number"
    rank, world = number_of("RANK", 0), number_of("WORLD_SIZE", 1)
    if world == 0:
        return "WORLD_SIZE=0 is no number of processes"
    missing = [name for name in LAUNCH if name not in given]
    if missing:
        return f"{missing[0]} is not set"
    return f"RANK={rank} is not below WORLD_SIZE={world}" if rank >= world else None


def start(mixers, argv=None):
    """(options, settings, device, source): what to do, where, and where the rows will say they come from.

    mixers: the names to choose from. Of several processes only the first one prints. Raises Refusal for what cannot be
    run.
    """
    refuse_half_a_launch()
    options, settings = pile_settings.read_options(mixers, argv)
    sequences = settings.batch_tokens // settings.seq_len
    if sequences % WORLD:
        raise Refusal(f"{WORLD} processes cannot share a batch of {sequences}; change batch_tokens")
    device = pile_settings.find_device(options.device)
    if WORLD > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if RANK > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    source = lesson.provenance(Path(__file__).parents[1] / "05_train_pile.py")
    return options, settings, device, source | {"started": time.time()}


def prepare_data(options, settings):
    """The Tokens of the text that was asked for; the first process makes them. Raises Refusal."""
    vocabulary = make_vocabulary(settings.tokenizer, options.tokenizer_file)
    data = load_data(options.data, vocabulary, settings.valid_share, options.tokens, main=RANK == 0)
    first_documents(data, settings.eval_tokens)  # refuses now, not after hours of training
    return data


def compile_and_recompute(model, settings):
    """The model as these two settings want it."""
    if settings.recompute:
        for block in model.blocks:
            # activations are computed again in the backward pass
            block.forward = partial(recompute, block.forward, use_reentrant=False)
    return torch.compile(model) if settings.compile else model


def only_the_first_goes_on():
    """Training is over: every process but the first ends here."""
    if WORLD > 1:
        dist.destroy_process_group()
    if RANK > 0:
        sys.exit()


def keep_rows(path, rows, source, device):
    """Write rows with what a reader must know about their run; returns them so. Raises Refusal."""
    about = dict(source)
    about["minutes"] = round((time.time() - about.pop("started")) / 60, 1)
    about |= {"python": platform.python_version(), "processes": WORLD, "threads": torch.get_num_threads()}
    if device.type == "cuda":
        about["hardware"] = torch.cuda.get_device_name(device)
    rows = [about | row for row in rows]
    files.write_rows(path, rows)
    print(f"rows: {path}")
    return rows


# The folder of a run
def folder_of(options):
    """Where checkpoints, logs and rows go."""
    return options.out or Path("runs") / "pile"


@contextmanager
def own_folder(options):
    """Hold the folder, so that no other run writes to it, and give it.

    Checkpoints of an older run: with --resume they are kept. Without, they are deleted in the default folder; in one
    that was named they are a reason to raise Refusal, and so are those of a mixer that is not asked for now: its rows
    would be replaced.
    """
    out = folder_of(options)
    others = {path.parent.name for path in out.glob("*/checkpoint.pt")} - set(options.mixers)
    if others and options.out:
        there = ", ".join(sorted(others))
        named = " ".join([*sorted(others), *options.mixers])
        raise Refusal(f"{out} holds {there}: say --mixers {named} --resume, or choose another --out")
    paths = [out / mixer / "checkpoint.pt" for mixer in options.mixers]
    old = [path for path in paths if path.exists() and not options.resume]
    if old and options.out:
        raise Refusal(f"{old[0]} is there: go on from it with --resume, or choose another --out")
    with files.claim(out) if RANK == 0 else nullcontext():
        for path in old:
            path.unlink(missing_ok=True)
        yield out


@contextmanager
def keeping_log(folder, name, log, steps):
    """Write a log anew, from the records so far, and give tell(record), which adds one; a bar shows how far it is.

    Only the first process has either.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / "log.jsonl" if RANK == 0 else os.devnull
    with open(place, "w", encoding="utf-8") as file, tqdm(
        desc=name, total=steps, initial=len(log), disable=RANK > 0
    ) as bar:
        file.writelines(json.dumps(record) + "\n" for record in log)

        def tell(record):
            print(json.dumps(record), file=file, flush=True)
            bar.update()
            bar.set_postfix_str("loss {loss:.3f}, {tokens_per_s:,.0f} tokens/s".format(**record))

        yield tell


# Which run a checkpoint belongs to
def identity_of_run(mixer, config, settings, data):
    """What a checkpoint says about its run, as plain types."""
    return {
        "format": FORMAT,
        "mixer": mixer,
        "config": asdict(config),
        "settings": asdict(settings),
        "tokenizer": identity(data.vocabulary),
        "data": [data.manifest["sources"], data.manifest["sizes"]],
    }


def load_checkpoint(path):
    """The content of a checkpoint. Raises Refusal if it is none, is damaged, or lacks a part."""
    content = files.load_tensors(path)
    if content.get("format") != FORMAT:
        raise Refusal(f"{path}: not a checkpoint of this program")
    for name, kind in PARTS.items():
        if not isinstance(content.get(name), kind):
            raise Refusal(f"{path}: a checkpoint without its part {name!r}; choose another --out, or delete it")
    return content


def refuse_another_run(path, found, mixer, settings, data):
    """Raises Refusal if the content `found` of a checkpoint is of other settings, mixer, data or tokenizer."""
    old = found["settings"] | {"mixer": found["mixer"]}
    new = asdict(settings) | {"mixer": mixer}
    name = pile_settings.differing_setting(old, new)
    if name:
        raise Refusal(f"{path} has {name} = {old.get(name)}, not {new[name]}; --resume keeps it")
    if found["data"] != [data.manifest["sources"], data.manifest["sizes"]]:
        raise Refusal(f"{path} was trained on other data; give the same --data, or another --out")
    if found["tokenizer"] != identity(data.vocabulary):
        raise Refusal(f"{path} was trained with another {data.vocabulary.name} tokenizer; give its --tokenizer-file")


def refuse_what_does_not_fit(path, found, model, optimizer):
    """Raises Refusal if a checkpoint has no such weights, averages and log as this model and optimiser go on from."""
    again = "delete it and begin anew, or choose another --out"
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {i: {"step": torch.zeros(()), "exp_avg": p, "exp_avg_sq": p} for i, p in enumerate(parameters)}
    new = layout(asdict(model.config), model.state_dict(), optimizer.state_dict() | {"state": state})
    old = layout(found["config"], found["model"], {"state": {}, "param_groups": []} | found["optimizer"])
    for name in [*new, *(old.keys() - new.keys())]:
        if old.get(name) != new.get(name):
            there = f"{old[name]}, not {new.get(name)}" if name in old else "missing"
            raise Refusal(f"{path} does not fit: its {name} is {there}; {again}")
    steps = [record.get("step") for record in found["log"] if "loss" in record and "tokens_per_s" in record]
    if not found["log"] or steps != list(range(len(found["log"]))):
        raise Refusal(f"{path} does not fit: its log lacks a step; {again}")


def layout(config, weights, optimizer):
    """What must agree before a run goes on, by names that can be shown: settings of the model, shapes, groups."""
    found = {f"model's {name}": value for name, value in config.items()}
    found |= {f"weight {name}": tuple(weight.shape) for name, weight in weights.items()}
    for i, averages in optimizer["state"].items():
        found |= {f"{name} of parameter {i}": tuple(average.shape) for name, average in averages.items()}
    for i, group in enumerate(optimizer["param_groups"]):
        found |= {f"{name} of group {i}": group[name] for name in ("params", "betas", "eps") if name in group}
    return found
