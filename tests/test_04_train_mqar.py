"""The specification of 04_train_mqar.py: the examples, the measures, training, the floor set to 0, the command line."""

import dataclasses
import math
import os
import random
import runpy
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_experiments_report import assert_drawn, line_of, said

from rebased import files, kernels, lesson, model, train_mqar

ROOT = Path(__file__).resolve().parent.parent
LESSON = ROOT / "04_train_mqar.py"


@pytest.mark.parametrize(
    "check",
    [
        train_mqar.check_a_dictionary_answers_every_query,
        train_mqar.check_the_same_pairs_meet_other_contexts,
        train_mqar.check_shares_are_shares,
    ],
    ids=lambda check: check.__name__,
)
def test_claims_of_the_lesson(check):
    check()


# The examples
@pytest.mark.parametrize(
    "n, T, K, V, a", [(200, 128, 16, 256, 0.01), (50, 64, 16, 8192, 1.0), (20, 512, 128, 300, 0.5), (3, 4, 1, 4, 0.01)]
)
def test_every_example_by_a_slow_reading(n, T, K, V, a):
    """A dictionary filled from the pairs answers every query; everything else is filler."""
    inputs, labels = train_mqar.make_mqar(n, T, K, V, a, seed=4)
    assert inputs.dtype == labels.dtype == torch.int64 and inputs.shape == labels.shape == (n, T)
    for tokens, targets in zip(inputs.tolist(), labels.tolist(), strict=True):
        memory = {}
        for t in range(0, 2 * K, 2):
            assert 1 <= tokens[t] < V // 2 <= tokens[t + 1] < V and tokens[t] not in memory
            memory[tokens[t]] = tokens[t + 1]
        assert len(set(memory.values())) == K
        asked = []
        for t in range(T):
            if targets[t] == -100:
                assert t < 2 * K or tokens[t] == 0
            else:
                assert t >= 2 * K and t % 2 == 0 and targets[t] == memory[tokens[t]]
                asked.append(tokens[t])
        assert sorted(asked) == sorted(memory)


def chi_square(counts, expected):
    return ((counts - expected) ** 2 / expected).sum().item()


@pytest.mark.parametrize("a", [0.01, 0.5, 1.0])
def test_slots_follow_the_power_law(a):
    """One pair, 31 slots, 100,000 draws: chi-square below the 99.99 % point of 30 degrees of freedom (67.6)."""
    inputs, labels = train_mqar.make_mqar(100_000, 64, 1, 64, a, seed=0)
    slots = (train_mqar.query_positions(labels)[:, 0] - 2) // 2
    p = torch.arange(1, 32, dtype=torch.float64) ** (a - 1)
    assert chi_square(torch.bincount(slots, minlength=31), 100_000 * p / p.sum()) < 67.6


def test_drawing_without_replacement_is_successive():
    """Two keys, three slots: the probability of each ordered pair of slots is p_i · p_j / (1 − p_i)."""
    n = 100_000
    inputs, labels = train_mqar.make_mqar(n, 10, 2, 64, 0.3, seed=0)
    slots = torch.stack([((inputs[:, 4:] == inputs[:, i : i + 1]).int().argmax(1)) // 2 for i in (0, 2)], 1)
    p = torch.arange(1, 4, dtype=torch.float64) ** (0.3 - 1)
    p = p / p.sum()
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
    counts = torch.tensor([((slots == torch.tensor(pair)).all(1)).sum() for pair in pairs])
    expected = torch.tensor([n * p[i] * p[j] / (1 - p[i]) for i, j in pairs])
    assert chi_square(counts, expected) < 25.7  # 99.99 % point, 5 degrees of freedom


@pytest.mark.parametrize("count, population", [(3, 20), (3, 5)])
def test_distinct_draws_are_uniform(count, population):
    """Equal rates: each ordered triple equally often, also across the blocks of a thousand rows."""
    generator = torch.Generator().manual_seed(0)
    drawn = train_mqar.draw_distinct(torch.ones(population), 120_000, count, generator)
    assert all(len(set(row)) == count for row in drawn[:1000].tolist())
    number = (drawn * torch.tensor([population**2, population, 1])).sum(1)
    counts = torch.bincount(number)
    counts = counts[counts > 0]
    triples = population * (population - 1) * (population - 2)
    assert len(counts) == triples
    spread = math.sqrt(2 * triples)
    assert abs(chi_square(counts, torch.tensor(120_000 / triples)) - triples) < 5 * spread


def test_all_slots_are_used_when_none_is_free():
    _, labels = train_mqar.make_mqar(10, 64, 16, 256, seed=0)
    assert torch.equal(train_mqar.query_positions(labels), torch.arange(32, 64, 2).expand(10, 16))


def test_seeds_make_the_examples():
    first, again, other = (train_mqar.make_mqar(100, 64, 8, 256, seed=s)[0] for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def pairs_of(seed, n=5000):
    inputs, _ = train_mqar.make_mqar(n, 64, 16, 256, seed=seed)
    return set(map(tuple, inputs[:, :32].tolist()))


def test_no_two_seeds_and_no_test_share_examples():
    """Also far apart and at the ends of what is allowed; and within a run no example comes twice."""
    sets = [pairs_of(seed) for seed in (0, 1, 1000, 2**20, 2**31 - 1, train_mqar.TEST_SEED)]
    assert all(len(examples) == 5000 for examples in sets)
    assert len(set.union(*sets)) == 5000 * len(sets)


def test_the_seeds_that_are_allowed_start_different_streams():
    """PyTorch's generator keeps 32 bits of its seed: that is why more are refused."""
    first, same = (torch.rand(3, generator=torch.Generator().manual_seed(s)) for s in (5, 5 + 2**32))
    assert torch.equal(first, same)
    for seed in (-1, 2**32, 2**63, 2**64):
        with pytest.raises(ValueError, match="at least 0 and below 2..32"):
            train_mqar.make_mqar(1, 64, 8, 256, seed=seed)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((10, 63, 16, 256), "need 4·16 = 64 places"),
        ((10, 64, 16, 32), "vocabulary of 34"),
        ((0, 64, 16, 256), "num_examples"),
        ((10, 64, 0, 256), "num_pairs"),
        ((10, 64, 4, 256, 0.0), "power_a"),
    ],
)
def test_impossible_tasks_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        train_mqar.make_mqar(*arguments)


# The measures
def test_shares_by_a_slow_reading():
    """Loops over places: key, value and the token after are right, other places before 2K others, zeros filler."""
    inputs, labels = train_mqar.make_mqar(5, 64, 8, 64, seed=0)
    positions = train_mqar.query_positions(labels)
    weights = torch.rand(5, 8, 64)
    found = torch.stack(train_mqar.attention_shares(weights, inputs, positions, 16), -1)
    for b in range(5):
        for i, at in enumerate(positions[b].tolist()):
            key = inputs[b, :16:2].tolist().index(inputs[b, at].item()) * 2
            sums = [0.0, 0.0, 0.0]
            for t in range(64):
                kind = 0 if key <= t <= key + 2 else 1 if t < 16 else 2 if inputs[b, t] == 0 else None
                if kind is not None:
                    sums[kind] += weights[b, i, t].item()
            assert found[b, i].tolist() == pytest.approx(sums, rel=1e-5)


# Training, and the floor set to 0
SMALL = dataclasses.replace(train_mqar.SMALL, test_lengths=(16, 256), test_examples=64)


@pytest.fixture(scope="module")
def row():
    """One small run of Based, and what it reported on the way."""
    reports = []
    row = train_mqar.run_one(SMALL, lambda *news: reports.append(news))
    return row, reports


def test_training_learns(row):
    """Far above guessing among eight values; the bar hears of it every 20 steps."""
    row, reports = row
    assert [steps for steps, _, _ in reports] == list(range(20, 301, 20))
    assert reports[-1][1] < 0.3 * math.log(8)
    assert row["cells"]["16 official"]["accuracy"] > 0.9
    for cell in row["cells"].values():
        assert 0 <= min(cell.values()) and cell["right"] + cell["others"] + cell["filler"] <= 1 + 1e-5


def test_the_floor_is_taken_out_of_the_same_weights(row):
    """Less filler at every length, more right answers far out; the model that is trained twice is the same."""
    row, _ = row
    assert row["mixer"] == "based" and row["role"] == "report" and row["steps"] == 300
    before, after = row["cells"], row["cells_without_floor"]
    assert before.keys() == after.keys()
    for cell in before:
        assert after[cell]["filler"] < before[cell]["filler"]
    assert after["256 uniform"]["accuracy"] > before["256 uniform"]["accuracy"]
    trained = train_mqar.train(dataclasses.replace(SMALL, steps=40))
    again = train_mqar.train(dataclasses.replace(SMALL, steps=40))
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), again.parameters(), strict=True))
    with_floor = train_mqar.test_at(trained, SMALL, 256, "uniform")
    train_mqar.kernel_of(trained).floor = 0.0
    assert train_mqar.test_at(trained, SMALL, 256, "uniform") != with_floor
    train_mqar.kernel_of(trained).floor = 0.5
    assert train_mqar.test_at(trained, SMALL, 256, "uniform") == with_floor


@pytest.fixture
def in_float64():
    """New models have parameters of float64, so that two ways to train one agree in many digits."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def adamw(weights, moments, step, rate, decay=0.1, betas=(0.9, 0.999)):
    """One update of a list of weights by their gradients, as written in Algorithm 2 of Loshchilov and Hutter,
    Decoupled Weight Decay Regularization, ICLR 2019. moments: {index: (first, second)}; step counts from 1."""
    for i, weight in enumerate(weights):
        first, second = moments.get(i, (0, 0))
        first = betas[0] * first + (1 - betas[0]) * weight.grad
        second = betas[1] * second + (1 - betas[1]) * weight.grad**2
        moments[i] = first, second
        mean = first / (1 - betas[0] ** step)
        size = (second / (1 - betas[1] ** step)).sqrt() + 1e-8
        weight.data = weight.data - rate * decay * weight.data - rate * mean / size


def answers(language_model, inputs, labels):
    """The mean −log p of the labels, and the share of them that is the likeliest token; through all logits."""
    logits = language_model(inputs)[labels != -100]
    asked = labels[labels != -100]
    loss = -logits.log_softmax(-1)[torch.arange(len(asked)), asked].mean()
    return loss, (logits.argmax(-1) == asked).double().mean().item()


@pytest.mark.parametrize("mixer, warmup", [("based", 0), ("conv_attention", 7)])
def test_training_by_hand(in_float64, mixer, warmup):
    """Twenty steps by formulas: the same weights, and what is reported on the way."""
    run = dataclasses.replace(SMALL, mixer=mixer, seed=5, steps=20, warmup=warmup, batch=4)
    reports = []
    trained = train_mqar.train(run, lambda *news: reports.append(news))
    torch.manual_seed(5)
    by_hand = model.LanguageModel(model.recall_config(mixer, 16, 32))
    inputs, labels = train_mqar.make_mqar(80, 16, 2, 16, 0.01, seed=5)
    moments = {}
    for step in range(20):
        batch = slice(4 * step, 4 * step + 4)
        by_hand.zero_grad()
        loss, accuracy = answers(by_hand, inputs[batch], labels[batch])
        loss.backward()
        rate = 0.01 * min(1, (step + 1) / (warmup + 1)) * (1 + math.cos(math.pi * step / 20)) / 2
        adamw(list(by_hand.parameters()), moments, step + 1, rate)
    assert reports == [(20, pytest.approx(loss.item(), rel=1e-6), pytest.approx(accuracy))]
    assert not trained.training
    for found, expected in zip(trained.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("length, examples", [(64, 12), (8192, 3)])
@pytest.mark.parametrize("placement, power_a", [("official", 0.01), ("uniform", 1.0)])
def test_a_test_by_hand(length, examples, placement, power_a):
    """The examples have a seed that no run can have; every query counts once; a quarter of them far out."""
    run = dataclasses.replace(SMALL, seed=0, test_examples=12)
    torch.manual_seed(0)
    untrained = model.LanguageModel(model.recall_config("based", 16, 32)).eval()
    found = train_mqar.test_at(untrained, run, length, placement)
    inputs, labels = train_mqar.make_mqar(examples, length, 2, 16, power_a, seed=2**31)
    _, accuracy = answers(untrained, inputs, labels)
    places = torch.stack([(row != -100).nonzero().flatten() for row in labels])
    _, weights = untrained.logits_at(inputs, places, return_weights=True)
    sums = {"right": 0.0, "others": 0.0, "filler": 0.0}
    for tokens, asked, of_queries in zip(inputs, places.tolist(), weights[:, 0].double(), strict=True):
        for at, row in zip(asked, of_queries, strict=True):
            key = tokens[:4:2].tolist().index(tokens[at].item()) * 2
            sums["right"] += row[key : key + 3].sum().item()
            sums["others"] += row[:4].sum().item() - row[key : min(key + 3, 4)].sum().item()
            sums["filler"] += row[4:][tokens[4:] == 0].sum().item()
            if key == 2 and tokens[4] == 0:  # the token after the last pair is filler, and right
                sums["filler"] -= row[4].item()
    expected = {name: total / (2 * examples) for name, total in sums.items()} | {"accuracy": accuracy}
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("mixer", ["rebased", "conv_attention"])
def test_without_a_floor_there_is_nothing_to_take_out(mixer):
    run = dataclasses.replace(SMALL, mixer=mixer, steps=2, test_lengths=(16,), test_examples=4)
    assert "cells_without_floor" not in train_mqar.run_one(run, lambda *news: None)


def test_the_learning_rate_warms_up_and_falls_to_nothing():
    run = train_mqar.Run("conv_attention", 0, 0.003, steps=2000, warmup=100)
    rates = [train_mqar.learning_rate(step, run) for step in range(2000)]
    assert rates[0] < 0.003 / 100 and max(rates) == max(rates[95:105]) and rates[-1] < 1e-8
    assert rates[1000] == pytest.approx(0.0015)


def test_the_learning_rates_are_those_of_the_search():
    """Those of results/mqar_ladder.jsonl with the best mean over all tests of the search's rows.

    Rates within .001 of the best count as equal; then the one with the lower training loss is taken.
    """
    rows = files.read_rows(ROOT / "results" / "mqar_ladder.jsonl")
    scores = {}
    losses = {}
    for row in rows:
        if row["role"] == "search":
            accuracies = [cell["accuracy"] for cell in row["cells"].values()]
            of_mixer = scores.setdefault(row["mixer"], {})
            mean = sum(accuracies) / len(accuracies) / 2  # of two seeds
            of_mixer[row["learning_rate"]] = of_mixer.get(row["learning_rate"], 0) + mean
            key = (row["mixer"], row["learning_rate"])
            losses[key] = losses.get(key, 0) + row["losses"][-1]
    for mixer, rate in train_mqar.LEARNING_RATES.items():
        best = max(scores[mixer].values())
        equal = [found for found, score in scores[mixer].items() if score > best - 0.001]
        assert rate == min(equal, key=lambda found: losses[mixer, found]), mixer
    searched = {row["seed"] for row in rows if row["role"] == "search"}
    assert searched == {100, 101} and searched.isdisjoint(train_mqar.parse_options([]).seeds)


# The words under the table
def made_up(title, at_128, at_8192, filler):
    """Results of seeds with these accuracies."""
    results = []
    for accuracy in at_8192:
        cell = {"accuracy": at_128, "filler": 0.05}
        far = {"accuracy": accuracy, "filler": filler}
        results.append({"128 official": cell, "128 uniform": cell, "8192 official": far, "8192 uniform": far})
    return {title: results}


@pytest.mark.parametrize(
    "at_128, before, after, says",
    [
        (1.0, [0.3, 0.4], [0.9, 0.95], "up in 2 of 2), FILLER\nWhat it had learned was there all along"),
        (1.0, [0.3, 0.9], [0.9, 0.8], "up in 1 of 2), FILLER\nIn this run the floor is not"),
        (1.0, [0.3, 0.4], [0.31, 0.41], "In this run the floor is not"),
        (0.2, [0.1, 0.1], [0.9, 0.9], "longer contexts say nothing"),
    ],
)
def test_the_reading_follows_the_numbers(at_128, before, after, says, capsys):
    lines = made_up("Based", at_128, before, 0.8) | made_up("Based, floor 0", at_128, after, 0.2)
    train_mqar.read_tables(lines, [128, 8192])
    assert says.replace("FILLER", "its share on filler from 0.800 to 0.200.") in capsys.readouterr().out


def test_seeds_that_have_not_learned_are_named(capsys):
    """A mean over models that recall and models that do not is never left alone."""
    lines = made_up("softmax", 1.0, [1.0, 1.0], 0.0)
    train_mqar.read_tables(lines, [128, 8192])
    assert "have learned" not in capsys.readouterr().out
    lines["softmax"] += made_up("softmax", 0.04, [0.03], 0.4)["softmax"]
    train_mqar.read_tables(lines, [128, 8192])
    assert "softmax: only 2 of 3 seeds have learned the task." in capsys.readouterr().out


def test_tables_give_mean_spread_and_number(capsys):
    train_mqar.print_tables(made_up("Based", 1.0, [0.3, 0.4, 0.5], 0.8), [128, 8192])
    out = capsys.readouterr().out
    assert "0.400 ± 0.100" in out and out.count("Based") == 4 and "T = 8,192" in out
    assert train_mqar.mean_and_spread([0.25]) == "0.250"


def test_the_figure_holds_every_line(tmp_path, capsys):
    lines = {}
    for i in range(7):
        lines |= made_up(f"kernel {i}", 1.0, [i / 7], i / 7)
    train_mqar.draw_figure(lines, [128, 8192], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000 and "figure: " in capsys.readouterr().out


# Results whose every number differs
@pytest.fixture(scope="module")
def lines():
    """Three lines of three seeds each, at three lengths."""
    numbers = random.Random(2)

    def cell():
        return {measure: numbers.random() for measure in ("accuracy", "right", "others", "filler")}

    cells = [f"{T} {placement}" for T in (128, 512, 8192) for placement in ("official", "uniform")]
    titles = ("softmax", "Based", "Based, floor 0")
    return {title: [{name: cell() for name in cells} for _ in range(3)] for title in titles}


def numbers_of(results, T, placement, measure):
    return [cells[f"{T} {placement}"][measure] for cells in results]


def test_every_entry_of_the_tables(lines, capsys):
    more = lines | {"one seed": lines["Based"][:1]}
    train_mqar.print_tables(more, [128, 512, 8192])
    shown = capsys.readouterr().out
    for placement in ("uniform", "official"):
        for measure, name in (("accuracy", "accuracy"), ("filler", "share on filler")):
            table = shown[shown.index(f"{name}, {placement} queries") :]
            for title in lines:
                entries = [said(numbers_of(lines[title], T, placement, measure)) for T in (128, 512, 8192)]
                assert line_of(table, f"  {title}", 34).split() == ["3", *" ".join(entries).split()]
            single = [f"{numbers_of(lines['Based'][:1], T, placement, measure)[0]:.3f}" for T in (128, 512, 8192)]
            assert line_of(table, "  one seed", 34).split() == ["1", *single]


def test_every_number_of_the_reading(lines, capsys):
    """The longest context, queries anywhere; who has learned is asked at the shortest, official queries."""
    train_mqar.read_tables(lines, [128, 512, 8192])
    shown = capsys.readouterr().out
    for title, results in lines.items():
        assert f"{title} {statistics.mean(numbers_of(results, 8192, 'uniform', 'accuracy')):.3f}" in shown
        learned = sum(accuracy >= 0.9 for accuracy in numbers_of(results, 128, "official", "accuracy"))
        assert f"{title}: only {learned} of 3 seeds" in shown
    assert "At 8,192 tokens, 64 times the trained length" in shown
    late = made_up("x", 0.95, [0.1, 0.2], 0.5)  # forgotten far out, but learned
    train_mqar.read_tables(late, [128, 8192])
    assert "have learned" not in capsys.readouterr().out


def test_the_figure_is_drawn_from_these_numbers(lines, monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(lesson, "save_figure", lambda figure, path, description: figures.append((figure, description)))
    train_mqar.draw_figure(lines, [128, 512, 8192], tmp_path / "x.png")
    ((figure, description),) = figures
    assert len(figure.axes) == 4
    for axis in figure.axes:
        name, placement = axis.get_title().removesuffix(" queries").split(", ")
        measure = {"accuracy": "accuracy", "share on filler": "filler"}[name]
        expected = {title: [numbers_of(results, T, placement, measure) for T in (128, 512, 8192)]
                    for title, results in lines.items()}
        assert_drawn(axis, expected, (128, 512, 8192))
    for title, results in lines.items():
        assert f"{title} {statistics.mean(numbers_of(results, 8192, 'uniform', 'accuracy')):.2f}" in description


# The command line
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--mixers", "rebasd"], "invalid choice: 'rebasd'"),
        (["--mixers", "short_conv"], "invalid choice"),
        (["--seeds", "-1"], "a seed is at least 0 and below 2**31, got '-1'"),
        (["--seeds", str(2**31)], "below 2**31"),
        (["--seeds", str(2**64)], "below 2**31"),
        (["--seeds"], "expected at least one argument"),
        (["--steps", "0"], "not a positive integer"),
        (["--lengths", "63"], "need 64 places"),
        (["--workers", "none"], "not a positive integer"),
        (["--output", "/dev/null/rows.jsonl"], "cannot write"),
    ],
)
def test_impossible_settings_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        train_mqar.parse_options(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_rows_and_figure_are_two_files(tmp_path, capsys):
    one = str(tmp_path / "q.png")
    with pytest.raises(SystemExit):
        train_mqar.parse_options(["--output", one, "--figure", one])
    assert "rows need a file of theirs" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_mistake_on_the_command_line_costs_no_training(tmp_path):
    """It is said before the first model of the lesson is trained."""
    done = subprocess.run([sys.executable, str(LESSON), "--seeds", "x"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "a seed is at least 0" in done.stderr and "steps     loss" not in done.stdout


def test_the_main_job(tmp_path):
    options = train_mqar.parse_options(command(tmp_path)[-4:])
    runs = train_mqar.planned_runs(options)
    assert len(runs) == 15 and [run.mixer for run in runs[:3]] == ["conv_attention", "rebased", "based"]
    assert [(run.steps, run.warmup) for run in runs[:3]] == [(1200, 100), (1200, 0), (1200, 0)]
    assert {run.seed for run in runs} == set(range(5))
    assert all(run.test_lengths == (128, 512, 2048, 8192) and run.test_examples == 256 for run in runs)


def test_what_is_asked_for_is_planned_once():
    """Names, seeds and lengths that are given twice; lengths in any order; the number of steps."""
    twice = ["--mixers", "based", "attention", "based", "--seeds", "3", "1", "3", "--lengths", "512", "64", "512"]
    runs = train_mqar.planned_runs(train_mqar.parse_options([*twice, "--steps", "7"]))
    assert [(run.mixer, run.seed) for run in runs] == [("based", 3), ("attention", 3), ("based", 1), ("attention", 1)]
    assert {run.steps for run in runs} == {7} and {run.test_lengths for run in runs} == {(64, 512)}
    assert [run.warmup for run in runs] == [0, 100, 0, 100]


def test_a_new_kernel_can_be_trained_here_by_its_name(monkeypatch, capsys):
    """The name is a choice of --mixers, gets the usual rate, and is its own title."""
    monkeypatch.setitem(kernels.KERNELS, "mine", kernels.EluKernel)
    (run,) = train_mqar.planned_runs(train_mqar.parse_options(["--mixers", "mine", "--seeds", "3", "--steps", "2"]))
    assert run.learning_rate == train_mqar.USUAL_RATE
    row = train_mqar.run_one(dataclasses.replace(run, test_lengths=(64,), test_examples=4), lambda *news: None)
    assert list(train_mqar.lines_of([row])) == ["mine"]


TINY = ["--mixers", "based", "--seeds", "0", "--steps", "20", "--lengths", "64", "--workers", "1"]


def command(folder, *more):
    where = ["--output", str(folder / "rows.jsonl"), "--figure", str(folder / "figure.png")]
    return [sys.executable, str(LESSON), *TINY, *where, *more]


def test_the_script_from_end_to_end(tmp_path, capsys, monkeypatch):
    """A row with its settings and origin, the tables, the figure; the checks pass, whoever wins."""

    def run_here(work, runs, steps_of, processes, keep):
        for run in runs:
            keep(run, work(run, lambda steps, loss, accuracy: None))

    monkeypatch.setattr(train_mqar.workers, "run_all", run_here)
    monkeypatch.setattr(sys, "argv", command(tmp_path)[1:])
    runpy.run_path(str(LESSON), run_name="__main__")
    out = capsys.readouterr().out
    assert "checks: 3 passed, 0 failed" in out and "has not learned the task" in out
    assert out.index("V = 12") < out.index("as trained") < out.index("floor set to 0") < out.index("T = 64")
    (row,) = files.read_rows(tmp_path / "rows.jsonl")
    assert row["seed"] == 0 and row["role"] == "report"
    assert row["command"].startswith("python 04_train_mqar.py --mixers based --seeds 0 --steps 20")
    assert {"commit", "date", "hardware", "torch", "cells", "cells_without_floor", "batch"} <= set(row)
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def cells_of(run):
    """Of a row that nobody trained for."""
    cell = {"accuracy": 0.5, "right": 0.25, "others": 0.125, "filler": 0.5}
    return {f"{T} {placement}": cell for T in run.test_lengths for placement in train_mqar.PLACEMENTS}


def test_what_is_there_is_not_repeated(tmp_path, monkeypatch, capsys):
    """A torn row is run again, other settings are other runs; a file of something else is named in one line."""
    path = tmp_path / "rows.jsonl"
    runs = train_mqar.planned_runs(train_mqar.parse_options(["--mixers", "based", "--output", str(path)]))
    done = []

    def run_all(work, missing, steps_of, processes, keep):
        done.extend(missing)
        for run in missing:
            keep(run, dataclasses.asdict(run) | {"cells": cells_of(run)})

    monkeypatch.setattr(train_mqar.workers, "run_all", run_all)
    assert [row["seed"] for row in train_mqar.all_rows(runs, path, 1)] == [0, 1, 2, 3, 4] and done == runs
    path.write_bytes(path.read_bytes()[:-9])
    assert [row["seed"] for row in train_mqar.all_rows(runs, path, 1)] == [0, 1, 2, 3, 4] and done[5:] == runs[4:]
    assert "4 of 5 runs are there already" in capsys.readouterr().out
    train_mqar.all_rows([dataclasses.replace(run, steps=21) for run in runs], path, 1)
    assert len(done) == 11
    path.write_text('{"loss": 1}\n', encoding="utf-8")
    with pytest.raises(lesson.Refusal, match="line 1: the row has no 'mixer'"):
        train_mqar.all_rows(runs, path, 1)


def test_rows_come_in_the_order_of_the_runs(tmp_path):
    """Whatever the order of the file."""
    path = tmp_path / "rows.jsonl"
    runs = train_mqar.planned_runs(train_mqar.parse_options([]))
    for run in reversed(runs):
        files.append_row(path, dataclasses.asdict(run) | {"cells": cells_of(run)})
    found = [(row["mixer"], row["seed"]) for row in train_mqar.all_rows(runs, path, 1)]
    assert found == [(run.mixer, run.seed) for run in runs]


def test_a_floor_that_was_set_to_0_has_a_line_of_its_own():
    rows = [{"mixer": "based", "cells": i, "cells_without_floor": -i} for i in (1, 2)]
    rows.append({"mixer": "conv_attention", "cells": 3})
    assert train_mqar.lines_of(rows) == {"Based": [1, 2], "Based, floor 0": [-1, -2], "softmax": [3]}


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_finished(tmp_path):
    """One line, status 130, no worker left behind; the same command goes on with what is missing."""
    arguments = command(tmp_path, "--seeds", "0", "1", "2", "--steps", "150")
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(arguments, start_new_session=True, **pipes)
    deadline = time.monotonic() + 400
    while not files.read_rows(tmp_path / "rows.jsonl") and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on from there" in err.splitlines()[-1]
    assert "Traceback" not in out + err
    with pytest.raises(ProcessLookupError):  # in a moment the workers are gone
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.2)
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "of 3 runs are there already" in done.stdout
    assert [row["seed"] for row in files.read_rows(tmp_path / "rows.jsonl")] == [0, 1, 2]
