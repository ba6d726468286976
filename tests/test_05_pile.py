"""05: training that survives kill -9 and a full disk, evaluation, generation, two processes, errors."""
import contextlib
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_05_pile_data import make_data, make_texts, tokens_of, write

pile = import_module("05_train_pile")
models = pile.models

PROGRAM = Path(__file__).parents[1] / "05_train_pile.py"
CPU = pile.Place(torch.device("cpu"))
PLAIN = SimpleNamespace(resume=False, compile=False, recompute=False)
RESUME = SimpleNamespace(resume=True, compile=False, recompute=False)


def settings(**changes):
    return pile.Settings(**dict(seq_len=32, batch_tokens=128, micro_batch=2, steps=6, warmup=2, save_every=2,
                                valid_share=0.2, eval_tokens=300, eval_length=64) | changes)


# Training -----------------------------------------------------------------------------------------------------------
def test_parameter_counts_of_the_paper():
    paper = pile.Settings(**pile.PRESETS["paper"])
    counts = {m: models.count_parameters(pile.model_config(m, paper, 50280)) for m in ("attention", "based", "rebased")}
    assert counts == {"attention": 151_880_448, "based": 147_542_016, "rebased": 147_548_928}


def test_laptop_models_are_equal_in_size():
    sizes = [models.count_parameters(pile.laptop_config(mixer, 256)) for mixer in ("rebased", "based", "attention")]
    assert max(sizes) < 1.002 * min(sizes)


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
    data = tokens_of(tmp_path, [make_data(tmp_path)])
    found = []
    for micro_batch in (1, 3, 4):
        chosen = settings(micro_batch=micro_batch)
        model = pile.make_model("rebased", chosen, data, CPU).double()
        parts = pile.pile_data.training_batch(data.train, chosen, 0)
        found.append(pile.gradient(model, parts, chosen, CPU.device))
    whole = pile.losses_of(model, torch.cat(parts), CPU.device).mean()
    expected = torch.cat([*(g.flatten() for g in torch.autograd.grad(whole, list(model.parameters()))), whole[None]]).detach()
    for vector in found:
        assert vector[-1].item() == pytest.approx(whole.item(), rel=1e-12)
        assert (vector - expected).norm() < 1e-9 * expected.norm()


def test_processes_hold_branches_of_one_tree(tmp_path):
    """Gradients of 1, 2, 4 and 8 processes, added as `add_up` does, are equal bit for bit."""
    data, chosen = tokens_of(tmp_path, [make_data(tmp_path)]), settings(batch_tokens=32 * 8, micro_batch=1)
    model = pile.make_model("rebased", chosen, data, CPU)
    found = []
    for world in (1, 2, 4, 8):
        shares = [pile.pile_data.training_batch(data.train, chosen, 0, rank, world) for rank in range(world)]
        branches = [pile.gradient(model, parts, chosen, CPU.device) for parts in shares]
        while len(branches) > 1:
            branches = [a + b for a, b in zip(branches[::2], branches[1::2], strict=True)]
        found.append(branches[0])
    assert all(torch.equal(vector, found[0]) for vector in found)


def test_recomputed_blocks_give_the_same_gradients(tmp_path):
    data, chosen, gradients = tokens_of(tmp_path, [make_data(tmp_path)]), settings(), []
    for again in (False, True):
        model = pile.make_model("rebased", chosen, data, CPU)
        ready = pile.make_ready(model, SimpleNamespace(compile=False, recompute=again))
        gradients.append(pile.gradient(ready, pile.pile_data.training_batch(data.train, chosen, 0), chosen, CPU.device))
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-7)


def test_decay_is_for_matrices_and_the_rate_warms_up_and_falls(tmp_path):
    model = models.LanguageModel(pile.laptop_config("rebased", 256))
    decayed, free = pile.make_optimizer(model, settings(), torch.device("cpu")).param_groups
    assert {p.ndim for p in decayed["params"]} == {2} and 2 not in {p.ndim for p in free["params"]}
    assert free["weight_decay"] == 0 and decayed["weight_decay"] == 0.1
    assert sum(p.numel() for group in (decayed, free) for p in group["params"]) == 725_376
    rates = [pile.learning_rate(step, settings(steps=100, warmup=10, lr=1.0)) for step in range(101)]
    assert rates[:11] == [pytest.approx(min(1, (i + 1) / 10)) for i in range(11)]
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[55] == pytest.approx(0.5) and rates[100] == 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of six steps: its folder, data, model and log."""
    folder = tmp_path_factory.mktemp("trained")
    data = tokens_of(folder, [make_data(folder)])
    model, log = pile.train("rebased", settings(), data, folder / "run", CPU, PLAIN)
    return SimpleNamespace(folder=folder, data=data, model=model, log=log, checkpoint=folder / "run" / "checkpoint.pt")


def test_a_stopped_run_continues_bit_for_bit(trained, tmp_path, monkeypatch):
    original = pile.train_step

    def stop(model, optimizer, batch, step, *rest):
        if step == 3:
            raise KeyboardInterrupt
        return original(model, optimizer, batch, step, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pile, "train_step", stop)
        pile.train("rebased", settings(), trained.data, tmp_path, CPU, PLAIN)
    assert len(pile.load_checkpoint(tmp_path / "checkpoint.pt")["log"]) == 2
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3  # one step more than the checkpoint knows
    torch.rand(5)
    model, log = pile.train("rebased", settings(), trained.data, tmp_path, CPU, RESUME)
    assert [record["loss"] for record in log] == [record["loss"] for record in trained.log]
    assert_same_run(tmp_path / "checkpoint.pt", trained.checkpoint)


def assert_same_run(path, other):
    """Weights and optimiser states of two checkpoints are equal bit for bit."""
    a, b = pile.load_checkpoint(path), pile.load_checkpoint(other)
    assert len(a["log"]) == len(b["log"]) and a["model"].keys() == b["model"].keys()
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    for i, state in a["optimizer"]["state"].items():
        assert all(torch.equal(value, b["optimizer"]["state"][i][name]) for name, value in state.items())


def test_training_learns(trained):
    assert trained.log[-1]["loss"] < 0.85 * trained.log[0]["loss"]
    assert [record["step"] for record in trained.log] == list(range(6))


def test_resume_refuses_another_run(trained, tmp_path):
    folder = trained.checkpoint.parent
    for changes in ({"lr": 1e-5}, {"seed": 1}, {"steps": 7}):
        with pytest.raises(pile.Refusal, match=next(iter(changes))):
            pile.train("rebased", settings(**changes), trained.data, folder, CPU, RESUME)
    with pytest.raises(pile.Refusal, match="mixer"):
        pile.train("based", settings(), trained.data, folder, CPU, RESUME)
    (tmp_path / "other.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in make_texts(70, 1)))
    with pytest.raises(pile.Refusal, match="other data"):
        pile.train("rebased", settings(), tokens_of(tmp_path, [tmp_path / "other.jsonl"]), folder, CPU, RESUME)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("the_bomb_went_off",)


def test_a_checkpoint_runs_no_code_and_damage_is_named(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": 2, "model": Bomb()}, "bomb.pt")
    Path("cut.pt").write_bytes(trained.checkpoint.read_bytes()[:5000])
    Path("text.pt").write_text("no checkpoint")
    torch.save([1, 2], "list.pt")
    for name in ("bomb.pt", "cut.pt", "text.pt", "list.pt"):
        with pytest.raises(pile.Refusal, match="not a checkpoint"):
            pile.load_checkpoint(Path(name))
    assert not Path("the_bomb_went_off").exists()


def test_a_full_disk_is_one_line_and_the_last_checkpoint_is_intact(trained, tmp_path, capsys):
    arguments = ["--data", trained.folder / "data.jsonl", "--tokens", trained.folder / "tokens", "--out", tmp_path,
                 "--resume", "--figure", tmp_path / "x.png", *flags(settings())]
    (tmp_path / "rebased").mkdir()
    model = pile.make_model("rebased", settings(), trained.data, CPU)
    optimizer, path = pile.make_optimizer(model, settings(), CPU.device), tmp_path / "rebased" / "checkpoint.pt"
    parts = pile.pile_data.training_batch(trained.data.train, settings(), 0)
    log = [pile.train_step(model, optimizer, parts, 0, settings(), CPU)]
    pile.save_checkpoint(path, model, optimizer, log, "rebased", settings(), trained.data)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, limits[1]))
    try:
        with pytest.raises(SystemExit) as stop:
            pile.main([*map(str, arguments), "--mixers", "rebased"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert stop.value.code == 2
    last = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
    assert "error: cannot write" in last and "File too large; the one before is intact" in last
    assert path.read_bytes() == before and sorted(os.listdir(path.parent)) == ["checkpoint.pt", "log.jsonl"]


def flags(chosen):
    """Settings as command-line options."""
    default = pile.Settings()
    return [part for name, value in pile.asdict(chosen).items() if value != getattr(default, name)
            for part in (f"--{name.replace('_', '-')}", str(value))]


# Evaluation ---------------------------------------------------------------------------------------------------------
def test_evaluation_equals_a_slow_count(trained):
    """Every token alone: its own context, one forward pass, Python sums."""
    chosen, data = settings(eval_tokens=500), trained.data
    report = pile.evaluate(trained.model, data, chosen, CPU.device, pile.pile_data.common_bigrams(data.train))
    stream, docs = pile.validation_stream(data, chosen.eval_tokens)
    stream, T, total = stream.tolist(), 32, len(stream) - 1
    training = data.train.tobytes()
    losses, ar, text_loss, num_bytes = [], {name: [] for name in pile.pile_data.DEFINITIONS}, 0.0, 0
    for t in range(1, total + 1):
        starts = [start for start in range(0, total, T // 2) if start + T <= total and start + T >= t] or [total - T]
        start = starts[0]
        context, target = stream[start:t], stream[t]
        with torch.no_grad():
            logits = trained.model(torch.tensor([context]))[0, -1].double()
        loss = (logits.exp().sum().log() - logits[target]).item()
        losses.append(loss)
        pairs = [(context[i], context[i + 1]) for i in range(len(context) - 1)]
        ar["token"].append(target in context)
        ar["bigram"].append((context[-1], target) in pairs)
        rare = sum(training[i : i + 2] == bytes((context[-1], target)) for i in range(len(training) - 1)) <= pile.pile_data.RARE \
            if ar["bigram"][-1] else False
        ar["rare"].append(rare)
        if target != 0:
            text_loss, num_bytes = text_loss + loss, num_bytes + 1
    assert report["tokens"] == total and report["loss"] == pytest.approx(sum(losses) / total, rel=1e-5)
    assert report["bits_per_byte"] == pytest.approx(text_loss / math.log(2) / num_bytes, rel=1e-5)
    for name, flagged in ar.items():
        assert report["slices"][name]["share"] == pytest.approx(sum(flagged) / total, abs=1e-12)
        mine = [loss for loss, flag in zip(losses, flagged, strict=True) if flag]
        assert report["slices"][name]["recall"] == pytest.approx(math.exp(sum(mine) / len(mine)), rel=1e-4)
    assert sum(row["bytes"] for row in report["subsets"].values()) == num_bytes
    weighted = sum(row["bytes"] * row["bits_per_byte"] for row in report["subsets"].values()) / num_bytes
    assert weighted == pytest.approx(report["bits_per_byte"], rel=1e-9)


def test_a_uniform_model_needs_eight_bits_per_byte(trained):
    model = pile.make_model("rebased", settings(), trained.data, CPU)
    torch.nn.init.zeros_(model.embedding.weight)
    report = pile.evaluate(model, trained.data, settings(), CPU.device, ())
    assert f"{report['bits_per_byte']:.3f}" == "8.000" and f"{report['perplexity']:.2f}" == "256.00"
    assert all(f"{row['bits_per_byte']:.3f}" == "8.000" for row in report["subsets"].values())
    assert all(loss == pytest.approx(math.log(256), rel=1e-6) for _, loss in report["by_position"])


def test_bits_per_byte_is_the_formula_of_the_pile():
    assert pile.bits_per_byte(math.log(2), 300, 100) == pytest.approx(3.0)  # 300 tokens of one bit for 100 bytes


def test_loss_by_position_reaches_beyond_training(trained):
    stream, _ = pile.validation_stream(trained.data, 300)
    found = pile.loss_by_position(trained.model, stream, 100, CPU.device)
    assert [end for end, _ in found] == [16, 32, 64, 100]
    with torch.no_grad():
        rows = [stream[start : start + 101] for start in range(0, len(stream) - 100, 100)]
        losses = torch.cat([pile.losses_of(trained.model, torch.tensor(row[None]), CPU.device) for row in rows])
    assert found[3][1] == pytest.approx(losses[:, 64:].mean().item(), rel=1e-5)


# Generation ---------------------------------------------------------------------------------------------------------
def test_streamed_text_is_the_greedy_continuation(trained):
    ids = [0, *"the pile 東".encode()]
    text = "".join(pile.stream_text(trained.model.eval(), pile.pile_data.Bytes(), ids, 20, 0.0, None))
    expected = list(ids)
    for _ in range(20):
        expected.append(trained.model(torch.tensor([expected]))[0, -1].argmax().item())
        if expected[-1] == 0:
            break
    assert text == bytes(i for i in expected[len(ids) :] if i).decode("utf-8", "replace")


def test_a_character_of_several_bytes_arrives_whole(monkeypatch):
    characters = "a東🙂é".encode()
    monkeypatch.setattr(models, "generate", lambda *_: (torch.tensor([byte]) for byte in [*characters, 0, 65]))
    model = models.LanguageModel(pile.laptop_config("rebased", 256))
    assert [x for x in pile.stream_text(model, pile.pile_data.Bytes(), [0], 9, 1.0, None) if x] == ["a", "東", "🙂", "é"]


@pytest.mark.parametrize("mixer", ["rebased", "based", "attention"])
def test_a_saved_state_continues_as_if_the_document_were_read_again(tmp_path, mixer):
    torch.manual_seed(0)
    model = models.LanguageModel(pile.laptop_config(mixer, 256)).double().eval()
    document, prompt = list(range(1, 90)), [70, 71]
    states = pile.read_context(model, torch.tensor([document[:-1]]), piece=32)
    pile.save_state(tmp_path / "state.pt", model, states, document[-1:])
    whole, _ = model.prefill(torch.tensor([document + prompt]))
    for _ in range(2):  # many continuations from one file
        loaded, ids = pile.load_state(tmp_path / "state.pt", model)
        logits, after = model.prefill(torch.tensor([ids + prompt]), loaded)
        assert torch.allclose(logits, whole, rtol=1e-8, atol=1e-10) and after.length == 91
    torch.nn.init.normal_(model.embedding.weight)
    with pytest.raises(pile.Refusal, match="another model"):
        pile.load_state(tmp_path / "state.pt", model)


def test_decoding_memory_is_constant_except_for_softmax():
    for mixer in ("rebased", "based", "attention"):
        sizes = [size for size, _ in pile.decoding_costs(mixer, contexts=(16, 64, 256), repeats=2)]
        if mixer == "attention":
            assert sizes[2] > 10 * sizes[0]
        else:
            assert len(set(sizes)) == 1


def test_flops_are_six_a_weight_and_the_mixing():
    small, large = (pile.flops_per_token(pile.laptop_config("rebased", 256), T) for T in (512, 4096))
    assert small == large > 6 * 725_376  # linear attention: the same per token at any length
    short, long = (pile.flops_per_token(pile.laptop_config("attention", 256), T) for T in (512, 4096))
    assert long - short == 3 * 2 * 2 * 128 * (4096 - 512)


# The command line ---------------------------------------------------------------------------------------------------
def test_train_sample_and_save_a_state_from_the_command_line(trained, tmp_path, capsys):
    common = ["--data", trained.folder / "data.jsonl", "--tokens", trained.folder / "tokens", "--out", tmp_path,
              "--mixers", "rebased", "--figure", tmp_path / "x.png", *flags(settings())]
    common = [str(x) for x in common]
    assert pile.main(common) == 0
    shown = capsys.readouterr().out
    assert "rebased" in shown and "Github" in shown and f"checks: {len(pile.CHECKS)} passed, 0 failed" in shown
    assert_same_run(tmp_path / "rebased" / "checkpoint.pt", trained.checkpoint)
    row = json.loads((tmp_path / "results.jsonl").read_text())
    assert row["mixer"] == "rebased" and row["seed"] == 0 and row["parameters"] == 725_376 and row["hardware"]
    with pytest.raises(SystemExit):
        pile.main(common)  # would overwrite
    assert "--resume" in capsys.readouterr().err
    with pile.pile_data.claim(tmp_path), pytest.raises(SystemExit):
        pile.main([*common, "--resume"])
    assert f"another run is writing to {tmp_path}" in capsys.readouterr().err
    assert pile.main([*common, "--resume"]) == 0  # finished: evaluates again
    assert json.loads((tmp_path / "results.jsonl").read_text())["loss"] == row["loss"]
    (tmp_path / "long.txt").write_text("once upon a time " * 50)
    source = ["--checkpoint", str(tmp_path / "rebased" / "checkpoint.pt"), "--length", "12", "--temperature", "0"]
    state = str(tmp_path / "state.pt")
    capsys.readouterr()
    assert pile.main([*source, "--document", str(tmp_path / "long.txt"), "--save-state", state]) == 0
    assert "850 tokens read" in capsys.readouterr().out
    assert pile.main([*source, "--load-state", state, "--sample", "there "]) == 0
    from_state = capsys.readouterr().out
    assert pile.main([*source, "--document", str(tmp_path / "long.txt"), "--sample", "there "]) == 0
    assert capsys.readouterr().out == from_state and from_state.startswith("there ")


@pytest.mark.parametrize("arguments, message", [
    (["--data", "nowhere"], "no such file"), (["--data", "folder"], "no .jsonl"),
    (["--data", "x.parquet"], "convert it"),
    (["--data", "empty.jsonl"], "not one document"), (["--data", "one.jsonl"], "no document fell into the validation"),
    (["--data", "few.jsonl", "--valid-share", "0.5"], "too few"), (["--out", "x.parquet"], "cannot use"),
    (["--data", "one.jsonl", "--valid-share", "2"], "--valid-share"), (["--steps", "0"], "--steps must be at least 1"),
    (["--seq-len", "100"], "no multiple"), (["--lr", "nan"], "--lr"), (["--tokenizer", "bert"], "one of bytes"),
    (["--mixers", "mamba2"], "invalid choice"),
    (["--device", "cuda:99"], "--device"), (["--device", "gpu"], "--device"),
    (["--sample", "x", "--checkpoint", "nowhere.pt"], "no such checkpoint"),
    (["--load-state", "x.pt"], "--sample PROMPT"), (["--document", "one.jsonl"], "--sample PROMPT"),
    (["--sample", "x", "--temperature", "-1"], "--temperature"), (["--sample", "x", "--length", "0"], "--length"),
    (["--tokenizer", "gpt2", "--tokenizer-file", "one.jsonl"], "no tokenizer.json"), (["--seed", "-1"], "--seed"),
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
    with pytest.raises(SystemExit) as stop:
        pile.main(arguments)
    shown = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in shown
    last = [line for line in shown.replace("\r", "\n").splitlines() if "error: " in line]
    assert len(last) == 1 and message in last[0], shown


def test_importing_runs_nothing_and_loads_nothing_optional(tmp_path):
    code = ("import sys, importlib; importlib.import_module('05_train_pile'); "
            "print([m for m in ('zstandard', 'tiktoken', 'tokenizers', 'matplotlib') if m in sys.modules])")
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                           env=os.environ | {"PYTHONPATH": str(PROGRAM.parent)})
    assert found.stdout.strip() == "[]" and os.listdir(tmp_path) == []


# Kill, full stop and two processes ----------------------------------------------------------------------------------
def command(folder, out, chosen, mixer="rebased"):
    return [str(x) for x in (PROGRAM, "--data", folder / "data.jsonl", "--tokens", folder / "tokens", "--out", out,
                             "--mixers", mixer, "--resume", "--figure", folder / "x.png", *flags(chosen))]


def start(arguments, processes=1):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.Popen([sys.executable, *(launcher if processes > 1 else []), *arguments],
                            start_new_session=True, cwd=PROGRAM.parent, env=os.environ | {"OMP_NUM_THREADS": "1"},
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def steps_logged(out, mixer="rebased"):
    log = out / mixer / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def kill_when(process, condition):
    """kill -9 the process and its workers as soon as `condition()` holds; False if it ended before."""
    while process.poll() is None and not condition():
        time.sleep(0.0005)
    alive = process.poll() is None
    if alive:
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in (process.pid, *map(int, workers)):  # torchrun's workers would go on without it
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    process.wait()
    return alive


@pytest.mark.slow
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
    print(f"{torn} of 10 kills left a half-written checkpoint behind")


def losses_logged(out, mixer):
    return [json.loads(line)["loss"] for line in (out / mixer / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["rebased", "based"])
def test_two_processes_train_as_one_and_their_run_resumes_with_one(tmp_path, mixer):
    """Float32, one thread each: asked for is 1e-5; what the tree of sums gives is equality."""
    make_data(tmp_path)
    chosen = settings(steps=50, save_every=10, eval_length=32, lr=1e-3, warmup=20, seq_len=64, batch_tokens=512)
    one, two, mixed = (tmp_path / name for name in ("one", "two", "mixed"))
    assert start(command(tmp_path, one, chosen, mixer)).wait() == 0
    assert start(command(tmp_path, two, chosen, mixer), processes=2).wait() == 0
    assert len(losses_logged(one, mixer)) == 50
    assert losses_logged(two, mixer) == pytest.approx(losses_logged(one, mixer), rel=1e-5)
    assert_same_run(two / mixer / "checkpoint.pt", one / mixer / "checkpoint.pt")
    process = start(command(tmp_path, mixed, chosen, mixer), processes=2)
    assert kill_when(process, lambda: steps_logged(mixed, mixer) >= 25)
    assert 20 <= len(pile.load_checkpoint(mixed / mixer / "checkpoint.pt")["log"]) < 50
    assert start(command(tmp_path, mixed, chosen, mixer)).wait() == 0
    assert_same_run(mixed / mixer / "checkpoint.pt", one / mixer / "checkpoint.pt")
