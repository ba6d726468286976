"""rebased/files.py: whole files or none, tensors with a digest, one writer, rows; rebased/lesson.py: settings, text."""

import errno
import io
import json
import os
import random
import sys
import threading
import time
from dataclasses import dataclass

import pytest
import torch

from rebased import files, lesson
from rebased.lesson import Refusal

# Whole files --------------------------------------------------------------------------------------------------------
def test_a_file_is_written_whole_and_folders_are_made(tmp_path):
    path = tmp_path / "deep" / "deeper" / "x.bin"
    files.write_atomically(path, b"one")
    files.write_atomically(path, b"two")
    assert path.read_bytes() == b"two" and os.listdir(path.parent) == ["x.bin"]


def test_a_full_disk_leaves_the_file_before(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "x.bin"
    path.write_bytes(b"before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(Refusal, match="cannot write .*File too large; the one before is intact"):
            files.write_atomically(path, bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"before" and os.listdir(tmp_path) == ["x.bin"]


# Tensors ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def tensors(tmp_path):
    path = tmp_path / "tensors.pt"
    files.save_tensors(path, {"weights": torch.arange(300.0), "log": [{"loss": 1.5}], "name": "rebased"})
    return path


def test_tensors_come_back_also_through_torch_load(tensors):
    for content in (files.load_tensors(tensors), torch.load(tensors, weights_only=True)):
        assert torch.equal(content["weights"], torch.arange(300.0))
        assert content["log"] == [{"loss": 1.5}] and content["name"] == "rebased"


def test_every_flipped_bit_is_noticed(tensors):
    data = tensors.read_bytes()
    chooser = random.Random(0)
    taken_for_good = 0
    for _ in range(200):
        damaged = bytearray(data)
        damaged[chooser.randrange(len(data))] ^= 1 << chooser.randrange(8)
        tensors.write_bytes(damaged)
        with pytest.raises(Refusal, match="damaged"):
            files.load_tensors(tensors)
        try:
            torch.load(io.BytesIO(damaged), weights_only=True)
            taken_for_good += 1
        except Exception:  # zip and pickle raise many kinds
            pass
    assert taken_for_good > 100  # why there is a digest


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("the_bomb_went_off",)


def test_what_is_no_file_of_ours_is_refused_and_runs_no_code(tmp_path, tensors, monkeypatch):
    monkeypatch.chdir(tmp_path)
    contents = {"cut": tensors.read_bytes()[:900], "text": b"no tensors", "empty": b""}
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    torch.save({"model": 1}, tmp_path / "of another program")
    files.save_tensors(tmp_path / "bomb", {"model": Bomb()})  # with a digest that is right
    files.save_tensors(tmp_path / "list", [1, 2])
    for name in (*contents, "of another program", "bomb", "list"):
        with pytest.raises(Refusal, match="damaged, or not|not a file of this program"):
            files.load_tensors(tmp_path / name)
    assert not (tmp_path / "the_bomb_went_off").exists()
    with pytest.raises(Refusal, match="no such file"):
        files.load_tensors(tmp_path / "nowhere")


# One writer ---------------------------------------------------------------------------------------------------------
def test_a_folder_has_one_writer(tmp_path):
    folder = tmp_path / "new"
    with files.claim(folder), pytest.raises(Refusal, match="another run is writing to"):
        files.claim(folder)
    files.claim(folder).close()


def test_who_waits_gets_the_folder_when_it_is_free(tmp_path, capsys):
    first = files.claim(tmp_path)
    order = []

    def second():
        with files.claim(tmp_path, wait=True):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    time.sleep(0.2)
    order.append("first")
    first.close()
    thread.join(10)
    assert order == ["first", "second"] and "waiting for it" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_the_run_goes_on_and_says_so(tmp_path, monkeypatch, capsys, number):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    files.claim(tmp_path).close()
    assert "cannot be locked here" in capsys.readouterr().err
    number = errno.EIO
    with pytest.raises(OSError):
        files.claim(tmp_path)


# Rows ---------------------------------------------------------------------------------------------------------------
def test_rows_are_added_and_read(tmp_path):
    path = tmp_path / "deep" / "rows.jsonl"
    assert files.read_rows(path) == []
    for n in range(3):
        files.append_row(path, {"n": n})
    assert files.read_rows(path, ["n"]) == [{"n": 0}, {"n": 1}, {"n": 2}]
    files.write_rows(path, [{"n": 7}, {"n": 8}])
    assert files.read_rows(path, ["n"]) == [{"n": 7}, {"n": 8}]


def test_half_a_line_counts_as_not_written(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"n": 0}\n{"n": 1')
    assert files.read_rows(path) == [{"n": 0}]
    files.append_row(path, {"n": 2})
    assert path.read_bytes() == b'{"n": 0}\n{"n": 2}\n'
    path.write_bytes(b'{"n": ')
    files.append_row(path, {"n": 3})
    assert path.read_bytes() == b'{"n": 3}\n'


@pytest.mark.parametrize("line, message", [
    (b"no json", "line 2 is not a row"), (b"[" * 100_000, "line 2 is not a row"), (b"7", "line 2 is not a row"),
    (b'{"m": 1}', "line 2: the row has no 'n'"),
])
def test_what_is_no_row_is_named(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps({"n": 0}).encode() + b"\n" + line + b"\n")
    with pytest.raises(Refusal, match=message):
        files.read_rows(path, ["n"])


CELL = {"accuracy": 1.0, "right": 0.5, "others": 0.25, "filler": 0.1}
SHAPE = {
    **files.RECALL,
    "loss?": files.MEASURED,
    "curve?": [[int, files.NUMBER], ...],
    "lengths?": [int],
    "flag?": bool,
}


@pytest.mark.parametrize("change, wrong", [
    ({"seed": "0"}, "seed is '0'"), ({"seed": True}, "seed is 'True'"), ({"mixer": ["based"]}, "mixer is"),
    ({"loss": "low"}, "loss is 'low'"), ({"flag": 1}, "flag is '1'"), ({"seed": None}, "seed is 'None'"),
    ({"curve": 3}, "curve is '3'"), ({"curve": []}, "curve is '[]'"), ({"curve": [[1, 2.0], [3]]}, "curve[1] is '[3]'"),
    ({"curve": [[1, "x"]]}, "curve[0][1] is 'x'"), ({"lengths": [1, 2.5]}, "lengths[1] is '2.5'"),
    ({"cells": 5}, "cells is '5'"), ({"cells": {"64 official": {}}}, "cells['64 official'] has no 'accuracy'"),
    ({"cells": {"64 official": CELL, "64 uniform": CELL, "256 uniform": 0.5}}, "cells['256 uniform'] is '0.5'"),
    ({"cells": {"64 official": CELL}}, "cells has no '64 uniform'"),
    ({"cells_without_floor": {}}, "cells_without_floor has no '64 official'"),
    ({"cells_without_floor": {"64 uniform": CELL | {"filler": None}}},
     "cells_without_floor['64 uniform']['filler'] is 'None'"),
])
def test_what_does_not_fit_is_named(tmp_path, change, wrong):
    """A row that fits, with null, an empty list and an unknown field; then one with a single change."""
    row = {"mixer": "based", "seed": 1, "cells": {"64 official": CELL, "64 uniform": CELL}, "test_lengths": [64]}
    fitting = row | {"loss": None, "lengths": [], "curve": [[1, 2], [2, 0.5]], "flag": True, "note": "x"}
    files.write_rows(tmp_path / "rows.jsonl", [fitting])
    assert files.read_rows(tmp_path / "rows.jsonl", SHAPE) == [fitting]
    files.write_rows(tmp_path / "rows.jsonl", [fitting, row | change])
    with pytest.raises(Refusal) as refused:
        files.read_rows(tmp_path / "rows.jsonl", SHAPE)
    assert f"line 2: {wrong}" in str(refused.value)


def test_a_row_that_was_joined_twice_counts_once(tmp_path):
    rows = [{"seed": 0, "loss": 1.5}, {"seed": 0, "loss": 1.25}]
    files.write_rows(tmp_path / "rows.jsonl", rows + rows[:1])
    assert files.read_rows(tmp_path / "rows.jsonl") == rows


def test_rows_that_cannot_be_written_are_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(Refusal, match="cannot write"):
        files.append_row(tmp_path / "file" / "rows.jsonl", {})


# Settings and text of rebased/lesson.py -----------------------------------------------------------------------------
@dataclass(frozen=True)
class Settings:
    steps: int = 3
    lr: float = 0.1
    name: str = "x"
    fast: bool = False


def test_settings_are_changed_by_texts_of_their_type():
    assert lesson.change(Settings(), []) == Settings()
    found = lesson.change(Settings(), ["steps=7", "lr=2", "name=a=b", "fast=true"])
    assert found == Settings(7, 2.0, "a=b", True) and isinstance(found.lr, float)


@pytest.mark.parametrize("text, message", [
    ("step=7", "no setting 'step'; choose from steps, lr, name, fast"), ("steps", "must be of type int"),
    ("steps=1.5", "must be of type int, as in steps=3"), ("lr=fast", "must be of type float"),
    ("fast=1", "must be of type bool"),
])
def test_a_setting_that_is_none_is_named(text, message):
    with pytest.raises(Refusal, match=message):
        lesson.change(Settings(), [text])


def test_what_a_terminal_cannot_show_does_not_end_the_run(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    lesson.obey(lambda: print("naïve 東京 \udcff"), "")
    terminal.flush()
    assert terminal.buffer.getvalue() == b"na?ve ?? ?\n"


def test_text_of_a_model_does_not_move_the_cursor():
    assert lesson.printable("a\tb\nnaïve 東\x1b[2J\x07\r") == "a\tb\nnaïve 東·[2J··"
