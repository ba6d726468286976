"""experiments/floor_text.py: a floor for the last tokens, planted pairs, what is counted where, tables, resuming."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from experiments import floor_text
from rebased import files, kernels, linear_attention, workers

SMALL = floor_text.Experiment(steps=3, test_windows=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("text"))
        yield floor_text.load_text()


# The floor -----------------------------------------------------------------------------------------------------------
def floor_by_definition(q, k, v, kernel, window):
    """Every weight written out: the floor is taken from the weights of tokens `window` or more places back."""
    T = q.shape[2]
    back = torch.arange(T).unsqueeze(1) - torch.arange(T)  # (T, T)
    weights = kernel.scores(q, k) - kernel.floor * (back >= window)
    weights = weights.tril()
    return weights @ v / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize("mixer", floor_text.MIXERS)
@pytest.mark.parametrize("window", [1, 7, 40, 100])
def test_a_floor_of_the_last_tokens_is_what_it_says(mixer, window):
    kernel = kernels.KERNELS[mixer](4, heads=3)
    q, k, v = linear_attention.example(kernel, T=83)
    found = floor_text.recent_floor_attention(q, k, v, kernel, window, chunk_size=16)
    expected = floor_by_definition(q, k, v, kernel, window)
    assert linear_attention.relative_error([found], [expected]) < 1e-9
    if window >= 83:
        whole = linear_attention.quadratic_attention(q, k, v, kernel)
        assert linear_attention.relative_error([found], [whole]) < 1e-9


def test_each_way_changes_the_floor_and_gives_it_back():
    model = floor_text.make_model(floor_text.Run("based", 0)).eval().double()
    tokens = torch.randint(256, (1, 90), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        trained = model(tokens)
        with floor_text.floor_set_to_0(model):
            without = model(tokens)
        with floor_text.floor_of_the_last(30, model):
            recent = model(tokens)
        again = model(tokens)
        for block in model.blocks:
            if hasattr(block.mixer, "kernel"):
                assert block.mixer.kernel.floor == 0.5
                block.mixer.kernel.floor = 0.0
        by_hand = model(tokens)
    assert torch.equal(trained, again) and torch.equal(without, by_hand)
    assert not torch.allclose(trained[:, 1:], without[:, 1:], atol=1e-6)
    assert torch.allclose(trained[:, :30], recent[:, :30], rtol=1e-9, atol=1e-12)  # nothing is further back yet
    assert not torch.allclose(trained[:, 31:], recent[:, 31:], atol=1e-9)


# Planted pairs -------------------------------------------------------------------------------------------------------
def marks_in(window):
    """[(place, (key, value))] that can be read in a window: a byte above 127 is a key or the value behind it."""
    found = []
    for place in np.flatnonzero((window >= 128) & (window < 160)):
        assert 192 <= window[place + 1] < 224
        found.append((int(place), (int(window[place]), int(window[place + 1]))))
    assert np.count_nonzero(window > 127) == 2 * len(found)
    return found


def test_a_training_window_holds_its_marks_and_no_others(data):
    for number in range(30):
        random = np.random.default_rng(number)
        text = data.train[513 * number : 513 * (number + 1)]
        window, is_answer = floor_text.training_window(text, random, SMALL)
        seen = {}
        for place, mark in marks_in(window):
            key = mark[0]
            assert is_answer[place + 1] == (key in seen)  # the first mark of a key cannot be known
            assert seen.setdefault(key, mark) == mark  # a key has one value
        assert is_answer.sum() == (floor_text.TIMES - 1) * len(seen)
        assert len(marks_in(window)) == floor_text.TIMES * len(seen)
        assert SMALL.fewest_pairs <= len(seen) <= SMALL.most_pairs


def test_places_of_a_pair_are_in_order_and_most_often_near():
    gaps = []
    for seed in range(200):
        places = floor_text.draw_places(np.random.default_rng(seed), 24, 256)
        assert len(np.unique(places)) == places.size and places.min() >= 0 and places.max() < 512
        assert not (places % floor_text.MARK).any()
        gaps += np.diff(places, axis=1).flatten().tolist()
    gaps = np.array(gaps)
    assert gaps.min() == 4 and gaps.max() > 300
    assert 0.3 < (gaps < 20).mean() < 0.7  # log-uniform: half of them are shorter than the geometric mean


def test_planting_moves_the_text_aside():
    text = np.frombuffer(b"0123456789", dtype=np.uint8)
    window, is_planted = floor_text.plant(text, [[0, 5]], [130], [200])
    assert window.tolist() == [130, 200, *b"012", 130, 200, *b"345"]
    assert is_planted.tolist() == [True] * 2 + [False] * 3 + [True] * 2 + [False] * 3


def test_a_text_has_no_bytes_that_could_be_marks(data):
    assert floor_text.only_ascii(np.frombuffer("aé b".encode(), dtype=np.uint8)).tobytes() == b"a?? b"
    assert data.train.max() < 128 and data.valid.max() < 128


def test_a_test_window_asks_at_the_distances_it_says(data):
    kinds = np.repeat(floor_text.PROBES, floor_text.EACH, axis=0).tolist()
    for window, is_planted, pairs in floor_text.test_windows(data.valid, replace(SMALL, test_windows=20)):
        assert len(window) == SMALL.test_length + 1
        assert is_planted.sum() == 2 * floor_text.MARK * len(pairs)
        marks = dict(marks_in(window))
        assert sorted(marks) == sorted(pairs.flatten())
        for (first, second), (begin, distance) in zip(pairs, kinds, strict=True):
            assert marks[first] == marks[second]
            assert begin <= first < begin + 256 and second - first == distance
        assert len({mark[0] for mark in marks.values()}) == len(pairs)  # so each key is asked for once


def test_the_test_windows_share_no_text_and_are_the_same_each_time(data):
    experiment = floor_text.Experiment()
    assert len(data.valid) > experiment.test_windows * experiment.test_length
    first, again = (list(floor_text.test_windows(data.valid, replace(SMALL, test_windows=2))) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


# Measures ------------------------------------------------------------------------------------------------------------
def test_last_distance_by_looking():
    keys = np.random.default_rng(0).integers(9, size=60)
    for i, found in enumerate(floor_text.last_distance(keys)):
        before = [i - j for j in range(i) if keys[j] == keys[i]]
        assert found == (min(before) if before else 0)


def test_repeats_of_a_pair_and_of_a_word():
    window = np.frombuffer(b"ab hello ab hello", dtype=np.uint8).astype(np.int64)
    common = floor_text.train_pile.bigram_keys(np.frombuffer(b"ab", dtype=np.uint8))
    found = floor_text.repeats(window, common)
    assert all(len(distance) == len(window) - 1 for distance in found.values())
    assert found["bigram"].tolist() == [0] * 9 + [9] * 7  # "ab" is the first pair seen again
    assert found["rare"].tolist() == [0] * 10 + [9] * 6  # but it is common
    assert found["word"].tolist() == [0] * 12 + [9] * 4  # "ab he" is the first word seen again


def test_each_loss_is_counted_where_it_belongs(data):
    """Losses that say their own place: the means of the buckets tell which places were counted."""
    window, is_planted, pairs = next(floor_text.test_windows(data.valid, SMALL))
    places = np.arange(SMALL.test_length, dtype=np.float64)  # losses[t] is that of the byte at t + 1
    means = floor_text.Means()
    floor_text.add_window(means, places, places, window, is_planted, pairs, common=())
    found = means.found()
    text = ~is_planted[1:]
    begin = 0
    for end in (256, 512, 1024, 2048, 4096, 8192, 16_384):
        inside = places[begin:end][text[begin:end]]
        assert found[f"position {end}"] == [pytest.approx(inside.mean()), len(inside)]
        begin = end
    asked = sum(found[f"answer {begin} {distance}"][0] for begin, distance in floor_text.PROBES)
    assert floor_text.EACH * asked == pytest.approx(pairs[:, 1].sum())  # the value stands at place + 1
    assert found["right 0 64"][1] == floor_text.EACH
    for definition, distance in floor_text.repeats(window, ()).items():
        for nearest, farthest in ((0, 64), (64, 512), (512, 2048), (2048, 16_384)):
            chosen = text & (places >= 8192) & (distance > nearest) & (distance <= farthest)
            assert found[f"{definition} {farthest}"] == [pytest.approx(places[chosen].mean()), chosen.sum()]


def test_a_perfect_answer_counts_as_right(data):
    """A model that copies what stood behind the same byte last time is right at every planted pair."""

    class Copy(torch.nn.Module):
        def forward(self, tokens):
            row = tokens[0].numpy()
            logits = torch.zeros(1, len(row), 256)
            behind = {}
            for t in range(1, len(row)):
                behind[row[t - 1]] = row[t]
                logits[0, t, behind.get(row[t], 0)] = 9.0
            return logits

    found = floor_text.test(Copy(), data, SMALL, common=())
    for begin, distance in floor_text.PROBES:
        assert found[f"right {begin} {distance}"] == [1.0, floor_text.EACH]
        assert found[f"answer {begin} {distance}"][0] < 0.1


# Rows, tables, resuming ----------------------------------------------------------------------------------------------
def made_row(mixer, seed, tests):
    names = [*floor_text.position_columns().values(), *floor_text.FAR, *floor_text.NEAR]
    filled = {way: {name: [value, 9] for name in names} for way, value in tests.items()}
    return {"mixer": mixer, "seed": seed, "settings": {}, "curve": [[50, 2.0, 1.0]], "tests": filled}


def test_tables_from_rows_alone(capsys, tmp_path):
    rows = [made_row("based", seed, {"as trained": 0.25 + seed / 10, "floor 0": 0.75}) for seed in (0, 1)]
    rows += [made_row("rebased", seed, {"as trained": 0.5}) for seed in (0, 1, 2)]
    floor_text.print_all(rows)
    text = capsys.readouterr().out
    assert "0.300 ± 0.071" in text  # Based: .25 and .35
    assert "+0.450 ± 0.071 (2 up)" in text  # .75 - .25 and .75 - .35
    assert "4,096 bytes back 0.300 -> 0.750 (up in 2 of 2), 16,000 0.300 -> 0.750" in text
    assert "ReBased + ½ " not in text.split("paired")[0]  # no row, no line
    pytest.importorskip("matplotlib")
    floor_text.draw(rows, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").exists()


def test_pairs_are_compared_by_seed():
    rows = [made_row("based", seed, {"as trained": seed}) for seed in (0, 1, 5)]
    rows += [made_row("based_no_floor", seed, {"as trained": 2 * seed}) for seed in (5, 1, 7)]
    assert floor_text.differences(rows, 3, 0, "right 0 64") == [1, 5]


def run_here(work, runs, steps_of, processes, keep):
    """What workers.run_all does, without processes."""
    for run in runs:
        keep(run, work(run, lambda *_: None))


def test_a_run_that_has_a_row_is_not_repeated(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(workers, "run_all", run_here)
    path = tmp_path / "rows.jsonl"
    run = floor_text.Run("rebased", 0)
    first = floor_text.perform_missing([run], SMALL, path, 1, {"commit": "abc"})
    again = floor_text.perform_missing([run], SMALL, path, 1, {"commit": "def"})
    assert again == first == files.read_rows(path) and first[0]["commit"] == "abc"
    assert "1 of 1 runs are there already" in capsys.readouterr().out
    other = replace(SMALL, steps=2)
    assert floor_text.perform_missing([run], other, path, 1, {})[0]["settings"]["steps"] == 2
    assert len(files.read_rows(path)) == 2
    assert json.dumps(first[0]["tests"]["as trained"]["position 16384"])


def test_training_goes_on_with_the_same_weights(tmp_path, data, monkeypatch):
    monkeypatch.setattr(floor_text, "SAVE_EVERY", 1)
    run = floor_text.Run("based", 1)
    whole, log = floor_text.train(run, data, SMALL, tmp_path / "whole.pt", lambda *_: None)

    def stop(step, loss, accuracy):
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        floor_text.train(run, data, SMALL, tmp_path / "cut.pt", stop)
    seen = []
    cut, log_of_cut = floor_text.train(run, data, SMALL, tmp_path / "cut.pt", lambda step, *_: seen.append(step))
    assert seen == [2] and log_of_cut == log
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), cut.parameters(), strict=True))


def test_the_search_has_a_seed_of_its_own(capsys):
    with pytest.raises(SystemExit):
        floor_text.main(["--seeds", "0", str(floor_text.SEARCH_SEED)])
    assert "choose another one for --seeds" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, message", [
    (["--seeds", "-1"], "a seed is at least 0 and below 2**31, got '-1'"),
    (["--seeds", str(2**70)], "a seed is at least 0 and below 2**31"),
    (["--learning-rate", "nan"], "must be above 0, got nan"),
    (["--learning-rate", "0"], "must be above 0, got 0"),
    (["--search", "0.004", "nan"], "must be above 0, got nan"),
    (["--search", "inf"], "must be above 0, got inf"),
    (["--figure", "x.txt"], "x.txt is no figure's name"),
    (["--output", "x.png", "--figure", "x.png"], "--output and --figure are both x.png"),
])
def test_bad_input_is_one_line_before_training(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(floor_text, "perform_missing", None)
    with pytest.raises(SystemExit) as stop:
        floor_text.main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("arguments, seeds, rates", [
    (["--seeds", "1", "0", "1"], [1, 0], [0.008]), (["--search", "0.004", "0.002", "0.004"], [100], [0.004, 0.002]),
])
def test_what_is_named_twice_runs_once(arguments, seeds, rates, tmp_path, monkeypatch):
    performed = []

    def perform(runs, experiment, *rest):
        performed.append((runs, experiment.learning_rate))
        return []

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(floor_text, "perform_missing", perform)
    monkeypatch.setattr(floor_text, "draw", lambda rows, path: None)
    floor_text.main(["--mixers", "rebased", "based", "rebased", *arguments])
    runs = [floor_text.Run(mixer, seed) for seed in seeds for mixer in ("rebased", "based")]
    assert performed == [(runs, rate) for rate in rates]


def test_a_curve_of_few_steps_has_one_point():
    assert floor_text.curve([[2.0, 1.0], [4.0, 3.0]]) == [[2, 3.0, 2.0]]
    assert [point[0] for point in floor_text.curve([[2.0, 1.0]] * 120)] == [50, 100]


def test_shares_of_planted_queries_are_those_of_the_last_layer(data):
    """Weights w = (s + f)/(S + f·n) and without a floor s/S: the difference of two of them tells the floor's share."""
    model = floor_text.make_model(floor_text.Run("based", 3)).eval().double()
    window, _, pairs = next(floor_text.test_windows(data.valid, SMALL))
    found = floor_text.shares(model, data, SMALL)
    tokens, places = torch.from_numpy(window[None, :-1]), torch.from_numpy(pairs[None, :, 1])
    with torch.no_grad():
        weights = model.logits_at(tokens, places, return_weights=True)[1][0, 0]  # (K, T)
        with floor_text.floor_set_to_0(model):
            without = model.logits_at(tokens, places, return_weights=True)[1][0, 0]
    right, floor = [], []
    for row, (first, second) in enumerate(pairs):
        right.append(weights[row, first + 1].item())
        drop = (weights[row, first + 1] - weights[row, second]) / (without[row, first + 1] - without[row, second])
        floor.append(1 - drop.item())
    for number, (begin, distance) in enumerate(floor_text.PROBES):
        own = slice(floor_text.EACH * number, floor_text.EACH * (number + 1))
        assert found[f"share {begin} {distance}"][0] == pytest.approx(np.mean(right[own]), rel=1e-9)
        assert found[f"floor {begin} {distance}"][0] == pytest.approx(np.mean(floor[own]), rel=1e-6)
