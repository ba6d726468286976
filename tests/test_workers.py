"""The specification of rebased/workers.py: every result is kept as it comes; whatever stops it leaves nobody behind."""

import multiprocessing
import os
import signal

import pytest
import torch

from rebased import lesson, workers

def work(run, report):
    """A run is a number of steps, or what happens to its worker."""
    if run == "die":
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))  # Windows has no SIGKILL
    if run == "fail":
        raise ZeroDivisionError("on purpose")
    report(run, 0.5, 0.25)
    return {"steps": run, "threads": torch.get_num_threads(), "process": os.getpid(), "device": str(workers.device())}


def steps_of(run):
    return run if isinstance(run, int) else 1


def test_runs_are_done_by_others_and_kept(capfd, monkeypatch):
    """Each once, in processes of one thread that are gone afterwards; the bar reaches its end."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # what they would have otherwise
    kept = []
    workers.run_all(work, [3, 5, 2], steps_of, 1, lambda run, result: kept.append((run, result)))
    assert [run for run, _ in kept] == [3, 5, 2] and [result["steps"] for _, result in kept] == [3, 5, 2]
    assert {result["threads"] for _, result in kept} == {1} and os.getpid() not in {r["process"] for _, r in kept}
    if not torch.cuda.is_available():
        assert {result["device"] for _, result in kept} == {"cpu"}
    assert "10/10" in capfd.readouterr().err and not multiprocessing.active_children()


def test_a_worker_that_dies_is_one_line():
    """It says what to do; what came before is kept."""
    kept = []
    with pytest.raises(lesson.Refusal, match="a worker died"):
        workers.run_all(work, [1, "die", 1], steps_of, 1, lambda run, result: kept.append(run))
    assert kept[:1] == [1] and not multiprocessing.active_children()


@pytest.mark.slow
@pytest.mark.parametrize("end, error", [("fail", ZeroDivisionError), (1, KeyboardInterrupt)])
def test_whatever_stops_it_leaves_nobody_behind(end, error):
    """A run that raises; a stop in this process, as by Ctrl-C or a full disk."""
    kept = []

    def keep(run, result):
        kept.append(run)
        if len(kept) == 2:
            raise KeyboardInterrupt

    with pytest.raises(error):
        workers.run_all(work, [1, end, 1], steps_of, 1, keep)
    assert kept[:1] == [1] and not multiprocessing.active_children()
