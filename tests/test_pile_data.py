"""rebased/pile_data.py and tokens.py: whole and broken files, tokens made once and trusted, come what may."""

import contextlib
import gzip
import hashlib
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest

from rebased import pile_data, tokens
from rebased.lesson import Refusal

ROOT = Path(__file__).resolve().parents[1]


def make_texts(number=60, seed=0):
    """Documents that differ, with characters of one to four bytes."""
    words = "the pile holds naïve text and 東京 code 🙂 if x: return def print 12".split()
    chooser = random.Random(seed)
    return [" ".join(chooser.choices(words, k=chooser.randint(20, 60))) + f" #{i}" for i in range(number)]


def write(path, rows):
    """Rows (objects, or bytes as they are) as a .jsonl, .jsonl.gz or .jsonl.zst file."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    data = b"".join(line + b"\n" for line in lines)
    if path.suffix.lower() == ".gz":
        data = gzip.compress(data)
    if path.suffix.lower() == ".zst":
        data = pytest.importorskip("zstandard").ZstdCompressor().compress(data)
    path.write_bytes(data)
    return path


def make_data(folder, number=60):
    names = ["Github", "ArXiv", "Wikipedia (en)"]
    return write(folder / "data.jsonl", [{"text": text, "meta": {"pile_set_name": names[i % 3]}}
                                         for i, text in enumerate(make_texts(number))])


class Words:
    """A vocabulary for tests: 0 ends a document, 1 stands for a word that is not known, others for the words above."""

    name = "words"
    size = 80
    separator = 0
    words = "the pile holds naïve text and 東京 code 🙂 if x: return def print 12".split()
    words += [f"#{i}" for i in range(60)]

    def encode(self, text):
        ids = [2 + self.words.index(word) if word in self.words else 1 for word in text.split(" ")]
        return np.array(ids), len(text.encode("utf-8")), 0

    def decode(self, ids):
        return " ".join("?" if i == 1 else self.words[i - 2] for i in ids)


def tokens_of(folder, files, valid_share=0.2):
    return tokens.load_data(files, tokens.Bytes(), valid_share, folder / "tokens")


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
    problems = pile_data.Problems()
    found = list(pile_data.read_documents([tmp_path], problems))
    assert found == [(f"naïve {i}", name) for i, (_, name) in enumerate(METAS)] + [("bare", "unknown")]
    assert not problems.counts


def test_files_of_a_folder_are_read_once_in_order_of_name(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("01.jsonl", "00.jsonl", "deep/02.jsonl.gz"):
        write(tmp_path / name, [{"text": name}])
    found = [text for text, _ in pile_data.read_documents([tmp_path, tmp_path / "01.jsonl"])]
    assert found == ["00.jsonl", "01.jsonl", "deep/02.jsonl.gz"]


def test_several_frames_and_members_are_one_stream(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    texts = make_texts(9)
    data = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)
    parts = [data[:100], data[100:101], data[101:]]  # the cuts fall inside lines
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(map(zstandard.ZstdCompressor().compress, parts)))
    (tmp_path / "b.jsonl.gz").write_bytes(b"".join(map(gzip.compress, parts)))
    assert [text for text, _ in pile_data.read_documents([tmp_path])] == texts * 2


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
    monkeypatch.setattr(pile_data, "LONGEST_LINE", 4000)
    rows = [part for i, (line, _) in enumerate(BROKEN) for part in ({"text": f"good {i}"}, line)]
    path, problems = write(tmp_path / f"a.{suffix}", [*rows, b"", b"  "]), pile_data.Problems()
    assert [text for text, _ in pile_data.read_documents([path], problems)] == [f"good {i}" for i in range(len(BROKEN))]
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
    problems = pile_data.Problems()
    found = [text for text, _ in pile_data.read_documents([tmp_path], problems)]
    assert found[-1].startswith("the next file")
    assert damage == "garbage" or (20 < len(found) < 199 and found[:20] == texts[:20])
    ends = {"cut": "the file ends in the middle of its compressed data"}
    assert problems.counts[ends.get(damage, "the compressed data is damaged from here on")] == 1
    if damage != "flip":  # deflate notices a flipped byte some lines late: those are no JSON
        assert problems.counts.total() == 1 and found[:-1] == texts[: len(found) - 1]


def test_an_empty_file_is_a_problem(tmp_path):
    for suffix in ("jsonl", "jsonl.gz"):
        (tmp_path / f"a.{suffix}").write_bytes(b"")
    problems = pile_data.Problems()
    assert list(pile_data.read_documents([tmp_path], problems)) == [] and problems.counts == {"an empty file": 2}


@pytest.mark.slow
def test_a_line_of_200_mb_is_passed_over_without_being_held(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b'{"text": "')
        for _ in range(200):
            file.write(b"x" * 2**20)
        file.write(b'"}\n{"text": "after"}\n')
    tracemalloc.start()
    problems = pile_data.Problems()
    assert [text for text, _ in pile_data.read_documents([path], problems)] == ["after"]
    assert tracemalloc.get_traced_memory()[1] < 1.5 * pile_data.LONGEST_LINE
    tracemalloc.stop()
    assert problems.counts == {"a line of more than 64 MB": 1}


def texts_in(*paths):
    return [text for text, _ in pile_data.read_documents(paths)]


def test_folders_that_are_links_are_read_and_no_circle_is_run(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path / "data" / "a.jsonl", [{"text": "here"}])
    write(tmp_path / "elsewhere" / "b.jsonl", [{"text": "behind a link"}])
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "circle").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "c.jsonl").symlink_to(tmp_path / "data" / "a.jsonl")
    assert sorted(texts_in(tmp_path / "data")) == ["behind a link", "here"]


def test_upper_case_names_are_read(tmp_path):
    for name in ("A.JSONL", "B.Jsonl.GZ", "C.JSONL.ZST"):
        write(tmp_path / name, [{"text": name}])
    assert texts_in(tmp_path) == ["A.JSONL", "B.Jsonl.GZ", "C.JSONL.ZST"]
    assert texts_in(tmp_path / "B.Jsonl.GZ") == ["B.Jsonl.GZ"]


def test_a_folder_may_be_called_like_a_file(tmp_path):
    (tmp_path / "part.jsonl").mkdir()
    write(tmp_path / "part.jsonl" / "a.jsonl", [{"text": "inside"}])
    write(tmp_path / "b.jsonl", [{"text": "beside"}])
    assert texts_in(tmp_path) == ["beside", "inside"] and texts_in(tmp_path / "part.jsonl") == ["inside"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems allow UTF-8 names only")
def test_a_name_that_is_not_utf_8_does_not_end_the_run(tmp_path, capsys):
    name = os.fsdecode(bytes(tmp_path) + b"/caf\xe9.jsonl")
    write(Path(name), [b"broken", *({"text": text} for text in make_texts(9))])
    data = tokens_of(tmp_path, [tmp_path])
    assert data.manifest["problems"] == {"not JSON": 1}
    assert b"caf\xe9.jsonl:1: not JSON" in (tmp_path / "tokens" / "problems.txt").read_bytes()
    assert "caf\ufffd.jsonl:1: not JSON" in capsys.readouterr().err


def test_what_is_not_for_training_is_left_out_and_named(tmp_path, capsys):
    for name in ("00.jsonl", "val.jsonl.gz", "test.jsonl", "Validation.jsonl", "attest.jsonl"):
        write(tmp_path / name, [{"text": name}])
    (tmp_path / "b.parquet").touch()
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    assert texts_in(tmp_path) == ["00.jsonl", "attest.jsonl"]
    told = capsys.readouterr().err
    for name in ("val.jsonl.gz: not for training", "test.jsonl: not for training", "Validation.jsonl: not for training",
                 "gone.jsonl: no file that can be read", ".jsonl.gz: 1 × .parquet"):
        assert name in told, told
    assert texts_in(tmp_path / "val.jsonl.gz") == ["val.jsonl.gz"]  # who names it wants it
    data = tokens_of(tmp_path / "x", [tmp_path])
    tokens.print_subsets(data)
    assert "val.jsonl.gz: not for training" in capsys.readouterr().out
    (tmp_path / "only").mkdir()
    write(tmp_path / "only" / "test.jsonl", [{"text": "x"}])
    with pytest.raises(Refusal, match="no .jsonl.*\n.*test.jsonl: not for training"):
        texts_in(tmp_path / "only")


SPLITS = ["val", "valid", "Validation", "TEST", "validation-00000", "test-00000-of-00001", "test_set",
          "val.03", "testdata"]


@pytest.mark.parametrize("name", SPLITS)
def test_validation_and_test_parts_are_left_out_as_files_and_as_folders(tmp_path, capsys, name):
    """Each is named; who gives it by its own name reads it. A link to what is for training does not hide that."""
    folder = tmp_path / "test"  # the name of what was given says nothing
    (folder / "deep" / name).mkdir(parents=True)
    write(folder / "deep" / name / "00.jsonl", [{"text": "kept in a folder"}])
    write(folder / f"{name}.jsonl", [{"text": "kept in a file"}])
    (folder / "zz").mkdir()
    write(folder / "zz" / "00.jsonl", [{"text": "to train on"}])
    (folder / name).symlink_to(folder / "zz")
    assert texts_in(folder) == ["to train on"]
    told = capsys.readouterr().err.splitlines()
    assert sorted(told) == sorted([
        f"left out {folder / name}.jsonl: not for training, by its name; to train on it, name the file itself",
        f"left out {folder / name}: not for training, by its name; to train on it, name the folder itself",
        f"left out {folder / 'deep' / name}: not for training, by its name; to train on it, name the folder itself",
    ])
    assert texts_in(folder / "deep" / name, folder / f"{name}.jsonl") == ["kept in a folder", "kept in a file"]


@pytest.mark.parametrize("name", ["Tests", "dev", "c4-validation.00000-of-00008", "test-driven", "pile_val"])
def test_what_only_may_be_such_a_part_is_read_and_named(tmp_path, capsys, name):
    for path in (tmp_path / name / "00.jsonl", tmp_path / "deep" / f"{name}.jsonl", tmp_path / "attest2.jsonl"):
        path.parent.mkdir(exist_ok=True)
        write(path, [{"text": path.name}])
    assert sorted(texts_in(tmp_path)) == sorted(["00.jsonl", f"{name}.jsonl", "attest2.jsonl"])
    first = min(tmp_path / name / "00.jsonl", tmp_path / "deep" / f"{name}.jsonl")
    assert f"read {first} and 1 more: perhaps not for training" in capsys.readouterr().err
    assert texts_in(tmp_path / "attest2.jsonl") == ["attest2.jsonl"] and capsys.readouterr().err == ""


def test_a_long_name_is_judged_at_once():
    assert not pile_data.NOT_FOR_TRAINING.fullmatch("val" + "1" * 240 + "x")
    assert pile_data.NOT_FOR_TRAINING.fullmatch("val" + "1" * 240)


def test_the_names_of_other_files_are_no_reason_to_stop(tmp_path):
    """What --data refuses: a path that is not there, a file of another kind."""
    with pytest.raises(Refusal, match="no such file or folder"):
        texts_in(tmp_path / "nowhere")
    (tmp_path / "x.parquet").touch()
    with pytest.raises(Refusal, match="convert it to one of"):
        texts_in(tmp_path / "x.parquet")


# The token store ----------------------------------------------------------------------------------------------------
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
    monkeypatch.setattr(tokens, "COMMIT", 700)
    rows = [{"text": text} for text in make_texts(40)]
    files = [write(tmp_path / "a.jsonl.gz", [*rows[:20], b"broken"]),
             write(tmp_path / "b.jsonl", [b"broken", *rows[20:]])]
    whole, folder = tokens_of(tmp_path / "whole", files), tmp_path / "cut" / "tokens"
    for stop_after in (3, 9, 14, 25):
        original, calls = tokens.add_document, []

        def stop(*arguments, original=original, calls=calls, stop_after=stop_after):
            calls.append(0)
            if len(calls) > stop_after:
                raise KeyboardInterrupt
            return original(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(tokens, "add_document", stop)
            with contextlib.suppress(KeyboardInterrupt):
                tokens_of(tmp_path / "cut", files)
    data = tokens_of(tmp_path / "cut", files)
    assert data.manifest == whole.manifest and data.manifest["problems"] == {"not JSON": 2}
    for name in tokens.PARTS:
        assert (folder / name).read_bytes() == (tmp_path / "whole" / "tokens" / name).read_bytes(), name


def test_tokens_are_reused_if_they_fit_and_refused_if_not(tmp_path):
    path = make_data(tmp_path)
    tokens_of(tmp_path, [path])
    stamp = (tmp_path / "tokens" / "train.bin").stat().st_mtime_ns
    tokens_of(tmp_path, [path])
    assert (tmp_path / "tokens" / "train.bin").stat().st_mtime_ns == stamp
    with pytest.raises(Refusal, match="other valid share"):
        tokens_of(tmp_path, [path], valid_share=0.3)
    with pytest.raises(Refusal, match="other sources"):
        tokens_of(tmp_path, [write(tmp_path / "other.jsonl", [{"text": "x"}])])
    other = tokens.Bytes()
    other.name = "gpt2"
    with pytest.raises(Refusal, match="other tokenizer"):
        tokens.load_data([path], other, 0.2, tmp_path / "tokens")
    (tmp_path / "tokens" / "train.bin").write_bytes(b"short")
    with pytest.raises(Refusal, match="does not have the"):
        tokens_of(tmp_path, [path])
    (tmp_path / "tokens" / "manifest.json").write_text("{}", encoding="utf-8")
    with pytest.raises(Refusal, match="not a manifest"):
        tokens_of(tmp_path, [path])


@pytest.mark.skipif(sys.platform == "win32", reason="a file that is mapped cannot be cut there")
@pytest.mark.parametrize("part, read", [
    ("valid.bin", lambda data: tokens.print_subsets(data)),
    ("valid.docs", lambda data: tokens.print_subsets(data)),
    ("valid.bin", lambda data: tokens.first_documents(data, 100)),
    ("valid.docs", lambda data: tokens.first_documents(data, 100)),
    ("valid.bin", lambda data: tokens.zlib_bits(data, np.array([[0, 9, 9, 0]]))),
])
def test_a_part_that_is_cut_after_it_was_opened_is_one_line(tmp_path, part, read):
    """To read beyond the end of a mapped file would kill the process."""
    data = tokens_of(tmp_path, [make_data(tmp_path)])
    read(data)
    os.truncate(tmp_path / "tokens" / part, 8)
    with pytest.raises(Refusal, match=f"{part} has been cut short"):
        read(data)


def test_rows_of_documents_are_kept_when_their_file_is_cut(tmp_path):
    data = tokens_of(tmp_path, [make_data(tmp_path)])
    _, docs = tokens.first_documents(data, 300)
    assert not isinstance(docs, np.memmap)


def test_a_local_tokenizer_file_serves_as_gpt_neox(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    codec = tokenizers.Tokenizer(tokenizers.models.BPE())
    codec.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    codec.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"],
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    codec.train_from_iterator(make_texts(), trainer)
    codec.save(str(tmp_path / "tokenizer.json"))
    vocabulary = tokens.make_vocabulary("gpt-neox", tmp_path / "tokenizer.json")
    text = "naïve 東京 <|endoftext|> the pile"
    ids, num_bytes, zeros = vocabulary.encode(text)
    assert vocabulary.decode(ids.tolist()) == text and num_bytes == len(text.encode()) and zeros == 0
    assert vocabulary.separator not in ids and vocabulary.size == 304 and vocabulary.separator == 0
    data = tokens.load_data([make_data(tmp_path)], vocabulary, 0.2, tmp_path / "tokens")
    rows = [row for split in data.manifest["subsets"].values() for row in split.values()]
    assert sum(row["bytes"] for row in rows) == sum(len(text.encode()) for text in make_texts())
    assert sum(row["tokens"] for row in rows) < 0.8 * sum(row["bytes"] for row in rows)
    assert data.train.dtype == np.uint16 and data.train.max() < 304
    (tmp_path / "broken.json").write_text("{}", encoding="utf-8")
    with pytest.raises(Refusal, match="is no tokenizer.json"):
        tokens.make_vocabulary("gpt2", tmp_path / "broken.json")


def test_files_are_known_by_what_they_hold_not_by_where_they_lie(tmp_path, monkeypatch):
    path = make_data(tmp_path)
    whole = tokens_of(tmp_path, [path])
    stamp = (tmp_path / "tokens" / "train.bin").stat().st_mtime_ns
    monkeypatch.chdir(tmp_path)
    assert tokens_of(tmp_path, ["data.jsonl"]).manifest == whole.manifest
    moved = path.rename(tmp_path / "moved.jsonl")
    assert tokens_of(tmp_path, [moved]).manifest == whole.manifest
    assert (tmp_path / "tokens" / "train.bin").stat().st_mtime_ns == stamp
    text = bytearray(moved.read_bytes())
    place = len(text) // 3
    text[place : place + 1] = b"x" if text[place : place + 1] != b"x" else b"y"
    moved.write_bytes(text)  # of the same size
    with pytest.raises(Refusal, match="other sources"):
        tokens_of(tmp_path, [moved])


def test_a_file_is_read_once_to_be_known_again(tmp_path, monkeypatch):
    path, cache = make_data(tmp_path), tmp_path / "digests.json"
    found = tokens.fingerprints([path], cache)
    assert found[0][0] == path.stat().st_size and len(found[0][1]) == 64
    with monkeypatch.context() as patch:
        patch.setattr(tokens, "digest", None)
        assert tokens.fingerprints([path], cache) == found
    cache.write_bytes(b"damaged")
    assert tokens.fingerprints([path], cache) == found
    assert tokens.fingerprints([path], tmp_path / "data.jsonl" / "x.json") == found  # a cache that cannot be written


def test_another_programs_tokens_are_refused_and_left_alone(tmp_path):
    folder = tmp_path / "tokens"
    folder.mkdir()
    (folder / "train.bin").write_bytes(b"of nanoGPT")
    with pytest.raises(Refusal, match="holds a train.bin that is not ours"):
        tokens_of(tmp_path, [make_data(tmp_path)])
    assert os.listdir(folder) == ["train.bin"] and (folder / "train.bin").read_bytes() == b"of nanoGPT"
    with pytest.raises(Refusal, match="is a file"):
        tokens.load_data([tmp_path / "data.jsonl"], tokens.Bytes(), 0.2, tmp_path / "data.jsonl")


def test_a_kill_before_the_first_document_leaves_a_folder_of_ours(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tokens, "documents", stop)
        tokens_of(tmp_path, [make_data(tmp_path)])
    assert tokens_of(tmp_path, [tmp_path / "data.jsonl"]).manifest["complete"]


def tokenise_the_library(folder, number):
    os.chdir(folder)
    data = tokens.load_data(None, tokens.Bytes(), 0.05)
    Path(f"{number}.json").write_text(json.dumps(data.manifest), encoding="utf-8")


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked")
def test_two_tokenisations_at_once_in_a_fresh_folder(tmp_path):
    """Three processes, nothing there yet: one writes, the others wait, all read the same."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=tokenise_the_library, args=(tmp_path, number)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    found = [(tmp_path / f"{number}.json").read_text(encoding="utf-8") for number in range(3)]
    assert found[0] == found[1] == found[2] and json.loads(found[0])["complete"]


def test_no_validation_document_is_said(tmp_path, capsys):
    data = tokens_of(tmp_path, [write(tmp_path / "a.jsonl", [{"text": "only one"}])], valid_share=1e-9)
    tokens.print_subsets(data)
    shown = capsys.readouterr().out
    assert "no document fell into the validation part" in shown and "nan" not in shown
    with pytest.raises(Refusal, match="no document fell into the validation part"):
        tokens.first_documents(data, 100)


def test_the_table_counts_what_the_files_hold(tmp_path, capsys):
    make_data(tmp_path)
    with open(tmp_path / "data.jsonl", "ab") as file:
        file.write(b"{broken\n" + json.dumps({"text": "\0" * 3 + "x"}).encode())
    data = tokens_of(tmp_path, [tmp_path / "data.jsonl"])
    tokens.print_subsets(data)
    shown = capsys.readouterr().out
    rows = {line[:24].strip(): line[24:].split() for line in shown.splitlines()[2:6]}
    assert list(rows) == ["Github", "ArXiv", "Wikipedia (en)", "unknown"]
    assert all(int(row[0]) + int(row[2]) == 20 for row in list(rows.values())[:3])
    assert "not used: 1 × not JSON, 3 × zero bytes" in shown


def test_subsets_say_whose_each_token_is(tmp_path):
    data = tokens_of(tmp_path, [make_data(tmp_path)])
    stream, docs = tokens.first_documents(data, 300)
    assert stream[0] == 0 and len(stream) == docs[:, 1].sum() + len(docs) + 1
    *subsets, (name, is_text, num_bytes, bits) = tokens.subsets_of(docs, data)
    assert name == "all" and is_text.tolist() == (stream[1:] != 0).tolist() and num_bytes == is_text.sum()
    assert num_bytes == sum(row[2] for row in subsets) and min(row[3] for row in subsets) <= bits
    assert sum(row[1].astype(int) for row in subsets).tolist() == is_text.astype(int).tolist()  # each token is in one
    stream = stream.astype(np.uint8)
    text = stream[1:].tobytes().split(b"\0")
    for name, is_text, _, _ in subsets:
        i = data.manifest["names"].index(name)
        mine = [text[j] for j in range(len(docs)) if docs[j, 3] == i]
        assert stream[1:][is_text].tobytes() == b"".join(mine)


class ManyWords(Words):
    """The same with two bytes a token."""

    size = 300


def test_tokens_of_two_bytes_lie_where_their_documents_say(tmp_path):
    data = tokens.load_data([make_data(tmp_path)], ManyWords(), 0.4, tmp_path / "tokens")
    assert data.valid.dtype == np.uint16
    texts = [text for text in make_texts() if tokens.is_validation(text, 0.4)]
    assert len(texts) == len(data.valid_docs)
    for text, (start, length, num_bytes, _) in zip(texts, data.valid_docs.tolist(), strict=True):
        assert data.valid[start : start + length].tolist() == ManyWords().encode(text)[0].tolist()
        assert data.valid[start + length] == 0 and num_bytes == len(text.encode())


def test_the_split_is_the_same_in_every_process():
    """It is the first 16 digits of the document's SHA-256, as a fraction; Python's own hash changes at every start."""
    for text in make_texts(200):
        fraction = int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 16**16
        for share in (0.05, 0.5, 0.95):
            assert tokens.is_validation(text, share) == (fraction < share)
    assert sum(tokens.is_validation(text, 0.5) for text in make_texts(200)) in range(70, 131)


def test_the_smallest_type_that_fits():
    for size, bits in ((2, 8), (256, 8), (257, 16), (65_536, 16), (65_537, 32), (200_000, 32)):
        assert tokens.token_type(size) == np.dtype(f"uint{bits}")


def test_every_entry_of_the_table_of_subsets(tmp_path, capsys):
    """Documents and bytes of both parts, bytes a token, zlib's bits a byte; by hand."""
    data = tokens.load_data([make_data(tmp_path)], Words(), 0.4, tmp_path / "tokens")
    tokens.print_subsets(data)
    shown = capsys.readouterr().out
    for i, name in enumerate(("Github", "ArXiv", "Wikipedia (en)")):
        valid = [text for text in make_texts()[i::3] if tokens.is_validation(text, 0.4)]
        train = [text for text in make_texts()[i::3] if not tokens.is_validation(text, 0.4)]
        num_bytes = sum(len(text.encode()) for text in train + valid)
        num_words = sum(len(text.split()) for text in train + valid)
        bits = 8 * len(zlib.compress("\n".join(valid).encode(), 9)) / len("".join(valid).encode())
        row = next(line[24:].split() for line in shown.splitlines() if line.startswith(name))
        assert row == [str(len(train)), f"{len(''.join(train).encode()):,}", str(len(valid)),
                       f"{len(''.join(valid).encode()):,}", f"{num_bytes / num_words:.2f}", f"{bits:.3f}"]


class FakeTiktoken:
    """As much of the library as `BPE` asks for: a token for each character."""

    eot_token = 50_256
    n_vocab = 50_257

    @classmethod
    def get_encoding(cls, name):
        assert name == "gpt2"
        return cls

    encode_ordinary = staticmethod(lambda text: [ord(character) for character in text])
    decode = staticmethod(lambda ids: "".join(map(chr, ids)))


def test_bpe_counts_the_bytes_of_the_text(monkeypatch):
    """Not its characters, and not its tokens; V is a multiple of 8."""
    monkeypatch.setattr(tokens, "optional", lambda name, purpose: FakeTiktoken)
    vocabulary = tokens.make_vocabulary("gpt2")
    ids, num_bytes, zeros = vocabulary.encode("東京é!")
    assert (ids.tolist(), num_bytes, zeros) == ([ord(c) for c in "東京é!"], 3 + 3 + 2 + 1, 0)
    assert vocabulary.decode(ids.tolist()) == "東京é!"
    assert vocabulary.size == 50_264 and vocabulary.separator == 50_256


def test_tokens_of_another_tokenizer_of_this_name_are_refused(tmp_path):
    """It is known by what it makes of a text."""
    class Others(Words):
        words = Words.words[::-1]

    tokens.load_data([make_data(tmp_path)], Words(), 0.4, tmp_path / "tokens")
    with pytest.raises(Refusal, match="other tokenizer"):
        tokens.load_data([tmp_path / "data.jsonl"], Others(), 0.4, tmp_path / "tokens")


def test_the_library_has_each_text_once_in_an_order_of_its_own(tmp_path, monkeypatch):
    """The same file from documents in another order, with copies and empty ones among them."""
    found = []
    for documents in ([("a", "Tests"), ("b", "Help"), ("", "Help"), ("a", "Tests")], [("b", "Help"), ("a", "Tests")]):
        monkeypatch.setattr(pile_data, "library_documents", lambda documents=documents: iter(documents))
        pile_data.write_library(tmp_path / "x.jsonl")
        found.append((tmp_path / "x.jsonl").read_bytes())
    assert found[0] == found[1] and len(found[0].splitlines()) == 2


def test_a_long_line_is_never_held(monkeypatch):
    """16 MB in pieces of 64 KB, with a limit of 256 KB: less than 1 MB at any time."""
    monkeypatch.setattr(pile_data, "LONGEST_LINE", 2**18)
    tracemalloc.start()
    found = list(pile_data.lines(bytes(2**16).replace(b"\0", b"x") for _ in range(256)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [(1, None)] and peak < 2**20


def test_missing_zstandard_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.jsonl.zst").write_bytes(b"x")
    with pytest.raises(Refusal, match="pip install zstandard"):
        list(pile_data.read_documents([tmp_path]))


@pytest.mark.slow
def test_the_library_is_the_same_text_in_every_process(tmp_path):
    code = ("import sys; from pathlib import Path; from rebased.pile_data import write_library; "
            "write_library(Path(sys.argv[1]))")
    for seed in ("1", "2"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / seed)], check=True,
                       env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    names = {subset for _, subset in map(pile_data.parse, (tmp_path / "1").read_bytes().splitlines())}
    assert names == {"Library", "Tests", "Help"}
