"""experiments/pile_*.py: text and states out of a checkpoint, tokenising, tables and utilisation from rows."""

import json
from dataclasses import asdict

import pytest
import torch
from test_pile_data import make_data, make_texts, tokens_of

from experiments import pile_report, pile_sample, pile_tokens
from rebased import files, lesson, model, pile_settings, tokens, train_pile
from rebased.lesson import Refusal

SMALL = dict(seq_len=32, batch_tokens=128, micro_batch=2, steps=6, warmup=2, valid_share=0.2, eval_tokens=300)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of six steps: (checkpoint, model, data, settings, log)."""
    folder = tmp_path_factory.mktemp("trained")
    settings = pile_settings.Settings(**SMALL, eval_length=64)
    data = tokens_of(folder, [make_data(folder)])
    small, log = train_pile.train("rebased", settings, data, folder)
    return folder / "checkpoint.pt", small, data, settings, log


# Text ---------------------------------------------------------------------------------------------------------------
def test_streamed_text_is_the_greedy_continuation(trained):
    _, small, *_ = trained
    ids = [0, *"the pile 東".encode()]
    text = "".join(pile_sample.stream_text(small, tokens.Bytes(), ids, 20, 0.0))
    expected = list(ids)
    for _ in range(20):
        expected.append(small(torch.tensor([expected]))[0, -1].argmax().item())
        if expected[-1] == 0:
            break
    assert text == bytes(i for i in expected[len(ids) :] if i).decode("utf-8", "replace")


def speak(monkeypatch, ids):
    """Let every model generate these tokens."""
    monkeypatch.setattr(model, "generate", lambda *_: (torch.tensor([i]) for i in ids))


def test_a_character_of_several_bytes_arrives_whole(monkeypatch):
    speak(monkeypatch, [*"a東🙂é".encode(), 0, 65])
    small = model.LanguageModel(train_pile.laptop_config("rebased", 256))
    assert list(pile_sample.stream_text(small, tokens.Bytes(), [0], 9, 1.0)) == ["a", "東", "🙂", "é"]
    speak(monkeypatch, [*b"a", *"東".encode()[:2]])  # the last one is cut short by the length
    assert "".join(pile_sample.stream_text(small, tokens.Bytes(), [0], 9, 1.0)) == "a\ufffd"


def test_a_long_text_keeps_every_character(monkeypatch):
    text = "naïve 東京 🙂 " * 40
    speak(monkeypatch, text.encode())
    small = model.LanguageModel(train_pile.laptop_config("rebased", 256))
    ids = [0, *"🙂 東".encode()]
    assert "".join(pile_sample.stream_text(small, tokens.Bytes(), ids, 9, 1.0)) == text


@pytest.mark.parametrize("kind", ["Metaspace", "WordPiece"])
def test_tokenizers_whose_pieces_carry_spaces_keep_them(tmp_path, monkeypatch, kind):
    """Decoded one by one, "the", "pile", "holds" would be "thepileholds"."""
    library = pytest.importorskip("tokenizers")
    words = sorted({word for text in make_texts() for word in text.split()})
    if kind == "Metaspace":
        codec = library.Tokenizer(library.models.BPE())
        codec.pre_tokenizer = library.pre_tokenizers.Metaspace()
        codec.decoder = library.decoders.Metaspace()
        trainer = library.trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"])
        codec.train_from_iterator(make_texts(), trainer)
    else:
        vocabulary = {word: i for i, word in enumerate(["<|endoftext|>", "[UNK]", *words])}
        codec = library.Tokenizer(library.models.WordPiece(vocabulary, unk_token="[UNK]"))
        codec.pre_tokenizer = library.pre_tokenizers.WhitespaceSplit()
        codec.decoder = library.decoders.WordPiece()
    codec.save(str(tmp_path / "tokenizer.json"))
    vocabulary = tokens.make_vocabulary("gpt2", tmp_path / "tokenizer.json")
    begin, rest = "the pile holds", "text and code if the pile holds"
    ids = vocabulary.encode(f"{begin} {rest}")[0].tolist()
    cut = len(vocabulary.encode(begin)[0])
    speak(monkeypatch, [*ids[cut:], vocabulary.separator])
    small = model.LanguageModel(train_pile.laptop_config("rebased", vocabulary.size))
    streamed = "".join(pile_sample.stream_text(small, vocabulary, [vocabulary.separator, *ids[:cut]], 99, 1.0))
    assert streamed == f" {rest}"
    assert train_pile.sample(small, vocabulary, begin) == f"{begin} {rest}"


def test_a_text_goes_on_after_all_that_was_read(trained, monkeypatch):
    """The last token, and the state of all before it: no token is read twice, and none is forgotten."""
    _, small, *_ = trained
    given = []

    def generate(model, tokens, steps, temperature, top_k=None, states=None):
        given.append((tokens.tolist(), model.step(tokens[:, 0], states)[0]))
        return iter(())

    monkeypatch.setattr(pile_sample.models, "generate", generate)
    ids = [0, *b"once upon"]
    list(pile_sample.stream_text(small, tokens.Bytes(), ids, 5, 0.0))
    ((last, logits),) = given
    assert last == [[ids[-1]]]
    torch.testing.assert_close(logits, small(torch.tensor([ids]))[:, -1], rtol=1e-4, atol=1e-5)


def test_a_temperature_near_0_is_greedy(trained, capsys):
    checkpoint, *_ = trained
    shown = []
    for temperature in ("0", "1e-45", "1e-30"):
        pile_sample.main(["the ", "--checkpoint", str(checkpoint), "--length", "12", "--temperature", temperature])
        shown.append(capsys.readouterr().out)
    assert shown[0].startswith("the ") and shown[0] == shown[1] == shown[2]


# States -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mixer", ["rebased", "based", "attention"])
def test_a_saved_state_continues_as_if_the_document_were_read_again(tmp_path, mixer):
    torch.manual_seed(0)
    small = model.LanguageModel(train_pile.laptop_config(mixer, 256)).double().eval()
    document, prompt = list(range(1, 90)), [70, 71]
    states = pile_sample.read_context(small, torch.tensor([document[:-1]]), piece=32)
    pile_sample.save_state(tmp_path / "state.pt", small, states, document[-1:])
    whole, _ = small.prefill(torch.tensor([document + prompt]))
    for _ in range(2):  # many continuations from one file
        loaded, ids = pile_sample.load_state(tmp_path / "state.pt", small)
        logits, after = small.prefill(torch.tensor([ids + prompt]), loaded)
        assert torch.allclose(logits, whole, rtol=1e-8, atol=1e-10) and after.length == 91
    with torch.no_grad():
        next(iter(small.blocks[1].mixer.parameters())).add_(1e-6)  # any weight, not only the embedding
    with pytest.raises(Refusal, match="another model"):
        pile_sample.load_state(tmp_path / "state.pt", small)


def test_what_is_no_state_is_named(trained, tmp_path):
    checkpoint, small, *_ = trained
    with pytest.raises(Refusal, match="not a saved state"):
        pile_sample.load_state(checkpoint, small)
    (tmp_path / "x.pt").write_bytes(b"x")
    with pytest.raises(Refusal, match="damaged"):
        pile_sample.load_state(tmp_path / "x.pt", small)


def test_a_document_is_read_once_and_continued(trained, tmp_path, capsys):
    checkpoint, *_ = trained
    document, state = tmp_path / "long.txt", tmp_path / "state.pt"
    document.write_text("once upon a time " * 50, encoding="utf-8")
    common = ["--checkpoint", str(checkpoint), "--length", "12", "--temperature", "0"]
    pile_sample.main([*common, "--document", str(document), "--save-state", str(state)])
    assert "850 tokens read" in capsys.readouterr().out
    pile_sample.main([*common, "--load-state", str(state), "there "])
    from_state = capsys.readouterr().out
    pile_sample.main([*common, "--document", str(document), "there "])
    assert capsys.readouterr().out == from_state and from_state.startswith("there ")


@pytest.mark.parametrize("arguments, message", [
    (["x", "--checkpoint", "nowhere.pt"], "no such file"), (["--load-state", "x.pt"], "add a prompt"),
    (["--document", "x.txt"], "add a prompt"), (["x", "--temperature", "-1"], "--temperature"),
    (["x", "--temperature", "nan"], "--temperature"), (["x", "--length", "0"], "not a positive integer"),
    (["x", "--top-k", "0"], "not a positive integer"), (["x", "--device", "gpu"], "--device"),
    (["x", "--seed", "9" * 23], "a seed is at least 0 and below 2**31"), (["x", "--seed", "-1"], "a seed is at least"),
    (["x", "--seed", str(2**31)], "a seed is at least 0 and below 2**31"),
])
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        lesson.obey(lambda: pile_sample.main(arguments), "")
    shown = capsys.readouterr().err
    assert stop.value.code == 2 and shown.count("error: ") == 1 and message in shown and "Traceback" not in shown


def test_a_model_that_cannot_be_made_here_is_named(trained, tmp_path):
    checkpoint, *_ = trained
    content = files.load_tensors(checkpoint)
    content["config"]["mixers"] = ("gated_conv", "of_tomorrow") * 2
    files.save_tensors(tmp_path / "checkpoint.pt", content)
    with pytest.raises(Refusal, match="unknown mixer 'of_tomorrow'"):
        pile_sample.load_model(tmp_path / "checkpoint.pt")


@pytest.mark.parametrize("change, message", [
    (lambda content: content.pop("tokenizer"), "a checkpoint without its part 'tokenizer'"),
    (lambda content: content["tokenizer"].pop("name"), "names the tokenizer None, which is none of bytes"),
    (lambda content: content["model"].pop("embedding.weight"), "holds a model that cannot be made here"),
])
def test_a_checkpoint_that_lacks_a_part_is_one_line(trained, tmp_path, change, message):
    content = files.load_tensors(trained[0])
    change(content)
    files.save_tensors(tmp_path / "checkpoint.pt", content)
    with pytest.raises(Refusal, match=message):
        pile_sample.load_model(tmp_path / "checkpoint.pt")


# Tokens and tables --------------------------------------------------------------------------------------------------
def test_tokens_are_made_and_shown(tmp_path, capsys):
    make_data(tmp_path)
    pile_tokens.main(["--data", str(tmp_path / "data.jsonl"), "--tokens", str(tmp_path / "t"), "--valid-share", "0.2"])
    shown = capsys.readouterr().out
    assert "Wikipedia (en)" in shown and "not used: nothing" in shown and "documents are validation" in shown
    with pytest.raises(Refusal, match="valid_share must lie between 0 and 1"):
        pile_tokens.main(["--valid-share", "1"])


def test_the_tables_come_from_rows_alone(trained, tmp_path, capsys):
    _, small, data, settings, log = trained
    about = {"command": "python 05", "hardware": "here", "date": "today", "minutes": 1, "processes": 1}
    rows = [about | row for row in train_pile.measure({"rebased": (small, log)}, settings, data)]
    files.write_rows(tmp_path / "rows.jsonl", rows)
    pile_report.main([str(tmp_path / "rows.jsonl"), "--peak-tflops", "1"])
    shown = capsys.readouterr().out
    assert "python 05" in shown and "bits per byte" in shown and "of the peak" in shown
    (tmp_path / "rows.jsonl").write_text(json.dumps({"mixer": "x"}) + "\n", encoding="utf-8")
    with pytest.raises(Refusal, match="the row has no '"):
        pile_report.main([str(tmp_path / "rows.jsonl")])


def test_utilisation_is_that_of_one_device(capsys):
    """Two devices, 1,000 tokens a second: half of 1,000 times the operations of a token each."""
    config = train_pile.laptop_config("rebased", 256)
    row = {"mixer": "rebased", "config": asdict(config), "settings": {"seq_len": 512}}
    row |= {"processes": 2, "tokens_per_s": 1e3}
    pile_report.print_utilisation([row], peak=0.01, path="rows.jsonl")
    teraflops = 1e3 * pile_report.flops_per_token(config, 512) / 1e12
    assert f"{teraflops:.1f} TFLOP/s" in (shown := capsys.readouterr().out)
    assert f"{teraflops / 2 / 0.01:.1%} of the peak" in shown


def test_flops_are_six_a_weight_and_the_mixing():
    def flops(mixer, T):
        return pile_report.flops_per_token(train_pile.laptop_config(mixer, 256), T)

    # Two layers of 136 features, into the state and out of it, forward and twice as much backward; at any length.
    assert flops("rebased", 512) == flops("rebased", 4096) == 6 * 725_376 + 2 * 3 * (2 * 2 * 136 * 128)
    assert flops("attention", 4096) - flops("attention", 512) == 3 * 2 * 2 * 128 * (4096 - 512)
