"""The specification of 04_train_mqar.py and 04_mqar_data.py: the data, the measures, training, the command line."""

import math
from importlib import import_module
from pathlib import Path

import pytest
import torch

m = import_module("04_train_mqar")
data = import_module("04_mqar_data")
TINY = "--mixers rebased conv_attention --seeds 0 1 --learning-rates 0.003 --epochs 2 --softmax-epochs 2 --examples 16 " \
    "--lengths 32 --pairs 4 --test-lengths 32 64 --test-examples 8 --batch 4 --workers 2".split()


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
    drawn = data.distinct(120_000, count, population, torch.Generator().manual_seed(0))
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
    found = torch.stack(data.attention_shares(weights, inputs, positions, 16), -1)
    for b in range(5):
        for i, at in enumerate(positions[b].tolist()):
            key = inputs[b, :16:2].tolist().index(inputs[b, at].item()) * 2
            sums = [0.0, 0.0, 0.0]
            for t in range(64):
                kind = 0 if key <= t <= key + 2 else 1 if t < 16 else 2 if inputs[b, t] == 0 else None
                if kind is not None:
                    sums[kind] += weights[b, i, t].item()
            assert found[b, i].tolist() == pytest.approx(sums, rel=1e-5)


def test_the_overlap_by_a_slow_reading():
    """Sets of places, the three of the right pair taken as one."""
    inputs, labels = m.make_mqar(5, 64, 8, 64, seed=0)
    positions, hits, union = m.query_positions(labels), 0, 0
    weights = torch.rand(5, 8, 64) ** 4
    for b in range(5):
        for i, at in enumerate(positions[b].tolist()):
            key = inputs[b, :16:2].tolist().index(inputs[b, at].item()) * 2
            row = weights[b, i].tolist()
            attended = {"right" if key <= t <= key + 2 else t for t in range(64) if row[t] >= max(row) / 2}
            hits, union = hits + len(attended & {"right"}), union + len(attended | {"right"})
    assert data.overlap(weights, inputs, positions, 16) == (hits, union) and 0 < hits < union


def small(**changes):
    """Two pairs in 16 tokens: learned in seconds."""
    return m.Experiment(lengths=(16,), pairs=(2,), d_models=(32,), vocab_size=16, examples=1600, epochs=6, batch=32,
                        test_lengths=(16,), test_examples=64, **changes)


def test_training_learns():
    """The loss falls far below that of guessing; every epoch leaves its accuracy, and its γ and β."""
    experiment, run, reports = small(), m.Run("rebased", 16, 2, 32, 0.01, 0), []
    model, history = m.train(run, experiment, report=lambda *news: reports.append(news))
    assert reports[-1][0] == 300 and history["losses"][-1] < 0.3 * math.log(8)
    assert len(history["accuracies"]) == 6 and len(history["placed"]["gamma_q"]) == 7
    assert history["placed"]["gamma_q"][0] == [1, 0] and history["placed"]["gamma_q"][-1] != [1, 0]
    cell = m.test(model, 16, 0.01, run, experiment)
    assert cell["accuracy"] == history["accuracies"][-1] > 0.9 and cell["right"] + cell["others"] + cell["filler"] <= 1 + 1e-5


def test_a_run_ends_where_it_is_good_enough():
    _, history = m.train(m.Run("based", 16, 2, 32, 0.01, 0), small(stop_at=0.5))
    assert len(history["accuracies"]) < 6 and history["accuracies"][-1] > 0.5 >= max([0, *history["accuracies"][:-1]])


@pytest.mark.parametrize("changes", [{}, {"fresh": False, "dropout": 0.1, "rate_by_epoch": True}], ids=["laptop", "paper"])
def test_a_run_that_is_cut_ends_as_one_that_is_not(tmp_path, changes):
    """Stopped in its fourth epoch and started again: the same weights and history, bit for bit."""
    run, checkpoint = m.Run("conv_attention", 16, 2, 32, 0.01, 0), tmp_path / "run.pt"
    experiment = small(softmax_epochs=6, **changes)
    whole, history = m.train(run, experiment)

    def cut(steps, loss, accuracy):
        if steps > 160:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        m.train(run, experiment, "cpu", checkpoint, cut)
    seen = []
    again, continued = m.train(run, experiment, "cpu", checkpoint, lambda steps, *_: seen.append(steps))
    assert min(seen) > 150 and continued == history
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_the_papers_schedule_is_the_papers():
    """A cosine that takes a step after each of 64 epochs; no warm-up; 195 whole batches of 512 in 100,000 examples."""
    experiment, run = m.Experiment(**m.PRESETS["paper"]), m.Run("rebased", 128, 16, 64, 0.003, 42)
    rates = [m.learning_rate(step, run, experiment) for step in range(64 * 195)]
    assert rates[:195] == [0.003] * 195 and len(set(rates)) == 64 and rates[195] < 0.003
    assert rates[-1] == pytest.approx(0.003 * (1 + math.cos(math.pi * 63 / 64)) / 2)
    assert [len(x) for x, _ in m.epoch_batches(run, m.Experiment(examples=1000, batch=300, fresh=False), 0)] == [300] * 3


def test_epochs_are_other_orders_or_other_examples():
    run = m.Run("rebased", 16, 2, 32, 0.01, 0)
    for fresh in (True, False):
        first, again, other = (torch.cat([x for x, _ in m.epoch_batches(run, small(fresh=fresh), e)]) for e in (0, 0, 1))
        assert torch.equal(first, again) and not torch.equal(first, other)
        assert torch.equal(first.unique(dim=0), other.unique(dim=0)) != fresh


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--learning-rates", "-0.1"], "must be above 0"),
        (["--learning-rates", "fast"], "is not a number"),
        (["--mixers", "rebasd"], "unknown mixer 'rebasd'"),
        (["--pairs", "40"], "need 4·40 = 160 positions"),
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
        (["--seeds", "-1"], "at least 0"),
        (["--epochs", "0"], "at least 1"),
        (["--heads", "-1"], "at least 0"),
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
    """LEARNING_RATES is what the search in results/mqar_ladder.jsonl chose, on seeds that no table reports."""
    ladder = m.Experiment(**m.PRESETS["ladder"])
    rows = m.sweeps.read_rows(Path(m.__file__).parent / "results" / "mqar_ladder.jsonl", m.ROW)
    assert set(ladder.search_seeds).isdisjoint((*ladder.seeds, *m.Experiment().seeds))
    assert all(row["settings"] == m.settings(m.Experiment()) for row in rows)
    rates = {mixer: rate for (mixer, *_), rate in m.reports.best_rates(rows, ladder.search_seeds).items()}
    assert m.LEARNING_RATES == {mixer: rates[mixer] for mixer in m.LEARNING_RATES}
    tried = {(row["mixer"], row["learning_rate"], row["seed"]) for row in rows}
    assert all((mixer, rate, seed) in tried for mixer in ladder.mixers for rate in ladder.learning_rates
               for seed in ladder.search_seeds)
