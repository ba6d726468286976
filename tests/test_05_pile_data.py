"""05: whole and broken files, tokens made once and made again after an interruption, the order of the data."""
import contextlib
import gzip
import json
import os
import random
import subprocess
import sys
import tracemalloc
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

data_file = import_module("05_pile_data")

PROGRAM = Path(__file__).parents[1] / "05_pile_data.py"


def make_texts(number=60, seed=0):
    """Documents that differ, with characters of one to four bytes."""
    words = "the pile holds naïve text and 東京 code 🙂 if x: return def print 12".split()
    chooser = random.Random(seed)
    return [" ".join(chooser.choices(words, k=chooser.randint(20, 60))) + f" #{i}" for i in range(number)]


def write(path, rows):
    """Rows (objects, or bytes as they are) as a .jsonl, .jsonl.gz or .jsonl.zst file."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    data = b"".join(line + b"\n" for line in lines)
    if path.suffix == ".gz":
        data = gzip.compress(data)
    if path.suffix == ".zst":
        data = pytest.importorskip("zstandard").ZstdCompressor().compress(data)
    path.write_bytes(data)
    return path


def make_data(folder, number=60):
    names = ["Github", "ArXiv", "Wikipedia (en)"]
    return write(folder / "data.jsonl", [{"text": text, "meta": {"pile_set_name": names[i % 3]}}
                                         for i, text in enumerate(make_texts(number))])


def tokens_of(folder, files, valid_share=0.2):
    return data_file.load_data(files, data_file.Bytes(), valid_share, folder / "tokens")


# Reading ------------------------------------------------------------------------------------------------------------
METAS = [
    ({"pile_set_name": "ArXiv"}, "ArXiv"), ('{"pile_set_name": "ArXiv"}', "ArXiv"),
    ({"pile_set_name": ["ArXiv"]}, "ArXiv"), ([{"pile_set_name": "ArXiv"}], "ArXiv"),
    (None, "unknown"), ({}, "unknown"), ([], "unknown"), ("no json", "unknown"),
    ({"pile_set_name": []}, "unknown"), (7, "unknown"), ({"pile_set_name": 7}, "unknown"), ("[]", "unknown"),
]


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])
@pytest.mark.parametrize("text_key, meta_key", [("text", "meta"), ("contents", "metadata")])
def test_every_layout_is_read(tmp_path, suffix, text_key, meta_key):
    rows = [{text_key: f"naïve {i}", meta_key: meta} for i, (meta, _) in enumerate(METAS)] + [{text_key: "bare"}]
    write(tmp_path / f"a.{suffix}", rows)
    problems = data_file.Problems()
    found = list(data_file.read_documents([tmp_path], problems))
    assert found == [(f"naïve {i}", name) for i, (_, name) in enumerate(METAS)] + [("bare", "unknown")]
    assert not problems.counts


def test_files_of_a_folder_are_read_once_in_order_of_name(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("01.jsonl", "00.jsonl", "deep/02.jsonl.gz"):
        write(tmp_path / name, [{"text": name}])
    found = [text for text, _ in data_file.read_documents([tmp_path, tmp_path / "01.jsonl"])]
    assert found == ["00.jsonl", "01.jsonl", "deep/02.jsonl.gz"]


def test_several_frames_and_members_are_one_stream(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    texts = make_texts(9)
    data = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)
    parts = [data[:100], data[100:101], data[101:]]  # the cuts fall inside lines
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(map(zstandard.ZstdCompressor().compress, parts)))
    (tmp_path / "b.jsonl.gz").write_bytes(b"".join(map(gzip.compress, parts)))
    assert [text for text, _ in data_file.read_documents([tmp_path])] == texts * 2


BROKEN = [
    (b"{not json", "not JSON"),
    (b"[" * 3000, "not JSON"),  # deeper than the parser can go
    (b'{"title": "x"}', "no `text` or `contents`"),
    (b'["text"]', "no `text` or `contents`"),
    (b'{"text": "\xff\xfe"}', "invalid UTF-8"),
    (b'{"text": ""}', "an empty document"),
    (b'{"text": null}', "the text is no string"),
    (b'{"text": "\\ud83d"}', "half of a surrogate pair, which is no text"),
    (b'{"text": "' + b"x" * 5000 + b'"}', "a line of more than 0 MB"),
]


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_broken_lines_are_skipped_counted_and_named(tmp_path, monkeypatch, capsys, suffix):
    monkeypatch.setattr(data_file, "LONGEST_LINE", 4000)
    rows = [part for i, (line, _) in enumerate(BROKEN) for part in ({"text": f"good {i}"}, line)]
    path, problems = write(tmp_path / f"a.{suffix}", [*rows, b"", b"  "]), data_file.Problems()
    assert [text for text, _ in data_file.read_documents([path], problems)] == [f"good {i}" for i in range(len(BROKEN))]
    assert problems.counts.total() == len(BROKEN) and set(problems.counts) == {reason for _, reason in BROKEN}
    shown = capsys.readouterr().err
    for i, (_, reason) in enumerate(BROKEN):
        assert f"{path}:{2 * i + 2}: {reason}" in shown


@pytest.mark.parametrize("suffix, damage", [
    ("jsonl.gz", "cut"), ("jsonl.gz", "flip"), ("jsonl.zst", "cut"), ("jsonl.zst", "garbage"), ("jsonl.gz", "garbage"),
])
def test_damaged_streams_give_what_came_before(tmp_path, suffix, damage):
    chooser = random.Random(0)
    texts = ["".join(chooser.choices("abcdefghijklmnop", k=3000)) for _ in range(200)]
    path = write(tmp_path / f"a.{suffix}", [{"text": text} for text in texts])
    data = bytearray(path.read_bytes())
    if damage == "cut":
        del data[len(data) // 2 :]
    elif damage == "flip":
        data[len(data) // 2 : len(data) // 2 + 64] = bytes(64)
    else:
        data[:] = b"this was never compressed, whatever its name says"
    path.write_bytes(data)
    write(tmp_path / "b.jsonl", [{"text": "the next file is read all the same"}])
    problems = data_file.Problems()
    found = [text for text, _ in data_file.read_documents([tmp_path], problems)]
    assert found[-1].startswith("the next file")
    assert damage == "garbage" or (20 < len(found) < 199 and found[:20] == texts[:20])
    ends = {"cut": "the file ends in the middle of its compressed data"}
    assert problems.counts[ends.get(damage, "the compressed data is damaged from here on")] == 1
    if damage != "flip":  # deflate notices a flipped byte some lines late: those are no JSON
        assert problems.counts.total() == 1 and found[:-1] == texts[: len(found) - 1]


def test_an_empty_file_is_a_problem(tmp_path):
    for suffix in ("jsonl", "jsonl.gz"):
        (tmp_path / f"a.{suffix}").write_bytes(b"")
    problems = data_file.Problems()
    assert list(data_file.read_documents([tmp_path], problems)) == [] and problems.counts == {"an empty file": 2}


@pytest.mark.slow
def test_a_line_of_200_mb_is_passed_over_without_being_held(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b'{"text": "')
        for _ in range(200):
            file.write(b"x" * 2**20)
        file.write(b'"}\n{"text": "after"}\n')
    tracemalloc.start()
    problems = data_file.Problems()
    assert [text for text, _ in data_file.read_documents([path], problems)] == ["after"]
    assert tracemalloc.get_traced_memory()[1] < 1.5 * data_file.LONGEST_LINE
    tracemalloc.stop()
    assert problems.counts == {"a line of more than 64 MB": 1}


# The token store ----------------------------------------------------------------------------------------------------
def test_a_folder_has_one_writer(tmp_path):
    with data_file.claim(tmp_path / "tokens"), pytest.raises(data_file.Refusal, match="another run is writing to"):
        tokens_of(tmp_path, [make_data(tmp_path)])
    assert tokens_of(tmp_path, [tmp_path / "data.jsonl"]).manifest["complete"]


def test_tokens_documents_and_subsets_are_counted(tmp_path):
    data = tokens_of(tmp_path, [make_data(tmp_path)])
    texts, total = make_texts(), {}
    for split in data.manifest["subsets"].values():
        for name, row in split.items():
            assert row["tokens"] == row["bytes"]
            old = total.get(name, (0, 0))
            total[name] = (old[0] + row["documents"], old[1] + row["bytes"])
    expected = {name: (20, sum(len(text.encode()) for text in texts[i::3]))
                for i, name in enumerate(("Github", "ArXiv", "Wikipedia (en)"))}
    assert total == expected
    stream = b"".join(data.train[:].tobytes().split(b"\0")[:-1]) + b"".join(data.valid[:].tobytes().split(b"\0")[:-1])
    assert len(stream) == sum(len(text.encode()) for text in texts)
    for start, length, num_bytes, subset in data.valid_docs.tolist():
        text = data.valid[start : start + length].tobytes().decode()
        assert text in texts and length == num_bytes and data.valid[start + length] == 0
        assert data.manifest["names"][subset] == ("Github", "ArXiv", "Wikipedia (en)")[texts.index(text) % 3]


def test_zero_bytes_are_dropped_and_counted(tmp_path):
    rows = [{"text": "a\0b\0"}] + [{"text": text} for text in make_texts(20)]
    data = tokens_of(tmp_path, [write(tmp_path / "a.jsonl", rows)])
    assert data.manifest["zero_bytes"] == 2
    assert (data.train == 0).sum() + (data.valid == 0).sum() == 21


def test_the_split_is_by_document_whatever_the_order(tmp_path):
    texts = make_texts(400)
    halves = []
    for name, order in (("a", texts), ("b", texts[::-1] + ["another document"])):
        (tmp_path / name).mkdir()
        data = tokens_of(tmp_path / name, [write(tmp_path / f"{name}.jsonl", [{"text": text} for text in order])])
        halves.append({data.valid[start : start + n].tobytes().decode() for start, n, _, _ in data.valid_docs.tolist()})
    assert halves[0] == halves[1] - {"another document"}
    assert 40 < len(halves[0]) < 120  # a share of 0.2 of 400


def test_interrupted_tokenising_goes_on_and_ends_with_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(data_file, "COMMIT", 700)
    rows = [{"text": text} for text in make_texts(40)]
    files = [write(tmp_path / "a.jsonl.gz", [*rows[:20], b"broken"]),
             write(tmp_path / "b.jsonl", [b"broken", *rows[20:]])]
    whole, folder = tokens_of(tmp_path / "whole", files), tmp_path / "cut" / "tokens"
    for stop_after in (3, 9, 14, 25):
        original, calls = data_file.add_document, []

        def stop(*arguments, original=original, calls=calls, stop_after=stop_after):
            calls.append(0)
            if len(calls) > stop_after:
                raise KeyboardInterrupt
            return original(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(data_file, "add_document", stop)
            with contextlib.suppress(KeyboardInterrupt):
                tokens_of(tmp_path / "cut", files)
    data = tokens_of(tmp_path / "cut", files)
    assert data.manifest == whole.manifest and data.manifest["problems"] == {"not JSON": 2}
    for name in data_file.PARTS:
        assert (folder / name).read_bytes() == (tmp_path / "whole" / "tokens" / name).read_bytes(), name


def test_tokens_are_reused_if_they_fit_and_refused_if_not(tmp_path):
    path = make_data(tmp_path)
    tokens_of(tmp_path, [path])
    stamp = (tmp_path / "tokens" / "train.bin").stat().st_mtime_ns
    tokens_of(tmp_path, [path])
    assert (tmp_path / "tokens" / "train.bin").stat().st_mtime_ns == stamp
    with pytest.raises(data_file.Refusal, match="other valid share"):
        tokens_of(tmp_path, [path], valid_share=0.3)
    with pytest.raises(data_file.Refusal, match="other sources"):
        tokens_of(tmp_path, [write(tmp_path / "other.jsonl", [{"text": "x"}])])
    other = data_file.Bytes()
    other.name = "gpt2"
    with pytest.raises(data_file.Refusal, match="other tokenizer"):
        data_file.load_data([path], other, 0.2, tmp_path / "tokens")
    (tmp_path / "tokens" / "train.bin").write_bytes(b"short")
    with pytest.raises(data_file.Refusal, match="does not have the"):
        tokens_of(tmp_path, [path])
    (tmp_path / "tokens" / "manifest.json").write_text("{}")
    with pytest.raises(data_file.Refusal, match="not a manifest"):
        tokens_of(tmp_path, [path])


def test_a_local_tokenizer_file_serves_as_gpt_neox(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    codec = tokenizers.Tokenizer(tokenizers.models.BPE())
    codec.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    codec.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"],
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    codec.train_from_iterator(make_texts(), trainer)
    codec.save(str(tmp_path / "tokenizer.json"))
    vocabulary = data_file.make_vocabulary("gpt-neox", tmp_path / "tokenizer.json")
    text = "naïve 東京 <|endoftext|> the pile"
    ids, num_bytes, zeros = vocabulary.encode(text)
    assert vocabulary.decode(ids.tolist()) == text and num_bytes == len(text.encode()) and zeros == 0
    assert vocabulary.separator not in ids and vocabulary.size == 304 and vocabulary.separator == 0
    data = data_file.load_data([make_data(tmp_path)], vocabulary, 0.2, tmp_path / "tokens")
    rows = [row for split in data.manifest["subsets"].values() for row in split.values()]
    assert sum(row["bytes"] for row in rows) == sum(len(text.encode()) for text in make_texts())
    assert sum(row["tokens"] for row in rows) < 0.8 * sum(row["bytes"] for row in rows)
    assert data.train.dtype == np.uint16 and data.train.max() < 304
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(data_file.Refusal, match="is no tokenizer.json"):
        data_file.make_vocabulary("gpt2", tmp_path / "broken.json")


def test_missing_zstandard_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.jsonl.zst").write_bytes(b"x")
    with pytest.raises(data_file.Refusal, match="pip install zstandard"):
        list(data_file.read_documents([tmp_path]))


@pytest.mark.slow
def test_the_library_is_the_same_text_in_every_process(tmp_path):
    code = ("import sys; from importlib import import_module; from pathlib import Path; "
            "import_module('05_pile_data').write_library(Path(sys.argv[1]))")
    for seed in ("1", "2"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / seed)], check=True,
                       env=os.environ | {"PYTHONPATH": str(PROGRAM.parent), "PYTHONHASHSEED": seed})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    names = {subset for _, subset in map(data_file.parse, (tmp_path / "1").read_bytes().splitlines())}
    assert names == {"Library", "Tests", "Help"}


# The order of the data ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("micro_batch, parts", [(1, 8), (2, 4), (8, 1), (16, 1), (5, 2)])
def test_micro_batches_do_not_depend_on_the_number_of_processes(micro_batch, parts):
    tokens, chosen = np.arange(5000) % 251, SimpleNamespace(seq_len=32, batch_tokens=32 * 8, seed=0, micro_batch=micro_batch)
    for step in (0, 7, 100):
        whole = data_file.training_batch(tokens, chosen, step)
        rows = torch.cat(whole)
        assert len(whole) == parts and rows.shape == (8, 33) and torch.equal(rows[:, 1:] - rows[:, :-1] == 1, rows[:, 1:] != 0)
        for world in [world for world in (2, 4, 8) if parts % world == 0]:
            shares = [part for rank in range(world) for part in data_file.training_batch(tokens, chosen, step, rank, world)]
            assert all(torch.equal(a, b) for a, b in zip(shares, whole, strict=True))


def test_rare_depends_on_the_counts_of_training():
    tokens = np.array([[1, 2, 3, 1, 2, 3, 2, 3]])
    common = data_file.common_bigrams(np.array([1, 2] * 1251))
    assert data_file.recall_mask(tokens, "bigram").tolist() == [[False] * 4 + [True, True, False, True]]
    assert data_file.recall_mask(tokens, "rare", common).tolist() == [[False] * 5 + [True, False, True]]
    few = data_file.common_bigrams(np.array([1, 2] * 1250))
    assert data_file.recall_mask(tokens, "rare", few).tolist() == data_file.recall_mask(tokens, "bigram").tolist()
    assert data_file.recall_mask(tokens, "token").tolist() == [[False] * 3 + [True] * 5]


@pytest.mark.parametrize("num_tokens", [96, 128, 1000, 4096, 33_333])
def test_a_pass_sees_every_sequence_once_and_the_next_in_another_order(num_tokens):
    passes, N = [], num_tokens // 32 - 1
    for epoch in range(2):
        starts = [data_file.sequence_start(n, num_tokens, 32, 0) for n in range(epoch * N, (epoch + 1) * N)]
        assert sorted(starts) == [min(starts) + 32 * i for i in range(N)] and max(starts) + 33 <= num_tokens
        passes.append(starts)
    assert passes[0] != passes[1]


# The command line ---------------------------------------------------------------------------------------------------
def test_the_table_counts_what_the_files_hold(tmp_path, capsys):
    make_data(tmp_path)
    arguments = ["--data", str(tmp_path), "--tokens", str(tmp_path / "tokens"), "--valid-share", "0.2"]
    with open(tmp_path / "data.jsonl", "ab") as file:
        file.write(b"{broken\n" + json.dumps({"text": "\0" * 3 + "x"}).encode())
    assert data_file.main(arguments) == 0
    shown = capsys.readouterr().out
    rows = {line[:24].strip(): line[24:].split() for line in shown.splitlines()[2:6]}
    assert list(rows) == ["Github", "ArXiv", "Wikipedia (en)", "unknown"]
    assert all(int(row[0]) + int(row[2]) == 20 for row in list(rows.values())[:3])
    assert "not used: 1 × not JSON, 3 × zero bytes" in shown and f"checks: {len(data_file.CHECKS)} passed, 0 failed" in shown


@pytest.mark.parametrize("arguments, message", [
    (["--data", "nowhere"], "no such file"), (["--valid-share", "1"], "--valid-share must lie between 0 and 1"),
])
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        data_file.main(arguments)
    shown = capsys.readouterr().err
    assert stop.value.code == 2 and shown.startswith("error: ") and message in shown and shown.count("\n") == 1
