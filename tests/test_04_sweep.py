"""The specification of 04_mqar_sweep.py and 04_mqar_report.py: nothing lost, nothing repeated, tables from rows alone."""

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

m = import_module("04_train_mqar")
sweeps, reports = import_module("04_mqar_sweep"), import_module("04_mqar_report")
ROOT = Path(m.__file__).parent
TINY = [
    *("--mixers", "rebased", "conv_attention", "--seeds", "0", "1", "--search-seeds", "7", "--learning-rates", "0.003", "0.01"),
    *("--lengths", "32", "--pairs", "4", "--test-lengths", "32", "64", "--test-examples", "8", "--batch", "4"),
    *("--epochs", "3", "--softmax-epochs", "3", "--examples", "80", "--workers", "2"),
]


@pytest.mark.parametrize("check", sweeps.CHECKS + reports.CHECKS, ids=lambda check: check.__name__)
def test_claims_of_the_files(check):
    check()


def files(folder):
    return ["--output", str(folder / "rows.jsonl"), "--figure", str(folder / "figure.png")]


def table(text):
    """What a program printed, without times and the bar."""
    text = re.sub(r"Linear time: .*|.* minutes; rows: .*|figure: .*|.*runs are there already.*", "", text)
    return text[text.index("Trained at") :]


def rows_of(folder):
    """The rows by run, without times, dates and the like."""
    varying = {"seconds", "train_seconds", "full_pass", "date", "commit", "command", "hardware"}
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert all(varying <= set(row) for row in rows)
    keyed = {(row["mixer"], row["learning_rate"], row["seed"]): {k: row[k] for k in row.keys() - varying} for row in rows}
    assert len(keyed) == len(rows), "a run was repeated"
    return keyed


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A sweep that nothing interrupts: the folder and what was printed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = subprocess.run([sys.executable, m.__file__, *TINY, *files(folder)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_a_sweep_searches_and_then_reports(undisturbed):
    """Two rates for the search seed, one for the others; tables, figures, no checkpoint left."""
    folder, out = undisturbed
    rows = rows_of(folder)
    assert len(rows) == 2 * (2 + 2) and len({rate for mixer, rate, seed in rows if mixer == "rebased" and seed != 7}) == 1
    assert all(len(row["accuracies"]) == 3 and len(row["placed"].get("beta_k", [0] * 4)) == 4 for row in rows.values())
    assert "conv + softmax" in out and "± " in out and "*" in out and "checks: 5 passed, 0 failed" in out
    names = {path.name for path in folder.iterdir()}
    assert names == {"rows.jsonl", "figure.png", "figure_attention.png", "figure_gamma_beta.png"}


def test_a_lost_and_a_torn_row_run_again(undisturbed, tmp_path, capsys):
    """Two runs of eight are repeated, to the same numbers; the table is the same."""
    folder, out = undisturbed
    lines = (folder / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(lines[:2] + lines[4:]) + lines[2][: len(lines[2]) // 2])
    assert m.main([*TINY, *files(tmp_path)]) == 0
    again = capsys.readouterr().out
    assert "2 of 4 runs are there already" in again and "4 of 4 runs are there already" in again
    assert rows_of(tmp_path) == rows_of(folder) and table(again) == table(out)


@pytest.mark.slow
def test_kill_9_at_any_moment_changes_nothing(undisturbed, tmp_path):
    """Killed six times at random moments, then left alone: the same rows and table, byte for byte but for times."""
    folder, out = undisturbed
    moment, command = random.Random(0), [sys.executable, m.__file__, *TINY, *files(tmp_path)]
    for _ in range(6):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        time.sleep(moment.uniform(3, 12))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert rows_of(tmp_path) == rows_of(folder) and table(done.stdout) == table(out)
    assert not list(tmp_path.glob("*.unfinished"))


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_finished(tmp_path):
    """One line, status 130, no worker left behind; the checkpoints wait beside the rows."""
    command = [sys.executable, m.__file__, *TINY, "--examples", "4000", *files(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*.unfinished/*.pt")) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on from there" in out and list(tmp_path.glob("*.unfinished/*.pt"))
    assert "Traceback" not in out
    with pytest.raises(ProcessLookupError):  # in a moment the workers are gone
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.2)


def test_shards_together_are_the_whole(undisturbed, tmp_path):
    """Two machines, one after the other; their files joined give the same table and run nothing."""
    folder, out = undisturbed
    joined = b""
    for i in (1, 2):
        part = tmp_path / str(i)
        part.mkdir()
        assert m.main([*TINY, *files(part), "--shard", f"{i}/2"]) == 0
        assert len(rows_of(part)) == 4
        joined += (part / "rows.jsonl").read_bytes()
    (tmp_path / "rows.jsonl").write_bytes(joined)
    done = subprocess.run([sys.executable, m.__file__, *TINY, *files(tmp_path)], capture_output=True, text=True, timeout=100)
    assert rows_of(tmp_path) == rows_of(folder) and table(done.stdout) == table(out) and "step/s" not in done.stderr


def test_the_report_needs_rows_alone(undisturbed, tmp_path, capsys):
    folder, out = undisturbed
    arguments = [str(folder / "rows.jsonl"), "--search-seeds", "7", "--figure", str(tmp_path / "figure.png")]
    assert reports.main(arguments) == 0
    found = capsys.readouterr().out
    for line in table(out).split("  ok ")[0].splitlines():
        assert line in found
    assert len(list(tmp_path.iterdir())) == 3


def test_missing_cells_are_shown_as_missing(capsys):
    """One width of one system is not there: – in its place, with the paper's value where the paper has one."""
    rows = [reports.example_row("rebased", 0, 0.01, 0.97), reports.example_row("rebased", 0, 0.01, 0.5, d=128),
            reports.example_row("based", 0, 0.01, 0.99)]
    reports.print_grid(rows, ())
    lines = capsys.readouterr().out.splitlines()
    rebased, based = (next(line for line in lines if line.startswith(name + " ")) for name in ("ReBased", "Based"))
    assert "0.970 ± 0.000 (1) [1.00]" in rebased and "0.500 ± 0.000 (1) [1.00]" in rebased
    assert based.endswith("– [1.00]") and "T = 128, d = 64: ReBased 0.970, behind Based 0.990." in lines


def test_a_diverged_run_is_a_row(tmp_path):
    """A loss that is not a number ends the run; the sweep goes on."""
    arguments = [*TINY, *files(tmp_path), "--learning-rates", "1e30", "--search-seeds", "--mixers", "based", "--seeds", "0"]
    assert m.main(arguments) == 0
    (row,) = rows_of(tmp_path).values()
    assert row["accuracies"] == [row["accuracy"]] and math.isnan(row["losses"][0])  # one epoch of three


def test_broken_rows_are_named(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"mixer": "rebased"}\n')
    for call in (lambda: m.main([*TINY, *files(tmp_path)]), lambda: reports.main([str(tmp_path / "rows.jsonl")]),
                 lambda: reports.main([str(tmp_path / "none.jsonl")])):
        with pytest.raises(SystemExit) as stop:
            call()
        assert stop.value.code == 2
        assert re.search("line 1 is not a row|is no file of rows", capsys.readouterr().err.splitlines()[-1])
