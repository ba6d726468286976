"""Rows that somebody has edited: every reader of them prints its tables, or says in one line what is wrong.

  python -m pytest tests/test_rows.py              a dozen changes for each reader
  python -m pytest -m slow tests/test_rows.py      a thousand

One change at a time, anywhere inside a row of results/: left out, or replaced by a text, null, an empty list or an
empty dictionary. A reader that takes the row has to come to its end; it may refuse it; no other error may come.
"""

import json
import random
from pathlib import Path

import pytest

pytest.importorskip("matplotlib.figure")
from experiments import floor, floor_report, floor_text, mqar_report, pile_report
from rebased import files, lesson, train_mqar
from rebased.lesson import Refusal

RESULTS = Path(__file__).resolve().parents[1] / "results"
LEFT_OUT = object()
INSTEAD = [LEFT_OUT, "text", None, [], {}]


def read_04(path):
    options = train_mqar.parse_options(["--output", str(path), "--seeds", "0"])
    runs = train_mqar.planned_runs(options)
    found = train_mqar.finished_rows(runs, path)
    lines = train_mqar.lines_of(list(found.values()))
    if lines:
        train_mqar.print_tables(lines, options.lengths)
        train_mqar.read_tables(lines, options.lengths)
        train_mqar.draw_figure(lines, options.lengths, path.with_suffix(".png"))


def read_mqar(path):
    mqar_report.main([str(path), "--figure", str(path.with_suffix(".png"))])


def read_floor(path):
    rows = list(floor.read_done(path).values())
    parts = {"learned": [], "predict": []}
    for row in rows:
        parts["predict" if row["written_out"] else "learned"].append(row)
    if all(parts.values()):
        floor_report.report(parts, {"128": rows})
        floor_report.draw(parts, path.with_suffix(".png"))


def read_floor_text(path):
    rows = list(floor_text.finished(path).values())
    floor_text.print_search(rows)
    floor_text.print_all(rows)
    floor_text.draw(rows, path.with_suffix(".png"))


def read_pile(path):
    pile_report.main([str(path), "--peak-tflops", "989", "--figure", str(path.with_suffix(".png"))])


def some_rows(name, wanted):
    """Of a file in results/: those that are wanted."""
    rows = map(json.loads, (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines())
    return [row for row in rows if wanted(row)]


READERS = {
    "04": (read_04, "mqar", lambda row: row["seed"] == 0),
    "mqar_report": (read_mqar, "mqar_iou", lambda row: row["seed"] < 2),
    "mqar_report, of 04": (read_mqar, "mqar", lambda row: row["seed"] < 2),
    "floor": (read_floor, "floor", lambda row: row["part"] in ("learned", "predict") and row["seed"] == 0
              and row["role"] == "report"),
    "floor_text": (read_floor_text, "floor_text", lambda row: row["seed"] == 0),
    "pile_report": (read_pile, "pile_default", lambda row: True),
}


def places(value):
    """Paths of keys to everything inside; of a list its first and its last item."""
    keys = list(value) if isinstance(value, dict) else sorted({0, len(value) - 1})
    for key in keys:
        yield (key,)
        if isinstance(value[key], (dict, list)) and value[key]:
            for path in places(value[key]):
                yield (key, *path)


def changed(row, path, instead):
    row = json.loads(json.dumps(row))
    inside = row
    for key in path[:-1]:
        inside = inside[key]
    if instead is LEFT_OUT:
        del inside[path[-1]]
    else:
        inside[path[-1]] = instead
    return row


@pytest.mark.parametrize("number_of_changes", [12, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", READERS)
def test_an_edited_row_is_read_or_refused(name, number_of_changes, tmp_path, monkeypatch, capsys):
    """Figures are drawn, but not turned into pictures."""
    read, file, wanted = READERS[name]
    monkeypatch.setattr(lesson, "save_figure", lambda *arguments: None)
    rows = some_rows(file, wanted)
    assert rows
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "rows.jsonl"
    files.write_rows(path, rows)
    read(path)
    chance = random.Random(0)
    number = chance.randrange(len(rows))
    every = [(place, instead) for place in places(rows[number]) for instead in INSTEAD]
    refused = 0
    for place, instead in chance.sample(every, min(number_of_changes, len(every))):
        edited = [*rows[:number], changed(rows[number], place, instead), *rows[number + 1 :]]
        files.write_rows(path, edited)
        try:
            read(path)
        except (Refusal, SystemExit) as end:
            message = str(end) if isinstance(end, Refusal) else capsys.readouterr().err
            assert "rows.jsonl" in message and message.strip().count("\n") < 2, (place, instead, message)
            refused += 1
        except Exception as error:
            raise AssertionError(f"{place} replaced by {instead!r}: {error!r}") from error
    assert refused > 3


def test_shares_in_some_cells_only_are_refused(tmp_path):
    """A line through them would have holes. In none at all they are allowed: some mixers have no weights."""
    (row,) = some_rows("mqar", lambda row: row["seed"] == 0 and row["mixer"] == "rebased")
    path = tmp_path / "rows.jsonl"
    row["cells"]["512 uniform"]["filler"] = None
    files.write_rows(path, [row])
    with pytest.raises(Refusal, match="a row of 'rebased' has shares of attention in some cells only"):
        mqar_report.read([path])
    for cell in row["cells"].values():
        cell |= dict.fromkeys(("right", "others", "filler"))
    files.write_rows(path, [row])
    assert mqar_report.read([path])[0]["cells"] == row["cells"]


def test_half_a_picture_is_refused(tmp_path):
    (row, *_) = some_rows("mqar_iou", lambda row: row["picture"])
    path = tmp_path / "rows.jsonl"
    assert len(row["picture"]["right"]) == 32
    for change in (lambda picture: picture["right"].pop(), lambda picture: picture["weights"][3].pop()):
        edited = json.loads(json.dumps(row))
        change(edited["picture"])
        files.write_rows(path, [edited])
        with pytest.raises(Refusal, match="the 'picture' of a row"):
            mqar_report.read([path])
