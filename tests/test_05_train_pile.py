"""05: the order of the data, updates, checkpoints that survive kill -9, evaluation, two processes, bad input."""

import contextlib
import json
import math
import os
import random
import runpy
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_04_train_mqar import adamw
from test_pile_data import Words, make_data, make_texts, tokens_of, write

from rebased import files, lesson, model, pile_report, pile_run, pile_settings, tokens, train_pile
from rebased.lesson import Refusal

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "05_train_pile.py"


def settings(**changes):
    small = dict(seq_len=32, batch_tokens=128, micro_batch=2, steps=6, warmup=2, save_every=2)
    return pile_settings.Settings(**small | dict(valid_share=0.2, eval_tokens=300, eval_length=64) | changes)


def flags(chosen):
    """Settings as command-line options."""
    default = asdict(pile_settings.Settings())
    return ["--set", *(f"{name}={value}" for name, value in asdict(chosen).items() if value != default[name])]


def run_script(*arguments):
    """The lesson as a script, in this process: to start PyTorch for each would take most of the time of these tests."""
    before = sys.argv
    sys.argv = [str(PROGRAM), *map(str, arguments)]
    try:
        runpy.run_path(str(PROGRAM), run_name="__main__")
    finally:
        sys.argv = before


# The order of the data ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("num_tokens", [96, 128, 1000, 4096, 33_333])
def test_a_pass_sees_every_sequence_once_and_the_next_in_another_order(num_tokens):
    passes, N = [], num_tokens // 32 - 1
    for epoch in range(2):
        starts = [train_pile.sequence_start(n, num_tokens, 32, 0) for n in range(epoch * N, (epoch + 1) * N)]
        assert sorted(starts) == [min(starts) + 32 * i for i in range(N)] and max(starts) + 33 <= num_tokens
        passes.append(starts)
    assert passes[0] != passes[1]


@pytest.mark.parametrize("micro_batch, parts", [(1, 8), (2, 4), (8, 1), (16, 1), (5, 2)])
def test_processes_share_the_batch_of_one(micro_batch, parts):
    row = np.arange(5000) % 251
    chosen = settings(batch_tokens=32 * 8, micro_batch=micro_batch)
    for step in (0, 7, 100):
        whole = train_pile.micro_batches(row, chosen, step)
        batch = torch.cat(whole)
        assert len(whole) == parts and batch.shape == (8, 33) and batch.dtype == torch.int64
        assert torch.equal(batch[:, 1:] - batch[:, :-1] == 1, batch[:, 1:] != 0)  # neighbours in the row
        for world in (2, 4, 8):
            shares = [torch.cat(train_pile.micro_batches(row, chosen, step, rank, world)) for rank in range(world)]
            assert torch.equal(torch.cat(shares), batch)
    assert not torch.equal(batch, torch.cat(train_pile.micro_batches(row, chosen, 101)))


def test_the_claims_of_the_lesson():
    for name in dir(train_pile):
        if name.startswith("check_"):
            getattr(train_pile, name)()


def test_another_pass_or_seed_begins_elsewhere_and_cuts_elsewhere():
    """b and c are drawn for each pass, from the seed."""
    firsts = [[train_pile.sequence_start(epoch * 30, 31 * 64, 64, seed) for epoch in range(5)] for seed in range(3)]
    assert len({tuple(row) for row in firsts}) == 3
    for row in firsts:
        assert len(set(row)) == 5 and len({first % 64 for first in row}) > 1


# Models and updates -------------------------------------------------------------------------------------------------
def test_parameter_counts_of_the_paper():
    _, paper = pile_settings.read_options(["rebased"], ["--preset", "paper", "--mixers", "rebased"])
    counts = {mixer: model.count_parameters(train_pile.model_config(mixer, paper, 50280)) for mixer in
              ("attention", "based", "rebased")}
    assert counts == {"attention": 151_880_448, "based": 147_542_016, "rebased": 147_548_928}
    assert paper.batch_tokens == 4_194_304 and paper.steps == 20_000 and paper.lr == 1e-3 and paper.warmup == 200


def test_laptop_models_are_equal_in_size():
    configs = [train_pile.laptop_config(mixer, 256) for mixer in ("rebased", "based", "attention")]
    sizes = [model.count_parameters(config) for config in configs]
    assert max(sizes) < 1.002 * min(sizes)


def test_recomputed_blocks_give_the_same_gradients(tmp_path):
    data, gradients = tokens_of(tmp_path, [make_data(tmp_path)]), []
    for again in (False, True):
        plain = train_pile.make_model("rebased", settings(), 256)
        ready = train_pile.make_ready(plain, settings(recompute=again))
        train_pile.add_gradients(ready, train_pile.micro_batches(data.train, settings(), 0))
        gradients.append(torch.cat([p.grad.flatten() for p in plain.parameters()]))
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-7)


def test_recomputing_runs_every_block_twice():
    """Once forward and once more in the backward pass."""
    for again, times in ((False, 1), (True, 2)):
        plain = train_pile.make_model("rebased", settings(), 256)
        calls = []
        for block in plain.blocks:
            block.norm1.register_forward_hook(lambda *_: calls.append(1))  # noqa: B023
        ready = train_pile.make_ready(plain, settings(recompute=again))
        train_pile.add_gradients(ready, [torch.randint(256, (2, 33))])
        assert len(calls) == times * len(plain.blocks)


def test_the_laptops_layers():
    """Two times a gated convolution and the mixer above it."""
    for mixer in ("rebased", "attention"):
        assert train_pile.laptop_config(mixer, 256).mixers == ("gated_conv", mixer) * 2
        assert train_pile.laptop_config(mixer, 256).norm == "rms"


@pytest.fixture
def in_float64():
    """New models have parameters of float64, so that two ways to train one agree in many digits."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("clip", [0.3, 1e9])
def test_training_by_hand(in_float64, tmp_path, clip):
    """Five steps by formulas, in micro-batches of 3 and 1: the same weights, log and checkpoint. With clip 0.3 every
    gradient is cut, with 1e9 none; the norm in the log is that before the cut."""
    chosen = settings(steps=5, warmup=2, micro_batch=3, seed=4, lr=0.01, weight_decay=0.3, clip=clip, save_every=1000)
    data = tokens_of(tmp_path, [make_data(tmp_path)])
    trained, log = train_pile.train("rebased", chosen, data, tmp_path)
    torch.manual_seed(4)
    by_hand = model.LanguageModel(train_pile.laptop_config("rebased", 256))
    matrices = [p for p in by_hand.parameters() if p.dim() == 2]
    others = [p for p in by_hand.parameters() if p.dim() != 2]
    moments = {}, {}
    for step in range(5):
        batch = torch.cat(train_pile.micro_batches(data.train, chosen, step))
        logits = by_hand(batch[:, :-1])
        loss = -logits.log_softmax(-1).gather(-1, batch[:, 1:, None]).mean()
        by_hand.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in by_hand.parameters()))
        for p in by_hand.parameters():
            p.grad *= min(1, clip / (norm + 1e-6))
        rate = 0.01 * (step + 1) / 2 if step < 2 else 0.01 * (1 + math.cos(math.pi * (step - 2) / 3)) / 2
        adamw(matrices, moments[0], step + 1, rate, decay=0.3, betas=(0.9, 0.95))
        adamw(others, moments[1], step + 1, rate, decay=0.0, betas=(0.9, 0.95))
        found = [log[step][name] for name in ("step", "loss", "norm", "lr")]
        assert found == pytest.approx([step, loss.item(), norm, rate], rel=1e-5)
    for found, expected in zip(trained.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert not trained.training
    kept = pile_run.load_checkpoint(tmp_path / "checkpoint.pt")
    assert len(kept["log"]) == 5
    assert all(torch.equal(kept["model"][name], value) for name, value in trained.state_dict().items())


def test_decay_is_for_matrices_and_the_rate_warms_up_and_falls():
    small = model.LanguageModel(train_pile.laptop_config("rebased", 256))
    decayed, free = train_pile.make_optimizer(small, settings()).param_groups
    assert {p.ndim for p in decayed["params"]} == {2} and 2 not in {p.ndim for p in free["params"]}
    assert free["weight_decay"] == 0 and decayed["weight_decay"] == 0.1
    assert sum(p.numel() for group in (decayed, free) for p in group["params"]) == 725_376
    rates = [train_pile.learning_rate(step, settings(steps=100, warmup=10, lr=1.0)) for step in range(101)]
    assert rates[:11] == [pytest.approx(min(1, (i + 1) / 10)) for i in range(11)]
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[55] == pytest.approx(0.5) and rates[100] == 0


# Training and checkpoints -------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of six steps: its folder, data, model and log."""
    folder = tmp_path_factory.mktemp("trained")
    data = tokens_of(folder, [make_data(folder)])
    small, log = train_pile.train("rebased", settings(), data, folder / "run")
    return SimpleNamespace(folder=folder, data=data, model=small, log=log, checkpoint=folder / "run" / "checkpoint.pt")


def test_training_learns_and_a_model_for_evaluation_comes_back(trained):
    assert trained.log[-1]["loss"] < 0.85 * trained.log[0]["loss"] and not trained.model.training
    assert [record["step"] for record in trained.log] == list(range(6))


def stop_at(step):
    """A train_step that is interrupted when this step would begin."""
    original = train_pile.train_step

    def stop(ready, optimizer, data, chosen, number):
        if number == step:
            raise KeyboardInterrupt
        return original(ready, optimizer, data, chosen, number)

    return stop


def test_a_stopped_run_continues_bit_for_bit_and_its_log_is_not_doubled(trained, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_pile, "train_step", stop_at(3))
        train_pile.train("rebased", settings(), trained.data, tmp_path)
    assert len(pile_run.load_checkpoint(tmp_path / "checkpoint.pt")["log"]) == 2
    assert len(files.read_rows(tmp_path / "log.jsonl")) == 3  # one step more than the checkpoint knows
    torch.rand(5)
    _, log = train_pile.train("rebased", settings(), trained.data, tmp_path, resume=True)
    assert [record["loss"] for record in log] == [record["loss"] for record in trained.log]
    assert files.read_rows(tmp_path / "log.jsonl") == log
    assert_same_run(tmp_path / "checkpoint.pt", trained.checkpoint)


def assert_same_run(path, other):
    """Weights and optimiser states of two checkpoints are equal bit for bit."""
    a, b = pile_run.load_checkpoint(path), pile_run.load_checkpoint(other)
    assert len(a["log"]) == len(b["log"]) and a["model"].keys() == b["model"].keys()
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    for i, state in a["optimizer"]["state"].items():
        assert all(torch.equal(value, b["optimizer"]["state"][i][name]) for name, value in state.items())


def test_resume_refuses_another_run_and_finds_moved_data(trained, tmp_path):
    folder = trained.checkpoint.parent
    for changes in ({"lr": 1e-5}, {"seed": 1}, {"steps": 7}):
        with pytest.raises(Refusal, match=next(iter(changes))):
            train_pile.train("rebased", settings(**changes), trained.data, folder, resume=True)
    with pytest.raises(Refusal, match="mixer = rebased, not based"):
        train_pile.train("based", settings(), trained.data, folder, resume=True)
    other = write(tmp_path / "other.jsonl", [{"text": text} for text in make_texts(70, 1)])
    with pytest.raises(Refusal, match="other data"):
        train_pile.train("rebased", settings(), tokens_of(tmp_path, [other]), folder, resume=True)
    (tmp_path / "moved").mkdir()
    same = tokens_of(tmp_path / "moved", [make_data(tmp_path / "moved")])
    _, log = train_pile.train("rebased", settings(micro_batch=4), same, folder, resume=True)
    assert len(log) == 6


def test_a_checkpoint_that_is_none_is_named(trained, tmp_path):
    with pytest.raises(Refusal, match="no such file"):
        pile_run.load_checkpoint(tmp_path / "nowhere.pt")
    files.save_tensors(tmp_path / "other.pt", {"state_of": "a saved state"})
    with pytest.raises(Refusal, match="not a checkpoint of this program"):
        pile_run.load_checkpoint(tmp_path / "other.pt")
    flipped = bytearray(trained.checkpoint.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    (tmp_path / "flipped.pt").write_bytes(flipped)
    with pytest.raises(Refusal, match="damaged"):
        pile_run.load_checkpoint(tmp_path / "flipped.pt")


def without(*place):
    """Takes an entry out of a checkpoint's content."""
    def change(content):
        for name in place[:-1]:
            content = content[name]
        del content[place[-1]]

    return change


def swap_shape(content):
    content["optimizer"]["state"][3]["exp_avg"] = torch.zeros(7)


@pytest.mark.parametrize("change, message", [
    *((without(part), f"a checkpoint without its part '{part}'") for part in pile_run.PARTS),
    (lambda content: content.update(log=None), "a checkpoint without its part 'log'"),
    (lambda content: content["config"].update(heads=8), "its model's heads is 8, not 4"),
    (lambda content: content["tokenizer"].update(probe="x"), "trained with another bytes tokenizer"),
    (without("model", "embedding.weight"), "its weight embedding.weight is missing"),
    (lambda content: content["model"].update(more=torch.zeros(2)), r"its weight more is \(2,\), not None"),
    (lambda content: content["model"].update({"embedding.weight": torch.zeros(3, 128)}),
     r"its weight embedding.weight is \(3, 128\), not \(256, 128\)"),
    (without("optimizer", "state"), "its step of parameter 0 is missing"),
    (without("optimizer", "state", 5), "its step of parameter 5 is missing"),
    (without("optimizer", "state", 5, "exp_avg_sq"), "its exp_avg_sq of parameter 5 is missing"),
    (swap_shape, r"its exp_avg of parameter 3 is \(7,\), not"),
    (without("optimizer", "param_groups"), "its params of group 0 is missing"),
    (without("log", 2), "its log lacks a step"), (without("log", 2, "loss"), "its log lacks a step"),
    (lambda content: content["log"].clear(), "its log lacks a step"),
])
def test_a_whole_checkpoint_that_does_not_fit_is_one_line(trained, tmp_path, change, message):
    """Its digest is right, but a part is missing or is another model's."""
    content = files.load_tensors(trained.checkpoint)
    change(content)
    files.save_tensors(tmp_path / "checkpoint.pt", content)
    with pytest.raises(Refusal, match=message) as refusal:
        train_pile.train("rebased", settings(), trained.data, tmp_path, resume=True)
    assert len(str(refusal.value).splitlines()) == 1


def test_a_loss_that_is_no_number_stops_before_the_update(trained):
    small = train_pile.make_model("rebased", settings(), 256)
    optimizer = train_pile.make_optimizer(small, settings())
    with torch.no_grad():
        small.embedding.weight.fill_(math.inf)
    with pytest.raises(Refusal, match="step 3: loss nan"):
        train_pile.train_step(small, optimizer, trained.data, settings(), 3)
    assert not optimizer.state


# Evaluation ---------------------------------------------------------------------------------------------------------
def test_masks_equal_a_slow_count():
    """The three masks against the definition, token by token; the pair (2, 3) is not rare here."""
    for row in np.random.default_rng(0).integers(0, 5, (3, 40)):
        masks = {name: train_pile.recall_mask(row, name, [2 * 2**32 + 3]) for name in train_pile.DEFINITIONS}
        x = row.tolist()
        for t in range(40):
            pair = x[t - 1 : t + 1]
            bigram = t > 0 and pair in [x[i - 1 : i + 1] for i in range(1, t)]
            assert masks["token"][t] == (x[t] in x[:t])
            assert masks["bigram"][t] == bigram
            assert masks["rare"][t] == (bigram and pair != [2, 3])


def test_rare_depends_on_the_counts_of_training():
    row = np.array([1, 2, 3, 1, 2, 3, 2, 3])
    common = train_pile.common_bigrams(np.array([1, 2] * 1251))
    assert train_pile.recall_mask(row, "bigram").tolist() == [False] * 4 + [True, True, False, True]
    assert train_pile.recall_mask(row, "rare", common).tolist() == [False] * 5 + [True, False, True]
    few = train_pile.common_bigrams(np.array([1, 2] * 1250))
    assert train_pile.recall_mask(row, "rare", few).tolist() == train_pile.recall_mask(row, "bigram").tolist()
    assert train_pile.recall_mask(row, "token").tolist() == [False] * 3 + [True] * 5


def test_pairs_are_counted_at_the_beginning_and_told_apart(monkeypatch):
    """Only in the first COUNTED tokens; also where tokens do not fit a byte: (1, 258) is not (2, 2)."""
    monkeypatch.setattr(train_pile, "COUNTED", 6)
    monkeypatch.setattr(train_pile, "RARE", 1)
    row = np.array([1, 2, 1, 2, 1, 2, 7, 8, 7, 8, 7, 8])
    common = train_pile.common_bigrams(row)
    masks = [train_pile.recall_mask(np.array([a, b, a, b]), "rare", common)[3] for a, b in ((1, 2), (7, 8))]
    assert masks == [False, True]
    for a, b, c, d in ((1, 258, 2, 2), (1, 2, 3, 2), (1, 2, 1, 3)):
        assert not train_pile.recall_mask(np.array([a, b, c, d]), "bigram").any()


def test_rare_is_measured_by_the_training_text(trained, monkeypatch):
    """Not by what is to be measured."""
    monkeypatch.setattr(train_pile, "RARE", 60)
    monkeypatch.setattr(train_pile, "evaluate", lambda model, data, chosen, common: {"common": common})
    (row,) = train_pile.measure({"rebased": (trained.model, trained.log)}, settings(), trained.data)
    text = trained.data.train.tolist()
    counts = Counter(zip(text, text[1:], strict=False))
    assert sorted(row["common"].tolist()) == sorted(a * 2**32 + b for (a, b), n in counts.items() if n > 60)
    assert len(row["common"]) > 5


def test_the_perplexity_of_nothing_is_none():
    assert train_pile.perplexity(np.array([])) is None
    assert train_pile.perplexity(np.array([math.log(2), math.log(8)])) == pytest.approx(4)


def test_bits_per_byte_of_words_are_those_of_their_bytes(tmp_path):
    """With tokens of several bytes: the losses of the words, over the bytes of the documents; zlib of the same."""
    path = write(tmp_path / "a.jsonl", [{"text": text, "meta": {"pile_set_name": ["A", "B"][i % 2]}}
                                        for i, text in enumerate(make_texts(40))])
    data = tokens.load_data([path], Words(), 0.3, tmp_path / "tokens")
    torch.manual_seed(0)
    untrained = model.LanguageModel(train_pile.laptop_config("rebased", Words.size)).eval()
    found = train_pile.evaluate(untrained, data, settings(eval_tokens=10**6, seq_len=10_000, batch_tokens=10_000), ())
    logits = untrained(torch.tensor([[0, *data.valid.tolist()]]))[0, :-1].detach()
    losses = -logits.log_softmax(-1)[torch.arange(len(data.valid)), torch.tensor(data.valid.tolist())]
    texts = [text for text in make_texts(40) if tokens.is_validation(text, 0.3)]
    ends = np.flatnonzero(data.valid == 0)
    whole = {"losses": 0.0, "bytes": 0, "zlib": 0.0}
    for name in ("A", "B"):
        mine = [i for i, text in enumerate(texts) if make_texts(40).index(text) % 2 == (name == "B")]
        loss = sum(losses[0 if i == 0 else ends[i - 1] + 1 : ends[i]].sum().item() for i in mine)
        text = "\n".join(texts[i] for i in mine)
        num_bytes = sum(len(texts[i].encode()) for i in mine)
        assert found["subsets"][name]["bytes"] == num_bytes
        assert found["subsets"][name]["bits_per_byte"] == pytest.approx(loss / math.log(2) / num_bytes, rel=1e-4)
        squeezed = 8 * len(zlib.compress(text.encode(), 9))
        assert found["subsets"][name]["zlib"] == pytest.approx(squeezed / num_bytes)
        whole["losses"] += loss
        whole["bytes"] += num_bytes
        whole["zlib"] += squeezed
    assert found["bytes"] == whole["bytes"] > 3 * len(data.valid)
    assert found["bits_per_byte"] == pytest.approx(whole["losses"] / math.log(2) / whole["bytes"], rel=1e-4)
    assert found["zlib"] == pytest.approx(whole["zlib"] / whole["bytes"])
    assert found["tokens"] == len(data.valid)
    assert found["loss"] == pytest.approx(losses.mean().item(), rel=1e-4)  # the ends of documents are tokens, too


def test_the_loss_by_position_reaches_the_length_that_is_set(trained):
    found = train_pile.evaluate(trained.model, trained.data, settings(eval_length=100), ())
    assert [end for end, _ in found["by_position"]] == [16, 32, 64, 100]


def test_evaluation_equals_a_slow_count(trained):
    """Every token alone: its own context, one forward pass, Python sums."""
    chosen, data = settings(eval_tokens=500), trained.data
    report = train_pile.evaluate(trained.model, data, chosen, train_pile.common_bigrams(data.train))
    stream, docs = tokens.first_documents(data, chosen.eval_tokens)
    stream, T, total = stream.tolist(), 32, len(stream) - 1
    training = data.train.tobytes()
    losses, ar, text_loss, num_bytes = [], {name: [] for name in train_pile.DEFINITIONS}, 0.0, 0
    for t in range(1, total + 1):
        starts = [start for start in range(0, total, T // 2) if start + T <= total and start + T >= t] or [total - T]
        context, target = stream[starts[0] : t], stream[t]
        with torch.no_grad():
            logits = trained.model(torch.tensor([context]))[0, -1].double()
        loss = (logits.exp().sum().log() - logits[target]).item()
        losses.append(loss)
        pairs = [(context[i], context[i + 1]) for i in range(len(context) - 1)]
        ar["token"].append(target in context)
        ar["bigram"].append((context[-1], target) in pairs)
        pair = bytes((context[-1], target))
        seen = sum(training[i : i + 2] == pair for i in range(len(training) - 1)) if ar["bigram"][-1] else 0
        ar["rare"].append(ar["bigram"][-1] and seen <= train_pile.RARE)
        if target != 0:
            text_loss, num_bytes = text_loss + loss, num_bytes + 1
    assert report["tokens"] == total and report["loss"] == pytest.approx(sum(losses) / total, rel=1e-5)
    assert report["bytes"] == num_bytes
    assert report["bits_per_byte"] == pytest.approx(text_loss / math.log(2) / num_bytes, rel=1e-5)
    for name, flagged in ar.items():
        assert report["slices"][name]["share"] == pytest.approx(sum(flagged) / total, abs=1e-12)
        mine = [loss for loss, flag in zip(losses, flagged, strict=True) if flag]
        others = [loss for loss, flag in zip(losses, flagged, strict=True) if not flag]
        assert report["slices"][name]["recall"] == pytest.approx(math.exp(sum(mine) / len(mine)), rel=1e-4)
        assert report["slices"][name]["other"] == pytest.approx(math.exp(sum(others) / len(others)), rel=1e-4)
    assert sum(row["bytes"] for row in report["subsets"].values()) == num_bytes
    for key in ("bits_per_byte", "zlib"):  # the whole is the mean of the subsets, weighted by their bytes
        weighted = sum(row["bytes"] * row[key] for row in report["subsets"].values()) / num_bytes
        assert weighted == pytest.approx(report[key], rel=1e-9)


def test_a_uniform_model_needs_eight_bits_per_byte(trained):
    uniform = train_pile.make_model("rebased", settings(), 256)
    torch.nn.init.zeros_(uniform.embedding.weight)
    report = train_pile.evaluate(uniform, trained.data, settings(), ())
    assert f"{report['bits_per_byte']:.3f}" == "8.000" and f"{report['perplexity']:.2f}" == "256.00"
    assert all(f"{row['bits_per_byte']:.3f}" == "8.000" for row in report["subsets"].values())
    assert all(loss == pytest.approx(math.log(256), rel=1e-6) for _, loss in report["by_position"])


def test_bits_per_byte_is_the_formula_of_the_pile():
    losses = np.full(300, math.log(2))  # 300 tokens of one bit for 100 bytes: tokens / bytes · loss / ln 2
    assert train_pile.bits_per_byte(losses, 100) == pytest.approx(300 / 100 * math.log(2) / math.log(2))


def test_a_subset_without_a_byte_is_no_error(trained, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "\0" * n, "meta": {"pile_set_name": "Zeros"}} for n in range(1, 40)])
    data = tokens_of(tmp_path, [path])
    report = train_pile.evaluate(trained.model, data, settings(), ())
    assert report["bytes"] == 0 and report["subsets"]["Zeros"]["zlib"] == 0.0 == report["zlib"]


def test_loss_by_position_reaches_beyond_training(trained):
    stream, _ = tokens.first_documents(trained.data, 300)
    found = pile_report.loss_by_position(lambda row: train_pile.next_token_losses(trained.model, row), stream, 100)
    assert [end for end, _ in found] == [16, 32, 64, 100]
    with torch.no_grad():
        rows = [stream[start : start + 101].astype(np.int64) for start in range(0, len(stream) - 100, 100)]
        losses = torch.cat([train_pile.next_token_losses(trained.model, torch.tensor(row[None])) for row in rows])
    assert found[3][1] == pytest.approx(losses[:, 64:].mean().item(), rel=1e-5)


def test_a_sample_at_temperature_0_is_the_greedy_continuation(trained):
    expected = [0, *"the pile 東".encode()]
    for _ in range(20):
        expected.append(trained.model(torch.tensor([expected]))[0, -1].argmax().item())
        if expected[-1] == 0:
            break
    text = train_pile.sample(trained.model, tokens.Bytes(), "the pile 東", 20, temperature=0.0)
    assert text == bytes(i for i in expected if i).decode("utf-8", "replace")


def test_a_sample_begins_a_document(trained, monkeypatch):
    """The separator stands before the prompt, as it does before every document of the data."""
    read = []
    monkeypatch.setattr(model, "generate", lambda model, begin, *_: read.append(begin.tolist()) or iter(()))
    assert train_pile.sample(trained.model, tokens.Bytes(), "xy") == "xy"
    assert read == [[[tokens.Bytes().separator, *b"xy"]]]


def test_a_sample_ends_with_the_document(trained, monkeypatch):
    monkeypatch.setattr(model, "generate", lambda *_: (torch.tensor([i]) for i in [*b"ab", 0, *b"cd"]))
    assert train_pile.sample(trained.model, tokens.Bytes(), "x") == "xab"


# Tables -------------------------------------------------------------------------------------------------------------
def test_a_curve_has_at_most_sixty_points():
    for steps in (1, 6, 60, 61, 1000):
        log = [{"loss": float(step), "tokens_per_s": 7.0} for step in range(steps)]
        curve = pile_report.summary(log, 10)["curve"]
        assert 1 <= len(curve) <= 60 and curve[-1][0] <= 10 * steps
    assert curve[0] == [170, 8.0]


def test_the_table_says_who_is_not_at_zlib_and_prints_no_nan(trained, capsys):
    row = train_pile.measure({"rebased": (trained.model, trained.log)}, settings(), trained.data)[0]
    row["slices"]["rare"]["recall"] = None  # not one such token
    row["zlib"] = row["bits_per_byte"] - 1
    for cell in row["subsets"].values():
        cell["zlib"] = cell["bits_per_byte"] - 1
    low = row | {"mixer": "low", "bits_per_byte": row["zlib"] - 1}
    low["subsets"] = {name: cell | {"bits_per_byte": cell["zlib"] - 1} for name, cell in row["subsets"].items()}
    pile_report.print_tables([row, low])
    pile_report.print_reading([row, low])
    shown = capsys.readouterr().out
    assert "Not yet at zlib: rebased." in shown and "nan" not in shown and "–" in shown
    for line in shown.splitlines():
        if line.startswith(("Github", "ArXiv", "Wikipedia")):
            assert line.count(">") == 1


def made_up_rows():
    """Two models, every number of theirs another one."""
    numbers = random.Random(3)
    rows = []
    for mixer in ("rebased", "attention"):
        def cell():
            bits = {"bits_per_byte": 8 * numbers.random(), "zlib": 8 * numbers.random()}
            return bits | {"bytes": numbers.randrange(10**6)}

        row = cell() | {"mixer": mixer, "parameters": numbers.randrange(10**6), "tokens": numbers.randrange(10**6)}
        row |= {"loss": numbers.random(), "perplexity": 9 * numbers.random(), "tokens_per_s": 9999 * numbers.random()}
        row["settings"] = {"steps": 321, "batch_tokens": 1000, "seq_len": 48}
        row["slices"] = {name: {part: numbers.random() for part in ("share", "recall", "other")}
                         for name in train_pile.DEFINITIONS}
        row["subsets"] = {name: cell() for name in ("Github", "ArXiv")}
        row["curve"] = [[1000 * i, numbers.random()] for i in range(1, 9)]
        row["by_position"] = [[end, numbers.random()] for end in (16, 32, 64, 100)]
        rows.append(row)
    for name in ("curve", "by_position"):  # the lines cross: whoever begins above ends below
        first, second = (row[name] for row in rows)
        first[0][1] = second[0][1] + second[-1][1] - first[-1][1]
    return rows


def test_every_entry_of_the_tables(capsys):
    rows = made_up_rows()
    pile_report.print_tables(rows)
    shown = capsys.readouterr().out
    lines = {line[:20].strip(): line[20:].split() for line in shown.splitlines()}
    first = rows[0]
    assert shown.startswith("321 steps of 1,000 tokens, T = 48; validation: "
                            f"{first['tokens']:,} tokens, {first['bytes']:,} bytes\n")

    def marked(cell):
        return f"{cell['bits_per_byte']:.3f}" + (">" if cell["bits_per_byte"] > cell["zlib"] else "")

    for row in rows:
        assert lines[row["mixer"]] == [f"{row['parameters']:,}", f"{row['loss']:.3f}", f"{row['perplexity']:.2f}",
                                       marked(row), f"{row['tokens_per_s']:,.0f}"]
    assert lines["zlib"] == [f"{first['zlib']:.3f}"]
    others = [line[20:].split() for line in shown.splitlines() if line[:20].strip() == "the others"]
    for name, of_others in zip(train_pile.DEFINITIONS, others, strict=True):
        share = first["slices"][name]["share"]
        assert lines[f"{name}, AR"] == [f"{share:.1%}", *(f"{row['slices'][name]['recall']:.2f}" for row in rows)]
        assert of_others == [f"{1 - share:.1%}", *(f"{row['slices'][name]['other']:.2f}" for row in rows)]
    for name in ("Github", "ArXiv"):
        cell = first["subsets"][name]
        bits = [marked(row["subsets"][name]) for row in rows]
        assert lines[name] == [f"{cell['bytes']:,}", f"{cell['zlib']:.3f}", *bits]


@pytest.mark.parametrize("reverse", [False, True])
def test_every_number_of_the_reading(capsys, reverse):
    """The best model comes first and is the one whose recall is told."""
    rows = made_up_rows()[:: -1 if reverse else 1]
    pile_report.print_reading(rows)
    shown = capsys.readouterr().out
    best, worst = sorted(rows, key=lambda row: row["bits_per_byte"])
    ranking = ", ".join(f"{row['mixer']} {row['bits_per_byte']:.3f}" for row in (best, worst))
    assert f"Bits per byte after 321,000 tokens, one seed: {ranking}; zlib {best['zlib']:.3f}." in shown
    bigram = best["slices"]["bigram"]
    assert f"{bigram['share']:.0%} of the tokens" in shown
    assert f"perplexity {bigram['recall']:.2f} there, {bigram['other']:.2f} on the others ({best['mixer']})." in shown


def test_the_figure_is_drawn_from_these_numbers(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(lesson, "save_figure", lambda figure, path, description: figures.append((figure, description)))
    rows = made_up_rows()
    pile_report.draw(rows, tmp_path / "x.png")
    ((figure, description),) = figures
    for axis, key in zip(figure.axes, ("curve", "by_position"), strict=True):
        for row in rows:
            (text,) = [text for text in axis.texts if text.get_text() == row["mixer"]]
            (line,) = [line for line in axis.get_lines() if line.get_color() == text.get_color()]
            assert [list(pair) for pair in zip(line.get_xdata(), line.get_ydata(), strict=True)] == row[key]
        names = [text.get_text() for text in sorted(axis.texts, key=lambda text: text.xy[1])]
        assert names == [row["mixer"] for row in sorted(rows, key=lambda row: row[key][-1][1])]
    (dotted,) = [line for line in figure.axes[1].get_lines() if line.get_color() == "gray"]
    assert list(dotted.get_xdata()) == [48, 48]
    assert all(f"{row['mixer']} {row['loss']:.2f}" in description for row in rows)


def test_a_row_keeps_the_median_speed_and_the_means_of_the_curve():
    log = [{"loss": float(i * i), "tokens_per_s": speed} for i, speed in enumerate([5.0, 1.0, 9.0, 7.0, 2.0, 4.0, 8.0])]
    found = pile_report.summary(log, batch_tokens=10, points=3)
    assert found == {"tokens_per_s": 5.0, "curve": [[30, (0 + 1 + 4) / 3], [60, (9 + 16 + 25) / 3]]}


# The command line ---------------------------------------------------------------------------------------------------
def test_the_lesson_as_a_script(trained, tmp_path, capsys):
    common = ["--data", trained.folder / "data.jsonl", "--tokens", trained.folder / "tokens", "--out", tmp_path,
              "--mixers", "rebased", "--figure", tmp_path / "x.png", *flags(settings())]
    run_script(*common)
    shown = capsys.readouterr().out
    assert "Github" in shown and "checks: " in shown and " 0 failed" in shown and "AR" in shown
    assert_same_run(tmp_path / "rebased" / "checkpoint.pt", trained.checkpoint)
    row = json.loads((tmp_path / "results.jsonl").read_text(encoding="utf-8"))
    assert row["mixer"] == "rebased" and row["seed"] == 0 and row["parameters"] == 725_376 and row["hardware"]
    with pytest.raises(SystemExit):
        run_script(*common)  # would overwrite
    assert "--resume" in capsys.readouterr().err
    with files.claim(tmp_path), pytest.raises(SystemExit):
        run_script(*common, "--resume")
    assert f"another run is writing to {tmp_path}" in capsys.readouterr().err
    run_script(*common, "--resume")  # finished: evaluates again
    assert json.loads((tmp_path / "results.jsonl").read_text(encoding="utf-8"))["loss"] == row["loss"]


def test_a_full_disk_is_one_line_and_the_last_checkpoint_is_intact(trained, tmp_path, capsys):
    resource = pytest.importorskip("resource")
    path = tmp_path / "rebased" / "checkpoint.pt"
    small = train_pile.make_model("rebased", settings(), 256)
    optimizer = train_pile.make_optimizer(small, settings())
    log = [train_pile.train_step(small, optimizer, trained.data, settings(), 0)]
    train_pile.save_checkpoint(path, small, optimizer, log, "rebased", settings(), trained.data)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, limits[1]))
    try:
        with pytest.raises(SystemExit) as stop:
            run_script("--data", trained.folder / "data.jsonl", "--tokens", trained.folder / "tokens", "--resume",
                       "--out", tmp_path, "--mixers", "rebased", "--figure", tmp_path / "x.png", *flags(settings()))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert stop.value.code == 2
    last = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
    assert "error: cannot write" in last and "File too large; the one before is intact" in last
    assert path.read_bytes() == before and sorted(os.listdir(path.parent)) == ["checkpoint.pt", "log.jsonl"]


@pytest.mark.parametrize("arguments, message", [
    (["--data", "nowhere"], "no such file"), (["--data", "folder"], "no .jsonl"),
    (["--data", "x.parquet"], "convert it"),
    (["--data", "empty.jsonl"], "not one document"), (["--data", "one.jsonl"], "no document fell into the validation"),
    (["--data", "few.jsonl", "--set", "valid_share=0.5"], "too few"),
    (["--data", "few.jsonl", "--set", "valid_share=0.5", "seq_len=8", "--out", "x.parquet"], "cannot use"),
    (["--set", "valid_share=2"], "valid_share must lie"), (["--set", "steps=0"], "steps must be at least 1"),
    (["--set", "seq_len=100"], "no multiple"), (["--set", "lr=nan"], "lr and clip must be positive"),
    (["--set", "tokenizer=bert"], "one of bytes"), (["--set", "step=3"], "no setting 'step'"),
    (["--set", "model=large"], "one of laptop, paper"), (["--set", "weight_decay=nan"], "weight_decay must be at"),
    (["--mixers", "mamba2"], "invalid choice"), (["--set", "seed=-1"], "seed must be at least 0"),
    (["--set", f"seed={2**31}"], f"seed must be at least 0 and below 2**31, got {2**31}"),
    (["--set", f"seed={10**22}"], "seed must be at least 0 and below 2**31"),
    (["--set", f"eval_tokens={10**22}"], "eval_tokens must be at least 1 and below 2**31"),
    (["--device", "cuda:99"], "--device"), (["--device", "gpu"], "--device"),
    (["--tokenizer-file", "one.jsonl", "--set", "tokenizer=gpt2"], "no tokenizer.json"),
])
def test_bad_input_is_one_clear_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("empty.jsonl").touch()
    Path("x.parquet").touch()
    write(Path("one.jsonl"), [{"text": "only one"}])
    write(Path("few.jsonl"), [{"text": text} for text in make_texts(5)])
    if "--tokenizer-file" in arguments:
        pytest.importorskip("tokenizers")
    monkeypatch.setattr(lesson, "TALLY", {"passed": 0, "failed": 0})
    with pytest.raises(SystemExit) as stop:
        run_script(*arguments)
    shown = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in shown
    last = [line for line in shown.replace("\r", "\n").splitlines() if "error: " in line]
    assert len(last) == 1 and message in last[0], shown


def test_another_mixer_does_not_replace_the_rows_of_a_folder(tmp_path):
    """All that are there must be asked for; then the new one begins beside them."""
    (tmp_path / "rebased").mkdir()
    (tmp_path / "rebased" / "checkpoint.pt").touch()
    for mixers, resume in ((["based"], False), (["based"], True)):
        options = SimpleNamespace(out=tmp_path, mixers=mixers, resume=resume)
        with pytest.raises(Refusal, match="holds rebased: say --mixers rebased based --resume"):
            with pile_run.own_folder(options):
                pass
    with pile_run.own_folder(SimpleNamespace(out=tmp_path, mixers=["rebased", "based"], resume=True)) as out:
        assert out == tmp_path


@pytest.mark.parametrize("given, wrong", [
    ({"RANK": "1"}, "WORLD_SIZE is not set"), ({"WORLD_SIZE": "2"}, "RANK is not set"),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x"}, "MASTER_PORT is not set"),
    ({"RANK": "one", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "RANK=one is no number"),
    ({"RANK": "0", "WORLD_SIZE": "9" * 5000, "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "WORLD_SIZE=9+ is no number"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 is no number of processes"),
    ({"RANK": "0", "WORLD_SIZE": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "WORLD_SIZE=0 is no number of proc"),
    ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "RANK=2 is not below WORLD_SIZE=2"),
])
def test_half_a_launch_is_one_line(monkeypatch, given, wrong):
    for name in pile_run.LAUNCH:
        monkeypatch.delenv(name, raising=False)
    pile_run.refuse_half_a_launch()
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Refusal, match=f"set as by torchrun, but {wrong}.*: start with torchrun, or unset"):
        pile_run.refuse_half_a_launch()


def test_a_whole_launch_is_taken(monkeypatch):
    for name, value in zip(pile_run.LAUNCH, ("1", "2", "localhost", "29500"), strict=True):
        monkeypatch.setenv(name, value)
    pile_run.refuse_half_a_launch()


@pytest.mark.skipif(sys.platform == "win32", reason="a file that is mapped cannot be cut there")
def test_tokens_that_are_cut_while_training_are_one_line_and_no_bus_error(trained, tmp_path):
    """What was trained until then is in the checkpoint."""
    path = tmp_path / "train.bin"
    path.write_bytes(trained.data.train.tobytes())
    data = trained.data._replace(train=np.memmap(path, np.uint8, "r"))
    tokens.refuse_cut(data.train)
    os.truncate(path, 1000)
    with pytest.raises(Refusal, match="train.bin has been cut short"):
        train_pile.train("rebased", settings(), data, tmp_path / "run")
    path.unlink()
    with pytest.raises(Refusal, match="train.bin has been cut short"):
        tokens.refuse_cut(data.train)
    tokens.refuse_cut(np.zeros(3))


@pytest.mark.skipif(sys.platform == "win32", reason="a file that is mapped cannot be cut there")
def test_tokens_that_are_cut_after_the_last_step_are_one_line(trained, tmp_path):
    path = tmp_path / "train.bin"
    path.write_bytes(trained.data.train.tobytes())
    data = trained.data._replace(train=np.memmap(path, np.uint8, "r"))
    os.truncate(path, 0)
    with pytest.raises(Refusal, match="train.bin has been cut short"):
        train_pile.measure({"rebased": (trained.model, trained.log)}, settings(), data)


def test_nothing_optional_is_imported_at_the_top_of_a_file():
    for path in (PROGRAM, *(ROOT / "rebased").glob("*.py")):
        for line in path.read_text(encoding="utf-8").splitlines():  # an import inside a function is indented
            assert not line.startswith(("import", "from")) or not line.split()[1].startswith(
                ("zstandard", "tiktoken", "tokenizers", "matplotlib")), f"{path.name}: {line}"


# Kill, full stop and two processes ----------------------------------------------------------------------------------
def command(folder, out, chosen, mixer="rebased"):
    return [str(x) for x in (PROGRAM, "--data", folder / "data.jsonl", "--tokens", folder / "tokens", "--out", out,
                             "--mixers", mixer, "--resume", "--figure", folder / "x.png", *flags(chosen))]


def start(arguments, processes=1):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.Popen([sys.executable, *(launcher if processes > 1 else []), *arguments],
                            start_new_session=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def steps_logged(out, mixer="rebased"):
    log = out / mixer / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


LINUX = pytest.mark.skipif(sys.platform != "linux", reason="/proc tells which workers a process has")


def kill_when(process, condition):
    """kill -9 the process and its workers as soon as `condition()` holds; False if it ended before."""
    while process.poll() is None and not condition():
        time.sleep(0.0005)
    alive = process.poll() is None
    if alive:
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()
        for pid in (process.pid, *map(int, workers)):  # torchrun's workers would go on without it
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    process.wait()
    return alive


@pytest.mark.slow
@LINUX
def test_kill_9_at_ten_random_moments_changes_nothing(tmp_path):
    make_data(tmp_path)
    chosen = settings(steps=44, save_every=1, eval_length=32)
    assert start(command(tmp_path, tmp_path / "whole", chosen)).wait() == 0
    seed = random.randrange(10**6)
    print("seed", seed)
    chooser, out, kills, torn = random.Random(seed), tmp_path / "killed", 0, 0
    temporary = out / "rebased" / "checkpoint.pt.tmp"
    for target in sorted(chooser.sample(range(1, 42), 10)):
        process, delay = start(command(tmp_path, out, chosen)), chooser.uniform(0, 0.05)
        if target % 2:  # a little after a step; else while a checkpoint is being written
            kills += kill_when(process, lambda: steps_logged(out) >= target and not time.sleep(delay))  # noqa: B023
        else:
            kills += kill_when(process, lambda: steps_logged(out) >= target and temporary.exists())  # noqa: B023
        torn += temporary.exists()
    assert kills == 10
    assert start(command(tmp_path, out, chosen)).wait() == 0
    assert_same_run(out / "rebased" / "checkpoint.pt", tmp_path / "whole" / "rebased" / "checkpoint.pt")
    log = files.read_rows(out / "rebased" / "log.jsonl")
    assert [record["step"] for record in log] == list(range(44))
    print(f"{torn} of 10 kills left a half-written checkpoint behind")


LONGER = settings(steps=50, save_every=10, eval_length=32, lr=1e-3, warmup=20, seq_len=64, batch_tokens=512)


def losses_logged(out, mixer):
    return [row["loss"] for row in files.read_rows(out / mixer / "log.jsonl")]


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["rebased", "based", "attention"])
def test_two_processes_have_the_gradient_of_one(tmp_path, mixer):
    """AdamW's average after one step is a tenth of the clipped gradient. Four micro-batches: no_sync has its part."""
    make_data(tmp_path)
    chosen = settings(steps=1, warmup=1, seq_len=64, batch_tokens=512, eval_length=32)
    gradients = []
    for name, processes in (("one", 1), ("two", 2)):
        assert start(command(tmp_path, tmp_path / name, chosen, mixer), processes).wait() == 0
        state = pile_run.load_checkpoint(tmp_path / name / mixer / "checkpoint.pt")["optimizer"]["state"]
        gradients.append(torch.cat([moments["exp_avg"].flatten() for moments in state.values()]))
    one, two = gradients
    assert one.norm() > 0 and (two - one).norm() < 1e-5 * one.norm()


@pytest.mark.slow
@LINUX
def test_two_processes_train_as_one_and_their_run_resumes_with_one(tmp_path):
    """The mean loss of 50 steps lies within the spread of seeds: ReBased amplifies rounding, nothing else differs."""
    make_data(tmp_path)
    means = []
    for seed in range(4):
        chosen = pile_settings.Settings(**asdict(LONGER) | {"seed": seed})
        assert start(command(tmp_path, tmp_path / f"seed {seed}", chosen)).wait() == 0
        means.append(mean(losses_logged(tmp_path / f"seed {seed}", "rebased")))
    one, two, mixed = (losses_logged(tmp_path / "seed 0", "rebased"), tmp_path / "two", tmp_path / "mixed")
    assert start(command(tmp_path, two, LONGER), processes=2).wait() == 0
    found = losses_logged(two, "rebased")
    assert len(found) == len(one) == 50
    assert found[:3] == pytest.approx(one[:3], rel=1e-5)
    assert abs(mean(found) - mean(one)) < stdev(means)
    differences = [abs(a - b) for a, b in zip(one, found, strict=True)]
    print(f"mean loss {mean(one):.6f} and {mean(found):.6f}, spread of seeds {stdev(means):.4f}, "
          f"a step differs by up to {max(differences):.1e}")
    process = start(command(tmp_path, mixed, LONGER), processes=2)
    assert kill_when(process, lambda: steps_logged(mixed) >= 25)
    assert 20 <= len(pile_run.load_checkpoint(mixed / "rebased" / "checkpoint.pt")["log"]) < 50
    assert start(command(tmp_path, mixed, LONGER)).wait() == 0
    found = losses_logged(mixed, "rebased")
    assert len(found) == 50 and abs(mean(found) - mean(one)) < stdev(means)
