"""Many runs that share nothing: one process for each core, with a single thread, or one for each GPU.

So no run ever waits for another, which no division of one run over threads can say of itself.
"""

import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

import torch
from tqdm import tqdm

from rebased import lesson

# glibc gives freed megabytes back to the system and gets them again, zeroed, at the next tensor: 420 to 670 page faults
# a step of 04. With these it keeps them, 65 faults a step, and a step takes 0 to 27 % less time (three pairs of runs).
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": 2**25, "MALLOC_TRIM_THRESHOLD_": 2**30}
HERE = {"device": torch.device("cpu")}  # in a worker: its device, and the queue to the program that started it


def default_workers():
    """One for each GPU, or one for each core that this process may use."""
    return torch.cuda.device_count() or lesson.usable_cores()


def device():
    """Where the work of this process is to be done."""
    return HERE["device"]


def start_worker(numbers, news):
    """The first thing in a new process: one thread, a device; deaf to Ctrl-C, and gone when its parent is."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if torch.cuda.device_count():
        HERE["device"] = torch.device("cuda", numbers.get() % torch.cuda.device_count())
    HERE["news"] = news
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def do_one(work, number, run):
    """In a worker: work(run, report), where report(steps done, loss, accuracy) travels to the program."""
    return work(run, lambda steps, loss, accuracy: HERE["news"].put((number, steps, loss, accuracy)))


def run_all(work, runs, steps_of, workers, keep):
    """Do work(run, report) for all runs in worker processes; keep(run, what it returned) is called here as each ends.

    work must be importable. A bar counts steps, steps_of(run) at most for each run; report(steps done, loss, accuracy)
    moves it. Raises Refusal if a worker dies. Whatever stops this, what was kept is kept, and no worker stays behind.
    """
    for name, size in ALLOCATOR.items():
        os.environ.setdefault(name, str(size))  # read by a worker's C library when it starts
    context = multiprocessing.get_context("spawn")
    numbers, news = context.Queue(), context.Queue()
    workers = min(workers, len(runs))
    for number in range(workers):
        numbers.put(number)
    done = [0] * len(runs)  # steps of each run
    pool = ProcessPoolExecutor(workers, context, start_worker, (numbers, news))
    total = sum(steps_of(run) for run in runs)
    bar = tqdm(total=total, unit="step", desc=f"{len(runs)} runs", smoothing=0.05, mininterval=1)
    try:
        waiting = {pool.submit(do_one, work, number, run): number for number, run in enumerate(runs)}
        while waiting:
            finished, _ = wait(waiting, timeout=0.2, return_when="FIRST_COMPLETED")
            while not news.empty():
                number, steps, loss, accuracy = news.get()
                done[number] = max(steps, done[number])
                bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.2f}", refresh=False)
            for future in sorted(finished, key=waiting.get):
                number = waiting.pop(future)
                keep(runs[number], future.result())
                done[number] = steps_of(runs[number])  # also a run that ended early
            bar.update(sum(done) - bar.n)
    except BaseException as stop:  # Ctrl-C, a full disk, a worker that died: the others need not finish
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        while multiprocessing.active_children():  # join is not enough: the pool's thread may be the one that reaps them
            time.sleep(0.01)
        if isinstance(stop, BrokenProcessPool):
            raise lesson.Refusal(
                "a worker died (out of memory?); what is finished is kept and the same command goes on; try --workers 1"
            ) from None
        raise
    finally:
        pool.shutdown()
        bar.close()
