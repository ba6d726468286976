"""The specification of 04_train_mqar.py: the data, the measures, the sweep, the command line."""

import json
import math
from importlib import import_module
from pathlib import Path

import pytest
import torch

m = import_module("04_train_mqar")
TINY = [
    "--mixers",
    "rebased",
    "conv_attention",
    "--seeds",
    "0",
    "1",
    "--learning-rates",
    "0.003",
    "--steps",
    "3",
    "--softmax-steps",
    "3",
    "--length",
    "32",
    "--pairs",
    "4",
    "--test-lengths",
    "32",
    "64",
    "--test-examples",
    "8",
    "--batch",
    "4",
]


@pytest.mark.parametrize("check", m.CHECKS, ids=lambda check: check.__name__)
def test_claims_of_the_file(check):
    check()


@pytest.mark.parametrize(
    "n, T, K, V, a", [(200, 128, 16, 256, 0.01), (50, 64, 16, 8192, 1.0), (20, 512, 128, 300, 0.5), (3, 4, 1, 4, 0.01)]
)
def test_every_example_by_a_slow_reading(n, T, K, V, a):
    """A dictionary filled from the pairs answers every query; everything else is filler."""
    inputs, labels = m.make_mqar(n, T, K, V, a, seed=4)
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
    """One pair, 31 slots, 200,000 draws: chi-square below the 99.99 % point of 30 degrees of freedom (67.6)."""
    inputs, labels = m.make_mqar(200_000, 64, 1, 64, a, seed=0)
    slots = (m.query_positions(labels)[:, 0] - 2) // 2
    p = torch.arange(1, 32, dtype=torch.float64) ** (a - 1)
    assert chi_square(torch.bincount(slots, minlength=31), 200_000 * p / p.sum()) < 67.6


def test_drawing_without_replacement_is_successive():
    """Two keys, three slots: the probability of each ordered pair of slots is p_i · p_j / (1 − p_i)."""
    n = 100_000
    inputs, labels = m.make_mqar(n, 10, 2, 64, 0.3, seed=0)
    slots = torch.stack([((inputs[:, 4:] == inputs[:, i : i + 1]).int().argmax(1)) // 2 for i in (0, 2)], 1)
    p = torch.arange(1, 4, dtype=torch.float64) ** (0.3 - 1)
    p = p / p.sum()
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
    counts = torch.tensor([((slots == torch.tensor(pair)).all(1)).sum() for pair in pairs])
    expected = torch.tensor([n * p[i] * p[j] / (1 - p[i]) for i, j in pairs])
    assert chi_square(counts, expected) < 25.7  # 99.99 % point, 5 degrees of freedom


@pytest.mark.parametrize("count, population", [(3, 20), (3, 5)])
def test_distinct_draws_are_uniform(count, population):
    """Both ways (redrawing, shuffling): each ordered triple equally often."""
    drawn = m.distinct(120_000, count, population, torch.Generator().manual_seed(0))
    assert all(len(set(row)) == count for row in drawn[:1000].tolist())
    number = (drawn * torch.tensor([population**2, population, 1])).sum(1)
    counts = torch.bincount(number)
    counts = counts[counts > 0]
    triples = population * (population - 1) * (population - 2)
    assert len(counts) == triples
    spread = math.sqrt(2 * triples)
    assert abs(chi_square(counts, torch.tensor(120_000 / triples)) - triples) < 5 * spread


def test_all_slots_are_used_when_none_is_free():
    _, labels = m.make_mqar(10, 64, 16, 256, seed=0)
    assert torch.equal(m.query_positions(labels), torch.arange(32, 64, 2).expand(10, 16))


def test_seeds_make_the_data():
    first, again, other = (m.make_mqar(100, 64, 8, 256, seed=s)[0] for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_no_test_example_is_trained_on():
    training = {
        tuple(row) for seed in range(3) for row in m.make_mqar(20_000, 128, 16, 256, seed=seed)[0][:, :32].tolist()
    }
    testing = m.make_mqar(256, 128, 16, 256, seed=m.TEST_SEED)[0][:, :32].tolist()
    assert not any(tuple(row) in training for row in testing)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((10, 63, 16, 256), "need 4·16 = 64 positions"),
        ((10, 64, 16, 32), "vocabulary of 34"),
        ((0, 64, 16, 256), "num_examples"),
        ((10, 64, 0, 256), "num_pairs"),
        ((10, 64, 4, 256, 0.0), "power_a"),
    ],
)
def test_impossible_data_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        m.make_mqar(*arguments)


def test_shares_by_a_slow_reading():
    """Masks as loops over places: key, value and the token after are right, other places before 2K others, zeros filler."""
    inputs, labels = m.make_mqar(5, 64, 8, 64, seed=0)
    positions = m.query_positions(labels)
    weights = torch.rand(5, 8, 64)
    found = torch.stack(m.attention_shares(weights, inputs, positions, 16), -1)
    for b in range(5):
        for i, at in enumerate(positions[b].tolist()):
            key = inputs[b, :16:2].tolist().index(inputs[b, at].item()) * 2
            sums = [0.0, 0.0, 0.0]
            for t in range(64):
                kind = 0 if key <= t <= key + 2 else 1 if t < 16 else 2 if inputs[b, t] == 0 else None
                if kind is not None:
                    sums[kind] += weights[b, i, t].item()
            assert found[b, i].tolist() == pytest.approx(sums, rel=1e-5)


def test_training_learns():
    """A task small enough for seconds: two pairs, the loss falls far below that of guessing."""
    experiment = m.Experiment(
        length=16, pairs=2, vocab_size=16, d_model=32, steps=300, batch=32, test_lengths=(16,), test_examples=64
    )
    reports = []
    model = m.train(m.Run("rebased", 0.01, 0), experiment, report=lambda *news: reports.append(news))
    assert sum(done for done, _, _ in reports) == 300 and reports[-1][1] < 0.3 * math.log(8)
    cell = m.test(model, 16, 0.01, experiment)
    assert cell["accuracy"] > 0.9 and cell["right"] + cell["others"] + cell["filler"] <= 1 + 1e-5


def run(tmp_path, *more):
    return m.main([*TINY, "--output", str(tmp_path / "rows.jsonl"), "--figure", str(tmp_path / "figure.png"), *more])


def test_sweep_writes_rows_and_goes_on_where_it_stopped(tmp_path, capsys):
    """One whole sweep; then a row is lost and another torn: only those two run again, to the same numbers."""
    assert run(tmp_path) == 0
    out = capsys.readouterr().out
    assert "softmax" in out and "± " in out and (tmp_path / "figure.png").stat().st_size > 10_000
    file = tmp_path / "rows.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    rows = {(r["mixer"], r["seed"]): r for r in map(json.loads, lines)}
    assert len(rows) == 4 and all({"commit", "date", "hardware", "command", "seconds"} <= set(r) for r in rows.values())
    file.write_text("".join(lines[:2]) + lines[2][: len(lines[2]) // 2])
    assert run(tmp_path) == 0
    assert "2 of 4 runs are there already" in capsys.readouterr().out
    again = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(again) == 4 and all(r["cells"] == rows[r["mixer"], r["seed"]]["cells"] for r in again)


def test_search_marks_the_best(tmp_path, capsys):
    assert run(tmp_path, "--search", "--learning-rates", "0.003", "0.01", "--seeds", "7", "--mixers", "rebased") == 0
    out = capsys.readouterr().out
    assert "0.003" in out and "*" in out


def test_broken_results_are_named(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"mixer": "rebased"}\n')
    with pytest.raises(SystemExit) as stop:
        run(tmp_path)
    assert stop.value.code == 2 and "line 1 is not a row" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--learning-rates", "-0.1"], "must be above 0"),
        (["--learning-rates", "fast"], "is not a number"),
        (["--mixers", "rebasd"], "unknown mixer 'rebasd'"),
        (["--pairs", "40"], "need 4·40 = 160 positions"),
        (["--vocab-size", "20"], "vocabulary of 34"),
        (["--mixers", "x2"], "no learning rate is known for x2"),
        (["--output", "/dev/null/rows.jsonl"], "cannot write"),
        (["--seeds", "-1"], "at least 0"),
        (["--steps", "0"], "at least 1"),
        (["--heads", "0"], "at least 1"),
        (["--workers", "0"], "at least 1"),
        (["--mixers", "conv_attention", "--heads", "5"], "5 heads do not fit"),
    ],
)
def test_impossible_settings_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        m.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_the_learning_rates_are_those_of_the_search():
    """LEARNING_RATES is what results/mqar_search.jsonl says: the best mean over all cells, on seeds the table has not."""
    rows = m.read_rows(Path(m.__file__).parent / "results" / "mqar_search.jsonl")
    assert {row["seed"] for row in rows}.isdisjoint(m.Experiment().seeds)
    for mixer, rate in m.LEARNING_RATES.items():
        means = {}
        for row in rows:
            if row["mixer"] == mixer:
                means.setdefault(row["learning_rate"], []).extend(cell["accuracy"] for cell in row["cells"].values())
        assert set(means) == set(m.GRID)
        assert max(means, key=lambda rate: sum(means[rate]) / len(means[rate])) == rate
