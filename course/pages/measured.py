"""What the interactive page shows of trained models: rows of results/ -> one small JSON object.

Why apart from the page: the numbers are read anew in every build, and no number is typed by hand.
results/floor.jsonl (models trained with other floors) is shown where it is there.
"""

from statistics import mean

from course.pages.site import ROOT
from rebased import files, train_mqar

MEASURES = tuple(train_mqar.MEASURES)
DIGITS = 4


def measured(folder=ROOT / "results"):
    """{"text", "trained_at", "lengths", "lines", "doses"}; doses is None without floor.jsonl."""
    rows = files.read_rows(folder / "mqar.jsonl", fields=["mixer", "seed", "length", "cells"])
    lengths = rows[0]["test_lengths"]
    lines = {}
    for title, results in train_mqar.lines_of(rows).items():
        lines[title] = {cell: values_of(results, cell) for cell in results[0]}
    seeds = len({row["seed"] for row in rows})
    made = sorted({f"{row['date']}, commit {row['commit']}, {row['hardware']}" for row in rows})
    text = (
        f"The small models of lesson 04, {seeds} seeds of each: trained at {rows[0]['length']} "
        f"tokens, tested unchanged at {', '.join(f'{length:,}' for length in lengths)}. "
        "“Based, floor 0” is no other model: it is Based with its ½ set to 0, nothing retrained. "
        f"Rows: results/mqar.jsonl ({'; '.join(made)})."
    )
    return {
        "text": text,
        "trained_at": rows[0]["length"],
        "lengths": lengths,
        "lines": lines,
        "doses": doses(folder / "floor.jsonl"),
    }


def values_of(results, cell):
    """{measure: one number for each seed}."""
    return {
        measure: [round(cells[cell][measure], DIGITS) for cells in results] for measure in MEASURES
    }


def doses(path):
    """{kernel: [a dictionary for each floor in training, means over seeds]}; None without rows."""
    if not path.exists():
        return None
    fields = ["part", "role", "kernel", "floor", "seed", "cells"]
    groups = {}
    for row in files.read_rows(path, fields=fields):
        if row["part"] == "dose" and row["role"] == "report":
            groups.setdefault(row["kernel"], {}).setdefault(row["floor"], []).append(row)
    found = {}
    for kernel, by_floor in groups.items():
        found[kernel] = [dose(floor, by_floor[floor]) for floor in sorted(by_floor)]
    return found or None


def dose(floor, rows):
    """Models trained with one floor: accuracy and share on filler, and accuracy with floor 0."""
    cells = {}
    for cell in rows[0]["cells"]:
        at_0 = [row.get("cells_without_floor", row["cells"])[cell]["accuracy"] for row in rows]
        cells[cell] = {
            "accuracy": round(mean(row["cells"][cell]["accuracy"] for row in rows), DIGITS),
            "accuracy_at_0": round(mean(at_0), DIGITS),
            "filler": round(mean(row["cells"][cell]["filler"] for row in rows), DIGITS),
        }
    return {"floor": floor, "seeds": len(rows), "cells": cells}
