"""04 · The sweep: many training runs, one row each, nothing lost

Aim: perform a long list of runs on every core or GPU there is, so that an interruption at any moment costs at most
the epoch that was under way, and the results are a file of rows that can be concatenated.

You will learn
  1. why one process per core, one thread each, is the best use of a machine for many small runs;
  2. what it takes for a file of results to survive Ctrl-C, `kill -9` and a full disk: whole lines, one at a time;
  3. how a run continues from its last epoch with the numbers it would have had: weights, optimiser, random state.

This file trains nothing: 04_train_mqar.py hands it runs and the function that performs one. It may be skipped.

Letters: none but i/n, shard i of n.

References: the atomic replacement of a file is POSIX rename(2); everything else is PyTorch's and Python's own.

Run: python 04_mqar_sweep.py      (5 seconds: the claims about rows and checkpoints)
"""
# %%
import argparse
import io
import json
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from hashlib import sha256
from importlib import import_module
from pathlib import Path

import torch
from tqdm import tqdm

kernels = import_module("01_kernels")

# %% Results: a row as soon as a run has ended
# Appended and flushed to disk one line at a time. Whatever interrupts the program, finished rows stay and are not
# run again; half a line, if the machine went down in the middle of writing, is cut off before the next one.
def read_rows(path, fields):
    """The rows of a results file; [] if there is none. Raises ValueError that names a line which is not a row."""
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text().splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        try:
            rows.append(json.loads(line))
            _ = [rows[-1][field] for field in fields]
        except (json.JSONDecodeError, KeyError, TypeError, IndexError):
            raise ValueError(f"{path}, line {number} is not a row of results; mend it or choose another --output") from None
    return rows


def append_row(path, row):
    """Write one row as one line that is on disk when this returns."""
    with path.open("ab+") as file:
        content_end = file.seek(0, os.SEEK_END)
        if content_end:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())

# %% Checkpoints: an epoch is never trained twice
# Written beside the rows after every epoch and removed with the run's row. The new file takes the old one's name only
# when it is whole and on disk. Tensors and plain types only: loading runs no code.
def checkpoint_path(rows_path, key):
    """Where the run called `key` keeps its checkpoint: one name for each run and its settings."""
    return rows_path.with_name(rows_path.name + ".unfinished") / (sha256(key.encode()).hexdigest()[:16] + ".pt")


def save_checkpoint(path, content):
    """Write atomically: a kill at any moment leaves the old file or the new one."""
    memory = io.BytesIO()
    torch.save(content, memory)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    with new.open("wb") as file:
        file.write(memory.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def load_checkpoint(path, device="cpu"):
    """What `save_checkpoint` wrote; None if there is none, or one that cannot be read (the run then starts anew)."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError):
        return None


def remove_checkpoint(path):
    """Forget a finished run; the last one takes the folder along."""
    path.unlink(missing_ok=True)
    if path.parent.exists() and not any(path.parent.iterdir()):
        path.parent.rmdir()

# %% Workers
# Runs share nothing, so one process per core with one thread each, or one per GPU, loses nothing to waiting. A worker
# tells how far it is through a queue and returns its row; it ends when the program that started it is gone.
PLACE = {}  # in a worker: its device, and the queue to the program
# glibc gives every freed megabyte back to the system, and gets it again, zeroed, at the next tensor: 180 to 470 page faults
# a step and up to a quarter of its time in these small models. With these settings it keeps what it has.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": 2**25, "MALLOC_TRIM_THRESHOLD_": 2**30}


def default_workers():
    """One a GPU, or one a core that this process may use (which only Linux tells)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return torch.cuda.device_count() or cores


def start_worker(numbers, progress):
    """Make this process a worker: one thread, a device, deaf to Ctrl-C, gone with its parent."""
    number, gpus = numbers.get(), torch.cuda.device_count()
    PLACE["device"] = torch.device("cuda", number % gpus) if gpus else torch.device("cpu")
    PLACE["progress"] = progress
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def work(perform, number, run, checkpoint, *rest):
    """In a worker: perform one run -> its row."""
    report = lambda steps, loss, accuracy: PLACE["progress"].put((number, steps, loss, accuracy))  # noqa: E731
    return perform(run, *rest, device=PLACE["device"], checkpoint=checkpoint, report=report)


def perform_all(runs, perform, rest, path, workers, steps_of, extra):
    """Perform runs; a bar counts training steps (loss and accuracy: the latest reported). Rows go to `path`.

    perform(run, *rest, device, checkpoint, report) -> row; steps_of(run): how many steps it takes at most;
    runs: {Run: its checkpoint's path}; extra: fields that every row gets.
    """
    for name, size in ALLOCATOR.items():
        os.environ.setdefault(name, str(size))  # read by a worker's C library when it starts
    context, workers = multiprocessing.get_context("spawn"), min(workers, len(runs))
    numbers, progress, done = context.Queue(), context.Queue(), {}
    for number in range(workers):
        numbers.put(number)
    with (
        ProcessPoolExecutor(workers, context, start_worker, (numbers, progress)) as pool,
        tqdm(total=sum(map(steps_of, runs)), unit="step", desc=f"{len(runs)} runs", smoothing=0.05, mininterval=1) as bar,
    ):
        waiting = {pool.submit(work, perform, number, run, checkpoint, *rest): (number, run)
                   for number, (run, checkpoint) in enumerate(runs.items())}
        try:
            while waiting:
                while not progress.empty():
                    number, steps, loss, accuracy = progress.get()
                    done[number] = max(steps, done.get(number, 0))
                    bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.2f}", refresh=False)
                for future in [future for future in waiting if future.done()]:
                    number, run = waiting.pop(future)
                    append_row(path, future.result() | extra)
                    remove_checkpoint(runs[run])
                    done[number] = steps_of(run)  # a run that ended early
                bar.update(sum(done.values()) - bar.n)
                time.sleep(0.1)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def shard(items, part):
    """Every n-th item, from the i-th on: part = (i, n), i from 1 to n. The n shards are disjoint and complete."""
    i, n = part
    return items[i - 1 :: n]

# %% Claims
def check_rows_survive_a_torn_line():
    """Half a line at the end is not read, and is cut off before the next row is written."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        for n in range(3):
            append_row(path, {"n": n})
        for torn in range(1, 9):
            path.write_bytes(path.read_bytes()[:-torn])
            assert [row["n"] for row in read_rows(path, ["n"])] == [0, 1]
            append_row(path, {"n": 2})
            assert [row["n"] for row in read_rows(path, ["n"])] == [0, 1, 2]


def check_checkpoints_are_whole():
    """What is saved comes back; a broken file counts as none; a finished run leaves nothing behind."""
    with tempfile.TemporaryDirectory() as folder:
        path = checkpoint_path(Path(folder) / "rows.jsonl", "a run")
        assert load_checkpoint(path) is None
        save_checkpoint(path, {"weights": torch.arange(3), "epoch": 2})
        assert load_checkpoint(path)["epoch"] == 2 and load_checkpoint(path)["weights"].tolist() == [0, 1, 2]
        path.write_bytes(path.read_bytes()[:100])
        assert load_checkpoint(path) is None
        remove_checkpoint(path)
        assert not any(Path(folder).iterdir())


def check_shards_are_a_partition():
    """All shards together are all runs, none twice."""
    items = list(range(17))
    for n in range(1, 20):
        assert sorted(sum((shard(items, (i, n)) for i in range(1, n + 1)), [])) == items


CHECKS = [check_rows_survive_a_torn_line, check_checkpoints_are_whole, check_shards_are_a_partition]


def main(argv=None):
    """The checks; returns how many failed."""
    parser = argparse.ArgumentParser(description="04: the checks of rows, checkpoints and shards (5 seconds)")
    kernels.parse_arguments(parser, argv)
    return kernels.run_checks(CHECKS)


if __name__ == "__main__":
    if main():
        sys.exit(1)
