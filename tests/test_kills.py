"""Sixty kills: what was under way is done again, and the end is that of a run that nobody disturbed.

  python -m pytest -m slow tests/test_kills.py -s      (minutes on two quiet cores; prints tried and survived)

Four kinds of work: a sweep of 04 with its workers, tokenisation, the training of 05, and writing one checkpoint after
the other. Three signals; they go to the process, to its worker, or to the whole group, as a terminal sends them. The
last three kinds run in a fork of this process, which has loaded PyTorch already: a kill costs milliseconds.
"""

import itertools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_05_train_pile import settings
from test_pile_data import make_data

from rebased import files, tokens, train_pile

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="without fork; what Windows does is not tried"),
]
ROOT = Path(__file__).resolve().parents[1]
SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT")
# Kills that must hit, sixty together. More are planned of what may be done before its kill comes.
AT_LEAST = {"tokenisation": 18, "training": 15, "checkpoint": 18, "sweep": 9}
WAIT = 900  # seconds for anything, on a machine that others use


def wait_until(condition):
    """Whether it came true."""
    deadline = time.monotonic() + WAIT
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def kills_of(number, targets, seed):
    """(signal, target), every pair as often as any other, in an order of their own."""
    pairs = list(itertools.product([getattr(signal, name) for name in SIGNALS], targets))
    chosen = [pairs[i % len(pairs)] for i in range(number)]
    random.Random(seed).shuffle(chosen)
    return chosen


def send(kind, target, pid):
    if target == "group":
        os.killpg(pid, kind)
    else:
        os.kill(pid, kind)


def say(work, tried, survived):
    print(f"\n{work}: {tried} kills tried, {survived} survived")
    assert survived == tried >= AT_LEAST[work]


# A process of its own for work that needs no fresh interpreter
def in_fork(work, *arguments):
    """Start work(*arguments) in a fork that leads a group and prints nothing."""
    process = multiprocessing.get_context("fork").Process(target=alone, args=(work, arguments))
    process.start()
    wait_until(lambda: leads_a_group(process))
    return process


def alone(work, arguments):
    os.setsid()
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    work(*arguments)


def leads_a_group(process):
    try:
        return os.getpgid(process.pid) == process.pid or not process.is_alive()
    except ProcessLookupError:
        return True


def killed(process, kind, target):
    """Send a signal and wait for the end; whether it came before the work was done."""
    in_time = process.is_alive()
    if in_time:
        send(kind, target, process.pid)
    return end(process) != 0 and in_time


def end(process):
    process.join(WAIT)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


# Tokenisation
def test_tokenisation(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "COMMIT", 3000)
    source = make_data(tmp_path, 300)
    expected = tokenise(source, tmp_path / "whole")
    chance = random.Random(0)
    tried = 0
    survived = 0
    for kind, target in kills_of(30, ("process", "group"), seed=0):
        folder = tmp_path / "killed"
        process = in_fork(tokenise, source, folder)
        time.sleep(chance.random() * 0.15)
        hit = killed(process, kind, target)
        tried += hit
        last = tokenise(source, folder) if tried % 3 == 0 else expected  # else the next one goes on from there
        survived += hit and last == expected
        if (folder / "manifest.json").exists() and json.loads((folder / "manifest.json").read_bytes())["complete"]:
            for path in folder.iterdir():
                path.unlink()
    assert tokenise(source, tmp_path / "killed") == expected
    say("tokenisation", tried, survived)


def tokenise(source, folder):
    """The bytes of all parts, and the manifest."""
    tokens.load_data([source], tokens.make_vocabulary("bytes"), 0.2, folder)
    return [(folder / name).read_bytes() for name in (*tokens.PARTS, "manifest.json")]


# Training
def test_training(tmp_path):
    data = tokens.load_data([make_data(tmp_path)], tokens.make_vocabulary("bytes"), 0.2, tmp_path / "tokens")
    chosen = settings(steps=90, save_every=1)
    assert end(in_fork(training, chosen, data, tmp_path / "whole")) == 0
    expected = weights(tmp_path / "whole")
    tried = 0
    for kind, target in kills_of(18, ("process", "group"), seed=1):
        before = steps_kept(tmp_path / "killed")
        process = in_fork(training, chosen, data, tmp_path / "killed")
        wait_until(lambda: steps_kept(tmp_path / "killed") > before + 1 or not process.is_alive())  # noqa: B023
        time.sleep(random.Random(before).random() * 0.03)
        tried += killed(process, kind, target)
    assert end(in_fork(training, chosen, data, tmp_path / "killed")) == 0
    found = weights(tmp_path / "killed")
    same = all(torch.equal(found[name], expected[name]) for name in expected)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    say("training", tried, tried if same else 0)


def training(chosen, data, folder):
    train_pile.train("rebased", chosen, data, folder, resume=True)


def weights(folder):
    return files.load_tensors(folder / "checkpoint.pt")["model"]


def steps_kept(folder):
    log = folder / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def losses(folder):
    return [row["loss"] for row in files.read_rows(folder / "log.jsonl")]


# A checkpoint
def test_writing_a_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pt"
    chance = random.Random(2)
    tried = 0
    survived = 0
    for kind, target in kills_of(18, ("process", "group"), seed=2):
        path.unlink(missing_ok=True)
        process = in_fork(write_for_ever, path)
        assert wait_until(path.exists)
        time.sleep(chance.random() * 0.05)
        promised = json.loads((tmp_path / "promised").read_bytes() or b"0") if (tmp_path / "promised").exists() else 0
        hit = killed(process, kind, target)
        tried += hit
        found = files.load_tensors(path)  # refuses half a file
        survived += hit and bool((found["x"] == found["n"]).all()) and found["n"] >= promised
        (tmp_path / "promised").unlink(missing_ok=True)
    say("checkpoint", tried, survived)


def write_for_ever(path):
    for n in itertools.count(1):
        files.save_tensors(path, {"n": n, "x": torch.full((20_000,), n)})
        if n % 5 == 0:
            files.write_atomically(path.with_name("promised"), str(n).encode())


# A sweep
def test_sweep(tmp_path):
    """Parent, worker, or all at once. A worker is deaf to Ctrl-C: then the sweep goes on, and the next kill hits it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job hands down that it is ignored
    whole = sweep(tmp_path, "whole")
    assert whole.wait(WAIT) == 0
    kills = kills_of(9, ("parent", "worker", "group"), seed=3)
    tried = 0
    starts = 0
    process = None
    while kills and len(rows_of(tmp_path, "killed")) < SEEDS and starts < 30:
        if process is None or process.poll() is not None:
            process = sweep(tmp_path, "killed")
            starts += 1
        before = len(rows_of(tmp_path, "killed"))
        assert wait_until(lambda: len(rows_of(tmp_path, "killed")) > before or process.poll() is not None)  # noqa: B023
        if process.poll() is not None:
            continue  # all done, or the last signal reached it late
        kind, target = kills.pop()
        worker = worker_of(process.pid)
        send(kind, target, worker if target == "worker" and worker else process.pid)
        tried += 1
        if not (target == "worker" and kind == signal.SIGINT):
            process.wait(WAIT)
            assert wait_until(lambda: not group_is_there(process.pid)), "a worker stays behind"  # noqa: B023
    if process.poll() is None:
        process.wait(WAIT)
    assert sweep(tmp_path, "killed").wait(WAIT) == 0
    same = rows_of(tmp_path, "killed") == rows_of(tmp_path, "whole")
    assert len(rows_of(tmp_path, "killed")) == SEEDS and not list(tmp_path.glob("*.unfinished"))
    say("sweep", tried, tried if same else 0)


SEEDS = 16


def sweep(folder, name):
    seeds = [str(seed) for seed in range(SEEDS)]
    small = ["--mixers", "rebased", "--steps", "20", "--lengths", "128", "--workers", "1", "--seeds", *seeds]
    where = ["--output", str(folder / f"{name}.jsonl"), "--figure", str(folder / f"{name}.png")]
    return subprocess.Popen(
        [sys.executable, "-B", str(ROOT / "04_train_mqar.py"), *small, *where],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )


def rows_of(folder, name):
    """The results of each seed, in the order of the seeds."""
    rows = files.read_rows(folder / f"{name}.jsonl", ["seed", "cells"])
    return sorted(([row["seed"], row["cells"]] for row in rows), key=lambda row: row[0])


def worker_of(pid):
    """The process that computes, on Linux; None elsewhere, and before it is there."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    for child in children.read_text(encoding="utf-8").split() if children.exists() else []:
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
            return int(child)
    return None


def group_is_there(pid):
    try:
        os.killpg(pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True
