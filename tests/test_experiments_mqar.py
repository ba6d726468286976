"""The specification of experiments/mqar.py and sweep.py: training in epochs, grids, nothing lost or repeated."""

import contextlib
import io
import json
import math
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_04_train_mqar import adamw, answers

from experiments import mqar, mqar_report, sweep
from rebased import files, kernels, lesson, linear_attention, model, train_mqar, workers

ROOT = Path(__file__).resolve().parent.parent
TINY = [
    *("--mixers", "rebased", "conv_attention", "--seeds", "0", "1", "--search-seeds", "7"),
    *("--learning-rates", "0.003", "0.01", "--lengths", "32", "--pairs", "4", "--test-lengths", "32", "64"),
    *("--test-examples", "8", "--batch", "4", "--epochs", "3", "--softmax-epochs", "3", "--examples", "80"),
    *("--workers", "1"),
]


def run_here(work, runs, steps_of, processes, keep):
    """As workers.run_all, one after the other in this process: to start others takes longer than these runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for run in runs:
        keep(run, pickle.loads(pickle.dumps(work))(run, lambda steps, loss, accuracy: None))
    torch.set_num_threads(threads)


@pytest.fixture
def in_process(monkeypatch):
    monkeypatch.setattr(workers, "run_all", run_here)
    monkeypatch.setattr(lesson, "new_figure", lambda width, height: None)


# Checkpoints and shards
def test_checkpoints_are_whole(tmp_path):
    """What is saved comes back; a broken file counts as none; a finished run leaves nothing behind."""
    path = sweep.checkpoint_path(tmp_path / "rows.jsonl", "a run")
    assert sweep.load_checkpoint(path) is None
    files.save_tensors(path, {"weights": torch.arange(3), "epoch": 2})
    assert sweep.load_checkpoint(path)["epoch"] == 2 and sweep.load_checkpoint(path)["weights"].tolist() == [0, 1, 2]
    path.write_bytes(path.read_bytes()[:100])
    assert sweep.load_checkpoint(path) is None
    sweep.remove_checkpoint(path)
    assert not any(tmp_path.iterdir())


def test_shards_are_a_partition():
    """All shards together are all runs, none twice; and a cell is never divided."""
    items = list(range(17))
    for n in range(1, 20):
        assert sorted(sum((sweep.shard(items, (i, n)) for i in range(1, n + 1)), [])) == items
    experiment = mqar.Experiment(**mqar.PRESETS["paper"])
    whole = mqar.planned_runs(experiment, experiment.seeds)
    parts = [mqar.planned_runs(experiment, experiment.seeds, (i, 8)) for i in range(1, 9)]
    assert sorted(map(str, sum(parts, []))) == sorted(map(str, whole))
    cells = [{run.cell for run in part} for part in parts]
    assert len(set.union(*cells)) == sum(map(len, cells)) == 7 * 20


# The models and forms of a preset
def test_the_paper_preset_is_the_papers():
    """The models have the counts of Table 6, the runs are 7 systems × 20 cells × 4 rates × 5 seeds."""
    experiment = mqar.Experiment(**mqar.PRESETS["paper"])
    for mixer, length, count in (
        ("based", 256, 577_984),
        ("rebased", 256, 578_752),
        ("attention", 1024, 623_744),
        ("conv_attention", 512, 578_752),
        ("mamba", 1024, 655_360),
        ("rwkv", 1024, 623_872),
    ):
        config = mqar.model_config(mqar.Run(mixer, length, 16, 64, 0.001, 0), experiment)
        assert model.count_parameters(config) == count, mixer
    assert len(mqar.planned_runs(experiment, experiment.seeds)) == 7 * 20 * 4 * 5


def test_the_chunked_form_equals_the_quadratic_one():
    """An untrained model at 600 tokens: both forms of its last layer give the same outputs."""
    torch.manual_seed(0)
    experiment, run = mqar.Experiment(test_lengths=(600,)), mqar.Run("rebased", 128, 16, 64, 0.01, 0)
    found = mqar.full_pass(model.LanguageModel(mqar.model_config(run, experiment)), run, experiment)
    assert found["difference"] < 1e-4, found


def test_the_overlap_by_a_slow_reading():
    """Sets of places, the three of the right pair taken as one."""
    inputs, labels = train_mqar.make_mqar(5, 64, 8, 64, seed=0)
    positions, hits, union = train_mqar.query_positions(labels), 0, 0
    weights = torch.rand(5, 8, 64) ** 4
    for b in range(5):
        for i, at in enumerate(positions[b].tolist()):
            key = inputs[b, :16:2].tolist().index(inputs[b, at].item()) * 2
            row = weights[b, i].tolist()
            attended = {"right" if key <= t <= key + 2 else t for t in range(64) if row[t] >= max(row) / 2}
            hits, union = hits + len(attended & {"right"}), union + len(attended | {"right"})
    assert mqar.overlap(weights, inputs, positions, 16) == (hits, union) and 0 < hits < union


# Training
def small(**changes):
    """Two pairs in 16 tokens: learned in seconds."""
    fields = dict(lengths=(16,), pairs=(2,), d_models=(32,), vocab_size=16, examples=1600, epochs=6, batch=32)
    return mqar.Experiment(**fields | dict(test_lengths=(16,), test_examples=64) | changes)


def test_training_learns():
    """The loss falls far below that of guessing; every epoch leaves its accuracy, and its γ and β."""
    experiment, run, reports = small(), mqar.Run("rebased", 16, 2, 32, 0.01, 0), []
    trained, history = mqar.train(run, experiment, report=lambda *news: reports.append(news))
    assert reports[-1][0] == 300 and history["losses"][-1] < 0.3 * math.log(8)
    assert len(history["accuracies"]) == 6 and len(history["placed"]["gamma_q"]) == 7
    assert history["placed"]["gamma_q"][0] == [1, 0] and history["placed"]["gamma_q"][-1] != [1, 0]
    cell = mqar.test(trained, 16, 0.01, run, experiment)
    assert cell["accuracy"] == history["accuracies"][-1] > 0.9
    assert cell["right"] + cell["others"] + cell["filler"] <= 1 + 1e-5
    assert cell == cell | train_mqar.test_at(trained, small_run_of_04(), 16, "official")  # and what 04 measures


def small_run_of_04():
    return train_mqar.Run("rebased", 0, 0.01, 300, length=16, pairs=2, vocab_size=16, d_model=32, test_examples=64)


def test_a_run_ends_where_it_is_good_enough():
    _, history = mqar.train(mqar.Run("based", 16, 2, 32, 0.01, 0), small(stop_at=0.5))
    assert len(history["accuracies"]) < 6 and history["accuracies"][-1] > 0.5 >= max([0, *history["accuracies"][:-1]])


PAPERS_WAY = {"fresh": False, "dropout": 0.1, "rate_by_epoch": True}


@pytest.mark.parametrize("changes", [{}, PAPERS_WAY], ids=["laptop", "paper"])
def test_a_run_that_is_cut_ends_as_one_that_is_not(tmp_path, changes):
    """Stopped in its fourth epoch of 15 steps and started again: the same weights and history, bit for bit."""
    run, checkpoint = mqar.Run("conv_attention", 16, 2, 32, 0.01, 0), tmp_path / "run.pt"
    experiment = small(softmax_epochs=6, examples=480, **changes)
    whole, history = mqar.train(run, experiment)

    def cut(steps, loss, accuracy):
        if steps > 45:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mqar.train(run, experiment, "cpu", checkpoint, cut)
    seen = []
    again, continued = mqar.train(run, experiment, "cpu", checkpoint, lambda steps, *_: seen.append(steps))
    assert min(seen) > 45 and continued == history
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_the_papers_schedule_is_the_papers():
    """A cosine that takes a step after each of 64 epochs; no warm-up; 195 whole batches of 512 in 100,000 examples."""
    experiment, run = mqar.Experiment(**mqar.PRESETS["paper"]), mqar.Run("rebased", 128, 16, 64, 0.003, 42)
    rates = [mqar.learning_rate(step, run, experiment) for step in range(64 * 195)]
    assert rates[:195] == [0.003] * 195 and len(set(rates)) == 64 and rates[195] < 0.003
    assert rates[-1] == pytest.approx(0.003 * (1 + math.cos(math.pi * 63 / 64)) / 2)
    batches = mqar.epoch_batches(run, mqar.Experiment(examples=1000, batch=300, fresh=False), 0)
    assert [len(inputs) for inputs, _ in batches] == [300] * 3


def test_epochs_are_other_orders_or_other_examples():
    run = mqar.Run("rebased", 16, 2, 32, 0.01, 0)
    for fresh in (True, False):
        epochs = [torch.cat([x for x, _ in mqar.epoch_batches(run, small(fresh=fresh), e)]) for e in (0, 0, 1)]
        first, again, other = epochs
        assert torch.equal(first, again) and not torch.equal(first, other)
        assert torch.equal(first.unique(dim=0), other.unique(dim=0)) != fresh


def test_no_two_runs_or_epochs_or_tests_have_one_seed():
    """Also those that did before (0 in its second epoch and 1000 in its first): seeds are digits of one number."""
    seeds = [0, 1, 1000, 2**19, mqar.SEEDS - 1]
    epochs = [0, 1, 2, 1000, mqar.EPOCHS - 1]
    runs = [mqar.Run("rebased", 128, 16, 64, 0.01, seed) for seed in seeds]
    used = [mqar.epoch_seed(run, epoch) for run in runs for epoch in epochs]
    assert len(set(used)) == len(seeds) * len(epochs) and 0 <= min(used) and max(used) < mqar.TEST_SEED
    assert mqar.TEST_SEED != mqar.FIXED_SEED < 2**32


# The same by hand
@pytest.fixture
def in_float64():
    """New models have parameters of float64, so that two ways to train one agree in many digits."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


BY_HAND = {
    "fresh examples": ("rebased", {}),
    "fresh examples, softmax": ("conv_attention", {"softmax_warmup": 7, "warmup": 30}),
    "the same examples": ("rebased", {"fresh": False, "warmup": 7, "softmax_warmup": 30}),
    "the rate by epoch": ("conv_attention", {"rate_by_epoch": True, "softmax_warmup": 0}),
}


@pytest.mark.parametrize("mixer, changes", BY_HAND.values(), ids=BY_HAND)
def test_training_by_hand(in_float64, mixer, changes):
    """Three epochs of 25 steps by formulas, in the order that the seeds give: the same weights and history."""
    experiment = small(examples=103, batch=4, epochs=3, softmax_epochs=3, **{"stop_at": 2.0, "warmup": 0} | changes)
    run = mqar.Run(mixer, 16, 2, 32, 0.01, 5)
    trained, history = mqar.train(run, experiment)
    torch.manual_seed(5)
    by_hand = model.LanguageModel(model.recall_config(mixer, 16, 32))
    tests = train_mqar.make_mqar(64, 16, 2, 16, 0.01, seed=2**31)
    warmup = changes.get("softmax_warmup", 100) if mixer == "conv_attention" else changes.get("warmup", 0)
    moments, losses, accuracies = {}, [], []
    for epoch in range(3):
        seed = 5 + 2**20 * epoch
        inputs, labels = train_mqar.make_mqar(103, 16, 2, 16, 0.01, seed=seed if experiment.fresh else 2**31 + 42)
        if not experiment.fresh:
            order = torch.randperm(103, generator=torch.Generator().manual_seed(seed))
            inputs, labels = inputs[order], labels[order]
        for i in range(25):
            step = 25 * epoch + i
            by_hand.zero_grad()
            loss, _ = answers(by_hand, inputs[4 * i : 4 * i + 4], labels[4 * i : 4 * i + 4])
            loss.backward()
            progress = epoch / 3 if experiment.rate_by_epoch else step / 75
            rate = 0.01 * min(1, (step + 1) / (warmup + 1)) * (1 + math.cos(math.pi * progress)) / 2
            adamw(list(by_hand.parameters()), moments, step + 1, rate)
            losses.append(loss.item())
        accuracies.append(answers(by_hand, *tests)[1])
    assert history["accuracies"] == pytest.approx(accuracies)
    assert history["losses"] == pytest.approx([sum(losses[i + 5 : i + 25]) / 20 for i in (0, 25, 50)], rel=1e-4)
    for found, expected in zip(trained.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_dropout_is_for_training_alone(monkeypatch):
    """On in every epoch, off where the accuracy is measured."""
    modes = []
    step = train_mqar.training_step

    def watched(trained, *rest):
        modes.append(trained.training)
        return step(trained, *rest)

    def measured(trained, *rest):
        modes.append(trained.training)
        return accuracy_of(trained, *rest)

    accuracy_of = mqar.accuracy
    monkeypatch.setattr(train_mqar, "training_step", watched)
    monkeypatch.setattr(mqar, "accuracy", measured)
    run = mqar.Run("conv_attention", 16, 2, 32, 0.01, 0)
    experiment = small(dropout=0.5, softmax_epochs=2, examples=320, stop_at=2.0)
    trained, history = mqar.train(run, experiment)
    assert modes == 2 * (10 * [True] + [False]) and not trained.training
    _, accuracy = answers(trained, *train_mqar.make_mqar(64, 16, 2, 16, 0.01, seed=2**31))
    assert history["accuracies"][-1] == pytest.approx(accuracy)


@torch.no_grad()
@pytest.mark.parametrize("length, examples", [(48, 12), (8192, 3)])
@pytest.mark.parametrize("power_a", [0.01, 1.0])
def test_a_test_by_hand(length, examples, power_a):
    """Accuracy, shares and IoU of two heads, query by query."""
    torch.manual_seed(0)
    experiment = small(heads=2, test_examples=12)
    run = mqar.Run("based", 16, 2, 32, 0.01, 0)
    untrained = model.LanguageModel(mqar.model_config(run, experiment)).eval()
    found = mqar.test(untrained, length, power_a, run, experiment)
    inputs, labels = train_mqar.make_mqar(examples, length, 2, 16, power_a, seed=2**31)
    places = torch.stack([(row != -100).nonzero().flatten() for row in labels])
    _, weights = untrained.logits_at(inputs, places, return_weights=True)
    sums, hits, union = [0.0, 0.0, 0.0], 0, 0
    for tokens, asked, of_queries in zip(inputs.tolist(), places.tolist(), weights.mean(1).tolist(), strict=True):
        for at, row in zip(asked, of_queries, strict=True):
            key = tokens[:4:2].index(tokens[at]) * 2
            for t, weight in enumerate(row):
                kind = 0 if key <= t <= key + 2 else 1 if t < 4 else 2 if tokens[t] == 0 else None
                if kind is not None:
                    sums[kind] += weight
            least = max(row) / 2
            attended = {"right" if key <= t <= key + 2 else t for t, weight in enumerate(row) if weight >= least}
            hits += len(attended & {"right"})
            union += len(attended | {"right"})
    expected = dict(zip(("right", "others", "filler"), [total / (2 * examples) for total in sums], strict=True))
    expected |= {"accuracy": answers(untrained, inputs, labels)[1], "iou": hits / union}
    assert found == pytest.approx(expected, rel=1e-4)
    picture = mqar.look(untrained, run, small(heads=2, test_examples=12))
    tokens, labels = train_mqar.make_mqar(12, 16, 2, 16, 0.01, seed=2**31)
    row = tokens[0].tolist()
    asked = [t for t in range(16) if labels[0, t] != -100]
    assert picture["right"] == [row[:4:2].index(row[t]) * 2 + 1 for t in asked]
    _, weights = untrained.logits_at(tokens[:1], torch.tensor([asked]), return_weights=True)
    assert picture["weights"] == [pytest.approx(of_query, rel=5e-3) for of_query in weights.mean(1)[0].tolist()]


def test_gamma_and_beta_are_read_as_mean_and_spread():
    """Of all entries of the last layer's kernel: 1, 2 and 6 have mean 3 and spread √(14/3)."""
    untrained = model.LanguageModel(model.ModelConfig(("based", "rebased"), 20, 3, feature_dim=3))
    with torch.no_grad():
        for i, parameter in enumerate(("gamma_q", "gamma_k", "beta_q", "beta_k")):
            getattr(untrained.blocks[-1].mixer.kernel, parameter).copy_(torch.tensor([1.0, 2.0, 6.0]) + i)
    history = mqar.placed(untrained, {"beta_k": [[7, 7]]})
    for i, parameter in enumerate(("gamma_q", "gamma_k", "beta_q", "beta_k")):
        assert history[parameter][-1] == pytest.approx([3 + i, math.sqrt(14 / 3)])
    assert history["beta_k"][0] == [7, 7]


def test_a_row_says_what_was_measured(monkeypatch, tmp_path):
    """The best epoch; each cell under its own name; the picture and the timing of the first seed alone."""
    history = {"losses": [3.0, 2.0, 1.0], "accuracies": [0.2, 0.9, 0.4], "placed": {}}
    untrained = model.LanguageModel(model.recall_config("based", 16, 32))
    monkeypatch.setattr(mqar, "train", lambda *_: (untrained, history))
    monkeypatch.setattr(mqar, "test", lambda trained, length, power_a, *_: [length, power_a])
    monkeypatch.setattr(mqar, "look", lambda *_: "picture")
    monkeypatch.setattr(mqar, "full_pass", lambda *_: "timing")
    experiment = small(test_lengths=(16, 64), seeds=(3, 4))
    rows = []
    for seed in (3, 4):
        rows.append(mqar.perform(mqar.Run("based", 16, 2, 32, 0.01, seed), None, experiment, "search", tmp_path / "x"))
    first, second = rows
    assert first["accuracy"] == 0.9 and first["accuracies"] == [0.2, 0.9, 0.4] and first["role"] == "search"
    assert first["cells"] == {"16 official": [16, 0.01], "16 uniform": [16, 1.0],
                              "64 official": [64, 0.01], "64 uniform": [64, 1.0]}
    assert (first["picture"], first["full_pass"]) == ("picture", "timing")
    assert (second["picture"], second["full_pass"]) == (None, None)


def test_seconds_belong_to_their_form(monkeypatch):
    """The chunked form runs first."""
    clock = iter([1.0, 3.0, 10.0])
    monkeypatch.setattr(mqar, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    run, experiment = mqar.Run("rebased", 16, 2, 32, 0.01, 0), small(test_lengths=(40,))
    found = mqar.full_pass(model.LanguageModel(mqar.model_config(run, experiment)), run, experiment)
    assert (found["length"], found["chunked_seconds"], found["quadratic_seconds"]) == (40, 2.0, 7.0)


def test_a_checkpoint_belongs_to_one_run_of_one_sweep(tmp_path):
    """Another run, role or setting has a checkpoint of its own."""
    runs = [mqar.Run("based", 16, 2, 32, rate, seed) for rate in (0.01, 0.1) for seed in (0, 1)]
    sweeps = [(small(), "search"), (small(), "report"), (small(epochs=7), "report")]
    paths = {mqar.checkpoint_of(run, experiment, role, tmp_path) for run in runs for experiment, role in sweeps}
    assert len(paths) == len(runs) * len(sweeps)


def test_a_row_counts_for_its_own_settings_and_role(tmp_path):
    run = mqar.Run("based", 16, 2, 32, 0.01, 0)
    row = {"mixer": "based", "length": 16, "pairs": 2, "d_model": 32, "learning_rate": 0.01, "seed": 0, "cells": {}}
    for i, (role, experiment) in enumerate([("search", small()), ("report", small(epochs=7)), ("report", small())]):
        files.append_row(tmp_path / "rows.jsonl", row | {"role": role, "settings": mqar.settings(experiment), "i": i})
    for i, (role, experiment) in enumerate([("search", small()), ("report", small(epochs=7)), ("report", small())]):
        assert mqar.finished(tmp_path / "rows.jsonl", experiment, role)[run]["i"] == i
    assert mqar.finished(tmp_path / "rows.jsonl", small(epochs=8), "report") == {}


def test_the_rate_that_the_search_liked_is_reported(monkeypatch, tmp_path):
    """.01 for one mixer and .1 for the other, for every seed, and no other rate."""
    planned = []

    def made_up(runs, experiment, role, *_):
        planned.extend((role, run) for run in runs)
        good = {"based": 0.01, "rebased": 0.1}
        return [{"mixer": run.mixer, "length": 16, "pairs": 2, "d_model": 32, "role": role, "seed": run.seed,
                 "learning_rate": run.learning_rate, "cells": {"16 official": {}},
                 "accuracy": 0.9 if run.learning_rate == good[run.mixer] else 0.2} for run in runs]

    monkeypatch.setattr(mqar, "perform_missing", made_up)
    experiment = small(mixers=("based", "rebased"), seeds=(0, 1), search_seeds=(7,), learning_rates=(0.01, 0.1))
    mqar.perform_sweep(experiment, tmp_path / "x", 1, (1, 1), {})
    searched = [(run.mixer, run.learning_rate, run.seed) for role, run in planned if role == "search"]
    reported = [(run.mixer, run.learning_rate, run.seed) for role, run in planned if role == "report"]
    assert searched == [("based", 0.01, 7), ("based", 0.1, 7), ("rebased", 0.01, 7), ("rebased", 0.1, 7)]
    assert reported == [("based", 0.01, 0), ("rebased", 0.1, 0), ("based", 0.01, 1), ("rebased", 0.1, 1)]


def test_dropout_of_the_papers_models():
    """.1 of the embedding and of softmax's weights; Mamba's embedding has none. None at all where none is set."""
    experiment = mqar.Experiment(**mqar.PRESETS["paper"])
    for mixer in mqar.SEVEN:
        run = mqar.Run(mixer, 128, 16, 64, 0.001, 42)
        config = mqar.model_config(run, experiment)
        assert (config.dropout, config.attention_dropout) == (0.0 if mixer == "mamba" else 0.1, 0.1)
        assert config.heads == (12 if mixer in kernels.KERNELS else 1)
        config = mqar.model_config(run, mqar.Experiment(**mqar.PRESETS["laptop"]))
        assert (config.dropout, config.attention_dropout) == (0, 0)


def test_softmax_has_its_own_epochs_and_steps():
    experiment = small(epochs=2, softmax_epochs=5, examples=320)
    steps = {mixer: mqar.total_steps(mqar.Run(mixer, 16, 2, 32, 0.01, 0), experiment) for mixer in mqar.SEVEN}
    assert steps == {mixer: 50 if "attention" in mixer else 20 for mixer in mqar.SEVEN}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--learning-rates", "-0.1"], "must be above 0"),
        (["--learning-rates", "fast"], "is not a number"),
        (["--mixers", "rebasd"], "unknown mixer 'rebasd'"),
        (["--pairs", "40"], "need 4·40 = 160 places"),
        (["--pairs", "8", "16"], "one value for each length: 1, got 2"),
        (["--preset", "laptop", "--lengths", "64", "128"], "one value for each length: 2, got 1"),
        (["--seeds", "100", "--search-seeds", "100"], "must not be among --seeds"),
        (["--shard", "3/2"], "is not i/n"),
        (["--model", "papers"], "recall or paper"),
        (["--model", "paper"], "--test-lengths need"),
        (["--preset", "papr"], "invalid choice"),
        (["--examples", "10"], "has no batch of 32"),
        (["--dropout", "1.0"], "must lie in [0, 1)"),
        (["--init", "narrow"], "init 'paper' or 'wide'"),
        (["--seeds"], "--seeds needs at least one value"),
        (["--vocab-size", "20"], "vocabulary of 34"),
        (["--mixers", "x2"], "no learning rate is known for x2"),
        (["--output", "/dev/null/rows.jsonl"], "cannot write"),
        (["--figure", "/dev/null/x.png"], "cannot write"),
        (["--figure", "x.txt"], "x.txt is no figure's name"),
        (["--figure", "x" * 248 + ".png"], "File name too long"),  # with _attention
        (["--seeds", "-1"], "at least 0"),
        (["--seeds", "9" * 20], "a seed must be below 1048576"),
        (["--search-seeds", str(2**20)], "a seed must be below 1048576"),
        (["--epochs", "0"], "at least 1"),
        (["--epochs", "2048"], "--epochs must be below 2048"),
        (["--heads", "-1"], "at least 0"),
        (["--workers", "0"], "at least 1"),
        (["--mixers", "conv_attention", "--heads", "5"], "5 heads do not fit"),
    ],
)
def test_impossible_settings_are_named(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(mqar, "perform_sweep", None)  # not even begun
    with pytest.raises(SystemExit) as stop:
        mqar.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("arguments, message", [
    ([], "cannot write runs/mqar_grid.jsonl: File exists; choose another path (--output, --figure)"),
    (["--preset", "ladder"], "cannot write runs/mqar_ladder.jsonl: File exists"),
    (["--output", "n.jsonl"], "cannot write n.png: Is a directory; choose another path"),
    (["--output", "m.jsonl"], "cannot write m_attention.png: Is a directory"),
    (["--output", "o.jsonl"], "cannot write o_gamma_beta.png: Is a directory"),
    (["--output", "m.png", "--figure", "m.png"], "m_attention.png: Is a directory"),
    (["--output", "rows.png"], "--output and --figure are both rows.png; rows need a file of theirs"),
    (["--output", "rows.png", "--figure", "./rows.png"], "--output and --figure are both rows.png"),
    (["--output", "x" * 245 + ".jsonl"], "File name too long"),
])
def test_derived_names_that_cannot_be_written_are_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    """Names that nobody typed: the default file in `runs`, a figure beside the rows, figures beside a figure."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mqar, "perform_sweep", None)  # not even begun
    (tmp_path / "runs").write_bytes(b"a file")
    for folder in ("n.png", "m_attention.png", "o_gamma_beta.png"):
        (tmp_path / folder).mkdir()
    with pytest.raises(SystemExit) as stop:
        mqar.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_what_is_named_twice_runs_once():
    twice = mqar.Experiment(mixers=("based", "based"), lengths=(64, 64), pairs=(8, 8), learning_rates=(0.01, 0.01))
    assert mqar.planned_runs(twice, (0, 0)) == [mqar.Run("based", 64, 8, 64, 0.01, 0)]
    assert mqar.planned_runs(twice, (0,), part=(2, 2)) == []


def test_the_committed_rows_are_those_of_their_presets():
    """Their settings are recognised; the search is complete and chose LEARNING_RATES; its seeds are not reported."""
    ladder = mqar.Experiment(**mqar.PRESETS["ladder"])
    rows = mqar_report.read([ROOT / "results" / "mqar_ladder.jsonl"])
    assert set(ladder.search_seeds).isdisjoint((*ladder.seeds, *mqar.Experiment().seeds))
    assert all(row["settings"] == mqar.settings(ladder) == mqar.settings(mqar.Experiment()) for row in rows)
    rates = {mixer: rate for (mixer, *_), rate in mqar_report.best_rates(rows).items()}
    assert mqar.LEARNING_RATES == {mixer: rates[mixer] for mixer in mqar.LEARNING_RATES}
    for name, number in (("ladder", 187), ("laptop", 189)):
        experiment, path = mqar.Experiment(**mqar.PRESETS[name]), ROOT / "results" / f"mqar_{name}.jsonl"
        searched = mqar.finished(path, experiment, "search")
        reported = mqar.finished(path, experiment, "report")
        assert set(searched) == set(mqar.planned_runs(experiment, experiment.search_seeds))
        chosen = mqar_report.best_rates(list(searched.values()))
        assert set(reported) == set(mqar.planned_runs(experiment, experiment.seeds, chosen=chosen))
        assert len(searched) + len(reported) == number
        assert {run.seed for run in searched} == {100, 101} and {run.seed for run in reported} == set(range(5))


# Sweeps
def where(folder):
    return ["--output", str(folder / "rows.jsonl"), "--figure", str(folder / "figure.png")]


def table(text):
    """What a program printed, without times and the bar."""
    text = re.sub(r"Linear time: .*\n.*|.* minutes; rows: .*|figure: .*|.*runs are there already.*", "", text)
    return "\n".join(line for line in text[text.index("Trained at") :].splitlines() if line)


def rows_of(folder):
    """The rows by run, without times, dates and the like."""
    varying = {"seconds", "train_seconds", "full_pass", "date", "commit", "command", "hardware"}
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(varying <= set(row) for row in rows)
    keyed = {}
    for row in rows:
        run = row["mixer"], row["learning_rate"], row["seed"]
        assert run not in keyed, "a run was repeated"
        keyed[run] = {k: row[k] for k in row.keys() - varying}
    return keyed


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A sweep that nothing interrupts: the folder and what was printed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(workers, "run_all", run_here)
        patch.setattr(lesson, "new_figure", lambda width, height: None)
        mqar.main([*TINY, *where(folder)])
    return folder, out.getvalue()


def test_a_sweep_searches_and_then_reports(undisturbed):
    """Two rates for the search seed, one for the others; tables; no checkpoint left."""
    folder, out = undisturbed
    rows = rows_of(folder)
    assert len(rows) == 2 * (2 + 2)
    assert len({rate for mixer, rate, seed in rows if mixer == "rebased" and seed != 7}) == 1
    assert all(row["role"] == ("search" if seed == 7 else "report") for (_, _, seed), row in rows.items())
    assert all(len(row["accuracies"]) == 3 and len(row["placed"].get("beta_k", [0] * 4)) == 4 for row in rows.values())
    assert "conv + softmax" in out and "± " in out and "*" in out
    assert {path.name for path in folder.iterdir()} == {"rows.jsonl"}


def test_a_lost_and_a_torn_row_run_again(undisturbed, tmp_path, capsys, in_process):
    """Two runs of eight are repeated, to the same numbers; the table is the same."""
    folder, out = undisturbed
    lines = (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    kept = "".join(lines[:2] + lines[4:]) + lines[2][: len(lines[2]) // 2]
    (tmp_path / "rows.jsonl").write_text(kept, encoding="utf-8")
    mqar.main([*TINY, *where(tmp_path)])
    again = capsys.readouterr().out
    assert "2 of 4 runs are there already" in again and "4 of 4 runs are there already" in again
    assert rows_of(tmp_path) == rows_of(folder) and table(again) == table(out)


def test_shards_together_are_the_whole(undisturbed, tmp_path, capsys, in_process, monkeypatch):
    """Two machines, one after the other; their files joined, one of them twice, give the same table and run nothing."""
    folder, out = undisturbed
    joined = b""
    for i in (1, 2):
        part = tmp_path / str(i)
        part.mkdir()
        mqar.main([*TINY, *where(part), "--shard", f"{i}/2"])
        assert len(rows_of(part)) == 4
        joined += (part / "rows.jsonl").read_bytes()
    (tmp_path / "rows.jsonl").write_bytes(joined)
    assert rows_of(tmp_path) == rows_of(folder)
    (tmp_path / "rows.jsonl").write_bytes(joined + (tmp_path / "1" / "rows.jsonl").read_bytes())
    monkeypatch.setattr(workers, "run_all", None)
    capsys.readouterr()
    mqar.main([*TINY, *where(tmp_path)])
    assert table(capsys.readouterr().out) == table(out)


def test_a_checkpoint_whose_run_has_its_row_is_removed(undisturbed, tmp_path, in_process, monkeypatch):
    """A kill between the row and the end of its checkpoint leaves that behind; the next sweep takes it away."""
    folder, _ = undisturbed
    (tmp_path / "rows.jsonl").write_bytes((folder / "rows.jsonl").read_bytes())
    options = mqar.make_parser().parse_args(TINY)
    experiment = mqar.make_experiment(options, None)
    run = next(iter(mqar.finished(tmp_path / "rows.jsonl", experiment, "report")))
    left = mqar.checkpoint_of(run, experiment, "report", tmp_path / "rows.jsonl")
    files.save_tensors(left, {"model": {}})
    monkeypatch.setattr(workers, "run_all", None)
    mqar.main([*TINY, *where(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl"}


def test_a_shard_without_a_cell_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        mqar.main([*TINY, *where(tmp_path), "--shard", "3/3"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: --shard 3/3 has nothing to do: there are fewer cells than shards\n"


def test_the_report_needs_rows_alone(undisturbed, tmp_path, capsys, in_process):
    """The very table, with nothing said but the file's name."""
    folder, out = undisturbed
    mqar_report.main([str(folder / "rows.jsonl"), "--figure", str(tmp_path / "figure.png")])
    found = capsys.readouterr().out
    for line in table(out).splitlines():
        assert line in found


def test_a_diverged_run_is_a_row(tmp_path, in_process):
    """A loss that is not a number ends the run; the sweep goes on."""
    changes = ["--learning-rates", "1e30", "--search-seeds", "--mixers", "based", "--seeds", "0"]
    mqar.main([*TINY, *where(tmp_path), *changes])
    (row,) = rows_of(tmp_path).values()
    assert row["accuracies"] == [row["accuracy"]] and math.isnan(row["losses"][0])  # one epoch of three


def test_a_seed_that_was_reported_is_still_searched(tmp_path, in_process, capsys):
    """A row counts for the part it played: as a search it is run once more."""
    common = [*TINY, *where(tmp_path), "--mixers", "based", "--epochs", "1"]
    mqar.main([*common, "--seeds", "7", "--search-seeds", "--learning-rates", "0.01"])
    mqar.main([*common, "--seeds", "0"])
    roles = [(row["role"], row["seed"]) for row in files.read_rows(tmp_path / "rows.jsonl")]
    assert roles == [("report", 7), ("search", 7), ("search", 7), ("report", 0)]


def test_broken_rows_are_named(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"mixer": "rebased"}\n', encoding="utf-8")
    (tmp_path / "torn.jsonl").write_text("no row\n", encoding="utf-8")
    for call in (
        lambda: mqar.main([*TINY, *where(tmp_path)]),
        lambda: mqar_report.main([str(tmp_path / "rows.jsonl")]),
        lambda: mqar_report.main([str(tmp_path / "torn.jsonl")]),
        lambda: mqar_report.main([str(tmp_path / "none.jsonl")]),
    ):
        with pytest.raises(SystemExit) as stop:
            call()
        assert stop.value.code == 2
        named = "line 1: the row has no 'seed'|line 1 is not a row|is no file of rows"
        assert re.search(named, capsys.readouterr().err.splitlines()[-1])


@pytest.mark.slow
def test_as_a_user_runs_it(undisturbed, tmp_path):
    """In processes of its own, by `python -m`: the same rows and table."""
    folder, out = undisturbed
    command = [sys.executable, "-m", "experiments.mqar", *TINY, *where(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert rows_of(tmp_path) == rows_of(folder) and table(done.stdout) == table(out)


@pytest.mark.slow
def test_kill_9_at_any_moment_changes_nothing(undisturbed, tmp_path):
    """Killed six times at random moments, then left alone: the same rows and table, byte for byte but for times."""
    folder, out = undisturbed
    moment, command = random.Random(0), [sys.executable, mqar.__file__, *TINY, *where(tmp_path)]
    for _ in range(6):
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        process = subprocess.Popen(command, start_new_session=True, **quiet)
        time.sleep(moment.uniform(3, 15))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert rows_of(tmp_path) == rows_of(folder) and table(done.stdout) == table(out)
    assert not list(tmp_path.glob("*.unfinished"))


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_finished(tmp_path):
    """One line, status 130, no worker left behind; the checkpoints wait beside the rows."""
    command = [sys.executable, mqar.__file__, *TINY, "--examples", "4000", *where(tmp_path)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, start_new_session=True, **pipes)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*.unfinished/*.pt")) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on from there" in err
    assert list(tmp_path.glob("*.unfinished/*.pt")) and "Traceback" not in out + err
    with pytest.raises(ProcessLookupError):  # in a moment the workers are gone
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.2)


# A kernel that a student adds
class SquaredCosine(kernels.Kernel):
    """cos²(q, k): the features of the square, of vectors of length 1. No polynomial of s, and no floor."""

    def features(self, x):
        return kernels.symmetric_products(torch.nn.functional.normalize(x, dim=-1))


def test_a_kernel_added_at_run_time_goes_all_the_way(monkeypatch, tmp_path, capsys):
    """One class and one line: every form, a training step, a run, its tests, and a report under its own name."""
    monkeypatch.setitem(kernels.KERNELS, "squared_cosine", SquaredCosine)

    kernel = SquaredCosine(5, heads=3)
    q, k, v = linear_attention.example(kernel, T=70)
    expected = linear_attention.quadratic_attention(q, k, v, kernel)
    for name in ("linear_attention", "recurrent_attention", "chunked_attention", "attention"):
        form = getattr(linear_attention, name)
        assert linear_attention.relative_error([form(q, k, v, kernel)], [expected]) < 1e-9, name

    trained = model.LanguageModel(model.recall_config("squared_cosine", 16, 32))
    optimizer = torch.optim.AdamW(trained.parameters(), lr=0.01)
    inputs, labels = train_mqar.make_mqar(8, 16, 2, 16)
    positions = train_mqar.query_positions(labels)
    before = [p.detach().clone() for p in trained.parameters()]
    loss, _ = train_mqar.training_step(trained, optimizer, inputs, positions, labels.gather(1, positions))
    assert loss.isfinite() and all(not torch.equal(a, b) for a, b in zip(before, trained.parameters(), strict=True))

    monkeypatch.setattr(workers, "run_all", run_here)
    mixers = ["--mixers", "squared_cosine", "rebased", "--seeds", "0", "--search-seeds", "--learning-rates", "0.01"]
    mqar.main([*TINY, *where(tmp_path), *mixers])
    out = capsys.readouterr().out
    figures = {path.name for path in tmp_path.glob("*.png")}
    assert figures == {"figure.png", "figure_attention.png", "figure_gamma_beta.png"}
    assert re.search(r"^squared_cosine +0.01", out, re.MULTILINE)


def test_more_workers_than_runs_and_no_gpu(monkeypatch):
    """The number of workers follows the cores that may be used."""
    assert workers.default_workers() == (torch.cuda.device_count() or lesson.usable_cores()) >= 1
